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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config import UserError


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
    rope_scaling: dict | None = None  # none yet
    norm_eps: float = 1e-6
    tie_embeddings: bool = False  # one matrix for both ends: half the memory where V is large against C
    qk_norm: bool = False  # RMSNorm on each query and key head (Qwen3): allows a larger learning rate
    attention_bias: bool = False
    head_dim: int | None = None  # D; None: dim / n_heads

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


def rope_angles(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin, each (..., T, D/2) in float32, of position times theta^(-2i/D) (Su et al. 2021, Eq. 15).

    float32 throughout: in bfloat16 the positions beyond 256 would already be rounded.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions.device) / head_dim
    # (D/2,); theta ** -exponents would have other last bits, which show at position 30,000
    frequencies = 1.0 / theta ** exponents
    angles = positions[..., None].float() * frequencies  # (..., T, D/2)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (B, H, T, D) with each pair (x[i], x[i + D/2]) turned by its angle, so that q·k depends on i - j
    only.

    Halves are paired, as in Hugging Face, and not neighbours, as in the paper: the same up to a permutation
    of D, and with this choice weights pass in and out unpermuted.
    """
    x1, x2 = x.float().chunk(2, dim=-1)
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1).to(x.dtype)


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


class Attention(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.head_dim = config.head_dim
        heads, kv_heads = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
        bias = config.attention_bias
        self.q_proj = nn.Linear(config.dim, heads, bias=bias)
        self.k_proj = nn.Linear(config.dim, kv_heads, bias=bias)
        self.v_proj = nn.Linear(config.dim, kv_heads, bias=bias)
        self.o_proj = nn.Linear(heads, config.dim, bias=bias)
        self.q_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else nn.Identity()

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], mask: Tensor | None,
                cache: "LayerCache | None") -> Tensor:
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
                cache: "KVCache | None" = None) -> Tensor:
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
                cache: "KVCache | None" = None) -> Tensor:
        """Logits (B, T, V) for ids (B, T).

        positions: (B, T) or (1, T) integers; default: counted from the start, or from the cache's end, or
        over `mask`.
        mask: None: causal. (B, S) bool: True on real tokens, False on padding at either side; causal too.
              (B, T, S) bool: True where a query may look at a key, taken as it is (document masks and the
              like). S counts the cache's positions and these T.
        cache: a KVCache, extended in place by these T tokens.
        """
        return self.lm_head(self.model(ids, positions, mask, cache))


def attention_mask(mask: Tensor | None, T: int, past: int, device) -> Tensor | None:
    """The (B, 1, T, S) bool mask for the kernel; None where its own causal form, or none at all, is right."""
    if mask is None and (past == 0 or T == 1):
        return None
    if mask is not None and mask.dim() == 3:
        return mask[:, None]
    # queries stand at the end of the keys: query t, at position past + t, sees keys 0 .. past + t
    causal = torch.ones(T, past + T, dtype=torch.bool, device=device).tril(diagonal=past)
    return causal[None, None] if mask is None else causal & mask[:, None, None, :]  # (B, 1, T, S)


# ------------------------------------------------------------------------------------------------------------
# Generation: one token at a time; keys and values of what was read before are kept, not computed again.


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

    def __init__(self, config: ModelConfig, batch_size: int, max_len: int, dtype=torch.float32, device="cpu"):
        shape = (batch_size, config.n_kv_heads, max_len, config.head_dim)
        self.layers = [LayerCache(shape, dtype, device) for _ in range(config.n_layers)]

    @property
    def length(self) -> int:
        return self.layers[0].length


@dataclass
class Generation:
    ids: Tensor  # (B, R) the new tokens only; after a row's stop token: that stop token again
    lengths: Tensor  # (B,) how many of them count, the stop token included
    logps: Tensor  # (B, R) log-probability in nats, in the distribution drawn from; 0 after the stop


def next_token_logps(logits: Tensor, temperature: float, top_k: int | None, top_p: float | None) -> Tensor:
    """The log-probabilities (B, V) to sample from, in float32. Temperature 0: all on the likeliest token."""
    logits = logits.float()
    if temperature < 1e-6:  # 0, or so close that dividing by it would overflow
        best = logits.argmax(dim=-1, keepdim=True)
        return torch.full_like(logits, -math.inf).scatter(-1, best, 0.0)
    logits = logits / temperature
    if top_k is not None and top_k < logits.size(-1):
        best = logits.topk(top_k, dim=-1)  # by index, not by value: equal logits must not let in more
        logits = torch.full_like(logits, -math.inf).scatter(-1, best.indices, best.values)
    if top_p is not None and top_p < 1:  # the fewest tokens whose mass reaches p (Holtzman et al. 2020)
        ordered, order = logits.sort(dim=-1, descending=True)
        probs = ordered.softmax(dim=-1)
        outside = probs.cumsum(dim=-1) - probs >= top_p  # the mass before this token is enough already
        logits = logits.masked_fill(outside.scatter(-1, order, outside), -math.inf)
    return logits.log_softmax(dim=-1)


@torch.no_grad()
def generate_stream(model: Transformer, ids: Tensor | Sequence[Sequence[int]], max_new_tokens: int,
                    temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None,
                    generator: torch.Generator | None = None) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields, for each new position, the tokens (B,) and their log-probabilities (B,); see `generate`."""
    check_sampling(temperature, top_k, top_p)
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens {max_new_tokens} is out of range; it must be at least 1")
    device = next(model.parameters()).device
    prompts = [torch.as_tensor(prompt, dtype=torch.long) for prompt in ids]
    if not prompts or min(len(prompt) for prompt in prompts) == 0:
        raise UserError("an empty prompt gives nothing to continue; begin with the end-of-text token")
    B, T = len(prompts), max(len(prompt) for prompt in prompts)
    if T + max_new_tokens > model.config.max_seq_len:
        raise UserError(f"{T} prompt tokens and {max_new_tokens} new ones exceed max_seq_len "
                        f"{model.config.max_seq_len} of this model; shorten the prompt or ask for fewer")
    ids, mask = torch.zeros(B, T, dtype=torch.long), torch.zeros(B, T, dtype=torch.bool)
    for row, prompt in enumerate(prompts):  # padded on the left: every row's next token is the last column
        ids[row, T - len(prompt):], mask[row, T - len(prompt):] = prompt, True
    ids, mask = ids.to(device), None if bool(mask.all()) else mask.to(device)
    cache = KVCache(model.config, B, T + max_new_tokens, next(model.parameters()).dtype, device)
    for _ in range(max_new_tokens):
        hidden = model.model(ids, mask=mask, cache=cache)[:, -1]  # (B, T, C) -> (B, C): the last alone counts
        logps = next_token_logps(model.lm_head(hidden), temperature, top_k, top_p)
        token = torch.multinomial(logps.exp(), 1, generator=generator)  # (B, 1)
        yield token[:, 0], logps.gather(1, token)[:, 0]
        ids = token
        if mask is not None:
            mask = F.pad(mask, (0, 1), value=True)


def generate(model: Transformer, ids: Tensor | Sequence[Sequence[int]], max_new_tokens: int,
             temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None,
             stop_ids: Sequence[int] = (),
             generator: torch.Generator | None = None) -> Generation:
    """Continue each prompt by up to max_new_tokens.

    ids: (B, T), or a list of B prompts of unequal lengths (the model sees no padding). temperature: 0 is
    greedy.
    top_k, top_p: keep the k likeliest tokens; then the fewest that hold mass p. stop_ids: a row ends when it
    draws one.
    generator: where randomness comes from, on the model's device; the same seed gives the same sample.
    Returns a Generation. Raises UserError where prompt and new tokens exceed the model's max_seq_len.
    """
    tokens, logps = [], []
    stopped = lengths = None
    for token, logp in generate_stream(model, ids, max_new_tokens, temperature, top_k, top_p, generator):
        if stopped is None:
            stopped, lengths = torch.zeros_like(token, dtype=torch.bool), torch.zeros_like(token)
            stops = torch.tensor(list(stop_ids), dtype=torch.long, device=token.device)
        elif stopped.any():
            token, logp = torch.where(stopped, tokens[-1], token), torch.where(stopped, 0.0, logp)
        tokens.append(token)
        logps.append(logp)
        lengths += ~stopped
        stopped = stopped | torch.isin(token, stops)
        if stopped.all():
            break
    return Generation(torch.stack(tokens, dim=1), lengths, torch.stack(logps, dim=1))


def check_sampling(temperature: float, top_k: int | None, top_p: float | None):
    """Raise UserError where a sampling setting is out of its range."""
    if not 0 <= temperature < math.inf:
        raise UserError(f"temperature {temperature} is out of range; 0 is greedy, 1 the model as it is")
    if top_k is not None and top_k < 1:
        raise UserError(f"top_k {top_k} is out of range; it must be at least 1")
    if top_p is not None and not 0 < top_p <= 1:
        raise UserError(f"top_p {top_p} is out of range; it must be above 0 and at most 1")


# ------------------------------------------------------------------------------------------------------------
# Sizes


def count_parameters(config: ModelConfig) -> int:
    """How many numbers are trained; a tied head is counted once.

    V C + V C + (2L + 1) C + 4 L C^2 + 3 L C F for multi-head attention without extras: LLaMA-7B has
    6,738,415,616.
    """
    C, D, H, K = config.dim, config.head_dim, config.n_heads, config.n_kv_heads
    embeddings = config.vocab_size * C * (1 if config.tie_embeddings else 2)
    attention = 2 * C * H * D + 2 * C * K * D  # q and o, k and v
    if config.attention_bias:
        attention += H * D + 2 * K * D + C
    if config.qk_norm:
        attention += 2 * D
    return embeddings + config.n_layers * (attention + 3 * C * config.ffn_dim + 2 * C) + C


def estimate_flops(config: ModelConfig, seq_len: int) -> int:
    """Floating-point operations to train on one token: forward, and twice that backward (Kaplan et al. 2020,
    section 2.1).

    A multiply and an add for each weight that multiplies (the head even where it is tied; not the embedding,
    a look-up), and for each pair of positions that attend to each other: on average seq_len / 2, as attention
    is causal.
    """
    C, D, H, K = config.dim, config.head_dim, config.n_heads, config.n_kv_heads
    block = 2 * C * H * D + 2 * C * K * D + 3 * C * config.ffn_dim  # q and o, k and v, the MLP
    weights = config.n_layers * block + C * config.vocab_size
    scores = config.n_layers * 2 * H * D * (seq_len // 2)  # q·k and weights·v
    return 3 * 2 * (weights + scores)


def estimate_memory(config: ModelConfig, batch_size: int, seq_len: int, *, optimizer: str = "adamw",
                    precision: str = "fp32", activation_checkpointing: str = "none",
                    checkpoint_every: int = 1, chunked_loss: bool = True, chunk: int = 2 ** 21,
                    masked: bool = False, data_parallel: str = "ddp", reshard: bool = True, shards: int = 1,
                    tensor_parallel: int = 1) -> dict[str, int]:
    """Bytes that training takes on one process: "weights", "gradients", "moments", "activations", "logits",
    and their sum, "total".

    batch_size: windows held at once, a micro-batch. chunk: logits that the chunked loss holds at once.
    masked: batches bring a mask (B, T, T). shards: into how many parts "fsdp" and "hsdp" cut the weights.

    Each part is the most that it takes. Together they are what a micro-batch finds that is not the first of
    its step; a step of one stays below, its gradients coming as its activations go, and so do checkpointed
    blocks, computed again when the logits are gone. Left out: what single operations, the optimizer's among
    them, take for a moment, and what the allocator loses.
    """
    # FSDP casts the weights, and the stream is then as wide as they; autocast leaves it in float32
    fsdp, width = data_parallel != "ddp" or tensor_parallel > 1, 2 if precision in ("bf16", "fp16") else 4
    held = parameter_memory(config, width, optimizer, fsdp, reshard, 1 if data_parallel == "ddp" else shards,
                            tensor_parallel)
    tokens, stream = batch_size * seq_len, width if fsdp else 4
    blocks, recomputed = block_activations(config, width, stream, masked * seq_len, tensor_parallel)
    every_kth = 0 if activation_checkpointing == "none" else config.n_layers // checkpoint_every
    kept = ((config.n_layers - every_kth) * blocks["none"] + every_kth * blocks[activation_checkpointing]
            + (recomputed[activation_checkpointing] if every_kth else 0))  # of one block at a time
    ends = 8 + ((4 + stream) * config.dim + 4) / tensor_parallel + masked * seq_len  # ids, last norm, mask
    held["activations"] = tokens * (kept + ends) + 4 * seq_len * config.head_dim  # rotary angles
    C, V = config.dim, config.vocab_size / tensor_parallel
    if chunked_loss:  # hidden states, their gradient and the head's, what a chunk adds to it, and chunks
        rows = min(tokens, max(2 * C, chunk // V))
        chunks = (8 - width) * rows
        held["logits"] = 2 * stream * tokens * C + (4 + width) * V * C + V * chunks
    else:  # what the head multiplies; the log-softmax, and on the way back two gradients
        held["logits"] = tokens * (width * C + 3 * 4 * V)
    held = {part: math.ceil(size) for part, size in held.items()}
    return held | {"total": sum(held.values())}


def parameter_memory(config: ModelConfig, width: int, optimizer: str, fsdp: bool, reshard: bool, shards: int,
                     tensor_parallel: int) -> dict[str, float]:
    """Bytes of weights, gradients and moments: float32, cut into `shards`; matrices by tensor_parallel too.

    Beside them, of the width of the products (2 or 4): under autocast a copy of each matrix that multiplies,
    from its forward to its backward pass. Under FSDP whole weights of two blocks (one is at work, the next is
    fetched), or of all where they are not dropped after the forward pass (`reshard`); whole gradients of one
    block, and once more as they are sent; and whole weights and gradients of embedding and head.
    """
    with torch.device("meta"):  # shapes without memory
        block = [p.shape for p in Block(config).parameters()]
    ends = [torch.Size((config.vocab_size, config.dim))] * (1 if config.tie_embeddings else 2)
    ends.append(torch.Size((config.dim,)))

    def numbers(shapes) -> float:
        return sum(shape.numel() / (tensor_parallel if len(shape) > 1 else 1) for shape in shapes)
    L, own = config.n_layers, config.n_layers * numbers(block) + numbers(ends)
    moments = 2 * own / shards
    if optimizer == "muon":  # one of a matrix inside a block
        moments -= L * numbers(shape for shape in block if len(shape) > 1) / shards
    if optimizer == "adafactor":  # means of rows and of columns, whole on every process
        moments = L * sum(map(sum, block)) + sum(map(sum, ends))
    held = {"weights": 4 * own / shards, "gradients": 4 * own / shards, "moments": 4 * moments}
    if fsdp:
        held["weights"] += width * (numbers(ends) + (min(2, L) if reshard else L) * numbers(block))
        held["gradients"] += width * (numbers(ends) + numbers(block)) + 4 * numbers(block)
    elif width == 2:
        held["weights"] += 2 * (L * numbers(shape for shape in block if len(shape) > 1) + numbers(ends[:1]))
    return held


def block_activations(config: ModelConfig, width: int, stream: int, mask: int,
                      tensor_parallel: int) -> tuple[dict[str, float], dict[str, float]]:
    """Bytes a token that a Block keeps for its backward pass, by how it is checkpointed; and those that it
    then makes anew.

    Counted along Block.forward: what autograd keeps in eager mode, with a flash kernel for attention, which
    keeps no (T, S) weights. A compiled block keeps less. width, stream: bytes of a number in what the
    products make, and in the residual stream; norms compute in 4. mask: keys that a mask given has a number
    for. With tensor parallelism a process has its heads, and between the products its positions.
    """
    n, C, D, ffn = tensor_parallel, config.dim, config.head_dim, config.ffn_dim / tensor_parallel
    q, k = config.n_heads / n, config.n_kv_heads / n  # heads; k for the values too
    norm = ((4 + stream) * C + 4) / n  # its input, what its weight multiplies, 1 / rms
    inputs = (2 if stream == width else 3 + 2) * width * C  # of q, k, v; gate, up: autocast casts for each
    qk_norm = ((4 + width) * D + 4) * (q + k) if config.qk_norm else 0
    # outputs of products that the backward pass reads: v, attention's with its log-sums, gate, up
    read = width * (k * D + q * D + 2 * ffn) + 4 * q
    # what is made from others: q and k rotated, attention's with its heads side by side, silu's, silu's x up
    made = width * ((q + k) * D + q * D + 2 * ffn + mask)
    whole = 2 * norm + inputs + qk_norm + read + made
    # the block's input; "selective" keeps what products make: `read`, and q, k, and both to the stream
    kept = {"none": whole, "full": stream * C / n,
            "selective": stream * C / n + read + width * ((q + k) * D + 2 * C)}
    anew = whole - (4 * C / n if stream == 4 else 0)  # norms read a stream of 4 bytes as it is
    return kept, {"none": 0, "full": anew, "selective": anew - read}
