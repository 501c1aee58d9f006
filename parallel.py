"""Where a run runs: its processes, their devices, and what is done to a model so that it trains there.

`setup` says which process this is and chooses device, precision and compiler; `parallelize` edits a model
from outside, so that model.py knows nothing of all this. Here: data parallelism by hand, in a dozen lines.
Every process holds the whole model, sees its own windows, and `reduce_gradients` adds up what they found.
"""
import contextlib
import importlib.util
import os
import shutil
import sys
import time
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

from config import UserError
from model import Block


@dataclass
class Env:
    """This process's place in the run, and what its device can do."""
    device: torch.device
    precision: str = "fp32"  # fp32, bf16 or fp16
    rank: int = 0
    world_size: int = 1
    compile: bool = False
    peak_flops: float = 0.0  # measured, a second and process; 0: not known

    @property
    def scalar_device(self):
        """Where float64 sums are kept: MPS has no float64, and gloo reduces on the CPU."""
        return self.device if self.device.type == "cuda" else torch.device("cpu")

    def to_device(self, batch):
        return tuple(tensor.to(self.device, non_blocking=True) for tensor in batch)

    def autocast(self):
        if self.precision == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16 if self.precision == "bf16" else torch.float16)

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """The sum over all processes, in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def any(self, flag: bool) -> bool:
        """True on every process if it is true on one: who leaves a loop alone leaves the others waiting."""
        if self.world_size == 1:
            return flag
        return bool(self.all_reduce(torch.tensor(float(flag), device=self.scalar_device)))

    def first(self, action):
        """Call action() on process 0, while the others wait. Where it fails, all end: none waits for ever."""
        failure = None
        if self.rank == 0:
            try:
                action()
            except BaseException as error:  # raised again below, once the others know
                failure = error
        if self.any(failure is not None):
            raise failure or SystemExit(2)

    def say(self, *words):
        if self.rank == 0:
            tqdm.write(" ".join(map(str, words)))
            sys.stdout.flush()  # so that it stands before what a subprocess prints, also in a file


def setup(settings) -> Env:
    """Join the other processes (torchrun says who we are), choose device, precision, compiler; say which."""
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = choose_device(settings.device, world_size)
    if device.type == "cuda":
        local_rank = int(os.environ.get("LOCAL_RANK", 0))
        if local_rank >= torch.cuda.device_count():
            raise UserError(f"process {local_rank} of this machine has no GPU: there are "
                            f"{torch.cuda.device_count()}; pass torchrun a smaller --nproc-per-node, "
                            f"or --device cpu")
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32 for what stays in fp32
    if world_size > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    precision, why_precision = choose_precision(settings.precision, device)
    compiles, why_compile = choose_compile(settings, device)
    env = Env(device, precision, rank, world_size, compiles)
    env.peak_flops = measure_peak(env)
    threads = f", {torch.get_num_threads()} threads each" if device.type == "cpu" else ""
    env.say(f"device: {device} x {world_size}{threads}; precision: {precision} ({why_precision}); "
            f"torch.compile: {'on' if compiles else 'off'} ({why_compile}); "
            f"matrix products: {env.peak_flops / 1e9:,.0f} GFLOP/s measured")
    return env


def choose_device(wanted: str, world_size: int = 1) -> torch.device:
    """The device of that name; for "auto" the first there is of cuda, mps, cpu. UserError if there is none.
    """
    have = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available() and world_size == 1,
            "cpu": True}  # (gloo, which joins processes on a Mac, knows no mps tensors)
    if wanted == "auto":
        wanted = next(name for name in have if have[name])
    if not have[wanted]:
        raise UserError(f"--device {wanted}: there is none here that torch {torch.__version__} can use with "
                        f"{world_size} process(es); pass --device auto")
    return torch.device(wanted)


def choose_precision(wanted: str, device: torch.device) -> tuple[str, str]:
    """The precision of matrix products and why; for `--precision auto` the fastest that needs no care."""
    if wanted != "auto":
        return wanted, "as asked"
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return ("bf16", "the GPU has it") if native else ("fp16", "the GPU has no bf16; losses are scaled")
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()  # (an older torch has no such function)
    if device.type == "cpu" and capabilities.get("amx_bf16"):
        return "bf16", "the CPU has AMX"
    return "fp32", f"bf16 does not pay on this {device.type}"


def choose_compile(settings, device: torch.device) -> tuple[bool, str]:
    if settings.compile is not None:
        return settings.compile, "as asked"
    if device.type != "cuda":  # measured: half a minute to compile, then a tenth faster
        return False, f"repays itself on a {device.type} only in runs of many minutes; --compile asks for it"
    if importlib.util.find_spec("triton") is None or torch.cuda.get_device_capability(device)[0] < 7:
        return False, "it needs triton, and a GPU that triton knows"
    if not any(map(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang"))):
        return False, "it needs a C compiler"
    if settings.steps < 300:  # by steps, not by the clock: the choice changes the last bits of the result
        return False, "too few steps to repay it"
    return True, "triton is here, and the run is long enough to repay it"


def measure_peak(env: Env) -> float:
    """FLOP/s of a plain matrix product in this precision: the bound that training is measured against."""
    n = {"cuda": 8192, "mps": 4096}.get(env.device.type, 1024 if env.precision == "fp32" else 512)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[env.precision]
    a = torch.ones(n, n, dtype=dtype, device=env.device)
    seconds = []
    for _ in range(4):
        began = time.perf_counter()
        (a @ a)[0, 0].item()  # .item() waits for the device
        seconds.append(time.perf_counter() - began)
    return 2 * n ** 3 / min(seconds)


def parallelize(model: nn.Module, env: Env) -> nn.Module:
    """Make the model train on all processes, compiled where that was chosen; edits it and returns it.

    Data parallel: each process holds the whole model and its own part of each batch; `reduce_gradients` adds
    up what they found. They start equal because all take process 0's weights. Blocks are compiled one by one,
    in place: as they have one shape, one compilation serves all, and no parameter changes its name.
    """
    if env.world_size > 1:
        for tensor in [*model.parameters(), *model.buffers()]:
            dist.broadcast(tensor.data, src=0)
    if env.compile:
        for module in model.modules():
            if isinstance(module, Block):
                # each shape for itself: what ran before must not change the kernels, and with them the bits
                module.compile(dynamic=False)
    return model


@torch.no_grad()
def reduce_gradients(model: nn.Module, env: Env):
    """Replace each gradient by its sum over all processes, in one message."""
    if env.world_size == 1:
        return
    parameters = [p for p in model.parameters() if p.requires_grad]
    for p in parameters:  # a process whose batch did not use a parameter still has to send its zeros
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
    flat = env.all_reduce(torch.cat([p.grad.flatten() for p in parameters]))
    for p, part in zip(parameters, flat.split([p.numel() for p in parameters])):
        p.grad.copy_(part.view_as(p))
