"""How a student begins: the smaller model that is to learn from a larger one, its teacher.

    random_student(teacher.config, seed, dim=96, n_layers=4, n_heads=2)    other sizes, random weights
    layers_student(teacher, n_layers=2)                                    some of its blocks, whole
    width_student(teacher, ids, dim=96, n_heads=1, ffn_dim=192)            its blocks, each of them narrower

Each returns a new Transformer, float32 on the CPU and in eval mode, and leaves the teacher as it was. Before
they learn anything, in nats on all held-out text of the main job (what distill.py --eval_stride 128 says):

    teacher, 4 blocks of width 128                        3.76
    --student layers: 2 of its blocks                     4.37
    --student width: 64, with one head, half the neurons  5.08
    random weights                                        8.3: as much as a guess among all V tokens
"""
import math
from contextlib import ExitStack
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from checkpoint import empty_model
from config import UserError
from costs import count_parameters
from model import ModelConfig, Transformer

# ------------------------------------------------------------------------------------------------------------
# 1. Random weights


def random_student(teacher: ModelConfig, seed: int, dim: int, n_layers: int, n_heads: int,
                   n_kv_heads: int | None = None, ffn_dim: int | None = None,
                   tie_embeddings: bool = True) -> Transformer:
    """A model of these sizes with weights drawn from the seed, in all else like the teacher.

    A head is dim / n_heads wide, whatever it is in the teacher. n_kv_heads, ffn_dim: none: ModelConfig's.
    Head and embedding are one by default: they are most of a small model. Raises UserError, as ModelConfig.
    """
    config = replace(teacher, dim=dim, n_layers=n_layers, n_heads=n_heads, n_kv_heads=n_kv_heads,
                     ffn_dim=ffn_dim, head_dim=None, tie_embeddings=tie_embeddings)
    unset = {name: torch.empty(tensor.shape) for name, tensor in empty_model(config).state_dict().items()}
    student = assembled(config, unset, f"random weights of seed {seed}, dim {dim}, n_layers {n_layers}")
    student.init_weights(torch.Generator().manual_seed(seed))
    return student


# ------------------------------------------------------------------------------------------------------------
# 2. Some of the blocks


def layers_student(teacher: Transformer, n_layers: int) -> Transformer:
    """A copy of the teacher with n_layers of its blocks, at equal distances from the first to the last.

    Of 12 blocks 6 are 0, 2, 4, 7, 9 and 11, as in DistilBERT (Sanh et al. 2019); a single one is the first.
    With all of them, its logits are the teacher's bit for bit. Raises UserError where it has not so many.
    `began` of the student says which: "blocks [0, 2, 3] of the teacher's 4".
    """
    have = teacher.config.n_layers
    at_most("n_layers", n_layers, have)
    blocks, tensors = np.linspace(0, have - 1, n_layers).round().astype(int).tolist(), {}
    for name, tensor in weights_of(teacher).items():
        parts = name.split(".")
        if parts[1] == "layers":
            if int(parts[2]) not in blocks:
                continue
            parts[2] = str(blocks.index(int(parts[2])))
        tensors[".".join(parts)] = tensor.to("cpu", torch.float32, copy=True)
    return assembled(replace(teacher.config, n_layers=n_layers), tensors,
                     f"blocks {blocks} of the teacher's {have}")


# ------------------------------------------------------------------------------------------------------------
# 3. Narrower blocks

NORMS = ("input_layernorm", "post_attention_layernorm", "norm")  # those over the stream
AXES = {  # what the rows of each parameter are, and the columns
    **dict.fromkeys(NORMS, ("channels",)), "q_norm": (), "k_norm": (),
    **dict.fromkeys(("embed_tokens", "lm_head"), ("tokens", "channels")),
    **dict.fromkeys(("k_proj", "v_proj"), ("keys", "channels")),
    "q_proj": ("queries", "channels"), "o_proj": ("channels", "queries"),
    **dict.fromkeys(("gate_proj", "up_proj"), ("neurons", "channels")), "down_proj": ("channels", "neurons"),
}


def width_student(teacher: Transformer, ids: Tensor, dim: int, n_heads: int, ffn_dim: int,
                  n_layers: int | None = None) -> Transformer:
    """The teacher without the channels, heads and neurons that do least while it reads ids (B, T).

    Width pruning by activations (Muralidharan et al. 2024, section 2.2): channels of the residual stream are
    chosen once for all blocks, heads and neurons block by block; what is kept stays in order, and heads stay
    as wide as they are. A key/value head goes with all its query heads, so n_heads is a multiple of these.
    n_layers: blocks go first, as by layers_student, and what is left of the teacher is measured.

    RMS over fewer channels is another RMS. So, an addition of ours, the norms' weights are multiplied by
    sqrt(C / dim): where dropped channels are zero, RMS(kept) is sqrt(C / dim) RMS(all), and the student is
    the teacher. Where they are not, it was the best power of C / dim too, held out (widths 96 and 64 as
    above): -1/2: 4.66, 5.87; 0: 4.50, 5.32; 1/4: 4.45, 5.14; 1/2: 4.43, 5.08; 3/4: 4.43, 5.19; 1: 4.47, 5.53.

    With all the teacher's sizes, so are the logits, bit for bit. Raises UserError where one is larger.
    """
    config, began = narrower(teacher.config, dim, n_heads, ffn_dim), ""
    if n_layers is not None:
        teacher, config = layers_student(teacher, n_layers), replace(config, n_layers=n_layers)
        began = f"{teacher.began}; "
    kept, old, tensors = kept_parts(teacher, ids, config), teacher.config, {}
    for name, tensor in weights_of(teacher).items():
        parts = name.split(".")
        block = kept[int(parts[2]) if parts[1] == "layers" else -1]
        tensor = tensor.to("cpu", torch.float32, copy=True)
        for axis, kind in enumerate(AXES[parts[-2]][:tensor.dim()]):  # a bias has the rows alone
            if kind in block:
                tensor = tensor.index_select(axis, block[kind])
        tensors[name] = tensor * math.sqrt(old.dim / dim) if parts[-2] in NORMS else tensor
    return assembled(config, tensors, f"{began}{dim} of {old.dim} channels, {n_heads} of {old.n_heads} "
                                      f"heads, {ffn_dim} of {old.ffn_dim} neurons")


def narrower(old: ModelConfig, dim: int, n_heads: int, ffn_dim: int) -> ModelConfig:
    for name, value in (("dim", dim), ("n_heads", n_heads), ("ffn_dim", ffn_dim)):
        at_most(name, value, getattr(old, name))
    queries = old.n_heads // old.n_kv_heads
    if n_heads % queries:
        raise UserError(f"n_heads {n_heads} is not a multiple of {queries}: so many query heads share a "
                        f"key/value head of the teacher, and go together; choose {queries} or a multiple")
    return replace(old, dim=dim, n_heads=n_heads, n_kv_heads=n_heads // queries, ffn_dim=ffn_dim,
                   head_dim=old.head_dim)  # which is no longer dim / n_heads


def kept_parts(teacher: Transformer, ids: Tensor, config: ModelConfig) -> list[dict[str, Tensor]]:
    """{kind of AXES: the rows or columns that stay} of each block in turn, and at the end of all outside."""
    old, (channels, groups, neurons) = teacher.config, importance(teacher, ids)
    stream, kept = {"channels": largest(channels, config.dim)}, []
    for i in range(old.n_layers):
        heads = largest(groups[i], config.n_kv_heads)
        queries, keys = (torch.arange(n * old.head_dim).view(old.n_kv_heads, -1)[heads].flatten()
                         for n in (old.n_heads, old.n_kv_heads))
        inner = largest(neurons[i], config.ffn_dim)
        kept.append({**stream, "queries": queries, "keys": keys, "neurons": inner})
    return [*kept, stream]


@torch.no_grad()
def importance(teacher: Transformer, ids: Tensor) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Of channels (C,), and in each block of key/value groups (K,) and of neurons (ffn_dim,): how much they
    put out while the teacher reads ids (B, T), in one pass. Float32, on the CPU.

    Of a channel the absolute value behind each norm over the stream, summed over the norms; of a group the L2
    norm of what its heads hand to o_proj; of a neuron the absolute value that it hands to down_proj. Each is
    a mean over tokens, and the L2 norm of these over texts, as in NVIDIA's Model Optimizer (which leaves out
    the last norm, and takes that of a head after the mean over tokens; here it is the paper's formula).
    """
    channels, groups, neurons = [], [], []  # filled in the order of the pass
    shape = (teacher.config.n_kv_heads, -1)  # (B, T, H * D) -> (B, T, K, H / K * D)
    watched = {"o_proj": (groups, lambda x, y: x.unflatten(-1, shape).norm(dim=-1)),
               "down_proj": (neurons, lambda x, y: x.abs()),
               **dict.fromkeys(NORMS, (channels, lambda x, y: y.abs()))}  # of input x and output y: (B, T, n)

    def watch(scores: list[Tensor], values):
        return lambda module, inputs, output: scores.append(
            values(inputs[0].float(), output.float()).mean(dim=1).norm(dim=0).cpu())  # (n,)
    with ExitStack() as hooks:  # removes them after an error too
        for name, module in teacher.model.named_modules():
            if (kind := name.rpartition(".")[2]) in watched:
                hooks.callback(module.register_forward_hook(watch(*watched[kind])).remove)
        teacher.model(ids.to(teacher.lm_head.weight.device))  # all but the head
    return torch.stack(channels).sum(dim=0), groups, neurons


def largest(scores: Tensor, count: int) -> Tensor:
    """Where the `count` largest stand, in ascending order; of equal ones the first."""
    return scores.argsort(descending=True, stable=True)[:count].sort().values


# ------------------------------------------------------------------------------------------------------------
# 4. In words, and what the others share


def describe_student(student: Transformer, teacher: Transformer | ModelConfig) -> str:
    """A line: how the student began (out of a folder: its sizes), the parameters of both, and the share."""
    own, whole = (count_parameters(getattr(x, "config", x)) for x in (student, teacher))
    began = getattr(student, "began", f"dim {student.config.dim}, n_layers {student.config.n_layers}")
    return f"student: {began}; {own:,} parameters, {own / whole:.0%} of the teacher's {whole:,}"


def check_smaller(student: Transformer | ModelConfig, teacher: Transformer | ModelConfig) -> str | None:
    """A warning where the student has more parameters than the teacher, else None."""
    own, whole = (count_parameters(getattr(x, "config", x)) for x in (student, teacher))
    return None if own <= whole else (f"the student has {own:,} parameters, more than the {whole:,} of its "
                                      f"teacher; it will cost more to run than what it learns from")


def weights_of(teacher: Transformer) -> dict[str, Tensor]:
    tensors = teacher.state_dict()
    if tensors.keys() != empty_model(teacher.config).state_dict().keys():
        raise UserError("the teacher is quantised or has adapters; to cut a student out of it, load it "
                        "unquantised, its adapters merged")
    return tensors


def at_most(name: str, value: int, have: int):
    if not 1 <= value <= have:
        raise UserError(f"{name} {value} is out of range; it must be 1 to {have}, the teacher's")


def assembled(config: ModelConfig, tensors: dict[str, Tensor], began: str) -> Transformer:
    """A Transformer of these tensors; `began` says of it what describe_student shows."""
    student = empty_model(config)
    student.load_state_dict(tensors, assign=True)
    if config.tie_embeddings:
        student.lm_head.weight = student.model.embed_tokens.weight  # assigning made two parameters
    student.began = began
    return student.eval()
