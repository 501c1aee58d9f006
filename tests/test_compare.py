"""compare.py: two tokenizers on one text, by kind of text."""
import json
import os
from pathlib import Path

import pytest

import bpe
import compare
from bpe import Tokenizer
from compare import by_kind, coloured, kind_of, longest_tokens, most_split, open_tokenizer, parts_of
from config import UserError
from support import in_process

END = "<|endoftext|>"


@pytest.mark.parametrize("line, kind", [
    ("The quick brown fox jumps over the lazy dog, and it rains.", "English"),
    ("春眠不覺曉,處處聞啼鳥。", "Chinese"), ("12345\t-3.25\t2026-11-26", "numbers"),
    ("    return sorted(words)[:number]", "code"), ("if (x == y) { f(x); }", "code"),
    ("In 1984 there were 12 of them.", "English"), ("Здравствуйте, как дела?", "other"),
    ("", ""), ("---", ""), ("GPT 模型从大量的文字中学习", "Chinese"), ("かなは日本語です", "other")])
def test_the_kind_of_a_line(line, kind):
    assert kind_of(line) == kind


def test_a_text_is_cut_into_runs_of_a_kind_and_nothing_is_lost():
    whole = "Some words.\n\nMore of them.\n春眠不覺曉。\n\n12 34 56\nx = f(y)[0]\n...\n"
    parts = list(by_kind(whole))
    assert [kind for kind, _ in parts] == ["English", "Chinese", "numbers", "code"]
    assert "".join(text for _, text in parts) == whole
    assert parts[0][1] == "Some words.\n\nMore of them.\n", "empty lines go with the line before"


def test_in_files_of_code_comments_and_docstrings_are_what_they_say():
    document = {"text": 'def f():\n    """Returns the number of words in it."""\n    return 1  # 平方\n',
                "source": "a/b.py"}
    parts = list(parts_of(document))
    assert parts[0] == ("code", "def f():\n    \n    return 1  \n")
    assert [kind for kind, _ in parts[1:]] == ["English", "Chinese"]


@pytest.fixture
def folder(tmp_path):
    Tokenizer([], [END]).save(tmp_path / "bytes.json")
    (tmp_path / "ours").mkdir()
    ours = Tokenizer.train(["low lower lowest 春眠春眠春眠"], 256 + 8, [END], workers=1)
    ours.save(tmp_path / "ours" / "tokenizer.json")
    lines = [json.dumps({"text": text}) + "\n" for text in ("low lower lowest\n", "春眠\n")]
    (tmp_path / "t.jsonl").write_text("".join(lines), encoding="utf-8")
    return tmp_path


def test_bytes_a_token_by_kind_and_the_vocabulary_used(folder, monkeypatch, capsys):
    words = ["--tokenizers", folder / "bytes.json", folder / "ours", "--text", folder / "t.jsonl"]
    code, output, errors = in_process(monkeypatch, capsys, compare.main, *words)
    assert code == 0, errors
    ours = Tokenizer.load(folder / "ours" / "tokenizer.json")
    english, chinese = len(ours.encode("low lower lowest\n")), len(ours.encode("春眠\n"))
    rows = {line[:26].strip(): line[26:].split() for line in output.splitlines() if line[:26].strip()}
    assert rows["bytes a token, English"] == ["1.000", f"{17 / english:.3f}", "17", "bytes"]
    assert rows["bytes a token, Chinese"] == ["1.000", f"{7 / chinese:.3f}", "7", "bytes"]
    assert rows["bytes a token, all"] == ["1.000", f"{24 / (english + chinese):.3f}", "24", "bytes"]
    used = len(set(ours.encode("low lower lowest\n") + ours.encode("春眠\n")))
    assert rows["of these in the text"][1] == f"{used / 264:.1%}"
    assert rows["tokens in the vocabulary"] == ["257", "264"]
    assert "words in most tokens: lowest 7, lower 6, low 4" in output  # bytes, and the space before


def test_longest_tokens_are_told_once_and_words_in_most_tokens_first():
    tokenizer = Tokenizer([(b"a", b"b"), (b"ab", b"c"), (b"x", b"y")], ["<|a long special token|>"])
    assert longest_tokens(tokenizer, 2) == [b"abc", b"xy"], "ab is part of abc"
    words = bpe.Counter({"abc": 5, "zzz": 1, "qqq": 2})
    assert most_split(tokenizer, words, 2) == [("qqq", 4), ("zzz", 4)], "of equal ones the frequent first"


def test_the_view_sets_tokens_off_and_counts_those_of_one_character():
    tokenizer = Tokenizer([(b"a", b"b")])
    assert coloured(tokenizer, "abc 字\n", colours=False) == "ab|c| |字³|↵\n"
    seen = coloured(tokenizer, "abc", colours=True)
    assert seen.count("\033[30;48;5;") == 2 and seen.endswith("\033[0m") and "ab\033[0m" in seen


def test_the_view_shows_all_text_whatever_it_is():
    tokenizer = Tokenizer([])
    for whole in ("", "👩‍👩‍👧‍👦", "a\x00b", "\ufffd"):
        shown = coloured(tokenizer, whole, colours=False)
        assert "".join(character for character in shown if character not in "|⁰¹²³⁴⁵⁶⁷⁸⁹") == whole


def test_tokenizers_of_all_kinds_of_files_can_be_compared(folder):
    ours = Tokenizer.train(["low lower lowest"], 256 + 4, [END], "gpt2", workers=1)
    ours.to_tiktoken(folder / "ours.tiktoken")
    (folder / "gpt2").mkdir()
    ours.to_gpt2(folder / "gpt2" / "vocab.json", folder / "gpt2" / "merges.txt")
    for path in (folder / "ours.tiktoken", folder / "gpt2"):
        assert open_tokenizer(str(path), "gpt2").merges == ours.merges
    with pytest.raises(UserError, match="t.jsonl"):
        open_tokenizer(str(folder / "t.jsonl"), "gpt2")


def test_the_command_is_bpe_py_compare(folder, monkeypatch, capsys):
    code, output, errors = in_process(monkeypatch, capsys, bpe.main, "compare", folder / "bytes.json",
                                      folder / "ours", "--show", "low 春")
    assert code == 0 and "bytes.json: 7 tokens\nl|o|w| |春³" in output, errors
    for words, message in ((["compare"], "no tokenizer is named"),
                           (["compare", folder / "absent.json"], "absent.json"),
                           (["compare", "a", "--show", "b", "--top", 3], "--top 3 is for counting"),
                           (["compare", "a", "--pattern", "qwen"], "--pattern qwen is for .tiktoken files"),
                           (["compare", folder / "bytes.json", "--text", folder / "absent"], "absent")):
        code, _, errors = in_process(monkeypatch, capsys, bpe.main, *words)
        assert code == 2 and errors.startswith("error: ") and message in errors
    (folder / "empty.txt").write_text("", encoding="utf-8")
    code, _, errors = in_process(monkeypatch, capsys, bpe.main, "compare", folder / "bytes.json", "--text",
                                 folder / "empty.txt")
    assert code == 2 and "the text is empty" in errors


@pytest.mark.slow
def test_without_text_the_standard_library_is_counted_in_all_kinds(folder, monkeypatch, capsys):
    """Twenty of its modules here: all take half a minute."""
    some = [(path, path.name) for path in sorted(Path(os.__file__).parent.glob("*.py"))[:20]]
    monkeypatch.setattr(compare, "standard_library", lambda: some)
    code, output, errors = in_process(monkeypatch, capsys, bpe.main, "compare", folder / "ours")
    assert code == 0, errors
    assert all(f"bytes a token, {kind}" in output for kind in compare.KINDS[:4])
