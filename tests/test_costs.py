"""costs.py: parameters, FLOPs and memory, against what torch counts and keeps; model.PRESETS."""
import subprocess
import sys
import weakref
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import bench
import train
from attention import make_cache
from config import run
from costs import (cost_table, estimate_generation_memory, keys_seen, layouts, parameters_by_part,
                   textbook_memory)
from generation import draw, next_token_logps
from model import (PRESETS, ModelConfig, Settings, Transformer, count_parameters, estimate_flops,
                   estimate_memory, main)
from objectives import next_token_loss
from optim import make_optimizer
from parallel import Compute, Env, parallelize
from support import TINY, VARIANTS, random_ids, random_model, seeded


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_count_parameters_equals_the_sum_over_the_model(changes):
    config = replace(TINY, **changes)
    with torch.device("meta"):
        assert count_parameters(config) == sum(p.numel() for p in Transformer(config).parameters())


def test_llama_7b_has_6738415616_parameters():
    config = ModelConfig(vocab_size=32000, dim=4096, n_layers=32, n_heads=32, ffn_dim=11008)
    assert count_parameters(config) == 6_738_415_616
    V, C, L, ffn = 32000, 4096, 32, 11008
    assert count_parameters(config) == V * C + V * C + (2 * L + 1) * C + 4 * L * C ** 2 + 3 * L * C * ffn
    assert parameters_by_part(config) == {"embedding": V * C, "attention": 4 * L * C ** 2,
                                          "mlp": 3 * L * C * ffn, "norms": (2 * L + 1) * C, "head": V * C}


@pytest.mark.parametrize("changes", VARIANTS + [dict(attention_bias=True, output_bias=False)], ids=str)
def test_parts_are_those_of_the_model(changes):
    with torch.device("meta"):
        model = Transformer(replace(TINY, **changes))
    found = dict.fromkeys(("embedding", "attention", "mlp", "norms", "head"), 0)
    for name, p in model.named_parameters():  # names a tied head once, as the embedding
        part = next(part for part, word in (("norms", "norm"), ("embedding", "embed"), ("attention", "attn"),
                                            ("mlp", "mlp"), ("head", "head")) if word in name)
        found[part] += p.numel()
    assert parameters_by_part(model.config) == found


LLAMA_7B = ModelConfig(vocab_size=32000, dim=4096, n_layers=32, n_heads=32, ffn_dim=11008)


# ---- published sizes ---------------------------------------------------------------------------------------

PUBLISHED = {"llama-7b": 6_738_415_616, "llama2-7b": 6_738_415_616, "llama2-13b": 13_015_864_320,
             "llama2-70b": 68_976_648_192, "llama3-8b": 8_030_261_248, "llama3-70b": 70_553_706_496,
             "llama3.1-8b": 8_030_261_248, "llama3.1-405b": 405_853_388_800, "llama3.2-1b": 1_235_814_400,
             "llama3.2-3b": 3_212_749_824, "mistral-7b": 7_241_732_096, "tinyllama-1.1b": 1_100_048_384,
             "smollm2-135m": 134_515_008, "smollm2-360m": 361_821_120, "smollm2-1.7b": 1_711_376_384,
             "qwen2-0.5b": 494_032_768, "qwen3-0.6b": 596_049_920, "qwen3-1.7b": 1_720_574_976,
             "qwen3-4b": 4_022_468_096, "qwen3-8b": 8_190_735_360, "qwen3-14b": 14_768_307_200,
             "qwen3-32b": 32_762_123_264}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_preset_has_the_published_number_of_parameters(name):
    assert count_parameters(ModelConfig(**PRESETS[name])) == PUBLISHED[name]


def peer_parameters(config):
    """How many transformers' model has."""
    import transformers
    family = "Qwen3" if config.qk_norm else "Qwen2" if config.attention_bias else "Llama"
    if config.sliding_window:
        family = "Mistral"
    made = getattr(transformers, f"{family}Config")(
        vocab_size=config.vocab_size, hidden_size=config.dim, intermediate_size=config.ffn_dim,
        num_hidden_layers=config.n_layers, num_attention_heads=config.n_heads, head_dim=config.head_dim,
        num_key_value_heads=config.n_kv_heads, tie_word_embeddings=config.tie_embeddings)
    with torch.device("meta"):
        model = getattr(transformers, f"{family}ForCausalLM")(made)
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", ["llama2-7b", "llama3.2-1b", "mistral-7b", "qwen2-0.5b", "qwen3-0.6b",
                                  "smollm2-135m", "tinyllama-1.1b"])
def test_transformers_model_of_these_sizes_has_as_many(name):
    config = ModelConfig(**PRESETS[name])
    assert count_parameters(config) == peer_parameters(config)


@pytest.mark.parametrize("name, family", [("llama-7b", "Llama"), ("mistral-7b", "Mistral")])
def test_a_preset_is_what_transformers_takes_without_being_told(name, family):
    """The defaults of these two configs are the published models."""
    import transformers
    theirs, ours = getattr(transformers, f"{family}Config")(), ModelConfig(**PRESETS[name])
    names = {"vocab_size": "vocab_size", "dim": "hidden_size", "ffn_dim": "intermediate_size",
             "n_layers": "num_hidden_layers", "n_heads": "num_attention_heads",
             "n_kv_heads": "num_key_value_heads", "tie_embeddings": "tie_word_embeddings"}
    names |= {"sliding_window": "sliding_window"} if family == "Mistral" else {"norm_eps": "rms_norm_eps"}
    for own, name in names.items():
        assert getattr(ours, own) == getattr(theirs, name), own


@pytest.mark.parametrize("name, width, published", [("gpt2-124m", 768, 124_439_808),
                                                    ("gpt2-355m", 1024, 354_823_168),
                                                    ("gpt2-774m", 1280, 774_030_080),
                                                    ("gpt2-1.5b", 1600, 1_557_611_200)])
def test_gpt2s_sizes_come_near_without_its_positions_and_biases(name, width, published):
    """Within 1 %: of 8/3 C the MLP's width is the next multiple of 64."""
    config = ModelConfig(**PRESETS[name])
    assert config.dim == width
    assert count_parameters(config) == pytest.approx(published - 1024 * width, rel=0.01)


def test_every_preset_is_a_model_and_train_takes_its_own_from_here():
    for arguments in PRESETS.values():
        ModelConfig(**arguments)
    assert set(train.PRESETS) <= set(PRESETS)
    for name in train.PRESETS:
        settings, ours = train.Settings(preset=name), ModelConfig(**PRESETS[name])
        theirs = train.planned_config(settings, ours.vocab_size)
        for width in ("dim", "n_layers", "n_heads", "n_kv_heads", "ffn_dim", "head_dim"):
            assert getattr(theirs, width) == getattr(ours, width), (name, width)
    assert train.planned_config(train.Settings(preset="small"), 4096) == ModelConfig(**PRESETS["small"])


# ---- FLOPs -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_estimate_flops_equals_torchs_count(changes):
    """Exactly. The counter sees every matrix product of forward and backward; with the plain attention
    kernel, all T x T pairs of positions. The estimate takes the causal half, T // 2 a token: the rest is
    added here.
    """
    model, T, B = random_model(**changes), 16, 2
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(random_ids(B, T)).sum().backward()
    config = model.config
    skipped = 3 * 2 * config.n_layers * 2 * config.n_heads * config.head_dim * (T - T // 2)
    assert counter.get_total_flops() == B * T * (estimate_flops(config, T) + skipped)


def counted(model, T, B, checkpointing="none", every=1):
    """FLOPs that torch counts, forward and backward, with the plain kernel for attention."""
    compute = Compute(activation_checkpointing=checkpointing, checkpoint_every=every)
    model, flops = parallelize(model, Env(torch.device("cpu"), compute=compute)), []
    with sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as counter:
            loss = model(random_ids(B, T)).sum()
        flops.append(counter.get_total_flops())
        with FlopCounterMode(display=False) as counter:
            loss.backward()
    return [*flops, counter.get_total_flops()]


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("checkpointing", ["none", "full", "selective"])
def test_forward_and_backward_equal_torchs_counts_with_recomputation_too(checkpointing, every):
    """Exactly, with the pairs that the plain kernel does not skip added as above."""
    model, T, B = random_model(n_layers=3, ffn_dim=80), 16, 2
    forward, backward = counted(model, T, B, checkpointing, every)
    config, settings = model.config, dict(activation_checkpointing=checkpointing, checkpoint_every=every)
    skipped = 2 * 2 * config.n_heads * config.head_dim * (T - T // 2)  # of a block, forward
    again = 3 // every if checkpointing == "full" else 0
    assert forward == B * T * (estimate_flops(config, T, passes="forward", **settings) + 3 * skipped)
    assert backward == B * T * (estimate_flops(config, T, passes="backward", **settings)
                                + (2 * 3 + again) * skipped)
    assert estimate_flops(config, T, **settings) == sum(
        estimate_flops(config, T, passes=passes, **settings) for passes in ("forward", "backward"))


def test_without_the_quadratic_part_the_length_does_not_matter():
    short, long = (estimate_flops(LLAMA_7B, T, quadratic=False) for T in (128, 4096))
    multiplies = count_parameters(LLAMA_7B) - 32000 * 4096 - 65 * 4096  # not the embedding, nor norms
    assert short == long == 6 * multiplies
    # 6 L C T where T/2 keys are seen: two products of 2 C T/2, three times
    assert estimate_flops(LLAMA_7B, 4096) - long == 6 * 32 * 4096 * 4096


@pytest.mark.parametrize("T", [1, 7, 64, 100])
@pytest.mark.parametrize("window, sinks", [(None, 0), (16, 0), (16, 4), (1, 0), (1, 3), (80, 9), (200, 0)])
def test_keys_seen_are_those_of_the_mask(T, window, sinks):
    """Within half a key, as T / 2 leaves out half of the diagonal, and one for rounding to a whole number."""
    q, k = torch.arange(T)[:, None], torch.arange(T)
    mask = k <= q
    if window is not None:
        mask &= (q - k < window) | (k < sinks)
    config = replace(TINY, sliding_window=window, attention_sinks=sinks)
    assert abs(keys_seen(config, T) - mask.sum().item() / T) <= 1.5


def test_flops_are_six_for_each_weight_of_a_large_model():
    """Kaplan et al.'s rule, which leaves out attention (4 % of the work here) and counts the embedding."""
    config = ModelConfig(vocab_size=32000, dim=4096, n_layers=32, n_heads=32, ffn_dim=11008)
    assert estimate_flops(config, 2048) == pytest.approx(6 * count_parameters(config), rel=0.04)


# ---- memory of training ------------------------------------------------------------------------------------


class Live(TorchDispatchMode):
    """Counts the bytes of all storages that operations make inside, now and at most; but not of `own`."""

    def __init__(self, own=()):
        super().__init__()
        self.sizes, self.now, self.peak = {p.untyped_storage()._cdata: 0 for p in own}, 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self.sizes:
                storage = tensor.untyped_storage()
                self.sizes[storage._cdata] = storage.nbytes()
                self.now += storage.nbytes()
                weakref.finalize(storage, self.forget, storage._cdata)
        self.peak = max(self.peak, self.now)
        return result

    def forget(self, key):
        self.now -= self.sizes.pop(key)


def kept_for_backward(model, B, T, mask=None):
    """Bytes of what autograd keeps of the decoder's forward pass, apart from the parameters."""
    own, kept = {p.untyped_storage()._cdata for p in model.parameters()}, {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = tensor  # held, so that no other takes its place
        return tensor
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.model(random_ids(B, T), mask=mask)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def block_matrices(model):
    return sum(p.numel() for name, p in model.named_parameters() if ".layers." in name and p.dim() > 1)


@pytest.mark.parametrize("precision", ["fp32", "autocast", "weights"])
@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_activations_are_what_autograd_keeps(changes, precision):
    """To the byte, in fp32, under autocast, and with the weights themselves in bf16, as FSDP casts them."""
    model, B, T = random_model(**changes), 3, 16
    layout = dict(data_parallel="fsdp" if precision == "weights" else "ddp",
                  precision="fp32" if precision == "fp32" else "bf16")
    if precision == "weights":
        model.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
        kept = kept_for_backward(model, B, T)
    if precision == "autocast":  # its copies of the matrices are counted among the weights
        kept -= 2 * block_matrices(model)
    estimate = estimate_memory(model.config, B, T, **layout)["activations"]
    assert estimate == kept, f"{estimate - kept:+} bytes, of {B * T} tokens: which line of Block keeps them?"


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_mask_is_kept_by_each_block_as_numbers(precision):
    model, B, T = random_model(), 3, 16
    mask = torch.ones(B, T, T, dtype=torch.bool).tril()
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        kept = kept_for_backward(model, B, T, mask) - 2 * block_matrices(model) * (precision == "bf16")
    estimate = estimate_memory(model.config, B, T, precision=precision, masked=True)
    assert estimate["activations"] == kept + mask.nbytes  # the batch holds the mask itself


def measured(config, B, T, precision="fp32", chunked=True, **compute):
    """Bytes, without weights: the most in the forward pass of a first micro-batch (loss), at its end (kept),
    and the most in the second micro-batch (peak).
    """
    model = parallelize(Transformer(config), Env(torch.device("cpu"), compute=Compute(**compute)))
    found = []
    with Live(model.parameters()) as live:
        for _ in range(2):
            live.peak = 0
            ids = random_ids(B, T, vocab_size=config.vocab_size)
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                loss, _ = next_token_loss(model, (ids, ids), chunked=chunked)
            found += [live.peak, live.now]
            loss.backward()
    return SimpleNamespace(loss=found[0], kept=found[1], peak=live.peak)


@pytest.mark.parametrize("kind", ["full", "selective"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_what_checkpointed_blocks_keep(kind, precision):
    """To the byte: what three blocks more keep, of which none, one or all are checkpointed."""
    for every, checkpointed in ((7, 0), (2, 1), (1, 3)):
        kept, estimates = [], []
        for n_layers in (2, 5):
            config = replace(TINY, n_layers=n_layers, qk_norm=True)
            compute = dict(activation_checkpointing=kind, checkpoint_every=every)
            kept.append(measured(config, 3, 16, precision, **compute).kept)
            estimates.append(estimate_memory(config, 3, 16, precision=precision, **compute)["activations"])
        copies = 2 * block_matrices(random_model(n_layers=3)) if precision == "bf16" else 0
        got, expected = estimates[1] - estimates[0], kept[1] - kept[0]
        assert got == expected - copies * (3 - checkpointed) // 3, (every, kind)


# A model whose activations, and one whose logits outweigh the rest, and one of weights mostly
SIZES = [(replace(TINY, n_layers=4, qk_norm=True, ffn_dim=120), 8, 64),
         (replace(TINY, vocab_size=3000, max_seq_len=256), 8, 128),
         (replace(TINY, dim=256, ffn_dim=700), 4, 16)]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("chunked", [True, False])
@pytest.mark.parametrize("config, B, T", SIZES)
def test_the_total_is_what_a_step_holds_at_most(config, B, T, chunked, precision):
    """Within 10 %: what single operations take for a moment is left out."""
    estimate = estimate_memory(config, B, T, precision=precision, chunked_loss=chunked)
    peak = (measured(config, B, T, precision, chunked).peak
            + 4 * count_parameters(config) + estimate["moments"])
    assert estimate["total"] == pytest.approx(peak, rel=0.1)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["full", "selective"])
@pytest.mark.parametrize("config, B, T", SIZES)
def test_with_checkpoints_the_total_bounds_what_a_step_holds(config, B, T, kind, precision):
    """Within 10 %; from above only up to the logits, which are gone when a block is computed again."""
    estimate = estimate_memory(config, B, T, precision=precision, activation_checkpointing=kind)
    peak = (measured(config, B, T, precision, activation_checkpointing=kind).peak
            + 4 * count_parameters(config) + estimate["moments"])
    assert peak < 1.1 * estimate["total"] and estimate["total"] - estimate["logits"] < 1.1 * peak


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("V", [500, 4096, 40000])
def test_what_the_chunked_loss_holds(V, precision):
    """In one chunk, in two of 2^21, in chunks of 2 C rows; within 3 %: a chunk's sums are left out."""
    config, B, T = replace(TINY, vocab_size=V, max_seq_len=256), 8, 128
    estimate = estimate_memory(config, B, T, precision=precision)
    copies = estimate["weights"] - 4 * count_parameters(config)
    held = measured(config, B, T, precision).loss - estimate["activations"] - copies
    assert estimate["logits"] == pytest.approx(held, rel=0.03)


@pytest.mark.parametrize("layout", [{}, dict(precision="bf16"), dict(precision="bf16", data_parallel="fsdp")],
                         ids=str)
def test_a_block_computed_again_takes_what_it_would_have_kept(layout):
    """So a model of one block wins nothing. Beside that stand its input in bf16, which norms cast to float32,
    and with "selective" the products' outputs that nothing reads: q and k before their rotation, o and down.
    """
    config, tokens = replace(TINY, n_layers=1), 3 * 16
    none, full, selective = (
        estimate_memory(config, 3, 16, activation_checkpointing=kind, **layout)["activations"]
        for kind in ("none", "full", "selective"))
    cast = 2 * 32 * tokens if "data_parallel" in layout else 0
    assert full == none + cast
    assert selective == full + (2 if layout else 4) * tokens * ((4 + 2) * 8 + 2 * 32)


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "adafactor"])
@pytest.mark.parametrize("changes", [{}, VARIANTS[-1]], ids=str)
def test_moments_are_what_the_optimizer_keeps(changes, optimizer):
    model = random_model(**changes)
    settings = SimpleNamespace(optimizer=optimizer, lr=0.01, adam_lr=0.01, weight_decay=0.0,
                               betas=(0.9, 0.95), eps=1e-8)
    steps = make_optimizer(model, settings)
    model(random_ids(1, 4)).sum().backward()
    steps.step()
    kept = sum(x.nbytes for state in steps.state.values() for x in state.values() if x.dim())
    assert estimate_memory(model.config, 1, 4, optimizer=optimizer)["moments"] == kept


def test_weights_are_four_bytes_a_parameter_and_two_more_for_those_that_multiply_in_bf16():
    for changes in VARIANTS:
        model = random_model(**changes)
        whole, half = (estimate_memory(model.config, 1, 4, precision=p) for p in ("fp32", "bf16"))
        multiply = block_matrices(model) + model.lm_head.weight.numel()
        assert whole["weights"] == 4 * count_parameters(model.config)
        assert whole["gradients"] == half["gradients"] == whole["weights"]
        assert half["weights"] - whole["weights"] == 2 * multiply


def test_shards_divide_the_weights_but_for_the_blocks_at_work():
    """By hand: 1/8 of all; whole, in bf16, two blocks (or all), embedding, head and the last norm; of the
    gradients one block, which is sent in float32.
    """
    P, VC, C, L = count_parameters(LLAMA_7B), 32000 * 4096, 4096, 32
    block = (P - 2 * VC - C) // L
    for reshard, whole in ((True, 2), (False, L)):
        memory = estimate_memory(LLAMA_7B, 1, 2048, precision="bf16", data_parallel="fsdp", shards=8,
                                 reshard=reshard)
        assert memory["weights"] == 4 * P / 8 + 2 * (whole * block + 2 * VC + C)
        assert memory["gradients"] == 4 * P / 8 + 2 * (block + 2 * VC + C) + 4 * block
        assert memory["moments"] == 8 * P / 8
    assert memory["total"] == sum(size for part, size in memory.items() if part != "total")
    muon = {n: estimate_memory(LLAMA_7B, 1, 2048, optimizer="muon", data_parallel="fsdp", shards=n)
            for n in (1, 8)}
    assert muon[8]["moments"] == muon[1]["moments"] / 8


def test_without_fsdp_nothing_is_sharded_but_tensor_parallelism_brings_its_gathering():
    def memory(**layout):
        return estimate_memory(LLAMA_7B, 1, 2048, precision="bf16", **layout)
    assert memory(shards=8) == memory() == memory(data_parallel="ddp")
    assert memory(tensor_parallel=2, shards=8) == memory(tensor_parallel=2, data_parallel="fsdp")


def test_tensor_parallel_processes_share_matrices_heads_and_positions():
    """Only what goes into a block's products is whole on every process, ids, angles and norms apart."""
    one, two = (estimate_memory(LLAMA_7B, 1, 2048, data_parallel="fsdp", tensor_parallel=n) for n in (1, 2))
    norms = 65 * 4096
    assert two["moments"] == 8 * ((count_parameters(LLAMA_7B) - norms) / 2 + norms)
    inputs = 32 * 2 * 4 * 4096 * 2048  # of attention and MLP, in float32
    alone = 8 * 2048 + 4 * 2048 * 128  # ids and rotary angles
    assert two["activations"] == (one["activations"] - inputs - alone) / 2 + inputs + alone


def test_memory_takes_no_memory_and_no_random_numbers():
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    with Live() as live:
        memory = estimate_memory(LLAMA_7B, 1, 2048)
    assert memory["weights"] == 4 * 6_738_415_616
    assert live.peak == 0 or all(size == 0 for size in live.sizes.values()), "something was allocated"
    assert torch.equal(torch.random.get_rng_state(), before)


# ---- the rules of thumb ------------------------------------------------------------------------------------


def test_the_rules_of_thumb_by_hand():
    """LLaMA-7B, 4 windows of 2,048 tokens."""
    held = textbook_memory(LLAMA_7B, 4, 2048)
    assert held["states"] == 16 * 6_738_415_616
    assert held["activations"] == 2 * 32 * 4 * 2048 * 4096
    assert held["logits"] == 12 * 4 * 2048 * 32000
    assert held["total"] == held["states"] + held["activations"] + held["logits"]


def test_states_are_sixteen_bytes_a_parameter_in_fp32_and_in_fsdps_shards():
    """In bf16 under DDP two more of what multiplies. Of many shards only whole blocks at work are left."""
    sixteen, few = textbook_memory(LLAMA_7B, 1, 2048)["states"], ("weights", "gradients", "moments")

    def states(**layout):
        held = estimate_memory(LLAMA_7B, 1, 2048, **layout)
        return sum(held[part] for part in few)
    assert states() == sixteen
    embedding_and_norms = 32000 * 4096 + 65 * 4096
    assert states(precision="bf16") == sixteen + 2 * (count_parameters(LLAMA_7B) - embedding_and_norms)
    one, many = (states(precision="bf16", data_parallel="fsdp", shards=n) for n in (1, 2 ** 30))
    assert one - many == pytest.approx(sixteen, abs=sixteen / 2 ** 29)


def test_activations_and_logits_grow_as_the_rules_of_thumb_say():
    """With full recomputation in bf16 under FSDP: 2 B T C with each block, 12 B T V with the vocabulary. The
    head's input is 2 B T C more. Under DDP the stream, and with it what a block keeps, is in float32.
    """
    def both(layout, n_layers):
        config = replace(LLAMA_7B, n_layers=n_layers)
        ours = estimate_memory(config, 2, 512, precision="bf16", activation_checkpointing="full",
                               chunked_loss=False, data_parallel=layout)
        return ours, textbook_memory(config, 2, 512)
    (few, few_rule), (many, many_rule) = (both("fsdp", n) for n in (4, 9))
    assert many["activations"] - few["activations"] == many_rule["activations"] - few_rule["activations"]
    assert many["logits"] == many_rule["logits"] + 2 * 2 * 512 * 4096
    few, many = (both("ddp", n)[0] for n in (4, 9))
    rule = many_rule["activations"] - few_rule["activations"]
    assert many["activations"] - few["activations"] == 2 * rule


# ---- memory of generation ----------------------------------------------------------------------------------

# MLP, queries, and keys that outweigh the rest; and the logits
SHAPES = [dict(dim=64, n_heads=4, n_kv_heads=2, ffn_dim=192), dict(dim=128, n_heads=4, ffn_dim=128),
          dict(dim=64, n_heads=4, n_kv_heads=1, ffn_dim=96, head_dim=32, qk_norm=True),
          dict(dim=32, n_heads=2, vocab_size=20000)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window, sinks, slots", [(None, 0, 40), (16, 0, 16), (16, 3, 19), (100, 3, 40)])
def test_the_cache_has_few_heads_and_no_more_positions_than_the_window(window, sinks, slots, dtype):
    config = replace(TINY, sliding_window=window, attention_sinks=sinks)
    held = estimate_generation_memory(config, 3, 40, width=dtype.itemsize)["cache"]
    assert held == 2 * config.n_layers * 3 * config.n_kv_heads * slots * config.head_dim * dtype.itemsize
    with Live() as live:
        cache = make_cache(config, 3, 40, dtype)
    assert held == live.now and cache.length == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_prefill_and_decoding_are_what_a_pass_holds_at_most(shape, dtype):
    """Within 3 %: ids, positions and norms' statistics are left out."""
    config, T = ModelConfig(**{"vocab_size": 300, "n_layers": 3, "max_seq_len": 300} | shape), 256
    model = Transformer(config).to(dtype).eval()
    held = estimate_generation_memory(replace(config, vocab_size=1), 2, T + 1, prompt_len=T,
                                      width=dtype.itemsize)
    with torch.no_grad(), Live(model.parameters()) as live:
        cache = make_cache(config, 2, T + 1, dtype)
        before = live.now
        model.model(random_ids(2, T, vocab_size=300), cache=cache)
        assert held["prefill"] == pytest.approx(live.peak - before, rel=0.03)
        before = live.peak = live.now
        model.model(random_ids(2, 1, vocab_size=300), cache=cache)
        assert live.peak - before == pytest.approx(held["decoding"], rel=0.5)  # kernels' own, for so few


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_are_held_as_they_come_as_logps_as_probabilities_and_as_sums(dtype):
    """Within 3 %: a few numbers a row are left out."""
    with Live() as live:
        logits = torch.zeros(8, 20000, dtype=dtype)
        logps = next_token_logps(logits)
        draw(logps.exp(), seeded(0))  # as in generation.one_by_one, where logps are kept for the caller
    config = ModelConfig(**SHAPES[-1])
    held = estimate_generation_memory(config, 8, 20, width=dtype.itemsize)["decoding"]
    assert held == pytest.approx(live.peak, rel=0.03)


def test_the_total_counts_what_is_there_at_once():
    held = estimate_generation_memory(LLAMA_7B, 4, 4096)
    assert held["weights"] == 2 * 6_738_415_616
    assert held["cache"] == 2 * 32 * 4 * 4096 * 4096 * 2
    assert held["total"] == held["weights"] + held["cache"] + max(held["prefill"], held["decoding"])
    one = estimate_generation_memory(replace(LLAMA_7B, vocab_size=10 ** 6), 64, 2, prompt_len=1)
    assert one["total"] == one["weights"] + one["cache"] + one["prefill"]
    assert estimate_generation_memory(LLAMA_7B, 1, 1)["total"] > 2 * 6_738_415_616
    for changes in VARIANTS:
        model = random_model(**changes)
        plain, packed = (estimate_generation_memory(model.config, 1, 8, width=4, packed=p)["weights"]
                         for p in (False, True))
        linear = [m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear)]
        assert packed - plain == 4 * sum(linear)


# ---- measured ----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="it takes /proc, and glibc's malloc")
@pytest.mark.parametrize("chunked", [True, False])
@pytest.mark.parametrize("kind", ["none", "full"])
@pytest.mark.parametrize("size", bench.MEMORY_SIZES)
def test_the_peak_of_a_process_is_within_15_percent(size, kind, chunked):
    shape, (rows, length) = bench.MEMORY_SIZES[size]
    estimate = estimate_memory(ModelConfig(**shape), rows, length, activation_checkpointing=kind,
                               chunked_loss=chunked)["total"]
    peak = bench.in_a_fresh_process(f"print(bench.training_peak({size!r}, {kind!r}, {chunked}))",
                                    MALLOC_MMAP_THRESHOLD_="65536")
    assert estimate == pytest.approx(peak, rel=0.15)


# ---- the table ---------------------------------------------------------------------------------------------


def table(**settings):
    settings = Settings(**settings)
    return cost_table(ModelConfig(**PRESETS[settings.preset]), settings)


def figures(text, label, section):
    """The figures of that line, in the part of the table that begins with that word."""
    part = next(part for part in text.split("\n\n") if part.startswith(section))
    line = next(line for line in part.splitlines() if line.split()[0] == label)
    return [float(word.replace(",", "")) for word in line.split()[1:]
            if word.replace(",", "").replace(".", "").replace("e+", "").isdigit()]


def test_the_table_of_the_issue():
    text = table(preset="7b", batch_size=4, seq_len=4096, devices=8)
    assert figures(text, "parameters", "parameters")[0] == 6_738_415_616
    assert figures(text, "attention", "parameters")[0] == 4 * 32 * 4096 ** 2
    whole, weights, attention = figures(text, "backward", "FLOPs")
    assert whole == pytest.approx(estimate_flops(LLAMA_7B, 4096, passes="backward"), rel=1e-3)
    assert weights == pytest.approx(2 * figures(text, "forward", "FLOPs")[1], rel=1e-3)
    expected = [estimate_memory(LLAMA_7B, 4, 4096, precision="bf16", chunk=2 ** 27, **layout)["total"]
                for layout in ({}, dict(data_parallel="fsdp", shards=8), dict(data_parallel="hsdp", shards=4),
                               dict(data_parallel="fsdp", tensor_parallel=8))]
    assert figures(text, "total", "training") == pytest.approx([x / 2 ** 30 for x in expected], abs=0.051)
    generation = estimate_generation_memory(LLAMA_7B, 4, 4096)["total"] / 2 ** 30
    assert figures(text, "total", "generation") == pytest.approx([generation], abs=0.0051)
    assert max(map(len, text.splitlines())) <= 110


@pytest.mark.parametrize("changes, part, section", [
    (dict(precision="fp32"), "weights", "training"), (dict(precision="fp32"), "weights", "generation"),
    (dict(optimizer="adafactor"), "moments", "training"), (dict(chunked_loss=False), "logits", "training"),
    (dict(activation_checkpointing="full"), "activations", "training"),
    (dict(activation_checkpointing="full"), "backward", "FLOPs"),
    (dict(batch_size=2), "cache", "generation")])
def test_each_setting_changes_its_part(changes, part, section):
    plain, changed = (figures(table(preset="1b", seq_len=2048, **more), part, section)
                      for more in ({}, changes))
    assert plain != changed


def test_layouts_are_those_that_the_devices_allow():
    def names(preset="7b", seq_len=2048, **settings):
        settings = Settings(preset=preset, seq_len=seq_len, **settings)
        return list(layouts(ModelConfig(**PRESETS[preset]), settings))
    assert names() == ["one process"]
    assert names(devices=2) == ["ddp", "fsdp", "tensor 2"]  # two copies of one shard each are ddp's
    assert names(devices=16, preset="llama3-8b") == ["ddp", "fsdp", "hsdp 2 x 8", "tensor 8 x fsdp 2"]
    assert names(devices=3) == ["ddp", "fsdp"]
    assert names(devices=8, seq_len=2045) == ["ddp", "fsdp", "hsdp 2 x 4"], "positions are shared, too"
    found = names(devices=8, shard_size=2, tensor_parallel=4)
    assert found == ["ddp", "fsdp", "hsdp 4 x 2", "tensor 4 x fsdp 2"]


@pytest.mark.parametrize("words, message", [
    (["--preset", "7c"], "--preset 7c is not one of 124m, 1b, 7b"), (["--devices", "0"], "--devices 0"),
    (["--batch_size", "-1"], "--batch_size -1"), (["--seq_len", "0"], "--seq_len 0"),
    (["--vocab_size", "0"], "--vocab_size 0"), (["--seq_len", "nan"], "--seq_len: 'nan'"),
    (["--devices", "8", "--shard_size", "3"], "--shard_size 3 does not divide the 8 devices"),
    (["--devices", "8", "--shard_size", "9"], "--shard_size 9"),
    (["--preset", "7b", "--devices", "64", "--tensor_parallel", "64"],
     "--tensor_parallel 64 does not divide n_heads 32"),
    (["--size", "7b"], "unknown flag --size")])
def test_a_mistake_is_one_line_and_code_2(words, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["model.py", *words])
    with pytest.raises(SystemExit) as stopped:
        run(main)
    said = capsys.readouterr()
    assert stopped.value.code == 2 and said.out == ""
    assert said.err.startswith("error: ") and message in said.err and said.err.count("\n") == 1


def test_the_command_prints_the_table():
    words = ["--preset", "qwen3-0.6b", "--vocab_size", "1000", "--seq_len", "512"]
    done = subprocess.run([sys.executable, "model.py", *words], cwd=Path(bench.__file__).parent,
                          capture_output=True, text=True, check=True)
    settings, config = Settings(preset="qwen3-0.6b", seq_len=512), ModelConfig(**PRESETS["qwen3-0.6b"])
    assert done.stdout == cost_table(replace(config, vocab_size=1000), settings) + "\n"
    assert Settings(preset="qwen3-0.6b").seq_len == 40960, "all that the model takes"
