"""Who looks at whom: attention, its masks, and the cache of keys and values.
"""
import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:  # model.py stands above this file
    from model import ModelConfig


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """softmax(q kᵀ / sqrt(D)) v, written out (Vaswani et al. 2017, Eq. 1): the reference for the fused kernel
    used below.

    q: (B, H, T, D). k, v: (B, K, S, D); head h of the queries reads key/value head h // (H / K).
    mask: bool, broadcastable to (B, H, T, S), True where a query may look at a key; None: everywhere.
    Returns (B, H, T, D). A query that may look at nothing gets zeros, not NaN.
    """
    groups = q.size(1) // k.size(1)
    k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))  # (B, K, S, D) -> (B, H, S, D)
    scores = q.float() @ k.float().mT / math.sqrt(q.size(-1))  # (B, H, T, D) x (B, H, D, S) -> (B, H, T, S)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    weights = scores.softmax(dim=-1)
    if mask is not None:
        weights = weights.masked_fill(~mask.any(dim=-1, keepdim=True), 0.0)
    return (weights @ v.float()).to(q.dtype)


def attention_mask(mask: Tensor | None, T: int, past: int, device) -> Tensor | None:
    """The (B, 1, T, S) bool mask for the kernel; None where its own causal form, or none at all, is right."""
    if mask is None and (past == 0 or T == 1):
        return None
    if mask is not None and mask.dim() == 3:
        return mask[:, None]
    # queries stand at the end of the keys: query t, at position past + t, sees keys 0 .. past + t
    causal = torch.ones(T, past + T, dtype=torch.bool, device=device).tril(diagonal=past)
    return causal[None, None] if mask is None else causal & mask[:, None, None, :]  # (B, 1, T, S)


class LayerCache:
    """Keys and values of one layer, (B, K, S, D) each, in memory taken once for the longest text to come."""

    def __init__(self, shape: tuple[int, int, int, int], dtype, device):
        self.k, self.v = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))
        self.length = 0

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        end = self.length + k.size(2)
        self.k[:, :, self.length:end], self.v[:, :, self.length:end] = k, v
        self.length = end
        return self.k[:, :, :end], self.v[:, :, :end]


class KVCache:
    """2 x n_layers x B x K x max_len x D numbers: K, not H, is why grouped heads make generation cheaper."""

    def __init__(self, config: "ModelConfig", batch_size: int, max_len: int, dtype=torch.float32, device="cpu"):
        shape = (batch_size, config.n_kv_heads, max_len, config.head_dim)
        self.layers = [LayerCache(shape, dtype, device) for _ in range(config.n_layers)]

    @property
    def length(self) -> int:
        return self.layers[0].length
