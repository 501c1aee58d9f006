"""ngrams.py: hashing by hand, texts of the default corpus, files without pickle."""
import numpy as np
import pytest

from config import UserError
from ngrams import character_ngrams, is_prose, load_arrays, prose, save_arrays, word_ngrams


def by_hand(codes, n, bits):
    """The stated hash in Python's own integers, one n-gram at a time."""
    buckets = []
    for start in range(len(codes) - n + 1):
        state = 0
        for code in codes[start:start + n]:
            state = (state + code) * 0x9E3779B97F4A7C15 % 2**64
            state ^= state >> 29
        buckets.append(state * 0x9E3779B97F4A7C15 % 2**64 >> (64 - bits))
    return buckets


def test_buckets_are_those_of_the_stated_hash():
    text = " the çat 大 "
    for n in (1, 2, 3, 4):
        assert character_ngrams(text, (n,), 18).tolist() == by_hand(list(map(ord, text)), n, 18)
    assert character_ngrams("ab", (2,), 10).tolist() == by_hand(list(map(ord, " ab ")), 2, 10)


def test_all_lengths_stand_one_after_the_other_and_equal_ngrams_share_a_bucket():
    both = character_ngrams("abcabc", (2, 3), 18)
    assert both.tolist() == [*character_ngrams("abcabc", (2,), 18), *character_ngrams("abcabc", (3,), 18)]
    words = word_ngrams("the cat, the cat", (1, 2), 18)
    assert len(words) == 5 + 4 and words[0] == words[3] and words[5] == words[8] and words[5] != words[6]


def test_case_and_white_space_make_no_difference_but_order_does():
    assert character_ngrams("The\n\t CAT").tolist() == character_ngrams("the cat").tolist()
    assert word_ngrams("The\nCAT").tolist() == word_ngrams("the  cat").tolist()
    assert word_ngrams("b a", (2,)).tolist() != word_ngrams("a b", (2,)).tolist()


@pytest.mark.parametrize("text", ["", " ", "a", "\ud800", "\0"])
def test_short_and_odd_texts_have_few_ngrams_or_none(text):
    assert len(character_ngrams(text, (4,))) <= 1 and len(word_ngrams(text, (2,))) == 0


def test_buckets_are_spread_evenly():
    """65,536 different codes over 256 buckets: 256 each, with a standard deviation of 16; seven of them."""
    counts = np.bincount([by_hand([code], 1, 8)[0] for code in range(65536)], minlength=256)
    assert abs(counts - 256).max() < 7 * 16


def test_the_default_texts_are_prose_of_the_library_and_named_files_are_cut(tmp_path):
    (tmp_path / "a.txt").write_text("x" * 4500, encoding="utf-8")
    assert [len(piece["text"]) for piece in prose([tmp_path])] == [2000, 2000, 500]
    assert is_prose("the name of the file that is to be read, with its path")
    assert not is_prose("x = [1, 2, 3] + foo(bar) * 7 - the of and to")


def test_arrays_come_back_as_they_were(tmp_path):
    save_arrays(tmp_path / "new" / "a.npz", "languages", {"x": np.arange(3, dtype=np.int16)},
                {"names": ["é", "大"]})
    arrays, about = load_arrays(tmp_path / "new" / "a.npz", "languages")
    assert (arrays["x"].tolist() == [0, 1, 2] and arrays["x"].dtype == np.int16
            and about["names"] == ["é", "大"])


def test_other_files_are_refused_in_a_line_and_no_pickle_is_read(tmp_path):
    path = tmp_path / "a.npz"
    with pytest.raises(UserError, match="a.npz: no such file; it is written by languages.py"):
        load_arrays(path, "languages")
    save_arrays(path, "classifier", {}, {})
    with pytest.raises(UserError, match="was written by classifier.py, not by languages.py"):
        load_arrays(path, "languages")
    whole = path.read_bytes()
    np.savez(tmp_path / "p.npz", header=np.array([{"kind": "languages"}], object))
    for content in (b"", b"rubbish", whole[:len(whole) // 2], (tmp_path / "p.npz").read_bytes()):
        path.write_bytes(content)
        with pytest.raises(UserError, match="is not a file that languages.py wrote"):
            load_arrays(path, "languages")
