"""Good text or bad: a linear classifier on hashed n-grams of words and characters, as fastText is.

    python classifier.py --good reference.jsonl --bad junk.jsonl       # learns; prints precision and recall
    python classifier.py                                               # offline: docstrings, and spoiled ones

A text is the sum of the weights of its n-grams over the root of their number, and a sigmoid (Joulin et al.
2016, "Bag of Tricks for Efficient Text Classification", https://arxiv.org/abs/1607.01759; there a mean, and a
hidden layer, which has no bend in it and for two classes adds nothing). Trained in seconds, it judges
megabytes a second: the filter of GPT-3's corpus, DCLM and others, for quality or for toxicity, by what is
given as good and bad.

The data is cut in three: texts to learn from, texts on which the threshold is chosen, so that the stated
share of what is kept is good (precision), and texts on which both are measured. Three classifiers of
different n-grams vote.
"""
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import config
from config import UserError
from ngrams import character_ngrams, load_arrays, prose, save_arrays, word_ngrams

# ---- 1. The classifier -------------------------------------------------------------------------------------

BITS = 18
FEATURES = {  # (n-grams of words, n-grams of characters) by their lengths
    "words": ((1, 2), ()),
    "characters": ((), (2, 3, 4)),
    "both": ((1, 2), (3, 5)),
}


def features(text: str, kind: str) -> np.ndarray:
    """The buckets of a text's n-grams: those of words in the lower half, those of characters in the upper."""
    words, characters = FEATURES[kind]
    half = 1 << BITS - 1
    parts = [word_ngrams(text, words, BITS - 1)] if words else []
    parts += [character_ngrams(text, characters, BITS - 1) + half] if characters else []
    return np.concatenate(parts)


@dataclass
class Classifier:
    kind: str  # of FEATURES
    weights: np.ndarray  # (2^BITS,) float32
    bias: float
    threshold: float = 0.5  # a text with this score or more is kept

    def scores(self, texts: Sequence[str]) -> np.ndarray:
        """The probability of "good" for each text, (N,) float32."""
        logits = [self.weights[grams].sum() / max(len(grams), 1) ** 0.5
                  for grams in (features(text, self.kind) for text in texts)]
        return (1 / (1 + np.exp(-np.array(logits, np.float64) - self.bias))).astype(np.float32)

    @staticmethod
    def train(texts: Sequence[str], good: Sequence[bool], kind: str = "both", epochs: int = 5,
              lr: float = 0.2, batch_size: int = 32, seed: int = 0) -> "Classifier":
        """Learn from texts and whether each is good: logistic loss, Adagrad, for the rare n-grams.

        A weight counts 1/sqrt(number of n-grams) rather than 1/number, so short and long texts move alike.
        """
        import torch  # here, as worker processes that only score should start at once
        if len(set(map(bool, good))) < 2:
            raise UserError("texts of both kinds are needed, good and bad")
        grams = [torch.from_numpy(features(text, kind)) for text in texts]
        generator, targets = torch.Generator().manual_seed(seed), torch.tensor([float(x) for x in good])
        bag = torch.nn.EmbeddingBag(1 << BITS, 1, mode="sum")
        torch.nn.init.zeros_(bag.weight)
        bias = torch.zeros(1, requires_grad=True)
        optimizer = torch.optim.Adagrad([bag.weight, bias], lr=lr)
        for _ in range(epochs):
            for rows in torch.randperm(len(grams), generator=generator).split(batch_size):
                batch = [grams[row] for row in rows.tolist()]
                sizes = torch.tensor([len(ids) for ids in batch])
                scale = sizes.clamp(min=1).rsqrt().repeat_interleave(sizes)
                logits = bag(torch.cat(batch), sizes.cumsum(0) - sizes, per_sample_weights=scale)[:, 0] + bias
                loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, targets[rows])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        return Classifier(kind, bag.weight.detach()[:, 0].numpy(), bias.item())

    def save(self, path):
        save_arrays(path, "classifier", {"weights": self.weights},
                    {"features": self.kind, "bias": self.bias, "threshold": self.threshold})

    @staticmethod
    def load(path) -> "Classifier":
        """The classifier that was saved. Raises UserError if the file is none."""
        arrays, about = load_arrays(path, "classifier")
        return Classifier(about["features"], arrays["weights"], about["bias"], about["threshold"])


# ---- 2. Thresholds and votes -------------------------------------------------------------------------------


def precision_and_recall(kept: np.ndarray, good: np.ndarray) -> tuple[float, float]:
    """(share of the kept that are good, share of the good that are kept); precision 1 where nothing is
    kept."""
    right = int((kept & good).sum())
    return right / max(int(kept.sum()), 1) if kept.any() else 1.0, right / max(int(good.sum()), 1)


def threshold_for(scores: np.ndarray, good: np.ndarray, precision: float) -> float:
    """The lowest threshold at which the kept texts reach a precision: the most recall that it allows.

    Equal scores stand or fall together. Raises UserError where no threshold reaches it.
    """
    order = np.argsort(-scores, kind="stable")
    right, kept = np.cumsum(good[order]), np.arange(1, len(order) + 1)
    last_of_score = np.append(scores[order][1:] != scores[order][:-1], True)
    reached = np.flatnonzero((right >= precision * kept) & last_of_score)
    if not len(reached):
        raise UserError(f"no threshold keeps texts of which {precision:.0%} are good; ask for less precision")
    return float(scores[order][reached[-1]])


def votes(classifiers: Sequence[Classifier], texts: Sequence[str], at_least: int | None = None) -> np.ndarray:
    """(N,) bool: whether at_least of the classifiers, default more than half, keep a text."""
    ballots = [classifier.scores(texts) >= classifier.threshold for classifier in classifiers]
    return np.sum(ballots, axis=0) >= (len(classifiers) // 2 + 1 if at_least is None else at_least)


# ---- 3. The default texts: docstrings, and what can go wrong with them -------------------------------------


def shuffled_words(text: str, rng: np.random.Generator) -> str:
    words = text.split()
    return " ".join(words[i] for i in rng.permutation(len(words)))


def shuffled_characters(text: str, rng: np.random.Generator) -> str:
    return "".join(text[i] for i in rng.permutation(len(text)))


def menu(text: str, rng: np.random.Generator) -> str:
    """Navigation: a page's words as the links of a web site."""
    words = [word.strip(".,:;()'\"`").title() for word in text.split()]
    return " | ".join(" ".join(words[i:i + 2]) for i in rng.permutation(max(len(words) - 1, 1))[:60])


def misread(text: str, rng: np.random.Generator) -> str:
    """A bad scan: one letter in six another, one space in five lost."""
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz1l|"))
    noise, other = rng.random(len(text)), letters[rng.integers(len(letters), size=len(text))]
    return "".join(("" if p < 0.2 else c) if c == " " else new if p < 0.17 else c
                   for c, p, new in zip(text, noise, other))


SPOILERS: tuple[Callable, ...] = (shuffled_words, shuffled_characters, menu, misread)


def spoiled(text: str, seed: int) -> str:
    """The text, made bad in one of four ways: a function of (text, seed)."""
    rng = np.random.default_rng([seed, zlib.crc32(text.encode("utf-8", "surrogatepass"))])
    return SPOILERS[rng.integers(len(SPOILERS))](text, rng)


def part_of(source: str) -> str:
    """"learn", "choose" or "measure", 60:20:20, by the source: texts of one document stay together."""
    place = zlib.crc32(source.encode("utf-8", "surrogatepass")) % 10
    return "learn" if place < 6 else "choose" if place < 8 else "measure"


# ---- 4. The command line -----------------------------------------------------------------------------------


@dataclass
class Settings:
    good: tuple[str, ...] = ()  # files, folders of good texts; none: docstrings of Python's library
    bad: tuple[str, ...] = ()  # files, folders of bad texts; none: the good ones, spoiled
    out: str = "runs/classifier"  # the folder to write, a file for each of the classifiers
    kinds: tuple[str, ...] = ("words", "characters", "both")  # n-grams of the classifiers that vote
    precision: float = 0.98  # of what is kept, the share that shall be good
    epochs: int = 5  # passes over the texts
    seed: int = 0  # of the order of texts, and of how they are spoiled
    overwrite: bool = False  # replace files that are there

    def __post_init__(self):
        config.require(self, kinds=set(FEATURES), precision=(0.0, 1.0), epochs=(1, None))


def labelled(settings: Settings) -> dict[str, tuple[list[str], np.ndarray]]:
    """{part: (texts, whether each is good)}"""
    good = list(prose(settings.good))
    bad = list(prose(settings.bad)) if settings.bad else \
        [{**piece, "text": spoiled(piece["text"], settings.seed)} for piece in good]
    parts = {}
    for part in ("learn", "choose", "measure"):
        both = [(piece["text"], is_good) for pieces, is_good in ((good, True), (bad, False))
                for piece in pieces if part_of(piece["source"]) == part]
        parts[part] = [text for text, _ in both], np.array([is_good for _, is_good in both], bool)
        if len(set(parts[part][1].tolist())) < 2:
            raise UserError(f"too few texts: none that are good, or none that are bad, is left to {part}")
    return parts


def main():
    settings = config.parse(Settings)
    config.show(settings)
    for path in (path for kind in settings.kinds if (path := Path(settings.out, f"{kind}.npz")).exists()):
        if not settings.overwrite:
            raise UserError(f"{path} exists; pass --overwrite to replace it, or another --out")
    parts, classifiers = labelled(settings), []
    print(f"{', '.join(f'{part}: {len(texts):,} texts' for part, (texts, _) in parts.items())}")
    texts, good = parts["measure"]
    for kind in settings.kinds:
        classifier = Classifier.train(*parts["learn"], kind, settings.epochs, seed=settings.seed)
        choose, is_good = parts["choose"]
        classifier.threshold = threshold_for(classifier.scores(choose), is_good, settings.precision)
        classifier.save(Path(settings.out, f"{kind}.npz"))
        classifiers.append(classifier)
        kept = classifier.scores(texts) >= classifier.threshold
        report(kind, kept, good, f"threshold {classifier.threshold:.3f}")
    majority = f"at least {len(classifiers) // 2 + 1} of {len(classifiers)}"
    report("vote", votes(classifiers, texts), good, majority)


def report(name: str, kept: np.ndarray, good: np.ndarray, note: str):
    precision, recall = precision_and_recall(kept, good)
    print(f"{name:12} precision {precision:.3f}, recall {recall:.3f} on held-out texts; {note}")


if __name__ == "__main__":
    config.run(main)
