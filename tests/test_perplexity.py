"""perplexity.py: modified Kneser-Ney against the formula in dictionaries; the filter on spoiled text."""
import math
from collections import Counter, defaultdict

import numpy as np
import pytest

import perplexity
from bpe import Tokenizer
from config import UserError
from perplexity import (ModelScorer, NgramModel, discounts, percentile_bounds, perplexity_problem)
from support import in_process, random_model


def kneser_ney(documents, vocab_size, order):
    """P(word | context) by Chen & Goodman's formula, with dictionaries: slow, and as in the paper."""
    counts = [Counter() for _ in range(order + 1)]
    for ids in documents:
        ids = [vocab_size] * (order - 1) + list(ids)
        for i in range(order - 1, len(ids)):
            counts[order][tuple(ids[i - order + 1:i + 1])] += 1
    for k in range(order - 1, 0, -1):
        for gram in counts[k + 1]:
            counts[k][gram[1:]] += 1
    by_context = [defaultdict(dict) for _ in counts]
    for k in range(1, order + 1):
        for gram, count in counts[k].items():
            by_context[k][gram[:-1]][gram[-1]] = count
    taken = [None] + [[0.0, *discounts(np.array(list(counts[k].values())))] for k in range(1, order + 1)]

    def p(word, context):
        k = len(context) + 1
        lower = p(word, context[1:]) if context else 1 / vocab_size
        words = by_context[k].get(tuple(context))
        if not words:
            return lower
        d = [taken[k][min(count, 3)] for count in words.values()]
        count = words.get(word, 0)
        return (count - taken[k][min(count, 3)] + sum(d) * lower) / sum(words.values())
    return p


def random_documents(seed, vocab_size=7, number=30):
    rng = np.random.default_rng(seed)
    return [(rng.random(rng.integers(0, 25)) ** 2 * vocab_size).astype(np.int64) for _ in range(number)]


@pytest.mark.parametrize("order", [1, 2, 3, 5])
def test_probabilities_are_those_of_the_formula(order):
    documents, others = random_documents(0), random_documents(1, number=10) + [np.array([6, 6, 6, 6, 0])]
    p = kneser_ney(documents, 7, order)
    expected = [math.log(p(word, ([7] * (order - 1) + list(ids))[i:i + order - 1]))
                for ids in others for i, word in enumerate(ids.tolist())]
    model = NgramModel.train(documents, 7, order)
    assert np.allclose(model.logps(others), expected, rtol=0, atol=1e-5)  # shares are stored as float32


@pytest.mark.parametrize("order", [1, 2, 4])
def test_probabilities_of_all_words_sum_to_one_whatever_the_context(order):
    model = NgramModel.train(random_documents(2), 7, order)
    for context in ([], [0], [6, 6, 6], [0, 1, 2, 3], [5, 0]):
        logps = [model.logps([np.array([*context, word])])[-1] for word in range(7)]
        assert np.exp(logps).sum() == pytest.approx(1, abs=1e-6)  # float32


def test_a_word_known_from_one_context_is_a_poor_guess_for_another():
    """Kneser and Ney's reason: "Francisco" is frequent, but stands behind "San" alone."""
    san, francisco, glasses, the, my, her, dark = range(7)
    documents = [np.array([san, francisco])] * 6 + [np.array([w, glasses]) for w in (the, my, her, dark)]
    logp = lambda *ids: NgramModel.train(documents, 7, 2).logps([np.array(ids)])[-1]
    assert logp(glasses, glasses) > logp(glasses, francisco), "seen more often, but in one place"
    assert logp(san, francisco) > math.log(0.5)


def test_discounts_follow_the_counts_of_counts():
    counts = np.repeat([1, 2, 3, 4], [60, 20, 10, 5])
    y = 60 / (60 + 40)
    assert discounts(counts) == pytest.approx([1 - 2 * y * 20 / 60, 2 - 3 * y * 10 / 20, 3 - 4 * y * 5 / 10])
    assert discounts(np.array([1, 1])).tolist() == [0.5, 1.0, 1.5], "where a number is zero"


def test_documents_do_not_reach_into_each_other():
    documents = random_documents(3)
    model = NgramModel.train(documents, 7, 3)
    alone = np.concatenate([model.logps([ids]) for ids in documents])
    assert np.array_equal(model.logps(documents), alone)
    other = NgramModel.train(documents[::-1], 7, 3)
    assert np.allclose(other.logps(documents), alone, rtol=0, atol=1e-6), "their order must not matter"


def test_without_tokens_there_is_nothing_to_learn():
    with pytest.raises(UserError, match="no tokens"):
        NgramModel.train([np.zeros(0, np.int64)], 7, 3)


TEXTS = [f"the {a} of the {b} was {c} in the {d}, and {e} knew of it. " * 2
         for a in ("house", "ship", "king") for b in ("town", "river") for c in ("seen", "kept")
         for d in ("night", "storm") for e in ("nobody", "we")]


@pytest.fixture(scope="module")
def model():
    tokenizer = Tokenizer.train(TEXTS[::2], 300, workers=1)
    model = NgramModel.train([np.array(tokenizer.encode(text)) for text in TEXTS[::2]], 300, 4)
    model.tokenizer = tokenizer
    model.bounds = percentile_bounds(model.bits_per_byte(TEXTS[1::4]), 0, 100)
    return model


def test_bits_per_byte_are_the_bits_of_all_tokens_over_the_bytes(model):
    text = "the ship größe 大"
    logps = model.logps([np.array(model.tokenizer.encode(text))])
    assert model.bits_per_byte([TEXTS[0], text])[1] == pytest.approx(
        -logps.sum() / math.log(2) / len(text.encode()))
    assert np.isnan(model.bits_per_byte(["", "a"])[0]) and perplexity_problem(math.nan, (1, 2)) is None


def test_percentiles_become_bounds_and_bounds_reasons():
    assert percentile_bounds(np.arange(101.0), 5, 90) == (5, 90)
    assert perplexity_problem(4.8123, (1, 3.2)) == "bits_per_byte: 4.812, at most 3.200"
    assert perplexity_problem(0.5, (1, 3.2)) == "bits_per_byte: 0.500, at least 1.000"
    assert perplexity_problem(1, (1, 3.2)) is None and perplexity_problem(3.2, (1, 3.2)) is None
    with pytest.raises(UserError, match="no text is held out"):
        percentile_bounds(np.array([math.nan]), 1, 95)


def test_the_filter_drops_shuffled_and_gibberish_text_and_keeps_the_rest(model):
    kept = lambda texts: [perplexity_problem(bits, model.bounds) is None
                          for bits in model.bits_per_byte(texts)]
    rng = np.random.default_rng(0)
    assert np.mean(kept(TEXTS[3::4])) > 0.7, "bounds of 12 texts, 12 others"
    assert not any(kept([perplexity.shuffled_words(text, rng) for text in TEXTS]))
    assert not any(kept([perplexity.shuffled_characters(text, rng) for text in TEXTS]))
    assert not any(kept(["xq zvk wpfj " * 9, "the the the the " * 9, "aaaaaaaaaaaaaaa" * 9]))


def test_a_saved_model_scores_the_same(model, tmp_path):
    model.save(tmp_path)
    again = NgramModel.load(tmp_path)
    assert (np.array_equal(again.bits_per_byte(TEXTS), model.bits_per_byte(TEXTS))
            and again.bounds == model.bounds)
    with pytest.raises(UserError, match="no such file; it is written by perplexity.py"):
        NgramModel.load(tmp_path / "none")


def test_a_model_folder_of_ours_scores_texts_too(tmp_path):
    from checkpoint import save_model
    tokenizer, decoder = Tokenizer([]), random_model(vocab_size=256)
    save_model(decoder, tokenizer, tmp_path)
    text = "x" * 64 + "abcdefgh"  # two windows: max_seq_len is 64
    logps = decoder(perplexity_ids(text[:64])).log_softmax(-1)[0, :-1].gather(
        -1, perplexity_ids(text[1:64])[0, :, None])
    rest = decoder(perplexity_ids(text[64:])).log_softmax(-1)[0, :-1].gather(
        -1, perplexity_ids(text[65:])[0, :, None])
    bits = -(logps.sum() + rest.sum()).item() / math.log(2) / 72
    assert ModelScorer(tmp_path).bits_per_byte(["ab", text])[1] == pytest.approx(bits, rel=1e-5)  # float32


def perplexity_ids(text):
    import torch
    return torch.tensor([list(text.encode())])


@pytest.mark.parametrize("words, message", [
    (["--input", "x"], "--input x is what a --model is to judge, and none is named; leave it out"),
    (["--model", "m", "--order", "5"], "--order 5 is of a model that is learned, and --model m is one that was"),
    (["--low", "96"], "--low 96 leaves nothing below --high 95; lower it"),
])
def test_settings_that_would_do_nothing_are_refused(monkeypatch, capsys, words, message):
    code, _, err = in_process(monkeypatch, capsys, perplexity.main, *words)
    assert code == 2 and message in err


def test_the_command_learns_and_filters(tmp_path, monkeypatch, capsys):
    (tmp_path / "texts").mkdir()
    for i, text in enumerate(TEXTS):
        (tmp_path / "texts" / f"{i}.txt").write_text(text * 3, encoding="utf-8")
    run = lambda *words: in_process(monkeypatch, capsys, perplexity.main, *words)
    code, out, err = run("--train", tmp_path / "texts", "--out", tmp_path / "m", "--vocab_size", "300")
    assert code == 0 and "characters shuffled  100.0% of" in out, err
    (tmp_path / "junk.txt").write_text("xq zvk wpfj " * 9, encoding="utf-8")
    code, out, err = run("--model", tmp_path / "m", "--input", tmp_path / "junk.txt")
    assert code == 0 and "junk.txt: bits_per_byte: " in out and "dropped: 1 of 1 documents" in out, err
    code, _, err = run("--model", tmp_path / "m", "--train", tmp_path / "texts")
    assert code == 2 and "has bounds of its own; leave it out" in err
    assert run("--train", tmp_path / "texts", "--out", tmp_path / "m")[0] == 2
    code, _, err = run("--train", tmp_path / "junk.txt", "--out", tmp_path / "n")
    assert code == 2 and "too few to learn from" in err and err.count("\n") == 1


@pytest.mark.slow
def test_spoiled_docstrings_are_dropped_and_held_out_ones_stay(tmp_path, monkeypatch, capsys):
    code, out, err = in_process(monkeypatch, capsys, perplexity.main, "--out", tmp_path / "m")
    assert code == 0, err
    dropped = {line[:20].strip(): float(line[20:27].rstrip("%")) for line in out.splitlines()
               if "dropped; bits" in line}
    # 6 % were left out by choice of the percentiles; 300 texts, 1.4 % standard error
    assert dropped["as they are"] < 12
    assert dropped["characters shuffled"] > 99 and dropped["misread"] > 95 and dropped["words shuffled"] > 30
