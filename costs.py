"""What a model costs: parameters, floating-point operations, memory. Counted from its config, nothing built.

    python model.py --preset 7b --batch_size 4 --seq_len 4096 --devices 8

prints LLaMA-7B's 6,738,415,616 parameters by part, the 4.3e10 FLOPs a token of training, and memory by
part: 231 GiB a process under DDP, 113 under FSDP over 8 (--activation_checkpointing full: 25), and for
generation 22.

Parameters are exact. FLOPs are those of matrix products, exact but for the causal average (Kaplan et al.
2020, section 2.1). Memory is counted along the code: to the byte what autograd keeps, and what the layouts of
parallel.py hold (tests/test_costs.py); the peak of a real process is within 15 % of it (`python bench.py
--only memory`). The literature's rules of thumb stand beside it: `textbook_memory`.

Letters: L blocks, C width, F width inside the MLP, H query heads, K key/value heads, D head width,
V vocabulary, B batch, T time.
"""
import math
from math import prod
from typing import TYPE_CHECKING

from config import UserError

if TYPE_CHECKING:  # its fields are all that is read here; model.py stands above this file
    from model import ModelConfig


def count_parameters(config: "ModelConfig") -> int:
    """How many numbers are trained; a tied head is counted once."""
    return sum(parameters_by_part(config).values())


def parameters_by_part(config: "ModelConfig") -> dict[str, int]:
    """How many numbers are trained in each part; the head has none of its own where it is tied.

    V C + 4 L C^2 + 3 L C F + (2 L + 1) C + V C, in this order, for multi-head attention without extras:
    LLaMA-7B has 6,738,415,616. Fewer key/value heads make two of the four C^2 smaller.
    """
    C, D, L = config.dim, config.head_dim, config.n_layers
    q, k = config.n_heads * D, config.n_kv_heads * D  # all heads of the queries; of the keys, or the values
    attention = C * q + 2 * C * k + q * C  # q; k and v; o
    attention += config.attention_bias * (q + 2 * k + C * config.output_bias)
    table = config.vocab_size * C
    return {"embedding": table, "attention": L * attention, "mlp": L * 3 * C * config.ffn_dim,
            "norms": (2 * L + 1) * C + L * 2 * D * config.qk_norm,
            "head": 0 if config.tie_embeddings else table}


# ------------------------------------------------------------------------------------------------------------
# Floating-point operations


def estimate_flops(config: "ModelConfig", seq_len: int, *, passes: str = "training", quadratic: bool = True,
                   activation_checkpointing: str = "none", checkpoint_every: int = 1) -> int:
    """Floating-point operations a token, in matrix products (Kaplan et al. 2020, section 2.1).

    Forward: a multiply and an add for each weight that multiplies (the head even where it is tied; not the
    embedding, a look-up), and for each pair of positions that attend to each other. Backward: twice that, as
    each product has a gradient for both of its sides.
    passes: "forward", "backward", or "training": both. quadratic: False leaves out what grows with seq_len.
    activation_checkpointing "full": the backward pass makes blocks anew first, their last product excepted,
    which nothing is computed from. The field leaves this out where it speaks of MFU (Chowdhery et al. 2022,
    appendix B), and so does the default. "selective" keeps all products.
    """
    assert passes in ("forward", "backward", "training"), passes
    C, heads, ffn = config.dim, config.n_heads * config.head_dim, config.ffn_dim
    block = 2 * C * heads + 2 * C * config.n_kv_heads * config.head_dim + 3 * C * ffn  # q, o; k, v; the MLP
    if quadratic:
        block += 2 * heads * keys_seen(config, seq_len)  # q·k and weights·v
    forward = config.n_layers * block + C * config.vocab_size
    again = config.n_layers // checkpoint_every if activation_checkpointing == "full" else 0
    backward = 2 * forward + again * (block - C * ffn)
    return 2 * {"forward": forward, "backward": backward, "training": forward + backward}[passes]


def keys_seen(config: "ModelConfig", seq_len: int) -> int:
    """How many keys a query attends to on average: seq_len / 2, as attention is causal; fewer with a window.

    The pairs of a causal mask are a triangle of side T, T^2 / 2. A window of W and S sinks beside it leave
    out those further apart, a triangle of side T - W - S.
    """
    unseen = 0
    if config.sliding_window is not None:
        unseen = max(0, seq_len - config.sliding_window - config.attention_sinks)
    return (seq_len ** 2 - unseen ** 2) // (2 * seq_len)


# ------------------------------------------------------------------------------------------------------------
# Memory of training


def textbook_memory(config: "ModelConfig", batch_size: int, seq_len: int) -> dict[str, int]:
    """Bytes of training with Adam in mixed precision and full recomputation, by the rules of thumb.

    They leave out what a block takes while it is made anew, and all that goes by in a moment. Sources:
    Rajbhandari et al. 2020 (ZeRO), section 3.1, for the states; Chen et al. 2016 for the recomputation.

    `estimate_memory` has the same terms: 16 P for precision "fp32" (4 + 4 + 8: no copy is needed), or in bf16
    for FSDP's shards, beside the whole blocks at work, and under DDP 18 for what multiplies, as gradients are
    float32; 2 L B T C for FSDP in bf16, which carries the stream in bf16 (DDP: 4 L B T C); and 12 B T V, but
    for the head's input, where the loss is not chunked.
    """
    P, L, tokens = count_parameters(config), config.n_layers, batch_size * seq_len
    held = {
        # weights and gradients in bf16; the weights in float32, which the update changes; Adam's two means
        "states": (2 + 2 + 4 + 4 + 4) * P,
        # of each block no more is kept than its input, (B, T, C) in bf16
        "activations": 2 * L * tokens * config.dim,
        # the logits (B, T, V) in float32, their log-softmax, and the gradient that comes back
        "logits": (4 + 4 + 4) * tokens * config.vocab_size}
    return held | {"total": sum(held.values())}


def estimate_memory(config: "ModelConfig", batch_size: int, seq_len: int, *, optimizer: str = "adamw",
                    precision: str = "fp32", activation_checkpointing: str = "none",
                    checkpoint_every: int = 1, chunked_loss: bool = True, chunk: int = 2 ** 21,
                    masked: bool = False, data_parallel: str = "ddp", reshard: bool = True, shards: int = 1,
                    tensor_parallel: int = 1, lora_rank: int = 0,
                    quantize: str | None = None) -> dict[str, int]:
    """Bytes that training takes on one process: "weights", "gradients", "moments", "activations", "logits",
    and their sum, "total".

    batch_size: windows held at once, a micro-batch. chunk: logits that the chunked loss holds at once.
    masked: batches bring a mask; a bound, as if it let all T see all T. shards: into how many parts "fsdp"
    and "hsdp" cut the weights. lora_rank: only adapters of all linear layers in blocks are trained, the base
    being stored as `quantize` says (quantize.py); of one process, in fp32.

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
    if lora_rank:
        held = adapter_memory(config, lora_rank, quantize)
        kept += 4 * lora_rank * config.n_layers * sum(len(shape) > 1 for shape in block_shapes(config))  # A x
    ends = 8 + ((4 + stream) * config.dim + 4) / tensor_parallel + masked * seq_len  # ids, last norm, mask
    held["activations"] = tokens * (kept + ends) + 4 * seq_len * config.head_dim  # rotary angles
    C, V = config.dim, config.vocab_size / tensor_parallel
    if chunked_loss:  # hidden states, their gradient and the head's, what a chunk adds to it, and chunks
        rows = min(tokens, max(2 * C, chunk // V))
        chunks = (8 - width) * rows
        held["logits"] = 2 * stream * tokens * C + (0 if lora_rank else (4 + width) * V * C) + V * chunks
    else:  # what the head multiplies; the log-softmax, and on the way back two gradients
        held["logits"] = tokens * (width * C + 3 * 4 * V)
    held = {part: math.ceil(size) for part, size in held.items()}
    return held | {"total": sum(held.values())}


def parameter_memory(config: "ModelConfig", width: int, optimizer: str, fsdp: bool, reshard: bool,
                     shards: int, tensor_parallel: int) -> dict[str, float]:
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


def adapter_memory(config: "ModelConfig", rank: int, quantize: str | None) -> dict[str, float]:
    """Bytes of a frozen base with adapters of all linear layers in its blocks, and two moments of these."""
    matrices = [shape for shape in block_shapes(config) if len(shape) > 1]
    adapters = config.n_layers * sum(rank * (rows + columns) for rows, columns in matrices)
    weights = 4 * (count_parameters(config) - config.n_layers * sum(map(prod, matrices)) + adapters)
    weights += config.n_layers * sum(stored_bytes(prod(shape), quantize) for shape in matrices)
    return {"weights": weights, "gradients": 4 * adapters, "moments": 8 * adapters}


def stored_bytes(numbers: int, quantize: str | None) -> int:
    """Of a matrix: float32; in NF4, 1/2 a number, 1 a block of 64 and 4 for 256 of these; int8, 4 for 256."""
    if quantize is None:
        return 4 * numbers
    coded = numbers if quantize == "int8" else math.ceil(numbers / 64)
    return (0 if quantize == "int8" else math.ceil(numbers / 2)) + coded + 4 * math.ceil(coded / 256) + 4


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


# ------------------------------------------------------------------------------------------------------------
# Memory of generation


def estimate_generation_memory(config: "ModelConfig", batch_size: int, seq_len: int, *,
                               prompt_len: int | None = None, width: int = 2,
                               packed: bool = False) -> dict[str, int]:
    """Bytes that generation takes: "weights", "cache", "prefill", "decoding", and the "total": the first two,
    and the larger of the others, of which one comes after the other.

    batch_size: texts at once. seq_len: tokens of a text, prompt and answer, for which the cache is laid out.
    prompt_len: of these so many are read in one pass; default: all but one. width: bytes of a number, 2 in
    bf16, 4 in fp32. packed: with the copies of what multiplies that generation.py makes on a CPU.
    """
    C, V = config.dim, config.vocab_size
    weights = width * count_parameters(config)
    if packed:
        matrices = sum(prod(shape) for shape in block_shapes(config) if len(shape) > 1)
        weights += width * (config.n_layers * matrices + V * C)
    # a key and a value for each block and position: of K heads, not H (Ainslie et al. 2023). A window bounds
    # the positions; sinks are kept beside it (Xiao et al. 2023)
    slots = seq_len
    if config.sliding_window is not None:
        slots = min(seq_len, config.sliding_window + config.attention_sinks)
    cache = 2 * config.n_layers * batch_size * config.n_kv_heads * slots * config.head_dim * width
    # of the last position: as they come; in float32 their log-softmax and its exp; in float64 the sums of it
    logits = (width + 4 + 4 + 8) * V
    at_work = passing_activations(config, width)
    prompt_len = max(1, seq_len - 1) if prompt_len is None else prompt_len
    angles = 4 * config.head_dim * prompt_len  # rotary, cos and sin
    prefill = batch_size * max(prompt_len * at_work, prompt_len * width * C + logits) + angles
    held = {"weights": weights, "cache": cache, "prefill": prefill,
            "decoding": batch_size * max(at_work, logits)}
    return held | {"total": weights + cache + max(held["prefill"], held["decoding"])}


def passing_activations(config: "ModelConfig", width: int) -> int:
    """Bytes a token that a Block holds at most while nothing is kept for a backward pass.

    Either inside the MLP: the Block's input, the stream between its parts, what came out of the norm; gate's
    silu, up, and their product. Or where queries or keys are rotated, in float32: input and norm; queries,
    keys and values, the queries once more where they are done; two rotated halves, and both as one.
    """
    q, k = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    mlp = width * (3 * config.dim + 3 * config.ffn_dim)
    copy = 4 if width < 4 else 0  # in float32
    rotation = max(width * (q + 2 * k) + (8 + copy) * q, width * (2 * q + 2 * k) + (8 + copy) * k)
    return max(mlp, 2 * width * config.dim + rotation)


# ------------------------------------------------------------------------------------------------------------
# The table of `python model.py`

GIB = 2 ** 30


def cost_table(config: "ModelConfig", settings) -> str:
    """Parameters, FLOPs and memory, by part, as lines of text.

    settings: the Settings of model.py. Memory as on GPUs, where the chunked loss takes larger chunks.
    """
    return "\n\n".join("\n".join(aligned(rows)) for rows in (
        parameter_rows(config), flop_rows(config, settings), training_rows(config, settings),
        generation_rows(config, settings)))


def parameter_rows(config: "ModelConfig") -> list[tuple[str, ...]]:
    parts = parameters_by_part(config)
    total = sum(parts.values())
    rows = [(f"  {part}", f"{size:,}", f"{size / total:.1%}") for part, size in parts.items()]
    return [("parameters", f"{total:,}", f"{config.n_layers} blocks, width {config.dim}"), *rows]


def flop_rows(config: "ModelConfig", settings) -> list[tuple[str, ...]]:
    rows = [("FLOPs a token", "in all", "of weights", "of attention",
             f"in windows of {settings.seq_len:,}, recomputed: {settings.activation_checkpointing}")]
    for passes in ("forward", "backward", "training"):
        whole, weights = (estimate_flops(config, settings.seq_len, passes=passes, quadratic=quadratic,
                                         activation_checkpointing=settings.activation_checkpointing)
                          for quadratic in (True, False))
        rows.append((f"  {passes}", f"{whole:.3e}", f"{weights:.3e}", f"{whole - weights:.3e}", ""))
    return rows


def training_rows(config: "ModelConfig", settings) -> list[tuple[str, ...]]:
    columns = layouts(config, settings)
    memory = [estimate_memory(config, settings.batch_size, settings.seq_len, optimizer=settings.optimizer,
                              precision=settings.precision, chunked_loss=settings.chunked_loss, chunk=2 ** 27,
                              activation_checkpointing=settings.activation_checkpointing, **layout)
              for layout in columns.values()]
    largest = max(held["total"] for held in memory)
    about = (f"GiB a process of {settings.devices}, {settings.batch_size} x {settings.seq_len:,} tokens at "
             f"once, {settings.precision}")
    notes = {"moments": settings.optimizer, "logits": "in chunks" if settings.chunked_loss else "all at once",
             "activations": f"recomputed: {settings.activation_checkpointing}"}
    rows = [("training", *columns, about)]
    rows += [(f"  {part}", *(gib(held[part], largest) for held in memory), notes.get(part, ""))
             for part in memory[0]]
    rules = textbook_memory(config, settings.batch_size, settings.seq_len)
    rows.append(("  rules of thumb", gib(rules["total"], largest), *[""] * (len(columns) - 1),
                 "16 P + 2 L B T C + 12 B T V, all recomputed"))
    return rows


def layouts(config: "ModelConfig", settings) -> dict[str, dict]:
    """{name: arguments of estimate_memory} for the ways in which train.py shares the work.

    By default copies are as few as can be: two, or the least divisor; and the processes that share each
    matrix product as many as divide heads, MLP and positions.
    """
    n = settings.devices
    shards = settings.shard_size or max((d for d in range(1, n) if n % d == 0), default=1)
    tensor = settings.tensor_parallel or math.gcd(n, config.n_kv_heads, config.ffn_dim, settings.seq_len)
    sizes = {f"{name} {getattr(config, name)}": getattr(config, name)
             for name in ("n_heads", "n_kv_heads", "ffn_dim")}
    sizes |= {f"the {n} devices": n, f"seq_len {settings.seq_len}": settings.seq_len}
    for words, size in sizes.items():
        if size % tensor:
            raise UserError(f"--tensor_parallel {tensor} does not divide {words}; choose a divisor")
    if n % shards:
        raise UserError(f"--shard_size {shards} does not divide the {n} devices; choose a divisor")
    found = {"ddp" if n > 1 else "one process": {"data_parallel": "ddp"}}
    if n > 1:
        found["fsdp"] = {"data_parallel": "fsdp", "shards": n}
    if n > shards > 1:
        found[f"hsdp {n // shards} x {shards}"] = {"data_parallel": "hsdp", "shards": shards}
    if tensor > 1:
        found[f"tensor {tensor}" + f" x fsdp {n // tensor}" * (n > tensor)] = {
            "data_parallel": "fsdp", "shards": n // tensor, "tensor_parallel": tensor}
    return found


def generation_rows(config: "ModelConfig", settings) -> list[tuple[str, ...]]:
    held = estimate_generation_memory(config, settings.batch_size, settings.seq_len,
                                      width=4 if settings.precision == "fp32" else 2)
    rows = [("generation", "GiB", f"one process, {settings.batch_size} x {settings.seq_len:,} tokens, "
             f"{settings.precision}")]
    notes = {"cache": f"{config.n_kv_heads} heads for keys and values", "prefill": "the prompts, in one pass",
             "decoding": "activations or logits of one token a text"}
    rows += [(f"  {part}", gib(size, held["total"]), notes.get(part, "")) for part, size in held.items()]
    return rows


def gib(size: float, largest: float | None = None) -> str:
    """A size in GiB, with as many decimals as the largest of its column needs."""
    largest = (size if largest is None else largest) / GIB
    return f"{size / GIB:,.{1 if largest >= 100 else 2 if largest >= 1 else 4}f}"


def aligned(rows: list[tuple[str, ...]]) -> list[str]:
    """Lines of columns: the first and the last begin at the left, those between end at the right."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = []
    for first, *figures, last in rows:
        figures = [figure.rjust(width) for figure, width in zip(figures, widths[1:])]
        lines.append("  ".join([first.ljust(widths[0]), *figures, last]).rstrip())
    return lines
