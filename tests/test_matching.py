"""matching.py: attention beside the plain reference; hidden states through what is no part of the model."""
import functools
import json
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import distill
import model as model_file
from attention import Mask, attention
from bpe import Tokenizer
from checkpoint import load_model, save_model
from config import UserError
from divergence import FLOOR, Divergence
from matching import add_projection, attention_match, hidden_match, watched
from parallel import Env
from support import VARIANTS, randn, random_ids, random_model, write_shards
from tensor_files import read_tensors

CPU = Env(torch.device("cpu"))
TOKENIZER = Tokenizer([(b"t", b"h"), (b"th", b"e")], ["<|endoftext|>"])  # 259 ids


def attention_of(model, ids, mask=None):
    with watched(model, mask) as found:
        model.model(ids, mask=mask)
    [logps] = found
    return logps


# ---- the attention that is recorded ------------------------------------------------------------------------


def plain_attention(monkeypatch, model, ids, mask, sees):
    """Weights of the last block (B, H, T, T) by model.attention, of values that are the identity matrix."""
    given, attend = [], model_file.attend
    with monkeypatch.context() as patched:
        patched.setattr(model_file, "attend", lambda q, k, *rest: given.append((q, k)) or attend(q, k, *rest))
        model.model(ids, mask=mask)
    q, k = given[-1]
    values = torch.eye(ids.size(1)).expand(*k.shape[:2], -1, -1)
    return attention(q, k, values, sees)


DOCUMENTS = torch.tensor([[1] * 4 + [2] * 5 + [0] * 3, [1] * 12])


@pytest.mark.parametrize("variant", [*VARIANTS, dict(sliding_window=5)], ids=str)
@pytest.mark.parametrize("documents", [None, DOCUMENTS], ids=["text", "documents"])
def test_what_is_recorded_are_the_weights_of_the_plain_reference(monkeypatch, variant, documents):
    model, ids, places = random_model(**variant), random_ids(2, 12), torch.arange(12)
    sees = (places <= places[:, None]).expand(2, 1, 12, 12)
    if "sliding_window" in variant:
        sees = sees & (places > places[:, None] - 5)
    if documents is not None:
        sees = sees & (documents[:, None, :, None] == documents[:, None, None, :])
    mask = None if documents is None else Mask(documents=documents)
    logps = attention_of(model, ids, mask)
    expected = plain_attention(monkeypatch, model, ids, mask, sees)
    assert logps.shape == (2, model.config.n_heads, 12, 12) and logps.dtype == torch.float32
    torch.testing.assert_close(logps.exp(), expected, rtol=1e-5, atol=1e-6)
    assert (logps[~sees.expand_as(logps)] == FLOOR).all(), "it sees what comes later, or another document"
    assert (logps[sees.expand_as(logps)] > FLOOR).all()
    torch.testing.assert_close(logps.exp().sum(-1), torch.ones(2, model.config.n_heads, 12))


def test_watching_changes_nothing_and_leaves_no_hook_not_even_after_an_error():
    model, ids = random_model(), random_ids(2, 9)
    expected, block = model(ids), model.model.layers[-1].self_attn
    with watched(model, None) as found:
        assert torch.equal(model(ids), expected)
        model(ids)
    assert len(found) == 2 and not block._forward_pre_hooks
    with pytest.raises(ZeroDivisionError):
        with watched(model, None) as found:
            model(ids)
            1 / 0
    assert not block._forward_pre_hooks, "the hook would watch all that is run later"
    with watched(None, None) as found:
        pass
    assert found == []


def test_sinks_are_refused_where_they_are_needed():
    model = random_model(sliding_window=4, attention_sinks=2)
    assert attention_of(model, random_ids(1, 6)).shape == (1, 4, 6, 6), "all of it is in the window"
    with pytest.raises(UserError, match="does not know attention sinks.* pass a shorter --seq_len") as error:
        attention_of(model, random_ids(1, 7))
    assert "\n" not in str(error.value)


# ---- attention matched -------------------------------------------------------------------------------------


def matched(student, teacher, ids, mask=None, valid=None):
    valid = torch.ones(ids.shape, dtype=torch.bool) if valid is None else valid
    return attention_match(attention_of(student, ids, mask), attention_of(teacher, ids, mask), valid)


def test_a_teacher_is_matched_by_itself_alone():
    teacher, student, ids = random_model(), random_model(dim=16, n_layers=1, n_kv_heads=4), random_ids(2, 9)
    assert matched(teacher, random_model(), ids).item() == pytest.approx(0, abs=1e-5)
    assert matched(student, teacher, ids) > 0.1


def test_attention_by_hand():
    """One query of two keys: the teacher's 4 heads are averaged in neighbours, as the student has 2."""
    teacher = torch.tensor([[0.1, 0.9], [0.3, 0.7], [0.5, 0.5], [0.9, 0.1]]).log().view(1, 4, 1, 2)
    student = torch.tensor([[0.2, 0.8], [0.4, 0.6]]).log().view(1, 2, 1, 2)
    second = 0.7 * math.log(0.7 / 0.4) + 0.3 * math.log(0.3 / 0.6)  # of (0.7, 0.3); the first pair is equal
    found = attention_match(student, teacher, torch.tensor([[True]]))
    assert found.item() == pytest.approx((0 + second) / 2, rel=1e-5), "KL(teacher | student), mean over heads"
    assert attention_match(student, teacher, torch.tensor([[False]])).item() == 0
    other = attention_match(teacher, student, torch.tensor([[True]])).item()
    assert other == pytest.approx((0.4 * math.log(0.4 / 0.7) + 0.6 * math.log(0.6 / 0.3)) / 2, rel=1e-5)


def test_numbers_of_heads_that_share_no_factor_are_all_averaged():
    teacher, student = (randn(2, heads, 5, 5, seed=heads).log_softmax(-1) for heads in (3, 4))
    means = [logps.exp().mean(dim=1).double() for logps in (teacher, student)]
    expected = (means[0] * (means[0] / means[1]).log()).sum()
    found = attention_match(student, teacher, torch.ones(2, 5, dtype=torch.bool))
    assert found.item() == pytest.approx(expected.item(), rel=1e-4)


def test_only_queries_with_a_target_count_and_padding_changes_nothing():
    teacher, student, ids = random_model(), random_model(dim=16, n_layers=1, n_kv_heads=4), random_ids(2, 9)
    valid = torch.ones(2, 9, dtype=torch.bool)
    valid[0, :3] = False
    some = matched(student, teacher, ids, valid=valid)
    rest = matched(student, teacher, ids, valid=~valid)
    assert (some + rest).item() == pytest.approx(matched(student, teacher, ids).item(), rel=1e-5)
    wide, documents = torch.zeros(2, 14, dtype=torch.long), torch.zeros(2, 14, dtype=torch.long)
    wide[:, :9], documents[:, :9] = ids, 1
    padded = matched(student, teacher, wide, Mask(documents=documents), F.pad(valid, (0, 5)))
    assert padded.item() == pytest.approx(some.item(), rel=1e-5)


def test_the_gradient_reaches_the_students_queries_and_keys_and_not_the_teacher():
    teacher, student, ids = random_model(), random_model(dim=16, n_kv_heads=4), random_ids(2, 9)
    matched(student, teacher.requires_grad_(False), ids).backward()
    last = student.model.layers[-1].self_attn
    for name in ("q_proj", "k_proj"):
        assert getattr(last, name).weight.grad.abs().sum() > 0, name
    assert last.v_proj.weight.grad is None and student.model.layers[0].mlp.up_proj.weight.grad.any()
    assert all(p.grad is None for p in teacher.parameters())


def test_a_student_learns_to_look_where_its_teacher_looks():
    teacher, student, ids = random_model(), random_model(dim=16, n_kv_heads=4), random_ids(2, 9)
    optimizer = torch.optim.Adam(student.parameters(), lr=0.01)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        losses.append(matched(student, teacher, ids))
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.3 * losses[0]


def lesson_for(B=2, T=9, documents=None):
    ids = random_ids(B, T + 1)
    return distill.Lesson(ids[:, :-1], ids[:, 1:].masked_fill(torch.arange(T) == 2, -100), documents)


def settings_like(**changes):
    return SimpleNamespace(**{"match": "attention", "match_weight": 0.5, "kd_weight": 1.0,
                              "divergence": Divergence(), **changes})


def test_in_a_lesson_the_match_is_added_by_its_weight():
    teacher, student = random_model().requires_grad_(False), random_model(dim=16, n_kv_heads=4)
    lesson = lesson_for()
    plain, n, _ = distill.lesson_loss(student, (lesson,), teacher, settings_like(match=None))
    both, number, figures = distill.lesson_loss(student, (lesson,), teacher, settings_like())
    match = matched(student, teacher, lesson.inputs, valid=lesson.targets != -100)
    assert both.item() == pytest.approx(plain.item() + 0.5 * match.item(), rel=1e-5)
    assert n == number == figures["match_per_token"][1] == 16
    assert figures["match_per_token"][0].item() == pytest.approx(match.item(), rel=1e-5)


def test_blocks_that_are_computed_anew_in_the_backward_pass_are_matched_all_the_same():
    gradients = []
    for recomputed in (False, True):
        teacher, student = random_model().requires_grad_(False), random_model(dim=16, n_kv_heads=4)
        for block in student.model.layers if recomputed else ():
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
        loss, *_ = distill.lesson_loss(student, (lesson_for(),), teacher, settings_like())
        loss.backward()
        gradients.append([p.grad for p in student.parameters()])
    for plain, again in zip(*gradients):
        torch.testing.assert_close(again, plain)


# ---- hidden states -----------------------------------------------------------------------------------------


def test_hidden_states_by_hand():
    projection = torch.nn.Linear(2, 3, bias=False)
    projection.weight.data = torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]])
    student = torch.tensor([[1.0, 2.0], [0.0, 1.0]])
    teacher = torch.tensor([[0.0, 4.0, 0.0], [0.0, 2.0, 1.0]])
    found = hidden_match(projection, student, teacher)
    assert found.item() == pytest.approx((1 + 0 + 9) / 3 + 0), "a mean over the width, a sum over tokens"
    found.backward()
    assert projection.weight.grad.tolist()[2] == pytest.approx([2 / 3 * 3 * 1, 2 / 3 * 3 * 2])


def test_the_projection_lies_beside_the_student_and_follows_from_the_seed():
    weights = []
    for seed in (0, 0, 1):
        student = random_model(dim=16, n_kv_heads=4)
        names = {name for name, _ in student.named_parameters()}
        torch.manual_seed(len(weights))  # the randomness of others is another
        add_projection(student, 32, seed)
        assert {name for name, _ in student.named_parameters()} - names == {"beside.projection.weight"}
        weights.append(student.beside["projection"].weight)
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    assert weights[0].shape == (32, 16) and weights[0].requires_grad
    assert weights[0].std().item() == pytest.approx(16 ** -0.5, rel=0.15)  # of 512 draws, 5 deviations


def test_in_a_lesson_hidden_states_of_tokens_with_a_target_are_matched():
    teacher, student = random_model().requires_grad_(False), random_model(dim=16, n_kv_heads=4)
    add_projection(student, 32, 0)
    lesson, valid = lesson_for(), lesson_for().targets != -100
    plain, *_ = distill.lesson_loss(student, (lesson,), teacher, settings_like(match=None))
    both, _, figures = distill.lesson_loss(student, (lesson,), teacher, settings_like(match="hidden"))
    expected = hidden_match(student.beside["projection"], student.model(lesson.inputs)[valid],
                            teacher.model(lesson.inputs)[valid])
    assert both.item() == pytest.approx(plain.item() + 0.5 * expected.item(), rel=1e-5)
    both.backward()
    assert student.beside["projection"].weight.grad.any()
    assert all(p.grad is None for p in teacher.parameters())


# ---- a run -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a teacher and token shards."""
    folder = tmp_path_factory.mktemp("matching")
    save_model(random_model(vocab_size=TOKENIZER.vocab_size), TOKENIZER, folder / "teacher")
    write_shards(folder / "data", {"train": ["the cat sat. " * 20, "the mat " * 30],
                                   "val": ["the cat and the mat"]}, TOKENIZER)
    return folder


def run(place, out, **changes):
    settings = distill.Settings(**{
        "teacher": str(place / "teacher"), "data": str(place / "data"), "out": str(out), "dim": 16,
        "n_heads": 4, "seq_len": 16, "batch_size": 4, "steps": 6, "save_every": 2, "warmup_steps": 1,
        "bigram_steps": 0, "questions": 0, "compile": False, "precision": "fp32", "match": "hidden",
        "match_weight": 0.5, **changes})
    distill.distil(settings, CPU)
    return settings


def log_of(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text("utf-8").splitlines()]


def projection_in(out, step):
    return read_tensors(out / "state" / f"step_{step:08}" / "beside.safetensors")["beside.projection.weight"]


def test_a_projection_is_learnt_kept_in_states_and_no_part_of_the_model(place, tmp_path):
    from transformers import AutoModelForCausalLM
    out = tmp_path / "run"
    run(place, out)
    begun = random_model(dim=16, n_kv_heads=4)
    add_projection(begun, 32, 0)
    moved = projection_in(out, 6) - begun.beside["projection"].weight
    assert 1e-4 < moved.abs().max() < 1 and not torch.equal(projection_in(out, 4), projection_in(out, 6))
    for folder in (out, out / "state" / "step_00000006"):
        assert not any("beside" in name for name in read_tensors(folder / "model.safetensors"))
        ours, _ = load_model(folder)
        theirs = AutoModelForCausalLM.from_pretrained(folder)
        ids = random_ids(1, 10)
        torch.testing.assert_close(ours(ids), theirs(ids).logits, rtol=1e-4, atol=1e-5)
    log = log_of(out)
    assert log[-1]["match_per_token"] < log[0]["match_per_token"]
    moments = read_tensors(out / "state" / "step_00000006" / "optimizer.safetensors")
    assert any(name.startswith("beside.projection") for name in moments)


@pytest.mark.parametrize("match", ["hidden", "attention"])
def test_stopping_and_going_on_equals_never_stopping_bit_for_bit(place, tmp_path, monkeypatch, match):
    run(place, tmp_path / "whole", match=match)
    at = distill.Lessons.at

    def stops(lessons, step):
        if step == 3:
            raise KeyboardInterrupt
        return at(lessons, step)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(distill.Lessons, "at", stops)
        run(place, tmp_path / "cut", match=match)
    run(place, tmp_path / "cut", match=match)
    names = ["model.safetensors"] + ["state/step_00000006/beside.safetensors"] * (match == "hidden")
    for name in names:
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "cut" / name).read_bytes(), name


def test_activation_checkpointing_learns_the_same_attention(place, tmp_path):
    logs = []
    for kind in ("none", "full"):
        run(place, tmp_path / kind, match="attention", activation_checkpointing=kind)
        logs.append(log_of(tmp_path / kind))
    for plain, again in zip(*logs):
        for name in ("match_per_token", "grad_norm", "kd_nats_per_token"):
            assert again[name] == pytest.approx(plain[name], rel=1e-4), name  # float32, step after step
