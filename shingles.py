"""Words and n-grams, as sets and as numbers: what texts are compared by.

The plain form (`words_of`, `ngrams`, `jaccard`) says what is meant; the fast form gives each n-gram 64 bits,
for many texts at once, in numpy arrays. dedup.py counts with the second; its tests compare the two.

    >>> sorted(ngrams("To be or not to be", ngram=2))
    [('be', 'or'), ('not', 'to'), ('or', 'not'), ('to', 'be')]
"""
import hashlib
import re
from collections.abc import Iterable, Iterator

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
    return spaced_words(text).split()


def spaced_words(text: str) -> str:
    """The words, spaces between them."""
    if text.isascii():
        return text.translate(ASCII_WORDS)  # the same, many times as fast
    return " ".join(WORD.findall(text)).lower()


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

BLOCK = 2 ** 16  # bytes that are worked on at once: the arrays stay in the processor's cache
MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # odd: 2^64 by the golden ratio, as Knuth proposes for hashing


class Hasher:
    """64 bits for each word, all at once: sum of table[byte] * MULTIPLIER^place of its UTF-8, modulo 2^64.

    The table holds 256 numbers of PCG64, whose stream for a seed is the same everywhere. (Never Python's
    hash(): it differs between processes.) Arrays of uint64 wrap around silently, which is the modulo.
    """
    def __init__(self, seed: int):
        self.key = seed.to_bytes(8, "little")
        self.table = np.random.PCG64(seed).random_raw(256)
        self.table[ord(" ")] = 0

    def words(self, spaced: bytes) -> tuple[np.ndarray, np.ndarray]:
        """(hashes (W,) uint64, starts (W,) int64) of the words in text with spaces between them."""
        hashes, starts, at = [], [], 0
        while at < len(spaced):  # a long text in parts that end with a space
            end = len(spaced) if len(spaced) - at <= 2 * BLOCK else spaced.find(b" ", at + BLOCK) + 1
            part = np.frombuffer(spaced, np.uint8, (end or len(spaced)) - at, at)
            within = part != ord(" ")
            first = np.flatnonzero(within & ~np.concatenate([[False], within[:-1]]))
            if len(first):
                lengths = np.diff(first, append=len(part))  # the spaces behind too: they count 0
                places = np.arange(first[0], len(part)) - np.repeat(first, lengths)
                powers = np.full(lengths.max(), MULTIPLIER)
                powers[0] = 1
                values = self.table[part[first[0]:]] * np.multiply.accumulate(powers)[places]
                hashes.append(np.add.reduceat(values, first - first[0]))
                starts.append(first + at)
            at += len(part)
        return (np.concatenate(hashes), np.concatenate(starts)) if hashes else (NO_HASHES, NO_HASHES)

    def whole(self, text: str) -> int:
        """The 64 bits of a text of few words, or none; 0 where there is nothing but white space."""
        content = " ".join(text.split()).encode("utf-8", "surrogatepass")
        found = hashlib.blake2b(content, digest_size=8, key=self.key).digest()
        return int.from_bytes(found, "little") if content else 0


NO_HASHES = np.empty(0, np.uint64)


def blocks_of_words(texts: Iterable[str], hasher: Hasher) -> Iterator[tuple]:
    """Yield (a few of the texts, hashes (W,) uint64 of all their words, counts (texts,) of those of each)."""
    if isinstance(texts, str):
        raise UserError("texts is one str; pass a list of them")

    def block():
        hashes, starts = hasher.words(b" ".join(contents))
        ends = np.cumsum([len(content) + 1 for content in contents], dtype=np.int64)
        return held, hashes, np.diff(np.searchsorted(starts, ends), prepend=0)

    held, contents, size = [], [], 0
    for text in texts:
        contents.append(spaced_words(text).encode("utf-8", "surrogatepass"))
        held.append(text)
        size += len(contents[-1]) + 1
        if size >= BLOCK:
            yield block()
            held, contents, size = [], [], 0
    yield block()


def windows(hashes: np.ndarray, length: int) -> np.ndarray:
    """A hash of each `length` words in a row: sum of word * MULTIPLIER^place, modulo 2^64, then mixed."""
    number = max(0, len(hashes) - length + 1)
    combined = hashes[:number].copy()
    for place in range(1, length):
        combined *= MULTIPLIER
        combined += hashes[place:place + number]
    return mix(combined)


def mix(values: np.ndarray) -> np.ndarray:
    """Spread every bit over the others (half of SplitMix64's last step), in place; a bijection."""
    values ^= values >> np.uint64(30)
    values *= np.uint64(0xBF58476D1CE4E5B9)
    values ^= values >> np.uint64(27)
    return values


def blocks_of_shingles(texts: Iterable[str], ngram: int, hasher: Hasher) -> Iterator[tuple]:
    """Yield (hashes (S,) uint64 of all n-grams of a few texts, counts (texts,) of those of each)."""
    for block, words, counts in blocks_of_words(texts, hasher):
        document = np.repeat(np.arange(len(block)), counts)
        shingles = windows(words, ngram)
        shingles = shingles[document[:len(shingles)] == document[ngram - 1:]]  # not over the end of a text
        whole = np.array([hasher.whole(text) if count < ngram else 0 for text, count in zip(block, counts)],
                         np.uint64)
        counts = np.where(whole > 0, 1, np.maximum(counts - (ngram - 1), 0))
        is_whole = np.repeat(whole > 0, counts)
        hashes = np.empty(len(is_whole), np.uint64)
        hashes[~is_whole], hashes[is_whole] = shingles, whole[whole > 0]
        yield hashes, counts
