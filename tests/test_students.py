"""students.py: how a student begins, by each of the three ways."""
import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

import students
from checkpoint import load_model, save_model
from config import UserError
from model import ModelConfig, Transformer
from positions import rope_angles
from quantize import quantize_model
from students import check_smaller, describe_student, layers_student, random_student, width_student
from support import CLOSE, TINY, VARIANTS, random_ids, random_model, seeded

ALL = [*VARIANTS, dict(attention_bias=True, output_bias=False, sliding_window=5)]
IDS = random_ids(3, 12, seed=4)
WAYS = {"random": lambda teacher: random_student(teacher.config, 0, dim=16, n_layers=1, n_heads=2),
        "layers": lambda teacher: layers_student(teacher, 1),
        "width": lambda teacher: width_student(teacher, IDS, 20, 2, 30),
        "both": lambda teacher: width_student(teacher, IDS, 20, 2, 30, n_layers=1)}


@torch.no_grad()
def logits(model, ids=IDS):
    return model(ids)


# ---- random weights ----------------------------------------------------------------------------------------


def test_a_random_student_has_its_own_sizes_and_in_all_else_the_teachers_settings():
    teacher = replace(TINY, head_dim=12, qk_norm=True, attention_bias=True, norm_eps=1e-4, rope_theta=500.0,
                      sliding_window=7, rope_scaling={"rope_type": "linear", "factor": 4.0})
    student = random_student(teacher, 0, dim=40, n_layers=3, n_heads=4, n_kv_heads=2, ffn_dim=24)
    assert student.config == replace(teacher, dim=40, n_layers=3, n_heads=4, n_kv_heads=2, ffn_dim=24,
                                     head_dim=10, tie_embeddings=True), "a head is dim / n_heads wide"
    usual = random_student(teacher, 0, dim=40, n_layers=3, n_heads=4, tie_embeddings=False).config
    assert (usual.n_kv_heads, usual.ffn_dim, usual.tie_embeddings) == (4, 128, False), "as in a ModelConfig"


def test_a_random_student_is_drawn_from_its_seed_as_model_py_does():
    first, again, other = (random_student(TINY, seed, dim=16, n_layers=1, n_heads=2) for seed in (5, 5, 6))
    expected = Transformer(first.config)
    expected.init_weights(seeded(5))
    for name, tensor in expected.state_dict().items():
        assert torch.equal(first.state_dict()[name], tensor) and torch.equal(again.state_dict()[name], tensor)
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)


# ---- some of the blocks ------------------------------------------------------------------------------------


def test_6_of_12_blocks_are_those_of_distilbert():
    student = layers_student(random_model(n_layers=12), 6)
    assert student.began == "blocks [0, 2, 4, 7, 9, 11] of the teacher's 12"  # Sanh et al. 2019


def test_the_first_and_the_last_block_stay_and_none_comes_twice():
    teacher = Transformer(ModelConfig(vocab_size=4, dim=2, n_layers=13, n_heads=1, ffn_dim=1))
    for number, layer in enumerate(teacher.model.layers):
        layer.input_layernorm.weight.data.fill_(number)
    for n in range(2, 14):
        blocks = [int(x.input_layernorm.weight[0]) for x in layers_student(teacher, n).model.layers]
        steps = [b - a for a, b in zip(blocks, blocks[1:])]
        assert len(blocks) == n and blocks[0] == 0 and blocks[-1] == 12 and min(steps) >= 1
        assert max(abs(step - 12 / (n - 1)) for step in steps) <= 1, "each end is rounded by half a block"
    assert int(layers_student(teacher, 1).model.layers[0].input_layernorm.weight[0]) == 0


@pytest.mark.parametrize("changes", ALL, ids=str)
def test_a_student_of_layers_is_the_teacher_with_the_others_taken_out(changes):
    teacher = random_model(**{**changes, "n_layers": 4})
    assert torch.equal(logits(layers_student(teacher, 4)), logits(teacher)), "all blocks: bit for bit"
    by_hand = copy.deepcopy(teacher)
    by_hand.model.layers = nn.ModuleList(teacher.model.layers[i] for i in (0, 2, 3))
    student = layers_student(teacher, 3)
    assert torch.equal(logits(student), logits(by_hand)) and student.config.n_layers == 3


# ---- narrower blocks: what counts --------------------------------------------------------------------------


def by_loops(values):
    """values (B, T, n): of each n the mean over T, and the root of the sum of its squares over B."""
    return [sum((sum(text[:, n].tolist()) / len(text)) ** 2 for text in values) ** 0.5
            for n in range(values.size(-1))]


@torch.no_grad()
def test_importance_is_the_mean_over_tokens_and_the_l2_norm_over_texts():
    """Against the model computed part by part, without hooks."""
    model = random_model(qk_norm=True, attention_bias=True)
    channels, groups, neurons = students.importance(model, IDS)
    cos, sin = rope_angles(torch.arange(12)[None], 8, model.config.rope_theta, None)
    x, norms = model.model.embed_tokens(IDS), []
    for i, layer in enumerate(model.model.layers):
        norms.append(layer.input_layernorm(x))
        bare = copy.deepcopy(layer.self_attn)
        bare.o_proj = nn.Identity()
        heads = bare(norms[-1], (cos[:, None], sin[:, None]), None, None)  # (B, T, 4 heads of 8)
        two = torch.stack([heads[..., :16].norm(dim=-1), heads[..., 16:].norm(dim=-1)], dim=-1)
        assert_close(groups[i].tolist(), by_loops(two), **CLOSE)  # 2 key/value heads serve 2 heads each
        x = x + layer.self_attn.o_proj(heads)
        norms.append(layer.post_attention_layernorm(x))
        hidden = F.silu(layer.mlp.gate_proj(norms[-1])) * layer.mlp.up_proj(norms[-1])
        assert_close(neurons[i].tolist(), by_loops(hidden.abs()), **CLOSE)
        x = x + layer.mlp.down_proj(hidden)
    norms.append(model.model.norm(x))
    total = [sum(parts) for parts in zip(*(by_loops(y.abs()) for y in norms))]
    assert_close(channels.tolist(), total, **CLOSE)


def test_the_largest_are_kept_in_ascending_order_and_of_equal_ones_the_first():
    assert students.largest(torch.tensor([1.0, 5.0, 2.0, 9.0, 2.0]), 3).tolist() == [1, 2, 3]
    assert students.largest(torch.ones(100), 40).tolist() == list(range(40))


# ---- narrower blocks: what is cut --------------------------------------------------------------------------


@pytest.mark.parametrize("changes", ALL, ids=str)
def test_a_student_as_wide_as_the_teacher_is_the_teacher_bit_for_bit(changes):
    teacher = random_model(**changes)
    for n_layers in (None, 2):
        student = width_student(teacher, IDS, 32, teacher.config.n_heads, 48, n_layers)
        assert student.config == teacher.config and torch.equal(logits(student), logits(teacher))


def alive(size, dead):
    return torch.tensor([i for i in range(size) if i not in dead])


DEAD_CHANNELS = (0, 3, 4, 17, 30, 31)
DEAD_NEURONS = ((1, 2, 40), (0, 46, 47))  # another choice in each block
DEAD_GROUPS = ((1,), (0,))


@torch.no_grad()
def with_dead_parts(channels, **changes):
    """A model in which the parts above are zero, whatever it reads; channels of the stream if asked for."""
    # norm_eps: it stands beside another mean square in the student; so small it is below float32
    model, dead = random_model(norm_eps=1e-12, **changes), list(DEAD_CHANNELS)
    for layer, neurons, groups in zip(model.model.layers, DEAD_NEURONS, DEAD_GROUPS):
        layer.mlp.up_proj.weight[list(neurons)] = 0
        for tensor in layer.self_attn.v_proj.parameters():
            tensor.view(model.config.n_kv_heads, model.config.head_dim, -1)[list(groups)] = 0
        if channels:
            layer.mlp.down_proj.weight[dead] = 0
            for tensor in layer.self_attn.o_proj.parameters():  # weight (C, H D), bias (C)
                tensor[dead] = 0
    if channels:
        model.model.embed_tokens.weight[:, dead] = 0
    return model


DYING = [dict(n_kv_heads=2), dict(n_kv_heads=4), dict(tie_embeddings=True), dict(qk_norm=True),
         dict(attention_bias=True), dict(attention_bias=True, output_bias=False),
         dict(head_dim=6, qk_norm=True, attention_bias=True, tie_embeddings=True)]


@pytest.mark.parametrize("channels", [False, True])
@pytest.mark.parametrize("changes", DYING, ids=str)
def test_without_its_dead_parts_a_teacher_says_the_same(changes, channels):
    teacher = with_dead_parts(channels, **changes)
    kv_heads, dim = teacher.config.n_kv_heads, 32 - len(DEAD_CHANNELS) * channels
    student = width_student(teacher, IDS, dim, 4 * (kv_heads - 1) // kv_heads, 45)
    assert student.config == replace(teacher.config, dim=dim, n_heads=4 * (kv_heads - 1) // kv_heads,
                                     n_kv_heads=kv_heads - 1, ffn_dim=45), "head_dim is the teacher's"
    # float32 rounds at 1e-7 of logits of size ~10; a norm that is not rescaled is 10 % off
    assert_close(logits(student, random_ids(2, 20)), logits(teacher, random_ids(2, 20)), rtol=1e-4, atol=1e-4)
    assert (student.lm_head.weight is student.model.embed_tokens.weight) == teacher.config.tie_embeddings


def test_exactly_the_dead_parts_go_and_the_others_stay_in_their_order():
    teacher = with_dead_parts(True, attention_bias=True, qk_norm=True)
    student = width_student(teacher, IDS, 26, 2, 45)
    kept = alive(32, DEAD_CHANNELS)
    assert torch.equal(student.model.embed_tokens.weight, teacher.model.embed_tokens.weight[:, kept])
    assert torch.equal(student.lm_head.weight, teacher.lm_head.weight[:, kept])
    scale = (32 / 26) ** 0.5
    assert torch.equal(student.model.norm.weight, teacher.model.norm.weight[kept] * scale)
    layers = zip(teacher.model.layers, student.model.layers, DEAD_NEURONS, DEAD_GROUPS)
    for old, new, neurons, (group,) in layers:
        queries, keys = torch.arange(16) + 16 * (1 - group), torch.arange(8) + 8 * (1 - group)
        for name, rows in (("q_proj", queries), ("k_proj", keys), ("v_proj", keys)):
            theirs, ours = getattr(old.self_attn, name), getattr(new.self_attn, name)
            assert torch.equal(ours.weight, theirs.weight[rows][:, kept]), name
            assert torch.equal(ours.bias, theirs.bias[rows]), name
        assert torch.equal(new.self_attn.o_proj.weight, old.self_attn.o_proj.weight[kept][:, queries])
        assert torch.equal(new.self_attn.o_proj.bias, old.self_attn.o_proj.bias[kept])
        assert torch.equal(new.self_attn.q_norm.weight, old.self_attn.q_norm.weight), "not over the stream"
        assert torch.equal(new.mlp.down_proj.weight, old.mlp.down_proj.weight[kept][:, alive(48, neurons)])
        assert torch.equal(new.mlp.gate_proj.weight, old.mlp.gate_proj.weight[alive(48, neurons)][:, kept])
        for name in ("input_layernorm", "post_attention_layernorm"):
            assert torch.equal(getattr(new, name).weight, getattr(old, name).weight[kept] * scale), name


def test_blocks_are_left_out_before_what_remains_is_measured():
    teacher = random_model(n_layers=4, tie_embeddings=True)
    student = width_student(teacher, IDS, 20, 2, 30, n_layers=2)
    in_turn = width_student(layers_student(teacher, 2), IDS, 20, 2, 30)
    assert student.config == in_turn.config and torch.equal(logits(student), logits(in_turn))


def test_nothing_is_kept_for_a_backward_pass_while_the_teacher_is_measured():
    channels, groups, neurons = students.importance(random_model(), IDS)
    assert not any(scores.requires_grad for scores in (channels, *groups, *neurons))


# ---- all of them -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("tied", [False, True])
def test_a_student_is_new_and_the_teacher_and_the_global_generator_stay_as_they_were(way, tied):
    teacher = random_model(tie_embeddings=tied).train().requires_grad_(False)
    before, state = copy.deepcopy(teacher.state_dict()), torch.get_rng_state()
    student = WAYS[way](teacher)
    assert torch.equal(torch.get_rng_state(), state), "it draws from a generator of its own"
    assert not student.training and teacher.training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in teacher.modules())
    student(IDS).logsumexp(-1).sum().backward()
    for p in student.parameters():
        assert p.dtype == torch.float32 and p.grad is not None, "a frozen teacher's student can learn"
        p.data.fill_(7.0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())
    if student.config.tie_embeddings:
        assert student.lm_head.weight is student.model.embed_tokens.weight


@pytest.mark.parametrize("way", ["layers", "width", "both"])
def test_a_student_of_a_bfloat16_teacher_is_float32_with_its_numbers(way):
    teacher = random_model().bfloat16()
    student, plain = WAYS[way](teacher), WAYS[way](copy.deepcopy(teacher).float())
    assert {p.dtype for p in student.parameters()} == {torch.float32}
    if way != "width":  # there the activations, rounded to 8 bits, may rank two that are close otherwise
        assert torch.equal(logits(student), logits(plain))


def test_hooks_are_gone_after_an_error_too():
    teacher = random_model()
    with pytest.raises(IndexError):
        width_student(teacher, torch.full((1, 4), 99), 20, 2, 30)  # no such token
    teacher.model.layers[1].mlp.down_proj = nn.Linear(47, 32)  # 48 come: the pass ends in its middle
    with pytest.raises(RuntimeError, match="shapes"):
        students.importance(teacher, IDS)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in teacher.modules())


@pytest.mark.parametrize("begin, message", [
    (lambda t: layers_student(t, 0), "n_layers 0 is out of range; it must be 1 to 2"),
    (lambda t: layers_student(t, 3), "n_layers 3 is out of range; it must be 1 to 2"),
    (lambda t: width_student(t, IDS, 33, 4, 48), "dim 33 is out of range; it must be 1 to 32"),
    (lambda t: width_student(t, IDS, 32, 6, 48), "n_heads 6 is out of range; it must be 1 to 4"),
    (lambda t: width_student(t, IDS, 32, 4, 49), "ffn_dim 49 is out of range; it must be 1 to 48"),
    (lambda t: width_student(t, IDS, 32, 0, 48), "n_heads 0 is out of range"),
    (lambda t: width_student(t, IDS, 32, 3, 48), "n_heads 3 is not a multiple of 2: .* key/value head"),
    (lambda t: width_student(t, IDS, 32, 4, 48, n_layers=3), "n_layers 3 is out of range"),
    (lambda t: random_student(t.config, 0, dim=30, n_layers=1, n_heads=4), "dim 30 is not divisible"),
    (lambda t: layers_student(quantize_model(t), 1), "quantised or has adapters; .* load it unquantised"),
    (lambda t: width_student(quantize_model(t), IDS, 32, 4, 48), "quantised or has adapters")])
def test_sizes_that_do_not_fit_are_refused_in_one_line(begin, message):
    with pytest.raises(UserError, match=message) as error:
        begin(random_model())
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("family, dim, changes", [
    ("Llama", 24, {}), ("Llama", 24, dict(tie_embeddings=True, attention_bias=True)), ("Mistral", 25, {}),
    ("Qwen2", 25, dict(attention_bias=True, output_bias=False)), ("Qwen3", 25, dict(qk_norm=True))])
def test_a_pruned_student_opens_in_transformers_with_heads_as_wide_as_the_teachers(tmp_path, family, dim,
                                                                                   changes):
    from transformers import AutoModelForCausalLM
    student = width_student(random_model(**changes), IDS, dim, 2, 30)
    save_model(student, None, tmp_path)
    theirs, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert type(theirs).__name__ == family + "ForCausalLM" and theirs.config.head_dim == 8 != dim // 2
    # float32 rounds at 1e-7 of logits of size ~10, and sums are taken in another order
    assert (theirs.eval()(IDS).logits - logits(student)).abs().max() < 1e-4
    again, _ = load_model(tmp_path)
    assert again.config == student.config and torch.equal(logits(again), logits(student))


# ---- in words ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way, words", [
    ("random", "random weights of seed 0, dim 16, n_layers 1"), ("layers", "blocks [0] of the teacher's 2"),
    ("width", "20 of 32 channels, 2 of 4 heads, 30 of 48 neurons"),
    ("both", "blocks [0] of the teacher's 2; 20 of 32 channels, 2 of 4 heads, 30 of 48 neurons")])
def test_a_line_tells_how_a_student_began_and_its_share_of_the_parameters(way, words):
    teacher = random_model(tie_embeddings=True)
    student = WAYS[way](teacher)
    own, whole = (sum(p.numel() for p in model.parameters()) for model in (student, teacher))
    expected = f"student: {words}; {own:,} parameters, {round(100 * own / whole)}% of the teacher's {whole:,}"
    assert describe_student(student, teacher) == describe_student(student, teacher.config) == expected


def test_a_student_out_of_a_folder_is_described_by_its_sizes(tmp_path):
    save_model(random_model(n_layers=1), None, tmp_path)
    assert describe_student(load_model(tmp_path)[0], TINY).startswith("student: dim 32, n_layers 1; ")


def test_a_student_larger_than_its_teacher_is_warned_of():
    teacher = random_model()
    larger = random_student(TINY, 0, dim=64, n_layers=2, n_heads=4)
    own, whole = (sum(p.numel() for p in model.parameters()) for model in (larger, teacher))
    for student in (larger, larger.config):
        assert f"{own:,} parameters, more than the {whole:,}" in check_smaller(student, teacher)
    assert check_smaller(teacher, teacher.config) is None and check_smaller(teacher, larger) is None
