"""Where a run runs: its processes, their devices, and what is done to a model so that it trains there.

`setup` says which process this is, chooses device, precision and compiler, and lays the processes out on a
mesh of three axes; `parallelize` edits a model from outside, with torch's own parts, so that model.py knows
nothing of all this:

    torchrun --nproc-per-node 4 train.py                                          # DDP
    torchrun --nproc-per-node 4 train.py --data_parallel fsdp                     # FSDP: weights in 4 parts
    torchrun --nproc-per-node 4 train.py --data_parallel hsdp --shard_size 2      # 2 copies in 2 parts each
    torchrun --nproc-per-node 4 train.py --data_parallel fsdp --tensor_parallel 2

Every layout gives the losses of one process (tests/test_parallel.py): what differs is memory and messages.

    axis        its processes hold             what they send
    replicate   the same weights               gradients, once a step (DDP; Li et al. 2020)
    shard       each a part of every tensor    weights before a block, gradients after it (ZeRO; Rajbhandari
                                               et al. 2020; FSDP; Zhao et al. 2023)
    tensor      each some heads and columns    activations, twice a block (Shoeybi et al. 2019); in between
                                               each has some positions (Korthikanti et al. 2022)
"""
import contextlib
import functools
import importlib.util
import logging
import math
import os
import shutil
import sys
import time
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (ColwiseParallel, PrepareModuleInput, PrepareModuleOutput,
                                               RowwiseParallel, SequenceParallel, parallelize_module)
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from tqdm import tqdm

from config import UserError, require
from model import Block, ModelConfig


@dataclass
class Compute:
    """How and where to compute: settings that every stage's Settings inherit. None changes what is learnt."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # auto: the first there is of cuda, mps, cpu
    precision: Literal["auto", "fp32", "tf32", "bf16", "fp16"] = "auto"  # of matrix products; weights and
                                                                         # moments stay fp32
    compile: bool | None = None  # torch.compile; none: where a compiler is found and the run is long enough
    data_parallel: Literal["ddp", "fsdp", "hsdp"] = "ddp"  # processes hold: all weights; each a part of them;
                                                           # parts within groups of shard_size
    shard_size: int | None = None  # hsdp: processes that share one copy of the weights; none: a machine's
    tensor_parallel: int = 1  # processes that share each matrix product; seq_len and heads: multiples of it
    reshard: bool = True  # fsdp, hsdp: free a block's weights after its forward pass, gather them again for
                          # the backward one (ZeRO-3); --no-reshard keeps them in between (ZeRO-2)
    reduce_dtype: Literal["fp32", "bf16"] = "fp32"  # in which gradients are added up over processes
    activation_checkpointing: Literal["none", "full", "selective"] = "none"  # recompute in the backward pass:
        # a whole block (least memory, a third more time), or all but its matrix products and its attention
    checkpoint_every: int = 1  # recompute in every k-th block only
    timeout_minutes: float = 10.0  # a process that keeps the others waiting longer ends the run

    def check_compute(self):
        """Raise UserError where one of these is out of range."""
        require(self, shard_size=(1, None), tensor_parallel=(1, None), checkpoint_every=(1, None),
                timeout_minutes=(0.01, 60 * 24))
        if self.shard_size and self.data_parallel != "hsdp":
            raise UserError(f"--shard_size {self.shard_size} is for --data_parallel hsdp, not "
                            f"{self.data_parallel}; leave it out")
        if self.checkpoint_every > 1 and self.activation_checkpointing == "none":
            raise UserError(f"--checkpoint_every {self.checkpoint_every} needs --activation_checkpointing "
                            f"full or selective")


PATIENCE = timedelta(hours=2)  # for what has to do with disks: preparing data, reading and writing states
COMPUTE_DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class Env:
    """This process's place in the run, and what its device can do."""
    device: torch.device
    precision: str = "fp32"  # fp32, tf32, bf16 or fp16
    rank: int = 0
    world_size: int = 1
    compile: bool = False
    peak_flops: float = 0.0  # measured, a second and process; 0: not known
    compute: Compute = field(default_factory=Compute)
    mesh: DeviceMesh | None = None  # axes replicate, shard, tensor; None: a single process, nothing sharded
    patient: dist.ProcessGroup | None = None  # of gloo, for waits that may be long, up to PATIENCE

    @property
    def data_rank(self) -> int:
        """Which part of each batch is this process's: those that share a matrix product share it."""
        return self.rank // self.compute.tensor_parallel

    @property
    def data_world_size(self) -> int:
        """Into how many parts a batch is cut."""
        return self.world_size // self.compute.tensor_parallel

    @property
    def scalar_device(self):
        """Where float64 sums are kept: MPS has no float64, and gloo reduces on the CPU."""
        return self.device if self.device.type == "cuda" else torch.device("cpu")

    @property
    def products(self) -> torch.dtype:
        """What rough matrix products outside the model may be computed in: bfloat16 or float32."""
        return torch.bfloat16 if self.precision == "bf16" else torch.float32

    def to_device(self, batch):
        return tuple(tensor.to(self.device, non_blocking=True) for tensor in batch)

    def autocast(self):
        """Matrix products in the chosen precision. FSDP casts the weights themselves, once a block."""
        if COMPUTE_DTYPES[self.precision] == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, COMPUTE_DTYPES[self.precision])

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """The sum over all processes, in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def sum_over_data(self, tensor: Tensor) -> Tensor:
        """The sum over the parts of a batch, in place: each counts once, however many processes share it."""
        return self.all_reduce(tensor).div_(self.compute.tensor_parallel)

    def any(self, flag: bool, patient: bool = False) -> bool:
        """True on every process if it is true on one: who leaves a loop alone leaves the others waiting."""
        if self.world_size == 1:
            return flag
        flags = torch.tensor(float(flag), device="cpu" if patient else self.scalar_device)
        dist.all_reduce(flags, group=self.patient if patient else None)
        return bool(flags)

    def each(self, action, patient: bool = False):
        """Call action() on every process. Where it fails on one, all end: none waits for ever.

        patient: it may take longer than --timeout_minutes, as what has to do with disks may.
        """
        failure = None
        try:
            action()
        except BaseException as error:  # raised again below, once the others know
            failure = error
        if self.any(failure is not None, patient):
            raise failure or SystemExit(2)

    def first(self, action, patient: bool = False):
        """Call action() on process 0, while the others wait."""
        self.each(action if self.rank == 0 else lambda: None, patient)

    def say(self, *words):
        if self.rank == 0:
            tqdm.write(" ".join(map(str, words)))
            sys.stdout.flush()  # so that it stands before what a subprocess prints, also in a file


# ------------------------------------------------------------------------------------------------------------
# Joining the others, and choosing


def setup(settings: Compute) -> Env:
    """Join the other processes (torchrun says who we are), choose device, precision, compiler; say which.

    Raises UserError where device, precision or layout cannot be had here.
    """
    settings.check_compute()
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = choose_device(settings.device, world_size)
    sizes = mesh_sizes(settings, world_size)
    precision, why_precision = choose_precision(settings.precision, device)
    if device.type == "cuda":
        device = own_gpu(device)
        torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    compiles, why_compile = choose_compile(settings, device)
    env = Env(device, precision, rank, world_size, compiles, compute=settings)
    if world_size > 1 or settings.data_parallel != "ddp":
        join(env, settings.timeout_minutes)
        env.mesh = lay_out(sizes, env, settings.timeout_minutes)
    env.peak_flops = measure_peak(env)
    threads = f", {torch.get_num_threads()} threads each" if device.type == "cpu" else ""
    env.say(f"device: {device} x {world_size}{threads}; precision: {precision} ({why_precision}); "
            f"torch.compile: {'on' if compiles else 'off'} ({why_compile}); "
            f"matrix products: {env.peak_flops / 1e9:,.0f} GFLOP/s measured")
    if env.mesh is not None:
        env.say(f"layout: {settings.data_parallel}, {sizes[0]} replica(s) x {sizes[1]} shard(s) x {sizes[2]} "
                f"tensor-parallel; gradients added up in {settings.reduce_dtype}; a process that hangs ends "
                f"the run after {settings.timeout_minutes:g} minutes")
    return env


def join(env: Env, timeout_minutes: float):
    """Make the process groups: one for the steps, with a time limit, and a patient one."""
    for name in ("_redistribute", "_collective_utils"):  # they would tell each process what could be faster
        logging.getLogger(f"torch.distributed.tensor.{name}").setLevel(logging.ERROR)
    if not dist.is_initialized():
        backend = "nccl" if env.device.type == "cuda" else "gloo"
        if backend == "nccl" and not dist.is_nccl_available():
            raise UserError("several GPUs need NCCL, which this torch lacks (it is built for Linux only); "
                            "run one process, or pass --device cpu")
        dist.init_process_group(backend, store=meeting_place(), rank=env.rank, world_size=env.world_size,
                                timeout=timedelta(minutes=timeout_minutes))
    env.patient = dist.new_group(backend="gloo", timeout=PATIENCE)


def lay_out(sizes: tuple[int, int, int], env: Env, timeout_minutes: float) -> DeviceMesh:
    """The processes as a mesh of that size, with axes replicate, shard and tensor.

    By torch's init_device_mesh, a process that hangs would keep the others of its line for half an hour: it
    passes the time limit on to lines of all processes only.
    """
    mesh = torch.arange(env.world_size).view(sizes)
    groups = [dist.new_subgroups_by_enumeration(mesh.movedim(axis, -1).flatten(0, 1).tolist(),
                                                timeout=timedelta(minutes=timeout_minutes))[0]
              for axis in range(mesh.dim())]
    return DeviceMesh.from_group(groups, env.device.type, mesh,
                                 mesh_dim_names=("replicate", "shard", "tensor"))


def meeting_place() -> dist.Store | None:
    """Where the processes find each other's addresses; None for torch's own choice."""
    if "MASTER_ADDR" not in os.environ:  # python, not torchrun: nobody else to find
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise UserError(f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but MASTER_ADDR does not say where "
                            f"to find the others; start the processes with torchrun")
        return dist.HashStore()
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    # torchrun's own store outlives a restart, and with it the addresses of processes that are gone (torch
    # 2.13)
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    return dist.PrefixStore(f"restart {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)


def own_gpu(device: torch.device) -> torch.device:
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if local_rank >= torch.cuda.device_count():
        raise UserError(f"process {local_rank} of this machine has no GPU: there are "
                        f"{torch.cuda.device_count()}; pass torchrun a smaller --nproc-per-node, "
                        f"or --device cpu")
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def mesh_sizes(settings: Compute, world_size: int) -> tuple[int, int, int]:
    """How many replicas, shards and tensor-parallel processes; UserError where they do not divide."""
    tensor = settings.tensor_parallel
    if world_size % tensor:
        raise UserError(f"--tensor_parallel {tensor} does not divide the {world_size} process(es); start "
                        f"torchrun with --nproc-per-node a multiple of it")
    data = world_size // tensor
    if settings.data_parallel == "ddp":
        return data, 1, tensor
    if settings.data_parallel == "fsdp":
        return 1, data, tensor
    shards = settings.shard_size or max(1, int(os.environ.get("LOCAL_WORLD_SIZE", world_size)) // tensor)
    if data % shards:
        raise UserError(f"--shard_size {shards} does not divide the {data} data-parallel process(es); choose "
                        f"a divisor, or --data_parallel fsdp")
    return data // shards, shards, tensor


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
    if wanted == "tf32" and (device.type != "cuda" or torch.cuda.get_device_capability(device)[0] < 8):
        raise UserError("--precision tf32 is a format of NVIDIA GPUs since Ampere, and there is none here; "
                        "pass --precision fp32")
    if wanted != "auto":
        return wanted, "as asked"
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return ("bf16", "the GPU has it") if native else ("fp16", "the GPU has no bf16; losses are scaled")
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()  # (an older torch has no such function)
    for name in ("amx_bf16", "avx512_bf16"):
        if device.type == "cpu" and capabilities.get(name):
            return "bf16", f"the CPU has {name}"
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
    slow = env.precision in ("bf16", "fp16")  # on a CPU without such instructions
    n = {"cuda": 8192, "mps": 4096}.get(env.device.type, 512 if slow else 1024)
    a = torch.ones(n, n, dtype=COMPUTE_DTYPES[env.precision], device=env.device)
    seconds = []
    for _ in range(4):
        began = time.perf_counter()
        (a @ a)[0, 0].item()  # .item() waits for the device
        seconds.append(time.perf_counter() - began)
    return 2 * n ** 3 / min(seconds)


# ------------------------------------------------------------------------------------------------------------
# Editing the model


def parallelize(model: nn.Module, env: Env) -> nn.Module:
    """Make the model train on all processes, in their layout; moves it to the device, edits and returns it.

    In this order: tensor parallelism changes what a block computes; activation checkpointing and the compiler
    change its forward function; FSDP or DDP put their hooks around it. Parameters keep their names, and all
    processes begin with process 0's. Call `inside(model, function, …)` where the whole model is needed.
    """
    compute = env.compute
    if env.mesh is None:
        model.to(env.device)
        recompute_and_compile(model, env)
        return model
    check_layout(model, env)
    take_from_first(model, env)  # on the CPU still
    if compute.tensor_parallel > 1:
        tensor_parallel(model, env.mesh["tensor"])
    recompute_and_compile(model, env)
    root = Root(model)
    if compute.data_parallel == "ddp" and compute.tensor_parallel == 1:
        model.to(env.device)
        root = DistributedDataParallel(root, gradient_as_bucket_view=True)  # not a second copy of them
        if compute.reduce_dtype == "bf16":
            root.register_comm_hook(None, mean_in_bf16)
    else:
        shard(root, env)
    model.__dict__["root"] = root  # not as a submodule: the model is inside it already
    return model


def take_from_first(model: nn.Module, env: Env):
    """Give the model on every process the weights that it has on process 0."""
    if env.world_size > 1:
        for tensor in [*model.parameters(), *model.buffers()]:
            dist.broadcast(tensor.data, src=0, group=env.patient)


def mean_in_bf16(state, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """A hook for DDP: half the bytes to send. (Unlike torch's bf16_compress_hook it takes gloo, too.)"""
    halved = bucket.buffer().to(torch.bfloat16).div_(dist.get_world_size())
    sent = dist.all_reduce(halved, async_op=True).get_future()
    return sent.then(lambda done: bucket.buffer().copy_(done.value()[0]))


class Root(nn.Module):
    """Any function of the model, as the forward of a module: DDP and FSDP hang their hooks on it.

    So a loss may use the model as it likes: several calls of it, its decoder alone, the head's weight.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, function, *args):
        return function(self.model, *args)


def inside(model: nn.Module, function, *args):
    """function(model, *args), where all weights are within reach, and their gradients will be added up."""
    root = model.__dict__.get("root")
    if root is None:
        return function(model, *args)
    result = root(function, *args)
    if not torch.is_grad_enabled():  # else a backward pass, which never comes, would free what was gathered
        for module in root.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
    return result


def whole_step(model: nn.Module, last: bool):
    """A context for a micro-batch: only after the last of a step need gradients of copies be added up.

    DDP adds them up once a step. HSDP adds up between its copies once a step. Within FSDP's shards they are
    added up after every micro-batch: to wait would mean to hold all of them whole.
    """
    root = model.__dict__.get("root")
    if isinstance(root, FSDPModule):
        root.set_requires_all_reduce(last)
        return contextlib.nullcontext()
    return contextlib.nullcontext() if root is None or last else root.no_sync()


def check_layout(model: nn.Module, env: Env):
    """Raise UserError where the model cannot be cut as asked."""
    n, config = env.compute.tensor_parallel, getattr(model, "config", None)
    if n > 1:
        assert isinstance(config, ModelConfig), "tensor parallelism knows the Transformer of model.py only"
        for name in ("n_heads", "n_kv_heads", "ffn_dim"):
            if getattr(config, name) % n:
                raise UserError(f"--tensor_parallel {n} does not divide {name} {getattr(config, name)} of "
                                f"this model; choose a divisor")
    shards = env.mesh["shard"].size()
    for name, p in model.named_parameters():
        if ".adapters." in name or name == "score.weight" or not p.is_floating_point():
            continue  # thin (lora.py's, a reward's head), or bits; with fewer rows than shards, some hold none
        if p.size(0) // (n if p.dim() > 1 else 1) < shards:
            raise UserError(f"{shards} shards are more than {name} has rows ({p.size(0)}"
                            f"{f' over {n} tensor-parallel processes' if n > 1 else ''}); pass "
                            f"--data_parallel hsdp with a smaller --shard_size, or start fewer processes")


def tensor_parallel(model: nn.Module, mesh: DeviceMesh):
    """Cut the matrices of the blocks, embedding and head over the processes of `mesh`, activations with them.

    Columns of the first matrix of a pair (q, k, v; gate, up), rows of the second (o; down): in between each
    process has its own heads, and its own part of the MLP. Between the pairs, where norms and sums work on
    each position for itself, each has its own positions, Shard(1) of (B, T, C). Embedding and head are cut by
    rows of the vocabulary, so that one tied matrix serves both; objectives.py finishes the loss from such
    parts.
    """
    tied = model.lm_head.weight is model.model.embed_tokens.weight
    positions, whole = Shard(1), Replicate()
    parallelize_module(model, mesh, {
        "model": PrepareModuleOutput(output_layouts=positions, desired_output_layouts=whole),
        "model.embed_tokens": RowwiseParallel(input_layouts=whole, output_layouts=positions),
        "model.norm": SequenceParallel(use_local_output=True),
        "lm_head": ColwiseParallel(input_layouts=whole, output_layouts=whole)})
    block = {
        "input_layernorm": SequenceParallel(use_local_output=True),
        "self_attn": PrepareModuleInput(input_layouts=(positions, None, None, None),
                                        desired_input_layouts=(whole, None, None, None),
                                        use_local_output=True),
        "self_attn.q_proj": ColwiseParallel(), "self_attn.k_proj": ColwiseParallel(),
        "self_attn.v_proj": ColwiseParallel(), "self_attn.o_proj": RowwiseParallel(output_layouts=positions),
        "post_attention_layernorm": SequenceParallel(use_local_output=True),
        "mlp": PrepareModuleInput(input_layouts=positions, desired_input_layouts=whole,
                                  use_local_output=True),
        "mlp.gate_proj": ColwiseParallel(), "mlp.up_proj": ColwiseParallel(),
        "mlp.down_proj": RowwiseParallel(output_layouts=positions)}
    if model.config.qk_norm:  # (B, T, H, D): one weight for all heads, which are spread over processes
        norm = SequenceParallel(sequence_dim=2, use_local_output=True)
        block |= {"self_attn.q_norm": norm, "self_attn.k_norm": norm}
    for layer in model.model.layers:
        parallelize_module(layer, mesh, block)
    if tied:
        model.lm_head.weight = model.model.embed_tokens.weight  # each was cut for itself: the same cuts


def recompute_and_compile(model: nn.Module, env: Env):
    """Wrap the forward function of blocks, in place, so that no parameter changes its name.

    Blocks are compiled one by one: as they have one shape, one compilation serves all.
    """
    kind, every = env.compute.activation_checkpointing, env.compute.checkpoint_every
    blocks = [module for module in model.modules() if isinstance(module, Block)]
    for i, block in enumerate(blocks):
        if kind != "none" and (i + 1) % every == 0:
            keep = {"context_fn": keep_products} if kind == "selective" else {}
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False, **keep)
        if env.compile:
            # each shape for itself: what ran before must not change the kernels, and with them the bits
            block.forward = torch.compile(block.forward, dynamic=False)


EXPENSIVE = {torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default,
             torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
             torch.ops.aten._scaled_dot_product_flash_attention.default,
             torch.ops.aten._scaled_dot_product_efficient_attention.default,
             torch.ops.aten._scaled_dot_product_cudnn_attention.default,
             torch.ops._c10d_functional.reduce_scatter_tensor.default}


def keep_products():
    """Selective recomputation: matrix products and attention are kept, cheap element-wise work is redone."""
    def policy(context, op, *args, **kwargs):
        return CheckpointPolicy.MUST_SAVE if op in EXPENSIVE else CheckpointPolicy.PREFER_RECOMPUTE
    return create_selective_checkpoint_contexts(policy)


def shard(root: Root, env: Env):
    """FSDP: each process keeps a part of every parameter; a block is whole only while it is at work.

    What is in no block (embedding, final norm, head, tied or not) is one more group, the root's, whole from
    the beginning of a forward pass to the end of its backward.
    """
    both = env.mesh["replicate"].size() > 1
    dtype = COMPUTE_DTYPES[env.precision]
    policy = MixedPrecisionPolicy(param_dtype=None if dtype == torch.float32 else dtype,
                                  reduce_dtype=torch.bfloat16 if env.compute.reduce_dtype == "bf16" else
                                  torch.float32, cast_forward_inputs=False)  # or the rotary angles lose bits
    options = {"mesh": env.mesh["replicate", "shard"] if both else env.mesh["shard"], "mp_policy": policy}
    for module in root.modules():
        if isinstance(module, Block):
            fully_shard(module, reshard_after_forward=env.compute.reshard, **options)
    fully_shard(root, reshard_after_forward=False, **options)


# ------------------------------------------------------------------------------------------------------------
# Which part of a tensor is whose


def own_part(whole: Tensor, of: Tensor) -> Tensor:
    """The part of `whole` that this process holds where `of`, a parameter or moment, is laid out: a view."""
    if not isinstance(of, DTensor):
        return whole
    return part_at(whole, of, of.device_mesh.get_coordinate())


def part_at(whole: Tensor, of: DTensor, place: list[int]) -> Tensor:
    """The part of `whole` that the process at this place of the mesh holds.

    Tensor parallelism cuts first, by rows or columns, then FSDP cuts what is left by rows; each as
    torch.chunk does: n parts of ceil(size / n), the last ones smaller or empty.
    """
    for axis in reversed(range(of.device_mesh.ndim)):  # the innermost axis, tensor, cuts first
        placement = of.placements[axis]
        if placement.is_shard() or hasattr(placement, "split_factor"):
            n = of.device_mesh.size(axis)
            length = math.ceil(whole.size(placement.dim) / n)
            start = min(place[axis] * length, whole.size(placement.dim))
            whole = whole.narrow(placement.dim, start, min(length, whole.size(placement.dim) - start))
    return whole
