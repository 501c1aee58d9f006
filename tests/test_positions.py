"""positions.py: rotary positions and their scaling, against formulas and transformers."""
import math
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from config import UserError
from model import KVCache, ModelConfig, Transformer, rope_angles, rotate
from positions import by_parts, check_scaling, dynamic, extended, linear, llama3, ntk, turns, yarn
from support import CLOSE, TINY, random_ids, random_model, randn


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
    """So nothing is permuted on the way in or out. A frequency's last bit is 0.003 at position 30,000."""
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


# ------------------------------------------------------------------------------------------------------------
# Further than it was trained


def frequencies(head_dim=64, theta=10000.0):
    return 1.0 / theta ** (torch.arange(0, head_dim, 2).float() / head_dim)


def test_linear_puts_position_m_where_m_over_s_was():
    """PI Eq. 4. 4 is a power of two, so no bit is rounded."""
    cos, sin = rope_angles(torch.arange(0, 512, 4), 64, 10000.0, check_scaling(LINEAR, 512))
    assert torch.equal(cos, rope_angles(torch.arange(128), 64, 10000.0)[0])
    assert torch.equal(sin, rope_angles(torch.arange(128), 64, 10000.0)[1])


def test_ntk_keeps_the_fastest_pair_and_interpolates_the_slowest():
    slowed = frequencies() / ntk(frequencies(), 4.0)
    assert slowed[0] == 1
    assert_close(slowed[-1], torch.tensor(4.0))
    assert (slowed.diff() > 0).all()


@pytest.mark.parametrize("head_dim", [2, 4, 64])
def test_ntk_is_plain_rope_with_a_larger_base(head_dim):
    """YaRN Eq. 15 and 16; with D = 2, where Eq. 16 divides by zero, the one frequency is 1 at any base."""
    config = extended(ModelConfig(dim=head_dim, n_heads=1, max_seq_len=128), "ntk", 4.0)
    assert config.rope_scaling is None and config.max_seq_len == 512
    if head_dim > 2:
        assert config.rope_theta == pytest.approx(10000 * 4 ** (head_dim / (head_dim - 2)))
    larger_base = frequencies(head_dim, config.rope_theta)
    assert_close(larger_base, ntk(frequencies(head_dim), 4.0), rtol=1e-6, atol=0)


def test_dynamic_is_plain_up_to_the_trained_length_bit_for_bit():
    for factor in (1.0, 3.3, 4.0):
        for T in (1, 50, 128):
            got = dynamic(frequencies(), factor, 128, torch.arange(T))
            assert torch.equal(got, frequencies()[None]), "a short text must not speed the pairs up"


def test_dynamic_grows_with_the_length_of_each_row_alone():
    """At twice the trained length, with factor 4: 1 + 4 (2 - 1) = 5. Other rows do not count."""
    positions = torch.stack((torch.arange(64, 128), torch.arange(192, 256)))
    got = dynamic(frequencies(), 4.0, 128, positions)
    assert got.shape == (2, 1, 32), "(B, 1, D/2): each row has its own"
    assert torch.equal(got[0, 0], frequencies())
    assert_close(got[1, 0], ntk(frequencies(), 5.0), rtol=1e-6, atol=0)


def test_llama3_and_yarn_keep_what_goes_round_often_and_interpolate_what_does_not_go_round():
    """L 128: 20 turns for the fastest pair (1 radian a token), none for the slowest."""
    plain = frequencies()
    assert turns(plain, 128)[0].item() == pytest.approx(128 / (2 * math.pi))
    for got, often in ((llama3(plain, 4.0, 128, 1.0, 4.0), 4), (yarn(plain, 10000.0, 4.0, 128, 16, 1), 16)):
        kept, slow = turns(plain, 128) > often, turns(plain, 128) < 0.75  # yarn's ramp ends at a whole d
        assert kept.any() and slow.any() and not (kept | slow).all(), "the example should show three parts"
        assert torch.equal(got[kept], plain[kept])
        assert_close(got[slow], linear(plain, 4.0)[slow], rtol=1e-6, atol=0)
        slowed = plain / got
        assert (slowed.diff() > -1e-6).all() and ((slowed > 1.01) & (slowed < 3.99)).any(), "no ramp between"


def test_llama3_is_yarns_by_parts_with_a_ramp_over_turns():
    """YaRN Eq. 17 to 20 with (alpha, beta) = (1, 4), in double precision."""
    theta_d = frequencies().double()
    gamma = ((128 * theta_d / (2 * math.pi) - 1) / (4 - 1)).clamp(0, 1)
    expected = (1 - gamma) * theta_d / 8 + gamma * theta_d
    assert_close(llama3(frequencies(), 8.0, 128, 1.0, 4.0).double(), expected, rtol=1e-5, atol=0)
    assert torch.equal(by_parts(frequencies(), 8.0, torch.ones(32)), frequencies())


def test_yarns_temperature_multiplies_every_score_by_one_over_t():
    """YaRN Eq. 21 and 22: a score q·k grows by (0.1 ln s + 1)^2, at any distance."""
    yarn_scaling = check_scaling({"rope_type": "yarn", "factor": 4.0}, 128)
    q, k, positions = randn(1, 1, 8, 64, seed=0), randn(1, 1, 8, 64, seed=1), torch.arange(8)
    scores = [rotate(q, *rope) @ rotate(k, *rope).transpose(-1, -2) for rope in (
        rope_angles(positions, 64, 10000.0, yarn_scaling),
        rope_angles(positions, 64, 10000.0, {**yarn_scaling, "attention_factor": 1.0}))]
    assert_close(scores[0], scores[1] * (0.1 * math.log(4) + 1) ** 2, rtol=1e-4, atol=1e-4)  # of 8 or so


def test_a_factor_of_1_changes_nothing():
    for rule in ({"rope_type": "linear"}, {"rope_type": "dynamic"}, {"rope_type": "yarn"}, LLAMA3):
        scaling = check_scaling({**rule, "factor": 1.0}, 64)
        got, plain = rope_angles(torch.arange(64), 16, 1e4, scaling), rope_angles(torch.arange(64), 16, 1e4)
        assert_close(got, plain, rtol=0, atol=1e-5)  # one rounding of a frequency, at 64 radians


LINEAR = {"rope_type": "linear", "factor": 4.0}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
SCALINGS = [
    LINEAR, {"rope_type": "linear", "factor": 3.3},
    {"rope_type": "dynamic", "factor": 4.0}, {"rope_type": "dynamic", "factor": 1.7},
    LLAMA3, {**LLAMA3, "factor": 3.3, "low_freq_factor": 0.5, "high_freq_factor": 2.5},
    {"rope_type": "yarn", "factor": 4.0}, {"rope_type": "yarn", "factor": 3.3, "truncate": False},
    {"rope_type": "yarn", "factor": 4.0, "beta_fast": 8.0, "beta_slow": 2},
    {"rope_type": "yarn", "factor": 4.0, "beta_fast": 4.0, "beta_slow": 3.9, "truncate": False},
    {"rope_type": "yarn", "factor": 4.0, "attention_factor": 1.3},
    {"rope_type": "yarn", "factor": 40.0, "mscale": 1.0, "mscale_all_dim": 0.7},
    {"rope_type": "yarn", "factor": 40.0, "mscale": 1.0},
    {"rope_type": "yarn", "factor": 4.0, "mscale": None, "beta_fast": None},
]


def their_config(scaling, trained, max_seq_len, head_dim=16, **changes):
    """LlamaConfig with this scaling; for `dynamic` max_position_embeddings is the trained length."""
    rope = {**scaling, "rope_theta": 10000.0}
    if scaling["rope_type"] in ("yarn", "llama3"):
        rope["original_max_position_embeddings"] = trained
    return LlamaConfig(rope_parameters=rope, head_dim=head_dim, num_attention_heads=4, num_key_value_heads=2,
                       max_position_embeddings=trained if scaling["rope_type"] == "dynamic" else max_seq_len,
                       attn_implementation="eager", **changes)


@pytest.mark.parametrize("head_dim, trained", [(16, 64), (64, 128), (128, 2048)])
@pytest.mark.parametrize("scaling", SCALINGS, ids=lambda scaling: "-".join(map(str, scaling.values())))
def test_scaled_angles_equal_transformers(scaling, head_dim, trained):
    """Linear's and Llama 3's to the bit; the others' frequencies to the last bit or two, 2^-22 of each, which
    shows in an angle of p radians as p 2^-22.
    """
    positions = torch.tensor([[0, 1, 7, trained - 1, trained, 2 * trained + 5, 4 * trained - 1]])
    with torch.no_grad():
        theirs = LlamaRotaryEmbedding(their_config(scaling, trained, 4 * trained, head_dim))
        their_cos, their_sin = theirs(randn(1), positions)
    completed = check_scaling({**scaling, "original_max_position_embeddings": trained}, 4 * trained)
    cos, sin = rope_angles(positions, head_dim, 10000.0, completed)
    assert cos.dtype == sin.dtype == torch.float32
    exact = scaling["rope_type"] in ("linear", "llama3")
    bound = (0 if exact else 1) * (positions[..., None] + 1) * 2 ** -22
    assert ((cos - their_cos[..., :head_dim // 2]).abs() <= bound).all()
    assert ((sin - their_sin[..., :head_dim // 2]).abs() <= bound).all()


# the ramp cut off at its upper end; of no width; of a negative one; as large models have it
@pytest.mark.parametrize("theta, trained, head_dim", [(5.0, 210, 16), (1e4, 6, 16), (1e4, 2, 128),
                                                      (5e5, 8192, 128)])
def test_yarns_ramp_ends_as_in_transformers(theta, trained, head_dim):
    config = their_config({"rope_type": "yarn", "factor": 4.0}, trained, 4 * trained, head_dim)
    config.rope_parameters["rope_theta"] = theta
    theirs = LlamaRotaryEmbedding(config).inv_freq
    assert_close(yarn(frequencies(head_dim, theta), theta, 4.0, trained), theirs, rtol=2 ** -22, atol=0)


@pytest.mark.parametrize("scaling", SCALINGS, ids=lambda scaling: "-".join(map(str, scaling.values())))
def test_logits_beyond_the_trained_length_equal_transformers(scaling):
    """250 tokens, by a model trained at 64."""
    ours = random_model(max_seq_len=256, rope_scaling={**scaling, "original_max_position_embeddings": 64})
    theirs = LlamaForCausalLM(their_config(
        scaling, 64, 256, head_dim=TINY.dim // TINY.n_heads, vocab_size=TINY.vocab_size, hidden_size=TINY.dim,
        num_hidden_layers=TINY.n_layers, intermediate_size=TINY.ffn_dim)).eval()
    theirs.load_state_dict(ours.state_dict())
    ids = random_ids(1, 250)
    with torch.no_grad():
        assert_close(ours(ids), theirs(ids).logits, rtol=0, atol=1e-4)  # angles to 250 x 2^-22
        plain = random_model(max_seq_len=256)(ids)
    assert (ours(ids)[:, 64:] - plain[:, 64:]).abs().max() > 0.01, "the scaling did not reach the model"


def test_the_trained_length_is_max_seq_len_where_the_config_is_silent():
    """As in transformers; and None means that a key is absent."""
    config = replace(TINY, max_seq_len=64, rope_scaling={**LLAMA3, "original_max_position_embeddings": None})
    theirs = LlamaConfig(rope_parameters={**LLAMA3, "rope_theta": 1e4}, max_position_embeddings=64)
    assert config.rope_scaling == {**LLAMA3, "original_max_position_embeddings": 64}
    assert theirs.rope_parameters["original_max_position_embeddings"] == 64
    longer = replace(config, max_seq_len=512)
    assert longer.rope_scaling["original_max_position_embeddings"] == 64, "it was trained no longer for that"


@pytest.mark.parametrize("rule", ["linear", "ntk", "yarn", "llama3"])
def test_a_cache_gives_what_one_pass_gives(rule):
    model, ids = Transformer(extended(TINY, rule, 4.0)), random_ids(1, 200)
    model.load_state_dict(random_model().state_dict())
    cache = KVCache(model.config, 1, 200)
    with torch.no_grad():
        parts = [model(chunk, cache=cache) for chunk in ids.split([100, 1, 99], dim=1)]
        assert_close(torch.cat(parts, dim=1), model(ids), **CLOSE)


def test_dynamic_keeps_the_angles_of_cached_keys():
    """What is read in a second pass turns by the longer length; the keys of the first keep theirs."""
    model, ids = Transformer(extended(TINY, "dynamic", 4.0)), random_ids(1, 200)
    model.load_state_dict(random_model().state_dict())
    cache = KVCache(model.config, 1, 200)
    with torch.no_grad():
        first = model(ids[:, :100], cache=cache)
        keys = cache.layers[0].k[:, :, :100].clone()
        model(ids[:, 100:], cache=cache)
        assert torch.equal(cache.layers[0].k[:, :, :100], keys)
        assert_close(first, model(ids[:, :100]), **CLOSE)
        assert (first - model(ids)[:, :100]).abs().max() > 1e-3, "one pass of 200 has other angles"


def test_extended_says_what_transformers_would_be_told():
    assert extended(TINY, "linear", 4).rope_scaling == {
        "rope_type": "linear", "factor": 4.0, "original_max_position_embeddings": 64}
    llama = extended(TINY, "llama3", 2.5)
    assert llama.rope_scaling["low_freq_factor"] == 1 and llama.rope_scaling["high_freq_factor"] == 4
    assert llama.max_seq_len == 160 and TINY.max_seq_len == 64
    with pytest.raises(UserError, match="extended already, by llama3 with factor 2.5; extend the one"):
        extended(llama, "yarn", 2.0)
    with pytest.raises(UserError, match="factor nan; it must be"):
        extended(TINY, "yarn", math.nan)


@pytest.mark.parametrize("scaling, message", [
    ({}, "names no rule"), ({"factor": 4.0}, "names no rule"), ("yarn", "names no rule"),
    ({"rope_type": ["yarn"]}, "names no rule"),
    ({"rope_type": "longrope", "factor": 4.0}, "type 'longrope' is not known; known are linear, dynamic, "),
    ({"rope_type": "ntk", "factor": 4.0}, "type 'ntk' is not known"),
    ({"rope_type": "linear"}, "linear lacks factor"), ({**LINEAR, "factor": None}, "linear lacks factor"),
    ({"rope_type": "llama3", "factor": 8.0}, "llama3 lacks low_freq_factor, high_freq_factor"),
    ({**LINEAR, "beta_fast": 32, "x": 1}, "linear has beta_fast, x, which it does not know; it knows factor"),
    ({**LINEAR, "factor": 0.5}, "linear has factor 0.5; it must be a number of 1 to 1e.09"),
    ({**LINEAR, "factor": math.nan}, "factor nan"), ({**LINEAR, "factor": math.inf}, "factor inf"),
    ({**LINEAR, "factor": "4"}, "factor '4'"), ({**LINEAR, "factor": True}, "factor True"),
    ({**LINEAR, "original_max_position_embeddings": 64.0}, "must be a whole number of 1 to 1e.09"),
    ({**LINEAR, "original_max_position_embeddings": 0}, "must be a whole number of 1 to 1e.09"),
    ({**LLAMA3, "low_freq_factor": 4.0}, "low_freq_factor 4.0, which must be below high_freq_factor, 4.0"),
    ({**LLAMA3, "low_freq_factor": 0}, "low_freq_factor 0; it must be a number of 1e-06 to 1e.09"),
    ({"rope_type": "yarn", "factor": 4.0, "beta_fast": 1}, "beta_slow 1, which must be below beta_fast, 1"),
    ({"rope_type": "yarn", "factor": 4.0, "beta_slow": 33.5}, "beta_slow 33.5, which must be below"),
    ({"rope_type": "yarn", "factor": 4.0, "truncate": 1}, "truncate 1; it must be true or false"),
    ({"rope_type": "yarn", "factor": 4.0, "attention_factor": 0}, "attention_factor 0; it must be"),
    ({"rope_type": "yarn", "factor": 4.0, "mscale": -1}, "mscale -1; it must be a number of 0 to")
])
def test_bad_scalings_are_told_in_one_line(scaling, message):
    with pytest.raises(UserError, match="rope_scaling .*" + message) as error:
        replace(TINY, rope_scaling=scaling)
    assert "\n" not in str(error.value)


def test_yarn_needs_a_base_whose_logarithm_it_can_divide_by():
    with pytest.raises(UserError, match="needs a rope_theta above 1, not 1.0"):
        replace(TINY, rope_theta=1.0, rope_scaling={"rope_type": "yarn", "factor": 4.0})


def test_a_text_beyond_the_context_is_refused_with_the_remedy():
    with pytest.raises(UserError, match="65 tokens exceed max_seq_len 64 .* extend .*--rope_scaling"):
        random_model()(random_ids(1, 65))
