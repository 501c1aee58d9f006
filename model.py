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
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Some of these names are imported to be names of this file, too (F401)
from attention import KVCache, LayerCache, Mask, Prepared, attend, attention, prepare  # noqa: F401
from config import UserError, parse, require, run
from costs import cost_table, count_parameters, estimate_flops, estimate_memory  # noqa: F401
from generation import Generation, check_sampling, generate, generate_stream, next_token_logps  # noqa: F401
from positions import check_scaling, rope_angles, rotate


@dataclass
class ModelConfig:
    """What a model is. The defaults are a small one; sizes of others: PRESETS below."""
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
                     "head_dim", "sliding_window"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise UserError(f"{name} {getattr(self, name)} is out of range; it must be at least 1")
        if not 1e-3 <= self.rope_theta <= 1e15:
            raise UserError(f"rope_theta {self.rope_theta} is out of range; it must be 0.001 to 1e15")
        if self.attention_sinks < 0 or self.attention_sinks and self.sliding_window is None:
            raise UserError(f"attention_sinks {self.attention_sinks} is out of range; it must be at least 0, "
                            f"and 0 without a sliding_window")
        if self.attention_sinks and (self.rope_scaling or {}).get("rope_type") == "dynamic":
            raise UserError("attention_sinks keep their distance, so a rope_scaling of type dynamic, which "
                            "follows the length, cannot go with them; choose another")
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
            self.rope_scaling = check_scaling(self.rope_scaling, self.max_seq_len, self.rope_theta)
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
    """x to queries, keys and values in heads; normed where qk_norm is, turned by position; attend; o_proj."""

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

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], prepared: Prepared | None,
                cache: LayerCache | None) -> Tensor:
        """x (B, T, C) -> (B, T, C). rope: what `rotate` takes; prepared: what `attend` takes.

        cache: keeps the keys, turned, and the values of what came before, to which these are added; None:
        there is nothing before.
        """
        B, T, _ = x.shape
        # (B, T, C) -> (B, H, T, D) for queries, (B, K, T, D) for keys and values
        q = self.q_norm(self.q_proj(x).view(B, T, -1, self.head_dim)).transpose(1, 2)
        k = self.k_norm(self.k_proj(x).view(B, T, -1, self.head_dim)).transpose(1, 2)
        v = self.v_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)
        q, k = rotate(q, *rope), rotate(k, *rope)
        if cache is not None:
            k, v = cache.append(k, v)  # (B, K, S, D), S = all positions so far
        out = attend(q, k, v, prepared)  # (B, H, T, D)
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

    def forward(self, x, rope, prepared=None, cache=None):
        x = x + self.self_attn(self.input_layernorm(x), rope, prepared, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """All but the head: ids (B, T) -> hidden states (B, T, C). A reward model's head stands on it too."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)

    def forward(self, ids: Tensor, positions: Tensor | None = None, mask: Mask | Tensor | None = None,
                cache: KVCache | None = None) -> Tensor:
        T, past = ids.size(1), cache.length if cache is not None else 0
        mask = Mask.of(mask).within(self.config, past + T)
        if positions is None:
            positions = torch.arange(past, past + T, device=ids.device)[None]  # (1, T)
            if mask.place is not None:  # padding has no position, and each packed text begins at 0
                positions = mask.place[:, past:]  # (B, S) -> (B, T)
        cos, sin = rope_angles(positions, self.config.head_dim, self.config.rope_theta,
                               self.config.rope_scaling)
        rope = (cos[:, None], sin[:, None])  # (B, 1, T, D/2): the same for every head
        prepared = prepare(mask, ids.size(0), T, cache, self.config, ids.device)  # the same for every layer
        x = self.embed_tokens(ids)  # (B, T) -> (B, T, C)
        for i, layer in enumerate(self.layers):
            x = layer(x, rope, prepared, cache.layers[i] if cache is not None else None)
        return self.norm(x)


class Transformer(nn.Module):
    """The language model: Decoder and head. `model(ids)`: the logits of the token after each position."""
    task = "ForCausalLM"  # what Hugging Face's class is called, behind the name of its family

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

    def forward(self, ids: Tensor, positions: Tensor | None = None, mask: Mask | Tensor | None = None,
                cache: KVCache | None = None) -> Tensor:
        """Logits (B, T, V) for ids (B, T).

        positions: (B, T) or (1, T) integers; default: counted from the start of each text, without padding.
        mask: None: causal, within the model's window. (B, S) bool: True on real tokens, False on padding at
              either side. (B, T, S) bool: True where a query may look at a key, taken as it is. A Mask: any
              of these, and packed documents, prefixes, windows. S counts what the cache has seen and these T.
        cache: what came before (see make_cache); these T tokens are added to it in place.
        """
        return self.lm_head(self.model(ids, positions, mask, cache))


@torch.no_grad()
def extend_embedding(model: Transformer, vocab_size: int,
                     pieces: Mapping[int, list[int]] | None = None) -> None:
    """Give the model's embedding and head rows up to vocab_size, for tokens that it has not been trained on.

    A new row is the mean of the old ones, so that its logit is the mean logit: by Jensen's inequality it
    takes at most 1 / (V + 1) of the probability from what the model knew; a row of zeros could take nearly
    all (Hewitt 2021, "Initializing New Word Embeddings for Pretrained Language Models"). New tokens start out
    alike; where they stand tells them apart. A model with rows to spare (Qwen's have) stays as it is. An
    optimizer made before holds the old tensors.

    pieces: {new id: old ids}: the row of such a token is the mean of these rows alone, in a row to spare too.
    """
    added = max(0, vocab_size - model.config.vocab_size)
    if not added and not pieces:
        return
    for table in (model.model.embed_tokens, model.lm_head)[:1 if model.config.tie_embeddings else 2]:
        old = table.weight
        mean = old.mean(dim=0, keepdim=True, dtype=torch.float32).to(old.dtype)  # (1, C)
        weight = torch.cat([old, mean.expand(added, -1)])  # (V, C)
        for id, ids in (pieces or {}).items():
            weight[id] = old[ids].mean(dim=0, dtype=torch.float32)
        table.weight = nn.Parameter(weight)
    vocab_size = model.config.vocab_size + added
    if model.config.tie_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    model.model.embed_tokens.num_embeddings = model.lm_head.out_features = vocab_size
    model.config = model.model.config = replace(model.config, vocab_size=vocab_size)


# ------------------------------------------------------------------------------------------------------------
# Sizes, and what they cost

_LLAMA = dict(vocab_size=32000, norm_eps=1e-6, max_seq_len=2048)  # Touvron et al. 2023, table 2
_LLAMA2 = dict(vocab_size=32000, norm_eps=1e-5, max_seq_len=4096)  # Touvron et al. 2023b, table 1
_LLAMA3 = dict(vocab_size=128256, norm_eps=1e-5, n_kv_heads=8, rope_theta=5e5)  # Dubey et al. 2024, table 3


def _llama3_rope(factor: float) -> dict:
    return dict(max_seq_len=131072, rope_scaling={
        "rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192})


_GPT2 = dict(vocab_size=50257, tie_embeddings=True)
_QWEN2 = dict(vocab_size=151936, rope_theta=1e6, attention_bias=True, output_bias=False)
_QWEN3 = dict(vocab_size=151936, max_seq_len=40960, rope_theta=1e6, n_kv_heads=8, head_dim=128, qk_norm=True)
_SMOLLM2 = dict(vocab_size=49152, max_seq_len=8192, norm_eps=1e-5, tie_embeddings=True)

PRESETS = {  # arguments of ModelConfig; published models as the config.json on their page has them
    # for a laptop: the main job of train.py is "small"
    "tiny": dict(dim=64, n_layers=2, n_heads=2, max_seq_len=128, qk_norm=True),
    "small": dict(dim=128, n_layers=4, n_heads=2, max_seq_len=128, qk_norm=True),
    # Radford et al. 2019, table 2: width, blocks and heads of GPT-2, in this file's architecture, which has
    # no learned positions, no biases, and three matrices of 8/3 C in the MLP instead of two of 4 C
    "gpt2-124m": _GPT2 | dict(dim=768, n_layers=12, n_heads=12),
    "gpt2-355m": _GPT2 | dict(dim=1024, n_layers=24, n_heads=16),
    "gpt2-774m": _GPT2 | dict(dim=1280, n_layers=36, n_heads=20),
    "gpt2-1.5b": _GPT2 | dict(dim=1600, n_layers=48, n_heads=25),
    "llama-7b": _LLAMA | dict(dim=4096, n_layers=32, n_heads=32, ffn_dim=11008),
    "llama-13b": _LLAMA | dict(dim=5120, n_layers=40, n_heads=40, ffn_dim=13824),
    "llama-33b": _LLAMA | dict(dim=6656, n_layers=60, n_heads=52, ffn_dim=17920),
    "llama-65b": _LLAMA | dict(dim=8192, n_layers=80, n_heads=64, ffn_dim=22016),
    "llama2-7b": _LLAMA2 | dict(dim=4096, n_layers=32, n_heads=32, ffn_dim=11008),
    "llama2-13b": _LLAMA2 | dict(dim=5120, n_layers=40, n_heads=40, ffn_dim=13824),
    "llama2-70b": _LLAMA2 | dict(dim=8192, n_layers=80, n_heads=64, n_kv_heads=8, ffn_dim=28672),
    "llama3-8b": _LLAMA3 | dict(dim=4096, n_layers=32, n_heads=32, ffn_dim=14336, max_seq_len=8192),
    "llama3-70b": _LLAMA3 | dict(dim=8192, n_layers=80, n_heads=64, ffn_dim=28672, max_seq_len=8192),
    "llama3.1-8b": _LLAMA3 | _llama3_rope(8.0) | dict(dim=4096, n_layers=32, n_heads=32, ffn_dim=14336),
    "llama3.1-70b": _LLAMA3 | _llama3_rope(8.0) | dict(dim=8192, n_layers=80, n_heads=64, ffn_dim=28672),
    "llama3.1-405b": _LLAMA3 | _llama3_rope(8.0) | dict(dim=16384, n_layers=126, n_heads=128, ffn_dim=53248),
    "llama3.2-1b": _LLAMA3 | _llama3_rope(32.0) | dict(dim=2048, n_layers=16, n_heads=32, ffn_dim=8192,
                                                       tie_embeddings=True),
    "llama3.2-3b": _LLAMA3 | _llama3_rope(32.0) | dict(dim=3072, n_layers=28, n_heads=24, ffn_dim=8192,
                                                       tie_embeddings=True),
    # Jiang et al. 2023, table 1
    "mistral-7b": dict(vocab_size=32000, dim=4096, n_layers=32, n_heads=32, n_kv_heads=8, ffn_dim=14336,
                       max_seq_len=32768, sliding_window=4096, norm_eps=1e-5),
    # Zhang et al. 2024 (TinyLlama); heads as in its config.json
    "tinyllama-1.1b": dict(vocab_size=32000, dim=2048, n_layers=22, n_heads=32, n_kv_heads=4, ffn_dim=5632,
                           max_seq_len=2048, norm_eps=1e-5),
    # Allal et al. 2025
    "smollm2-135m": _SMOLLM2 | dict(dim=576, n_layers=30, n_heads=9, n_kv_heads=3, ffn_dim=1536,
                                    rope_theta=1e5),
    "smollm2-360m": _SMOLLM2 | dict(dim=960, n_layers=32, n_heads=15, n_kv_heads=5, ffn_dim=2560,
                                    rope_theta=1e5),
    "smollm2-1.7b": _SMOLLM2 | dict(dim=2048, n_layers=24, n_heads=32, ffn_dim=8192, rope_theta=1.3e5),
    # Yang et al. 2024 (Qwen2), table 1
    "qwen2-0.5b": _QWEN2 | dict(dim=896, n_layers=24, n_heads=14, n_kv_heads=2, ffn_dim=4864,
                                max_seq_len=131072, tie_embeddings=True),
    # Yang et al. 2025 (Qwen3), table 1
    "qwen3-0.6b": _QWEN3 | dict(dim=1024, n_layers=28, n_heads=16, ffn_dim=3072, tie_embeddings=True),
    "qwen3-1.7b": _QWEN3 | dict(dim=2048, n_layers=28, n_heads=16, ffn_dim=6144, tie_embeddings=True),
    "qwen3-4b": _QWEN3 | dict(dim=2560, n_layers=36, n_heads=32, ffn_dim=9728, tie_embeddings=True),
    "qwen3-8b": _QWEN3 | dict(dim=4096, n_layers=36, n_heads=32, ffn_dim=12288),
    "qwen3-14b": _QWEN3 | dict(dim=5120, n_layers=40, n_heads=40, ffn_dim=17408),
    "qwen3-32b": _QWEN3 | dict(dim=5120, n_layers=64, n_heads=64, ffn_dim=25600),
}
# the short names of train.py, which gives them settings of training
PRESETS |= {"124m": PRESETS["gpt2-124m"], "1b": PRESETS["llama3.2-1b"], "7b": PRESETS["llama2-7b"]}


@dataclass
class Settings:
    preset: str = "small"  # a size: one of PRESETS
    vocab_size: int | None = None  # none: the preset's
    batch_size: int = 1  # sequences that a process holds at once
    seq_len: int | None = None  # tokens of a sequence; none: as many as the preset's model takes
    devices: int = 1  # processes, one a GPU
    shard_size: int | None = None  # hsdp: processes that share one copy; none: as many as leave two copies
    tensor_parallel: int | None = None  # processes that share each product; none: as many as divide all
    precision: Literal["fp32", "bf16"] = "bf16"  # of matrix products
    optimizer: Literal["muon", "adamw", "adafactor"] = "adamw"
    activation_checkpointing: Literal["none", "full", "selective"] = "none"  # recompute in the backward pass
    chunked_loss: bool = True  # never hold the logits of all tokens

    def __post_init__(self):
        require(self, preset=set(PRESETS), vocab_size=(1, None), batch_size=(1, None), seq_len=(1, None),
                devices=(1, 2 ** 20), shard_size=(1, self.devices), tensor_parallel=(1, self.devices))
        self.seq_len = self.seq_len or PRESETS[self.preset].get("max_seq_len", ModelConfig.max_seq_len)


def main():
    settings = parse(Settings)
    config = ModelConfig(**PRESETS[settings.preset])
    if settings.vocab_size:
        config = replace(config, vocab_size=settings.vocab_size)
    print(cost_table(config, settings))


if __name__ == "__main__":
    run(main)
