"""model.py: the architecture in the order of the lesson; against formulas, torch and transformers.

Where a test says "bitwise", a last bit that differs is information that leaked. Else float32 rounds after 24
bits (6e-8), sums of some dozen terms of size 1 through a few layers end near 1e-6, and 1e-5 leaves room for
another order of summation.
"""
import doctest
import itertools
import math
import weakref
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

import model as model_file
from config import UserError
from model import (KVCache, ModelConfig, RMSNorm, Transformer, attention, count_parameters, estimate_flops,
                   estimate_memory, generate, next_token_logps, rope_angles, rotate)
from objectives import next_token_loss
from optim import make_optimizer
from parallel import Compute, Env, parallelize

CLOSE = dict(rtol=1e-5, atol=1e-5)
TINY = ModelConfig(vocab_size=50, dim=32, n_layers=2, n_heads=4, n_kv_heads=2, ffn_dim=48, max_seq_len=64)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0):
    return torch.randn(shape, generator=seeded(seed))


def random_ids(*shape, vocab_size=50, seed=0):
    return torch.randint(vocab_size, shape, generator=seeded(seed))


def random_model(**changes) -> Transformer:
    """A TINY model in which every weight matters: those that start at zero or one are random too."""
    model, generator = Transformer(replace(TINY, **changes)), seeded(1)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(mean=1.0 if p.dim() == 1 else 0.0, std=0.2, generator=generator)
    return model.eval()


def test_the_example_in_the_docstring_holds():
    assert doctest.testmod(model_file).failed == 0


# RMSNorm


def test_rmsnorm_divides_by_the_root_of_the_mean_square():
    norm = RMSNorm(2, eps=0.0)
    norm.weight.data = torch.tensor([1.0, 2.0])
    rms = math.sqrt((3 ** 2 + 4 ** 2) / 2)
    assert_close(norm(torch.tensor([3.0, 4.0])), torch.tensor([3 / rms, 2 * 4 / rms]))


def test_rmsnorm_equals_torchs_and_eps_stands_inside_the_root():
    x = randn(2, 3, 16) * 1e-3  # so small that an eps outside the root, or forgotten, would show
    norm = RMSNorm(16, eps=1e-6)
    assert_close(norm(x), F.rms_norm(x, (16,), norm.weight, eps=1e-6))
    assert torch.equal(norm(torch.zeros(16)), torch.zeros(16)), "zeros must stay zeros, not become NaN"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rmsnorm_statistics_are_float32(dtype):
    x = torch.full((4096,), 300.0, dtype=dtype)  # 300^2 is infinite in float16
    out = RMSNorm(4096, eps=1e-6).to(dtype)(x)
    assert out.dtype == dtype
    assert torch.equal(out, torch.ones_like(x)), "the mean of squares overflowed or was rounded; use float32"


# Rotary positions


def test_rope_turns_a_pair_by_its_position_in_radians():
    """(1, 0) turned by p becomes (cos p, sin p). Halves are paired, 0 with 2 and 1 with 3."""
    cos, sin = rope_angles(torch.tensor([5]), head_dim=4, theta=100.0)
    turned = rotate(torch.tensor([[1.0, 0.0, 0.0, 0.0]]), cos, sin)  # first frequency: theta^0 = 1
    assert_close(turned, torch.tensor([[math.cos(5), 0, math.sin(5), 0]]))
    turned = rotate(torch.tensor([[0.0, 1.0, 0.0, 0.0]]), cos, sin)  # second: 100^(-2/4) = 1/10
    assert_close(turned, torch.tensor([[0, math.cos(0.5), 0, math.sin(0.5)]]))


def test_rope_scores_depend_on_the_distance_only():
    q, k = randn(1, 1, 1, 32, seed=0), randn(1, 1, 1, 32, seed=1)

    def score(i, j):
        (cos_i, sin_i), (cos_j, sin_j) = (rope_angles(torch.tensor([[p]]), 32, 10000.0) for p in (i, j))
        return (rotate(q, cos_i, sin_i) * rotate(k, cos_j, sin_j)).sum()
    for i, j in ((3, 0), (9, 2), (0, 11)):  # angles about 100: rounded at 100 x 6e-8, times |q||k|, about 30
        assert_close(score(i, j), score(i + 100, j + 100), rtol=0, atol=1e-4)
    assert abs(score(3, 0) - score(0, 3)) > 0.1, "the direction of time must matter"


def test_rope_keeps_lengths_and_types():
    cos, sin = rope_angles(torch.arange(40)[None], 16, 10000.0)
    x = randn(2, 3, 40, 16)
    assert_close(rotate(x, cos, sin).norm(dim=-1), x.norm(dim=-1))
    assert rotate(x.bfloat16(), cos, sin).dtype == torch.bfloat16


def test_rope_angles_are_float32_even_far_out_and_in_a_bfloat16_model():
    positions = torch.tensor([[0, 257, 4095, 131071]])
    cos, sin = rope_angles(positions, 64, 500000.0)
    assert cos.dtype == sin.dtype == torch.float32
    exact = positions[..., None].double() * 500000.0 ** (-torch.arange(0, 64, 2).double() / 64)
    error = (cos - exact.cos()).abs().amax(dim=-1)  # rounded thrice: the exponent, the frequency, the angle
    assert (error <= (positions + 1) * 3 * 2 ** -23).all(), "angles were rounded to less than float32"
    model, seen = random_model().bfloat16(), []
    model.model.layers[0].register_forward_pre_hook(lambda module, args: seen.extend(args[1]))
    model(random_ids(1, 4))
    assert [tensor.dtype for tensor in seen] == [torch.float32, torch.float32]


def test_rope_equals_transformers_bit_for_bit_at_any_position():
    """So nothing is permuted on the way in or out. The last bit of a frequency is 0.003 at position 30,000."""
    positions = torch.tensor([[0, 1, 77, 30000]])
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    theirs = LlamaRotaryEmbedding(LlamaConfig(hidden_size=64, num_attention_heads=2, rope_parameters=rope))
    their_cos, their_sin = theirs(randn(1), positions)
    cos, sin = rope_angles(positions, 32, 10000.0)
    assert torch.equal(torch.cat((cos, cos), dim=-1), their_cos)
    assert torch.equal(torch.cat((sin, sin), dim=-1), their_sin)
    q, k = randn(1, 2, 4, 32, seed=0), randn(1, 2, 4, 32, seed=1)
    their_q, their_k = apply_rotary_pos_emb(q, k, their_cos, their_sin)
    assert torch.equal(rotate(q, cos[:, None], sin[:, None]), their_q)
    assert torch.equal(rotate(k, cos[:, None], sin[:, None]), their_k)


# Attention: the reference


def test_attention_by_hand():
    """Scores 0 and ln 3 (times sqrt D, which is divided out): weights 1/4 and 3/4."""
    q = torch.tensor([1.0, 0.0, 0.0, 0.0]).view(1, 1, 1, 4)
    k = torch.tensor([[0.0, 0, 0, 0], [2 * math.log(3), 0, 0, 0]]).view(1, 1, 2, 4)
    v = torch.tensor([[0.0, 0, 0, 4], [4.0, 0, 0, 0]]).view(1, 1, 2, 4)
    assert_close(attention(q, k, v, None).flatten(), torch.tensor([3.0, 0, 0, 1]))


def test_attention_equals_loops():
    B, H, K, T, S, D = 2, 4, 2, 3, 5, 6
    q, k, v = randn(B, H, T, D, seed=0), randn(B, K, S, D, seed=1), randn(B, K, S, D, seed=2)
    mask = randn(B, H, T, S, seed=3) > 0
    mask[..., 0] = True
    out = attention(q, k, v, mask)
    for b, h, t in itertools.product(range(B), range(H), range(T)):
        key, value = k[b, h // 2].tolist(), v[b, h // 2].tolist()
        weights = [0.0] * S
        for s in range(S):
            if mask[b, h, t, s]:
                weights[s] = math.exp(sum(x * y for x, y in zip(q[b, h, t].tolist(), key[s])) / math.sqrt(D))
        expected = [sum(weights[s] * value[s][d] for s in range(S)) / sum(weights) for d in range(D)]
        assert_close(out[b, h, t], torch.tensor(expected), **CLOSE)


@pytest.mark.parametrize("kv_heads", [1, 2, 6])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_equals_torchs(kv_heads, masked):
    q, k, v = randn(2, 6, 7, 8, seed=0), randn(2, kv_heads, 9, 8, seed=1), randn(2, kv_heads, 9, 8, seed=2)
    mask = (randn(2, 1, 7, 9, seed=3) > 0).index_fill(-1, torch.tensor([4]), True) if masked else None
    torchs = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    assert_close(attention(q, k, v, mask), torchs, **CLOSE)


def test_query_heads_read_their_group_of_key_value_heads():
    v = torch.arange(3.0).view(1, 3, 1, 1).expand(1, 3, 5, 2)  # head k holds the value k
    out = attention(randn(1, 6, 4, 2), randn(1, 3, 5, 2), v, None)
    assert out[0, :, 0, 0].round().tolist() == [0, 0, 1, 1, 2, 2], "head h reads head h // (H / K), not h % K"


@pytest.mark.parametrize("kernel", [attention, F.scaled_dot_product_attention])
def test_a_query_that_may_look_at_nothing_gets_zeros_and_no_nan_in_gradients(kernel):
    q, k, v = (randn(1, 2, 3, 4, seed=seed).requires_grad_() for seed in range(3))
    mask = torch.tensor([[False, False, False], [True, False, False], [True, True, False]])
    out = kernel(q, k, v, mask)
    assert torch.equal(out[:, :, 0], torch.zeros(1, 2, 4))
    out.sum().backward()
    assert all(torch.isfinite(x.grad).all() for x in (q, k, v))


# Attention: the fused path


def two_documents():
    """ids (1, 10): documents of 4 and 6 tokens; positions that begin anew; mask (1, 10, 10)."""
    document = torch.tensor([0] * 4 + [1] * 6)
    mask = torch.ones(10, 10, dtype=torch.bool).tril() & (document == document[:, None])
    return random_ids(1, 10), torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5]]), mask[None]


@pytest.mark.parametrize("changes", [{}, dict(n_kv_heads=4), dict(n_kv_heads=1), dict(qk_norm=True),
                                     dict(attention_bias=True), dict(head_dim=6)], ids=str)
@pytest.mark.parametrize("kind", ["causal", "padded", "documents", "cached", "one token"])
def test_the_fused_path_equals_the_reference(monkeypatch, changes, kind):
    model, ids = random_model(**changes), random_ids(2, 10)
    padded = torch.arange(10) >= torch.tensor([[0], [4]])
    mask = {"padded": padded, "documents": two_documents()[2].expand(2, 10, 10)}.get(kind)

    def run():
        cache = KVCache(model.config, 2, 10) if kind in ("cached", "one token") else None
        parts = {"cached": [6, 4], "one token": [9, 1]}.get(kind, [10])
        return torch.cat([model(part, mask=mask, cache=cache) for part in ids.split(parts, dim=1)], dim=1)
    fused = run()
    calls = []

    def reference(q, k, v, attn_mask=None, is_causal=False, enable_gqa=False):
        calls.append(attn_mask)
        assert not (is_causal and attn_mask is not None) and enable_gqa == (q.size(1) != k.size(1))
        assert not is_causal or q.size(2) == k.size(2), "the kernel's causal form is wrong where T is not S"
        causal = torch.ones(q.size(2), k.size(2), dtype=torch.bool).tril(k.size(2) - q.size(2))
        return attention(q, k, v, causal if is_causal else attn_mask)
    monkeypatch.setattr(model_file.F, "scaled_dot_product_attention", reference)
    assert_close(fused, run(), **CLOSE)
    assert len(calls) >= model.config.n_layers


# Who sees whom


@pytest.mark.parametrize("T", [12, 200])  # 200: more than a block of the fused kernel
def test_changing_a_token_leaves_all_logits_before_it_bitwise_equal(T):
    model = random_model(max_seq_len=256)
    ids = random_ids(2, T)
    before = model(ids)
    for t in (1, T // 2, T - 1):
        changed = ids.clone()
        changed[:, t] = (ids[:, t] + 1) % 50
        after = model(changed)
        assert torch.equal(before[:, :t], after[:, :t]), f"a position before {t} saw token {t}"
        assert not torch.equal(before[:, t:], after[:, t:])


def test_the_order_of_earlier_tokens_matters():
    model = random_model()
    logits = model(torch.tensor([[1, 2, 3], [2, 1, 3]]))[:, -1]
    assert not torch.allclose(logits[0], logits[1], atol=1e-2)


def test_only_distances_between_positions_matter_to_the_model():
    model, ids = random_model(), random_ids(1, 10)
    later = model(ids, positions=torch.arange(10)[None] + 37)
    assert_close(model(ids), later, rtol=0, atol=1e-4)  # angles up to 47: rounded at 47 x 6e-8


@pytest.mark.parametrize("sizes", [[1] * 12, [5, 7], [4, 1, 6, 1], [11, 1], [1, 11]], ids=str)
@pytest.mark.parametrize("pad", ["none", "left", "right"])
def test_prefill_in_chunks_equals_one_pass(sizes, pad):
    """`is_causal=True` would be wrong for every chunk but the first: it lets query 0 see key 0 only."""
    model, ids = random_model(), random_ids(2, 12)
    column = torch.arange(12)
    mask = {"left": column >= torch.tensor([[0], [5]]), "right": column < torch.tensor([[12], [7]])}.get(pad)
    cache, start, parts = KVCache(model.config, 2, 12), 0, []
    for size in sizes:
        part = None if mask is None else mask[:, :start + size]
        parts.append(model(ids[:, start:start + size], mask=part, cache=cache))
        start += size
    real = slice(None) if mask is None else mask
    assert_close(torch.cat(parts, dim=1)[real], model(ids, mask=mask)[real], **CLOSE)
    assert cache.length == 12


def test_the_cache_holds_the_key_value_heads_not_the_query_heads():
    model = random_model()
    cache = KVCache(model.config, 3, 10)
    model(random_ids(3, 4), cache=cache)
    for layer in cache.layers:
        assert layer.k.shape == layer.v.shape == (3, 2, 10, 8)  # B, K, longest, D
        assert layer.k[:, :, :4].abs().min() > 0 and (layer.k[:, :, 4:] == 0).all()


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_batch_equals_the_single_sequences(side):
    model = random_model(max_seq_len=16)
    sequences = [random_ids(length, seed=length) for length in (3, 1, 8)]
    ids, mask = torch.zeros(3, 8, dtype=torch.long), torch.zeros(3, 8, dtype=torch.bool)
    for row, sequence in enumerate(sequences):
        place = slice(8 - len(sequence), 8) if side == "left" else slice(len(sequence))
        ids[row, place], mask[row, place] = sequence, True
    logits = model(ids, mask=mask)
    assert torch.isfinite(logits).all(), "a padding token that may look at nothing gave NaN"
    for row, sequence in enumerate(sequences):
        assert_close(logits[row, mask[row]], model(sequence[None])[0], **CLOSE)
    other = model(torch.where(mask, ids, 7), mask=mask)
    assert torch.equal(logits[mask], other[mask]), "the id under the padding leaked"


def test_padding_takes_no_position():
    """At the sides this would not show, as distances are what counts: so here it lies in between."""
    model, mask = random_model(), torch.tensor([[True, True, False, False, False, True, True, True]])
    ids = random_ids(1, 8)
    assert_close(model(ids, mask=mask)[mask], model(ids[mask][None])[0], **CLOSE)


def test_gradients_of_a_padded_batch_are_finite_and_do_not_reach_the_padding():
    model = random_model()
    mask = torch.arange(8) >= torch.tensor([[0], [5]])
    ids = torch.where(mask, random_ids(2, 8, vocab_size=49), 49)  # token 49 stands only under the padding
    model(ids, mask=mask)[mask].square().mean().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())
    assert (model.model.embed_tokens.weight.grad[49] == 0).all()


def test_with_a_document_mask_changing_one_document_leaves_the_other_bitwise_equal():
    model = random_model()
    ids, positions, mask = two_documents()
    changed = ids.clone()
    changed[:, :4] = (ids[:, :4] + 1) % 50
    assert torch.equal(model(ids, positions, mask)[:, 4:], model(changed, positions, mask)[:, 4:])
    assert not torch.allclose(model(ids, positions)[:, 4:], model(changed, positions)[:, 4:]), \
        "restarting positions alone must not be what isolates documents"


def test_documents_in_one_row_equal_each_alone():
    model = random_model()
    ids, positions, mask = two_documents()
    logits = model(ids, positions, mask)
    assert_close(logits[:, :4], model(ids[:, :4]), **CLOSE)
    assert_close(logits[:, 4:], model(ids[:, 4:]), **CLOSE)
    assert_close(model(ids, mask=mask), logits, rtol=0, atol=1e-4)  # without new positions: distances count


def test_more_tokens_than_max_seq_len_are_refused_with_and_without_a_cache():
    model = random_model()
    with pytest.raises(UserError, match="65 tokens exceed max_seq_len 64"):
        model(random_ids(1, 65))
    cache = KVCache(model.config, 1, 64)
    model(random_ids(1, 60), cache=cache)
    with pytest.raises(UserError, match="65 tokens exceed max_seq_len 64"):
        model(random_ids(1, 5), cache=cache)


# The whole: weights, sizes, precision


def test_tied_weights_are_one_tensor_counted_once_and_still_cost_the_heads_flops():
    tied, untied = Transformer(replace(TINY, tie_embeddings=True)), Transformer(TINY)
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    assert sum(p.numel() for p in untied.parameters()) - sum(p.numel() for p in tied.parameters()) == 50 * 32
    assert count_parameters(untied.config) - count_parameters(tied.config) == 50 * 32
    assert estimate_flops(tied.config, 16) == estimate_flops(untied.config, 16), "only the look-up is free"


def initial_loss(config):
    torch.manual_seed(0)
    ids = random_ids(4, 33, vocab_size=config.vocab_size)
    return F.cross_entropy(Transformer(config)(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten()).item()


def test_the_loss_starts_at_the_logarithm_of_the_vocabulary():
    assert abs(initial_loss(TINY) - math.log(50)) < 1e-6  # rounding: with a zero head all are equally likely


@pytest.mark.parametrize("dim", [32, 256, 1024])
def test_the_loss_of_a_tied_model_starts_close_to_it_at_any_width(dim):
    """A token's own logit is std C; with a fixed std of 0.02 the loss would be 41 nats at C = 2048."""
    config = ModelConfig(vocab_size=4096, dim=dim, n_layers=1, n_heads=4, ffn_dim=64, tie_embeddings=True)
    assert initial_loss(config) == pytest.approx(math.log(4096), rel=0.05)


def test_each_block_starts_as_the_identity_and_every_matrix_learns_within_three_steps():
    torch.manual_seed(0)
    model, ids = Transformer(TINY), random_ids(2, 8)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    assert torch.equal(model.model(ids), model.model.norm(model.model.embed_tokens(ids)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(3):  # the head moves first, then what writes to the stream, then what reads from it
        F.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    stuck = [name for name, p in model.named_parameters() if torch.equal(p, start[name])]
    assert stuck == []


def test_the_same_generator_draws_the_same_weights():
    models = [Transformer(TINY), Transformer(TINY)]
    for model in models:
        model.init_weights(seeded(5))
    assert all(torch.equal(a, b) for a, b in zip(*(model.parameters() for model in models)))


VARIANTS = [{}, dict(n_kv_heads=4), dict(n_kv_heads=1), dict(tie_embeddings=True), dict(qk_norm=True),
            dict(attention_bias=True), dict(head_dim=12),
            dict(head_dim=6, qk_norm=True, attention_bias=True, tie_embeddings=True, n_kv_heads=1)]


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


def test_under_bfloat16_autocast_norms_and_the_stream_stay_float32():
    model, ids, seen = random_model(qk_norm=True), random_ids(2, 8), {}
    names = {module: name for name, module in model.named_modules() if isinstance(module, RMSNorm)}
    for norm in names:
        norm.register_forward_hook(lambda norm, x, out: seen.update({names[norm]: (x[0].dtype, out.dtype)}))
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(ids)
    assert logits.dtype == torch.bfloat16  # matrix products are
    assert len(seen) == 2 * 4 + 1
    for name, (given, returned) in seen.items():
        assert returned == torch.float32, name
        assert given == (torch.bfloat16 if name.endswith(("q_norm", "k_norm")) else torch.float32), name
    error = (logits.float() - model(ids)).square().mean().sqrt() / model(ids).square().mean().sqrt()
    assert error < 0.02  # bfloat16 rounds at 2^-9 = 0.002; about ten roundings lie one behind another


@pytest.mark.parametrize("precision", ["autocast", "weights"])
def test_generation_works_in_bfloat16(precision):
    model = random_model() if precision == "autocast" else random_model().bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
        sample = generate(model, [[1, 2, 3], [4]], 5, generator=seeded(0))
    assert sample.ids.shape == (2, 5) and torch.isfinite(sample.logps).all()


# transformers


def transformers_twin(model):
    """The model of transformers with the same weights."""
    c = model.config
    config = (Qwen3Config if c.qk_norm else LlamaConfig)(
        vocab_size=c.vocab_size, hidden_size=c.dim, num_hidden_layers=c.n_layers, head_dim=c.head_dim,
        num_attention_heads=c.n_heads, num_key_value_heads=c.n_kv_heads, intermediate_size=c.ffn_dim,
        rms_norm_eps=c.norm_eps, max_position_embeddings=c.max_seq_len, tie_word_embeddings=c.tie_embeddings,
        attention_bias=c.attention_bias, rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta},
        bos_token_id=None, eos_token_id=None, pad_token_id=0)
    twin = (Qwen3ForCausalLM if c.qk_norm else LlamaForCausalLM)(config)
    twin.load_state_dict(model.state_dict())  # strict: the names are the same, all of them
    return twin.eval()


@pytest.mark.parametrize("changes", [*VARIANTS, dict(rope_theta=500.0), dict(norm_eps=0.1)], ids=str)
@torch.no_grad()
def test_logits_equal_those_of_transformers(changes):
    model = random_model(**changes)
    twin, ids = transformers_twin(model), random_ids(2, 20)
    assert_close(model(ids), twin(ids).logits, **CLOSE)
    mask = torch.arange(20) >= torch.tensor([[0], [6]])
    positions = (mask.long().cumsum(dim=1) - 1).clamp(min=0)  # as its own generate() counts them
    theirs = twin(ids, attention_mask=mask.long(), position_ids=positions).logits
    assert_close(model(ids, mask=mask)[mask], theirs[mask], **CLOSE)


@pytest.mark.parametrize("changes", [{}, dict(qk_norm=True, tie_embeddings=True)], ids=str)
def test_greedy_generation_equals_that_of_transformers(changes):
    model, ids = random_model(**changes), random_ids(3, 5)
    twin, mask = transformers_twin(model), torch.ones_like(ids)
    theirs = twin.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=20)
    assert torch.equal(generate(model, ids, 20, temperature=0).ids, theirs[:, 5:])


@pytest.mark.parametrize("temperature, top_k, top_p", [
    (1.0, None, None), (0.7, 5, None), (1.3, None, 0.8), (0.9, 12, 0.6), (1.0, 1, 0.1)])
def test_what_is_sampled_from_equals_transformers_warpers(temperature, top_k, top_p):
    logits = 3 * randn(20, 50)
    theirs = TemperatureLogitsWarper(temperature)(None, logits)
    theirs = TopKLogitsWarper(top_k)(None, theirs) if top_k else theirs
    theirs = TopPLogitsWarper(top_p)(None, theirs) if top_p else theirs
    assert_close(next_token_logps(logits, temperature, top_k, top_p), theirs.log_softmax(dim=-1))


# Generation


PROBS = [0.15, 0.5, 0.1, 0.25]


@pytest.mark.parametrize("temperature, top_k, top_p, expected", [
    (1.0, None, None, PROBS),
    (1.0, 2, None, [0, 2 / 3, 0, 1 / 3]),
    (1.0, 1, None, [0, 1, 0, 0]),
    (1.0, 9, 1.0, PROBS),                            # more than there are: all
    (1.0, None, 0.7, [0, 2 / 3, 0, 1 / 3]),          # 0.5 is not enough, 0.5 + 0.25 is
    (1.0, None, 0.8, [0.15 / 0.9, 0.5 / 0.9, 0, 0.25 / 0.9]),
    (1.0, None, 1e-9, [0, 1, 0, 0]),                 # the likeliest always stays
    (1.0, 2, 0.6, [0, 1, 0, 0]),                     # k goes first: of the two it leaves, one holds 2/3
    (0.5, None, None, [p ** 2 / 0.345 for p in PROBS]),  # p^(1/temperature): 0.345 is the sum of the squares
    (0, None, None, [0, 1, 0, 0]),
    (1e-42, None, None, [0, 1, 0, 0]),               # logits divided by it would be infinite
    (1e300, None, None, [0.25] * 4),
])
def test_temperature_top_k_and_top_p_by_hand(temperature, top_k, top_p, expected):
    logits = torch.tensor([PROBS]).log() + 7  # + 7: logits have no zero of their own
    logps = next_token_logps(logits, temperature, top_k, top_p)
    assert_close(logps.exp(), torch.tensor([expected], dtype=torch.float32))


def test_of_equal_logits_top_k_keeps_k():
    assert (next_token_logps(torch.zeros(1, 10), 1.0, 3, None) > -math.inf).sum() == 3


def naive_generate(model, prompt, number, temperature, top_k, top_p, generator):
    """One sequence, computed anew from its beginning for each token."""
    ids, logps = list(prompt), []
    for _ in range(number):
        logp = next_token_logps(model(torch.tensor([ids]))[:, -1], temperature, top_k, top_p)
        token = torch.multinomial(logp.exp(), 1, generator=generator).item()
        ids.append(token)
        logps.append(logp[0, token].item())
    return ids[len(prompt):], logps


@pytest.mark.parametrize("temperature, top_k, top_p", [(0, None, None), (1.0, None, None), (0.8, 10, 0.9)])
@torch.no_grad()
def test_generation_with_the_cache_equals_computing_everything_anew(temperature, top_k, top_p):
    model, prompt = random_model(), [3, 1, 4, 1, 5]
    ids, logps = naive_generate(model, prompt, 30, temperature, top_k, top_p, seeded(0))
    sample = generate(model, [prompt], 30, temperature, top_k, top_p, generator=seeded(0))
    assert sample.ids[0].tolist() == ids
    assert_close(sample.logps[0], torch.tensor(logps), **CLOSE)


def test_unequal_prompts_in_a_batch_equal_the_single_ones():
    model, prompts = random_model(), [[1, 2, 3, 4, 5, 6, 7], [8], [9, 10, 11]]
    together = generate(model, prompts, 12, temperature=0)
    for row, prompt in enumerate(prompts):
        for single in ([prompt], torch.tensor([prompt])):
            alone = generate(model, single, 12, temperature=0)
            assert torch.equal(together.ids[row], alone.ids[0]), f"prompt {row}"


@torch.no_grad()
def test_logps_are_the_models_own_at_temperature_one():
    """Those of response token t stand at position prompt_len - 1 + t."""
    model, ids = random_model(), random_ids(3, 6)
    sample = generate(model, ids, 10, generator=seeded(0))
    logps = model(torch.cat((ids, sample.ids), dim=1)).log_softmax(dim=-1)[:, 5:-1]
    assert_close(sample.logps, logps.gather(-1, sample.ids[..., None])[..., 0], **CLOSE)
    assert (generate(model, ids, 3, temperature=0).logps == 0).all(), "greedy draws from a certainty: ln 1"


def test_a_row_ends_at_its_stop_token_which_counts():
    model, ids = random_model(vocab_size=8), random_ids(16, 3, vocab_size=8)
    free = generate(model, ids, 20, generator=seeded(0))
    sample = generate(model, ids, 20, stop_ids=[2, 5], generator=seeded(0))
    for row in range(16):
        tokens = free.ids[row].tolist()
        length = next((t + 1 for t, token in enumerate(tokens) if token in (2, 5)), 20)
        width = sample.ids.size(1)
        assert sample.lengths[row] == length
        assert sample.ids[row].tolist() == (tokens[:length] + [tokens[length - 1]] * 20)[:width]
        assert torch.equal(sample.logps[row, :length], free.logps[row, :length])
        assert (sample.logps[row, length:] == 0).all(), "what follows the end was not drawn"
    assert sample.lengths.min() < sample.lengths.max(), "the rows of this test should end at different times"
    assert (free.lengths == 20).all()


def test_generation_ends_when_all_rows_have():
    model = random_model()
    sample = generate(model, [[1], [2]], 20, stop_ids=range(50))
    assert sample.ids.shape == sample.logps.shape == (2, 1) and sample.lengths.tolist() == [1, 1]


def test_tokens_are_drawn_as_often_as_their_probabilities_say():
    """Pearson's chi-square: its mean is its degrees of freedom, its variance twice that; 5 sigma is far off."""
    draws, model = 20_000, random_model(vocab_size=12)
    sample = generate(model, torch.full((draws, 1), 3), 1, temperature=1.5, top_k=9, generator=seeded(0))
    expected = draws * next_token_logps(model(torch.tensor([[3]]))[:, -1], 1.5, 9, None).exp()[0]
    counts = sample.ids[:, 0].bincount(minlength=12)
    kept = expected > 0
    assert kept.sum() == 9 and (counts[~kept] == 0).all(), "a token outside of top-k was drawn"
    chi_square = ((counts - expected).square() / expected)[kept].sum()
    assert chi_square < 8 + 5 * math.sqrt(2 * 8)


def test_the_same_seed_gives_the_same_sample_whatever_the_global_one():
    model = random_model()

    def sample(seed, global_seed):
        torch.manual_seed(global_seed)
        return generate(model, [[1, 2], [3]], 15, generator=seeded(seed)).ids.tolist()
    assert sample(7, 0) == sample(7, 1) != sample(8, 0)


def test_generation_takes_no_gradients_and_leaves_the_model_as_it_was():
    model = random_model().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    sample = generate(model, [[1, 2]], 3)
    assert not sample.logps.requires_grad and torch.is_grad_enabled() and model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_model_can_be_filled_to_its_last_position():
    assert generate(random_model(), [[1] * 60], 4, temperature=0).ids.shape == (1, 4)


@pytest.mark.parametrize("prompt, settings, message", [
    ([[1] * 60], dict(max_new_tokens=5), "60 prompt tokens and 5 new ones exceed max_seq_len 64"),
    ([[1], []], {}, "an empty prompt gives nothing to continue"),
    ([], {}, "an empty prompt gives nothing to continue"),
    (torch.zeros(1, 0, dtype=torch.long), {}, "an empty prompt gives nothing to continue"),
    ([[1]], dict(max_new_tokens=0), "max_new_tokens 0 is out of range; it must be at least 1"),
    ([[1]], dict(temperature=-1.0), r"temperature -1.0 is out of range; 0 is greedy"),
    ([[1]], dict(temperature=math.nan), "temperature nan is out of range"),
    ([[1]], dict(temperature=math.inf), "temperature inf is out of range"),
    ([[1]], dict(top_k=0), "top_k 0 is out of range; it must be at least 1"),
    ([[1]], dict(top_p=0.0), "top_p 0.0 is out of range; it must be above 0 and at most 1"),
    ([[1]], dict(top_p=1.5), "top_p 1.5 is out of range"),
    ([[1]], dict(top_p=math.nan), "top_p nan is out of range"),
])
def test_what_cannot_be_generated_is_refused_with_a_reason(prompt, settings, message):
    with pytest.raises(UserError, match=message):
        generate(random_model(), prompt, **{"max_new_tokens": 3, **settings})


# ModelConfig


def test_what_is_not_given_follows_from_the_rest():
    config = ModelConfig(dim=4096, n_heads=32)
    assert (config.n_kv_heads, config.head_dim, config.ffn_dim) == (32, 128, 10944)  # 4096 x 8/3 = 10922.7


@pytest.mark.parametrize("settings, message", [
    (dict(dim=100, n_heads=3), "dim 100 is not divisible by n_heads 3"),
    (dict(n_heads=6, dim=96, n_kv_heads=4), "n_heads 6 is not divisible by n_kv_heads 4"),
    (dict(n_heads=4, n_kv_heads=8), "n_heads 4 is not divisible by n_kv_heads 8"),
    (dict(dim=36, n_heads=4), "head width 9 is odd"),
    (dict(head_dim=7), "head width 7 is odd"),
    (dict(rope_scaling={"rope_type": "yarn"}), "rope_scaling .*yarn.* is not supported"),
    (dict(n_layers=0), "n_layers 0 is out of range; it must be at least 1"),
    (dict(n_heads=0), "n_heads 0 is out of range"),
    (dict(n_kv_heads=0), "n_kv_heads 0 is out of range"),
    (dict(dim=-64), "dim -64 is out of range"),
    (dict(vocab_size=0), "vocab_size 0 is out of range"),
    (dict(max_seq_len=0), "max_seq_len 0 is out of range"),
    (dict(head_dim=0), "head_dim 0 is out of range"),
    (dict(ffn_dim=0), "ffn_dim 0 is out of range"),
    (dict(rope_theta=0.0), "rope_theta 0.0 is out of range; it must be above 0"),
])
def test_a_model_that_cannot_be_is_refused_with_a_reason(settings, message):
    with pytest.raises(UserError, match=message) as error:
        ModelConfig(**settings)
    assert "\n" not in str(error.value)


# Learning


@pytest.mark.parametrize("changes", [{}, dict(tie_embeddings=True, qk_norm=True)], ids=str)
def test_a_tiny_model_learns_one_batch_by_heart(changes):
    """From ln 50 = 3.9 nats to below 0.1: the first token of each row tells which row it is."""
    torch.manual_seed(0)
    model = Transformer(replace(TINY, **changes))
    ids = random_ids(4, 17)
    ids[:, 0] = torch.arange(4)  # else two rows might begin alike
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(80):
        loss = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.1
    assert torch.equal(generate(model, ids[:, :1], 16, temperature=0).ids, ids[:, 1:]), "it cannot recite them"
