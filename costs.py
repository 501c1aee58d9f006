"""What a model costs: parameters, floating-point operations, memory.
"""
import math
from math import prod
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # its fields are all that is read here; model.py stands above this file
    from model import ModelConfig



def count_parameters(config: "ModelConfig") -> int:
    """How many numbers are trained; a tied head is counted once.

    V C + V C + (2L + 1) C + 4 L C^2 + 3 L C F for multi-head attention without extras: LLaMA-7B has
    6,738,415,616.
    """
    C, D, H, K = config.dim, config.head_dim, config.n_heads, config.n_kv_heads
    embeddings = config.vocab_size * C * (1 if config.tie_embeddings else 2)
    attention = 2 * C * H * D + 2 * C * K * D  # q and o, k and v
    attention += config.attention_bias * (H * D + 2 * K * D + C * config.output_bias)
    if config.qk_norm:
        attention += 2 * D
    return embeddings + config.n_layers * (attention + 3 * C * config.ffn_dim + 2 * C) + C


def estimate_flops(config: "ModelConfig", seq_len: int) -> int:
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


def estimate_memory(config: "ModelConfig", batch_size: int, seq_len: int, *, optimizer: str = "adamw",
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


def parameter_memory(config: "ModelConfig", width: int, optimizer: str, fsdp: bool, reshard: bool, shards: int,
                     tensor_parallel: int) -> dict[str, float]:
    """Bytes of weights, gradients and moments: float32, cut into `shards`; matrices by tensor_parallel too.

    Beside them, of the width of the products (2 or 4): under autocast a copy of each matrix that multiplies,
    from its forward to its backward pass. Under FSDP whole weights of two blocks (one is at work, the next is
    fetched), or of all where they are not dropped after the forward pass (`reshard`); whole gradients of one
    block, and once more as they are sent; and whole weights and gradients of embedding and head.
    """
    block = block_shapes(config)
    ends = [(config.vocab_size, config.dim)] * (1 if config.tie_embeddings else 2) + [(config.dim,)]

    def numbers(shapes) -> float:
        return sum(prod(shape) / (tensor_parallel if len(shape) > 1 else 1) for shape in shapes)
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


def block_activations(config: "ModelConfig", width: int, stream: int, mask: int,
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


def block_shapes(config: "ModelConfig") -> list[tuple[int, ...]]:
    """The shapes of a Block's parameters."""
    C, ffn = config.dim, config.ffn_dim
    q, k = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    shapes = [(C,), (C,), (q, C), (k, C), (k, C), (C, q), (ffn, C), (ffn, C), (C, ffn)]
    shapes += ([(q,), (k,), (k,)] + [(C,)] * config.output_bias) * config.attention_bias
    return shapes + [(config.head_dim,)] * 2 * config.qk_norm
