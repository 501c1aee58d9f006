"""A run that survives: kills, full disks, lost processes, spikes of the loss.

The state of a run is its weights, the optimizer's moments and a few numbers; batches and randomness follow
from (seed, step). It is stored whole, whatever the number and layout of the processes that write or read it:

    save     each process copies its parts into the CPU's memory (that alone stops training), then a thread of
             process 0 asks the others' for them, one tensor at a time, and writes. checkpoint.py sees to it
             that a state on the disk is whole or absent, and bears checksums.
    load     each process maps the files and copies its own parts out of them.

A step whose loss or gradient is not finite, or whose loss jumps (`spike_limit`), never touches a weight: it
raises `BadStep` on every process alike, and the loop goes back to the last state and round the batches since
then (as in Chowdhery et al. 2022, section 5.1), until that has happened too often.
"""
import contextlib
import errno
import itertools
import json
import math
import os
import re
import signal
import shutil
import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import adapters
import lora
from checkpoint import load_state, read_json, save_model, save_state, states, write_settings
from config import UserError, show
from parallel import PATIENCE, Env, own_part, part_at
from tensor_files import write_order


class BadStep(UserError):
    """A step that must not be made; no weight has been touched. Raised on every process alike."""


def spike_limit(losses: list[float], deviations: float) -> float:
    """The loss above which a step counts as a spike: the median of the last losses + some deviations.

    losses: of the last steps, nats; with fewer than 20 there is no limit. The deviation is 1.4826 times the
    median distance from the median, which is the standard deviation where losses scatter normally, and which,
    unlike that, one wild loss does not move; at least 1 % of the median. deviations: 0 for no limit.
    """
    if len(losses) < 20 or not deviations:
        return math.inf
    middle = statistics.median(losses)
    spread = 1.4826 * statistics.median(abs(loss - middle) for loss in losses)
    return middle + deviations * max(spread, 0.01 * abs(middle))


class LossScale:
    """The factor that lifts fp16 gradients off zero (Micikevicius et al. 2018, section 3.2), kept by trial.

    Halved when a step's gradients overflow, doubled after `patience` steps in which none did. Unlike torch's
    GradScaler it needs no pass over the gradients and no message between processes: the loop divides by it
    where it divides by the count, and the global norm, equal on all, says whether there was an overflow. It
    begins lower than GradScaler's 65,536, as it lifts the gradient of a sum over tokens, not of their mean.
    """

    def __init__(self, scale: float = 2.0 ** 10, patience: int = 1000):
        self.scale, self.good_steps, self.patience = scale, 0, patience

    def update(self, overflow: bool):
        self.good_steps = 0 if overflow else self.good_steps + 1
        if overflow:
            self.scale /= 2
        elif self.good_steps == self.patience:
            self.scale, self.good_steps = min(self.scale * 2, 2.0 ** 24), 0

    def state_dict(self) -> dict:
        return {"scale": self.scale, "good_steps": self.good_steps}

    def load_state_dict(self, state: dict):
        self.scale, self.good_steps = state["scale"], state["good_steps"]


# ------------------------------------------------------------------------------------------------------------
# Saving


class Parted:
    """Stands for a tensor whose parts lie with several processes; process 0 can put it together, once.

    All processes make one of each tensor. Process 0 calls `whole`, in the same order in which the others call
    `send`. of: the tensor, a DTensor where it lies in parts. copy: this process's part, if `of` will have
    changed by then. group: of gloo, used by one thread at a time.
    """

    def __init__(self, of: Tensor, group=None, copy: Tensor | None = None):
        self.of, self.group, self.copy = of, group, copy
        self.shape, self.dtype, self.fetched = of.shape, of.dtype, False

    def local(self) -> Tensor:
        tensor = self.of if self.copy is None else self.copy
        return local_part(tensor).detach().cpu().contiguous()

    def whole(self) -> Tensor:
        """The tensor in the CPU's memory."""
        self.fetched = True
        if not isinstance(self.of, DTensor):
            return self.local()
        whole = torch.empty(self.shape, dtype=self.dtype)
        for rank, place in holders(self.of):
            part = part_at(whole, self.of, place)
            if rank == 0:
                part.copy_(self.local())
            elif part.numel():
                received = torch.empty(part.shape, dtype=part.dtype)
                dist.recv(received, rank, self.group)
                part.copy_(received)
        return whole

    def send(self):
        if isinstance(self.of, DTensor) and dist.get_rank() in dict(holders(self.of)):
            part = self.local()
            if part.numel():
                dist.send(part, 0, self.group)


def local_part(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def holders(tensor: DTensor) -> list[tuple[int, list[int]]]:
    """(rank, place on the mesh) of those that together hold every part once; of replicas, the first."""
    mesh, found = tensor.device_mesh, []
    for place in itertools.product(*map(range, mesh.shape)):
        if all(p == 0 for p, placement in zip(place, tensor.placements) if placement.is_replicate()):
            found.append((int(mesh.mesh[place]), list(place)))
    return found


def together(write: Callable[[], None], tensors: list[dict[str, Parted]], rank: int):
    """Call write() on process 0, while the others send it the tensors, dict after dict, in `write_order`."""
    ordered = [named[name] for named in tensors for name in write_order(named)]
    if rank > 0:
        for tensor in ordered:
            tensor.send()
        return
    try:
        write()
    finally:
        for tensor in ordered:  # after a full disk, say: nobody is left waiting
            if not tensor.fetched:
                tensor.whole()


def save_whole(model: nn.Module, tokenizer, folder: Path, env: Env):
    """checkpoint.save_model, for a model that may lie in parts; with adapters, these and then all, merged."""
    adapted, parameters = saved_tensors(model)
    tensors = {name: Parted(p, env.patient) for name, p in parameters.items()}

    def write():
        if not adapted:
            save_model(model, tokenizer, folder, tensors=tensors)
            return
        adapters.save_adapter(model, folder / "adapter", tokenizer, tensors=tensors)
        base = lora.base_of(model)
        if base and base["merge"]:
            adapters.merge_folders(base["folder"], folder / "adapter", folder, base["quantize"])
    env.each(lambda: together(write, [tensors], env.rank), patient=True)


def saved_tensors(model: nn.Module) -> tuple[bool, dict[str, nn.Parameter]]:
    """(whether the model has adapters, {name in a file: what is saved of it}).

    All parameters, a tied head under one name; of a model with adapters those that are trained: its base is
    in a folder of its own, and stays as it is.
    """
    adapted, beside = bool(lora.adapters_of(model)), set(tensors_beside(model).values())
    named = lora.trained_tensors(model) if adapted else dict(model.named_parameters())
    return adapted, {name: p for name, p in named.items() if p not in beside}


def tensors_beside(model: nn.Module) -> dict[str, nn.Parameter]:
    """What is learnt along with the model and is no part of it: in its `beside`, if it has one."""
    return {name: p for name, p in model.named_parameters() if name.startswith("beside.")}


class Run:
    """What a training run is, and what of it a state on the disk holds; `save` writes in the background.

    Beside the tensors a state holds: step (how many are done), skipped_windows (of the data, after
    rollbacks), rollbacks, losses (of the last 100 steps), best_loss, best_step (by held-out loss), and the
    loss scale.
    """
    NUMBERS = ("skipped_windows", "rollbacks", "losses", "best_loss", "best_step")

    def __init__(self, folder: Path, model: nn.Module, tokenizer, optimizer, env: Env, identity: dict):
        """identity: settings and the like, which must be equal for a state to be gone on from."""
        self.folder, self.model, self.tokenizer, self.optimizer = folder, model, tokenizer, optimizer
        self.env, self.identity = env, json.loads(json.dumps(identity))  # tuples become lists, as in a file
        self.scaler = LossScale() if env.precision == "fp16" else None
        self.step, self.skipped_windows, self.rollbacks, self.losses = 0, 0, 0, []
        self.best_loss, self.best_step = None, None
        self.thread, self.error, self.stall = None, None, None
        self.group = dist.new_group(backend="gloo", timeout=PATIENCE) if env.world_size > 1 else None
        self.others: dict[str, tuple] = {}  # {name: (model, optimizer)} of what else learns, as PPO's critic

    def save(self, log):
        """Begin to write this moment's state; training waits for a copy in memory, and the last state."""
        began = time.perf_counter()
        self.wait()
        self.env.first(log.sync)  # first: a state must never know of a step that the log has lost
        extra = {"identity": self.identity, "scaler": self.scaler.state_dict() if self.scaler else None,
                 **{name: getattr(self, name) for name in self.NUMBERS}}
        tensors = {group: {name: Parted(tensor, self.group, self.copy(tensor))
                           for name, tensor in named.items()} for group, named in self.tensors().items()}
        # daemon: where one of several processes ends in an error, half a state is no reason to stay
        self.thread = threading.Thread(target=self.write, args=(self.step, tensors, extra), daemon=True)
        self.thread.start()
        self.stall = time.perf_counter() - began

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """All that a state holds, by the files that it lies in."""
        found = named_tensors(self.model, self.optimizer)
        for name, pair in self.others.items():
            found |= {f"{name}_{group}": named for group, named in named_tensors(*pair).items()}
        return found

    def copy(self, tensor: Tensor) -> Tensor | None:
        """This process's part in the CPU's memory, where it is this one that will be asked for it."""
        if self.env.rank in (dict(holders(tensor)) if isinstance(tensor, DTensor) else (0,)):
            return local_part(tensor).detach().to("cpu", copy=True)
        return None

    def write(self, step: int, tensors: dict[str, dict[str, Parted]], extra: dict):
        def write():
            also_keep = () if extra["best_step"] is None else (extra["best_step"],)
            save_state(self.folder / "state", step, tensors, extra, also_keep=also_keep, beside=self.beside)
        try:
            together(write, list(tensors.values()), self.env.rank)
        except BaseException as error:  # of the thread: raised where the loop waits
            self.error = error

    def beside(self, folder: Path):
        """Make a state's folder a model folder too: sample.py and transformers open it."""
        if lora.adapters_of(self.model):
            adapters.write_adapter_settings(self.model, self.tokenizer, folder)
        elif hasattr(self.model, "task"):  # a model of ours, not some module
            write_settings(self.model, self.tokenizer, folder)

    def wait(self):
        """Wait until the last state is on the disk; raise, on all processes, what kept it from there."""
        if self.thread is not None:
            self.thread.join()
            self.thread, error, self.error = None, self.error, None
            if self.env.any(error is not None, patient=True):
                raise error or SystemExit(2)

    def close(self):
        """Leave no thread behind that writes: whoever trains on in this process would meet it.

        A process alone finishes its state. Of several, one may wait for another that is gone: none waits.
        """
        if self.thread is not None and self.env.world_size == 1:
            self.thread.join()

    def news(self) -> dict:
        """For the log: how long the last save stopped training, and how often the run went back."""
        line = {} if self.stall is None else {"save_stall_seconds": round(self.stall, 4)}
        self.stall = None
        if self.rollbacks:
            line["rollbacks"] = self.rollbacks
        if self.scaler:
            line["loss_scale"] = self.scaler.scale
        return line

    @torch.no_grad()
    def load(self):
        """Go to the newest whole state in the folder; stay where there is none.

        Process 0 verifies the checksums; each process then copies its own parts out of the mapped files.
        Raises UserError where the state is another run's.
        """
        state = newest_state(self.folder, self.env)
        if state is None:
            return
        self.step, tensors, extra = state
        check_identity(self.folder, extra["identity"], self.identity)
        for name in self.NUMBERS:
            setattr(self, name, extra[name])
        if self.scaler and extra["scaler"]:
            self.scaler.load_state_dict(extra["scaler"])
        self.put_back(tensors)

    def put_back(self, found: dict[str, dict[str, Tensor]]):
        """Copy this process's parts out of what `tensors` gave."""
        put_back(self.model, self.optimizer, found)
        for name, pair in self.others.items():
            put_back(*pair, {group: found[f"{name}_{group}"] for group in ("model", "optimizer")})


def put_back(model: nn.Module, optimizer, tensors: dict[str, dict[str, Tensor]]):
    """Copy out of what `named_tensors` gave this process's parts of weights and moments."""
    adapted, parameters = saved_tensors(model)
    for name, p in parameters.items():
        local_part(p).copy_(own_part(tensors["adapter_model" if adapted else "model"][name], p))
    beside = tensors_beside(model)
    for name, p in beside.items():
        local_part(p).copy_(own_part(tensors["beside"][name], p))
    parameters |= beside
    optimizer.state.clear()
    for name, whole in tensors["optimizer"].items():
        name, _, key = name.rpartition(".")
        optimizer.state[parameters[name]][key] = laid_out(whole, parameters[name])


def named_tensors(model: nn.Module, optimizer) -> dict[str, dict[str, Tensor]]:
    """{"model": weights, "optimizer": moments}, by name; for adapters "adapter_model", as peft has it."""
    adapted, parameters = saved_tensors(model)
    beside = tensors_beside(model)
    names = {p: name for name, p in (parameters | beside).items()}
    moments = {f"{names[p]}.{key}": value
               for p, state in optimizer.state.items() for key, value in state.items()}
    found = {"adapter_model" if adapted else "model": parameters, "optimizer": moments}
    return found | ({"beside": beside} if beside else {})


# ------------------------------------------------------------------------------------------------------------
# Loading


def newest_state(folder: Path, env: Env) -> tuple[int, dict, dict] | None:
    """(step, tensors, extra) of the newest whole state, mapped; the same on every process."""
    found = []
    env.first(lambda: found.append(load_state(folder / "state", say=env.say)), patient=True)
    step = torch.tensor(found[0][0] if found and found[0] else -1)
    if env.world_size > 1:
        dist.broadcast(step, src=0, group=env.patient)
    if step < 0:
        return None
    state = found[0] if found else load_state(folder / "state", only=int(step))
    if env.any(state is None):
        raise UserError(f"the processes see different states in {folder}; --out must be on a disk they share")
    return state


def laid_out(whole: Tensor, p: Tensor) -> Tensor:
    """A moment of parameter p: laid out as p is, where it has p's shape; else all of it."""
    if whole.shape != p.shape:
        return whole.clone().to(p.device)
    moment = torch.empty_like(p, dtype=whole.dtype, requires_grad=False)
    local_part(moment).copy_(own_part(whole, p))
    return moment


def check_identity(folder: Path, found: dict, wanted: dict):
    """Raise UserError where the run in `folder` was begun with other settings than those wanted now."""
    for name in [*wanted, *found]:
        if found.get(name) != wanted.get(name):
            raise UserError(f"{folder} holds a run with {name} {found.get(name)}, not {wanted.get(name)}; "
                            f"continue it with its own settings, choose another --out, or pass --overwrite "
                            f"to delete it")


def check_newest(folder: Path, identity: dict):
    """check_identity of the newest state, if there is one: for a stage that has long work before it trains.

    A state that cannot be read is left to Run.load, which may take the one before it.
    """
    newest = states(folder / "state")[:1]
    try:
        found = [read_json(state / "state.json")["extra"]["identity"] for state in newest]
    except (OSError, UserError, KeyError, TypeError):
        return
    for one in found:
        check_identity(folder, one, json.loads(json.dumps(identity)))


# ------------------------------------------------------------------------------------------------------------
# The folder of a run: nobody else's, and ours alone


MODEL_FILES = ("model.safetensors", "config.json", "generation_config.json", "tokenizer.json",
               "tokenizer_config.json")


@contextlib.contextmanager
def in_run_folder(settings, env: Env):
    """Within this context process 0 holds the folder of a run, for all; the settings in effect are shown."""
    with contextlib.ExitStack() as stack:
        env.first(lambda: stack.enter_context(open_run_folder(settings)))
        if env.rank == 0:
            show(settings)
        yield


@contextlib.contextmanager
def open_run_folder(settings):
    """Make settings.out, or refuse it, and hold it alone. Only --overwrite deletes, and what a run writes."""
    folder = Path(settings.out)
    for name in ("data", "init_from", "replay", "prompts_data", "reward_model", "critic_from", "teacher",
                 "stored"):
        other = getattr(settings, name, None)
        if other and folder.resolve() in (Path(other).resolve(), *Path(other).resolve().parents):
            raise UserError(f"--out {folder} holds --{name} {other}; choose another --out")
    if folder.is_dir() and is_run(folder):
        with alone(folder):
            clear_run_folder(folder, settings.overwrite)
            yield
        return
    if folder.exists() and (not folder.is_dir() or any(path.suffix != ".tmp" for path in folder.iterdir())):
        raise UserError(f"{folder} exists and is not a run folder; choose another --out")
    folder.mkdir(parents=True, exist_ok=True)
    with alone(folder):
        yield


def clear_run_folder(folder: Path, overwrite: bool):
    if overwrite:
        shutil.rmtree(folder / "state", ignore_errors=True)
        shutil.rmtree(folder / "adapter", ignore_errors=True)
        # settings.json stays: after a kill here it is still a run
        for name in (*MODEL_FILES, "log.jsonl", "trace.json", "results.json", "rewards.svg", "kl.svg"):
            (folder / name).unlink(missing_ok=True)
    if any((folder / name).exists() for name in MODEL_FILES) and not states(folder / "state"):
        raise UserError(f"{folder} holds a model but no state to go on from; choose another --out, "
                        f"or pass --overwrite")


def is_run(folder: Path) -> bool:
    """Whether a run of ours stands there: other programs have a settings.json too."""
    try:
        content = json.loads((folder / "settings.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and {"steps", "out", "schedule"} <= content.keys()


@contextlib.contextmanager
def alone(folder: Path):
    """Hold the folder while the context lasts; UserError where another process does.

    By a lock on <folder>/lock.tmp, which the system lets go when we end, however we end.
    """
    with open(folder / "lock.tmp", "ab") as file:
        try:
            if os.name == "nt":
                import msvcrt
                msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
            else:
                import fcntl
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN, errno.EDEADLK):  # not: a disk that knows no locks
                raise UserError(f"another process is at work in {folder}; wait for its end, or choose "
                                f"another folder") from None
        yield


# ------------------------------------------------------------------------------------------------------------
# Signals, and processes that are lost


class stop_signals:
    """Within this context Ctrl-C and SIGTERM only raise a flag, so that the step is finished and saved.

    One more, a second or later, stops at once. (A launcher may pass on the Ctrl-C that the terminal has sent
    to all, so two within a second are one.) SIGUSR1, where there is one, raises the flag `evaluate`.
    """

    def __enter__(self):
        self.signal, self.when, self.old, self.evaluate = 0, 0.0, {}, False
        for number in (signal.SIGINT, signal.SIGTERM):
            self.old[number] = signal.signal(number, self.note)
        if hasattr(signal, "SIGUSR1"):
            self.old[signal.SIGUSR1] = signal.signal(signal.SIGUSR1, self.note_evaluate)
        return self

    def __exit__(self, *error):
        for number, handler in self.old.items():
            signal.signal(number, handler)

    def note(self, number, frame):
        if not self.signal:
            self.signal, self.when = number, time.monotonic()
        elif time.monotonic() - self.when > 1:
            raise KeyboardInterrupt

    def note_evaluate(self, number, frame):
        self.evaluate = True

    def asked(self) -> bool:
        """Whether an evaluation has been asked for since the last call."""
        asked, self.evaluate = self.evaluate, False
        return asked

    def __bool__(self):
        return self.signal != 0

    def exit(self, message: str, env: Env):
        env.say(message)
        # what a shell reports for a program ended by this signal
        raise SystemExit(128 + (self.signal or signal.SIGTERM))


LOST = (r"[Tt]im(ed ?out|eout)|Connection (closed|reset|refused)|Broken pipe|communicator was aborted|"
        r"[Ff]ailed to (recv|send)|remote process exited")


def lost_process(error: BaseException, minutes: float) -> UserError | None:
    """The error in a line, where it says that another process is gone or hangs; None where it is another."""
    text = str(error)
    rank, world_size = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    if world_size == "1" or not re.search(LOST, text):
        return None
    what = "the connection to another process is lost: it ended, see its message"
    if re.search(r"[Tt]imed out|[Tt]imeout", text):
        what = f"another process did not answer for {minutes:g} minutes (--timeout_minutes): it hangs"
    return UserError(f"process {rank} of {world_size}: {what}. The same command goes on from the "
                     f"last state; torchrun --max-restarts 3 does so by itself")
