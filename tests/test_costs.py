"""costs.py: parameters, FLOPs and memory, against what torch counts and keeps."""
import weakref
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from model import (ModelConfig, Transformer, count_parameters, estimate_flops,
                   estimate_memory)
from objectives import next_token_loss
from optim import make_optimizer
from parallel import Compute, Env, parallelize
from support import TINY, VARIANTS, random_ids, random_model


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


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_estimate_flops_equals_torchs_count(changes):
    """Exactly. The counter sees every matrix product of forward and backward; with the plain attention kernel, all
    T x T pairs of positions. The estimate takes the causal half, T // 2 a token: the rest is added here.
    """
    model, T, B = random_model(**changes), 16, 2
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(random_ids(B, T)).sum().backward()
    config = model.config
    skipped = 3 * 2 * config.n_layers * 2 * config.n_heads * config.head_dim * (T - T // 2)
    assert counter.get_total_flops() == B * T * (estimate_flops(config, T) + skipped)


def test_flops_are_six_for_each_weight_of_a_large_model():
    """Kaplan et al.'s rule, which leaves out attention (4 % of the work here) and counts the embedding."""
    config = ModelConfig(vocab_size=32000, dim=4096, n_layers=32, n_heads=32, ffn_dim=11008)
    assert estimate_flops(config, 2048) == pytest.approx(6 * count_parameters(config), rel=0.04)



# Memory


LLAMA_7B = ModelConfig(vocab_size=32000, dim=4096, n_layers=32, n_heads=32, ffn_dim=11008)


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
@pytest.mark.parametrize("V", [500, 4096])
def test_what_the_chunked_loss_holds(V, precision):
    """In one chunk and in two of 2^21, within 3 %: a chunk's sums, maxima and hidden states are left out."""
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
