"""What lies beneath the logits, matched too: hidden states through a learnt projection, or attention.

    python distill.py --match hidden --match_weight 0.1      # or attention

Both are a sum over targets that is added to the loss of distillation. The projection is learnt along with the
student and is no part of it: it lies in the student's `beside`, whose weights go into a file of their own in
states, and not into the model's folder.
"""
import contextlib
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attention import Mask
from config import UserError
from divergence import FLOOR
from model import Transformer
from positions import rotate


def add_projection(model: Transformer, dim: int, seed: int):
    """Give the student a matrix C -> dim (the teacher's width) beside its weights, drawn from the seed."""
    C, generator = model.config.dim, torch.Generator().manual_seed(seed)
    projection = nn.Linear(C, dim, bias=False)
    nn.init.normal_(projection.weight, std=C ** -0.5, generator=generator)
    model.beside = nn.ModuleDict({"projection": projection})


def hidden_match(projection: nn.Module, student: Tensor, teacher: Tensor) -> Tensor:
    """Sum over tokens of the mean squared difference of projected and teacher's last hidden states.

    student (N, C), teacher (N, C'), projection C -> C'. Romero et al. 2015 (FitNets), Eq. 3, but at the last
    layer instead of a middle one, and with the mean over the width in place of half the sum.
    """
    return (projection(student).float() - teacher.float()).square().mean(dim=-1).sum()


def attention_match(student: Tensor, teacher: Tensor, valid: Tensor) -> Tensor:
    """Sum over queries that have a target (B, T) of the mean over heads of KL(teacher | student), in nats.

    student (B, H, T, T), teacher (B, H', T, T): log-probabilities of the last block's attention. Wang et al.
    2020 (MiniLM), section 3.1, which wants as many heads on both sides; here neighbours are averaged until
    each has gcd(H, H').
    """
    heads = math.gcd(student.size(1), teacher.size(1))

    def fewer(logps: Tensor) -> Tensor:  # (B, H, T, T) -> (B, heads, T, T)
        B, H, T, S = logps.shape
        return logps.view(B, heads, H // heads, T, S).logsumexp(dim=2) - math.log(H // heads)

    kl = F.kl_div(fewer(student), fewer(teacher), reduction="none", log_target=True).sum(dim=-1)
    return (kl.mean(dim=1) * valid).sum()


@contextlib.contextmanager
def watched(model: Transformer | None, mask: Mask | None):
    """A list that, once the context has ended, holds the attention (B, H, T, T) of the model's last block.

    One entry for each time that the model was run. It is computed after the run from what the block was
    given: so a block that activation checkpointing runs once more is as it was.
    """
    found, given = [], []
    if model is None:
        yield found
        return
    block = model.model.layers[-1].self_attn
    handle = block.register_forward_pre_hook(lambda _, arguments: given.append(arguments[:2]))
    try:
        yield found
    finally:
        handle.remove()
    for x, rope in given:
        seen = Mask.of(mask).within(model.config, x.size(1))
        found.append(attention_logps(block, x, rope, seen))


def attention_logps(block: nn.Module, x: Tensor, rope: tuple[Tensor, Tensor], mask: Mask) -> Tensor:
    """log of the attention that a block pays to x (B, T, C): (B, H, T, T), FLOOR where a query does not look.
    """
    if mask.sinks:
        raise UserError(f"--match attention does not know attention sinks, and {x.size(1)} tokens need those "
                        f"of this model; pass a shorter --seq_len, or --match hidden")
    B, T, _ = x.shape
    q = rotate(block.q_norm(block.q_proj(x).view(B, T, -1, block.head_dim)).transpose(1, 2), *rope)
    k = rotate(block.k_norm(block.k_proj(x).view(B, T, -1, block.head_dim)).transpose(1, 2), *rope)
    k = k.repeat_interleave(q.size(1) // k.size(1), dim=1)
    scores = (q @ k.mT).float() / math.sqrt(block.head_dim)  # (B, H, T, D) x (B, H, D, T) -> (B, H, T, T)
    places = torch.arange(T, device=x.device)
    sees = mask.dense(places, places)  # (B or 1, 1, T, T)
    return scores.masked_fill(~sees, -math.inf).log_softmax(dim=-1).clamp(min=FLOOR)
