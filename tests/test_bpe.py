"""bpe.py: byte-level BPE, from counting pairs to files of other tokenizers, in the order of the lesson."""
import base64
import json
import os
import pickle
import random
import signal
import subprocess
import sys
import time
import unicodedata
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import bpe
from bpe import (PATTERN, Tokenizer, learn_merges, merge, merge_ids, merge_long, split, split_stream,
                 train_plain)
from config import UserError
from support import is_alive, wait_until
from workers import in_processes

END = "<|endoftext|>"
ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
O200K_PATTERN = "|".join([  # it looks further ahead than PATTERN does: "we" and "'" may still become "we'll"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+" + ENDINGS,
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*" + ENDINGS,
    r"\p{N}{1,3}", r" ?[^\s\p{L}\p{N}]+[\r\n/]*", r"\s*[\r\n]+", r"\s+(?!\S)", r"\s+"])
QWEN_PATTERN = PATTERN.replace(r"\p{N}{1,3}", r"\p{N}")
PROSE = """The tokenizer can't know which words you'll write; it's trained on 12345 others.
It cuts "low", "lower" and "lowest" at their ends: lower, lowest, LOWEST.

    def lowest(words, number=10):    # four spaces, then eight
        return sorted(words)[:number]
每个词都由字节组成。こんにちは 안녕하세요 Здравствуйте é\n"""
AWKWARD = ["", " ", "\x00", "a\x00b", "\r\n", "a\r\nb\rc\n", "  two   three    ", "\t\t\n \n\n", "trailing  ",
           "春眠不觉晓", "👩‍👩‍👧‍👦 👍🏽 🇩🇪", "e\u0301 \u0301 a\u0308\u0323", "can't CAN'T we'Ll 'ſ",
           "1234567 ٣٤٥٦ ⅷ²", "\ufeffBOM", "a\u00a0b\u2003c\u3000d\u200be", "\x1c\x85\u2028", "\ufffd",
           "<|endoftext|>", "!?...\n\n\n", "\U0010ffff\U000e0001"]

# Characters over which tokenizers tend to differ, and all others that this Python's Unicode has. Newer are
# cut as letters or as signs, depending on the age of each library's tables.
assigned = st.characters(exclude_categories=["Cs", "Cn"]).filter(lambda c: unicodedata.category(c) != "Cn")
awkward = st.sampled_from(" \n\r\t'sStTlLdD.,!_09aZéß字の🙂\u0301\u200d\x00\u00a0\u017f")
text = st.text(awkward | assigned, max_size=30)
few_letters = st.lists(st.text(st.sampled_from("aab "), max_size=25), max_size=6)


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train([PROSE], 400, [END, "<|user turn|>"])


@pytest.fixture(scope="module")
def corpus():
    """Some sources of the standard library: English, code, tables. 3 MB, so that processes are started."""
    return [path.read_text(encoding="utf-8") for path in sorted(Path(os.__file__).parent.glob("*.py"))][:130]


# --- The lesson: counting and merging -----------------------------------------------------------------------


def test_merging_goes_from_left_to_right_without_overlap():
    assert merge([b"a", b"a", b"a", b"b"], (b"a", b"a")) == [b"aa", b"a", b"b"], "aaa is aa a, not a aa"
    assert merge([b"a", b"b", b"a", b"b"], (b"a", b"b")) == [b"ab", b"ab"]
    assert merge([b"a"], (b"a", b"b")) == [b"a"] and merge([], (b"a", b"b")) == []


def test_the_first_merges_by_hand():
    # ow and lo stand in all three words, and (o, w) is the greater; then (l, ow); then (" ", low) and
    # (low, e) occur twice each, and (low, e) is the greater
    expected = [(b"o", b"w"), (b"l", b"ow"), (b"low", b"e")]
    assert train_plain(["low lower lowest"], 256 + 3) == expected
    assert Tokenizer.train(["low lower lowest"], 256 + 3).merges == expected


def test_overlapping_pairs_count_twice_in_both_trainers():
    # (a, a) occurs 3 times in aaaa and (x, y) 3 times in all: a tie, and (x, y) is the greater
    texts = ["aaaa", "xy", "xy", "xy"]
    assert train_plain(texts, 257) == Tokenizer.train(texts, 257).merges == [(b"x", b"y")]
    texts = ["aaaa", "xy", "xy"]
    assert train_plain(texts, 257) == Tokenizer.train(texts, 257).merges == [(b"a", b"a")], "three, not one or two"


def test_ties_go_to_the_greatest_pair_of_bytes():
    assert train_plain(["ab", "cd", "cb"], 257) == [(b"c", b"d")]
    texts = ["ab", "abx", "abx", "ax", "ax"]  # after ab, (ab, x) and (a, x) tie, the longer is the greater
    expected = [(b"a", b"b"), (b"ab", b"x"), (b"a", b"x")]
    assert Tokenizer.train(texts, 259).merges == train_plain(texts, 259) == expected


@given(few_letters, st.integers(0, 20), st.randoms())
@settings(max_examples=300, deadline=None)
def test_the_fast_trainer_equals_the_plain_one_merge_for_merge(texts, number, rng):
    try:
        expected = train_plain(texts, 256 + number)
    except UserError as error:
        with pytest.raises(UserError) as other:
            Tokenizer.train(texts, 256 + number)
        assert str(other.value) == str(error)
        return
    assert Tokenizer.train(texts, 256 + number).merges == expected
    rng.shuffle(texts)
    assert Tokenizer.train(iter(texts), 256 + number).merges == expected, "the order matters"


def test_the_fast_trainer_equals_the_plain_one_on_prose():
    assert Tokenizer.train([PROSE], 256 + 150).merges == train_plain([PROSE], 256 + 150)


def test_any_number_of_processes_and_any_order_give_the_same_merges(corpus):
    alone = Tokenizer.train(corpus, 1000, [END], workers=1)
    backwards = (text for text in reversed(corpus))
    assert Tokenizer.train(backwards, 1000, [END], workers=2).merges == alone.merges
    assert Tokenizer.train(corpus, 1000, [END], workers=3).fingerprint == alone.fingerprint


def test_each_merge_is_that_of_the_most_frequent_pair_at_its_step(corpus):
    """Many merges, of which rounds make many at once: recounted each time, each is the maximum."""
    pieces = bpe.count_pieces((PATTERN, ()), corpus[:2])
    words = {piece: [bytes([value]) for value in piece.encode()] for piece in pieces}
    for best in learn_merges(pieces, 300):
        counts = {}
        for piece, word in words.items():
            for pair in pairwise(word):
                counts[pair] = counts.get(pair, 0) + pieces[piece]
        assert best == max(counts, key=lambda pair: (counts[pair], pair))
        words = {piece: merge(word, best) if best[0] in word else word for piece, word in words.items()}


# --- What training refuses ----------------------------------------------------------------------------------


def test_more_merges_than_the_text_has_is_one_line_with_the_largest_vocabulary():
    with pytest.raises(UserError, match=r"1000 .* at most 259 \(256 bytes, 2 merges, 1 special tokens\)"):
        Tokenizer.train(["abc"], 1000, [END])
    assert Tokenizer.train(["abc"], 259, [END]).vocab_size == 259, "what the message says must work"
    with pytest.raises(UserError, match="at most 256 "):
        Tokenizer.train([], 300)


def test_a_vocabulary_below_the_bytes_and_special_tokens_is_refused():
    assert Tokenizer.train(["abc"], 257, [END]).merges == []
    with pytest.raises(UserError, match="vocab_size 256 .* 256 bytes and 1 special tokens need 257"):
        Tokenizer.train(["abc"], 256, [END])


@pytest.mark.parametrize("special_tokens, message", [
    ([""], "at least one character"), (["<a>", "<a>"], "'<a>' stands twice"), (["a"], "ordinary token"),
    ([3], "must be str, not int"), ({"<a>": 5}, "id 5 .* belongs to"), ({"<a>": 300, "<b>": 300}, "id 300")])
def test_bad_special_tokens_are_refused(special_tokens, message):
    with pytest.raises(UserError, match=message):
        Tokenizer([], special_tokens)


@pytest.mark.parametrize("pattern, message", [
    (r"(\w+", "does not compile"), (r"(\w+)|\s+", "captures"), (r"\w*", "matches the empty text")])
def test_bad_patterns_are_refused(pattern, message):
    with pytest.raises(UserError, match=message):
        Tokenizer.train(["two words!"], 258, pattern=pattern)
    with pytest.raises(UserError, match=message):
        Tokenizer([], pattern=pattern).encode("two words!")


@pytest.mark.parametrize("merges, message", [
    ([(b"ab", b"c")], "needs the token b'ab'"), ([(b"a", b"b"), (b"a", b"b")], "twice"),
    ([(b"a", b"b"), (b"b", b"c"), (b"ab", b"c"), (b"a", b"bc")], "b'abc' stands twice")])
def test_bad_merges_are_refused(merges, message):
    with pytest.raises(UserError, match=message):
        Tokenizer(merges)


def test_what_is_not_text_is_refused(tokenizer):
    for wrong in (b"bytes", None, 3):
        with pytest.raises(UserError, match="text must be str"):
            tokenizer.encode(wrong)
        with pytest.raises(UserError, match="text must be str"):
            Tokenizer.train(["fine", wrong], 300)
    with pytest.raises(UserError, match="pass a list"):
        Tokenizer.train("one text, whose characters would be texts", 300)
    with pytest.raises(UserError, match="workers 0"):
        tokenizer.encode_batch(["a"], workers=0)


# --- Cutting into pre-tokens --------------------------------------------------------------------------------


@pytest.mark.parametrize("whole, pieces", [
    ("I'll pay 12345 now", ["I", "'ll", " pay", " ", "123", "45", " now"]),
    ("a  b\n\n  c", ["a", " ", " b", "\n\n", " ", " c"]),
    ("x=y+1;\n\nz", ["x", "=y", "+", "1", ";\n\n", "z"]),
    ("$word (end)  ", ["$word", " (", "end", ")", "  "])])
def test_the_pattern_cuts_words_numbers_and_signs(whole, pieces):
    assert sum(split(whole, PATTERN), []) == pieces


def test_no_merge_crosses_a_cut():
    merges = Tokenizer.train(["dog. dog. dog."] * 9, 256 + 3).merges
    assert merges == [(b"o", b"g"), (b"d", b"og"), (b" ", b"dog")]
    with pytest.raises(UserError, match="at most 259"):  # the dot behind every dog is never merged
        Tokenizer.train(["dog. dog. dog."] * 9, 256 + 4)


@pytest.mark.parametrize("pattern", [PATTERN, bpe.GPT2_PATTERN, O200K_PATTERN, QWEN_PATTERN, r"\p{L}+",
                                     bpe.DIGITS_PATTERN, r"\s+|\d"])
@pytest.mark.parametrize("whole", [*AWKWARD, "we'll don't", "a\n \n  \n\n   b", "!!\r\n \r\n!", "x.  \n",
                                   "don't'll 'll", PROSE])
def test_pre_tokens_are_the_same_wherever_the_stream_is_cut(pattern, whole):
    expected = sum(split(whole, pattern), [])
    assert "".join(expected) == whole, "text was lost"
    for cut in range(len(whole) + 1):
        pieces = sum(split_stream([whole[:cut], whole[cut:]], pattern, window=1), [])
        assert pieces == expected, f"cut into {whole[:cut]!r} and {whole[cut:]!r}; is too little held back?"
    assert sum(split_stream(whole, pattern, window=1), []) == expected, "a character at a time"


def test_a_very_long_pre_token_in_small_chunks_is_not_cut_out_again_and_again():
    start = time.process_time()
    assert sum(split_stream("a" * 40_000, PATTERN, window=1), []) == ["a" * 40_000]
    assert time.process_time() - start < 2, "quadratic in the pre-token's length"  # 0.03 s; else 10 s


# --- Encoding -----------------------------------------------------------------------------------------------


def test_encoding_makes_the_earliest_merge_first():
    tokenizer = Tokenizer([(b"b", b"c"), (b"a", b"b"), (b"a", b"bc")], pattern=r"\w+")
    assert tokenizer.encode("abc") == [258], "bc was learned before ab"
    assert tokenizer.encode("ab") == [257] and tokenizer.encode("abbc") == [257, 256]
    assert Tokenizer([(b"a", b"a")]).encode("aaa") == [256, 97]


@given(st.lists(st.integers(97, 99), max_size=60),
       st.lists(st.text(st.sampled_from("abc"), max_size=20), max_size=4))
@settings(max_examples=200, deadline=None)
def test_encoding_equals_replaying_the_merges_one_after_the_other(ids, texts):
    learned = learn_merges(bpe.Counter(texts), 12)
    tokenizer = Tokenizer(learned)
    word = [bytes([id]) for id in ids]
    for pair in learned:
        word = merge(word, pair)
    assert [tokenizer.vocab[id] for id in merge_ids(list(ids), tokenizer._ranks, tokenizer._results)] == word
    assert [tokenizer.vocab[id] for id in merge_long(ids, tokenizer._ranks, tokenizer._results)] == word


def test_long_words_give_what_short_ones_do(tokenizer):
    """The heap and the scan, on a real vocabulary."""
    rng = random.Random(0)
    for length in (0, 1, 2, 3, 50, 400):
        ids = [rng.choice(b"lowest numrd") for _ in range(length)]
        assert merge_long(ids, tokenizer._ranks, tokenizer._results) == \
            merge_ids(list(ids), tokenizer._ranks, tokenizer._results)


def test_200_000_equal_characters_encode_in_less_than_a_second():
    tokenizer = Tokenizer.train(["a" * 1024 + " " * 1024], 256 + 18)
    for character in "a ":
        start = time.process_time()
        ids = tokenizer.encode(character * 200_000)
        assert time.process_time() - start < 1, "quadratic in the pre-token's length?"  # 0.08 s
        assert tokenizer.decode(ids) == character * 200_000


def test_the_cache_is_bounded_and_changes_nothing(tokenizer, monkeypatch):
    expected = tokenizer.encode(PROSE)
    monkeypatch.setattr(bpe.PieceCache, "SIZE", 5)
    fresh = Tokenizer(tokenizer.merges, tokenizer.special_tokens)
    assert fresh.encode(PROSE) == expected == fresh.encode(PROSE) and len(fresh._cache) <= 5


@pytest.mark.parametrize("whole", AWKWARD)
def test_awkward_text_comes_back_as_it_was(tokenizer, whole):
    assert tokenizer.decode(tokenizer.encode(whole)) == whole
    assert tokenizer.decode_bytes(tokenizer.encode(whole)) == whole.encode()


@given(st.text(max_size=50))
@settings(max_examples=300, deadline=None)
def test_any_text_comes_back_as_it_was(tokenizer, whole):
    assert tokenizer.decode(tokenizer.encode(whole)) == whole


def test_lone_surrogates_become_replacement_characters(tokenizer):
    assert tokenizer.decode(tokenizer.encode("a\ud800b \udfff")) == "a\ufffdb \ufffd"
    assert Tokenizer.train(["\ud800" * 9], 257).merges == Tokenizer.train(["\ufffd" * 9], 257).merges


def test_a_batch_gives_the_arrays_that_encode_gives(tokenizer, corpus):
    for texts in ([], [""], [PROSE, "", "x"], corpus):
        arrays = tokenizer.encode_batch(iter(texts), workers=2)
        assert [array.tolist() for array in arrays] == [tokenizer.encode(text) for text in texts]
        assert all(array.dtype == np.uint16 for array in arrays)
    array, = Tokenizer([], {END: 65_536}).encode_batch(["a"])
    assert array.dtype == np.uint32, "65,536 does not fit uint16"


@given(text, st.integers(0, 30))
@settings(max_examples=50, deadline=None)
def test_a_stream_gives_the_ids_of_the_whole_text(tokenizer, whole, cut):
    assert list(tokenizer.encode_stream([whole[:cut], whole[cut:]])) == tokenizer.encode(whole)
    assert list(tokenizer.encode_stream(whole)) == tokenizer.encode(whole)


def test_a_long_stream_is_encoded_as_it_comes(tokenizer):
    whole = PROSE * 6000
    chunks = iter([whole[i:i + 100_000] for i in range(0, len(whole), 100_000)])
    stream = tokenizer.encode_stream(chunks)
    first = next(stream)
    assert len(list(chunks)) > 5, "the stream was read to its end before the first id came out"
    assert first == tokenizer.encode(PROSE)[0]
    assert tokenizer.encode(whole) == tokenizer.encode(PROSE) * 6000  # PROSE ends with a line


# --- Special tokens -----------------------------------------------------------------------------------------


def test_ids_are_bytes_then_merges_then_special_tokens(tokenizer):
    assert [tokenizer.vocab[id] for id in range(256)] == [bytes([value]) for value in range(256)]
    assert [tokenizer.vocab[id] for id in range(256, 398)] == [b"".join(pair) for pair in tokenizer.merges]
    assert tokenizer.special_tokens == {END: 398, "<|user turn|>": 399} and tokenizer.vocab_size == 400
    assert tokenizer.vocab[398] == END.encode()


def test_a_special_token_in_text_stays_text_unless_it_is_allowed(tokenizer):
    whole = f"a{END}b<|user turn|>"
    assert not {398, 399} & set(tokenizer.encode(whole)), "text from users became a special token"
    assert not {398, 399} & set(tokenizer.encode_stream([whole]))
    assert tokenizer.encode(whole, allow_special=True) == [97, 398, 98, 399]
    assert tokenizer.decode([97, 398, 98, 399]) == tokenizer.decode(tokenizer.encode(whole)) == whole


def test_of_overlapping_special_tokens_the_longest_wins():
    tokenizer = Tokenizer([], ["<a>", "<a><b>", "<b>c"])
    assert tokenizer.encode("<a><b>c<a><a>", allow_special=True) == [257, 99, 256, 256]


def test_special_tokens_are_taken_out_before_counting():
    texts = [f"a{END}b"] * 50 + ["xy"]
    expected = [(b"x", b"y")]  # the only pair: neither a<, nor letters of the token, nor ab across it
    assert train_plain(texts, 258, [END]) == Tokenizer.train(texts, 258, [END]).merges == expected


# --- Decoding -----------------------------------------------------------------------------------------------


def test_bytes_that_are_no_utf_8_decode_to_replacement_characters(tokenizer):
    assert tokenizer.decode_bytes([0xFF, 0x61, 0x80]) == b"\xffa\x80"
    assert tokenizer.decode([0xFF, 0x61, 0x80]) == "\ufffda\ufffd"


def test_ids_may_be_a_list_an_array_or_a_generator(tokenizer):
    ids = tokenizer.encode(PROSE)
    assert tokenizer.decode(np.array(ids, np.uint16)) == tokenizer.decode(id for id in ids) == PROSE
    assert "".join(tokenizer.decode_stream(np.array(ids))) == PROSE


def test_an_id_beyond_the_vocabulary_is_refused(tokenizer):
    for wrong in (400, -1):
        with pytest.raises(UserError, match=f"id {wrong} is not in the vocabulary of 400 tokens"):
            tokenizer.decode([97, wrong])


@given(st.text(max_size=20))
@settings(max_examples=100, deadline=None)
def test_streamed_text_never_shows_half_a_character(whole):
    pieces = list(Tokenizer([]).decode_stream(whole.encode()))  # a byte at a time
    assert "".join(pieces) == whole
    assert all(piece and ("\ufffd" not in piece or "\ufffd" in whole) for piece in pieces)


def test_streamed_text_comes_with_the_id_that_completes_it():
    ids = iter("aé".encode())
    stream = Tokenizer([]).decode_stream(ids)
    assert [next(stream), next(stream), next(ids, None)] == ["a", "é", None]
    stream = Tokenizer([]).decode_stream(ids := iter(b"abc"))
    assert next(stream) == "a" and next(ids) == ord("b"), "a reader waits for what could be shown already"


@given(st.binary(max_size=20))
@settings(max_examples=200, deadline=None)
def test_streamed_text_is_that_of_decode_even_for_bytes_that_are_no_text(data):
    assert "".join(Tokenizer([]).decode_stream(data)) == Tokenizer([]).decode(list(data))


# --- Files, and the tokenizers they come from ---------------------------------------------------------------


def same(ours, theirs):
    assert (ours.merges, ours.vocab, ours.special_tokens, ours.pattern) == \
        (theirs.merges, theirs.vocab, theirs.special_tokens, theirs.pattern)
    assert ours.fingerprint == theirs.fingerprint


def test_a_saved_tokenizer_loads_as_it_was(tokenizer, tmp_path):
    path = tmp_path / "目录 with spaces.json"
    tokenizer.save(path)
    same(Tokenizer.load(path), tokenizer)
    before = path.read_bytes()
    tokenizer.save(path)
    assert path.read_bytes() == before and os.listdir(tmp_path) == [path.name]


def test_pattern_special_tokens_and_numbering_survive_files_and_processes(tmp_path):
    vocab = {255 - value: bytes([value]) for value in range(256)} | {300: b"ab"}
    tokenizer = Tokenizer([(b"a", b"b")], {"<|x y|>": 299}, r"\w+|\W+", vocab)
    assert tokenizer.encode("ab<|x y|>", allow_special=True) == [300, 299] and tokenizer.vocab_size == 301
    tokenizer.save(tmp_path / "t.json")
    same(Tokenizer.load(tmp_path / "t.json"), tokenizer)
    same(pickle.loads(pickle.dumps(tokenizer)), tokenizer)


def test_the_fingerprint_changes_with_anything_that_changes_ids(tokenizer):
    merges, special = tokenizer.merges, list(tokenizer.special_tokens)
    others = [Tokenizer(merges[:-1], special), Tokenizer(merges, special[::-1]),
              Tokenizer(merges, special[:1]), Tokenizer(merges, special, QWEN_PATTERN)]
    assert len({other.fingerprint for other in [tokenizer, *others]}) == 5
    assert Tokenizer(merges, special).fingerprint == tokenizer.fingerprint


@pytest.fixture(scope="module")
def peers(tokenizer, tmp_path_factory):
    """The same tokenizer in `tokenizers`, through the saved file, and in `tiktoken`, through its ranks."""
    import tiktoken
    import tokenizers
    path = tmp_path_factory.mktemp("saved") / "tokenizer.json"
    tokenizer.save(path)
    ranks = {token: id for id, token in tokenizer.ordinary_vocab().items()}
    return tokenizers.Tokenizer.from_file(str(path)), tiktoken.Encoding(
        "ours", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=tokenizer.special_tokens)


def check_peers(tokenizer, peers, whole):
    hugging_face, openai = peers
    ids = tokenizer.encode(whole)
    assert ids == openai.encode_ordinary(whole), "tiktoken gives other ids"
    if not any(token in whole for token in tokenizer.special_tokens):  # `tokenizers` makes them from any text
        assert ids == hugging_face.encode(whole).ids, "tokenizers gives other ids"
        assert hugging_face.decode(ids) == whole


@pytest.mark.parametrize("whole", [*AWKWARD, PROSE])
def test_ids_equal_those_of_tokenizers_and_tiktoken_for_awkward_text(tokenizer, peers, whole):
    check_peers(tokenizer, peers, whole)


@given(text)
@settings(max_examples=1000, deadline=None)
def test_ids_equal_those_of_tokenizers_and_tiktoken_for_any_text(tokenizer, peers, whole):
    check_peers(tokenizer, peers, whole)


def test_special_ids_equal_those_of_tokenizers_and_tiktoken(tokenizer, peers):
    whole = f"{END}  a <|user turn|>b{END}{END}<|user turn| >"
    ids = tokenizer.encode(whole, allow_special=True)
    assert ids == peers[0].encode(whole).ids == peers[1].encode(whole, allowed_special="all")


def trained_by_tokenizers(pattern, special_tokens):
    """A tokenizer that `tokenizers` trained: special tokens first, then the bytes in another order."""
    import tokenizers
    theirs = tokenizers.Tokenizer(tokenizers.models.BPE())
    byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None)
    theirs.pre_tokenizer = byte_level if pattern is None else tokenizers.pre_tokenizers.Sequence(
        [tokenizers.pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated"), byte_level])
    theirs.decoder = tokenizers.decoders.ByteLevel()
    theirs.train_from_iterator([PROSE], tokenizers.trainers.BpeTrainer(
        vocab_size=380, special_tokens=special_tokens, show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()))
    return theirs


@pytest.mark.parametrize("pattern", [None, PATTERN, QWEN_PATTERN, r"\p{L}+"])
@pytest.mark.parametrize("as_strings", [False, True])
def test_files_written_by_tokenizers_give_the_same_ids(tmp_path, pattern, as_strings):
    theirs = trained_by_tokenizers(pattern, [END])
    content = json.loads(theirs.to_str())
    if as_strings:  # as files were until 2024
        content["model"]["merges"] = [" ".join(merge) for merge in content["model"]["merges"]]
    (tmp_path / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    ours = Tokenizer.load(tmp_path / "tokenizer.json")
    assert ours.special_tokens == {END: 0} and ours.pattern == (pattern or bpe.GPT2_PATTERN)
    for whole in [*AWKWARD, PROSE]:
        assert ours.encode(whole, allow_special=True) == theirs.encode(whole).ids
    ours.save(tmp_path / "again.json")
    same(Tokenizer.load(tmp_path / "again.json"), ours)


SPECIAL = ["<|begin_of_text|>", END, "<|im_start|>"]


def family_file(family) -> dict:
    """A tokenizer.json as the family's are, small: its normalizer, pre-tokenizers, template and decoder."""
    import tokenizers
    byte_level, split = tokenizers.pre_tokenizers.ByteLevel, tokenizers.pre_tokenizers.Split
    theirs = tokenizers.Tokenizer(tokenizers.models.BPE())
    pattern = {"Llama 3": PATTERN, "Qwen": QWEN_PATTERN}.get(family)
    steps = [byte_level(add_prefix_space=False, use_regex=pattern is None)]
    if family == "SmolLM2":
        steps.insert(0, tokenizers.pre_tokenizers.Digits(individual_digits=True))
    if pattern:
        steps.insert(0, split(tokenizers.Regex(pattern), "isolated"))
    theirs.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(steps) if len(steps) > 1 else steps[0]
    if family == "Qwen":
        theirs.normalizer = tokenizers.normalizers.NFC()
    theirs.decoder = tokenizers.decoders.ByteLevel()
    first = family == "SmolLM2"  # whose special tokens are in the vocabulary, at its beginning
    theirs.train_from_iterator([PROSE + "lower café naïve " * 9], tokenizers.trainers.BpeTrainer(
        vocab_size=420, special_tokens=SPECIAL if first else [], show_progress=False,
        initial_alphabet=byte_level.alphabet()))
    theirs.add_special_tokens(SPECIAL)
    theirs.post_processor = tokenizers.processors.ByteLevel(trim_offsets=False)
    if family == "Qwen":
        theirs.add_tokens([tokenizers.AddedToken("<think>", special=False, normalized=False)])
    if family == "Llama 3":
        begin = (SPECIAL[0], theirs.token_to_id(SPECIAL[0]))
        theirs.post_processor = tokenizers.processors.Sequence([
            tokenizers.processors.ByteLevel(trim_offsets=False),
            tokenizers.processors.TemplateProcessing(f"{begin[0]} $A", f"{begin[0]} $A $B", [begin])])
    content = json.loads(theirs.to_str())
    if family == "Llama 3":  # a word that is in the vocabulary, but that no merge leads to any more
        merges = content["model"]["merges"]
        content["model"]["ignore_merges"] = True
        content["model"]["merges"] = [pair for pair in merges if "".join(pair) != "Ġlower"]
        assert "Ġlower" in content["model"]["vocab"] and len(content["model"]["merges"]) < len(merges)
    return content


@pytest.fixture(scope="module", params=["GPT-2", "Llama 3", "SmolLM2", "Qwen"])
def family(request, tmp_path_factory):
    """(ours, theirs, ours saved and in `tokenizers` again) of one family's file."""
    import tokenizers
    folder, content = tmp_path_factory.mktemp("family"), family_file(request.param)
    (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    ours = Tokenizer.load(folder / "tokenizer.json")
    ours.save(folder / "again.json")
    return ours, tokenizers.Tokenizer.from_str(json.dumps(content)), \
        tokenizers.Tokenizer.from_file(str(folder / "again.json")), folder


def check_family(family, whole):
    ours, theirs, again, _ = family
    ids = ours.encode(whole, allow_special=True)
    assert ids == theirs.encode(whole, add_special_tokens=False).ids, "tokenizers gives other ids"
    assert ids == again.encode(whole).ids, "what was saved gives other ids"
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=False)
    assert ours.decode(ids) == (unicodedata.normalize("NFC", whole) if ours.nfc else whole)
    assert ours.encode(whole) == list(ours.encode_stream(whole)), "in a stream"


@pytest.mark.parametrize("whole", [
    *AWKWARD, PROSE, "a lower word", "in 1234 a  56", "x  7   8\n 9", "1 2", "½ ⅷ² ٣", "'1s 5's",
    "cafe\u0301 café ﬁ Å \u212b \u0958 \u1112\u1161\u11ab", f"<think>a{END}<|im_start|>user\u0301",
    SPECIAL[0]])
def test_files_of_each_family_give_the_same_ids_and_text(family, whole):
    check_family(family, whole)


@given(text)
@settings(max_examples=150, deadline=None)
def test_files_of_each_family_give_the_same_ids_for_any_text(family, whole):
    check_family(family, whole)


def test_what_makes_a_family_survives_saving_and_processes(family):
    ours, theirs, again, folder = family
    for other in (Tokenizer.load(folder / "again.json"), pickle.loads(pickle.dumps(ours))):
        same(other, ours)
        assert (other.nfc, other.ignore_merges, other.shown) == (ours.nfc, ours.ignore_merges, ours.shown)
    more = ours.with_special_tokens(["<new>"])
    assert (more.nfc, more.ignore_merges, more.shown) == (ours.nfc, ours.ignore_merges, ours.shown)
    assert more.special_tokens["<new>"] == ours.vocab_size == theirs.get_vocab_size()
    ids = ours.encode(f"<think>a{END}", allow_special=True)
    for peer in (theirs, again):  # both leave out what is special, and nothing else
        assert peer.decode(ids) == "<think>a"


def test_a_word_of_the_vocabulary_is_one_id_where_merges_are_ignored():
    def tokenizer(**settings):
        return Tokenizer([(b"a", b"b")], (), r"\w+", dict(enumerate([*bpe.BYTES, b"ab", b"abc"])), **settings)
    assert tokenizer(ignore_merges=True).encode("abc ab abcd") == [257, 32, 256, 32, 256, 99, 100]
    assert tokenizer().encode("abc") == [256, 99]
    prints = {tokenizer(**more).fingerprint for more in ({}, {"nfc": True}, {"ignore_merges": True})}
    assert len(prints) == 3, "what changes the ids must change the fingerprint"


def test_a_stream_is_normalised_as_the_whole_text_wherever_it_is_cut():
    whole = "cafe\u0301\u0323 \u1112\u1161\u11ab か\u3099 A\u030a\u0301 \u09c7\u09be क\u093c 词e\u0301 de\u0301"
    expected = unicodedata.normalize("NFC", whole)
    assert len(expected) < len(whole)
    for cut in range(len(whole) + 1):
        assert "".join(bpe.normalize_stream([whole[:cut], whole[cut:]])) == expected, cut
    assert "".join(bpe.normalize_stream(whole)) == expected, "a character at a time"
    with pytest.raises(UserError, match="text must be str"):
        list(bpe.normalize_stream([b"bytes"]))


def test_no_character_that_joins_the_one_before_it_is_taken_for_firm():
    """Of all of Unicode: what combines, what ends a pair that has a composed form, and Hangul's parts."""
    for character in map(chr, range(sys.maxunicode + 1)):
        parts = unicodedata.decomposition(character).split()
        first = unicodedata.normalize("NFD", character)[0]
        joining = [chr(int(parts[1], 16))] if len(parts) == 2 and not parts[0].startswith("<") else []
        if unicodedata.combining(first) or "\u1161" <= first <= "\u11ff":
            joining.append(character)
        assert not any(map(bpe.FIRM.match, joining)), (character, joining)
    assert all(map(bpe.FIRM.match, "a \n.1字かД")), "then nothing of such a text would come out of a stream"


@pytest.mark.parametrize("given_ids", [(270, 265, 5), (256, 257, 258)])
def test_added_tokens_are_numbered_as_tokenizers_does_even_where_a_file_has_gaps(tmp_path, given_ids):
    ids = (256, 257, 258)
    import tokenizers
    path = tmp_path / "t.json"
    Tokenizer([], ["<a>", "<b>", "<c>"]).save(path)
    content = json.loads(path.read_text(encoding="utf-8"))
    for token, id in zip(content["added_tokens"], given_ids):
        token["id"] = id
    path.write_text(json.dumps(content), encoding="utf-8")
    assert tuple(tokenizers.Tokenizer.from_file(str(path)).encode("<a><b><c>").ids) == ids
    assert tuple(Tokenizer.load(path).encode("<a><b><c>", allow_special=True)) == ids


def test_special_tokens_with_gaps_between_their_ids_keep_them_in_tokenizers_too(tmp_path):
    import tokenizers
    ours = Tokenizer([(b"a", b"b")], {"<x y>": 400, "<é>": 300})
    ours.save(tmp_path / "t.json")
    same(Tokenizer.load(tmp_path / "t.json"), ours)
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "t.json"))
    for whole in ("ab<x y>é<é>", "<x y", "é x y"):
        assert theirs.encode(whole).ids == ours.encode(whole, allow_special=True)


def test_gpt2_files_give_the_same_ids(tmp_path):
    theirs = trained_by_tokenizers(None, [])
    theirs.model.save(str(tmp_path))
    vocab = json.loads((tmp_path / "vocab.json").read_text(encoding="utf-8"))
    (tmp_path / "vocab.json").write_text(json.dumps({**vocab, END: len(vocab)}), encoding="utf-8")
    ours = Tokenizer.from_gpt2(tmp_path / "vocab.json", tmp_path / "merges.txt")
    assert ours.special_tokens == {END: 380}
    for whole in [*AWKWARD, PROSE]:
        assert ours.encode(whole) == theirs.encode(whole).ids


def test_a_tiktoken_file_gives_the_tokenizer_back(tokenizer, tmp_path):
    tokens = tokenizer.ordinary_vocab().items()
    lines = [base64.b64encode(token) + f" {id}\n".encode() for id, token in tokens]
    random.Random(0).shuffle(lines)
    (tmp_path / "ours.tiktoken").write_bytes(b"".join(lines))
    special_tokens = list(tokenizer.special_tokens)
    same(Tokenizer.from_tiktoken(tmp_path / "ours.tiktoken", special_tokens, PATTERN), tokenizer)


def steps(file):
    return file["pre_tokenizer"]["pretokenizers"]


@pytest.mark.parametrize("change, message", [
    (lambda file: file["model"].update(type="WordPiece"), "model is WordPiece"),
    (lambda file: file["model"].update(type="Unigram", vocab=[["a", 0.5]]), "model is Unigram"),
    (lambda file: file["model"].update(byte_fallback=True), "byte_fallback"),
    (lambda file: file.update(normalizer={"type": "NFKC"}), "normalizer NFKC"),
    (lambda file: file.update(normalizer={"type": "Sequence", "normalizers": []}), "normalizer Sequence"),
    (lambda file: file.update(pre_tokenizer={"type": "Metaspace"}), "Metaspace"),
    (lambda file: file.update(pre_tokenizer=None), "missing"),
    (lambda file: steps(file)[0].update(behavior="Removed"), r"Split \+ ByteLevel"),
    (lambda file: steps(file)[1].update(add_prefix_space=True), "without add_prefix_space"),
    (lambda file: steps(file)[0]["pattern"].update(Regex="(a"), "does not compile"),
    (lambda file: file["model"]["vocab"].update({"zz": 5}), "id 5 stands twice"),
    (lambda file: file["model"]["vocab"].update({"two words": 1000}), "alphabet"),
    (lambda file: file["model"]["vocab"].pop("a"), "lacks 1 of the 256 bytes, b'a' first"),
    (lambda file: file["model"]["merges"].append(["zz", "z"]), "needs the token b'zz'"),
    (lambda file: file["added_tokens"].append(file["added_tokens"][0]), "twice"),
    (lambda file: file.pop("model"), "not a tokenizer.json"),
    (lambda file: file["model"].update(vocab=["a"]), "not a tokenizer.json"),
    (lambda file: file["model"].update(merges=["a b c"]), "not a tokenizer.json")])
def test_other_kinds_of_tokenizer_files_are_refused_by_name(tokenizer, tmp_path, change, message):
    path = tmp_path / "tokenizer.json"
    tokenizer.save(path)
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    path.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(UserError, match=message) as error:
        Tokenizer.load(path)
    assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)


def test_what_is_no_tokenizer_file_is_refused_in_one_line(tmp_path):
    path = tmp_path / "tokenizer.json"
    for content in (b"", b"{", b"[]", b"null", b"\xff\xfe", b"3"):
        path.write_bytes(content)
        for load in (Tokenizer.load, lambda path: Tokenizer.from_tiktoken(path, [], PATTERN),
                     lambda path: Tokenizer.from_gpt2(path, path)):
            with pytest.raises(UserError, match="tokenizer.json") as error:
                load(path)
            assert "\n" not in str(error.value)
    with pytest.raises(FileNotFoundError):
        Tokenizer.load(tmp_path / "absent.json")


# --- Processes and the command line -------------------------------------------------------------------------


def test_training_reads_a_generator_as_it_goes(corpus):
    """Not ahead of the processes: else endless input would fill the memory."""
    read = []

    def texts():
        for text in corpus * 10:
            read.append(len(text))
            yield text

    results = in_processes(bpe.count_pieces, (PATTERN, ()), bpe.batches(texts()), workers=2)
    next(results)
    assert sum(read) < 10 * bpe.WINDOW, f"{sum(read):,} characters were read for the first result"
    results.close()


def test_an_error_in_the_texts_or_in_a_process_reaches_the_caller(corpus):
    def broken():
        yield from corpus
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        Tokenizer.train(broken(), 300, workers=2)
    with pytest.raises(UserError, match="matches the empty text"):
        Tokenizer.train(corpus, 300, pattern=r"\w*", workers=2)


def kill_itself(context, batch):
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
def test_a_killed_process_is_one_line_and_no_endless_wait(corpus):
    with pytest.raises(UserError, match="one of 2 workers was killed"):
        list(in_processes(kill_itself, None, bpe.batches(corpus), workers=2))


SPAWN = """
import multiprocessing, sys
import bpe
if __name__ == "__main__":
    multiprocessing.set_start_method("spawn")
    texts = [open(sys.argv[1], encoding="utf-8").read()] * 2
    alone = bpe.Tokenizer.train(texts, 300, workers=1)
    assert bpe.Tokenizer.train(texts, 300, workers=2).merges == alone.merges
    assert alone.encode_batch(texts, workers=2)[1].tolist() == alone.encode(texts[1])
"""


@pytest.mark.slow
def test_processes_that_are_spawned_do_the_same(tmp_path):
    """As on macOS and Windows, where a process begins with an import, not with a copy of its parent."""
    (tmp_path / "text").write_text(PROSE * 4000, encoding="utf-8")
    (tmp_path / "script.py").write_text(SPAWN, encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(Path(bpe.__file__).parent)}
    subprocess.run([sys.executable, tmp_path / "script.py", tmp_path / "text"], check=True, env=environment)


def command(*words, **options):
    return subprocess.run([sys.executable, bpe.__file__, *map(str, words)], capture_output=True, text=True,
                          encoding="utf-8", **options)


def test_the_command_trains_saves_and_refuses_to_overwrite(tmp_path):
    (tmp_path / "文 1.txt").write_bytes(PROSE.encode() + b"\xff")
    words = ["--input", tmp_path / "文 1.txt", "--vocab_size", 300, "--out", tmp_path / "out.json"]
    done = command(*words)
    assert done.returncode == 0 and "300 tokens from 1 files" in done.stdout, done.stderr
    expected = Tokenizer.train([PROSE + "\ufffd"], 300, [END])
    assert Tokenizer.load(tmp_path / "out.json").fingerprint == expected.fingerprint
    again = command(*words)
    assert again.returncode == 2 and again.stderr.startswith("error: ") and "pass --overwrite" in again.stderr
    assert command(*words, "--overwrite").returncode == 0
    absent = command("--input", tmp_path / "absent.txt", "--out", tmp_path / "other.json")
    assert absent.returncode == 2 and "absent.txt: No such file" in absent.stderr
    assert not (tmp_path / "other.json").exists()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_processes_end_when_their_parent_is_killed(tmp_path):
    script = ("import bpe, itertools\n"
              "def texts():\n"
              "    for i in itertools.count(): yield f'{i} words ' * 100_000\n"
              "if __name__ == '__main__':\n"
              "    bpe.Tokenizer.train(texts(), 300, workers=2)\n")
    (tmp_path / "endless.py").write_text(script, encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(Path(bpe.__file__).parent)}
    parent = subprocess.Popen([sys.executable, tmp_path / "endless.py"], env=environment)
    children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children")
    try:
        assert wait_until(lambda: len(children.read_text().split()) == 2), "no processes were started"
        workers = children.read_text().split()
        time.sleep(0.5)
    finally:
        parent.kill()
        parent.wait()
    assert wait_until(lambda: not any(map(is_alive, workers))), "processes outlived their parent"
