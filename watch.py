"""What is seen of a run: before it, what it would take; its log and its progress line; where its time goes.

    python train.py --preset 7b --dry_run    # parameters, FLOPs and memory, before anything is allocated
    python train.py --profile                # a trace of a few steps, and a table of where their time goes

`out_of_memory` says in one line what helps, should the memory not be enough after all.
"""
import contextlib
import ctypes
import json
import math
import os
import re
import sys
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path

try:
    import resource
except ImportError:  # Windows
    resource = None

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity

from config import UserError, open_whole, to_json
from costs import GIB, aligned, count_parameters, estimate_flops, estimate_memory, gib
from parallel import mesh_sizes

# ------------------------------------------------------------------------------------------------------------
# Before it


def dry_run(config, settings, env, tokens: int | None = None) -> str:
    """What training this model would take: parameters, FLOPs, memory a process by part, and whether it fits.

    Nothing is allocated. tokens: how many are seen in all, where the batch does not keep its size.
    """
    layout = layout_of(settings, env)
    memory, free = estimate_memory(config, **layout), free_memory(env.device)
    tokens = tokens or settings.steps * settings.batch_size * settings.seq_len
    flops = estimate_flops(config, settings.seq_len)
    about = {"weights": "float32" + ", and copies for the products" * (env.precision in ("bf16", "fp16")),
             "gradients": "float32", "moments": settings.optimizer,
             "activations": f"{layout['batch_size']} windows of {settings.seq_len} tokens at once, "
                            f"recomputed: {settings.activation_checkpointing}",
             "logits": "hidden states, and chunks" if settings.chunked_loss else "all at once", "total": ""}
    rows = [("parameters", f"{count_parameters(config):,}", f"{config.n_layers} blocks, width {config.dim}"),
            ("FLOP a token", f"{flops:.3g}", "forward and backward"),
            ("FLOP in all", f"{flops * tokens:.3g}", f"{tokens:,} tokens{duration(flops * tokens, env)}"),
            ("", "", ""),
            ("memory", "GiB", f"a process of {env.world_size}, {settings.data_parallel}, {env.precision}")]
    rows += [(f"  {part}", gib(memory[part], memory["total"]), about[part]) for part in about]
    if free is not None:
        rows.append(("  there are", gib(free, memory["total"]), f"free now on {env.device}, for a process"))
    return "\n".join(["dry run: nothing is allocated", *aligned(rows), verdict(config, layout, free)])


def layout_of(settings, env) -> dict:
    """The arguments of estimate_memory for one process of this run."""
    replicas, shards, _ = mesh_sizes(settings, env.world_size)
    share = (settings.batch_start or settings.batch_size) // (replicas * shards)
    as_set = ("seq_len", "optimizer", "activation_checkpointing", "checkpoint_every", "chunked_loss",
              "data_parallel", "reshard", "tensor_parallel")
    return {"batch_size": settings.micro_batch_size or max(1, share), "precision": env.precision,
            "chunk": 2 ** 27 if env.device.type == "cuda" else 2 ** 21,  # as in objectives.py
            "masked": settings.objective == "prefix", "shards": shards,
            **{name: getattr(settings, name) for name in as_set}}


def duration(flops: float, env) -> str:
    hours = flops / (0.4 * env.peak_flops * env.world_size) / 3600 if env.peak_flops else 0
    words = f"{hours / 24:,.1f} days" if hours >= 48 else f"{hours:.2g} hours"
    return f"; {words} at 40 % of peak" if hours else ""


def verdict(config, layout: dict, free: int | None) -> str:
    """One line where it fits; else what each of the three flags that help would bring."""
    total = estimate_memory(config, **layout)["total"]
    if free is None:
        return f"whether {gib(total)} GiB fit is not known: this system does not say what it has"
    if total <= 0.9 * free:  # the rest: what the allocator loses, and what operations take for a moment
        return f"fits: {gib(total)} of {gib(free)} GiB"
    shards = max(8, 2 * layout["shards"])
    helps = {"--micro_batch_size 1": {"batch_size": 1},
             "--activation_checkpointing full": {"activation_checkpointing": "full", "checkpoint_every": 1},
             f"--data_parallel fsdp, {shards} processes": {"data_parallel": "fsdp", "shards": shards}}
    helps["all three"] = {name: value for changes in helps.values() for name, value in changes.items()}
    rows = [(f"  {flag}", gib(estimate_memory(config, **layout | changes)["total"], total), "GiB")
            for flag, changes in helps.items()]
    head = f"does not fit: {gib(total)} of {gib(free)} GiB, a tenth of which should stay free. With"
    return "\n".join([head, *aligned(rows)])


def free_memory(device: torch.device) -> int | None:
    """Bytes that this process can still have on its device; None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "mps":
        return torch.mps.recommended_max_memory()
    with contextlib.suppress(OSError, ValueError, AttributeError, StopIteration):
        return machine_memory() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # processes share the machine's
    return None


def machine_memory() -> int:
    """Bytes that are free on this machine, or where it does not say (macOS) all that it has."""
    if os.name == "nt":
        status = (ctypes.c_uint64 * 8)(64)  # MEMORYSTATUSEX, 64 bytes long: the third number is free memory
        ctypes.windll.kernel32.GlobalMemoryStatusEx(ctypes.byref(status))
        return status[2]
    if Path("/proc/meminfo").exists():  # Linux: what is free, and what the file cache would give back
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def out_of_memory(error: BaseException, settings) -> UserError | None:
    """What was asked for, where, and what helps, if the error says that memory ran out; None for others."""
    text, words = str(error), r"out of memory|DefaultCPUAllocator|CUBLAS_STATUS_ALLOC_FAILED"
    from_torch = isinstance(error, RuntimeError) and re.search(words, text)
    if not from_torch and not isinstance(error, MemoryError):
        return None
    size = re.search(r"(?:[Tt]ried|Unable) to allocate (?:(\d+) bytes|([\d.]+ [KMGTPE]i?B))", text)
    asked = f", which was asked for {size[2] or gib(int(size[1])) + ' GiB'} more" if size else ""
    where = re.search(r"GPU \d+", text) or re.search(r"MPS|CUDA", text)
    what = f"out of memory on {where[0] if where else 'the CPU'}{asked}"
    if not hasattr(settings, "micro_batch_size"):  # nothing is trained: answers.py
        return UserError(f"{what}; a smaller --prompts_at_once (now {settings.prompts_at_once}) takes less")
    micro = settings.micro_batch_size or "all windows of a process"
    return UserError(f"{what}; a smaller --micro_batch_size (now {micro}), --activation_checkpointing full, "
                     f"or --data_parallel fsdp over more processes take less; --dry_run shows how much")


# ------------------------------------------------------------------------------------------------------------
# The log


class Log:
    """log.jsonl: one line a step, without gap or repeat. Process 0 opens it; the others only remember."""

    def __init__(self):
        self.file, self.last = None, None

    def open(self, folder: Path, steps_done: int, settings):
        """Go on after `steps_done`: the lines of later steps, which no state knows of, are taken back."""
        path, kept = folder / "log.jsonl", []
        self.close()
        if path.exists():
            for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
                with contextlib.suppress(ValueError):  # a kill may have cut the last line short
                    line = json.loads(text)
                    step = line.get("step") if isinstance(line, dict) else None
                    if isinstance(step, int) and step <= steps_done:
                        kept.append((text, line))
        if [line["step"] for _, line in kept] != list(range(1, steps_done + 1)):
            raise UserError(f"{path} lacks some of the {steps_done} steps that are done; put it back, "
                            f"or pass --overwrite")
        self.last = kept[-1][1] if kept else None
        folder.mkdir(parents=True, exist_ok=True)
        with open_whole(folder / "settings.json", "w") as file:
            file.write(to_json(replace(settings, overwrite=False)))
        with open_whole(path, "w") as file:
            file.writelines(text + "\n" for text, _ in kept)
        self.file = open(path, "a", encoding="utf-8", newline="\n")

    def write(self, line: dict):
        self.last = line
        if self.file:
            self.file.write(json.dumps(line, allow_nan=False) + "\n")
            self.file.flush()

    def sync(self):
        """Wait until all lines are on the disk."""
        os.fsync(self.file.fileno())

    def close(self):
        if self.file:
            self.file.close()


def read_log(folder: str | Path) -> list[dict]:
    """The lines of a run's log, a dict a step."""
    with open(Path(folder) / "log.jsonl", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def spent(folder: Path, last: dict) -> str:
    """What a run took, by its log, in words. last: the log's last line."""
    return (f"{sum(line['seconds'] for line in read_log(folder)):.0f} s in steps, peak memory "
            f"{last.get('memory_gib', math.nan):.3f} GiB")


def write_results(folder, results: dict):
    """results.json: what a run is worth on held-out data, and samples; report.py reads it."""
    with open_whole(Path(folder) / "results.json", "w") as file:
        json.dump(results, file, indent=1)


def log_line(step, lr, report, batches, seconds, model, settings, env, tokens=None, tokens_step=None,
             data_wait=0.0) -> dict:
    """The log's line for a step, counted from 0; units stand in the names.

    report: what `update` returned. tokens, tokens_step: seen so far and in this step, over all processes; by
    default each step's batch is whole. data_wait: seconds of `seconds` that the step waited for its batches.
    mfu: the model's FLOPs over what the processes' matrix products were measured to reach.
    """
    tokens_step = tokens_step or settings.batch_size * settings.seq_len
    figures = (report["loss"], report["grad_norm"])
    loss, norm = (x if math.isfinite(x) else None for x in figures)  # JSON has no infinity
    line = {"step": step + 1, f"loss_nats_per_{term(batches)}": loss, "lr": lr, "grad_norm": norm,
            "targets": report["targets"], "tokens": tokens or (step + 1) * tokens_step,
            "tokens_per_second": round(tokens_step / seconds), "seconds": round(seconds, 4),
            "data_wait_seconds": round(data_wait, 4)}
    line |= report.get("figures", {})
    if report["skipped"]:
        line["skipped"] = True
    if hasattr(batches, "text_bytes") and loss is not None:
        line["bits_per_byte"] = loss / math.log(2) * batches.tokens / batches.text_bytes
    if env.peak_flops and hasattr(model, "config"):
        flops = estimate_flops(model.config, settings.seq_len) * tokens_step / seconds
        line["mfu"] = round(flops / (env.peak_flops * env.world_size), 4)
    peak = peak_memory(env.device)
    return line if peak is None else line | {"memory_gib": round(peak / GIB, 4)}


def term(batches) -> str:
    """What losses are sums over: tokens, unless the batches say otherwise (pairs)."""
    return getattr(batches, "term", "token")


def peak_memory(device: torch.device) -> int | None:
    """The most bytes held so far: tensors on a GPU, else all of this process. None on Windows."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if resource is None:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


SHOWN = {"accuracy": 2, "chosen_reward": 3, "rejected_reward": 3}  # figures of losses: digits in the progress


def describe(line: dict) -> str:
    """The line of the log in the words of the progress line."""
    if line.get("skipped"):
        return "skipped: overflow, the loss scale is halved"
    loss = next(value for name, value in line.items() if name.startswith("loss_nats_per_"))
    words = [f"loss {loss:.3f}"]
    if "bits_per_byte" in line:
        words.append(f"{line['bits_per_byte']:.3f} bits/byte")
    words += [f"{name} {line[name]:.{digits}f}" for name, digits in SHOWN.items()
              if line.get(name) is not None]
    words += [f"lr {line['lr']:.1e}", f"norm {line['grad_norm']:.2f}", f"{line['tokens_per_second']:,} tok/s"]
    if "mfu" in line:
        words.append(f"{line['mfu']:.0%} of peak")
    if line.get("data_wait_seconds", 0) > 0.1 * line.get("seconds", math.inf):
        words.append(f"{line['data_wait_seconds'] / line['seconds']:.0%} waiting for data")
    if "rollbacks" in line:
        words.append(f"rollbacks {line['rollbacks']}")
    return ", ".join(words)


# ------------------------------------------------------------------------------------------------------------
# Where the time goes

WARM_UP, RECORDED = 2, 3  # steps: the first ones allocate and compile
# An operation is of the first kind whose pattern is in its name, in that of a GPU's kernel for it, or in that
# of an operation that it is part of
KINDS = {kind: re.compile(pattern, re.MULTILINE) for kind, pattern in {
    "data": r"^data$|Memcpy HtoD",
    "communication": r"c10d|nccl|gloo|FSDP::",
    "optimizer": r"Optimizer\.step|_fused_adam|_foreach_",
    "attention": r"scaled_dot_product|ScaledDotProduct|flash|fmha",
    "head and loss": r"LinearCrossEntropy|LinearLogps|cross_entropy|nll_loss|log_softmax",
    "matrix products": r"aten::(add|b|baddb)?mm$|gemm|triton_mm",
    "other": r"",  # norms, rotary positions, sums: element by element
}.items()}


class Profile:
    """A trace of a few steps and, in words, where their time goes; where it is not wanted, nothing.

        with Profile(folder, wanted, env) as profile: each step ends with profile.step()

    Process 0 records, writes folder/trace.json and prints the table, once.
    """

    def __init__(self, folder: Path, wanted: bool, env):
        self.path, self.env, self.profiler, self.steps = Path(folder) / "trace.json", env, None, 0
        if wanted and env.rank == 0:
            activities, gpu = [ProfilerActivity.CPU], env.device.type == "cuda"
            if gpu:
                activities.append(ProfilerActivity.CUDA)
            else:
                os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # it tells of its start and its stop
            schedule = torch.profiler.schedule(wait=WARM_UP - 1, warmup=1, active=RECORDED, repeat=1)
            self.profiler = torch.profiler.profile(activities=activities, schedule=schedule, acc_events=True)

    def __enter__(self):
        if self.profiler:
            self.profiler.start()
        return self

    def step(self):
        if self.profiler:
            self.profiler.step()
            self.steps += 1
            if self.steps == WARM_UP + RECORDED:
                profiler, self.profiler = self.profiler, None  # the steps to come are to cost nothing
                profiler.stop()
                self.show(profiler)

    def __exit__(self, kind, *error):
        if self.profiler:
            self.profiler.stop()
            if kind is None:
                self.env.say(f"--profile: no trace; it takes {WARM_UP + RECORDED} steps, this run made "
                             f"{self.steps}")

    def show(self, profiler):
        temporary = self.path.with_name(self.path.name + ".tmp")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(temporary))
        os.replace(temporary, self.path)  # whole or not at all
        self.env.say(time_table(profiler.events(), self.env.device.type))
        self.env.say(f"trace: {self.path}; open it at https://ui.perfetto.dev")


def time_table(events, device: str) -> str:
    """The recorded steps' time by kind of work, beside each its costliest operations."""
    steps = [event for event in events
             if event.name.startswith("ProfilerStep") and event.device_type == DeviceType.CPU]
    whole = sum(step.time_range.elapsed_us() for step in steps)
    kinds: dict[str, Counter] = defaultdict(Counter)
    for name, chain, microseconds in own_times(events, device, steps[0].thread):
        kind = next(kind for kind, pattern in KINDS.items() if pattern.search(chain))
        kinds[kind][name] += microseconds
    times = Counter({kind: sum(operations.values()) for kind, operations in kinds.items()}).most_common()
    rest = "idle: the GPU waits" if device == "cuda" else "Python, and waiting"
    times.append((rest, max(0.0, whole - sum(time for _, time in times))))  # (kernels may run side by side)
    rows = [(f"  {kind}", f"{time / whole:.0%}", f"{time / len(steps) / 1e3:,.2f} ms",
             ", ".join(f"{name.removeprefix('aten::')[:56]} {spent / whole:.0%}"
                       for name, spent in kinds[kind].most_common(3) if spent >= 0.01 * whole))
            for kind, time in times]
    head = f"where the {whole / len(steps) / 1e3:,.2f} ms of a step go ({len(steps)} steps, process 0):"
    return "\n".join([head, *aligned(rows)])


def own_times(events, device: str, thread: int):
    """(name, its name and those of all that it is part of, microseconds) of each operation.

    On a GPU of each kernel; else of the operations of that thread, without those that they call.
    """
    for event in events:
        if event.device_type != DeviceType.CPU or event.name.startswith("ProfilerStep"):
            continue
        chain, parent = event.name, event.cpu_parent
        while parent is not None:
            chain, parent = f"{chain}\n{parent.name}", parent.cpu_parent
        if device != "cuda" and event.thread == thread:
            yield event.name, chain, event.self_cpu_time_total
        for kernel in event.kernels if device == "cuda" else ():
            if kernel.name != event.name:  # a range that was named by hand appears as a kernel of that name
                yield kernel.name, f"{kernel.name}\n{chain}", kernel.duration
