"""arithmetic.py: problems apart from each other, their tokens, the folder, and what a model gets right."""
import json
import math
import random
from itertools import combinations_with_replacement, islice

import pytest
import tokenizers
import torch

import arithmetic
import rollouts
from arithmetic import how_many, in_words, mean_and_error, problem, sums, tokenizer_for_sums
from bpe import Tokenizer
from chat import CHATML, read_conversations, render, with_chat_tokens
from checkpoint import load_model, save_model
from rewards import REWARDS, Reply
from support import in_process, random_model

SPLITS = ("train", "val")
FEW = ("--learn", 40, "--problems", 60, "--val", 12, "--dim", 16, "--layers", 1)


# ---- problems ----------------------------------------------------------------------------------------------


def test_a_sum_is_answered_with_its_steps_or_without():
    assert [message["content"] for message in problem((17, 58, 23))["messages"]] == [
        "17+58+23", "<think>17+58=75 75+23=98</think><answer>98</answer>"]
    direct = problem((17, 58, 23), think=False)
    assert direct["messages"][1]["content"] == "<answer>98</answer>" and direct["answer"] == "98"


def test_each_step_is_true_and_the_last_is_the_answer():
    for numbers in islice(sums(5, random.Random(0)), 200):
        reply = problem(numbers)["messages"][1]["content"]
        steps = reply.removeprefix("<think>").partition("</think>")[0].split()
        results = [numbers[0]]
        for step, number in zip(steps, numbers[1:], strict=True):
            assert step == f"{results[-1]}+{number}={results[-1] + number}"
            results.append(results[-1] + number)
        assert results[-1] == sum(numbers) and reply.endswith(f"<answer>{sum(numbers)}</answer>")


@pytest.mark.parametrize("think", [True, False])
def test_the_authors_answer_is_worth_all_of_exact_and_format(think):
    one = problem((47, 5, 8, 3), think)
    reply = Reply(one["messages"][-1]["content"], True, 30)
    assert REWARDS["exact"].function(one, reply) == REWARDS["format"].function(one, reply) == 1


def test_no_sum_comes_twice_in_whatever_order_and_all_of_them_come():
    every = {(first, *others) for first in range(10, 100)
             for others in combinations_with_replacement(range(1, 10), 2)}
    assert how_many(3) == len(every) == 90 * 45
    drawn = list(islice(sums(3, random.Random(0)), len(every)))
    assert {(first, *sorted(others)) for first, *others in drawn} == every
    assert list(islice(sums(3, random.Random(0)), 50)) == drawn[:50]
    assert list(islice(sums(3, random.Random(1)), 50)) != drawn[:50]


# ---- tokens ------------------------------------------------------------------------------------------------


def test_a_digit_is_a_token_and_so_is_a_tag_which_stays_ordinary_text():
    tokenizer = with_chat_tokens(tokenizer_for_sums())
    text = "<think>17+58=75 75+123=198</think><answer>198</answer>"
    ids = tokenizer.encode(text)
    assert [tokenizer.decode([id]) for id in ids] == [
        "<think>", *"17+58=75 75+123=198", "</think>", "<answer>", *"198", "</answer>"]
    assert not set(ids) & set(tokenizer.special_tokens.values()) and tokenizer.decode(ids) == text
    prompt, _ = render(problem((17, 5))["messages"][:1], tokenizer, True)
    assert [tokenizer.decode([id]) for id in prompt] == [
        "<|im_start|>", "user", "\n", *"17+5", "<|im_end|>", "\n", "<|im_start|>", "assistant", "\n"]


@pytest.mark.parametrize("text", ["", "<", "<<think>", "</", "<think", "2 < 3 <b>x_1</b>", "日本語 1٣",
                                  "a\r\n \0", "<a b>"])
def test_other_texts_come_back_as_they_were(text):
    tokenizer = tokenizer_for_sums()
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_transformers_tokenizer_gives_the_same_ids(tmp_path):
    ours = tokenizer_for_sums()
    ours.save(tmp_path / "tokenizer.json")
    peer = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    saved = Tokenizer.load(tmp_path / "tokenizer.json")
    for numbers in islice(sums(4, random.Random(0)), 20):
        for message in problem(numbers)["messages"]:
            expected = ours.encode(message["content"])
            assert peer.encode(message["content"]).ids == saved.encode(message["content"]) == expected


# ---- the folder --------------------------------------------------------------------------------------------


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*")
            if path.is_file()}


def test_the_folder_has_what_each_stage_reads_and_nothing_is_in_two_splits(tmp_path, monkeypatch, capsys):
    code, out, err = in_process(monkeypatch, capsys, arithmetic.main, "--out", tmp_path / "a", *FEW)
    assert code == 0, err
    read = {(part, split): list(read_conversations(tmp_path / "a" / part / f"{split}.jsonl"))
            for part in ("sft", "problems") for split in SPLITS}
    assert [len(some) for some in read.values()] == [40, 12, 60, 12]
    assert read["sft", "val"] == read["problems", "val"]
    keys = [(first, *sorted(others)) for part in (("sft", "train"), ("problems", "train"), ("sft", "val"))
            for one in read[part] for first, *others in [one["messages"][0]["content"].split("+")]]
    assert len(keys) == len(set(keys)) == 40 + 60 + 12
    model, tokenizer = load_model(tmp_path / "a" / "start")
    assert model.config.vocab_size == tokenizer.vocab_size and model.config.dim == 16
    assert tokenizer.fingerprint == tokenizer_for_sums().fingerprint


def test_the_folder_is_a_function_of_its_settings(tmp_path, monkeypatch, capsys):
    def made(name, *words):
        words = "--out", tmp_path / name, *FEW, *words
        assert in_process(monkeypatch, capsys, arithmetic.main, *words)[0] == 0
        return contents(tmp_path / name)
    first, again, other, direct = made("a"), made("b"), made("c", "--seed", 1), made("d", "--no-think")
    assert first == again
    changed = {name for name in first if first[name] != other[name]}
    assert changed >= {"sft/train.jsonl", "problems/train.jsonl", "sft/val.jsonl", "start/model.safetensors"}
    for name in ("sft/train.jsonl", "problems/val.jsonl"):
        questions = [[json.loads(line)["messages"][0] for line in some[name].decode().splitlines()]
                     for some in (first, direct)]
        assert questions[0] == questions[1] and first[name] != direct[name], "the same, without steps"


def test_a_folder_is_replaced_only_if_told_to(tmp_path, monkeypatch, capsys):
    words = ("--out", tmp_path / "a", *FEW)
    assert in_process(monkeypatch, capsys, arithmetic.main, *words)[0] == 0
    before = contents(tmp_path / "a")
    code, _, err = in_process(monkeypatch, capsys, arithmetic.main, *words, "--seed", 1)
    assert code == 2 and "exists; pass --overwrite to replace it" in err
    assert contents(tmp_path / "a") == before
    (tmp_path / "a" / "run").mkdir()
    (tmp_path / "a" / "run" / "log.jsonl").write_text("mine", "utf-8")
    assert in_process(monkeypatch, capsys, arithmetic.main, *words, "--seed", 1, "--overwrite")[0] == 0
    after = contents(tmp_path / "a")
    assert after.pop("run/log.jsonl") == b"mine" and after.keys() == before.keys() and after != before


def test_what_cannot_be_written_leaves_what_was_there(tmp_path, monkeypatch, capsys):
    words = ("--out", tmp_path / "a", *FEW)
    assert in_process(monkeypatch, capsys, arithmetic.main, *words)[0] == 0
    before = contents(tmp_path / "a")

    def full(*arguments):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(arithmetic, "save_model", full)
    code, _, err = in_process(monkeypatch, capsys, arithmetic.main, *words, "--overwrite", "--seed", 1)
    assert code == 2 and "No space left on device" in err
    assert contents(tmp_path / "a") == before


@pytest.mark.parametrize("words, told", [
    (("--terms", 1), "--terms 1 is out of range; it must be 2 to 8"),
    (("--terms", 2, "--learn", 700), "at most 80 % are drawn; pass fewer"),
    (("--val", 0), "--val 0 is out of range"),
    (("--dim", 30), "dim 30 is not divisible by n_heads 4"),
    (("--measure", ""), "--measure names no model folder"),
    (("--measure", "x"), "val.jsonl, whose problems are asked; make it with: python arithmetic.py"),
])
def test_a_mistake_ends_in_one_line(words, told, tmp_path, monkeypatch, capsys):
    out = tmp_path / "a"
    code, _, err = in_process(monkeypatch, capsys, arithmetic.main, "--out", out, *words)
    assert code == 2 and told in err
    assert err.count("\n") == 1 and not out.exists()


# ---- what a model gets right -------------------------------------------------------------------------------


def test_the_mean_and_its_error_by_hand():
    assert mean_and_error([0, 1, 1, 0]) == (0.5, pytest.approx(math.sqrt(1 / 3 / 4)))
    assert mean_and_error([1.0]) == (1.0, 0.0)
    assert in_words({"exact, greedy": [0, 1, 1, 0]}) == "exact, greedy 50.0% ± 28.9%"


def test_models_are_measured_on_what_was_held_out(tmp_path, monkeypatch, capsys):
    assert in_process(monkeypatch, capsys, arithmetic.main, "--out", tmp_path / "a", *FEW)[0] == 0
    tokenizer = with_chat_tokens(tokenizer_for_sums(), CHATML)
    save_model(random_model(vocab_size=tokenizer.vocab_size), tokenizer, tmp_path / "model")
    words = ("--measure", tmp_path / "model", "--out", tmp_path / "a", "--max_new_tokens", 8)
    code, out, err = in_process(monkeypatch, capsys, arithmetic.main, *words)
    assert code == 0, err
    assert out.startswith(f"{tmp_path / 'model'}: exact, greedy 0.0% ± 0.0%; exact, sampled 0.0% ± 0.0%")


def test_right_replies_are_counted(tmp_path, monkeypatch):
    """With replies that are the author's for every second problem, half of all is exact."""
    asked = [problem(numbers) for numbers in islice(sums(3, random.Random(0)), 6)]
    said = [one["messages"][-1]["content"] if number % 2 else "<answer>0</answer>"
            for number, one in enumerate(asked)]
    tokenizer = with_chat_tokens(tokenizer_for_sums())
    monkeypatch.setattr(arithmetic, "open_model", lambda folder: (torch.nn.ModuleDict(
        {"lm_head": torch.nn.Linear(1, 1)}), tokenizer))
    monkeypatch.setattr(rollouts, "sample_replies", lambda model, prompts, *some: [
        [{"text": answer, "ended": True, "ids": [0]} for answer in ([text] if some[2] == 1 else [text, "98"])]
        for text in said])
    found = arithmetic.measure("x", asked, arithmetic.Settings(samples=2))
    assert found["exact, greedy"] == found["format, greedy"] == [0, 1] * 3
    assert found["exact, sampled"] == [0, 0.5] * 3
