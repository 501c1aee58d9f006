"""answers.py: which of a teacher's answers a student learns, and the folder that they fill."""
import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch

import answers
import dpo
import rejection
import sft
from answers import distil, passed, without_thoughts
from bpe import Tokenizer
from chat import CHATML, with_chat_tokens
from checkpoint import save_model
from config import UserError
from parallel import Env
from rewards import REWARDS, Reply, Reward, Rewards
from support import in_process, interrupted_once, program, random_model
from work import Work

CPU = Env(torch.device("cpu"))
TOKENIZER = with_chat_tokens(Tokenizer([(b"t", b"h"), (b"th", b"e")], ["<|endoftext|>"]))
END = TOKENIZER.special_tokens[CHATML.end]
THOUGHT = "<think>1+1=2</think><answer>2</answer>"


@pytest.fixture(autouse=True)
def a_reward_that_random_models_meet(monkeypatch):
    """"letters": quarters, so that several answers to a prompt have the same."""
    monkeypatch.setitem(REWARDS, "letters", Reward(letters, 0.0, "quarters of four ASCII letters"))


def letters(question, reply):
    return min(4, sum(char.isascii() and char.isalpha() for char in reply.text)) / 4


def rule(**changes):
    return answers.Settings(**{"teacher": "t", "at_least": 0.5, **changes})


def sample(text, ended=True):
    return {"text": text, "ended": ended, "length": len(text) + ended}


# ---- what is kept ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text, expected", [
    (THOUGHT, "<answer>2</answer>"),
    (f" {THOUGHT}\nThat is all.", "<answer>2</answer>"),
    ("<think>a</think>\n\n    return a", "    return a"),
    ("<think>is it <answer>3</answer>? no</think>2", "2"),
    ("<answer>2</answer>", "<answer>2</answer>"),
    (" just 2\n", " just 2\n"),
    ("", ""),
    ("<think>for ever", ""),
    ("2</think>", ""),
    ("<think>a</think><think>b</think>2", ""),
    ("2 <think>was that right?</think> no, 3", ""),
])
def test_thoughts_and_nothing_else_are_taken_off(text, expected):
    assert without_thoughts(text) == expected


def test_the_best_of_those_that_reach_the_bound_is_kept_and_of_equals_the_first():
    drawn = [sample("a"), sample("b"), sample("c"), sample("d")]
    assert passed(drawn, torch.tensor([0.5, 0.9, 0.9, 0.1]), rule()) == [("b", 0.9)]
    assert passed(drawn, torch.tensor([0.5, 0.4, 0.5, 0.1]), rule()) == [("a", 0.5)]
    assert passed(drawn, torch.tensor([0.4, 0.4, 0.4, 0.1]), rule()) == []


def test_of_all_that_differ_each_is_kept_once_in_the_order_in_which_they_were_drawn():
    drawn = [sample("a"), sample("b"), sample("a"), sample("c"), sample("b")]
    rewards = torch.tensor([0.5, 1.0, 0.75, 0.25, 1.0])
    assert passed(drawn, rewards, rule(keep="all")) == [("a", 0.5), ("b", 1.0)]


def test_an_answer_that_does_not_end_or_says_nothing_is_never_kept():
    drawn = [sample("a", ended=False), sample(" \n"), sample("")]
    for keep in ("best", "all"):
        assert passed(drawn, torch.ones(3), rule(keep=keep, at_least=-1.0)) == []
    assert passed([*drawn, sample("b")], torch.tensor([1.0, 1.0, 1.0, 0.5]), rule()) == [("b", 0.5)]


def test_a_reward_reaches_the_bound_that_is_written_as_it_is():
    assert torch.tensor(0.7).item() < 0.7, "or this test shows nothing"
    assert passed([sample("a")], torch.tensor([0.7]), rule(at_least=0.7)) == [("a", 0.7)]


def test_without_thoughts_answers_that_differ_in_them_alone_are_one():
    drawn = [sample(THOUGHT), sample("<think>easy</think><answer>2</answer>"), sample("<think>lost"),
             sample("<think>all</think> ")]
    assert passed(drawn, torch.ones(4), rule(keep="all", thoughts=False)) == [("<answer>2</answer>", 1.0)]
    assert len(passed(drawn, torch.ones(4), rule(keep="all"))) == 4


# ---- the folder --------------------------------------------------------------------------------------------


def lines_of(path):
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A teacher that babbles, and prompts of unequal length, with keys that we use ourselves."""
    folder = tmp_path_factory.mktemp("answers")
    teacher = random_model(vocab_size=TOKENIZER.vocab_size, max_seq_len=128)
    save_model(teacher, TOKENIZER, folder / "teacher")
    (folder / "chat").mkdir()
    for split, number in (("train", 20), ("val", 5)):
        lines = [json.dumps({"messages": [{"role": "user", "content": "the " + "tea"[i % 3] * (7 * i % 20)},
                                          {"role": "assistant", "content": f"author {i}"}],
                             "number": i, "ids": [i], "split": "mine", "samples": "mine"})
                 for i in range(number)]
        (folder / "chat" / f"{split}.jsonl").write_text("\r\n".join(lines), "utf-8", newline="")
    return folder


def settings_for(place, out, **changes):
    return answers.Settings(**{"teacher": str(place / "teacher"), "prompts_data": str(place / "chat"),
                               "out": str(out), "samples": 6, "max_new_tokens": 40, "prompts_at_once": 4,
                               "prompts": 14, "rewards": ("letters",), **changes})


def content(folder):
    """{name: bytes}; of made.json without the speed."""
    found = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*")
             if path.is_file() and path.name != "lock.tmp"}
    if "made.json" in found:
        made = json.loads(found["made.json"])
        assert made.pop("tokens a second and process") > 0
        found["made.json"] = json.dumps(made)
    return found


def made_with_rows(settings, monkeypatch):
    """(train.jsonl, all that was drawn) of a folder."""
    seen, real = [], answers.finish
    monkeypatch.setattr(answers, "finish", lambda *arguments: seen.append(arguments[2]) or real(*arguments))
    distil(settings, CPU)
    return lines_of(Path(settings.out) / "train.jsonl"), seen[0]


@pytest.fixture(scope="module")
def whole(place):
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(REWARDS, "letters", Reward(letters, 0.0, ""))
        distil(settings_for(place, place / "whole"), CPU)
    return content(place / "whole")


@pytest.mark.parametrize("keep", ["best", "all"])
def test_what_is_kept_is_what_a_search_through_all_that_was_drawn_finds(place, tmp_path, monkeypatch, keep):
    spec = ("letters", "ends=0.25")
    settings = settings_for(place, tmp_path / "a", keep=keep, rewards=spec, at_least=0.5)
    kept, rows = made_with_rows(settings, monkeypatch)
    expected, rewards = {}, Rewards(spec)
    for asked, samples in rows:
        for one in samples:
            worth = letters(None, Reply(one["text"], True, 0)) + 0.25
            if one["ended"] and one["text"].strip() and worth >= 0.5:
                expected.setdefault(asked.conversation["number"], {}).setdefault(one["text"], worth)
    if keep == "best":  # max gives the first of equals
        expected = {number: dict([max(some.items(), key=lambda item: item[1])])
                    for number, some in expected.items()}
    flat = [(number, *pair) for number in sorted(expected) for pair in expected[number].items()]
    assert flat == [(one["number"], one["messages"][-1]["content"], one["reward"]) for one in kept]
    replies = [Reply(one["messages"][-1]["content"], True, 0) for one in kept]
    assert rewards(kept, replies)[0].tolist() == [one["reward"] for one in kept]
    drawn = [one for _, samples in rows for one in samples]
    assert any(not one["ended"] for one in drawn) and len(kept) > 3, "or this test shows nothing"


def test_the_folder_holds_the_prompts_with_all_their_keys_and_the_held_out_as_they_were(place, whole):
    assert set(whole) == {"train.jsonl", "val.jsonl", "made.json"}
    assert whole["val.jsonl"] == (place / "chat" / "val.jsonl").read_bytes()
    originals = {one["number"]: one for one in lines_of(place / "chat" / "train.jsonl")}
    kept = lines_of(place / "whole" / "train.jsonl")
    for one in kept:
        original = originals[one["number"]]
        assert one.pop("reward") >= 0.5
        assert one["messages"][:-1] == original["messages"][:-1]
        assert one["messages"][-1]["role"] == "assistant"
        assert one | {"messages": 0} == original | {"messages": 0}, "a key of the original is lost"
    numbers = [one["number"] for one in kept]
    assert numbers == sorted(numbers), "they stand as in the file of prompts"
    made = json.loads(whole["made.json"])
    assert made["counts"] == {
        "prompts asked": 14, "answers drawn": 14 * 6, "ended": made["counts"]["ended"], "kept": len(kept),
        "prompts with an answer kept": len(kept),
        "tokens of kept answers": sum(len(TOKENIZER.encode(one["messages"][-1]["content"])) + 1
                                      for one in kept)}
    assert len(kept) <= made["counts"]["ended"] < 14 * 6


def test_sft_reads_it(place, whole):
    read = sft.read_splits(sft.Settings(data=str(place / "whole")), CPU)
    assert len(read["train"]) == len(lines_of(place / "whole" / "train.jsonl")) and len(read["val"]) == 5
    kept, examples = sft.examples_of(read["train"], TOKENIZER, CHATML, 127)
    assert len(kept) == len(read["train"]) and all(ids[-2] == END for ids, _ in examples)


def say(monkeypatch, *texts):
    """Have the teacher give these answers, in turn, to each prompt."""
    def replies(model, prompts, tokenizer, stop, samples, *_):
        return [[{"text": text, "ended": True, "ids": [0] * len(text)} for text in texts] for _ in prompts]
    monkeypatch.setattr(rejection, "sample_replies", replies)


def test_a_control_token_that_the_teacher_spells_stays_text(place, tmp_path, monkeypatch):
    text = "end<|im_end|>\n<|im_start|>user\nagain<|endoftext|>"
    say(monkeypatch, text)
    distil(settings_for(place, tmp_path / "a", samples=1), CPU)
    read = sft.read_splits(sft.Settings(data=str(tmp_path / "a")), CPU)["train"]
    special = set(TOKENIZER.special_tokens.values())
    for one, (ids, mask) in zip(*sft.examples_of(read, TOKENIZER, CHATML, 127), strict=True):
        assert one["messages"][-1]["content"] == text
        learnt = [id for id, bit in zip(ids, mask) if bit]
        assert learnt[-1] == END and not special & set(learnt[:-1]), "text became a control token"
        assert TOKENIZER.decode(learnt[:-1]) == text


def test_of_correct_chains_the_answers_alone_can_be_kept(place, tmp_path, monkeypatch):
    say(monkeypatch, THOUGHT.replace("2", "3"), THOUGHT, "<answer>2</answer>")
    (tmp_path / "sums").mkdir()
    for split in ("train", "val"):
        line = {"messages": [{"role": "user", "content": "1+1"}, {"role": "assistant", "content": THOUGHT}]}
        (tmp_path / "sums" / f"{split}.jsonl").write_text(json.dumps(line), "utf-8")
    found = {}
    for thoughts in (True, False):
        for keep in ("best", "all"):
            out = tmp_path / f"{thoughts}-{keep}"
            distil(settings_for(place, out, prompts_data=str(tmp_path / "sums"), samples=3, thoughts=thoughts,
                                rewards=("exact",), keep=keep), CPU)
            found[thoughts, keep] = [one["messages"][-1]["content"] for one in lines_of(out / "train.jsonl")]
    assert found == {(True, "best"): [THOUGHT], (True, "all"): [THOUGHT, "<answer>2</answer>"],
                     (False, "best"): ["<answer>2</answer>"], (False, "all"): ["<answer>2</answer>"]}


def test_the_greedy_answer_is_that_of_sft(place, tmp_path, monkeypatch):
    seen = []  # none of them ends, so that nothing would be kept
    monkeypatch.setattr(answers, "finish", lambda *arguments: seen.append(arguments[2]) or {"counts": {}})
    distil(settings_for(place, tmp_path / "a", temperature=0.0, samples=1), CPU)
    rows, = seen
    model = random_model(vocab_size=TOKENIZER.vocab_size, max_seq_len=128)
    expected = sft.answers(model, [asked.ids for asked, _ in rows], TOKENIZER, [END], 40)
    assert [(one["text"], one["ended"]) for _, (one,) in rows] == expected


def test_all_prompts_are_asked_where_their_number_is_0(place, tmp_path, monkeypatch):
    _, rows = made_with_rows(settings_for(place, tmp_path / "a", prompts=0), monkeypatch)
    assert sorted(asked.conversation["number"] for asked, _ in rows) == list(range(20))


def test_prompts_without_room_are_left_out_and_counted_and_so_are_bad_lines(place, tmp_path, capsys):
    (tmp_path / "chat").mkdir()
    lines = (place / "chat" / "train.jsonl").read_text("utf-8").splitlines()
    for split in ("train", "val"):
        (tmp_path / "chat" / f"{split}.jsonl").write_text("\n".join([*lines[:9], "{", lines[9]]), "utf-8")
    asked = [rejection.render(json.loads(line)["messages"][:-1], TOKENIZER, True)[0] for line in lines[:10]]
    room = sorted(map(len, asked))[5]
    short = sum(len(ids) <= room for ids in asked)
    assert 0 < short < 10, "or this test shows nothing"
    settings = settings_for(place, tmp_path / "a", prompts_data=str(tmp_path / "chat"),
                            max_new_tokens=128 - room)
    with pytest.raises(UserError, match="train.jsonl:10: .*; correct it, or pass --on_bad_line skip"):
        distil(settings, CPU)
    settings.on_bad_line = "skip"
    distil(settings, CPU)
    out = capsys.readouterr().out
    assert f"left out: {10 - short} of 10 prompts, which leave no {128 - room} of the model's 128" in out
    assert f"prompts asked {short}, answers drawn {6 * short}" in out


# ---- once, killed, shared ----------------------------------------------------------------------------------


def test_made_again_it_stays_and_with_another_identity_it_is_refused(place, whole, tmp_path, capsys):
    distil(settings_for(place, place / "whole"), CPU)
    assert "is there already: prompts asked 14" in capsys.readouterr().out
    (tmp_path / "other").mkdir()
    save_model(random_model(vocab_size=TOKENIZER.vocab_size, max_seq_len=128, qk_norm=True), TOKENIZER,
               tmp_path / "other")
    for changes in (dict(seed=1), dict(at_least=0.25), dict(keep="all"), dict(thoughts=False),
                    dict(rewards=("letters=2",)), dict(temperature=0.5),
                    dict(teacher=str(tmp_path / "other"))):
        with pytest.raises(UserError, match="holds answers of another model or of other settings; pass --ov"):
            distil(settings_for(place, place / "whole", **changes), CPU)
    assert content(place / "whole") == whole


def test_overwrite_makes_it_anew_and_deletes_what_was_written_here_alone(place, whole, tmp_path):
    out = tmp_path / "a"
    distil(settings_for(place, out, seed=1), CPU)
    other = content(out)
    (out / "notes.txt").write_text("mine", "utf-8")
    with pytest.raises(UserError, match="leaves 127 of"):  # told of before anything is deleted
        distil(settings_for(place, out, max_new_tokens=127, overwrite=True), CPU)
    assert content(out) == other | {"notes.txt": b"mine"}
    distil(settings_for(place, out, overwrite=True), CPU)
    assert content(out) == whole | {"notes.txt": b"mine"} != other | {"notes.txt": b"mine"}


def test_overwrite_that_is_stopped_leaves_nothing_that_looks_whole(place, whole, tmp_path, monkeypatch):
    distil(settings_for(place, tmp_path / "a"), CPU)
    with monkeypatch.context() as patch:
        patch.setattr(rejection, "sample_replies", None)
        with pytest.raises(TypeError):
            distil(settings_for(place, tmp_path / "a", overwrite=True), CPU)
    assert not (tmp_path / "a" / "made.json").exists()
    distil(settings_for(place, tmp_path / "a"), CPU)
    assert content(tmp_path / "a") == whole


def test_answers_to_prompts_that_have_changed_since_are_refused(place, tmp_path):
    shutil.copytree(place / "chat", tmp_path / "chat")
    settings = settings_for(place, tmp_path / "a", prompts_data=str(tmp_path / "chat"))
    distil(settings, CPU)
    for split in ("train", "val"):
        path = tmp_path / "chat" / f"{split}.jsonl"
        before = path.read_bytes()
        path.write_bytes(before.replace(b"author 1", b"author 9"))
        with pytest.raises(UserError, match="of other settings"):
            distil(settings, CPU)
        path.write_bytes(before)
    distil(settings, CPU)


def test_a_folder_of_another_kind_is_left_alone(place, whole, tmp_path):
    def pairs(out):
        settings = dpo.Settings(prompts_data=str(place / "chat"), samples=6, max_new_tokens=20, margin=1e-6,
                                prompts=4)
        rejection.make_pairs(settings, place / "teacher", out, CPU, overwrite=True)
    with pytest.raises(UserError, match="whole exists and is no folder of pairs"):
        pairs(place / "whole")
    assert content(place / "whole") == whole
    (tmp_path / "pairs").mkdir()
    (tmp_path / "pairs" / "made.json").write_text('{"samples": "x", "rule": "y"}', "utf-8")
    for folder in (tmp_path / "pairs", place / "teacher"):
        before = {path.name: path.read_bytes() for path in folder.iterdir()}
        with pytest.raises(UserError, match="exists and is no folder of answers; choose another place"):
            distil(settings_for(place, folder, overwrite=True), CPU)
        assert before == {path.name: path.read_bytes() for path in folder.iterdir()}


def test_stopped_in_the_middle_it_goes_on_and_ends_in_the_same_bytes(place, whole, tmp_path, monkeypatch):
    drawn = interrupted_once(monkeypatch, rejection, "draw", after=2)
    with pytest.raises(KeyboardInterrupt):
        distil(settings_for(place, tmp_path / "a"), CPU)
    with pytest.raises(UserError, match="of other settings"):
        distil(settings_for(place, tmp_path / "a", samples=5), CPU)
    distil(settings_for(place, tmp_path / "a"), CPU)
    assert sorted(drawn) == list(range(4)), "what was drawn is not drawn again"
    assert content(tmp_path / "a") == whole


def test_where_nothing_passes_the_best_is_told_and_another_rule_draws_nothing_again(place, whole, tmp_path,
                                                                                   monkeypatch):
    with pytest.raises(UserError, match="of the 84 answers drawn none is kept: the best reward of those that "
                                        "end is 1, below --at_least 3"):
        distil(settings_for(place, tmp_path / "a", at_least=3.0), CPU)
    assert not (tmp_path / "a" / "train.jsonl").exists()
    with monkeypatch.context() as patch:
        patch.setattr(rejection, "sample_replies", None)
        distil(settings_for(place, tmp_path / "a"), CPU)
    assert content(tmp_path / "a") == whole


class TwoRanks(Work):
    """The work of two processes, done by one: first what the second would do."""

    def each(self, stage, units, function):
        self.rank, self.world_size = 1, 2
        super().each(stage, units, function, wait=False)
        assert 0 < len(list(self.folder.glob("samples.*.json"))) < units
        self.rank = 0
        return super().each(stage, units, function)


def test_two_ranks_write_the_same_bytes(place, whole, tmp_path, monkeypatch):
    monkeypatch.setattr(rejection, "Work", TwoRanks)
    distil(settings_for(place, tmp_path / "a"), CPU)
    assert content(tmp_path / "a") == whole


def words_for(place, out):
    """As settings_for, but with a reward of the table: other processes know no other."""
    changed = {"rewards": "ends", "samples": 6, "max_new_tokens": 40, "prompts_at_once": 4, "prompts": 14,
               "teacher": place / "teacher", "prompts_data": place / "chat", "out": out}
    return [str(word) for name, value in changed.items() for word in (f"--{name}", value)]


def run_whole(place, out, processes=1):
    command, environment = program("answers.py", words_for(place, out), processes)
    done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", env=environment,
                          timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return content(out)


@pytest.mark.slow
def test_two_processes_and_one_that_is_killed_write_what_one_does(place, tmp_path):
    """kill -9 once the first batches are there; needs a system with signals."""
    one = run_whole(place, tmp_path / "one")
    assert run_whole(place, tmp_path / "two", processes=2) == one
    command, environment = program("answers.py", words_for(place, tmp_path / "killed"))
    first = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not list((tmp_path / "killed").glob("work/samples.*.json")) and first.poll() is None:
        time.sleep(0.001)
    os.kill(first.pid, signal.SIGKILL)
    assert first.wait() == -signal.SIGKILL and not (tmp_path / "killed" / "made.json").exists()
    assert run_whole(place, tmp_path / "killed") == one


# ---- as a command ------------------------------------------------------------------------------------------


def test_the_command_shows_what_it_kept(place, tmp_path, monkeypatch, capsys):
    code, out, err = in_process(monkeypatch, capsys, answers.main, *words_for(place, tmp_path / "a"),
                                "--prompts", "8")
    assert code == 0, err
    kept = lines_of(tmp_path / "a" / "train.jsonl")
    assert f">>> reward 1: {kept[0]['messages'][-1]['content']!r}" in out
    assert f"kept: {len(kept) / 48:.1%} of the answers drawn, one at least to {len(kept) / 8:.1%}" in out
    assert "--out" not in err and "prompts asked 8, answers drawn 48" in out


@pytest.mark.parametrize("changes, words", [
    (dict(teacher="{tmp}/none"), "there is no model folder {tmp}/none, the teacher; python sft.py makes ru"),
    (dict(teacher="{tmp}"), "{tmp} holds no weights: it has no .safetensors file"),
    (dict(prompts_data="{tmp}/none"), "there is no {tmp}/none/train.jsonl; --prompts_data is a folder"),
    (dict(template="llama3"), "does not know <|begin_of_text|> <|start_header_id|>"),
    (dict(max_new_tokens=127), "no prompt of {place}/chat leaves 127 of the model's 128 tokens"),
    (dict(max_new_tokens=1), "drawn none ends by itself with something in it to learn; pass more --max"),
    (dict(at_least=1.5), "the best reward of those that end is 1, below --at_least 1.5; pass a lower one"),
    (dict(temperature=0), "--samples 6 at --temperature 0 would be one answer so many times; pass --sa"),
    (dict(temperature=-1), "--temperature -1.0 is out of range"),
    (dict(samples=0), "--samples 0 is out of range"),
    (dict(prompts=-1), "--prompts -1 is out of range"),
    (dict(rewards="letter"), "unknown reward 'letter'; there are model, exact"),
    (dict(rewards="model"), "--rewards model is a reward model's score"),
    (dict(at_least="nan"), "--at_least: 'nan' is not a finite number"),
    (dict(keep="some"), "--keep: 'some' is not one of best, all"),
    (dict(out="{place}/chat"), "--out {place}/chat is --prompts_data itself"),
    (dict(tensor_parallel=2), "--tensor_parallel 2 is for training; answers are drawn in fp32, by each pro"),
    (dict(precision="bf16"), "--precision bf16 is for training"),
])
def test_mistakes_end_in_one_line_and_code_2(place, tmp_path, monkeypatch, capsys, changes, words):
    def filled(value):
        return str(value).replace("{tmp}", str(tmp_path)).replace("{place}", str(place))
    flags = [word for name, value in changes.items() for word in (f"--{name}", filled(value))]
    code, _, err = in_process(monkeypatch, capsys, answers.main, *words_for(place, tmp_path / "a"), *flags)
    assert code == 2 and filled(words) in err and len(err.splitlines()) == 1, err
    assert not (tmp_path / "a" / "train.jsonl").exists()


def test_memory_that_is_not_enough_is_told_with_what_helps(place, tmp_path, monkeypatch, capsys):
    def full(*arguments):
        raise RuntimeError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has")
    monkeypatch.setattr(rejection, "sample_replies", full)
    code, _, err = in_process(monkeypatch, capsys, answers.main, *words_for(place, tmp_path / "a"))
    assert code == 2 and "a smaller --prompts_at_once (now 4) takes less" in err
