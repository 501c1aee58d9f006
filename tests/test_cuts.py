"""cuts.py: where the cuts are that are seen at once, and numbers for what lies between them."""
import random
import unicodedata
from itertools import chain, product

import numpy as np
import pytest

import bpe
import cuts
from bpe import GPT2_PATTERN, PATTERN, RULES, compile_pattern
from test_bpe import AWKWARD, O200K_PATTERN, PROSE

RULE_OF = {**RULES, O200K_PATTERN: cuts.O200K,
           PATTERN.replace(r"\s*[\r\n]+", r"\s++$|\s*[\r\n]+"): cuts.CL100K}
TOLD_APART = "as1 \t\n'(/\u0301"  # one of each kind; and s and /, which patterns tell from others of theirs


def segments_of(texts, rule) -> list[list[str]]:
    data, bounds, first = cuts.cut(texts, cuts.table_of(rule))
    pieces = [piece.decode() for piece in cuts.spell(data, bounds, np.arange(len(bounds) - 1))]
    return [pieces[begin:end] for begin, end in zip(first, first[1:])]


def strange_texts(number: int) -> list[str]:
    """Of all of Unicode, and much of what patterns look for."""
    rng = random.Random(0)
    likely = [*" \t\n\r'(/.,-_sStTlLdDvVeErRmM09aZ\u0301\u200d\u00a0\u3000\u2028\x85\x1c\x00éßſ字の한٣ⅷ²",
              "\U0001f469\u200d\U0001f467", "\U0001f44d\U0001f3fd", "<|endoftext|>", "'ll", "\r\n"]

    def character():
        code = rng.randrange(0x110000 - 0x800)
        return chr(code if code < 0xD800 else code + 0x800)

    def known(c):  # what this Python does not know yet, the tables of libraries may take for this or that
        return c if unicodedata.category(c) != "Cn" else " "

    return ["".join(rng.choice(likely) if rng.random() < 0.9 else known(character())
                    for _ in range(rng.randrange(40))) for _ in range(number)]


# --- Cutting ------------------------------------------------------------------------------------------------


def test_segments_by_hand():
    assert segments_of(["It isn't 12345!"], cuts.LLAMA3) == [["It", " isn", "'t", " ", "12345", "!"]]
    assert segments_of(["a  b\n\n  c"], cuts.LLAMA3) == [["a", " ", " b", "\n\n ", " c"]]
    assert segments_of(["a", "", "b"], cuts.LLAMA3) == [["a"], [], ["b"]], "a segment is part of two texts"
    assert segments_of([], cuts.LLAMA3) == [] and segments_of([""], cuts.LLAMA3) == [[]]


@pytest.mark.parametrize("pattern", RULE_OF)
def test_a_rule_cuts_only_where_the_pattern_does_in_all_short_texts(pattern):
    """Cut at once and then by the pattern, each text is what it is by the pattern alone."""
    texts = ["".join(text) for length in range(5) for text in product(TOLD_APART, repeat=length)]
    texts += strange_texts(3000) + AWKWARD
    findall = compile_pattern(pattern).findall
    pieces_of = {}
    for text, segments in zip(texts, segments_of(texts, RULE_OF[pattern]), strict=True):
        for segment in segments:
            if segment not in pieces_of:
                pieces_of[segment] = findall(segment)
        assert list(chain.from_iterable(map(pieces_of.get, segments))) == findall(text), (text, segments)


@pytest.mark.slow
@pytest.mark.parametrize("pattern", RULE_OF)
def test_a_rule_cuts_only_where_the_pattern_does_in_longer_texts(pattern):
    findall = compile_pattern(pattern).findall
    for start in product(TOLD_APART, repeat=2):
        texts = ["".join((*start, *text)) for text in product(TOLD_APART, repeat=4)]
        for text, segments in zip(texts, segments_of(texts, RULE_OF[pattern]), strict=True):
            assert list(chain.from_iterable(map(findall, segments))) == findall(text), (text, segments)


@pytest.mark.parametrize("pattern", RULE_OF)
def test_nearly_all_segments_of_prose_are_pre_tokens(pattern):
    """Else nothing is gained. Long numbers and signs before words are what is left uncut."""
    segments = segments_of([PROSE], RULE_OF[pattern])[0]
    assert len(segments) > 0.8 * len(compile_pattern(pattern).findall(PROSE))


# --- Numbering ----------------------------------------------------------------------------------------------


def test_each_different_key_has_its_own_number():
    rng = np.random.default_rng(0)
    numbering, expected = cuts.Numbering(), {}
    for size in (0, 1, 10, 5000, 200_000):  # beyond the first table's slots
        keys = rng.integers(0, 60_000, size).astype(np.uint64) << np.uint64(int(rng.integers(0, 48)))
        numbers = numbering.find_or_add(keys)
        for key, number in zip(keys.tolist(), numbers.tolist()):
            assert expected.setdefault(key, number) == number
        assert sorted(expected.values()) == list(range(len(expected))), "a number is left out or stands twice"
    assert (numbering.find(np.array([1 << 63], np.uint64)) == -1).all()


def test_keys_that_want_the_same_slot_are_told_apart():
    numbering = cuts.Numbering()
    numbering.slots = lambda keys: np.full(len(keys), len(numbering.keys) - 2)  # the end: it goes on at 0
    keys = np.arange(300, dtype=np.uint64)
    assert numbering.find_or_add(keys).tolist() == list(range(300)) == numbering.find(keys).tolist()


def test_segments_have_the_same_number_if_and_only_if_they_are_equal():
    """Of any length: what differs behind the eighth byte, or is the beginning of another, among them."""
    rng = random.Random(0)
    pieces = ["".join(rng.choices("ab\x00é", k=rng.randrange(1, 80))) for _ in range(3000)]
    pieces += [piece[:rng.randrange(1, 20)] for piece in pieces] + ["a" * 200]
    raw = [piece.encode() for piece in pieces]
    bounds = np.cumsum([0, *map(len, raw)])
    numbers = cuts.Segments().numbers(np.frombuffer(b"".join(raw) + cuts.BEYOND, np.uint8), bounds).tolist()
    assert all((number < 0) == (len(piece) > cuts.Segments.LONGEST) for number, piece in zip(numbers, raw))
    short = {(piece, number) for piece, number in zip(raw, numbers) if number >= 0}
    assert len(short) == len({piece for piece, _ in short}) == len({number for _, number in short})


def test_counting_segments_counts_pre_tokens(monkeypatch):
    texts = [PROSE, *AWKWARD, "x" * 300, *strange_texts(300), "one<|end|>two"]
    monkeypatch.setattr(bpe, "WINDOW", 2000)
    for pattern in (PATTERN, GPT2_PATTERN, r"\w+|\W+"):
        expected = bpe.count_pieces((pattern, ("<|end|>",)), texts)
        expected.pop("", None)
        assert bpe.count_pieces_soon((pattern, ("<|end|>",)), texts, workers=1) == expected
        monkeypatch.setattr(cuts.SegmentCounter, "SIZE", 10)  # it forgets after each batch
        assert bpe.count_pieces_soon((pattern, ("<|end|>",)), texts, workers=1) == expected
