"""dedup.py, shingles.py, suffixes.py: what counts as the same, what is found, what is dropped, what stays."""
import json
import math
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from datasketch import MinHash
from hypothesis import given, settings, strategies
from support import in_process

import dedup
import shingles
import suffixes
from config import UserError
from dedup import (StoredTexts, band_keys, candidate_chance, contaminated, contaminated_plain, contamination,
                   curve_line, exact_duplicates, minhash, near_duplicates, near_duplicates_plain,
                   without_repeated_lines, without_repeated_lines_plain)
from shingles import WORD, jaccard, ngrams, words_of
from suffixes import cut, duplicate_spans, duplicate_spans_plain, suffix_array, without_repeated_spans

ROOT = Path(dedup.__file__).parent


def words(number, generator):
    """Words that stand nowhere else."""
    return [f"w{generator.getrandbits(60):x}" for _ in range(number)]


def pair(similarity, total, generator):
    """Two texts of single words, of whose `total` different words a share of `similarity` is in both."""
    shared = round(similarity * total)
    rest = (total - shared) // 2
    both, one, other = (words(number, generator) for number in (shared, rest, total - shared - rest))
    return " ".join(both + one), " ".join(both + other)


def edited(text, changes, generator):
    found = text.split()
    for place in generator.sample(range(len(found)), changes):
        found[place] = words(1, generator)[0]
    return " ".join(found)


def near_corpus(seed, number=60):
    """Texts of 30 to 80 words, half of them edited copies of others, in any order."""
    generator = random.Random(seed)
    texts = [" ".join(words(generator.randint(30, 80), generator)) for _ in range(number // 2)]
    texts += [edited(generator.choice(texts), generator.randint(0, 3), generator) for _ in range(number // 2)]
    generator.shuffle(texts)
    return texts


# ---- n-grams, Jaccard --------------------------------------------------------------------------------------


def test_jaccard_by_hand():
    assert ngrams("The cat sat. On it!", 4) == {("the", "cat", "sat", "on"), ("cat", "sat", "on", "it")}
    assert jaccard("a b c d e f", "b c d e f g", ngram=2) == 4 / 6
    assert jaccard("a b c", "a b c", ngram=2) == 1 and jaccard("a b", "c d", ngram=2) == 0
    assert jaccard("", "", ngram=2) == 0, "no n-grams in common: empty documents are like none"


def test_languages_without_spaces_are_counted_in_characters():
    assert words_of("春眠不覺曉，處處聞啼鳥。") == list("春眠不覺曉處處聞啼鳥")
    assert words_of("GPT-4は日本語") == ["gpt", "4", *"は日本語"]
    poem = "春眠不覺曉，處處聞啼鳥。夜來風雨聲，花落知多少。"
    assert 0 < jaccard(poem, poem.replace("知", "有")) < 1, "with words this text would be a single one"
    assert near_duplicates([poem, "另一首詩，完全不同，沒有一樣的五個字。", poem.replace("。", "！")]).tolist() == [0, 1, 0]


@given(strategies.text(strategies.one_of(strategies.characters(), strategies.sampled_from("aB1_ İΣß.。日"))))
@settings(deadline=None, max_examples=300)
def test_the_fast_form_of_words_equals_the_pattern(text):
    assert words_of(text) == [match.group().lower() for match in WORD.finditer(text)]
    assert words_of(text + "日") == words_of(text) + ["日"], "the short cut for ASCII gives other words"


# ---- MinHash -----------------------------------------------------------------------------------------------


def test_signatures_are_uint32_and_a_function_of_text_and_seed_alone():
    texts = near_corpus(0)
    signatures = minhash(texts, 64, 5)
    assert signatures.shape == (60, 64) and signatures.dtype == np.uint32
    assert np.array_equal(signatures[::-1], minhash(texts[::-1], 64, 5))
    assert np.array_equal(signatures[7:8], minhash([texts[7]], 64, 5)), "it depends on the block"
    assert not np.array_equal(signatures, minhash(texts, 64, 5, seed=1))


def test_hashes_do_not_depend_on_how_texts_are_cut_into_blocks(monkeypatch):
    """With blocks of 16 bytes a text is worked on in many parts, a word may be longer than two of them."""
    texts = near_corpus(1, 20) + ["short", "", "x" * 100 + " y " + "z" * 17, "春眠不覺曉，處處聞啼鳥。夜來風雨聲"]
    whole = minhash(texts, 16, 3)
    monkeypatch.setattr(shingles, "BLOCK", 16)
    assert np.array_equal(minhash(texts, 16, 3), whole)


def test_words_of_equal_bytes_in_another_order_have_other_hashes():
    found = "ab ba aab aba baa a aa aaa aaaa abab baba".split()
    hashes, starts = shingles.Hasher(0).words(" ".join(found).encode())
    assert len(set(hashes.tolist())) == len(found) and starts[:3].tolist() == [0, 3, 6]
    assert shingles.Hasher(0).words(b"  ab  ")[0].tolist() == hashes[:1].tolist()


def test_signatures_do_not_depend_on_the_process():
    """Python's hash() of a str is another in each process."""
    code = "import dedup; print(dedup.minhash(['one two three four five six'], 4, 2).tolist())"
    printed = {subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True,
                              check=True, env={**os.environ, "PYTHONHASHSEED": seed}).stdout for seed in "12"}
    assert printed == {f"{minhash(['one two three four five six'], 4, 2).tolist()}\n"}


@pytest.mark.parametrize("similarity", [0.2, 0.5, 0.8, 0.95])
def test_estimates_lie_within_the_error_of_the_theory_as_datasketch_s_do(similarity):
    """Three standard errors of a share of k columns, for the mean of 40 pairs and for each of them.

    Each pair is held to 4.5 standard errors: of 160 one beyond three is to be expected, beyond 4.5 none.
    """
    generator, k, pairs = random.Random(similarity), 256, 40
    texts = [pair(similarity, 400, generator) for _ in range(pairs)]
    exact = np.array([jaccard(one, other, 1) for one, other in texts])
    ours = np.array([(a == b).mean() for a, b in (minhash(both, k, 1) for both in texts)])
    theirs = np.array([sketch(one, k).jaccard(sketch(other, k)) for one, other in texts])
    error = math.sqrt(similarity * (1 - similarity) / k)
    for estimates in (ours, theirs):
        assert np.abs(estimates - exact).max() < 4.5 * error
        assert abs((estimates - exact).mean()) < 3 * error / math.sqrt(pairs), "biased"
    assert np.abs(ours - theirs).max() < 4.5 * math.sqrt(2) * error
    assert 0.5 < (ours - exact).std() / error < 1.5, "the columns are not independent of each other"


def sketch(text, num_hashes):
    result = MinHash(num_perm=num_hashes)
    result.update_batch([word.encode() for word in text.split()])
    return result


# ---- Locality-sensitive hashing ----------------------------------------------------------------------------


def test_the_curve_is_that_of_fourteen_bands_of_eight():
    assert candidate_chance(0.8) == pytest.approx(1 - (1 - 0.8 ** 8) ** 14)
    assert 0.92 < candidate_chance(0.8) < 0.93, "are bands and rows swapped?"
    assert candidate_chance(0.8, 117, 9) < 0.41, "9 bands of 13 would miss 60 % at the threshold"
    assert curve_line() == ("14 bands of 8 hashes: a pair is found at Jaccard 0.5 with 5.3 %, 0.7 56.5 %, "
                            "0.8 92.4 %, 0.9 100.0 %")


@pytest.mark.parametrize("similarity", [0.5, 0.7, 0.8, 0.9])
def test_pairs_become_candidates_as_often_as_the_formula_says(similarity):
    """Within three standard errors of a share of 1,500 pairs; and half an event for a chance near 1."""
    generator, pairs = random.Random(11), 1500
    texts = [text for _ in range(pairs) for text in pair(similarity, 100, generator)]
    keys = band_keys(texts, ngram=1)
    found = (keys[0::2] == keys[1::2]).any(axis=1).mean()
    chance = float(candidate_chance(similarity))
    assert abs(found - chance) < 3 * math.sqrt(chance * (1 - chance) / pairs) + 0.5 / pairs


def test_a_band_s_number_is_part_of_its_key(monkeypatch):
    """Where keys of all bands stand in one table, documents would meet whose bands agree crosswise."""
    monkeypatch.setattr(dedup, "hash_functions", lambda number, seed: np.ones((2, number), np.uint32))
    assert len(np.unique(minhash(["a b c"], 32, 1))) == 1, "this test's premise: all rows are equal"
    assert len(np.unique(band_keys(["a b c"], num_hashes=32, bands=16, ngram=1))) == 16


def test_keys_of_parts_laid_together_are_those_of_the_whole():
    texts = near_corpus(3)
    parts = np.concatenate([band_keys(texts[:13]), band_keys(texts[13:14]), band_keys(texts[14:])])
    assert np.array_equal(parts, band_keys(texts))
    assert np.array_equal(near_duplicates(texts, keys=parts), near_duplicates(texts))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("threshold", [0.5, 0.8, 1.0])
def test_near_duplicates_equal_all_pairs_compared(seed, threshold):
    """96 bands of 2: a pair at 0.5 is missed with a chance of 1e-12, so the results must be equal."""
    texts = near_corpus(seed)
    plain = near_duplicates_plain(texts, threshold)
    assert np.array_equal(near_duplicates(texts, threshold, num_hashes=192, bands=96), plain)
    assert 0 < np.count_nonzero(plain != np.arange(60)) < 40, "this test's premise"


@given(strategies.lists(strategies.text(alphabet="ab ", max_size=12), max_size=12), strategies.integers(1, 3),
       strategies.sampled_from([0.3, 0.5, 0.75, 1.0]))
@settings(deadline=None, max_examples=100)
def test_near_duplicates_of_any_small_texts_equal_all_pairs(texts, ngram, threshold):
    fast = near_duplicates(texts, threshold, num_hashes=128, bands=128, ngram=ngram)
    assert fast.tolist() == near_duplicates_plain(texts, threshold, ngram).tolist()


def test_nothing_below_the_threshold_is_dropped_even_if_every_pair_is_a_candidate():
    texts = near_corpus(5)
    kept = near_duplicates(texts, 0.9, num_hashes=112, bands=112)
    for i in np.flatnonzero(kept != np.arange(len(texts))).tolist():
        assert max(jaccard(texts[i], texts[j]) for j in range(len(texts)) if j != i) >= 0.9
    assert np.array_equal(kept, near_duplicates_plain(texts, 0.9))


def test_a_pair_at_exactly_the_threshold_is_dropped():
    """Of ten words eight are in both."""
    one, other = "a b c d e f g h i", "a b c d e f g h j"
    assert jaccard(one, other, 1) == 0.8
    assert near_duplicates([one, other], 0.8, 128, 128, ngram=1).tolist() == [0, 0]
    assert near_duplicates([one, other], 0.8001, 128, 128, ngram=1).tolist() == [0, 1]


def test_whoever_is_joined_however_indirectly_has_one_root_the_smallest_index():
    generator = random.Random(0)
    for _ in range(50):
        clusters, groups = dedup.Clusters(20), [{i} for i in range(20)]
        for _ in range(generator.randrange(25)):
            i, j = generator.randrange(20), generator.randrange(20)
            clusters.join(i, j)
            both = next(group for group in groups if i in group) | next(group for group in groups if j in group)
            groups = [group for group in groups if not group & both] + [both]
        roots = {i: min(group) for group in groups for i in group}
        assert clusters.roots().tolist() == [roots[i] for i in range(20)]


def test_clusters_are_transitive_and_the_smallest_index_stays():
    generator = random.Random(0)
    first = " ".join(words(200, generator))
    second = edited(first, 3, generator)
    third = edited(second, 3, generator)
    other = " ".join(words(200, generator))
    assert jaccard(first, second) > 0.8 < jaccard(second, third) and jaccard(first, third) < 0.8
    for texts, expected in (([other, first, second, third], [0, 1, 1, 1]),
                            ([first, third, other, second], [0, 0, 2, 0]),
                            ([third, other, second, first], [0, 1, 0, 0])):
        assert near_duplicates(texts, num_hashes=256, bands=64).tolist() == expected


def test_the_clusters_do_not_depend_on_the_order_of_the_documents():
    texts, generator = near_corpus(6), random.Random(0)
    clusters = near_duplicates(texts)
    for _ in range(3):
        order = list(range(len(texts)))
        generator.shuffle(order)
        kept = np.array(order)[near_duplicates([texts[i] for i in order])]
        again = np.empty(len(texts), int)
        again[order] = kept
        assert len(set(zip(clusters.tolist(), again.tolist()))) == len(set(clusters.tolist()))


def test_documents_shorter_than_the_ngram_are_one_shingle():
    """Distinct ones survive, equal ones collapse, and signs count: there is nothing else to tell them by."""
    texts = ["one two", "one three", "one  two", "3 + 4", "3 - 4", "!!!", "???", "Ja", "ha", "ha ha ha ha ha"]
    assert near_duplicates(texts).tolist() == [0, 1, 0, 3, 4, 5, 6, 7, 8, 9]


def test_empty_documents_absorb_nothing():
    assert near_duplicates(["", "a text of more than five words", " \n", "", "b"]).tolist() == [0, 1, 2, 3, 4]
    assert near_duplicates([]).tolist() == [] and minhash([], 8, 5).shape == (0, 8)
    assert (minhash([""], 8, 5) == 2 ** 32 - 1).all()


def test_many_copies_of_a_text_take_linear_time():
    """5,000 near-copies share buckets: all pairs would be 12 million comparisons, here it is one each."""
    generator = random.Random(0)
    text = " ".join(words(60, generator))
    texts = [f"{text} {number}" for number in range(5000)]
    assert not near_duplicates(texts).any()


def test_a_bucket_of_unlike_documents_takes_bounded_time():
    compared = []
    unlike = lambda i, j: bool(compared.append((i, j)))  # noqa: E731
    dedup.join_similar(list(range(50)), dedup.Clusters(50), unlike, most=10)
    assert len(compared) == len(set(compared)) == sum(min(i, 10) for i in range(50))
    compared.clear()
    dedup.join_similar(list(range(50)), dedup.Clusters(50), lambda i, j: unlike(i, j) or True)
    assert len(compared) == 49, "one of a cluster is enough"


def test_bands_that_do_not_fit_and_other_settings_are_refused():
    for given_settings, complaint in ((dict(num_hashes=100, bands=14), "100 .* 14 bands .*--num_hashes 98"),
                                      (dict(bands=0), "0 bands"), (dict(threshold=0), "threshold 0 is out"),
                                      (dict(threshold=1.5), "threshold 1.5"), (dict(ngram=0), "ngram 0")):
        with pytest.raises(UserError, match=complaint):
            near_duplicates(["a", "b"], **given_settings)
    with pytest.raises(UserError, match="one str"):
        minhash("a text", 8, 5)


# ---- Equal documents, equal lines --------------------------------------------------------------------------


def test_equal_documents_point_to_the_first():
    assert exact_duplicates(["b", "a", "b", "B", "a", "", "b", ""]).tolist() == [0, 1, 0, 3, 1, 5, 0, 5]
    assert exact_duplicates([]).tolist() == []


@given(strategies.lists(strategies.sampled_from(["a", "b", "c", "", "\ud83d"])))
def test_equal_documents_are_those_that_list_index_finds(texts):
    assert exact_duplicates(texts).tolist() == [texts.index(text) for text in texts]


def test_lines_of_earlier_documents_are_dropped_and_repeats_within_a_document_stay():
    texts = ["Menu\nla la\nla la\n", "Menu\nnew\n\nla la", "  Menu  \nMENU\n"]
    assert list(without_repeated_lines(texts)) == ["Menu\nla la\nla la\n", "new\n\n", "MENU\n"]
    assert list(without_repeated_lines(texts, normalise=True)) == ["Menu\nla la\nla la\n", "new\n\n", ""]
    assert list(without_repeated_lines(texts, min_length=5))[1] == "Menu\nnew\n\n", "short lines always stay"
    pages = ["Café, page 12\n…\n", "CAFE page 34!\n…\nend"]
    assert list(without_repeated_lines(pages, normalise=True)) == [pages[0], "…\nend"]


def test_sentences_of_earlier_documents_are_dropped():
    texts = ["It rains. It pours! Version 1.5 is out.", "Now it rains. It pours! 春眠不覺曉。處處", "春眠不覺曉。It rains."]
    assert list(without_repeated_lines(texts, unit="sentence")) == [
        texts[0], "Now it rains. 春眠不覺曉。處處", ""]


@given(strategies.lists(strategies.text(alphabet="aA1. \n。", max_size=20), max_size=8),
       strategies.sampled_from(["line", "sentence"]), strategies.booleans())
@settings(deadline=None)
def test_repeated_lines_equal_the_plain_form(texts, unit, normalise):
    fast = list(without_repeated_lines(texts, unit, normalise))
    assert fast == without_repeated_lines_plain(texts, unit, normalise)


# ---- Passages ----------------------------------------------------------------------------------------------


def test_a_copied_passage_is_found_at_its_second_place():
    tokens = np.arange(100)
    tokens[60:80] = tokens[10:30]
    assert duplicate_spans(tokens, 20).tolist() == [[60, 80]]
    assert duplicate_spans(tokens, 5).tolist() == [[60, 80]]
    assert duplicate_spans(tokens, 21).tolist() == []
    assert cut(tokens.tolist(), [(60, 80)]) == [*range(60), *range(80, 100)]


@pytest.mark.parametrize("piece", [8, 2 ** 17])
def test_spans_equal_brute_force_on_small_alphabets(monkeypatch, piece):
    """Pieces of 8 places let groups and pieces end everywhere."""
    monkeypatch.setattr(suffixes, "PIECE", piece)
    generator = np.random.default_rng(piece)
    for _ in range(400):
        size, length = generator.integers(0, 120), int(generator.integers(1, 25))
        tokens = generator.integers(generator.integers(1, 5), size=size)
        expected = [list(span) for span in duplicate_spans_plain(tokens.tolist(), length)]
        assert duplicate_spans(tokens, length).tolist() == expected, (tokens.tolist(), length)


@pytest.mark.parametrize("piece", [8, 2 ** 17])
def test_the_suffix_array_equals_sorted_suffixes(monkeypatch, piece):
    monkeypatch.setattr(suffixes, "PIECE", piece)
    generator = np.random.default_rng(piece)
    for _ in range(200):
        tokens = generator.integers(generator.integers(1, 5), size=generator.integers(0, 90)).tolist()
        order, new = suffix_array(np.array(tokens, np.int64))
        assert order.tolist() == sorted(range(len(tokens)), key=lambda i: tokens[i:]) and new.all()
        order, new = suffix_array(np.array(tokens, np.int64), 5)
        prefixes = [tokens[i:i + 5] for i in order]
        assert prefixes == sorted(prefixes)
        assert new[1:].tolist() == [a != b for a, b in zip(prefixes, prefixes[1:])]


@pytest.mark.parametrize("dtype, top", [(np.uint8, 255), (np.uint16, 65535), (np.uint32, 2 ** 32 - 2),
                                        (np.int64, 2 ** 31)])
def test_tokens_may_be_any_integers(dtype, top):
    tokens = np.array([top, 0, 5, top - 1, top, 0, 5, 0, 0], dtype)
    assert duplicate_spans(tokens, 3).tolist() == [[4, 7]]
    for wrong in (np.array([1.5, 2, 3]), np.array([-1, 2, 3]), np.array([2 ** 32 - 1, 2, 3])):
        with pytest.raises(UserError, match="must be integers in"):
            duplicate_spans(wrong, 1)
    with pytest.raises(UserError, match="min_length 0"):
        duplicate_spans(tokens, 0)


def test_a_window_over_the_end_of_a_document_counts_neither_way():
    tokens = np.array([1, 2, 3, 4, 1, 2, 3, 4])
    assert duplicate_spans(tokens, 4).tolist() == [[4, 8]]
    assert duplicate_spans(tokens, 4, ends=np.array([2, 8])).tolist() == [], "first it is in two documents"
    assert duplicate_spans(tokens, 3, ends=np.array([3, 8])).tolist() == [[4, 7]]
    assert duplicate_spans(tokens, 2, ends=np.array([4, 6, 8])).tolist() == [[4, 8]], "1 2 and 3 4"


@given(strategies.lists(strategies.text("aé日😀", max_size=25), max_size=6), strategies.integers(1, 12))
@settings(deadline=None)
def test_passages_are_cut_at_whole_characters_and_never_across_documents(texts, min_length):
    short = without_repeated_spans(texts, min_length)
    assert len(short) == len(texts)
    for before, after in zip(texts, short):
        rest = iter(before)
        assert all(character in rest for character in after), "what is left is not in the order of the text"


def test_a_passage_of_a_text_before_is_cut():
    licence = "Permission is hereby granted, free of charge, to whom it may concern.\n"
    texts = [licence + "one", "two" + licence + "é", licence]
    assert without_repeated_spans(texts, len(licence)) == [texts[0], "twoé", ""]
    assert without_repeated_spans(texts, len(licence) + 1) == texts


# ---- Decontamination ---------------------------------------------------------------------------------------

QUESTION = "A farmer has seventeen sheep, and all but nine of them run away; how many are left?"


def test_a_document_that_quotes_thirteen_words_of_a_benchmark_is_contaminated():
    quoted = "He asked: “a farmer has SEVENTEEN sheep and all but nine of them run away” – and laughed."
    twelve = "farmer has seventeen sheep, and all but nine of them run"
    assert contaminated([quoted, twelve, "", QUESTION], [QUESTION]).tolist() == [True, False, False, True]
    assert contaminated([twelve], [QUESTION], ngram=5).tolist() == [True]


def test_the_report_names_document_benchmark_item_and_words_and_the_text_can_be_cut():
    text = f"Before. {QUESTION} After. And the other one: eight words that stand in every exam, always!"
    benchmarks = {"sheep": ["something of no concern, with as many words as are needed here", QUESTION],
                  "exams": ["Eight words that stand in every exam always"]}
    clean, found = contamination(["clean", text], benchmarks)
    assert clean == []
    assert [(overlap.benchmark, overlap.item, overlap.words) for overlap in found] == [
        ("sheep", 1, " ".join(words_of(QUESTION))),
        ("exams", 0, "eight words that stand in every exam always")]
    assert cut(text, [overlap[2:4] for overlap in found]) == "Before. ? After. And the other one: !"


@pytest.mark.parametrize("seed", range(3))
def test_contamination_equals_sets_of_words(seed):
    generator = random.Random(seed)
    texts = [" ".join(generator.choices("a日", k=generator.randint(0, 30))) for _ in range(300)]
    benchmark = [" ".join(generator.choices("a日", k=generator.randint(5, 15))) for _ in range(10)]
    found = contaminated(texts, benchmark, 9)
    assert found.tolist() == contaminated_plain(texts, benchmark, 9)
    assert 20 < found.sum() < 280, "this test's premise"


def test_words_over_two_documents_do_not_contaminate_either():
    halves = QUESTION[:45], QUESTION[45:]
    assert contaminated(halves, [QUESTION]).tolist() == [False, False]


def test_a_benchmark_in_which_nothing_could_be_found_is_refused():
    for benchmark in ([], [""], ["too short to count"]):
        with pytest.raises(UserError, match="benchmark: no item of at least 8 words"):
            contaminated([QUESTION], benchmark)
    with pytest.raises(UserError, match="ngram 0"):
        contaminated([QUESTION], [QUESTION], ngram=0)


# ---- Texts on disk, and the command ------------------------------------------------------------------------


def write_lines(path, texts):
    path.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts),
                    encoding="utf-8", newline="\n")
    return path


def test_texts_on_disk_are_those_of_the_files(tmp_path):
    texts = near_corpus(8) + ["春\u2028眠\n", ""]
    paths = [write_lines(tmp_path / "a.jsonl", texts[:20]), write_lines(tmp_path / "empty.jsonl", []),
             write_lines(tmp_path / "b.jsonl", texts[20:])]
    stored = StoredTexts(paths)
    assert len(stored) == len(texts) and list(stored) == texts
    assert stored[20] + stored[19] == texts[20] + texts[19]
    assert np.array_equal(near_duplicates(stored), near_duplicates(texts))
    assert list(without_repeated_lines(stored)) == list(without_repeated_lines(texts))
    (tmp_path / "c.jsonl").write_text('{"text": "a"}\n\n{"txt": "b"}\n', encoding="utf-8")
    with pytest.raises(UserError, match="c.jsonl: document 2 has no text"):
        list(StoredTexts([tmp_path / "c.jsonl"]))
    stored.close()


def test_the_command_says_what_it_found(tmp_path, monkeypatch, capsys):
    generator = random.Random(0)
    text = " ".join(words(100, generator))
    path = write_lines(tmp_path / "a.jsonl", [text, "something else", text, text + " and more"])
    code, out, _ = in_process(monkeypatch, capsys, dedup.main, "--input", path, "--show", 1)
    assert code == 0 and "4 documents" in out and curve_line() in out and "3 is like 0: Jaccard 0.9" in out
    code, _, error = in_process(monkeypatch, capsys, dedup.main, "--input", path, "--bands", 13)
    assert code == 2 and error.count("\n") == 1 and "--num_hashes" in error
    code, _, error = in_process(monkeypatch, capsys, dedup.main, "--input", tmp_path / "none.jsonl")
    assert code == 2 and "none.jsonl" in error
