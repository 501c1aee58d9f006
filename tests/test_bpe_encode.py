"""bpe_encode.py: long texts and many have the ids that bpe.py gives short ones, merge by merge."""
import random
import unicodedata
from itertools import chain

import numpy as np
import pytest

import bpe
from bpe import GPT2_PATTERN, PATTERN, Tokenizer
from bpe_encode import Encoder, every_other
from test_bpe import AWKWARD, PROSE
from test_cuts import strange_texts


@pytest.fixture(scope="module")
def texts():
    return [PROSE, *AWKWARD, *strange_texts(2000), "aaa" * 200, "ab" * 400, "每个词" * 150, " " * 500 + "x",
            "-" * 90]


@pytest.mark.parametrize("pattern, settings", [
    (PATTERN, {}), (GPT2_PATTERN, {}), (bpe.DIGITS_PATTERN, {}), (PATTERN, {"ignore_merges": True}),
    (PATTERN.replace(r"\p{N}{1,3}", r"\p{N}"), {"nfc": True})])
def test_long_texts_have_the_ids_of_short_ones(texts, pattern, settings):
    learned = Tokenizer.train([PROSE * 3, "a" * 70, "aab" * 30], 460, pattern=pattern)
    tokenizer = Tokenizer(learned.merges, (), pattern, **settings)
    plain = [tokenizer.encode(text) for text in texts]  # each is short
    assert max(map(len, texts)) < bpe.LONG_TEXT < sum(map(len, texts)), "nothing is compared"
    for _ in range(2):  # with what it has kept, too
        assert [ids.tolist() for ids in tokenizer.encode_batch(texts)] == plain
    whole = "\n".join(texts)
    expected = list(chain.from_iterable(tokenizer._ids(pieces) for pieces in bpe.split(
        unicodedata.normalize("NFC", whole) if tokenizer.nfc else whole, pattern)))
    assert tokenizer.encode(whole) == expected
    cut = [whole[i:i + 777] for i in range(0, len(whole), 777)]
    assert list(tokenizer.encode_stream(cut)) == expected


def test_the_pool_is_bounded_and_changes_nothing(texts, monkeypatch):
    tokenizer = Tokenizer.train([PROSE], 400)
    expected = [tokenizer.encode(text) for text in texts]
    monkeypatch.setattr(Encoder, "SIZE", 10)
    for _ in range(3):
        assert [ids.tolist() for ids in tokenizer.encode_batch(texts)] == expected


def test_a_stream_in_small_windows_is_the_whole_text(texts):
    tokenizer = Tokenizer.train([PROSE], 400)
    whole = "".join(texts)
    ids = tokenizer._encoder.encode([whole])[0].tolist()
    for window in (1, 50, 3000):
        stream = tokenizer._encoder.stream(iter(whole[:5000]) if window == 1 else [whole], window)
        got = list(chain.from_iterable(part.tolist() for part in stream))
        assert got == (tokenizer.encode(whole[:5000]) if window == 1 else ids)


def test_every_other_of_neighbouring_places():
    assert every_other(np.array([0, 1, 2, 5, 6, 9], np.int64)).tolist() == [0, 2, 5, 9]
    assert every_other(np.array([], np.int64)).tolist() == []


def test_merges_in_an_order_that_no_training_gives():
    """(ab, c) before (a, b): what joins a new token may have been learned before it."""
    merges = [(b"b", b"c"), (b"a", b"b"), (b"a", b"bc"), (b"c", b"c"), (b"cc", b"a")]
    tokenizer = Tokenizer(merges)
    rng = random.Random(0)
    texts = [" ".join("".join(rng.choices("abc", k=rng.randrange(9))) for _ in range(20)) for _ in range(50)]
    assert max(map(len, texts)) < bpe.LONG_TEXT < sum(map(len, texts)), "nothing is compared"
    expected = [tokenizer.encode(text) for text in texts]
    assert [ids.tolist() for ids in tokenizer.encode_batch(texts)] == expected
