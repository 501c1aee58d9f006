"""classifier.py: thresholds against brute force, the score by hand, learning, votes, held-out figures."""
import math

import numpy as np
import pytest

import classifier
from classifier import (BITS, Classifier, features, misread, part_of, precision_and_recall,
                        shuffled_characters, shuffled_words, spoiled, threshold_for, votes)
from config import UserError
from support import in_process

GOOD = [f"the {noun} of the {place} was {verb} with care"
        for noun in ("house", "ship", "bridge", "garden", "wall")
        for place in ("king", "town", "river") for verb in ("built", "made", "kept")]
BAD = [f"buy {noun} now free {place} click {verb}" for noun in ("pills", "shoes", "watches", "loans", "coins")
       for place in ("offer", "bonus", "gift") for verb in ("here", "this", "below")]


@pytest.fixture(scope="module")
def learned():
    texts = GOOD[::2] + BAD[::2]
    return Classifier.train(texts, [True] * len(GOOD[::2]) + [False] * len(BAD[::2]), "both")


def test_words_and_characters_have_a_half_of_the_buckets_each():
    assert (features("the cat", "words") < 1 << BITS - 1).all()
    assert (features("the cat", "characters") >= 1 << BITS - 1).all()
    assert (features("the cat", "both") < 1 << BITS).all() and len(features("", "both")) == 0


def test_a_score_is_the_sigmoid_of_the_weights_over_the_root_of_their_number():
    weights = np.zeros(1 << BITS, np.float32)
    grams = features("the cat sat", "words")
    weights[grams] = np.arange(1, len(grams) + 1)
    expected = 1 / (1 + math.exp(-(15 / math.sqrt(5) - 2)))  # 1+2+3+4+5 over three words and two pairs
    assert Classifier("words", weights, -2.0).scores(["the cat sat"])[0] == pytest.approx(expected, rel=1e-6)
    assert Classifier("words", weights, 0.0).scores([""])[0] == 0.5


def test_training_separates_what_it_has_not_seen(learned):
    assert (learned.scores(GOOD[1::2]) > 0.5).all() and (learned.scores(BAD[1::2]) < 0.5).all()
    again = Classifier.train(GOOD[::2] + BAD[::2], [True] * len(GOOD[::2]) + [False] * len(BAD[::2]), "both")
    assert np.array_equal(again.weights, learned.weights), "the same seed must give the same weights"


def test_one_kind_of_text_teaches_nothing():
    with pytest.raises(UserError, match="texts of both kinds"):
        Classifier.train(GOOD, [True] * len(GOOD))


def test_precision_and_recall_by_hand():
    kept, good = np.array([1, 1, 1, 0, 0], bool), np.array([1, 1, 0, 1, 0], bool)
    assert precision_and_recall(kept, good) == (2 / 3, 2 / 3)
    assert precision_and_recall(np.zeros(5, bool), good) == (1.0, 0.0)


@pytest.mark.parametrize("seed", range(20))
def test_the_threshold_is_the_lowest_that_reaches_the_precision(seed):
    rng = np.random.default_rng(seed)
    scores, good = rng.integers(8, size=30) / 8, rng.random(30) < 0.6  # many ties
    for precision in (0.5, 0.7, 0.9):
        fine = [t for t in np.unique(scores) if precision_and_recall(scores >= t, good)[0] >= precision]
        if fine:
            assert threshold_for(scores, good, precision) == min(fine)
        else:
            with pytest.raises(UserError, match="no threshold keeps texts"):
                threshold_for(scores, good, precision)


def test_a_majority_votes_or_as_many_as_are_asked_for(learned):
    yes, no = (Classifier("words", np.zeros(1 << BITS, np.float32), bias) for bias in (9.0, -9.0))
    assert votes([yes, yes, no], ["a", "b"]).tolist() == [True, True]
    assert votes([yes, no, no], ["a"]).tolist() == [False] and votes([yes, no], ["a"]).tolist() == [False]
    assert votes([yes, no, no], ["a"], at_least=1).tolist() == [True]


def test_a_saved_classifier_scores_the_same(learned, tmp_path):
    learned.threshold = 0.7
    learned.save(tmp_path / "c.npz")
    again = Classifier.load(tmp_path / "c.npz")
    assert np.array_equal(again.scores(GOOD + BAD), learned.scores(GOOD + BAD)) and again.threshold == 0.7


def test_texts_are_spoiled_as_a_function_of_text_and_seed():
    text, rng = " ".join(GOOD[:3]), np.random.default_rng(0)
    assert sorted(shuffled_words(text, rng).split()) == sorted(text.split())
    assert sorted(shuffled_characters(text, rng)) == sorted(text)
    assert misread(text, rng) != text and abs(len(misread(text, rng)) - len(text)) < 0.1 * len(text)
    assert spoiled(text, 1) == spoiled(text, 1) and len({spoiled(text, seed) for seed in range(12)}) > 6


def test_the_parts_are_sixty_to_twenty_to_twenty_and_a_source_has_one():
    parts = [part_of(f"module_{i}.py") for i in range(10_000)]
    for part, share in (("learn", 0.6), ("choose", 0.2), ("measure", 0.2)):
        assert abs(parts.count(part) / 10_000 - share) < 0.02  # five standard deviations are 0.0245 and 0.02
    assert part_of("a.py") == part_of("a.py")


def test_the_command_learns_from_named_files(tmp_path, monkeypatch, capsys):
    for name, texts in (("good", GOOD), ("bad", BAD)):
        (tmp_path / name).mkdir()
        for i, text in enumerate(texts):
            (tmp_path / name / f"{i}.txt").write_text(f"{text}. " * 6, encoding="utf-8")
    run = lambda *words: in_process(monkeypatch, capsys, classifier.main, "--good", tmp_path / "good", *words)
    code, out, err = run("--bad", tmp_path / "bad", "--out", tmp_path / "c", "--kinds", "words")
    assert code == 0 and "words        precision 1.000, recall 1.000 on held-out texts" in out, err
    assert "vote" in out and Classifier.load(tmp_path / "c" / "words.npz").kind == "words"
    code, _, err = run("--out", tmp_path / "c")
    assert code == 2 and "words.npz exists; pass --overwrite" in err and err.count("\n") == 1


@pytest.mark.slow
def test_spoiled_docstrings_are_found_at_the_precision_asked_for(tmp_path, monkeypatch, capsys):
    code, out, err = in_process(monkeypatch, capsys, classifier.main, "--out", tmp_path / "c")
    assert code == 0, err
    figures = {line.split()[0]: (float(line.split()[2].rstrip(",")), float(line.split()[4]))
               for line in out.splitlines() if " recall " in line}
    precision, recall = figures["vote"]
    # 0.98 was asked for where the threshold was chosen; on some 500 others a standard error is 0.006
    assert precision > 0.96 and recall > 0.9 and set(figures) == {"words", "characters", "both", "vote"}
