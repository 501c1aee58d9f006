"""distill.py: lessons and their loss, the student's own replies, runs, and what is refused."""
import functools
import json
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import data
import distill
import sft
import train
from bpe import Tokenizer
from chat import CHATML, render, with_chat_tokens
from checkpoint import load_model, save_model
from distill import Lesson, Lessons, OnPolicy, distinct, last_prompt, lesson_loss
from divergence import Divergence, TopK, kd_loss, log_probabilities
from lora import add_lora
from metaspace import load_tokenizer
from objectives import next_token_loss
from parallel import Env
from rollouts import whole_copy
from support import check_a_killed_run, in_process, interrupted_once, random_ids, random_model, run_stage

CPU = Env(torch.device("cpu"))
TOKENIZER = with_chat_tokens(Tokenizer([(b"t", b"h"), (b"th", b"e")], ["<|endoftext|>"]))  # 261 ids
STOP = TOKENIZER.special_tokens[CHATML.end]


def model_for(size=0.5, **changes):
    model = random_model(**{"vocab_size": TOKENIZER.vocab_size, "max_seq_len": 96, **changes})
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(size)  # a random model that is less sure
    return model


def student_for(size=0.5, **changes):
    return model_for(size, **{"dim": 16, "n_heads": 2, "n_kv_heads": 1, "ffn_dim": 32, **changes})


def talk(question, answer):
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def talks(number, seed=0):
    rng = random.Random(seed)
    return [talk(rng.choice("abc") * rng.randint(1, 9), "x" * rng.randint(1, 9)) for _ in range(number)]


def packed(number=8, batch_size=2, seq_len=64, **place):
    return sft.Packed([render(one["messages"], TOKENIZER, template=CHATML) for one in talks(number)],
                      batch_size, seq_len, **place)


def settings_for(**changes):
    of = {"kind": "forward", "beta": 0.5, "skew": 0.1, "temperature": 1.0}
    of |= {name: changes[name] for name in of if name in changes}
    return SimpleNamespace(**{"kd_weight": 0.5, "match": None, "match_weight": 1.0, **of, **changes},
                           divergence=Divergence(**of))


# ---- the loss of a lesson ----------------------------------------------------------------------------------


def a_batch():
    inputs, targets, documents = packed(8, batch_size=2).at(0)
    assert (documents.max(dim=1).values > 1).any(), "several conversations a window, or isolation is not seen"
    return inputs, targets, documents


@pytest.mark.parametrize("changes", [{}, dict(kind="reverse", temperature=2.0),
                                     dict(kind="jsd", kd_weight=1.0),
                                     dict(kind="skew_reverse", kd_weight=0.3)], ids=str)
def test_a_lessons_loss_is_that_of_both_models_logits_where_no_document_sees_another(changes):
    settings, (inputs, targets, documents) = settings_for(**changes), a_batch()
    student, teacher, wanted, count = student_for(), model_for(), 0.0, 0
    loss, n, figures = lesson_loss(student, (Lesson(inputs, targets, documents),), teacher, settings)
    for row in range(len(inputs)):
        for number in range(1, int(documents[row].max()) + 1):  # each conversation by itself
            own = documents[row] == number
            with torch.no_grad():
                logits = [model(inputs[row, own][None]) for model in (student, teacher)]
            total, some = kd_loss(*logits, targets[row, own][None], settings.temperature, settings.kind,
                                  settings.beta, kd_weight=settings.kd_weight, skew=settings.skew)
            wanted, count = wanted + total, count + some
    assert n == count
    torch.testing.assert_close(loss, wanted, rtol=1e-4, atol=1e-4)  # float32, other shapes of products
    kd, ce = (figures[f"{name}_nats_per_token"] for name in ("kd", "ce"))
    weight = settings.kd_weight
    torch.testing.assert_close(loss, weight * settings.temperature ** 2 * kd[0] + (1 - weight) * ce[0])
    assert ce[1] == n * (weight < 1)


def test_without_weight_for_the_teacher_it_is_the_plain_loss_and_no_teacher_is_needed():
    student, batch = student_for(), a_batch()
    loss, n, _ = lesson_loss(student, (Lesson(*batch),), None, settings_for(kd_weight=0.0))
    plain, count = sft.reply_loss(student, batch)
    torch.testing.assert_close(loss, plain, rtol=1e-6, atol=1e-5)
    assert n == count
    held_out, _ = distill.held_out_loss(student, batch)
    torch.testing.assert_close(held_out, plain, msg="held out, the loss is the plain one whatever is learnt")
    inputs, targets = random_ids(2, 9), random_ids(2, 9, seed=1)
    torch.testing.assert_close(distill.held_out_loss(student, (inputs, targets))[0],
                               next_token_loss(student, (inputs, targets))[0])


def test_a_student_that_is_its_teacher_has_nothing_to_learn_from_it():
    teacher, student = model_for(), model_for()
    for kind in ("forward", "reverse", "jsd"):
        student.zero_grad()
        settings = settings_for(kind=kind, kd_weight=1.0)
        loss, _, _ = lesson_loss(student, (Lesson(*a_batch()),), teacher, settings)
        loss.backward()
        assert abs(loss.item()) < 1e-3, "some 40 tokens' rounding of float32"
        assert max(p.grad.abs().max().item() for p in student.parameters()) < 1e-3


def test_the_teacher_gets_no_gradient_and_stays_as_it_was():
    teacher, student = model_for().requires_grad_(False), student_for()
    before = [p.clone() for p in teacher.parameters()]
    loss, _, _ = lesson_loss(student, (Lesson(*a_batch()),), teacher, settings_for())
    loss.backward()
    assert all(p.grad is None and torch.equal(p, was) for p, was in zip(teacher.parameters(), before))
    assert not teacher.training and any(p.grad.abs().sum() > 0 for p in student.parameters())


def test_the_students_own_words_are_learnt_from_the_teachers_view_of_them_alone():
    student, teacher, batch = student_for(), model_for(), a_batch()
    own, _, figures = lesson_loss(student, (Lesson(*batch, own=True),), teacher, settings_for(kd_weight=0.3))
    pure, _, _ = lesson_loss(student, (Lesson(*batch),), teacher, settings_for(kd_weight=1.0))
    torch.testing.assert_close(own, pure, msg="cross-entropy with one's own samples teaches what one says")
    assert figures["ce_nats_per_token"][1] == 0


def test_what_was_stored_is_what_is_said_live():
    student, teacher, (inputs, targets, documents) = student_for(), model_for(), a_batch()
    valid = targets != -100
    with torch.no_grad():
        logits = teacher(inputs, mask=distill.Mask(documents=documents))[valid]
    top = TopK.of(log_probabilities(logits), TOKENIZER.vocab_size - 1)  # all that there is
    stored, _, _ = lesson_loss(student, (Lesson(inputs, targets, documents, top),), None, settings_for())
    live, _, _ = lesson_loss(student, (Lesson(inputs, targets, documents),), teacher, settings_for())
    torch.testing.assert_close(stored, live, rtol=1e-5, atol=1e-4)


# ---- lessons by step ---------------------------------------------------------------------------------------


def test_lessons_are_the_batches_and_bring_the_stored_answers_about_their_windows():
    class Recorded:
        def of(self, windows):
            return list(windows)
    batches = packed(16, seed=3)
    for step in (0, 3, 7):  # beyond the first epoch, too
        lesson, = Lessons(batches, Recorded()).at(step)
        for ours, theirs in zip((lesson.inputs, lesson.targets, lesson.documents), batches.at(step)):
            assert torch.equal(ours, theirs)
        assert torch.equal(batches.stack(lesson.top)[0], lesson.inputs), "answers about other windows"
    first, again = (Lessons(batches, Recorded(), places=8).at(step)[0] for step in (1, 5))
    assert torch.equal(first.inputs, again.inputs), "after a rollback there are stored answers still"


def test_the_last_prompt_ends_where_the_last_reply_begins():
    messages = [*talk("a", "xx")["messages"], *talk("bb", "yyy")["messages"]]
    ids, mask = render(messages, TOKENIZER, template=CHATML)
    wanted, _ = render(messages[:-1], TOKENIZER, True, CHATML)
    assert last_prompt(np.array(ids), np.array(mask)) == wanted


def on_policy(share, model=None, rank=0, world_size=1, **changes):
    model = model or student_for()
    env = Env(torch.device("cpu"), rank=rank, world_size=world_size)
    lessons = Lessons(packed(16, seed=3, rank=rank, world_size=world_size))
    return OnPolicy(lessons, share, model, whole_copy(model, CPU), TOKENIZER, STOP, 8, env)


def test_a_share_of_the_steps_is_about_the_students_own_replies():
    assert not any(on_policy(0.0).at(step)[0].own for step in range(5))
    assert all(on_policy(1.0).at(step)[0].own for step in range(5))
    chosen = [on_policy(0.3).at(step)[0].own for step in range(60)]
    assert 8 <= sum(chosen) <= 30, "60 draws of 0.3: 18, with a standard deviation of 3.5"
    assert chosen == [on_policy(0.3, rank=1, world_size=2).at(step)[0].own for step in range(60)], \
        "processes that share weights must draw replies in the same steps"


def test_own_replies_follow_the_prompts_of_the_windows_and_are_what_the_student_draws():
    lessons = on_policy(1.0)
    lesson, = lessons.at(2)
    windows = lessons.batches.at_places(lessons.batches.numbers(2))
    prompts = {tuple(prompt) for prompt in lessons.prompts(windows)}
    for row in range(len(lesson.inputs)):
        for number in range(1, int(lesson.documents[row].max()) + 1):
            place = lesson.documents[row] == number
            ids, learnt = lesson.inputs[row, place], lesson.targets[row, place]
            first = int((learnt != -100).nonzero()[0])
            assert tuple(ids[:first + 1].tolist()) in prompts, "the reply begins where the prompt ends"
            reply = learnt[first:]
            assert (reply != -100).all() and len(reply) <= 8
            assert STOP not in reply[:-1].tolist(), "nothing follows the end token"
    again, = on_policy(1.0).at(2)
    assert torch.equal(again.inputs, lesson.inputs), "a function of (seed, step) and the weights"
    other = student_for()
    with torch.no_grad():
        other.lm_head.weight.normal_(generator=torch.Generator().manual_seed(5))
    assert not torch.equal(on_policy(1.0, other).at(2)[0].targets, lesson.targets), "of the weights, too"


def test_drawing_leaves_dropout_as_it_was_and_is_done_without():
    student = add_lora(student_for(), 2, dropout=0.5).train()
    with torch.no_grad():
        for name, p in student.named_parameters():
            if name.endswith("lora_B"):
                p.normal_(generator=torch.Generator().manual_seed(0))
    first, second = (on_policy(1.0, student).at(2)[0].targets for _ in range(2))
    assert torch.equal(first, second) and student.training


# ---- learning ----------------------------------------------------------------------------------------------


def test_a_student_comes_to_say_what_its_teacher_says(tmp_path):
    teacher, settings = model_for(0.7), run_settings(tmp_path, steps=80, kd_weight=1.0, lr=0.02, adam_lr=0.01)
    student, lessons = student_for(0.3), Lessons(packed(16, batch_size=4))
    loss_fn = functools.partial(lesson_loss, teacher=teacher, settings=settings)
    loss, n, _ = loss_fn(student, lessons.at(0))
    last = train.train(student, lessons, loss_fn, settings, CPU)
    assert last["kd_nats_per_token"] < 0.35 * (loss / n).item(), "the divergence falls to a fraction"


def run_settings(tmp_path, **changes):
    return distill.Settings(**{"out": str(tmp_path / "run"), "data": str(tmp_path / "chats.jsonl"),
                               "seq_len": 64, "batch_size": 4, "steps": 6, "compile": False,
                               "warmup_steps": 2, "precision": "fp32", "questions": 0, "device": "cpu",
                               **changes})


def test_micro_batches_change_nothing(tmp_path):
    logs = []
    for size in (2, 4):
        settings = run_settings(tmp_path / str(size), steps=3, micro_batch_size=size)
        loss_fn = functools.partial(lesson_loss, teacher=model_for(), settings=settings)
        logs.append(train.train(student_for(), Lessons(packed(16, batch_size=size)), loss_fn, settings, CPU))
    for name in ("loss_nats_per_token", "grad_norm", "kd_nats_per_token"):
        assert logs[0][name] == pytest.approx(logs[1][name], rel=1e-4), name


def test_pairs_of_words_are_counted_by_hand():
    assert distinct(["a b a b"]) == pytest.approx(2 / 3)
    assert distinct(["a b", "a b"]) == 0.5, "what two samples have in common counts once"
    assert distinct(["", "a"]) == 0


# ---- the command -------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def place(tmp_path_factory):
    """A folder with a teacher, a student, conversations and token shards."""
    folder = tmp_path_factory.mktemp("distill")
    save_model(model_for(), TOKENIZER, folder / "teacher")
    save_model(student_for(), TOKENIZER, folder / "student")
    (folder / "chat").mkdir()
    for split, number, seed in (("train", 40, 0), ("val", 12, 1)):
        lines = [json.dumps(one) for one in talks(number, seed)]
        (folder / "chat" / f"{split}.jsonl").write_text("\n".join(lines), "utf-8")
    rng = random.Random(0)
    (folder / "texts").mkdir()
    for number in range(30):
        words = " ".join(rng.choice(["the", "then", "other", "x"]) for _ in range(60))
        (folder / "texts" / f"{number}.txt").write_text(words, "utf-8")
    data.prepare(data.Settings(input=(str(folder / "texts"),), out=str(folder / "text"), val_fraction=0.2,
                               workers=1, tokenizer=str(folder / "teacher")))
    return folder


def arguments(place, out, data="chat", **changes):
    words = {"teacher": place / "teacher", "init_from": place / "student", "data": place / data, "out": out,
             "seq_len": 64, "batch_size": 4, "steps": 4, "device": "cpu", "precision": "fp32",
             "compile": "false", "warmup_steps": 1, "questions": 4, "max_new_tokens": 8,
             "samples_of_questions": 2, "save_every": 2, **changes}
    return [word for name, value in words.items() if value is not None for word in (f"--{name}", str(value))]


@pytest.fixture
def command(monkeypatch, capsys):
    return lambda words: in_process(monkeypatch, capsys, distill.main, *words)


def test_a_run_on_conversations_tells_before_and_after_and_leaves_a_model(place, tmp_path, command):
    code, out, err = command(arguments(place, tmp_path / "run", kd_weight=0.3))
    assert code == 0, err
    for words in ("train: 40 conversations", "teacher ", "before ", "after ", "nats a token of replies",
                  "greedy: replies, F1", "sampled: distinct pairs", "sampled: KL from the teacher"):
        assert words in out, out
    results = json.loads((tmp_path / "run" / "results.json").read_text("utf-8"))
    student, _ = load_model(tmp_path / "run")
    env, settings = CPU, distill.parse(distill.Settings, arguments(place, tmp_path / "run"))
    _, val, _ = distill.open_conversations(settings, "the student", TOKENIZER, env)
    plain = train.evaluate(student, val, sft.reply_loss, env)["loss"]
    assert results["held out"]["after"]["loss"] == pytest.approx(plain, rel=1e-5), "not the mixed loss"
    assert results["answers"]["sampled: KL from the teacher, nats"] > 0
    assert all(sample.keys() == {"prompt", "after", "author"} for sample in results["samples"])
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text("utf-8").splitlines()]
    for line in log:
        mixed = 0.3 * line["kd_nats_per_token"] + 0.7 * line["ce_nats_per_token"]
        assert line["loss_nats_per_token"] == pytest.approx(mixed, rel=1e-5)


def test_a_run_on_plain_text_is_measured_in_bits_per_byte(place, tmp_path, command):
    made = dict(init_from=None, dim=16, n_heads=2, n_layers=1, questions=None, bigram_steps=2)
    code, out, err = command(arguments(place, tmp_path / "run", "text", **made))
    assert code == 0 and "bits per byte" in out and "greedy" not in out, err
    student, tokenizer = load_model(tmp_path / "run")
    assert student.config.dim == 16 and student.config.tie_embeddings
    assert tokenizer.fingerprint == TOKENIZER.fingerprint


@pytest.mark.parametrize("data, changes", [
    ("chat", dict(kind="reverse", kd_weight=1)), ("chat", dict(on_policy=0.5)), ("chat", dict(top_k=8)),
    ("chat", dict(match="attention")), ("chat", dict(match="hidden", match_weight=0.1)),
    ("chat", dict(lora_rank=2)), ("chat", dict(kd_weight=0)), ("chat", dict(lora_rank=2, match="hidden")),
    ("chat", dict(init_from=None, student="layers")),
    ("chat", dict(kind="jsd", beta=1, lora_rank=2, on_policy=1)),
    ("text", dict(top_k=8, temperature=2)), ("text", dict(init_from=None, student="layers")),
    ("text", dict(init_from=None, student="width", dim=24, n_heads=2, ffn_dim=32)),
    ("text", dict(match="hidden"))], ids=str)
def test_every_way_ends_in_a_model_that_opens_and_has_learnt(place, tmp_path, command, data, changes):
    code, out, err = command(arguments(place, tmp_path / "run", data, questions=0, steps=8, **changes))
    assert code == 0, err
    load_model(tmp_path / "run")
    figures = json.loads((tmp_path / "run" / "results.json").read_text("utf-8"))["held out"]
    assert ("teacher" in figures) == (changes.get("kd_weight") != 0)
    assert figures["after"]["loss"] != figures["before"]["loss"]
    names = load_model(tmp_path / "run")[0].state_dict()
    assert not any("projection" in name for name in names), "what is learnt beside a student is no part of it"


def test_stored_answers_are_made_once_and_read_again(place, tmp_path, command, monkeypatch):
    words = dict(top_k=4, questions=0, stored=tmp_path / "answers", temperature=1.5)
    code, out, err = command(arguments(place, tmp_path / "one", **words))
    assert code == 0 and "to be stored: 18 bytes a token (k = 4)" in out, err
    monkeypatch.setattr(distill, "store", None)
    code, out, err = command(arguments(place, tmp_path / "two", **words))
    assert code == 0 and "the teacher's answers: " in out, err
    one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two"))
    assert one == two
    for changes, what in (dict(temperature=1.0), "another temperature"), (dict(top_k=5), "another k"):
        code, _, err = command(arguments(place, tmp_path / "three", **words | changes))
        assert code == 2 and what in err, err


def test_stored_answers_lie_beside_the_data_and_not_in_it(place, tmp_path, command):
    before, beside = sorted(path.name for path in (place / "text").iterdir()), set(place.iterdir())
    code, _, err = command(arguments(place, tmp_path / "run", "text", top_k=3))
    [made] = set(place.iterdir()) - beside
    assert code == 0 and made.name.startswith("text.teacher-"), err
    assert sorted(path.name for path in (place / "text").iterdir()) == before, "data.py would not replace it"


@pytest.mark.parametrize("data, changes", [
    ("chat", {}), ("chat", dict(on_policy=0.6)), ("chat", dict(lora_rank=2, lora_dropout=0.1)),
    ("text", dict(match="hidden")), ("chat", dict(match="hidden", lora_rank=2)),
    ("text", dict(top_k=4, init_from=None, dim=16, n_heads=2))], ids=str)
def test_stopping_and_going_on_equals_never_stopping_bit_for_bit(place, tmp_path, command, monkeypatch, data,
                                                                 changes):
    words = dict(steps=6, questions=0, stored=tmp_path / "answers" if "top_k" in changes else None, **changes)
    assert command(arguments(place, tmp_path / "whole", data, **words))[0] == 0
    steps = interrupted_once(monkeypatch, OnPolicy if "on_policy" in changes else Lessons, "at", after=3)
    assert command(arguments(place, tmp_path / "cut", data, **words))[0] != 0
    assert not (tmp_path / "cut" / "model.safetensors").exists()
    assert steps == [0, 1, 2]
    code, _, err = command(arguments(place, tmp_path / "cut", data, **words))
    assert code == 0, err
    name = "adapter/adapter_model.safetensors" if "lora_rank" in changes else "model.safetensors"
    whole, cut = ((tmp_path / run / name).read_bytes() for run in ("whole", "cut"))
    assert whole == cut


def test_a_run_that_goes_on_tells_what_it_began_with(place, tmp_path, command, monkeypatch):
    made = dict(init_from=None, dim=16, n_heads=2, questions=None, bigram_steps=8)
    words = arguments(place, tmp_path / "run", "text", **made)
    results = []
    for _ in range(2):
        assert command(words)[0] == 0
        results.append(json.loads((tmp_path / "run" / "results.json").read_text("utf-8"))["held out"])
    assert results[0] == results[1], "the weights before the first step, fitted to the bigrams"


@pytest.mark.parametrize("changes", [dict(lr=0.5), dict(top_k=3)], ids=str)
def test_other_settings_are_refused_before_a_teacher_is_asked(place, tmp_path, command, monkeypatch, changes):
    assert command(arguments(place, tmp_path / "run", questions=0))[0] == 0
    for name in ("evaluate", "store"):
        monkeypatch.setattr(distill, name, None)
    code, _, err = command(arguments(place, tmp_path / "run", questions=0, **changes))
    assert code == 2 and "holds a run with " in err, err


def test_adapters_of_a_student_new_to_the_template_learn_its_tokens(place, foreign, tmp_path, command):
    words = dict(init_from=foreign / "plain", lora_rank=2, questions=0)
    assert command(arguments(place, tmp_path / "run", **words))[0] == 0
    base, _ = load_model(foreign / "plain")
    student, tokenizer = load_model(tmp_path / "run")
    begun, _ = sft.with_template(base, load_tokenizer(foreign / "plain" / "tokenizer.json"), CHATML, CPU)
    assert tokenizer.fingerprint == TOKENIZER.fingerprint
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        old, new = (model.state_dict()[name] for model in (begun, student))
        assert torch.equal(old[:259], new[:259]) and not torch.equal(old[STOP], new[STOP]), \
            "without the rows of the tokens that are new to it, a student cannot learn to end"


def test_a_student_is_made_without_its_teachers_rows_to_spare(place, tmp_path, command):
    save_model(model_for(vocab_size=TOKENIZER.vocab_size + 9), TOKENIZER, tmp_path / "padded")
    made = dict(teacher=tmp_path / "padded", init_from=None, dim=16, n_heads=2, on_policy=1)
    code, _, err = command(arguments(place, tmp_path / "run", **made))
    assert code == 0, err
    assert load_model(tmp_path / "run")[0].config.vocab_size == TOKENIZER.vocab_size
    made = made | dict(student="layers", dim=None, n_heads=None, on_policy=0)
    code, _, err = command(arguments(place, tmp_path / "layers", **made))
    assert code == 0, f"a row to spare that is drawn has no text, and ends nothing: {err}"


def test_what_a_student_may_draw_and_its_teacher_cannot_read_is_not_asked_about(place, tmp_path, command):
    save_model(student_for(vocab_size=TOKENIZER.vocab_size + 9), TOKENIZER, tmp_path / "padded")
    words = dict(init_from=tmp_path / "padded", max_new_tokens=40)
    code, _, err = command(arguments(place, tmp_path / "run", on_policy=1, **words))
    assert code == 2 and "may draw one of 270 ids, and the teacher " in err, err
    code, out, err = command(arguments(place, tmp_path / "run", **words))
    assert code == 0 and "sampled: entropy" in out and "KL from the teacher" not in out, err


def test_models_are_compared_whatever_the_teachers_tokenizer(place, foreign, tmp_path, command):
    words = arguments(place, tmp_path / "none", init_from=None, compare=place / "student",
                      teacher=foreign / "plain")
    code, out, err = command(words)
    assert code == 0 and "sampled: entropy" in out and "KL from the teacher" not in out, err
    code, out, err = command([*words, str(tmp_path / "missing")])
    assert code == 2 and "there is no model folder " in err and "evaluate" not in err, err


def test_answers_of_several_stand_side_by_side(place, tmp_path, command):
    words = arguments(place, tmp_path / "none", init_from=None, compare=place / "student")
    code, out, err = command([*words, str(place / "teacher")])
    assert code == 0, err
    [loss] = [line for line in out.splitlines() if line.startswith("held out, nats a token")]
    [kl] = [line for line in out.splitlines() if line.startswith("sampled: KL from the teacher")]
    assert len(loss.split()) == 5 + 2 and float(kl.split()[-1]) == pytest.approx(0, abs=1e-3), \
        "of the teacher itself"
    assert not (tmp_path / "none").exists()
    code, out, err = command([*arguments(place, tmp_path / "none", "text", init_from=None,
                                         compare=place / "student"), str(place / "teacher")])
    assert code == 0 and "held out, bits per byte" in out and "greedy" not in out, err


# ---- several processes -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def alone(place, tmp_path_factory):
    """What one process learns with these settings, each asked for once."""
    @functools.cache
    def log(**settings):
        out = tmp_path_factory.mktemp("alone") / "run"
        return run_stage("distill.py", arguments(place, out, questions=0, steps=3, **settings))
    return log


@pytest.mark.slow
@pytest.mark.parametrize("layout", [{}, *({"data_parallel": "fsdp", **changes} for changes in (
    {}, {"match": "hidden"}, {"top_k": 4}, {"lora_rank": 2}, {"lora_rank": 2, "match": "hidden"}))], ids=str)
def test_two_processes_learn_what_one_does(alone, place, tmp_path, layout):
    same = {name: value for name, value in layout.items() if name != "data_parallel"}
    one = alone(**same)
    two = run_stage("distill.py", arguments(place, tmp_path / "two", questions=0, steps=3, **layout), 2)
    for a, b in zip(one, two, strict=True):
        assert a["targets"] == b["targets"]
        for name in ("loss_nats_per_token", "grad_norm", "kd_nats_per_token", "ce_nats_per_token"):
            assert a[name] == pytest.approx(b[name], rel=1e-3, abs=1e-5), "float32 sums in another order"
    assert one[-1]["val_loss_nats_per_token"] == pytest.approx(two[-1]["val_loss_nats_per_token"], rel=1e-3)


@pytest.mark.slow
def test_two_processes_begin_with_the_same_student_that_was_fitted_to_the_bigrams(place, tmp_path):
    made = dict(init_from=None, dim=16, n_heads=2, questions=None, bigram_steps=8, steps=1)
    before = []
    for processes in (1, 2):
        out = tmp_path / str(processes)
        run_stage("distill.py", arguments(place, out, "text", **made), processes)
        before.append(json.loads((out / "results.json").read_text("utf-8"))["held out"]["before"]["loss"])
    assert before[0] == pytest.approx(before[1], rel=1e-4), "the other process was not told of the fit"


@pytest.mark.slow
def test_a_run_of_two_processes_that_is_killed_goes_on_and_ends_in_the_same_bytes(place, tmp_path):
    common = dict(steps=12, questions=0, data_parallel="fsdp", on_policy=0.5)
    check_a_killed_run("distill.py", lambda out: arguments(place, out, **common), tmp_path)


# ---- when something is wrong -------------------------------------------------------------------------------


@pytest.mark.parametrize("changes, words", [
    (dict(temperature=0), "--temperature 0.0 is out of range; it must be above 0"),
    (dict(temperature=-1), "--temperature -1.0 is out of range"),
    (dict(beta=1.5, kind="jsd"), "--beta 1.5 is out of range"),
    (dict(kd_weight=1.1), "--kd_weight 1.1 is out of range"),
    (dict(kind="backward"), "is not one of forward, reverse"),
    (dict(teacher="{tmp}/none"), "there is no folder "),
    (dict(teacher="{tmp}/bare"), "has no tokenizer.json"),
    (dict(teacher="{tmp}/foreign"), "token 256 is b'th' to the student and b'ab' to the teacher"),
    (dict(teacher="{tmp}/plain", init_from=None), "/plain does not know <|im_start|> <|im_end|> of the"),
    (dict(init_from="{tmp}/none"), "there is no folder "),
    (dict(dim=8), "--dim 8 is for a student that is made"),
    (dict(init_from=None, lora_rank=2), "--lora_rank 2: adapters need a student that knows something"),
    (dict(init_from=None, student="layers", dim=8), "--dim 8 is the teacher's, with --student layers"),
    (dict(init_from=None, student="layers", n_layers=9), "n_layers 9"),
    (dict(init_from=None, student="width"), "--student width looks at plain text"),
    (dict(on_policy=0.5, top_k=4), "--on_policy 0.5 asks the teacher live, and --top_k 4 does not"),
    (dict(match="hidden", top_k=4), "--match hidden asks the teacher live"),
    (dict(kd_weight=0, temperature=2), "--temperature 2.0 does nothing with --kd_weight 0"),
    (dict(stored="x"), "--stored x is of use with --top_k 64"),
    (dict(top_k=261), "--top_k 261 is no fewer than the teacher's 261 tokens"),
    (dict(seq_len=200, rope_scaling="none"), "seq_len 200 exceeds max_seq_len 96"),
    (dict(tensor_parallel=2), "tensor_parallel"),
    (dict(data="{tmp}/none.jsonl"), "there is no "),
    (dict(data="{text}", on_policy=0.5), "--on_policy 0.5 is about replies, and "),
    (dict(data="{shards}"), "were made with another tokenizer than that of "),
    (dict(steps=0), "--steps 0 is out of range"),
    (dict(seq_len=0), "--seq_len 0 is out of range"),
    (dict(bigram_steps=5), "--bigram_steps 5 is for a student with random weights"),
    (dict(init_from=None, bigram_steps=5), "--bigram_steps 5 is for a student with random weights"),
    (dict(data="{text}", init_from=None, student="layers", bigram_steps=5), "--bigram_steps 5 is for a"),
    (dict(on_policy=0.5, max_new_tokens=64), "leave a prompt no room in seq_len 64"),
    (dict(beta=0.3), "--beta 0.3 does nothing with --kind forward"),
    (dict(skew=0.3, kind="jsd"), "--skew 0.3 does nothing with --kind jsd"),
    (dict(match_weight=2), "--match_weight 2.0 does nothing with --kind forward and --match none"),
    (dict(chunked_loss="false"), "--no-chunked_loss is not possible here"),
    (dict(eval_stride=8), "--eval_stride 8 is for plain text, and "),
    (dict(data="{text}", epochs=2), "--epochs 2.0 is for conversations, and "),
    (dict(val_share=0.3), "--val_share 0.3 is for a single file, and --data "),
    (dict(compare=""), "--compare names no model folder; name one, or several to compare"),
])
def test_mistakes_end_in_one_line_and_code_2_before_a_run_is_begun(place, foreign, tmp_path, command, changes,
                                                                   words):
    names = {"{tmp}": str(foreign), "{text}": str(place / "text"), "{shards}": str(foreign / "shards")}
    for name, path in names.items():
        changes = {key: value.replace(name, path) if isinstance(value, str) else value
                   for key, value in changes.items()}
    code, _, err = command(arguments(place, tmp_path / "run", **changes))
    last = err.strip().splitlines()[-1]
    assert code == 2 and last.startswith("error: ") and words in last, err[-2000:]
    assert not (tmp_path / "run" / "log.jsonl").exists()


@pytest.fixture(scope="module")
def foreign(tmp_path_factory):
    """Folders that do not go together with the others."""
    folder = tmp_path_factory.mktemp("foreign")
    save_model(model_for(), None, folder / "bare")
    save_model(model_for(vocab_size=259), Tokenizer([(b"t", b"h"), (b"th", b"e")], ["<|endoftext|>"]),
               folder / "plain")
    other = with_chat_tokens(Tokenizer([(b"a", b"b"), (b"ab", b"e")], ["<|endoftext|>"]))
    save_model(model_for(), other, folder / "foreign")
    (folder / "a.txt").write_text("about the abbey " * 200, "utf-8")
    (folder / "b.txt").write_text("an abbot's sabbath " * 200, "utf-8")
    texts = str(folder / "a.txt"), str(folder / "b.txt")
    data.prepare(data.Settings(input=texts, out=str(folder / "shards"), val_fraction=0.5, workers=1,
                               tokenizer=str(folder / "foreign")))
    return folder


def test_a_student_larger_than_its_teacher_is_told_of(place, tmp_path, command):
    code, out, err = command(arguments(place, tmp_path / "run", teacher=place / "student",
                                       init_from=place / "teacher", questions=0))
    assert code == 0 and "parameters, more than the " in out, (out, err)


@pytest.mark.parametrize("changes", [dict(kind="reverse"), dict(temperature=2), dict(kd_weight=0.5),
                                     dict(on_policy=0.5), dict(steps=5)], ids=str)
def test_a_run_goes_on_only_with_what_it_began_with(place, tmp_path, command, changes):
    assert command(arguments(place, tmp_path / "run", questions=0))[0] == 0
    code, _, err = command(arguments(place, tmp_path / "run", questions=0, **changes))
    assert code == 2 and "--overwrite" in err, err


def test_another_teacher_does_not_go_on_with_a_run(place, tmp_path, command):
    assert command(arguments(place, tmp_path / "run", questions=0))[0] == 0
    save_model(model_for(0.6), TOKENIZER, tmp_path / "other")
    code, _, err = command(arguments(place, tmp_path / "run", questions=0, teacher=tmp_path / "other"))
    assert code == 2 and "teacher_weights" in err, err


def test_the_default_teacher_that_is_missing_is_named_with_its_command(tmp_path, command, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, err = command([])
    assert code == 2 and "there is no folder runs/base with a teacher" in err and "train.py" in err
