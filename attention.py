"""Who looks at whom: attention, its masks, and the cache of keys and values.

A token looks at itself and at what came before. A `Mask` says so, and what else holds:

    causal          any text                                                       Mask()
    documents       texts packed into one row, none of which sees another          Mask(documents=numbers)
    prefix          the beginning is read both ways (Raffel et al. 2020)           Mask(prefix=lengths)
    sliding window  only so many keys back (Mistral, Jiang et al. 2023)            Mask(window=4096)
    Lambda shape    and the first few of the text, on which attention rests where  Mask(window=1020, sinks=4)
                    nothing else matters: a model breaks once they leave its
                    window (StreamingLLM, Xiao et al. 2023; LM-Infinite, Han et
                    al. 2023)
    padding         rows of unequal lengths, filled up at either side              Mask(real=mask)

`attention` is the formula and `Mask.sees` the meaning, a rule a line. The rest makes the same fast: `prepare`
turns a mask into what a kernel takes, once a forward pass; `attend` is what each layer calls; and a cache
keeps the keys and values of what was read, or of a window of it.

Columns count the tokens of a row from its beginning, padding and what a cache has seen included: a forward
pass of T tokens after `past` others holds the queries past … past + T - 1, and S = past + T.
"""
import importlib.util
import math
from dataclasses import dataclass, fields, replace
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from config import UserError
from positions import rope_angles, rotate

if TYPE_CHECKING:  # model.py stands above this file
    from model import ModelConfig


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, q_sinks: Tensor | None = None,
              sinks: int = 0) -> Tensor:
    """softmax(q kᵀ / sqrt(D)) v, written out (Vaswani et al. 2017, Eq. 1): the reference for what follows.

    q: (B, H, T, D). k, v: (B, K, S, D); head h of the queries reads key/value head h // (H / K).
    mask: bool, broadcastable to (B, H, T, S), True where a query may look at a key; None: everywhere.
    q_sinks (B, H, T, D), sinks: the queries as the first so many keys meet them, see `turn_back`.
    Returns (B, H, T, D). A query that may look at nothing gets zeros, not NaN.
    """
    groups = q.size(1) // k.size(1)
    if groups > 1:
        k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))  # (B, K, S, D) -> (B, H, S, D)
    k = k.float().mT
    scores = q.float() @ k[..., sinks:]  # (B, H, T, D) x (B, H, D, S) -> (B, H, T, S)
    if sinks:
        scores = torch.cat((q_sinks.float() @ k[..., :sinks], scores), dim=-1)
    scores = scores / math.sqrt(q.size(-1))
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    weights = scores.softmax(dim=-1)
    if mask is not None:
        weights = weights.masked_fill(~mask.any(dim=-1, keepdim=True), 0.0)
    return (weights @ v.float()).to(q.dtype)


# ------------------------------------------------------------------------------------------------------------
# What a mask means

ROWS_DIFFER = ("attention sinks with padding or packed documents are not supported: the first of a text must "
               "be the first of its row; pass texts one by one, or of one length")


@dataclass(frozen=True, eq=False)
class Mask:
    """Who may look at whom: each token at itself and what came before, and by these rules where given.

    They narrow each other; but `prefix` widens, and `allowed` stands alone.
    """
    documents: Tensor | None = None  # (B, S) int: a run of equal numbers is a document and sees itself only
    prefix: Tensor | None = None  # (B,) int: the first so many of the text are seen from before them, too
    window: int | None = None  # only keys fewer columns away than this: itself and window - 1 others
    sinks: int = 0  # and the first so many, however far, as if they stood directly before the window
    real: Tensor | None = None  # (B, S) bool: False on padding, which nobody sees and which has no position
    allowed: Tensor | None = None  # (B, T, S) bool: True where a query may look at a key, taken as it is

    def __post_init__(self):
        if self.allowed is not None and (len(self.tensors) > 1 or self.window is not None):
            raise UserError("a mask that is `allowed` is taken as it is; the other rules belong into it")
        if self.window is not None and self.window < 1:
            raise UserError(f"a window of {self.window} keys is out of range; it must be at least 1")
        if self.sinks < 0 or self.sinks and self.window is None:
            raise UserError(f"sinks {self.sinks} are out of range; at least 0, and 0 without a window")
        if self.sinks and (self.documents is not None or self.real is not None):
            raise UserError(ROWS_DIFFER)

    @classmethod
    def of(cls, mask: "Mask | Tensor | None") -> "Mask":
        """What Transformer.forward accepts, as a Mask: None, (B, S) bool, (B, T, S) bool, or one already."""
        if mask is None or isinstance(mask, Mask):
            return mask or cls()
        if mask.dtype != torch.bool or mask.dim() not in (2, 3):
            raise UserError(f"a mask of {mask.dtype} and shape {tuple(mask.shape)} has no meaning here; pass "
                            f"bool, (B, S) for padding or (B, T, S), or a Mask")
        return cls(real=mask) if mask.dim() == 2 else cls(allowed=mask)

    def within(self, config: "ModelConfig", S: int) -> "Mask":
        """This with the model's window if it has none of its own, and with none if S columns fit into it.

        Raises UserError where a query would meet a key from farther away than the model's max_seq_len.
        """
        window, sinks = self.window, self.sinks
        if window is None and self.allowed is None:
            window, sinks = config.sliding_window, config.attention_sinks
        reach = S if window is None else min(S, window + sinks)
        if reach > config.max_seq_len:
            raise UserError(f"{reach} tokens exceed max_seq_len {config.max_seq_len} of this model; shorten "
                            f"the text, or extend the model (train.py --rope_scaling)")
        # sinks stand behind a query; a prefix also looks ahead
        if reach == S and (self.prefix is None or window is None or S <= window):
            window, sinks = None, 0
        return self if window == self.window else replace(self, window=window, sinks=sinks)

    def to(self, device, non_blocking: bool = False) -> "Mask":
        given = {rule.name: getattr(self, rule.name) for rule in fields(self)}
        return replace(self, **{name: x.to(device, non_blocking=non_blocking) for name, x in given.items()
                                if isinstance(x, Tensor)})

    @property
    def tensors(self) -> list[Tensor]:
        return [x for x in (self.documents, self.prefix, self.real, self.allowed) if x is not None]

    @property
    def rows(self) -> int:
        return self.tensors[0].size(0) if self.tensors else 1

    def check(self, B: int, T: int, S: int):
        """Raise UserError where a tensor has not B rows (or one for all), or not S columns, T of them new."""
        shapes = {"documents": (S,), "prefix": (), "real": (S,), "allowed": (T, S)}
        for name, shape in shapes.items():
            given = getattr(self, name)
            if given is not None and (given.shape[1:] != shape or given.size(0) != self.rows
                                      or self.rows not in (1, B)):
                raise UserError(f"{name} of the mask has the shape {tuple(given.shape)}, not {(B, *shape)}; "
                                f"it counts what the cache has seen, {S - T} tokens, and {T} new ones")

    @cached_property
    def begins(self) -> Tensor | None:
        """(B, S): the column in which each one's document begins."""
        if self.documents is None:
            return None
        columns = torch.arange(self.documents.size(1), device=self.documents.device)
        first = F.pad(self.documents[:, 1:] != self.documents[:, :-1], (1, 0), value=True)
        return torch.where(first, columns, 0).cummax(dim=1).values

    @cached_property
    def place(self) -> Tensor | None:
        """(B, S): how many real tokens of its document precede each. None: as many as columns do."""
        if self.real is None and self.documents is None:
            return None
        real = torch.ones_like(self.documents) if self.real is None else self.real.long()
        before = real.cumsum(dim=1) - real
        return before if self.documents is None else before - before.gather(1, self.begins)

    @cached_property
    def prefix_end(self) -> int:
        """The column before which all prefixes have ended."""
        if self.place is None:
            return int(self.prefix.max())
        inside = (self.place < self.prefix[:, None]).any(dim=0).nonzero()  # (n, 1) columns
        return int(inside.max()) + 1 if len(inside) else 0

    def sees(self, b: Tensor, q: Tensor, k: Tensor) -> Tensor:
        """Whether in row b query q may look at key k; integers that broadcast, q and k are columns."""
        if self.allowed is not None:
            return self.allowed[b, q - (self.allowed.size(2) - self.allowed.size(1)), k]
        seen = k <= q
        if self.prefix is not None:
            seen = seen | ((k if self.place is None else self.place[b, k]) < self.prefix[b])
        if self.window is not None:
            seen = seen & (((q - k).abs() < self.window) | (k < self.sinks))
        if self.documents is not None:
            seen = seen & (self.begins[b, q] == self.begins[b, k])
        if self.real is not None:
            seen = seen & self.real[b, k]
        return seen

    def reach(self, first: int, last: int) -> tuple[int, int]:
        """The columns from … to - 1 that hold all that queries first … last - 1 can see, but for sinks."""
        if self.allowed is not None:
            return 0, self.allowed.size(2)
        low, high = 0, last
        if self.prefix is not None:
            high = max(high, self.prefix_end)
        if self.window is not None:
            low, high = max(low, first - self.window + 1), min(high, last - 1 + self.window)
        if self.documents is not None:
            low = max(low, int(self.begins[:, first].min()))
        return low, high

    def dense(self, queries: Tensor, keys: Tensor) -> Tensor:
        """(B or 1, 1, T, S) bool: whether queries in these columns (T,) see keys in those (S,)."""
        b = torch.arange(self.rows, device=keys.device)[:, None, None]
        return self.sees(b, queries[:, None], keys).expand(self.rows, len(queries), len(keys))[:, None]


# ------------------------------------------------------------------------------------------------------------
# The same, fast

BLOCK = 128  # queries that go to a CPU's kernel together; measured: 64 and 256 are within a tenth of it


@dataclass(frozen=True, eq=False)  # a tuple would be looked into by what compiles or shards a layer
class Prepared:
    """A mask in the form that a kernel takes, the same for all layers: `flex`, or blocks of queries."""
    blocks: tuple[tuple[slice, slice, Tensor | None], ...] = ()  # queries, keys, who sees whom (None: all)
    sinks: int = 0  # the first so many keys belong to every block
    turn: tuple[Tensor, Tensor] | None = None  # see `turn_back`
    flex: BlockMask | None = None


def prepare(mask: Mask, B: int, T: int, cache: "KVCache | None", config: "ModelConfig",
            device) -> Prepared | None:
    """A mask, as Mask.within returns it, for T queries after those in the cache, in its fastest form.

    None: causal with T == S, or one query that sees all, which a kernel knows without a mask. Else
    FlexAttention on a GPU; elsewhere blocks of queries, each with the range of keys that any of them can see:
    time grows with T x window, and so does memory, by a byte a pair. Where no window or document bounds the
    range (padding, prefixes, a chunk after others) that is half of T x S; it is shared by all layers.
    """
    past = cache.length if cache is not None else 0
    mask.check(B, T, past + T)
    rolling = isinstance(cache, RollingCache)
    if rolling:
        cache.check(mask, past + T)
    if not mask.tensors and mask.window is None and (past == 0 or T == 1):
        return None
    rolling = rolling and past > 0  # what it is given first, it returns as it is
    keys = cache.columns(T, device) if rolling else torch.arange(past + T, device=device)
    turn = turn_back(mask, past, T, config, device) if mask.sinks else None
    # its kernel takes heads of 16 numbers and more, and knows no sinks: these go in blocks on a GPU, too
    if T > 1 and turn is None and config.head_dim >= 16 and has_flex(device):
        return Prepared(flex=flex_mask(mask, past, T, keys))
    blocks = []
    for first in range(0, T, BLOCK):
        last = min(first + BLOCK, T)
        begin, end = 0, len(keys)
        if T > 1 or not rolling:  # what a rolling cache gives a single query is in no order, and in reach
            bounds = keys.new_tensor(mask.reach(past + first, past + last))
            begin, end = torch.searchsorted(keys, bounds).tolist()
        begin = 0 if begin <= mask.sinks else begin
        seen = None
        if T > 1 or mask.tensors:
            columns = keys[begin:end] if begin == 0 else torch.cat((keys[:mask.sinks], keys[begin:end]))
            seen = mask.dense(torch.arange(past + first, past + last, device=device), columns)
        blocks.append((slice(first, last) if T > 1 else slice(None), slice(begin, end), seen))
    return Prepared(tuple(blocks), mask.sinks, turn)


def turn_back(mask: Mask, past: int, T: int, config: "ModelConfig", device) -> tuple[Tensor, Tensor]:
    """cos and sin, (T, D/2), of how far a query is turned back where it meets sinks.

    A sink must not drift to distances that no weight has met. It stays directly before the window: query q
    meets sink j at the distance min(q, sinks + window - 1) - j, that of their places in a cache of sinks and
    window (Xiao et al. 2023, section 3.2). As scores depend on differences of positions alone, all keys keep
    their true positions, and the query is turned back, in front of the sinks only. (LM-Infinite, Han et al.
    2023, bounds distances likewise; there all sinks end up at one and the same.)
    """
    if (config.rope_scaling or {}).get("rope_type") == "dynamic":
        raise UserError("attention sinks keep their distance, so a rope_scaling of type dynamic, which "
                        "follows the length, cannot go with them; choose another, or no sinks")
    shift = torch.arange(past, past + T, device=device) - (mask.sinks + mask.window - 1)
    cos, sin = rope_angles(shift.clamp(min=0), config.head_dim, config.rope_theta, config.rope_scaling)
    sharpness = torch.hypot(cos, sin)  # YaRN's temperature, which the query has had already; else 1
    return cos / sharpness, -sin / sharpness


def attend(q: Tensor, k: Tensor, v: Tensor, prepared: Prepared | None) -> Tensor:
    """attention(q, k, v, mask), with the mask as `prepare` returns it, by the fastest kernel there is."""
    B, H, T, D = q.shape
    K = k.size(1)
    if T == 1 and H > K:  # a group of heads as queries of one: keys are read once, not H / K times
        q = q.reshape(B, K, H // K, D)  # S 2000, 8 / 2 heads, a core: 91 µs; enable_gqa 150, repeated 340
    if prepared is None:  # the kernel's causal form is aligned to the upper left: right only where T == S
        out = F.scaled_dot_product_attention(q, k, v, is_causal=T > 1, enable_gqa=q.size(1) != K)
    elif prepared.flex is not None:
        k, v = k.to(q.dtype), v.to(q.dtype)  # under autocast a cache may be wider; other kernels see to it
        out = compiled_flex()(q, k, v, block_mask=prepared.flex, enable_gqa=H != K)
    else:
        out = attend_in_blocks(q, k, v, prepared)
    return out if q.size(1) == H else out.reshape(B, H, T, D)


@torch.compiler.disable  # the blocks of documents change from batch to batch: each would be compiled anew
def attend_in_blocks(q: Tensor, k: Tensor, v: Tensor, prepared: Prepared) -> Tensor:
    q_sinks = None if prepared.turn is None else rotate(q, *prepared.turn)
    outs = []
    for queries, keys, seen in prepared.blocks:
        near = [x[:, :, keys] for x in (k, v)]
        if keys.start and prepared.sinks:
            near = [torch.cat((x[:, :, :prepared.sinks], part), dim=2) for x, part in zip((k, v), near)]
        if q_sinks is not None:  # one softmax over two kinds of scores: no fused kernel has that
            out = attention(q[:, :, queries], *near, seen, q_sinks[:, :, queries], prepared.sinks)
        else:
            out = F.scaled_dot_product_attention(q[:, :, queries], *near, attn_mask=seen,
                                                 enable_gqa=q.size(1) != k.size(1))
        outs.append(out)
    return outs[0] if len(outs) == 1 else torch.cat(outs, dim=2)


def has_flex(device) -> bool:
    """Whether FlexAttention's kernel can be compiled for this device. (It has not run on a GPU yet.)"""
    return torch.device(device).type == "cuda" and importlib.util.find_spec("triton") is not None


def flex_mask(mask: Mask, past: int, T: int, keys: Tensor) -> BlockMask:
    """The mask for FlexAttention: which blocks of pairs can be left out, and a function for the rest."""
    def sees(b, h, q, k):
        return mask.sees(b, q + past, keys[k])
    return create_block_mask(sees, mask.rows, None, T, len(keys), device=keys.device)


@lru_cache
def compiled_flex():
    return torch.compile(flex_attention)  # else it computes all scores


# ------------------------------------------------------------------------------------------------------------
# What has been read


class LayerCache:
    """Keys and values of one layer, (B, K, S, D) each, in memory taken once for the longest text to come."""

    def __init__(self, shape: tuple[int, int, int, int], dtype, device):
        self.k, self.v = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))
        self.length = 0

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add k, v (B, K, T, D); returns what these queries may look at, (B, K, S, D)."""
        end = self.length + k.size(2)
        assert end <= self.k.size(2), f"{end} tokens do not fit in a cache of {self.k.size(2)}"
        self.k[:, :, self.length:end], self.v[:, :, self.length:end] = k, v
        self.length = end
        return self.k[:, :, :end], self.v[:, :, :end]


class KVCache:
    """2 x n_layers x B x K x max_len x D numbers: K, not H, is why grouped heads make generation cheaper."""

    def __init__(self, config: "ModelConfig", batch_size: int, max_len: int, dtype=torch.float32,
                 device="cpu"):
        shape = (batch_size, config.n_kv_heads, max_len, config.head_dim)
        self.layers = [LayerCache(shape, dtype, device) for _ in range(config.n_layers)]

    @property
    def length(self) -> int:
        """How many tokens it has been given."""
        return self.layers[0].length

    def select(self, rows: Tensor):
        """Go on with these rows, in this order; a row may be taken several times."""
        for layer in self.layers:
            layer.k, layer.v = layer.k[rows], layer.v[rows]

    def truncate(self, length: int):
        """Forget all but the first `length` tokens."""
        assert 0 <= length <= self.length, f"a cache of {self.length} tokens cannot be cut to {length}"
        for layer in self.layers:
            layer.length = length


class RollingLayer:
    """The sinks of one layer, then the last `window` keys and values, the newest in place of the oldest."""

    def __init__(self, shape: tuple[int, int, int, int], sinks: int, dtype, device):
        self.k, self.v = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))
        self.sinks, self.window, self.length = sinks, shape[2] - sinks, 0

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add k, v (B, K, T, D); returns what these queries may look at, as RollingCache.columns has it."""
        past, end = self.length, self.length + k.size(2)
        if k.size(2) == 1:  # softmax does not care about the order of keys
            slot = past if past < self.sinks else self.sinks + (past - self.sinks) % self.window
            self.k[:, :, slot], self.v[:, :, slot], self.length = k[:, :, 0], v[:, :, 0], end
            return self.k[:, :, :end], self.v[:, :, :end]
        seen = k, v
        if past:
            slots = self.slots(self.kept(k.device))
            seen = torch.cat((self.k[:, :, slots], k), dim=2), torch.cat((self.v[:, :, slots], v), dim=2)
        new = torch.arange(past, end, device=k.device)
        new = new[(new < self.sinks) | (new >= end - self.window)]
        slots = self.slots(new)
        for kept, x in ((self.k, k), (self.v, v)):
            kept[:, :, slots] = x[:, :, new - past].to(kept.dtype)
        self.length = end
        return seen

    def slots(self, columns: Tensor) -> Tensor:
        """Where these columns of the text are kept."""
        return torch.where(columns < self.sinks, columns, self.sinks + (columns - self.sinks) % self.window)

    def kept(self, device) -> Tensor:
        """The columns that later queries may look at, in order: sinks, and one less than the window."""
        sinks = min(self.sinks, self.length)
        first = max(sinks, self.length - self.window + 1)
        return torch.cat([torch.arange(*ends, device=device) for ends in ((0, sinks), (first, self.length))])


class RollingCache(KVCache):
    """A KVCache in constant memory, for a model with a sliding window: its text may grow without end.

    A mask still has a column for each token of the text. It cannot forget (`truncate`) once it has rolled.
    """

    def __init__(self, config: "ModelConfig", batch_size: int, dtype=torch.float32, device="cpu"):
        self.window, self.sinks = config.sliding_window, config.attention_sinks
        shape = (batch_size, config.n_kv_heads, self.sinks + self.window, config.head_dim)
        self.layers = [RollingLayer(shape, self.sinks, dtype, device) for _ in range(config.n_layers)]

    def columns(self, T: int, device) -> Tensor:
        """The columns of the keys that the next `append` of T tokens returns: in order, unless T is 1."""
        past = self.length
        if T > 1:
            return torch.cat((self.layers[0].kept(device), torch.arange(past, past + T, device=device)))
        slots = torch.arange(min(past + 1, self.sinks + self.window), device=device)
        return torch.where(slots < self.sinks, slots, past - (past - slots) % self.window)

    def check(self, mask: Mask, S: int):
        """Raise UserError where the mask, of S columns, may look at what is not kept."""
        if mask.window is None:  # so it sees all S
            elsewhere = S > self.window + self.sinks
        else:
            elsewhere = (mask.window, mask.sinks) != (self.window, self.sinks)
        if elsewhere or mask.allowed is not None:
            raise UserError(f"a rolling cache keeps {self.sinks} sinks and a window of {self.window}; use a "
                            f"KVCache with a mask that looks elsewhere")
        if self.sinks and (mask.real is not None or mask.documents is not None):
            raise UserError(ROWS_DIFFER)

    def truncate(self, length: int):
        if length < self.length and self.length > self.sinks + self.window:
            raise UserError(f"a rolling cache of {self.sinks + self.window} tokens cannot go back from "
                            f"{self.length} to {length}, as the oldest are overwritten; use a KVCache")
        super().truncate(length)


def make_cache(config: "ModelConfig", batch_size: int, max_len: int, dtype=torch.float32,
               device="cpu") -> KVCache:
    """The cache for a text of max_len tokens: a rolling one where the model's window is smaller than that."""
    if config.sliding_window is not None and config.sliding_window + config.attention_sinks < max_len:
        return RollingCache(config, batch_size, dtype, device)
    return KVCache(config, batch_size, max_len, dtype, device)
