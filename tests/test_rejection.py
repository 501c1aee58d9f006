"""rejection.py: what a rule finds best among a model's own answers, and the folder that it fills."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import dpo
import rejection
import stdlib_chat
from bpe import Tokenizer
from chat import CHATML, with_chat_tokens
from checkpoint import save_model
from config import UserError
from dpo import sequence_logps
from parallel import Env
from rejection import best_answer, make_pairs, preference, quality, sample_replies, sign_test
from support import in_process, interrupted_once, random_model, seeded

ROOT = Path(__file__).resolve().parent.parent
CPU = Env(torch.device("cpu"))
TOKENIZER = with_chat_tokens(Tokenizer([(b"t", b"h"), (b"th", b"e")], ["<|endoftext|>"]))
END = TOKENIZER.special_tokens[CHATML.end]
CODE = 'def f(a, b=1, *rest, c):\n    "doc"'


def describe(answer, question="what?"):
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}],
            "task": "describe"}


def write(code=CODE):
    return {**describe("    pass"), "task": "write", "code": code}


def samples(*pairs):
    return [{"text": text, "ended": True, "score": score} for text, score in pairs]


# ---- the rule ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("answer, ended, expected", [
    ("    return a + b + c + sum(rest)", True, 1.0),
    ("    return a", True, (1 + 1 + 1 / 4) / 3),
    ("    return a", False, (0 + 1 + 1 / 4) / 3),
    ("    return (", True, 1 / 3),
    ("    a = 1", True, 2 / 3),  # written, not read
    ("", True, 1 / 3),
    ("    yield lambda a: a + b", True, (1 + 1 + 2 / 4) / 3),
    ("return c", True, (1 + 1 + 1 / 4) / 3),  # its indentation comes back
])
def test_a_body_is_worth_that_it_compiles_ends_and_uses_its_arguments(answer, ended, expected):
    assert quality(write(), answer, ended) == pytest.approx(expected)


def test_a_function_without_arguments_uses_all_of_them_and_nothing_is_run(tmp_path):
    trace = tmp_path / "trace"
    assert quality(write('def f():\n    "doc"'), f"    open({str(trace)!r}, 'w')", True) == 1.0
    assert not trace.exists()
    assert stdlib_chat.used_arguments(CODE, "    return a\nb") == 1 / 4, "what follows is not the function's"


def test_a_description_is_worth_its_f1_if_it_ends():
    assert quality(describe("b c"), "a b b", True) == pytest.approx(2 / 5)
    assert quality(describe("b c"), "a b b", False) == 0.0


def test_best_against_worst_makes_a_pair_where_they_lie_apart():
    one = describe("author")
    drawn = samples(("x", 0.2), ("y", 0.9), ("z", 0.1), ("w", 0.9), ("v", 0.1))
    assert preference(one, drawn, 0.5) == {"prompt": one["messages"][:1], "chosen": "y", "rejected": "z",
                                           "scores": [0.9, 0.1]}, "of equal ones the first"
    assert preference(one, drawn, 0.81) is None
    assert preference(one, drawn, 0.5, "author")["chosen"] == "author"
    assert preference(one, samples(("x", 0.9), (" ", 0.0)), 0.5) is None, "an empty answer teaches nothing"
    assert preference(one, samples(("same", 0.9), ("same", 0.1)), 0.5) is None


def test_the_margin_itself_is_enough_and_the_prompt_is_all_before_the_last_message():
    before = [{"role": role, "content": role} for role in ("system", "user", "assistant")]
    one = {"messages": [*before, *describe("author")["messages"]]}
    pair = preference(one, samples(("x", 0.25), ("y", 0.75)), 0.5)  # these differ by 0.5 to the last bit
    assert pair is not None, "0.5 apart is at least 0.5 apart"
    assert pair["prompt"] == one["messages"][:4] and (pair["chosen"], pair["rejected"]) == ("y", "x")
    assert preference(one, samples(("x", 0.25), ("y", 0.75)), 0.5, "author")["scores"] == [1.0, 0.25]


def test_the_best_answer_stands_in_the_authors_place_unless_it_is_worth_nothing():
    one = describe("author")
    best = best_answer(one, samples(("x", 0.2), ("y", 0.9)))
    assert best["messages"][-1]["content"] == "y" and best["messages"][:-1] == one["messages"][:-1]
    assert one["messages"][-1]["content"] == "author", "the conversation itself is as it was"
    assert best_answer(one, samples(("x", 0.0), ("y", 0.0))) is None
    assert best_answer(one, [{"text": "x", "ended": False, "score": 0.5}]) is None


# ---- samples -----------------------------------------------------------------------------------------------


def model_for():
    return random_model(vocab_size=TOKENIZER.vocab_size, max_seq_len=128)


def test_samples_come_k_a_prompt_with_the_log_probability_that_the_model_gives_them():
    model, prompts = model_for(), [[5, 6, 7], [8, 9], [10, 11, 12, 13]]
    drawn = sample_replies(model, prompts, TOKENIZER, END, 3, 12, generator=seeded(0))
    assert [len(one) for one in drawn] == [3, 3, 3]
    for prompt, replies in zip(prompts, drawn):
        for reply in replies:
            ids = torch.tensor([prompt + reply["ids"]])
            mask = torch.arange(ids.size(1))[None] >= len(prompt)
            assert reply["logp"] == pytest.approx(sequence_logps(model, ids, mask).item(), abs=1e-3)
            assert reply["ended"] == (reply["ids"][-1] == END)
            assert reply["text"] == TOKENIZER.decode(reply["ids"][:len(reply["ids"]) - reply["ended"]])
    texts = {reply["text"] for replies in drawn for reply in replies}
    assert len(texts) > 3, "they are drawn, not the likeliest"


# ---- the folder --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model, and conversations whose answers have something to do with what it says."""
    folder = tmp_path_factory.mktemp("rejection")
    save_model(model_for(), TOKENIZER, folder / "model")
    (folder / "chat").mkdir()
    for split, number in (("train", 10), ("val", 5)):
        lines = [json.dumps(describe("the e t a", "a" * (i + 1)) if i % 2 else write())
                 for i in range(number)]
        (folder / "chat" / f"{split}.jsonl").write_text("\n".join(lines), "utf-8")
    return folder


def settings_for(place, **changes):
    return dpo.Settings(**{"prompts_data": str(place / "chat"), "samples": 6, "max_new_tokens": 20,
                           "margin": 0.01, "prompts_at_once": 4, "prompts": 8, **changes})


def content(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*")
            if path.is_file() and path.name != "lock.tmp"}


def lines_of(path):
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


@pytest.fixture(scope="module")
def made(place):
    make_pairs(settings_for(place), place / "model", place / "pairs", CPU)
    return place / "pairs"


def test_the_folder_holds_pairs_the_best_and_all_that_is_held_out(made):
    assert set(content(made)) == {"train.jsonl", "val.jsonl", "best/train.jsonl", "best/val.jsonl",
                                  "questions.jsonl", "samples.jsonl", "made.json"}
    rows = lines_of(made / "samples.jsonl")
    assert len(rows) == 8 + 5 and all(len(row["samples"]) == 6 for row in rows)
    assert len(lines_of(made / "questions.jsonl")) == 5
    for split in ("train", "val"):
        by_question = {json.dumps(row["messages"][:-1]): row for row in rows if row["split"] == split}
        for pair in lines_of(made / f"{split}.jsonl"):
            drawn = by_question[json.dumps(pair["prompt"])]["samples"]
            scores = {sample["text"]: sample["score"] for sample in drawn}
            assert scores[pair["chosen"]] == max(scores.values()), "a better one was drawn"
            assert pair["scores"] == [max(scores.values()), min(scores.values())]
    counts = json.loads((made / "made.json").read_text("utf-8"))["counts"]
    assert counts["train pairs"] == len(lines_of(made / "train.jsonl")) and counts["samples"] == 13 * 6
    assert counts["best of 6"] >= counts["mean score"]


def test_made_again_it_stays_and_with_other_settings_it_is_refused(made, place, capsys):
    before = content(made)
    make_pairs(settings_for(place), place / "model", made, CPU)
    assert "is there already" in capsys.readouterr().out and content(made) == before
    with pytest.raises(UserError, match="of another model or of other settings; pass --overwrite"):
        make_pairs(settings_for(place, seed=1), place / "model", made, CPU)
    assert content(made) == before


def test_overwrite_makes_it_anew_and_leaves_strangers_alone(place, tmp_path):
    out = tmp_path / "pairs"
    make_pairs(settings_for(place), place / "model", out, CPU)
    (out / "notes.txt").write_text("mine", "utf-8")
    make_pairs(settings_for(place, seed=1), place / "model", out, CPU, overwrite=True)
    assert (out / "notes.txt").read_text("utf-8") == "mine"
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("mine", "utf-8")
    with pytest.raises(UserError, match="is no folder of pairs"):
        make_pairs(settings_for(place), place / "model", tmp_path / "other", CPU, overwrite=True)
    assert content(tmp_path / "other") == {"thesis.txt": b"mine"}


def test_killed_in_the_middle_it_goes_on_and_ends_in_the_same_bytes(made, place, tmp_path, monkeypatch):
    drawn = interrupted_once(monkeypatch, rejection, "draw", after=2)
    with pytest.raises(KeyboardInterrupt):
        make_pairs(settings_for(place), place / "model", tmp_path / "pairs", CPU)
    make_pairs(settings_for(place), place / "model", tmp_path / "pairs", CPU)
    assert sorted(drawn) == list(range(4)), "what was drawn is not drawn again"
    assert content(tmp_path / "pairs") == content(made)


@pytest.mark.slow
def test_two_processes_make_the_same_folder(made, place, tmp_path):
    words = [str(x) for name, value in vars(settings_for(place)).items()
             if name in ("prompts_data", "samples", "max_new_tokens", "margin", "prompts_at_once", "prompts")
             for x in (f"--{name}", value)]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
               str(ROOT / "dpo.py"), "--make_pairs", "--init_from", str(place / "model"), "--data",
               str(tmp_path / "pairs"), *words]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", timeout=300,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    assert content(tmp_path / "pairs") == content(made)


@pytest.mark.parametrize("changes, words", [
    (dict(prompts_data="{tmp}/none"), "there is no "),
    (dict(max_new_tokens=127), "no prompt of .* leaves 127 of the model's 128 tokens"),
    (dict(margin=1.0), "no two of one prompt lie --margin 1.0 apart"),
])
def test_what_gives_no_pairs_is_told(place, tmp_path, changes, words):
    changes = {name: value.replace("{tmp}", str(tmp_path)) if isinstance(value, str) else value
               for name, value in changes.items()}
    with pytest.raises(UserError, match=words):
        make_pairs(settings_for(place, **changes), place / "model", tmp_path / "pairs", CPU)


def test_a_model_without_a_tokenizer_is_refused(place, tmp_path):
    save_model(model_for(), None, tmp_path / "bare")
    with pytest.raises(UserError, match="has no tokenizer.json"):
        make_pairs(settings_for(place), tmp_path / "bare", tmp_path / "pairs", CPU)


# ---- what models are worth ---------------------------------------------------------------------------------


def test_the_sign_test_by_hand_and_by_scipys_formula():
    assert sign_test([0, 0, 0, 0, 0, 5], [1, 1, 1, 1, 1, 5]) == (5, 0, 2 / 32)
    assert sign_test([1, 1, 0], [1, 0, 1]) == (1, 1, 1.0)
    assert sign_test([], []) == (0, 0, 1.0)
    scipy = pytest.importorskip("scipy.stats")
    for higher, lower in ((12, 3), (3, 12), (30, 29)):
        before, after = [0] * higher + [1] * lower, [1] * higher + [0] * lower
        expected = scipy.binomtest(higher, higher + lower).pvalue
        assert sign_test(before, after)[2] == pytest.approx(expected)


def test_models_are_compared_question_by_question_and_with_the_first(made, place, tmp_path, monkeypatch,
                                                                     capsys):
    save_model(random_model(vocab_size=TOKENIZER.vocab_size, max_seq_len=128, qk_norm=True), TOKENIZER,
               tmp_path / "other")
    words = ["--models", place / "model", tmp_path / "other", place / "model", "--data", made, "--json",
             tmp_path / "figures.json", "--max_new_tokens", "10"]
    code, out, err = in_process(monkeypatch, capsys, rejection.main, *words)
    assert code == 0, err
    assert out.count("0 better, 0 worse, p 1") >= 5, "the third is the first"
    figures = json.loads((tmp_path / "figures.json").read_text("utf-8"))
    assert figures.keys() == {str(place / "model"), str(tmp_path / "other")}
    for values in figures[str(place / "model")].values():
        assert all(0 <= value <= 1 for value in values)
    assert len(figures[str(place / "model")]["greedy: replies that end by themselves"]) == 5


def test_without_questions_the_command_that_makes_them_is_named(place, tmp_path, monkeypatch, capsys):
    words = "--models", place / "model", "--data", tmp_path
    code, _, err = in_process(monkeypatch, capsys, rejection.main, *words)
    assert code == 2 and "make it with: python dpo.py --make_pairs" in err
