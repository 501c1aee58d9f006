"""The LLaMA-style decoder: tokens in, logits for the next token out.

    ids (B, T) -> embedding -> n_layers x [ x += attention(norm(x));  x += mlp(norm(x)) ] -> norm -> head ->
    (B, T, V)

"Attention is all you need" (Vaswani et al. 2017) with the five changes that LLaMA (Touvron et al. 2023)
settled on: RMSNorm before each part, rotary positions, SwiGLU, no biases, and (since Llama 2) grouped
key/value heads. With `qk_norm` it is Qwen3's. Parameters carry the names Hugging Face gives them, so a saved
model opens there and theirs open here, with no conversion.

Letters in shape comments: B batch, T time (queries), S time (keys), C width, H query heads, K key/value
heads, D head width, V vocabulary, R response length.

    >>> model = Transformer(ModelConfig(vocab_size=1000, dim=64, n_layers=2, n_heads=4))
    >>> model(torch.tensor([[1, 2, 3]])).shape
    torch.Size([1, 3, 1000])
"""
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attention import KVCache, LayerCache, attention, attention_mask  # noqa: F401 (names of this file, too)
from config import UserError
from costs import count_parameters, estimate_flops, estimate_memory  # noqa: F401
from generation import Generation, check_sampling, generate, generate_stream, next_token_logps  # noqa: F401
from positions import rope_angles, rotate


@dataclass
class ModelConfig:
    """What a model is. The defaults are a small one; sizes of others: PRESETS in train.py."""
    vocab_size: int = 4096
    dim: int = 256  # C, the width of the residual stream
    n_layers: int = 6
    n_heads: int = 4  # H
    n_kv_heads: int | None = None  # K; None: H; fewer make the cache smaller (Ainslie et al. 2023)
    ffn_dim: int | None = None  # None: 8/3 of dim, in steps of 64 (SwiGLU has three matrices, not two)
    max_seq_len: int = 1024  # the longest context; training windows and generation stay within it
    rope_theta: float = 10000.0  # base of the rotary wavelengths
    rope_scaling: dict | None = None  # a rule of positions.py, as Hugging Face spells it: {"rope_type": ...}
    norm_eps: float = 1e-6
    tie_embeddings: bool = False  # one matrix for both ends: half the memory where V is large against C
    qk_norm: bool = False  # RMSNorm on each query and key head (Qwen3): allows a larger learning rate
    attention_bias: bool = False  # on q, k, v and o
    output_bias: bool = True  # False: then not on o (Qwen2)
    head_dim: int | None = None  # D; None: dim / n_heads
    sliding_window: int | None = None  # a query sees so many keys, itself included (Mistral); None: all
    attention_sinks: int = 0  # and the first so many of the text (Xiao et al. 2023), beyond the window

    def __post_init__(self):
        if self.n_kv_heads is None:
            self.n_kv_heads = self.n_heads
        for name in ("vocab_size", "dim", "n_layers", "n_heads", "n_kv_heads", "ffn_dim", "max_seq_len",
                     "head_dim"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise UserError(f"{name} {getattr(self, name)} is out of range; it must be at least 1")
        if not 0 < self.rope_theta < math.inf:
            raise UserError(f"rope_theta {self.rope_theta} is out of range; it must be above 0")
        if self.head_dim is None:
            if self.dim % self.n_heads:
                raise UserError(f"dim {self.dim} is not divisible by n_heads {self.n_heads}; "
                                f"choose a multiple of the heads")
            self.head_dim = self.dim // self.n_heads
        if self.n_heads % self.n_kv_heads:
            raise UserError(f"n_heads {self.n_heads} is not divisible by n_kv_heads {self.n_kv_heads}; "
                            f"each key/value head serves an equal group of query heads")
        if self.head_dim % 2:
            raise UserError(f"head width {self.head_dim} is odd; rotary positions turn pairs: "
                            f"choose another dim or n_heads")
        if self.rope_scaling is not None:
            raise UserError(f"rope_scaling {self.rope_scaling} is not supported; "
                            f"only plain rotary positions are")
        if self.ffn_dim is None:
            self.ffn_dim = 64 * math.ceil(self.dim * 8 / 3 / 64)


class RMSNorm(nn.Module):
    """x / rms(x) * weight, over the last dimension (Zhang & Sennrich 2019, Eq. 4); statistics in float32."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        x32 = x.float()
        x32 = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * x32.to(x.dtype)


class Attention(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.head_dim = config.head_dim
        heads, kv_heads = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
        bias = config.attention_bias
        self.q_proj = nn.Linear(config.dim, heads, bias=bias)
        self.k_proj = nn.Linear(config.dim, kv_heads, bias=bias)
        self.v_proj = nn.Linear(config.dim, kv_heads, bias=bias)
        self.o_proj = nn.Linear(heads, config.dim, bias=bias and config.output_bias)
        self.q_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else nn.Identity()

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], mask: Tensor | None,
                cache: LayerCache | None) -> Tensor:
        B, T, _ = x.shape
        # (B, T, C) -> (B, H, T, D) for queries, (B, K, T, D) for keys and values
        q = self.q_norm(self.q_proj(x).view(B, T, -1, self.head_dim)).transpose(1, 2)
        k = self.k_norm(self.k_proj(x).view(B, T, -1, self.head_dim)).transpose(1, 2)
        v = self.v_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)
        q, k = rotate(q, *rope), rotate(k, *rope)
        if cache is not None:
            k, v = cache.append(k, v)  # (B, K, S, D), S = all positions so far
        # the kernel's causal form aligns the mask to the upper left, so it is right only where T == S: see
        # Decoder.forward
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None and T > 1,
                                             enable_gqa=k.size(1) != q.size(1))
        return self.o_proj(out.transpose(1, 2).reshape(B, T, -1))  # (B, H, T, D) -> (B, T, C)


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)) (Shazeer 2020, Eq. 6)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.dim, config.ffn_dim, bias=False)
        self.up_proj = nn.Linear(config.dim, config.ffn_dim, bias=False)
        self.down_proj = nn.Linear(config.ffn_dim, config.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.input_layernorm = RMSNorm(config.dim, config.norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.dim, config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, x, rope, mask=None, cache=None):
        x = x + self.self_attn(self.input_layernorm(x), rope, mask, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """All but the head: ids (B, T) -> hidden states (B, T, C). A reward model's head stands on it too."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)

    def forward(self, ids: Tensor, positions: Tensor | None = None, mask: Tensor | None = None,
                cache: KVCache | None = None) -> Tensor:
        T, past = ids.size(1), cache.length if cache is not None else 0
        if past + T > self.config.max_seq_len:
            raise UserError(f"{past + T} tokens exceed max_seq_len {self.config.max_seq_len} of this model; "
                            f"shorten the text")
        if positions is None:
            positions = torch.arange(past, past + T, device=ids.device)[None]  # (1, T)
            if mask is not None and mask.dim() == 2:  # padding has no position: count the real tokens
                positions = (mask.long().cumsum(dim=1) - 1).clamp(min=0)[:, past:]  # (B, S) -> (B, T)
        cos, sin = rope_angles(positions, self.config.head_dim, self.config.rope_theta)
        rope = (cos[:, None], sin[:, None])  # (B, 1, T, D/2): the same for every head
        mask = attention_mask(mask, T, past, ids.device)
        x = self.embed_tokens(ids)  # (B, T) -> (B, T, C)
        for i, layer in enumerate(self.layers):
            x = layer(x, rope, mask, cache.layers[i] if cache is not None else None)
        return self.norm(x)


class Transformer(nn.Module):
    """The language model: Decoder and head. `model(ids)`: the logits of the token after each position."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.dim, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        self.init_weights()

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None):
        """Normal with std 1/sqrt(C) for what reads the stream; what writes to it starts at zero, so each
        block starts as the identity, as does the head, so the loss starts at ln V exactly. A tied head reads
        back the token that was put in: its logit is std C, kept at 4 or less, so that the loss starts within
        a few % of ln V.
        """
        for name, parameter in self.named_parameters():
            if parameter.dim() == 1:  # norms and biases
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
            elif name.endswith(("o_proj.weight", "down_proj.weight", "lm_head.weight")):
                parameter.zero_()
            elif name.endswith("embed_tokens.weight"):
                std = min(0.02, 4 / self.config.dim) if self.config.tie_embeddings else 1.0
                parameter.normal_(std=std, generator=generator)
            else:
                parameter.normal_(std=self.config.dim ** -0.5, generator=generator)

    def forward(self, ids: Tensor, positions: Tensor | None = None, mask: Tensor | None = None,
                cache: KVCache | None = None) -> Tensor:
        """Logits (B, T, V) for ids (B, T).

        positions: (B, T) or (1, T) integers; default: counted from the start, or from the cache's end, or
        over `mask`.
        mask: None: causal. (B, S) bool: True on real tokens, False on padding at either side; causal too.
              (B, T, S) bool: True where a query may look at a key, taken as it is (document masks and the
              like). S counts the cache's positions and these T.
        cache: a KVCache, extended in place by these T tokens.
        """
        return self.lm_head(self.model(ids, positions, mask, cache))
