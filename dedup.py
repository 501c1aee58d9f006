"""What stands twice is dropped: documents, lines, passages; and what stands in a test set, too.

    python dedup.py                                 # the source of Python's own standard library, offline
    python dedup.py --input poems.jsonl --show 5    # any {"text": …} lines; shows five near-duplicates

With no arguments it finds, in 31.5 MB, 46 equal documents, 23 near-duplicates (0.4 MB), and 2.2 MB of
passages, in 17 s on one core (Python 3.11).

A crawl holds much of its text several times, and a model that reads it so often learns it by heart instead
of the language (Lee et al. 2022, https://arxiv.org/abs/2107.06499). From coarse to fine:

    exact_duplicates        equal documents                              a digest a document
    without_repeated_lines  lines or sentences of earlier documents      a digest a line
    near_duplicates         documents of almost the same n-grams         MinHash, LSH, union-find
    duplicate_spans         passages of `min_length` tokens, wherever    a suffix array (suffixes.py)
    contaminated            what stands in a benchmark                   a table of its n-grams

Two documents are near-duplicates if of all n-grams that they have a share of `threshold` is in both: their
Jaccard similarity. `near_duplicates_plain` compares all pairs, which no crawl allows. MinHash (Broder 1997)
shortens a document to a few numbers that agree as often as the documents do; locality-sensitive hashing
(Indyk and Motwani 1998; Leskovec, Rajaraman, Ullman: Mining of Massive Datasets, chapter 3) finds those that
agree without looking at the others. What it finds is compared exactly, so nothing is dropped by chance.

    >>> texts = ["the cat sat on the mat by the door", "something else altogether, quite another story",
    ...          "The cat sat on the mat, by the door!"]
    >>> near_duplicates(texts).tolist()
    [0, 1, 0]
"""
import bisect
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

import config
from config import UserError
from shingles import (MULTIPLIER, WORD, Hasher, blocks_of_shingles, blocks_of_words, jaccard, mix, windows,
                      words_of)
from suffixes import duplicate_spans, without_repeated_spans  # noqa: F401, the first for who imports it here

# ---- 1. The lesson: all pairs, joined ----------------------------------------------------------------------


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
        """Make one cluster of those of i and j; its root is the smaller of their roots."""
        first, second = sorted((self.find(i), self.find(j)))
        self.parents[second] = first

    def roots(self) -> np.ndarray:
        """The root of every index, int64 (N,)."""
        roots = np.array(self.parents, np.int64)
        while not np.array_equal(roots, above := roots[roots]):
            roots = above
        return roots


# ---- 2. MinHash --------------------------------------------------------------------------------------------


def minhash(texts: Iterable[str], num_hashes: int = 112, ngram: int = 5, seed: int = 0) -> np.ndarray:
    """(N, num_hashes) uint32: for each document and hash function, the smallest hash of its n-grams.

    The smallest hash of two sets together belongs to any of their elements with equal chance. If that one is
    in both sets, it is the smallest of both: so the chance that two documents agree in a column is their
    Jaccard similarity s, and the share of k columns in which they agree estimates s, with a standard error of
    sqrt(s (1 - s) / k).

    Function i is a_i x + b_i modulo 2^32, x the upper 32 bits of an n-gram's hash, a_i odd: a bijection, so
    no two n-grams tie. (x is random already, by Hasher; that is why so simple a function is enough.) All
    follows from `seed`. A document without n-grams has 2^32 - 1 throughout. 4 bytes a hash and document.
    """
    check(num_hashes, 1, ngram)
    factors, offsets = hash_functions(num_hashes, seed)
    blocks = [smallest(hashes, counts, factors, offsets)
              for hashes, counts in blocks_of_shingles(texts, ngram, Hasher(seed))]
    return np.concatenate(blocks)


def hash_functions(num_hashes: int, seed: int) -> np.ndarray:
    """(2, num_hashes) uint32: the factors a_i, odd, and the offsets b_i."""
    random = np.random.PCG64([seed, 1]).random_raw(2 * num_hashes).reshape(2, num_hashes)
    functions = (random >> np.uint64(32)).astype(np.uint32)
    functions[0] |= np.uint32(1)
    return functions


def smallest(hashes, counts, factors, offsets) -> np.ndarray:
    """The signatures (texts, num_hashes) uint32 of a block of texts: of each text and function the minimum.

    hashes: uint64, those of the n-grams of all texts, one text after the other; counts: how many each text
    has. Its x are their upper 32 bits, and function i is factors[i] x + offsets[i] modulo 2^32 (uint32). A
    text without n-grams has 2^32 - 1 throughout.
    """
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


# ---- 3. Locality-sensitive hashing -------------------------------------------------------------------------


def candidate_chance(similarity, num_hashes: int = 112, bands: int = 14):
    """The chance that a pair of this Jaccard similarity is a candidate: 1 - (1 - s^r)^b, r rows a band."""
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
    odd = np.random.PCG64([seed, 2]).random_raw(num_hashes // bands) | np.uint64(1)
    blocks = []
    for hashes, counts in blocks_of_shingles(texts, ngram, Hasher(seed)):
        rows = smallest(hashes, counts, factors, offsets).reshape(len(counts), bands, len(odd))
        keys = (rows * odd).sum(axis=2, dtype=np.uint64)  # (texts, b, r) -> (texts, b), modulo 2^64
        keys = mix(keys + np.arange(bands, dtype=np.uint64) * MULTIPLIER)
        keys[counts == 0] = 0
        blocks.append(keys)
    return np.concatenate(blocks)


def check(num_hashes: int, bands: int, ngram: int, threshold: float = 1.0):
    """Raise UserError for what is out of range or does not fit together."""
    if ngram < 1:
        raise UserError(f"ngram {ngram} is out of range; it must be at least 1 word")
    if not 0 < threshold <= 1:
        raise UserError(f"threshold {threshold} is out of range; it must be over 0 and at most 1")
    if not 1 <= bands <= num_hashes or num_hashes % bands:
        multiple = max(1, num_hashes // max(bands, 1)) * max(bands, 1)
        raise UserError(f"num_hashes {num_hashes} cannot be cut into {bands} bands of equal size; "
                        f"pass a multiple, such as --num_hashes {multiple}")


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

    hasher, clusters = Hasher(seed), Clusters(len(texts))

    @functools.lru_cache(maxsize=256)
    def shingles(i: int) -> np.ndarray:
        return distinct(next(blocks_of_shingles([texts[i]], ngram, hasher))[0])

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
    order = order[np.searchsorted(keys, np.uint64(1), sorter=order):]  # key 0: no n-grams
    keys, roots = keys[order], roots[order]
    new = np.flatnonzero(keys[1:] != keys[:-1]) + 1
    firsts = np.concatenate([[0], new, [len(keys)]])
    together = (keys[1:] == keys[:-1]) & (roots[1:] != roots[:-1])
    wanted = np.unique(np.searchsorted(firsts, np.flatnonzero(together), side="right") - 1)
    return [order[firsts[i]:firsts[i + 1]] for i in wanted]


def join_similar(bucket: list[int], clusters: Clusters, similar: Callable, most: int = 200):
    """Join the documents of a bucket that are similar.

    A document that is in a cluster already, or similar to one of it, is not compared with the rest of it: a
    bucket of m copies takes m comparisons. Of m documents that are all different it would take m^2 / 2; so a
    document is compared with `most` others at most, which only huge buckets of unlike documents feel.
    """
    groups = {}  # root of a cluster -> its documents in this bucket, of those seen so far
    for i in bucket:
        own, left, matching = clusters.find(i), most, []
        for root, group in islice(groups.items(), most):
            if root != own and left > 0:
                if any(similar(j, i) for j in islice(group, left)):
                    matching.append(root)
                left -= len(group)
        parts = [groups.pop(root) for root in (own, *matching) if root in groups]
        for root in matching:
            clusters.join(i, root)
        together = max(parts, key=len, default=[])
        for part in parts:
            if part is not together:
                together.extend(part)
        together.append(i)
        groups[clusters.find(i)] = together


# ---- 4. Equal documents, equal lines -----------------------------------------------------------------------


def exact_duplicates(texts: Iterable[str]) -> np.ndarray:
    """(N,) int64: the index of the first equal text, its own where it is the first.

    Compared are 128 bits of BLAKE2b; 16 bytes a document, and as much again while they are sorted.
    """
    digests = b"".join(digest(text, 16) for text in texts)
    return first_equal(np.frombuffer(digests, np.uint64).reshape(-1, 2))


def first_equal(keys: np.ndarray) -> np.ndarray:
    """(N,) int64: for each row of keys (N, columns) the index of the first row that equals it."""
    order = np.lexsort(keys.T[::-1])  # stable: the first of equal ones comes first
    keys = keys[order]
    new = np.ones(len(keys), bool)
    new[1:] = (keys[1:] != keys[:-1]).any(axis=1)
    first = np.empty(len(keys), np.int64)
    first[order] = order[new][np.cumsum(new) - 1]
    return first


def digest(text: str, size: int) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=size).digest()


SENTENCE = re.compile(r"(?<=[.!?])(?=\s)|(?<=[。！？\n])")  # behind the end of one; joined again, all is there
LINE = re.compile(r"(?<=\n)")


def without_repeated_lines(texts: Iterable[str], unit: str = "line", normalise: bool = False,
                           min_length: int = 1) -> Iterator[str]:
    """Yield each text without the lines ("line") or sentences ("sentence") that stood in an earlier document.

    What a document repeats within itself stays: a refrain, a `return None`. Lines are compared without the
    white space around them; with normalise as CCNet does (Wenzek et al. 2020,
    https://arxiv.org/abs/1911.00359): in lower case, digits as 0, without accents and punctuation. What has
    fewer than min_length characters then, or none, always stays.

    `texts` is read twice, so not a generator. 64 bits of BLAKE2b a line: in memory some 30 bytes a line.
    """
    assert iter(texts) is not texts, "texts is read twice: a list or the like, not a generator"
    keys, counts = array("Q"), array("q")
    for text in texts:
        found = [line_key(piece, normalise, min_length) for piece in pieces(text, unit)]
        keys.extend(found)
        counts.append(len(found))
    keys, document = np.array(keys, np.uint64), np.repeat(np.arange(len(counts)), counts)
    stays = (document[first_equal(keys[:, None])] == document) | (keys == 0)  # no earlier document has it
    del keys, document
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
    return int.from_bytes(digest(line, 8), "little")


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


# ---- 5. Decontamination ------------------------------------------------------------------------------------

SHORTEST = 8  # words: a shorter benchmark item ("What is the capital of France?") stands in texts by chance


class Overlap(NamedTuple):
    """What a document shares with an item of a benchmark."""
    benchmark: str  # its name
    item: int       # the item's number in it, from 0
    start: int      # characters [start, end) of the document
    end: int
    words: str      # the shared words


def contaminated(texts: Iterable[str], benchmark: Iterable[str], ngram: int = 13) -> np.ndarray:
    """(N,) bool: which texts share `ngram` words in a row with a benchmark item; see contamination."""
    found = contamination(texts, {"benchmark": benchmark}, ngram)
    return np.fromiter((bool(overlaps) for overlaps in found), bool)


def contamination(texts: Iterable[str], benchmarks: dict[str, Iterable[str]], ngram: int = 13
                  ) -> Iterator[list[Overlap]]:
    """For each text, where it shares `ngram` words in a row with an item of a benchmark, in order.

    13 words, in lower case and without signs, are GPT-3's rule (Brown et al. 2020, appendix C); an item of 8
    to 12 words is looked for as a whole; a shorter one never counts. Where the same words stand in several
    items, the first is named. `suffixes.cut(text, [overlap[2:4] for overlap in overlaps])` leaves the
    document without them.

    benchmarks: name -> texts of its items. In memory: 24 bytes an n-gram of the benchmarks, and their words.
    Raises UserError for a benchmark in which no item is long enough.
    """
    if ngram < 1:
        raise UserError(f"ngram {ngram} is out of range; it must be at least 1 word")
    items = [(name, number, words_of(text)) for name, benchmark in benchmarks.items()
             for number, text in enumerate(benchmark)]
    for name in benchmarks:
        if not any(len(words) >= min(SHORTEST, ngram) for owner, _, words in items if owner == name):
            raise UserError(f"{name}: no item of at least {min(SHORTEST, ngram)} words, so nothing could be "
                            f"found in it; is this the file that was meant?")
    return look_up(texts, items, ngram)


def look_up(texts: Iterable[str], items: list[tuple], ngram: int) -> Iterator[list[Overlap]]:
    hasher = Hasher(0)
    table = benchmark_table(items, ngram, hasher)
    for block, words, counts in blocks_of_words(texts, hasher):
        ends = np.cumsum(counts)
        found = [[] for _ in counts]
        for length, (keys, owners, places) in table.items():
            looked_up = windows(words, length)
            at = np.minimum(np.searchsorted(keys, looked_up), len(keys) - 1)
            for hit in np.flatnonzero(keys[at] == looked_up):
                document = int(np.searchsorted(ends, hit, side="right"))
                first = int(hit - ends[document] + counts[document])
                found[document].append((int(owners[at[hit]]), int(places[at[hit]]), first, length))
        yield from (overlaps(text, hits, items) if hits else [] for text, hits in zip(block, found))


def benchmark_table(items: list[tuple], ngram: int, hasher: Hasher) -> dict[int, tuple]:
    """{length: (keys, items, places)}: the n-grams of all items, sorted, and where each stands first."""
    found = {}
    for index, (_, _, words) in enumerate(items):
        length = min(ngram, len(words))
        if length >= min(SHORTEST, ngram):
            keys = windows(hasher.words(" ".join(words).encode("utf-8", "surrogatepass"))[0], length)
            found.setdefault(length, []).append((keys, np.full(len(keys), index), np.arange(len(keys))))
    table = {}
    for length, parts in found.items():
        keys, owners, places = map(np.concatenate, zip(*parts))
        keys, first = np.unique(keys, return_index=True)
        table[length] = (keys, owners[first], places[first])
    return table


def overlaps(text: str, hits: list[tuple[int, int, int, int]], items: list[tuple]) -> list[Overlap]:
    """Hits (item, place in it, place in the text, length) as runs of words, compared word by word."""
    words, spans = words_of(text), [match.span() for match in WORD.finditer(text)]
    runs = {}  # item -> [[first word, word behind the last], …]
    for index, place, first, length in sorted(hits, key=lambda hit: hit[2]):
        if words[first:first + length] == items[index][2][place:place + length]:  # else: over two documents
            found = runs.setdefault(index, [])
            if found and first <= found[-1][1]:
                found[-1][1] = max(found[-1][1], first + length)
            else:
                found.append([first, first + length])
    result = [Overlap(*items[index][:2], spans[first][0], spans[last - 1][1], " ".join(words[first:last]))
              for index, found in runs.items() for first, last in found]
    return sorted(result, key=lambda overlap: overlap.start)


def contaminated_plain(texts: list[str], benchmark: list[str], ngram: int = 13) -> list[bool]:
    """What contaminated must equal, with sets of words."""
    def grams(words, length):
        return set(zip(*(words[i:] for i in range(length))))

    result = []
    for words in map(words_of, texts):
        lengths = [(item, min(ngram, len(item))) for item in map(words_of, benchmark)]
        result.append(any(grams(words, length) & grams(item, length)
                          for item, length in lengths if length >= min(SHORTEST, ngram)))
    return result


# ---- 6. Plumbing -------------------------------------------------------------------------------------------


class StoredTexts:
    """The texts of JSON Lines files, in order: a sequence that keeps 8 bytes a document, and reads the rest.

    Raises UserError, with file and line, for a line without a text.
    """
    def __init__(self, paths: Iterable[str | Path]):
        self.paths, self.offsets, self.firsts = [Path(path) for path in paths], array("q"), [0]
        for path in self.paths:
            at = 0
            with open(path, "rb") as file:
                for line in file:
                    if line.strip():
                        self.offsets.append(at)
                    at += len(line)
            self.firsts.append(len(self.offsets))
        self.opened = (-1, None)  # the number of a file, and the file

    def __len__(self) -> int:
        return len(self.offsets)

    def __iter__(self) -> Iterator[str]:
        return map(self.__getitem__, range(len(self)))

    def __getitem__(self, i: int) -> str:
        if not 0 <= i < len(self):
            raise IndexError(i)
        number = bisect.bisect_right(self.firsts, i) - 1
        if self.opened[0] != number:
            self.close()
            self.opened = (number, open(self.paths[number], "rb"))
        self.opened[1].seek(self.offsets[i])
        try:
            return json.loads(self.opened[1].readline())["text"]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{self.paths[number]}: document {i - self.firsts[number] + 1} has no text: "
                            f'{{"text": "…"}} is expected ({type(error).__name__}: {error})') from None

    def close(self):
        if self.opened[1]:
            self.opened[1].close()
        self.opened = (-1, None)


@dataclass
class Settings:
    input: tuple[str, ...] = ()  # JSON Lines files; none: the modules of Python's standard library
    threshold: float = 0.8  # Jaccard similarity from which on documents are near-duplicates
    num_hashes: int = 112  # of a signature, 4 bytes each while a document is worked on
    bands: int = 14  # groups of hashes; one that agrees makes a pair a candidate
    ngram: int = 5  # words (in Chinese, Japanese, Thai … characters) that are compared together
    min_length: int = 200  # bytes of a passage that counts as repeated
    show: int = 3  # near-duplicates to show

    def __post_init__(self):
        check(self.num_hashes, self.bands, self.ngram, self.threshold)
        config.require(self, min_length=(1, None), show=(0, None))


def library_texts() -> list[str]:
    root = Path(sysconfig.get_path("stdlib"))
    paths = [path for path in sorted(root.rglob("*.py")) if "site-packages" not in path.parts]
    return [path.read_text(encoding="utf-8", errors="replace") for path in paths]


def main():
    settings = config.parse(Settings)
    texts = StoredTexts(settings.input) if settings.input else library_texts()
    sizes = np.array([len(text.encode("utf-8", "surrogatepass")) for text in texts])
    print(f"{len(texts):,} documents, {sizes.sum():,} bytes")
    print(curve_line(settings.num_hashes, settings.bands))
    print(f"in memory for near-duplicates: {8 * settings.bands + 8} bytes a document")
    numbers = np.arange(len(texts))

    def report(name, dropped, began):
        print(f"{name:<20}{np.count_nonzero(dropped):>10,} documents {int(sizes[dropped].sum()):>14,} bytes"
              f"{time.perf_counter() - began:>8.1f} s")

    began = time.perf_counter()
    exact = exact_duplicates(texts) != numbers
    report("equal", exact, began)
    began = time.perf_counter()
    kept = near_duplicates(texts, settings.threshold, settings.num_hashes, settings.bands, settings.ngram)
    near = (kept != numbers) & ~exact
    report("near-duplicates", near, began)
    began = time.perf_counter()
    left = [texts[i] for i in np.flatnonzero(~exact & ~near)]
    lengths = [len(text.encode("utf-8", "surrogatepass")) for text in left]
    cut_lengths = [len(text.encode("utf-8")) for text in without_repeated_spans(left, settings.min_length)]
    print(f"{'passages':<20}{np.count_nonzero(np.not_equal(lengths, cut_lengths)):>10,} documents "
          f"{sum(lengths) - sum(cut_lengths):>14,} bytes{time.perf_counter() - began:>8.1f} s")
    for i in np.flatnonzero(near)[:settings.show].tolist():
        one, other = texts[kept[i]], texts[i]
        print(f"\n{i} is like {kept[i]}: Jaccard {jaccard(one, other, settings.ngram):.3f}")
        print(f"  {one[:200]!r}\n  {other[:200]!r}")


if __name__ == "__main__":
    config.run(main)
