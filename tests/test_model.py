"""model.py: the architecture in the order of the lesson; against formulas, torch and transformers.

Where a test says "bitwise", a last bit that differs is information that leaked. Else float32 rounds after 24
bits (6e-8), sums of some dozen terms of size 1 through a few layers end near 1e-6, and 1e-5 leaves room for
another order of summation.
"""
import doctest
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

import model as model_file
from config import UserError
from model import (KVCache, ModelConfig, RMSNorm, Transformer, count_parameters, estimate_flops,
                   extend_embedding, generate)
from support import CLOSE, TINY, VARIANTS, random_ids, random_model, randn, seeded, two_documents


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
    (dict(rope_scaling={"rope_type": "yarn"}), "rope_scaling of yarn lacks factor"),
    (dict(n_layers=0), "n_layers 0 is out of range; it must be at least 1"),
    (dict(n_heads=0), "n_heads 0 is out of range"),
    (dict(n_kv_heads=0), "n_kv_heads 0 is out of range"),
    (dict(dim=-64), "dim -64 is out of range"),
    (dict(vocab_size=0), "vocab_size 0 is out of range"),
    (dict(max_seq_len=0), "max_seq_len 0 is out of range"),
    (dict(head_dim=0), "head_dim 0 is out of range"),
    (dict(ffn_dim=0), "ffn_dim 0 is out of range"),
    (dict(rope_theta=0.0), "rope_theta 0.0 is out of range; it must be 0.001 to 1e15"),
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
    assert torch.equal(generate(model, ids[:, :1], 16, temperature=0).ids, ids[:, 1:]), "it cannot recite"


# More tokens


@pytest.mark.parametrize("tied", [False, True])
def test_an_extended_model_keeps_what_it_knew_and_gives_new_tokens_little(tied):
    """A new logit is the mean of the V old ones, so n new tokens together have at most n / (V + n)."""
    model, ids, V, n = random_model(tie_embeddings=tied), random_ids(2, 9), 50, 3
    before = model(ids).log_softmax(-1)
    old = model.model.embed_tokens.weight.detach().clone()
    extend_embedding(model, V + n)
    logits = model(ids)
    assert logits.shape == (2, 9, V + n) and model.config.vocab_size == model.model.config.vocab_size == V + n
    assert_close(logits[..., V:], logits[..., :V].mean(-1, keepdim=True).expand(-1, -1, n), **CLOSE)
    after = logits.log_softmax(-1)
    assert after.exp()[..., V:].sum(-1).max() <= n / (V + n) + 1e-6
    lost = before - after[..., :V]
    assert lost.min() >= -1e-5 and lost.max() <= math.log(1 + n / V) + 1e-5  # 1e-5: float32
    embedding = model.model.embed_tokens.weight
    assert torch.equal(embedding[:V], old) and embedding.requires_grad
    assert_close(embedding[V:], old.mean(0).expand(n, -1))
    assert (model.lm_head.weight is embedding) == tied


def test_an_extended_model_is_the_model_of_its_config_and_one_with_rows_to_spare_stays_as_it_is():
    model = random_model()
    weight = model.lm_head.weight
    extend_embedding(model, 50)
    extend_embedding(model, 40)
    assert model.lm_head.weight is weight and TINY.vocab_size == 50
    extend_embedding(model, 53)
    same = Transformer(model.config)
    same.load_state_dict(model.state_dict())
    assert torch.equal(same.eval()(random_ids(1, 5)), model(random_ids(1, 5)))
    assert (model.lm_head.out_features, model.model.embed_tokens.num_embeddings) == (53, 53)
    model(torch.tensor([[52]])).sum().backward()
    assert model.model.embed_tokens.weight.grad[52].abs().sum() > 0
