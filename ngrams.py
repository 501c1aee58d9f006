"""Words and n-grams, as sets and as numbers: what texts are compared by.

The plain form (`words_of`, `ngrams`, `jaccard`) says what is meant; the fast form gives each n-gram 64 bits,
for many texts at once, in numpy arrays. dedup.py counts with the second; its tests compare the two.

    >>> sorted(ngrams("To be or not to be", ngram=2))
    [('be', 'or'), ('not', 'to'), ('or', 'not'), ('to', 'be')]
"""
import hashlib
import re
from collections.abc import Callable, Iterable, Iterator

import numpy as np

from config import UserError

# ---- 1. Words and n-grams ----------------------------------------------------------------------------------

# Scripts that put no space between words: kana, Han, Thai, Lao, Burmese, Khmer. Each character is a word.
SPACELESS = ("\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
             "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff")
WORD = re.compile(rf"[{SPACELESS}]|[^\W{SPACELESS}]+")
ASCII_WORDS = {code: chr(code).lower() if WORD.match(chr(code)) else " " for code in range(128)}


def words_of(text: str) -> list[str]:
    """The words in lower case, without spaces and signs: what WORD matches.

    >>> words_of("The mat, 春眠不覺曉 (No. 1)")
    ['the', 'mat', '春', '眠', '不', '覺', '曉', 'no', '1']
    """
    if text.isascii():
        return text.translate(ASCII_WORDS).split()  # the same, several times as fast
    return " ".join(WORD.findall(text)).lower().split()


def words_to_compare(text: str, ngram: int) -> list[str]:
    """The words, or what stands for them where there are fewer than an n-gram has: one shingle, the text.

    So short documents are equal only if they are equal (but for white space), "3 + 4" is not "3 - 4", and a
    document of signs is one too. Nothing but white space has no shingle, and is like no other document.
    """
    words = words_of(text)
    if len(words) < ngram:
        whole = " ".join(text.split())
        words = ["\n" + whole] * ngram if whole else []  # "\n": no word of a longer text is the same
    return words


def ngrams(text: str, ngram: int = 5) -> set[tuple[str, ...]]:
    """The set of a document's n-grams."""
    words = words_to_compare(text, ngram)
    return set(zip(*(words[i:] for i in range(ngram))))


def jaccard(one: str, other: str, ngram: int = 5) -> float:
    """The share of the n-grams of both that each has, in [0, 1]; 0 where there are none.

    >>> jaccard("a b c d", "b c d e", ngram=2)          # ab bc cd; bc cd de
    0.5
    """
    a, b = ngrams(one, ngram), ngrams(other, ngram)
    return len(a & b) / len(a | b) if a or b else 0.0



# ---- 2. The same as numbers --------------------------------------------------------------------------------

BLOCK = 2 ** 14  # words that are worked on at once: the arrays stay in the processor's cache
MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # odd: 2^64 by the golden ratio, as Knuth proposes for hashing


class WordHashes(dict):
    """word -> 64 bits: BLAKE2b of its UTF-8, keyed with the seed; kept, as most words come again.

    Never Python's hash(): it differs between processes.
    """
    def __init__(self, seed: int):
        self.key = seed.to_bytes(8, "little")

    def __missing__(self, word: str) -> int:
        content = word.encode("utf-8", "surrogatepass")
        value = int.from_bytes(hashlib.blake2b(content, digest_size=8, key=self.key).digest(), "little")
        if len(self) >= 2 ** 19:  # some 70 MB
            self.clear()
        if len(word) <= 64:
            self[word] = value
        return value


def blocks_of_words(texts: Iterable[str], words_in: Callable, hashes: WordHashes) -> Iterator[tuple]:
    """Yield (hashes (W,) uint64 of the words of a few texts in a row, counts (texts,) of those of each)."""
    if isinstance(texts, str):
        raise UserError("texts is one str; pass a list of them")
    words, counts = [], []

    def block():
        return (np.fromiter(map(hashes.__getitem__, words), np.uint64, len(words)),
                np.array(counts, np.int64))

    for text in texts:
        found = words_in(text)
        words += found
        counts.append(len(found))
        if len(words) >= BLOCK or len(counts) >= BLOCK:
            yield block()
            words, counts = [], []
    yield block()


def windows(hashes: np.ndarray, length: int) -> np.ndarray:
    """A hash of each `length` words in a row: sum of word * MULTIPLIER^place, modulo 2^64, then mixed."""
    number = max(0, len(hashes) - length + 1)
    combined = hashes[:number].copy()
    for place in range(1, length):
        combined *= MULTIPLIER  # arrays of uint64 wrap around, which is the modulo; numpy scalars would warn
        combined += hashes[place:place + number]
    return mix(combined)


def mix(values: np.ndarray) -> np.ndarray:
    """Spread every bit over the upper half (a step of SplitMix64), in place; a bijection."""
    values ^= values >> np.uint64(30)
    values *= np.uint64(0xBF58476D1CE4E5B9)
    values ^= values >> np.uint64(27)
    return values


def blocks_of_shingles(texts: Iterable[str], ngram: int, hashes: WordHashes) -> Iterator[tuple]:
    """Yield (hashes (S,) uint64 of all n-grams of a few texts, counts (texts,) of those of each)."""
    for words, counts in blocks_of_words(texts, lambda text: words_to_compare(text, ngram), hashes):
        inside = np.ones(len(words), bool)  # False where an n-gram would reach into the next text
        for back in range(1, ngram):
            inside[np.cumsum(counts[counts > 0]) - back] = False
        shingles = windows(words, ngram)
        yield shingles[inside[:len(shingles)]], np.maximum(counts - (ngram - 1), 0)
