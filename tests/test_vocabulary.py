"""vocabulary.py: further merges behind those of a trained tokenizer, and rows that begin with sense."""
import json
import pickle
from collections import Counter
from itertools import pairwise

import pytest
import tokenizers
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

import vocabulary
from bpe import BYTES, PATTERN, Tokenizer, merge
from checkpoint import load_model, save_model
from config import UserError
from support import CLOSE, in_process, random_ids, random_model
from test_bpe import AWKWARD, END, PROSE
from vocabulary import extend_embeddings, pieces_of_new

POEM = "春眠不覺曉,處處聞啼鳥。夜來風雨聲,花落知多少。床前明月光,疑是地上霜。舉頭望明月,低頭思故鄉。"


@pytest.fixture(scope="module")
def old():
    return Tokenizer.train([PROSE], 330, [END, "<|user turn|>"], workers=1)


# --- Further merges -----------------------------------------------------------------------------------------


def test_further_merges_by_hand():
    old = Tokenizer([(b"a", b"b")], [END])
    new = old.extend(["abab ab", "cd cd cd"], 2)  # (c, d) occurs 3 times; (" ", cd) 2 times; (ab, ab) once
    assert new.merges == [(b"a", b"b"), (b"c", b"d"), (b" ", b"cd")]
    assert new.vocab[258] == b"cd" and new.vocab[259] == b" cd" and new.special_tokens == {END: 257}
    assert new.encode("ab cd") == [256, 259]


def test_extending_on_the_same_text_is_going_on_with_training():
    whole = Tokenizer.train([PROSE], 256 + 60)
    assert Tokenizer.train([PROSE], 256 + 25).extend([PROSE], 35).merges == whole.merges
    assert Tokenizer([]).extend([PROSE], 60).fingerprint == whole.fingerprint


def extended_plainly(old: Tokenizer, texts, number: int):
    """The merges, recounted each time: what Tokenizer.extend must equal."""
    words = [[old.vocab[id] for id in old.encode(piece)]
             for text in texts for piece in sum(pieces_of(text, old.pattern), [])]
    known, merges = set(old.vocab.values()), []
    while len(merges) < number:
        counts = Counter(pair for word in words for pair in pairwise(word) if b"".join(pair) not in known)
        if not counts:
            break
        merges.append(max(counts, key=lambda pair: (counts[pair], pair)))
        known.add(b"".join(merges[-1]))
        words = [merge(word, merges[-1]) for word in words]
    return old.merges + merges


def pieces_of(text, pattern):
    from bpe import split
    return list(split(text, pattern))


few_letters = st.lists(st.text(st.sampled_from("aabc "), max_size=25), max_size=5)


@given(few_letters, few_letters, st.integers(1, 12), st.integers(1, 12))
@settings(max_examples=200, deadline=None)
def test_further_merges_equal_those_of_counting_anew_each_time(first, then, number, more):
    pieces = sum((sum(pieces_of(text, PATTERN), []) for text in first), [])
    from bpe import learn_merges
    old = Tokenizer(learn_merges(Counter(pieces), number))
    expected = extended_plainly(old, then, more)
    found = len(expected) - len(old.merges)
    if found < more:
        with pytest.raises(UserError, match=f"new_tokens {more} is more than .* at most {found};"):
            old.extend(then, more, workers=1)
    if found:
        assert old.extend(then, found, workers=1).merges == expected


def test_old_ids_stay_what_they_were_and_new_ones_stand_behind_them(old):
    new = old.extend([POEM] * 3, 40)
    assert new.vocab_size == old.vocab_size + 40 and new.merges[:len(old.merges)] == old.merges
    assert {id: new.vocab[id] for id in old.vocab} == old.vocab and new.special_tokens == old.special_tokens
    for whole in [*AWKWARD, PROSE, POEM]:
        assert new.decode(old.encode(whole)) == new.decode(new.encode(whole)) == whole
    assert len(new.encode(POEM)) < len(old.encode(POEM)) * 0.8
    assert new.encode("lower words") == old.encode("lower words"), "text without the new merges changed"


@pytest.mark.parametrize("settings", [{}, {"nfc": True}, {"ignore_merges": True}])
def test_an_extended_tokenizer_is_saved_and_has_the_same_ids_in_tokenizers(old, settings, tmp_path):
    old = Tokenizer(old.merges, old.special_tokens, **settings)
    new = old.extend([POEM, "cafe\u0301 café"], 40)
    assert (new.nfc, new.ignore_merges) == (old.nfc, old.ignore_merges)
    new.save(tmp_path / "t.json")
    assert Tokenizer.load(tmp_path / "t.json").fingerprint == new.fingerprint
    assert pickle.loads(pickle.dumps(new)).fingerprint == new.fingerprint
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "t.json"))
    for whole in [*AWKWARD, PROSE, POEM, f"{POEM}{END}a<|user turn|>曉"]:
        assert new.encode(whole, allow_special=True) == theirs.encode(whole).ids


def test_an_extended_tokenizer_is_written_for_tiktoken_too(old, tmp_path):
    import tiktoken
    from tiktoken.load import load_tiktoken_bpe
    new = old.extend([POEM], 40)
    new.to_tiktoken(tmp_path / "t.tiktoken")
    theirs = tiktoken.Encoding("t", pat_str=PATTERN, special_tokens=new.special_tokens,
                               mergeable_ranks=load_tiktoken_bpe(str(tmp_path / "t.tiktoken")))
    for whole in [*AWKWARD, PROSE, POEM]:
        assert new.encode(whole) == theirs.encode_ordinary(whole)


def test_processes_count_the_same(old):
    texts = [POEM * 9000] * 3  # more than one batch, so that processes are started
    assert old.extend(texts, 30, workers=2).merges == old.extend(texts[:1], 30, workers=1).merges


def test_a_pair_that_is_a_token_already_stays_a_pair():
    old = Tokenizer([(b"b", b"c")], (), r"\w+|\W+", {**dict(enumerate(BYTES)), 256: b"bc", 257: b"abc"})
    assert old.encode("abc") == [97, 256]  # no merge leads to 257
    assert old.extend(["abc abc abc xy"], 1).merges[1:] == [(b"x", b"y")]


def test_special_tokens_are_taken_out_and_what_is_no_text_is_refused(old):
    with pytest.raises(UserError, match="at most 0"):
        old.extend([END * 5], 1)
    with pytest.raises(UserError, match="text must be str, not bytes"):
        old.extend([b"bytes"], 1)
    with pytest.raises(UserError, match="pass a list"):
        old.extend("text", 1)


# --- Rows ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("spare", [0, 25])
def test_a_new_row_is_the_mean_of_the_rows_of_its_old_pieces(old, tied, spare):
    """With rows to spare, too, of which new tokens take the first."""
    model = random_model(vocab_size=old.vocab_size + spare, tie_embeddings=tied)
    tables = [table.weight.detach().clone() for table in (model.model.embed_tokens, model.lm_head)]
    ids = random_ids(2, 9, vocab_size=old.vocab_size)
    before = model(ids)
    new = old.extend([POEM], 10).with_special_tokens(["<|new turn|>"])
    extend_embeddings(model, old, new)
    assert model.config.vocab_size == max(new.vocab_size, old.vocab_size + spare)
    for table, was in zip((model.model.embed_tokens, model.lm_head), tables):
        assert torch.equal(table.weight[:old.vocab_size], was[:old.vocab_size])
        for id in range(old.vocab_size, new.vocab_size):
            pieces = [old.vocab[piece] for piece in pieces_of_new(old, new)[id]]
            assert b"".join(pieces) == new.vocab[id] and len(pieces) > 1
            assert_close(table.weight[id], was[pieces_of_new(old, new)[id]].mean(0), **CLOSE)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert_close(model(ids)[..., :old.vocab_size], before[..., :old.vocab_size], **CLOSE)


def test_pieces_are_those_that_the_old_tokenizer_makes_of_a_token(old):
    new = old.extend([PROSE * 2], 30)
    for id, pieces in pieces_of_new(old, new).items():
        text = new.vocab[id].decode("utf-8", errors="ignore")
        if text.encode() == new.vocab[id]:  # not half a character
            assert pieces == old.encode(text)


def test_all_rows_mean_is_that_of_extend_embedding(old):
    new, model = old.extend([POEM], 5), random_model(vocab_size=old.vocab_size)
    was = model.lm_head.weight.detach().clone()
    extend_embeddings(model, old, new, rows="all")
    assert_close(model.lm_head.weight[-5:], was.mean(0).expand(5, -1), **CLOSE)


def test_a_tokenizer_that_is_not_the_old_one_extended_is_refused(old):
    model = random_model(vocab_size=old.vocab_size)
    for other in (Tokenizer.train([POEM], 290, [END], workers=1),
                  Tokenizer(old.merges[:-1], list(old.special_tokens))):
        with pytest.raises(UserError, match="is not the old one extended"):
            extend_embeddings(model, old, other)


# --- The command --------------------------------------------------------------------------------------------


@pytest.fixture
def folder(old, tmp_path):
    """With a model, and poems to extend it on: no two are equal, as equal documents are read once."""
    save_model(random_model(vocab_size=old.vocab_size, max_seq_len=32), old, tmp_path / "base")
    with open(tmp_path / "poems.jsonl", "w", encoding="utf-8") as file:
        for i in range(60):
            file.write(json.dumps({"text": POEM[i % 30:] + POEM[:i % 17]}) + "\n")
    return tmp_path


def test_the_command_extends_tokenizer_and_model_and_says_what_it_did(folder, old, monkeypatch, capsys):
    words = ["--model", folder / "base", "--text", folder / "poems.jsonl", "--new_tokens", 20, "--workers", 1,
             "--val_fraction", 0.2, "--out", folder / "grown"]
    code, output, errors = in_process(monkeypatch, capsys, vocabulary.main, *words)
    assert code == 0, errors
    assert "20 tokens learned from" in output and "bytes a token of" in output
    figures = [float(line.split(": ")[1].split()[0]) for line in output.splitlines()
               if "bits per byte" in line or "untrained" in line]
    assert len(figures) == 3 and all(0 < figure < 100 for figure in figures)
    model, new = load_model(folder / "grown")
    assert model.config.vocab_size == new.vocab_size == old.vocab_size + 20
    base, _ = load_model(folder / "base")
    extend_embeddings(base, old, new)
    assert torch.equal(base.lm_head.weight, model.lm_head.weight)
    code, _, errors = in_process(monkeypatch, capsys, vocabulary.main, *words)
    assert code == 2 and "pass --overwrite" in errors


def test_without_a_model_a_tokenizer_is_written(folder, monkeypatch, capsys):
    words = ["--text", folder / "poems.jsonl", "--new_tokens", 20, "--workers", 1, "--val_fraction", 0.2]
    code, _, errors = in_process(monkeypatch, capsys, vocabulary.main, *words, "--tokenizer",
                                 folder / "base", "--out", folder / "new.json")
    assert code == 0, errors
    assert len(Tokenizer.load(folder / "new.json").merges) == 20 + len(Tokenizer.load(
        folder / "base" / "tokenizer.json").merges)
    for more, message in (([], "--model or --tokenizer"), (["--tokenizer", folder / "absent"], "absent"),
                          (["--tokenizer", folder / "base", "--new_tokens", 10 ** 6], "is more than these")):
        code, _, errors = in_process(monkeypatch, capsys, vocabulary.main, *words, *more, "--out",
                                     folder / "x")
        assert code == 2 and message in errors and errors.startswith("error: ")
    assert not (folder / "x").exists()


def test_bits_per_byte_are_those_of_the_loss_on_every_token(old):
    """One window, by hand: all but the first token of the row are targets, end-of-text too."""
    model, text = random_model(vocab_size=old.vocab_size, max_seq_len=64).eval(), "a lower word"
    ids = torch.tensor([[*old.encode(text), old.special_tokens[END]]])
    loss = torch.nn.functional.cross_entropy(model(ids[:, :-1])[0], ids[0, 1:], reduction="sum")
    expected = loss.item() / torch.log(torch.tensor(2.0)).item() / len(text)
    found = vocabulary.bits_per_byte(model, old, [text])
    assert found == pytest.approx(expected, rel=2e-2)  # bf16, on a CPU that has it: 8 bits of mantissa
