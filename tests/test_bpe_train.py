"""bpe_train.py: many merges at a time are those of the plain trainer, one by one."""
import random
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

import bpe
import bpe_train
from bpe import PATTERN, learn_merges, merge
from bpe_train import Words, in_order
from test_bpe import corpus  # noqa: F401: a fixture


def learned_plainly(pieces: dict[str, int], number: int) -> list[tuple[bytes, bytes]]:
    """train_plain, for pre-tokens that are counted already."""
    words = [([bytes([value]) for value in piece.encode()], count) for piece, count in pieces.items()]
    merges = []
    while len(merges) < number:
        counts = Counter()
        for word, count in words:
            for pair in pairwise(word):
                counts[pair] += count
        if not counts:
            break
        merges.append(max(counts, key=lambda pair: (counts[pair], pair)))
        words = [(merge(word, merges[-1]), count) for word, count in words]
    return merges


def words_with_ties(rng) -> Counter:
    """Words of the same few syllables, so that many pairs occur equally often and overlap."""
    letters = rng.choice(["abc", "ab", "cba\x00", "éa字", "abcdefgh"])
    syllables = ["".join(rng.choices(letters, k=rng.randint(1, 8))) for _ in range(rng.randint(1, 10))]
    words = Counter()
    for _ in range(rng.randint(1, 25)):
        words["".join(rng.choices(syllables, k=rng.randint(1, 3)))] += rng.choice([1, 1, 1, 2, 3, 5])
    return words


def undisturbed_pairs(pieces) -> set[tuple[bytes, bytes]]:
    words = Words(pieces)
    places = np.flatnonzero(words.pair)
    pairs = np.unique(words.pair[places[words.undisturbed(places)]]).tolist()
    return {(words.tokens[words.left[pair]], words.tokens[words.right[pair]]) for pair in pairs}


def test_what_is_more_frequent_than_all_that_it_overlaps_is_merged_at_once():
    assert undisturbed_pairs({"low": 1, "ow": 1, "xy": 1}) == {(b"o", b"w"), (b"x", b"y")}, \
        "(l, o) overlaps (o, w), which is more frequent; nothing overlaps (x, y)"


def test_of_equally_frequent_pairs_that_overlap_the_greatest_is_merged_first():
    assert undisturbed_pairs({"abc": 1}) == {(b"b", b"c")}
    assert undisturbed_pairs({"cba": 1}) == {(b"c", b"b")}
    assert undisturbed_pairs({"cbd": 1}) == {(b"c", b"b")}, "(b, d) is the smaller one, whatever d is"


def test_a_pair_waits_where_its_neighbour_may_grow_to_be_greater():
    """(b, d) goes before (a, b); but (z, a) goes first of all, and (za, b) is greater than (b, d)."""
    assert undisturbed_pairs({"zabd": 1}) == {(b"z", b"a")}
    assert learn_merges({"zabd": 1}, 2) == [(b"z", b"a"), (b"za", b"b")] == learned_plainly({"zabd": 1}, 2)


def test_a_pair_overlaps_itself_in_a_run_and_is_merged_from_the_left():
    assert learn_merges({"aaaaa": 1}, 9) == learned_plainly({"aaaaa": 1}, 9) == [
        (b"a", b"a"), (b"aa", b"aa"), (b"aaaa", b"a")]


@pytest.mark.parametrize("seed", range(6))
def test_rounds_give_what_single_merges_give_where_counts_are_equal(seed):
    rng = random.Random(seed)
    for _ in range(50):
        pieces, number = words_with_ties(rng), rng.randint(1, 60)
        assert learn_merges(pieces, number) == learned_plainly(pieces, number), (pieces, number)


def test_thousands_of_merges_take_few_rounds(corpus, monkeypatch):  # noqa: F811
    pieces = bpe.count_pieces((PATTERN, ()), corpus[:20])
    rounds, merge_places = [], Words.merge
    monkeypatch.setattr(Words, "merge", lambda words, places: rounds.append(1) or merge_places(words, places))
    merges = learn_merges(pieces, 3000)
    assert len(merges) == 3000 and len(rounds) < 300, f"{len(rounds)} rounds: are hardly any merged together?"
    assert learn_merges(pieces, 500) == merges[:500], "it matters how many are wanted"


def test_merges_of_one_count_are_put_in_order_as_their_tokens_appear():
    tokens = [*bpe_train.BYTES, b"ab", b"abz", b"yz"]  # (ab, z) is less than (y, z), but there is no ab yet
    a, b, y, z = b"abyz"
    made = [(5, a, b, 256), (5, 256, z, 257), (5, y, z, 258)]
    assert [new for *_, new in in_order(made, tokens)] == [258, 256, 257]
    assert [new for *_, new in in_order([(5, a, b, 256), (9, y, z, 258)], tokens)] == [258, 256]
