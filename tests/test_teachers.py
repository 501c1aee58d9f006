"""teachers.py: who may teach whom; stored answers beside the live ones, and what may befall them."""
import json
import math
import shutil
import threading
from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import distill
import sft
import teachers
from attention import Mask
from batches import IGNORE, Batches
from bpe import Tokenizer
from chat import CHATML, with_chat_tokens
from checkpoint import save_model
from config import UserError
from divergence import Divergence, TopK, linear_kd_loss, log_probabilities
from parallel import Env
from support import random_ids, random_model, run_stage, seeded, write_shards
from teachers import Stored, asked, check_same_tokens, open_teacher, store

CPU = Env(torch.device("cpu"))
MERGES = [(b"t", b"h"), (b"th", b"e")]
TOKENIZER = with_chat_tokens(Tokenizer(MERGES, ["<|endoftext|>"]))  # 261 ids
K, T = 8, 16
IDENTITY = {"teacher": "t", "data": "d", "k": K, "temperature": 1.0, "seq_len": T, "precision": "fp32"}


def teacher_for(**changes):
    return random_model(**{"vocab_size": TOKENIZER.vocab_size, **changes}).requires_grad_(False)


# ---- a teacher that is there -------------------------------------------------------------------------------


def test_a_teacher_is_read_to_be_read_only(tmp_path):
    save_model(random_model(vocab_size=TOKENIZER.vocab_size), TOKENIZER, tmp_path)
    teacher, tokenizer = open_teacher(str(tmp_path), TOKENIZER)
    assert not teacher.training and not any(p.requires_grad for p in teacher.parameters())
    assert tokenizer.fingerprint == TOKENIZER.fingerprint


def test_what_it_says_live_are_its_logits_at_the_targets_without_a_graph():
    teacher, ids = random_model(), random_ids(2, 9)
    valid = torch.rand(2, 9, generator=seeded(0)) < 0.5
    mask = Mask(documents=torch.tensor([[1] * 4 + [2] * 5] * 2))
    live = asked(teacher, ids, mask, valid)
    torch.testing.assert_close(live.hidden @ live.weight.T, teacher(ids, mask=mask)[valid])
    assert not live.hidden.requires_grad and live.hidden.grad_fn is None


def refused(function, *arguments):
    """The one line in which it is refused."""
    with pytest.raises(UserError) as error:
        function(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_teacher_that_cannot_teach_is_refused_in_one_line(tmp_path):
    assert "there is no folder" in refused(open_teacher, str(tmp_path / "none"))
    save_model(teacher_for(), None, tmp_path / "mute")
    assert "has no tokenizer.json that can be read" in refused(open_teacher, str(tmp_path / "mute"))
    save_model(teacher_for(), TOKENIZER, tmp_path / "cut")
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert "model.safetensors" in refused(open_teacher, str(tmp_path / "cut"))
    (tmp_path / "empty").mkdir()
    assert "config.json" in refused(open_teacher, str(tmp_path / "empty"))


NOT_THE_TOKENS = "their tokens are the same, but not the pattern"


@pytest.mark.parametrize("teacher, said", [
    (Tokenizer([MERGES[0], (b"t", b"o")], ["<|endoftext|>"]), "token 257 is b'the' to the student and b'to'"),
    (Tokenizer(MERGES, ["<|end|>"]), "token 258 is b'<|endoftext|>' to the student and b'<|end|>' to the"),
    (Tokenizer(MERGES, ["<|endoftext|>", "<|new|>"]), "token 259 is None to the student and b'<|new|>'"),
    (Tokenizer(MERGES[:1], ["<|endoftext|>"]), "token 257 is b'the' to the student and b'<|endoftext|>'"),
    (Tokenizer(MERGES, ["<|endoftext|>"], "gpt2"), NOT_THE_TOKENS),
    (Tokenizer(MERGES, ["<|endoftext|>"], nfc=True), NOT_THE_TOKENS),
    (Tokenizer(MERGES, ["<|endoftext|>"], ignore_merges=True), NOT_THE_TOKENS),
    (Tokenizer(MERGES[:1], {"the": 257, "<|endoftext|>": 258}), NOT_THE_TOKENS),
], ids=["other token", "other special", "more", "fewer", "pattern", "normal form", "merges", "special"])
def test_tokenizers_are_compared_by_content_and_the_first_difference_is_shown(tmp_path, teacher, said):
    student = Tokenizer(MERGES, ["<|endoftext|>"])
    line = refused(check_same_tokens, teacher, student, "runs/t")
    assert line.startswith(f"the teacher runs/t has another tokenizer than the student: {said}")
    assert "distil on the teacher's answers instead (answers.py)" in line
    check_same_tokens(Tokenizer(MERGES, ["<|endoftext|>"]), student, "runs/t")
    save_model(random_model(vocab_size=teacher.vocab_size), teacher, tmp_path)
    assert said in refused(open_teacher, str(tmp_path), student), "and so once it is saved and read again"


# ---- answers that are stored -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """A folder with 13 windows of text or more."""
    texts = {"train": ["the cat sat on the mat; " * 8, "then the dog 天地 " * 4],
             "val": ["the cat and the mat " * 4]}
    return write_shards(tmp_path_factory.mktemp("shards"), texts, TOKENIZER)


def talks(number):
    return [{"messages": [{"role": "user", "content": "the a " * (i % 3)},
                          {"role": "assistant", "content": "b the" * (1 + i % 4)}]} for i in range(number)]


def batches_of(kind, shards, batch_size=4):
    if kind == "text":
        return Batches(shards, "train", batch_size, T)
    examples = sft.examples_of(talks(30), TOKENIZER, CHATML, 64)[1]
    return sft.Packed(examples, batch_size, 64)


def live_answers(teacher, batches, windows, k, temperature):
    inputs, targets, *documents = batches.stack(windows)
    mask = Mask(documents=documents[0]) if documents else None
    logits = teacher(inputs, mask=mask)[targets != IGNORE]
    return TopK.of(log_probabilities(logits, temperature), k)


@pytest.mark.parametrize("kind", ["text", "conversations"])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_what_is_read_back_is_what_the_teacher_says_but_for_the_rounding(tmp_path, shards, kind, temperature):
    teacher, batches = teacher_for(), batches_of(kind, shards)
    store(teacher, batches, np.arange(batches.windows), K, temperature, tmp_path / "a", IDENTITY, CPU)
    stored = Stored(tmp_path / "a", IDENTITY, np.arange(batches.windows))
    last = batches.windows - 1
    for windows in ([0], [3, 1, 3, last], [last], list(range(batches.windows))):
        found, live = stored.of(windows), live_answers(teacher, batches, windows, K, temperature)
        assert torch.equal(found.ids, live.ids), "the answers of other windows, or in another order"
        # float16 has 11 bits, 2^-25 near 0; then all is divided by a sum, off by no more than its terms
        rounding = live.logps.abs() * 2 ** -11 + 2 ** -25
        of_sum = (live.logps + rounding).logsumexp(-1, keepdim=True)
        error = (found.logps - live.logps).abs()
        assert (error <= rounding + of_sum + 1e-5).all(), error.max()  # 1e-5: kernels of other shapes
        torch.testing.assert_close(found.logps.exp().sum(-1), torch.ones(len(found.logps)))
        large = live.logps > -16
        assert (error[large].exp() - 1).max() < 0.01, "the docstring says: less than 1 %"


def test_windows_may_be_some_of_all(tmp_path, shards):
    teacher, batches, some = teacher_for(), batches_of("text", shards), np.array([2, 5, 11])
    store(teacher, batches, some, K, 1.0, tmp_path / "a", IDENTITY, CPU)
    found = Stored(tmp_path / "a", IDENTITY, some).of([11, 2])
    assert torch.equal(found.ids, live_answers(teacher, batches, [11, 2], K, 1.0).ids)


def test_rows_of_the_head_that_no_token_has_are_not_among_the_likeliest(tmp_path, shards):
    teacher, batches = teacher_for(vocab_size=TOKENIZER.vocab_size + 9), batches_of("text", shards)
    teacher.lm_head.weight[TOKENIZER.vocab_size:] *= 30
    store(teacher, batches, np.arange(3), K, 1.0, tmp_path / "a", IDENTITY, CPU, tokens=TOKENIZER.vocab_size)
    found = Stored(tmp_path / "a", IDENTITY, np.arange(3)).of([0, 1])
    logits = teacher(batches.stack([0, 1])[0]).flatten(0, 1)[:, :TOKENIZER.vocab_size]
    live = TopK.of(log_probabilities(logits), K)
    assert torch.equal(found.ids, live.ids), "a student whose head has fewer rows to spare has no such token"
    torch.testing.assert_close(found.logps, live.logps, rtol=2e-3, atol=2e-3)  # float16


@pytest.mark.parametrize("kind", ["text", "conversations"])
def test_in_a_lesson_each_answer_stands_at_its_target(tmp_path, shards, kind):
    """A student that is the teacher has nothing to learn from it; from answers shifted by one, it has."""
    teacher, batches = teacher_for(), batches_of(kind, shards)
    store(teacher, batches, np.arange(batches.windows), K, 1.0, tmp_path / "a", IDENTITY, CPU)
    lessons = distill.Lessons(batches, Stored(tmp_path / "a", IDENTITY, np.arange(batches.windows)))
    settings = SimpleNamespace(match=None, kd_weight=1.0, divergence=Divergence())
    for step in (0, 2):
        [lesson] = lessons.at(step)
        loss, n, _ = distill.lesson_loss(teacher, (lesson,), None, settings)
        assert n == len(lesson.top.ids) and loss / n < 1e-5
        shifted = TopK(lesson.top.ids.roll(1, 0), lesson.top.logps.roll(1, 0))
        hidden = teacher.model(lesson.inputs, mask=None if lesson.documents is None else
                               Mask(documents=lesson.documents))[lesson.targets != IGNORE]
        targets = lesson.targets[lesson.targets != IGNORE]
        assert linear_kd_loss(hidden, teacher.lm_head.weight, shifted, targets)[0] / n > 0.1


def test_bytes_are_as_said_before_a_line_is_written(tmp_path, shards, capsys):
    for k, kind in ((K, "text"), (3, "conversations"), (64, "text")):
        batches, folder = batches_of(kind, shards), tmp_path / f"{k}"
        store(teacher_for(), batches, np.arange(batches.windows), k, 1.0, folder, IDENTITY, CPU)
        said = capsys.readouterr().out
        a_token = 2 * k + 2 * (k + 1)
        assert f"to be stored: {a_token} bytes a token (k = {k}), some {batches.tokens:,} tokens" in said
        assert k != 64 or a_token == 258, "the docstring's number"
        tokens = sum((batches.stack([w])[1] != IGNORE).sum().item() for w in range(batches.windows))
        sizes = {path.name: path.stat().st_size for path in folder.iterdir() if path.suffix == ".bin"}
        assert sizes == {"ids.bin": tokens * 2 * k, "logps.bin": tokens * 2 * (k + 1),
                         "windows.bin": 8 * batches.windows, "counts.bin": 4 * batches.windows}
        assert sizes["ids.bin"] + sizes["logps.bin"] == tokens * a_token
        left = {path.name for path in folder.iterdir()} - {*sizes, "meta.json", "lock.tmp"}
        assert not left, "work that is done is cleared away"


def test_a_large_vocabulary_has_ids_of_four_bytes(tmp_path, shards):
    teacher = teacher_for(vocab_size=70_000, dim=8, n_layers=1, n_heads=2, n_kv_heads=1, ffn_dim=8)
    teacher.lm_head.weight[69_990:] *= 30  # by far the likeliest, or the unlikeliest
    batches = batches_of("text", shards)
    store(teacher, batches, np.arange(3), K, 1.0, tmp_path / "a", IDENTITY, CPU)
    found, live = Stored(tmp_path / "a", IDENTITY, np.arange(3)).of([0, 2]), \
        live_answers(teacher, batches, [0, 2], K, 1.0)
    assert json.loads((tmp_path / "a" / "meta.json").read_text("utf-8"))["dtype"] == "uint32"
    assert torch.equal(found.ids[:, :2], live.ids[:, :2]) and found.ids.max() > 65_535
    assert (tmp_path / "a" / "ids.bin").stat().st_size == 3 * T * K * 4


# ---- what may befall them ----------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path, shards):
    """Answers about windows 0 to 4."""
    store(teacher_for(), batches_of("text", shards), np.arange(5), K, 1.0, tmp_path / "a", IDENTITY, CPU)
    return tmp_path / "a"


@pytest.mark.parametrize("name", teachers.FILES)
def test_a_flipped_bit_a_cut_file_and_a_missing_one_are_seen(folder, name):
    path, whole = folder / name, (folder / name).read_bytes()
    for damaged in (whole[:7] + bytes([whole[7] ^ 1]) + whole[8:], whole[:-1], whole + b"\0", None):
        path.unlink()
        if damaged is not None:
            path.write_bytes(damaged)
        line = refused(Stored, folder, IDENTITY, np.arange(5))
        assert f"{path} is missing or damaged" in line and "delete" in line
        path.write_bytes(whole)
    Stored(folder, IDENTITY, np.arange(5))


@pytest.mark.parametrize("content, words", [
    ("{", "is damaged"), ("[]", "is not a JSON object"), (None, "has no meta.json"),
    (json.dumps(IDENTITY), "is damaged"), ('{"dtype": "uint16"}', "is not that of a teacher's answers"),
    (json.dumps(IDENTITY | {"dtype": "O", "sha256": {}}), "is damaged")])
def test_a_damaged_meta_is_seen(folder, content, words):
    (folder / "meta.json").unlink()
    if content is not None:
        (folder / "meta.json").write_text(content, encoding="utf-8")
    assert words in refused(Stored, folder, IDENTITY, np.arange(5))


def test_ids_of_another_width_than_meta_says_are_seen(folder):
    meta = json.loads((folder / "meta.json").read_text("utf-8"))
    for changes, damaged in (({"dtype": "uint32"}, True), ({"k": float(K)}, False)):
        (folder / "meta.json").write_text(json.dumps(meta | changes), "utf-8")
        if damaged:
            assert "is damaged: ids.bin is not of uint32" in refused(Stored, folder, IDENTITY, np.arange(5))
        else:
            Stored(folder, IDENTITY, np.arange(5)).of([1])


@pytest.mark.parametrize("name", ["thesis.txt", "work/thesis.txt", "train.jsonl"])
def test_a_folder_with_anything_else_is_left_as_it_was(tmp_path, shards, name):
    (tmp_path / "mine" / name).parent.mkdir(parents=True)
    (tmp_path / "mine" / name).write_text("years of work", "utf-8")
    line = refused(store, teacher_for(), batches_of("text", shards), np.arange(5), K, 1.0, tmp_path / "mine",
                   IDENTITY, CPU)
    assert f"mine holds {name}, which is none of a teacher's answers" in line
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == [name.rpartition("/")[2]]


@pytest.mark.parametrize("what, other", [("teacher", "u"), ("data", "e"), ("k", 9), ("temperature", 2.0),
                                         ("seq_len", 32), ("precision", "bf16")])
def test_answers_of_another_kind_are_refused(folder, what, other):
    line = refused(Stored, folder, IDENTITY | {what: other}, np.arange(5))
    assert f"answers of another {what} ({IDENTITY[what]}, not {other}); pass another --stored" in line


def test_windows_that_were_not_asked_about_are_named_whenever_they_are_wanted(folder):
    line = refused(Stored, folder, IDENTITY, np.arange(3, 8))
    assert "answers about 5 windows, but not about 3 that this run sees, such as 5" in line
    stored = Stored(folder, IDENTITY, np.arange(5))
    assert "not about 1 that this run sees, such as 9" in refused(stored.of, [2, 9]), \
        "after a rollback a run sees other windows; the answers of the nearest one are not theirs"


def test_a_disk_without_room_is_told_before_anything_is_written(tmp_path, shards, monkeypatch, capsys):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=2 ** 10))
    target = tmp_path / "deep" / "a"
    batches = batches_of("text", shards)
    line = refused(store, teacher_for(), batches, np.arange(5), K, 1.0, target, IDENTITY, CPU)
    assert "are needed meanwhile in" in line and "pass a smaller --top_k" in line
    assert not list(tmp_path.iterdir()) and "to be stored: 34 bytes a token" in capsys.readouterr().out


@pytest.mark.parametrize("k", [261, 1000])
def test_as_many_tokens_as_there_are_is_no_choice(tmp_path, shards, k):
    line = refused(store, teacher_for(), batches_of("text", shards), np.arange(5), k, 1.0, tmp_path / "a",
                   IDENTITY, CPU)
    assert f"--top_k {k} is no fewer than the teacher's 261 tokens" in line and not (tmp_path / "a").exists()


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "lock.tmp"}


def stop_at(monkeypatch, unit):
    """Asking about this unit is interrupted; returns the list of units that are asked about."""
    ask, units = teachers.ask_about, []

    def asks(*arguments):
        units.append(arguments[-1])
        if arguments[-1] == unit:
            raise KeyboardInterrupt
        return ask(*arguments)
    monkeypatch.setattr(teachers, "ask_about", asks)
    return units


def test_killed_in_the_middle_it_goes_on_and_ends_in_the_same_bytes(tmp_path, shards, monkeypatch):
    monkeypatch.setattr(teachers, "UNIT", 2)
    teacher, batches = teacher_for(), batches_of("text", shards)

    def write(name, windows=np.arange(7), identity=IDENTITY):
        store(teacher, batches, windows, K, 1.0, tmp_path / name, identity, CPU)
    write("whole")
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        stop_at(patched, 2)
        write("cut")
    assert not (tmp_path / "cut" / "meta.json").exists(), "half of the answers pass for all"
    with monkeypatch.context() as patched:
        units = stop_at(patched, None)
        write("cut")
    assert units == [2, 3], "what was there is asked again, or was lost"
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")
    write("joined")
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):  # while the parts are joined
        patched.setattr(teachers, "file_checksum", lambda path: (_ for _ in ()).throw(KeyboardInterrupt))
        write("joined", np.arange(1, 8))
    assert not (tmp_path / "joined" / "meta.json").exists(), "the old one vouches for new files"
    write("joined")
    assert contents(tmp_path / "joined") == contents(tmp_path / "whole")


def test_what_was_begun_about_other_windows_or_by_another_teacher_is_not_gone_on_with(tmp_path, shards,
                                                                                      monkeypatch):
    monkeypatch.setattr(teachers, "UNIT", 2)
    batches, other = batches_of("text", shards), np.array([1, 4, 5, 9])
    store(teacher_for(), batches, other, K, 1.0, tmp_path / "right", IDENTITY, CPU)
    begun = {"windows": (np.arange(6), IDENTITY), "teacher": (other, IDENTITY | {"teacher": "u"})}
    for name, (windows, identity) in begun.items():
        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            stop_at(patched, 1)
            store(teacher_for(tie_embeddings=True), batches, windows, K, 1.0, tmp_path / name, identity, CPU)
        store(teacher_for(), batches, other, K, 1.0, tmp_path / name, IDENTITY, CPU)
        assert contents(tmp_path / name) == contents(tmp_path / "right"), name


@dataclass
class Thread(Env):
    """An Env whose processes are threads: what they ask each other goes over a list."""
    meeting: threading.Barrier = None
    flags: dict = field(default_factory=dict)

    def any(self, flag, patient=False):
        self.flags[self.rank] = flag
        self.meeting.wait(timeout=60)
        result = any(self.flags.values())
        self.meeting.wait(timeout=60)
        return result


@pytest.mark.parametrize("kind", ["text", "conversations"])
def test_several_processes_write_the_bytes_of_one(tmp_path, shards, monkeypatch, kind):
    monkeypatch.setattr(teachers, "UNIT", 3)
    monkeypatch.setattr(teachers, "AT_ONCE", 100)
    teacher, one = teacher_for(), batches_of(kind, shards)
    windows, read = np.arange(one.windows), []
    teacher.model.register_forward_pre_hook(lambda _, arguments: read.append(tuple(arguments[0].shape)))
    store(teacher, one, windows, K, 1.0, tmp_path / "one", IDENTITY, CPU)
    alone, read[:] = sorted(read), []
    meeting, flags, errors = threading.Barrier(2), {}, []

    def process(rank):
        env = Thread(torch.device("cpu"), rank=rank, world_size=2, meeting=meeting, flags=flags)
        try:
            halved = batches_of(kind, shards, batch_size=2)
            store(teacher, halved, windows, K, 1.0, tmp_path / "two", IDENTITY, env)
        except BaseException as error:  # told to the test, which waits for the threads
            errors.append(error)
    threads = [threading.Thread(target=process, args=(rank,), daemon=True) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert not errors, errors
    assert sorted(read) == alone, "the last bits depend on how many windows are read at once: always as many"
    assert contents(tmp_path / "two") == contents(tmp_path / "one")


@pytest.mark.slow
def test_two_real_processes_store_and_learn_what_one_does(tmp_path, shards):
    save_model(teacher_for(), TOKENIZER, tmp_path / "teacher")
    logs = []
    for processes in (1, 2):
        words = {"teacher": tmp_path / "teacher", "data": shards, "out": tmp_path / f"run{processes}",
                 "top_k": K, "stored": tmp_path / f"stored{processes}", "dim": 16, "seq_len": T,
                 "batch_size": 4, "steps": 4, "bigram_steps": 0, "questions": 0, "device": "cpu",
                 "precision": "fp32", "compile": "false", "warmup_steps": 1, "save_every": 2}
        words = [word for name, value in words.items() for word in (f"--{name}", str(value))]
        logs.append(run_stage("distill.py", words, processes))
    assert contents(tmp_path / "stored1") == contents(tmp_path / "stored2")
    for one, two in zip(*logs, strict=True):
        for name in ("kd_nats_per_token", "ce_nats_per_token", "grad_norm"):
            assert one[name] == pytest.approx(two[name], rel=1e-3), "float32 sums in another order"


def test_from_stored_answers_a_student_learns_its_teacher(tmp_path, shards):
    teacher, batches = teacher_for(), batches_of("text", shards)
    windows, identity = np.arange(batches.windows), IDENTITY | {"k": 32}
    store(teacher, batches, windows, 32, 1.0, tmp_path / "a", identity, CPU)
    lessons = distill.Lessons(batches, Stored(tmp_path / "a", identity, windows))
    student = random_model(vocab_size=TOKENIZER.vocab_size, dim=16, n_kv_heads=4)
    optimizer = torch.optim.Adam(student.parameters(), lr=0.02)
    settings, losses = SimpleNamespace(match=None, kd_weight=1.0, divergence=Divergence()), []
    for step in range(80):
        loss, n, _ = distill.lesson_loss(student, lessons.at(step), None, settings)
        optimizer.zero_grad()
        (loss / n).backward()
        optimizer.step()
        losses.append(loss.item() / n.item())
    assert losses[-1] < 0.5 * losses[0] and math.isfinite(losses[-1])
