"""What stands twice is dropped: documents, lines, passages; and what stands in a test set, too.

    python dedup.py                                      # the source of Python's own standard library, offline
    python dedup.py --input poems.jsonl --show 5         # any {"text": …} lines; shows five near-duplicates

A crawl holds most of its text several times. A model that reads it several times learns it by heart instead
of the language (Lee et al. 2022, https://arxiv.org/abs/2107.06499). From coarse to fine:

    exact_duplicates        equal documents                                     a digest a document
    without_repeated_lines  lines or sentences of earlier documents             a digest a line
    near_duplicates         documents of almost the same n-grams                MinHash, LSH, union-find
    duplicate_spans         passages of `min_length` tokens, wherever           a suffix array
    contaminated            n-grams of a benchmark (that is to be measured on)  a table of its n-grams

Two documents are near-duplicates if of all the n-grams that they have, a share of `threshold` is in both: their
Jaccard similarity. `near_duplicates_plain` compares all pairs, which no crawl allows. MinHash (Broder 1997)
shortens a document to a few numbers that agree as often as the documents do; locality-sensitive hashing (Indyk
and Motwani 1998; Leskovec, Rajaraman, Ullman: Mining of Massive Datasets, chapter 3) finds the pairs that agree
without looking at the others. What it finds is then compared exactly, so nothing is dropped by chance.

    >>> texts = ["the cat sat on the mat by the door", "something else altogether, quite another story",
    ...          "The cat sat on the mat, by the door!"]
    >>> near_duplicates(texts).tolist()
    [0, 1, 0]
"""
import functools
import hashlib
import json
import re
import sysconfig
import time
import unicodedata
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

import config
from config import UserError

# ---- 1. The lesson: n-grams, Jaccard, all pairs ------------------------------------------------------------

# Scripts that put no space between words: kana, Han, Thai, Lao, Burmese, Khmer. Each character is a word.
SPACELESS = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff"
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


def near_duplicates_plain(texts: list[str], threshold: float = 0.8, ngram: int = 5) -> np.ndarray:
    """What near_duplicates must equal, but for the pairs that LSH misses: all pairs compared, in words."""
    clusters = Clusters(len(texts))
    for i in range(len(texts)):
        for j in range(i):
            if jaccard(texts[i], texts[j], ngram) >= threshold:
                clusters.join(i, j)
    return clusters.roots()


class Clusters:
    """Union-find: who is joined with whom, however indirectly. A cluster's root is its smallest index."""

    def __init__(self, number: int):
        self.parents = array("q", range(number))  # 8 bytes each

    def find(self, i: int) -> int:
        while self.parents[i] != i:
            self.parents[i] = i = self.parents[self.parents[i]]  # halve the path on the way up
        return i

    def join(self, i: int, j: int):
        first, second = sorted((self.find(i), self.find(j)))
        self.parents[second] = first

    def roots(self) -> np.ndarray:
        """The root of every index, int64 (N,)."""
        roots = np.array(self.parents, np.int64)
        while not np.array_equal(roots, above := roots[roots]):
            roots = above
        return roots


# ---- 2. From text to numbers -------------------------------------------------------------------------------

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
    """Yield (hashes (W,) uint64 of the words of a few texts in a row, counts (texts,) of the words of each)."""
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


# ---- 3. MinHash --------------------------------------------------------------------------------------------


def minhash(texts: Iterable[str], num_hashes: int = 112, ngram: int = 5, seed: int = 0) -> np.ndarray:
    """(N, num_hashes) uint32: for each document and hash function, the smallest hash of its n-grams.

    The smallest of the union of two sets is as likely to be any of its elements as any other. It is smallest in
    both sets if it is in both: the chance that two documents agree in a column is their Jaccard similarity s.
    The share of k columns in which they agree estimates s with a standard error of sqrt(s(1-s)/k).

    Function i is a_i x + b_i modulo 2^32 of the n-gram's 32 bits x, a_i odd: a bijection, so no two n-grams tie.
    (x is random already, by BLAKE2b: a line through random points is enough.) All follows from `seed`. A
    document without n-grams has 2^32 - 1 throughout. num_hashes * 4 bytes a document.
    """
    factors, offsets = hash_functions(num_hashes, seed)
    blocks = [smallest(hashes, counts, factors, offsets)
              for hashes, counts in blocks_of_shingles(texts, ngram, WordHashes(seed))]
    return np.concatenate(blocks)


def hash_functions(num_hashes: int, seed: int) -> np.ndarray:
    random = np.random.Generator(np.random.PCG64(seed)).integers(2 ** 32, size=(2, num_hashes), dtype=np.uint32)
    random[0] |= np.uint32(1)
    return random


def smallest(hashes, counts, factors, offsets) -> np.ndarray:
    """The signatures (texts, num_hashes) of a block of n-grams."""
    signatures = np.full((len(factors), len(counts)), 2 ** 32 - 1, np.uint32)
    filled = counts > 0
    if filled.any():
        x = (hashes >> np.uint64(32)).astype(np.uint32)
        starts, values = (np.cumsum(counts) - counts)[filled], np.empty_like(x)
        for row, factor, offset in zip(signatures, factors, offsets):
            np.multiply(x, factor, out=values)  # modulo 2^32: arrays of uint32 wrap around
            np.add(values, offset, out=values)
            row[filled] = np.minimum.reduceat(values, starts)
    return signatures.T


# ---- 4. Locality-sensitive hashing -------------------------------------------------------------------------


def candidate_chance(similarity, num_hashes: int = 112, bands: int = 14):
    """The chance that a pair of this Jaccard similarity becomes a candidate: 1 - (1 - s^r)^b, r rows a band."""
    return 1 - (1 - np.asarray(similarity, float) ** (num_hashes // bands)) ** bands


def curve_line(num_hashes: int = 112, bands: int = 14) -> str:
    """What to print of (b, r).

    >>> curve_line()
    '14 bands of 8 hashes: a pair is found at Jaccard 0.5 with 5.3 %, 0.7 56.5 %, 0.8 92.4 %, 0.9 100.0 %'
    """
    chances = ", ".join(f"{s}{' with' if s == 0.5 else ''} {candidate_chance(s, num_hashes, bands):.1%}"
                        .replace("%", " %") for s in (0.5, 0.7, 0.8, 0.9))
    return f"{bands} bands of {num_hashes // bands} hashes: a pair is found at Jaccard {chances}"


def band_keys(texts: Iterable[str], num_hashes: int = 112, bands: int = 14, ngram: int = 5, seed: int = 0
              ) -> np.ndarray:
    """(N, bands) uint64: of each band of the signature one key, the band's number in it; 0: no n-grams.

    A function of each document alone: parts of a corpus can be done by different processes, and their keys
    laid one after the other. 8 bytes a band and document. Raises UserError for bands that do not fit.
    """
    check(num_hashes, bands, ngram)
    factors, offsets = hash_functions(num_hashes, seed)
    random = np.random.Generator(np.random.PCG64([seed, 1]))
    odd = random.integers(2 ** 64, size=num_hashes // bands, dtype=np.uint64) | np.uint64(1)
    blocks = []
    for hashes, counts in blocks_of_shingles(texts, ngram, WordHashes(seed)):
        rows = smallest(hashes, counts, factors, offsets).reshape(len(counts), bands, -1)
        keys = (rows * odd).sum(axis=2, dtype=np.uint64)  # (texts, b, r) -> (texts, b), modulo 2^64
        keys = mix(keys + np.arange(bands, dtype=np.uint64) * MULTIPLIER)
        keys[counts == 0] = 0
        blocks.append(keys)
    return np.concatenate(blocks)


def check(num_hashes: int, bands: int, ngram: int, threshold: float = 1.0):
    if ngram < 1:
        raise UserError(f"ngram {ngram} is out of range; it must be at least 1 word")
    if not 0 < threshold <= 1:
        raise UserError(f"threshold {threshold} is out of range; a Jaccard similarity over 0, at most 1, is meant")
    if not 1 <= bands <= num_hashes or num_hashes % bands:
        raise UserError(f"num_hashes {num_hashes} cannot be cut into {bands} bands of equal size; "
                        f"pass a multiple, such as --num_hashes {max(1, num_hashes // max(bands, 1)) * bands}")


def near_duplicates(texts, threshold: float = 0.8, num_hashes: int = 112, bands: int = 14, ngram: int = 5,
                    seed: int = 0, keys: np.ndarray | None = None) -> np.ndarray:
    """(N,) int64: the index of each document's kept twin, its own where it is kept.

    Documents that share a key in a band are candidates; their n-grams are then compared, and from `threshold`
    on they are joined. Who is joined with one of a cluster belongs to it; its smallest index stays. Every
    document that is dropped thus has a twin of that similarity, in its cluster. The result depends on the
    texts and their order alone. Of a pair at the threshold 8 % are not found by default: `curve_line`.

    texts: a sequence; it is read once, then texts[i] is asked for candidates only, so it can lie on disk
    (`StoredTexts`). keys: what band_keys gave for all of them, with the same other arguments.

    In memory: 8 bytes a band and document (keys), 8 for the clusters, some 40 while a band is sorted, one
    band after the other; and the n-grams of the last 256 candidates.
    """
    check(num_hashes, bands, ngram, threshold)
    texts = texts if hasattr(texts, "__getitem__") else list(texts)
    if keys is None:
        keys = band_keys(texts, num_hashes, bands, ngram, seed)
    assert keys.shape == (len(texts), bands), f"keys {keys.shape} are not those of {len(texts)} texts"

    hashes, clusters = WordHashes(seed), Clusters(len(texts))

    @functools.lru_cache(maxsize=256)
    def shingles(i: int) -> np.ndarray:
        return distinct(next(blocks_of_shingles([texts[i]], ngram, hashes))[0])

    def similar(i: int, j: int) -> bool:
        a, b = shingles(i), shingles(j)
        shared = len(a) + len(b) - len(distinct(np.concatenate([a, b])))
        return shared / (len(a) + len(b) - shared) >= threshold

    for band in range(bands):
        for bucket in buckets(keys[:, band], clusters.roots()):
            join_similar(bucket.tolist(), clusters, similar)
    return clusters.roots()


def distinct(values: np.ndarray) -> np.ndarray:
    """The sorted set of them. (np.unique of 2026 hashes first, which takes several times as long.)"""
    values = np.sort(values)
    return values[np.concatenate([[True], values[1:] != values[:-1]])]


def buckets(keys: np.ndarray, roots: np.ndarray) -> list[np.ndarray]:
    """Who shares a key: ascending indices a bucket, only of buckets in which there is something to join."""
    order = np.argsort(keys, kind="stable")
    order = order[np.searchsorted(keys, 1, sorter=order):]  # key 0: no n-grams
    keys, roots = keys[order], roots[order]
    new = np.flatnonzero(keys[1:] != keys[:-1]) + 1
    firsts = np.concatenate([[0], new, [len(keys)]])
    together = (keys[1:] == keys[:-1]) & (roots[1:] != roots[:-1])
    wanted = np.unique(np.searchsorted(firsts, np.flatnonzero(together), side="right") - 1)
    return [order[firsts[i]:firsts[i + 1]] for i in wanted]


def join_similar(bucket: list[int], clusters: Clusters, similar: Callable, most: int = 1000):
    """Join the documents of a bucket that are similar.

    A document that is in a cluster already, or has been found similar to one of it, is not compared with the rest of it:
    a bucket of m copies takes m comparisons. Of m documents that are all different it would take m^2 / 2;
    so a document is compared with `most` others at most, which only huge buckets of unlike documents feel.
    """
    groups = []  # the documents of this bucket so far, a list a cluster
    for i in bucket:
        left, matching, others = most, [], []
        for group in groups:
            found = clusters.find(group[0]) == clusters.find(i)
            if not found:
                found = any(similar(j, i) for j in islice(group, left))
                left = max(0, left - len(group))
            (matching if found else others).append(group)
        for group in matching:
            clusters.join(i, group[0])
            if group is not matching[0]:
                matching[0].extend(group)
        if matching:
            matching[0].append(i)
        groups = [*others, *(matching[:1] or [[i]])]


# ---- 5. Equal documents, equal lines -----------------------------------------------------------------------


def exact_duplicates(texts: Iterable[str]) -> np.ndarray:
    """(N,) int64: the index of the first equal text, its own where it is the first.

    Compared are 128 bits of BLAKE2b; 16 bytes a document, and as much again while they are sorted.
    """
    digests = b"".join(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest() for text in texts)
    high, low = np.frombuffer(digests, np.uint64).reshape(-1, 2).T
    order = np.lexsort((low, high))  # stable: the first of equal ones comes first
    new = np.ones(len(order), bool)
    new[1:] = (high[order][1:] != high[order][:-1]) | (low[order][1:] != low[order][:-1])
    first = np.empty(len(order), np.int64)
    first[order] = order[new][np.cumsum(new) - 1]
    return first


SENTENCE = re.compile(r"(?<=[.!?])(?=\s)|(?<=[。！？\n])")  # behind the end of one; joined again, all is there
LINE = re.compile(r"(?<=\n)")


def without_repeated_lines(texts: Iterable[str], unit: str = "line", normalise: bool = False,
                           min_length: int = 1) -> Iterator[str]:
    """Yield each text without the lines ("line") or sentences ("sentence") that stood in an earlier document.

    What a document repeats within itself stays: a refrain, a `return None`. Lines are compared without the white
    space around them; with normalise as CCNet does (Wenzek et al. 2020, https://arxiv.org/abs/1911.00359): in lower
    case, digits as 0, without accents and punctuation. What has fewer than min_length characters then, or
    none, always stays.

    `texts` is read twice, so not a generator. 64 bits of BLAKE2b a line: in memory some 30 bytes a line.
    """
    assert iter(texts) is not texts, "texts is read twice: a list or the like, not a generator"
    keys, counts = array("Q"), array("q")
    for text in texts:
        found = [line_key(piece, normalise, min_length) for piece in pieces(text, unit)]
        keys.extend(found)
        counts.append(len(found))
    keys, document = np.array(keys, np.uint64), np.repeat(np.arange(len(counts)), counts)
    order = np.argsort(keys, kind="stable")
    new = np.concatenate([[True], keys[order][1:] != keys[order][:-1]])[:len(keys)]
    first = document[order][new][np.cumsum(new) - 1]  # the first document that has the line, in sorted order
    stays = np.empty(len(keys), bool)
    stays[order] = (first == document[order]) | (keys[order] == 0)
    del keys, document, order, new, first
    at = 0
    for text, count in zip(texts, counts, strict=True):
        yield "".join(piece for piece, stay in zip(pieces(text, unit), stays[at:at + count]) if stay)
        at += count


def without_repeated_lines_plain(texts: list[str], unit: str = "line", normalise: bool = False) -> list[str]:
    """What without_repeated_lines must equal, with a set of all lines."""
    seen, result = set(), []
    for text in texts:
        lines = [(piece, normalised(piece) if normalise else piece.strip()) for piece in pieces(text, unit)]
        result.append("".join(piece for piece, line in lines if not line or line not in seen))
        seen.update(line for _, line in lines)
    return result


def pieces(text: str, unit: str) -> list[str]:
    return {"line": LINE, "sentence": SENTENCE}[unit].split(text)


def line_key(piece: str, normalise: bool, min_length: int) -> int:
    """64 bits, 0 for what always stays."""
    line = normalised(piece) if normalise else piece.strip()
    if len(line) < max(1, min_length):
        return 0
    return int.from_bytes(hashlib.blake2b(line.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


class Normalised(dict):
    """For str.translate: what becomes of a character."""
    def __missing__(self, code: int):
        kind = unicodedata.category(chr(code))
        self[code] = "0" if kind == "Nd" else None if kind == "Mn" or kind[0] == "P" else chr(code)
        return self[code]


NORMALISED = Normalised()


def normalised(line: str) -> str:
    """
    >>> normalised("  Café No. 15, page 3!")
    'cafe no 00 page 0'
    """
    return unicodedata.normalize("NFD", line.lower()).translate(NORMALISED).strip()


# ---- 6. Passages: a suffix array ---------------------------------------------------------------------------

PIECE = 2 ** 17  # places of the suffix array that are worked on at once: what bounds the memory beside it


def duplicate_spans(tokens, min_length: int, ends: np.ndarray | None = None) -> np.ndarray:
    """(N, 2) int64: spans [start, end), in order and apart, of tokens that stand earlier too.

    A token is in a span if it is in a window of `min_length` tokens which is found at an earlier place too (that
    may overlap). Windows that overlap or touch are one span: cutting all spans leaves the first place of each
    repeated passage. (All of a span need not stand in one place earlier.)

    ends: where documents end, ascending; a window that reaches over an end counts neither way.
    In memory: 10 to 11 bytes a token beside the tokens. Tokens are integers in [0, 2^32 - 2].
    """
    tokens = np.asarray(tokens)
    if min_length < 1:
        raise UserError(f"min_length {min_length} is out of range; it must be at least 1 token")
    if len(tokens) <= min_length:
        return np.empty((0, 2), np.int64)
    order, new = suffix_array(tokens, min_length)
    crossing = np.zeros(len(tokens), bool)
    for end in () if ends is None else ends:
        crossing[max(0, end - min_length + 1):end] = True
    repeated = np.zeros(len(tokens), bool)  # True where a window begins that stands earlier too
    for low, high, active in unsorted_pieces(new):
        places = order[low:high][active]
        alike = new[low:high][active]
        inside = ~crossing[places]
        groups = (np.cumsum(alike) - 1)[inside]
        places = places[inside]
        if len(places):
            repeated[places] = True
            starts = np.flatnonzero(np.concatenate([[True], groups[1:] != groups[:-1]]))
            repeated[np.minimum.reduceat(places, starts)] = False  # the first place stays
    del order, new, crossing
    starts = np.flatnonzero(repeated)
    apart = np.concatenate([[True], np.diff(starts) > min_length])[:len(starts)]
    last = np.concatenate([apart[1:], [True]])[:len(starts)]
    return np.stack([starts[apart], starts[last] + min_length], axis=1)


def duplicate_spans_plain(tokens: list[int], min_length: int) -> list[tuple[int, int]]:
    """What duplicate_spans must equal: every window is looked up among all before it."""
    seen, covered = set(), set()
    for start in range(len(tokens) - min_length + 1):
        window = tuple(tokens[start:start + min_length])
        if window in seen:
            covered.update(range(start, start + min_length))
        seen.add(window)
    starts = sorted(i for i in covered if i - 1 not in covered)
    ends = sorted(i + 1 for i in covered if i + 1 not in covered)
    return list(zip(starts, ends))


def suffix_array(tokens: np.ndarray, depth: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """(order (N,) uint32, new (N,) bool): all suffixes, sorted, and where one begins that differs from the last.

    Suffixes are compared up to `depth` tokens, those that agree so far stay in no stated order; None: to their ends.
    The end of the text comes before every token.

    Prefix doubling (Manber and Myers 1993): sorted by their first h tokens, each suffix has a rank; the rank
    of the suffix h further on says how the next h tokens sort. So each round doubles h. As Larsson and Sadakane
    (2007) do, only those that still agree with another are sorted again. The last round looks less than h
    further, to end at `depth` exactly: then neighbours agree in `depth` tokens (their longest common prefix
    is at least that) just where `new` is False, and no array of prefix lengths need be computed.
    """
    ranks, h = packed_prefixes(tokens, depth)
    order, new = first_order(ranks[:len(tokens)])
    while (depth is None or h < depth) and not new.all():
        step = h if depth is None else min(h, depth - h)
        rank(order, new, ranks)
        for low, high, active in unsorted_pieces(new):
            sort_again(order[low:high], new[low:high], active, ranks, step)
        h += step
    return order, new


def packed_prefixes(tokens: np.ndarray, depth: int | None) -> tuple[np.ndarray, int]:
    """(keys (N + 1,) uint32, h): the first h tokens of each suffix as digits of a number, h as 32 bits allow."""
    if len(tokens) >= 2 ** 28:
        raise UserError(f"{len(tokens):,} tokens are too many for one suffix array; pass at most {2 ** 28:,}, "
                        f"a shard at a time")
    low, high = (int(tokens.min()), int(tokens.max())) if len(tokens) else (0, 0)
    if tokens.dtype.kind not in "ui" or low < 0 or high > 2 ** 32 - 2:
        raise UserError(f"tokens of {tokens.dtype} from {low} to {high}; integers in [0, 2^32 - 2] are expected")
    base, h = high + 2, 1  # digit 0: behind the end
    while base ** (h + 1) <= 2 ** 32 and (depth is None or h < depth):
        h += 1
    keys = np.zeros(len(tokens) + 1, np.uint32)
    for place in range(h):
        digits = keys[:max(0, len(tokens) - place)]
        keys *= np.uint32(base % 2 ** 32)  # base = 2^32 only where h = 1, and then keys is 0
        np.add(digits, tokens[place:], out=digits, casting="unsafe")
        digits += np.uint32(1)
    return keys, h


def first_order(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(order, new) by keys: those in a range of values at a time are collected, and sorted with their places."""
    order, new, at = np.empty(len(keys), np.uint32), np.empty(len(keys), bool), 0
    for low, high, count in ranges_of_values(keys, max(PIECE, len(keys) // 32)):
        packed, filled = np.empty(count, np.uint64), 0
        for start in range(0, len(keys), PIECE):
            piece = keys[start:start + PIECE]
            found = np.flatnonzero((piece >= low) & (piece <= high))
            packed[filled:filled + len(found)] = pack(piece[found], found + start, 32)
            filled += len(found)
        sort_packed(packed, order[at:at + count], new[at:at + count])
        at += count
    return order, new


def pack(keys: np.ndarray, places: np.ndarray, bits: int) -> np.ndarray:
    """One number of 64 bits for a key and, in the lower bits, a place.

    So plain numbers are sorted: numpy does that several times as fast as it finds an order (argsort), and
    without 8 bytes more for it.
    """
    return (keys.astype(np.uint64) << np.uint64(bits)) | places.astype(np.uint64)


def sort_packed(packed: np.ndarray, order: np.ndarray, new: np.ndarray):
    """Sort keys with 32 bits of place, write the places to `order`, and to `new` where a key begins."""
    packed.sort()
    np.bitwise_and(packed, np.uint64(2 ** 32 - 1), out=order, casting="unsafe")
    packed >>= np.uint64(32)
    new[0] = True
    np.not_equal(packed[1:], packed[:-1], out=new[1:])


def ranges_of_values(keys: np.ndarray, size: int) -> Iterator[tuple[np.uint32, np.uint32, int]]:
    """Yield (lowest, highest, count): ranges of values, about `size` of the keys in each, none without any."""
    if not len(keys):
        return
    shift = max(0, int(keys.max()).bit_length() - 18)
    counts = np.zeros((int(keys.max()) >> shift) + 1, np.int64)
    for start in range(0, len(keys), PIECE):
        counts += np.bincount(keys[start:start + PIECE] >> np.uint32(shift), minlength=len(counts))
    low, count = 0, 0
    for value in np.flatnonzero(counts).tolist():
        if count and count + counts[value] > size:
            yield np.uint32(low << shift), np.uint32((value << shift) - 1), count
            low, count = value, 0
        count += int(counts[value])
    yield np.uint32(low << shift), np.uint32(min(2 ** 32, len(counts) << shift) - 1), count


def rank(order: np.ndarray, new: np.ndarray, ranks: np.ndarray):
    """Write the rank of each suffix: the place in `order` of the first that agrees with it, and 1; 0: the end."""
    last = 0
    for start in range(0, len(order), PIECE):
        places = np.arange(start + 1, min(start + PIECE, len(order)) + 1, dtype=np.uint32)
        places[~new[start:start + PIECE]] = 0
        places[0] = places[0] or last
        np.maximum.accumulate(places, out=places)
        ranks[order[start:start + PIECE]] = places
        last = places[-1]
    ranks[len(order)] = 0


def unsorted_pieces(new: np.ndarray) -> Iterator[tuple[int, int, np.ndarray]]:
    """Yield (low, high, active): pieces of whole groups, and the places in them where two or more still agree.

    A piece has at most PIECE places, or is a single group.
    """
    low = 0
    while low < len(new):
        high = min(low + PIECE, len(new))
        if high < len(new) and not new[high]:
            before = np.flatnonzero(new[low + 1:high])
            if len(before):
                high = low + 1 + int(before[-1])
            else:
                behind = int(new[high:].argmax())
                high = high + behind if new[high + behind] else len(new)
        alone = new[low:high].copy()
        alone[:-1] &= new[low + 1:high]
        active = np.flatnonzero(~alone)
        if len(active):
            yield low, high, active
        low = high


def sort_again(order: np.ndarray, new: np.ndarray, active: np.ndarray, ranks: np.ndarray, step: int):
    """Sort the groups of a piece by the ranks `step` further on, in place; mark where they fall apart."""
    if len(order) > PIECE:  # a single group
        packed = np.empty(len(order), np.uint64)
        for start in range(0, len(order), PIECE):
            places = order[start:start + PIECE]
            packed[start:start + PIECE] = pack(ranks[places + np.uint32(step)], places, 32)
        sort_packed(packed, order, new)
        return
    places = order[active]
    groups = np.cumsum(new[active])
    bits, rank_bits = len(active).bit_length(), len(ranks).bit_length()
    assert int(groups[-1]).bit_length() + rank_bits + bits <= 64, "PIECE is too large for this many tokens"
    keys = pack(groups, ranks[places + np.uint32(step)], rank_bits)
    packed = pack(keys, np.arange(len(active)), bits)
    packed.sort()
    order[active] = places[packed & np.uint64(2 ** bits - 1)]
    packed >>= np.uint64(bits)
    new[active[1:]] = packed[1:] != packed[:-1]


def cut(sequence, spans: Iterable[tuple[int, int]]):
    """The string, bytes or list without the spans [start, end).

    >>> cut("abcdef", [(1, 3), (2, 4)])
    'aef'
    """
    kept, at = sequence[:0], 0
    for start, end in sorted(spans):
        kept, at = kept + sequence[at:max(at, start)], max(at, end)
    return kept + sequence[at:]


def without_repeated_spans(texts: list[str], min_length: int = 200) -> list[str]:
    """The texts without the passages of `min_length` bytes (UTF-8) that stand in one before, or earlier in it.

    A passage is in one text; cut are whole characters. All texts are in memory, and some 12 bytes a byte of text.
    """
    contents = [text.encode("utf-8") for text in texts]
    ends = np.cumsum([len(content) for content in contents])
    data = np.frombuffer(b"".join(contents), np.uint8)
    dropped = np.zeros(len(data) + 1, bool)
    continues = np.append(data & 0xC0 == 0x80, False)  # a byte inside of a character
    for start, end in duplicate_spans(data, min_length, ends).tolist():
        while continues[start]:
            start += 1
        while continues[end]:
            end -= 1
        dropped[start:end] = True
    starts = [0, *ends.tolist()]
    return [data[low:high][~dropped[low:high]].tobytes().decode("utf-8") for low, high in zip(starts, starts[1:])]
