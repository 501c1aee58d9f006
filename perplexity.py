"""How surprising is a text? An n-gram model by modified Kneser-Ney, and the filter that its percentiles make.

    python perplexity.py                                        # learns from docstrings, shows what it drops
    python perplexity.py --train my_texts/ --out runs/perplexity --order 4
    python perplexity.py --model runs/perplexity --input crawl.jsonl
    python perplexity.py --model runs/base --input crawl.jsonl --train my_texts/  # a model of ours

What is gibberish surprises a model of good text, what is boilerplate does not surprise it at all. So CCNet
(Wenzek et al. 2020, https://arxiv.org/abs/1911.00359) ranks a crawl by perplexity under a 5-gram model of
Wikipedia. Here too: bits per byte, so that long and short tokens compare, and bounds that are percentiles of
held-out good texts (1 and 95): of those it drops as many as the percentiles say, by construction; of others
what lies outside.

The model (Chen & Goodman 1999, "An Empirical Study of Smoothing Techniques for Language Modeling", section
4.1.6; tokens are ours, of bpe.py). For n-grams of k tokens, with context h and word w:

    P_k(w | h) = max(c(hw) - D(c), 0) / c(h.) + gamma(h) P_k-1(w | h without its first word)

c counts occurrences at the highest order; below it counts the different words that stand before hw: in how
many places is it new? "Francisco" is frequent, but only behind "San", so as a guess for an unknown context it
is a poor one. D is taken off every count, more off higher ones, and gamma hands what was taken to the lower
order. Nothing here is a dictionary: counting is sorting, and all texts are looked up at once.
"""
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

import config
import metaspace
from bpe import Tokenizer
from classifier import misread, part_of, shuffled_characters, shuffled_words
from config import UserError
from documents import corpus
from ngrams import load_arrays, prose, save_arrays

# ---- 1. The model ------------------------------------------------------------------------------------------


@dataclass
class Level:
    """The k-grams of one order k >= 2, sorted."""
    keys: np.ndarray  # (N,) int64: the context's number times (V + 1), plus the last token
    p: np.ndarray  # (N,) float32: the first term of P_k
    gamma: np.ndarray  # (number of (k-1)-grams,): what a context leaves to the lower order


@dataclass
class NgramModel:
    vocab_size: int  # V; id V is what stands before a text's first token
    unigram: np.ndarray  # (V + 1,) float64: P_1
    levels: list[Level]  # of orders 2, 3, …
    tokenizer: Tokenizer | None = None
    bounds: tuple[float, float] | None = None  # of bits per byte, for perplexity_problem

    @property
    def order(self) -> int:
        return len(self.levels) + 1

    @staticmethod
    def train(documents: Iterable[np.ndarray], vocab_size: int, order: int = 4) -> "NgramModel":
        """The model of documents, arrays of token ids below vocab_size."""
        ids = padded(documents, order, vocab_size)
        is_token = ids != vocab_size
        if not is_token.any():
            raise UserError("there are no tokens to learn from")
        numbers, tables, counts = [ids], [None], [np.bincount(ids[is_token], minlength=vocab_size + 1)]
        for k in range(2, order + 1):
            keys = np.concatenate(([0], numbers[-1][:-1])) * (vocab_size + 1) + ids
            table, number = np.unique(keys, return_inverse=True)
            counts.append(np.bincount(number[is_token], minlength=len(table)))
            numbers.append(number)
            tables.append(table)
        for k in range(order - 1, 0, -1):  # below the highest order: how many different words stand before
            suffix = np.zeros(len(counts[k]), np.int64)
            suffix[numbers[k]] = numbers[k - 1]
            counts[k - 1] = np.bincount(suffix[counts[k] > 0], minlength=len(counts[k - 1]))
        uniform = np.full(vocab_size + 1, 1 / vocab_size)
        uniform[vocab_size] = 0.0
        p, gamma = discounted(counts[0], np.zeros(vocab_size + 1, np.int64), 1)
        levels = [Level(table, *discounted(count, table // (vocab_size + 1), len(counts[k])))
                  for k, (table, count) in enumerate(zip(tables[1:], counts[1:]))]
        return NgramModel(vocab_size, p + gamma[0] * uniform, levels)

    def logps(self, documents: Sequence[np.ndarray]) -> np.ndarray:
        """log P of each token given those before it, in nats, for all documents one after the other."""
        ids = padded(documents, self.order, self.vocab_size)
        place = np.flatnonzero(ids != self.vocab_size)
        p, number = self.unigram[ids], ids
        for level in self.levels:
            context = np.concatenate(([-1], number[:-1]))
            key = context * (self.vocab_size + 1) + ids
            found = np.minimum(np.searchsorted(level.keys, key), len(level.keys) - 1)
            is_known = (level.keys[found] == key) & (context >= 0)
            gamma = np.where(context >= 0, level.gamma[context], 1.0)
            p = np.where(is_known, level.p[found], 0.0) + gamma * p
            number = np.where(is_known, found, -1)
        return np.log(p[place])

    def bits_per_byte(self, texts: Sequence[str]) -> np.ndarray:
        """(N,): how many bits each byte of a text costs; nan for an empty text."""
        encoded = [np.array(self.tokenizer.encode(text), np.int64) for text in texts]
        return by_text(self.logps(encoded), list(map(len, encoded)), texts)

    def save(self, folder):
        """Write model.npz and tokenizer.json into a folder."""
        arrays = {f"{name}{k}": getattr(level, name) for k, level in enumerate(self.levels, start=2)
                  for name in ("keys", "p", "gamma")}
        save_arrays(Path(folder, "model.npz"), "perplexity", {"unigram": self.unigram, **arrays},
                    {"vocab_size": self.vocab_size, "order": self.order, "bounds": self.bounds})
        self.tokenizer.save(Path(folder, "tokenizer.json"))

    @staticmethod
    def load(folder) -> "NgramModel":
        """The model that was saved. Raises UserError if the folder holds none."""
        arrays, about = load_arrays(Path(folder, "model.npz"), "perplexity")
        levels = [Level(*(arrays[f"{name}{k}"] for name in ("keys", "p", "gamma")))
                  for k in range(2, about["order"] + 1)]
        tokenizer = metaspace.load_tokenizer(Path(folder, "tokenizer.json"))
        return NgramModel(about["vocab_size"], arrays["unigram"], levels, tokenizer,
                          tuple(about["bounds"] or ()) or None)


def padded(documents: Iterable[np.ndarray], order: int, vocab_size: int) -> np.ndarray:
    """All ids in one int64 array, before each document order - 1 times the id that stands for its beginning.

    So no n-gram that ends in a token reaches into the document before.
    """
    start = np.full(order - 1, vocab_size, np.int64)
    parts = [part for ids in documents for part in (start, ids)]
    return np.concatenate([np.zeros(0, np.int64), *parts]).astype(np.int64)


def discounted(counts: np.ndarray, contexts: np.ndarray, num_contexts: int) -> tuple[np.ndarray, np.ndarray]:
    """(the discounted share of each n-gram in its context, the share that each context leaves over)."""
    discount = np.concatenate(([0.0], discounts(counts)))  # by min(count, 3)
    taken = discount[np.minimum(counts, 3)]
    total = np.bincount(contexts, counts, minlength=num_contexts)
    left = np.bincount(contexts, taken, minlength=num_contexts)
    safe = np.maximum(total, 1)
    return ((counts - taken) / safe[contexts]).astype(np.float32), np.where(total > 0, left / safe, 1.0)


def discounts(counts: np.ndarray) -> np.ndarray:
    """D1, D2, D3+ from how many n-grams occur once, twice, three and four times (Chen & Goodman, Eq. 26).

    D_j = j - (j + 1) Y n_j+1 / n_j with Y = n1 / (n1 + 2 n2). Where a corpus is so small that a number is
    zero or a discount out of (0, j): half a count, one, one and a half.
    """
    n1, n2, n3, n4 = np.bincount(np.minimum(counts, 5), minlength=6)[1:5].astype(float)
    found = []
    for j, (n, after) in enumerate(((n1, n2), (n2, n3), (n3, n4)), start=1):
        d = j - (j + 1) * n1 / (n1 + 2 * n2) * after / n if n1 and n else 0.0
        found.append(d if 0 < d < j else j / 2)
    return np.array(found)


def by_text(logps: np.ndarray, lengths: Sequence[int], texts: Sequence[str]) -> np.ndarray:
    """Bits per byte of each text from the log-probabilities, in nats, of all their tokens."""
    owner = np.repeat(np.arange(len(texts)), lengths)
    nats = np.bincount(owner, -logps, minlength=len(texts))
    num_bytes = np.array([len(text.encode("utf-8", "surrogatepass")) for text in texts], float)
    return np.divide(nats, num_bytes * math.log(2), out=np.full(len(texts), np.nan), where=num_bytes > 0)


# ---- 2. The filter -----------------------------------------------------------------------------------------


def percentile_bounds(bits: np.ndarray, low: float, high: float) -> tuple[float, float]:
    """The bounds of bits per byte between which lie all but `low` and 100 - `high` per cent of these texts.

    The texts must be held out: those that the model learned from look easier than any other.
    """
    bits = bits[np.isfinite(bits)]
    if not len(bits):
        raise UserError("no text is held out to take percentiles from; give more texts to --train")
    return tuple(map(float, np.percentile(bits, (low, high))))


def perplexity_problem(bits: float, bounds: tuple[float, float]) -> str | None:
    """The reason to drop a text of so many bits per byte, None where it stays; nan, of an empty text,
    stays."""
    low, high = bounds
    return (f"bits_per_byte: {bits:.3f}, at least {low:.3f}" if bits < low else
            f"bits_per_byte: {bits:.3f}, at most {high:.3f}" if bits > high else None)


class ModelScorer:
    """bits_per_byte as above, under a model folder of ours: slower, and a better judge."""

    def __init__(self, folder):
        from checkpoint import load_model  # here: torch is not needed for n-grams
        self.model, self.tokenizer = load_model(folder)
        if self.tokenizer is None:
            raise UserError(f"{folder} has no tokenizer that can be read, so it scores no text")

    def bits_per_byte(self, texts: Sequence[str]) -> np.ndarray:
        """Windows of the model's length, one after the other; a window's first token is not counted."""
        import torch
        size, parts, lengths = self.model.config.max_seq_len, [], []
        for text in texts:
            ids, scored = torch.tensor(self.tokenizer.encode(text), dtype=torch.int64), 0
            for window in ids.split(size):
                with torch.no_grad():
                    logps = self.model(window[None])[0, :-1].float().log_softmax(-1)
                parts.append(logps.gather(-1, window[1:, None])[:, 0].numpy())
                scored += len(window) - 1
            lengths.append(scored)
        return by_text(np.concatenate([np.zeros(0), *parts]), lengths, texts)


# ---- 3. The command line -----------------------------------------------------------------------------------


@dataclass
class Settings:
    train: tuple[str, ...] = ()  # files, folders of good texts; none: the docstrings of Python's library
    out: str = "runs/perplexity"  # the folder to write
    order: int = 4  # tokens of the longest n-grams
    vocab_size: int = 4096  # tokens of the tokenizer, learned from the same texts
    low: float = 1.0  # percentile of held-out texts below which a text is dropped
    high: float = 95.0  # percentile above which it is
    model: str | None = None  # a folder of perplexity.py, or of a model of ours: score --input with it
    input: tuple[str, ...] = ()  # files, folders to be filtered
    overwrite: bool = False  # replace `out` if it is there
    seed: int = 0  # of the texts that are spoiled, to show what is dropped

    def __post_init__(self):
        config.require(self, order=(1, 8), vocab_size=(257, 65536), low=(0.0, 100.0), high=(0.0, 100.0))
        if self.low >= self.high:
            raise UserError(f"--low {self.low:g} leaves nothing below --high {self.high:g}; lower it")
        if self.model:
            config.refuse(self, f"is of a model that is learned, and --model {self.model} is one that was",
                          "out", "order", "vocab_size", "overwrite", "seed")
        else:
            config.refuse(self, "is what a --model is to judge, and none is named", "input")


def main():
    settings = config.parse(Settings)
    config.show(settings)
    if settings.model:
        judge(settings)
        return
    if Path(settings.out, "model.npz").exists() and not settings.overwrite:
        raise UserError(f"{settings.out} holds a model; pass --overwrite to replace it, or another --out")
    learned, for_bounds, others = three_parts(settings)
    tokenizer = Tokenizer.train(learned, settings.vocab_size, workers=1)
    encoded = [np.array(tokenizer.encode(text), np.int64)
               for text in tqdm(learned, "encode", delay=1, disable=None)]
    model = NgramModel.train(encoded, tokenizer.vocab_size, settings.order)
    model.tokenizer = tokenizer
    bits = model.bits_per_byte(for_bounds)
    model.bounds = percentile_bounds(bits, settings.low, settings.high)
    model.save(settings.out)
    print(f"{sum(map(len, encoded)):,} tokens of {len(learned):,} texts; n-grams by order: "
          f"{', '.join(f'{len(level.keys):,}' for level in model.levels)}")
    print(f"bits per byte of {len(for_bounds):,} held-out texts: median {np.median(bits):.3f}, percentiles "
          f"{settings.low:g} and {settings.high:g}: {model.bounds[0]:.3f}, {model.bounds[1]:.3f}")
    show_drops(model, others, settings.seed)


def three_parts(settings: Settings) -> list[list[str]]:
    """[texts to learn from, for the bounds, to show what is dropped]; those of one document stay together."""
    parts = {"learn": [], "choose": [], "measure": []}
    for piece in prose(settings.train):
        parts[part_of(piece["source"])].append(piece["text"])
    if not all(parts.values()):
        raise UserError(f"{sum(map(len, parts.values()))} texts of 200 characters are too few to learn from "
                        f"and to hold some out; give more to --train")
    return list(parts.values())


def show_drops(model: NgramModel, texts: list[str], seed: int):
    """Print what the filter does to texts that took no part in it, and to four ways of spoiling them."""
    rng = np.random.default_rng(seed)
    spoilers = {"as they are": lambda text: text, "words shuffled": lambda text: shuffled_words(text, rng),
                "characters shuffled": lambda text: shuffled_characters(text, rng),
                "misread": lambda text: misread(text, rng), "one line repeated": repeated_line}
    for name, spoil in spoilers.items():
        bits = model.bits_per_byte([spoil(text) for text in texts])
        dropped = np.mean([perplexity_problem(value, model.bounds) is not None for value in bits])
        print(f"{name:20} {dropped:6.1%} of {len(texts):,} dropped; bits per byte, median "
              f"{np.nanmedian(bits):.3f}")


def repeated_line(text: str) -> str:
    """The text's first 40 characters, until there is as much of them as there was text."""
    return (text[:40] + "\n") * max(len(text) // 41, 1)


def judge(settings: Settings):
    """Print which documents of --input fall out of the bounds: a folder's own, or percentiles of --train."""
    is_ours = Path(settings.model, "model.npz").exists()
    if is_ours:
        config.refuse(settings, f"does nothing: {settings.model} has bounds of its own", "train", "low",
                      "high")
    model = NgramModel.load(settings.model) if is_ours else ModelScorer(settings.model)
    bounds = model.bounds if is_ours else percentile_bounds(
        model.bits_per_byte([document["text"] for document in corpus(settings.train)]), settings.low,
        settings.high)
    counts = Counter()
    for document in corpus(settings.input):
        problem = perplexity_problem(model.bits_per_byte([document["text"]])[0], bounds)
        counts[bool(problem)] += 1
        if problem and counts[True] <= 20:
            print(f"{document['source']}: {problem}")
    print(f"dropped: {counts[True]:,} of {sum(counts.values()):,} documents")


if __name__ == "__main__":
    config.run(main)
