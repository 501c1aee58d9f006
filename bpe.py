"""Byte-level BPE: text becomes tokens, and the tokens become exactly that text again.

    python bpe.py --vocab_size 4096     # learns from the standard library's source, 30 MB: 10 s on two cores
    python bpe.py --input my_texts/*.txt --vocab_size 32768 --pattern cl100k --out tokenizer.json
    python bpe.py compare a.json b.json --text my_texts/       # two tokenizers on one text (compare.py)
    python bpe.py extend --model runs/base --text poems.jsonl --out runs/grown   # more tokens (vocabulary.py)

    text -> pre-tokens (words, numbers, signs) -> the bytes of each -> merged, as the merges were learned

Byte-pair encoding starts from single symbols and joins the most frequent neighbours, again and again (Gage
1994; for translation, Sennrich et al. 2016, https://arxiv.org/abs/1508.07909). GPT-2 (Radford et al. 2019)
made the symbols bytes: 256 of them spell every text, so none is unknown and nothing is normalised away.
`train_plain` is the whole idea. `Tokenizer.train` learns the same merges in seconds (bpe_train.py), as texts
have few different pre-tokens and most merges do not disturb each other. Encoding is written out plainly too,
but long texts take the way of cuts.py and bpe_encode.py, to the same ids. Files are the `tokenizer.json` of
Hugging Face tokenizers, and others (tokenizer_files.py).

    >>> tokenizer = Tokenizer.train(["low lower lowest"], vocab_size=256 + 3)
    >>> tokenizer.merges
    [(b'o', b'w'), (b'l', b'ow'), (b'low', b'e')]
    >>> tokenizer.encode("lowest")
    [258, 115, 116]
"""
import codecs
import functools
import hashlib
import heapq
import json
import sys
import sysconfig
import time
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, pairwise
from pathlib import Path

import numpy as np
import regex
from tqdm import tqdm

import config
import cuts
import tokenizer_files as files
from bpe_encode import Encoder
from bpe_further import learn_further
from bpe_train import learn_merges
from config import UserError
from tokenizer_files import DIGITS_PATTERN, GPT2_PATTERN, Unsupported, reading  # noqa: F401: looked for here
from workers import in_processes

# Where text is cut before anything is merged: the first of these that matches. Without cuts, "dog." "dog!"
# and "dog?" would each become a token. This is GPT-4's pattern as Llama 3 and others write it.
PATTERN = "|".join([
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)",  # English endings
    r"[^\r\n\p{L}\p{N}]?\p{L}+",      # a word, with the one space or sign before it
    r"\p{N}{1,3}",                    # digits in groups of one to three, from the left
    r" ?[^\s\p{L}\p{N}]+[\r\n]*",     # signs, with the space before and the ends of lines behind
    r"\s*[\r\n]+",                    # empty lines
    r"\s+(?!\S)",                     # spaces, without the last one, which goes with the word behind it
    r"\s+",
])
PATTERNS = {
    "llama3": PATTERN,
    "cl100k": PATTERN.replace(r"\s*[\r\n]+", r"\s++$|\s*[\r\n]+"),  # spaces at a text's end stay together
    "qwen": PATTERN.replace(r"\p{N}{1,3}", r"\p{N}"),  # each digit by itself
    "gpt2": GPT2_PATTERN,
    "o200k": "|".join([  # GPT-4o's: words end where capitals begin, marks belong to them, and so do endings
        *(r"[^\r\n\p{L}\p{N}]?" + word + r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?" for word in (
            r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+",
            r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*")),
        r"\p{N}{1,3}", r" ?[^\s\p{L}\p{N}]+[\r\n/]*", r"\s*[\r\n]+", r"\s+(?!\S)", r"\s+"]),
}
# The patterns whose cuts cuts.py knows; others do the same, slower
RULES = {PATTERN: cuts.LLAMA3, PATTERNS["qwen"]: cuts.QWEN, GPT2_PATTERN: cuts.GPT2,
         DIGITS_PATTERN: cuts.DIGITS}
END_OF_TEXT = ("<|endoftext|>", "<|end_of_text|>", "</s>")  # GPT-2's, Qwen's and ours; Llama 3's; Llama 2's
BYTES = [bytes([value]) for value in range(256)]


# ------------------------------------------------------------------------------------------------------------
# The lesson: count the pairs, merge the most frequent, count again


def train_plain(texts, vocab_size, special_tokens=(), pattern=PATTERN) -> list[tuple[bytes, bytes]]:
    """The merges, in order of creation. Slow and simple: what Tokenizer.train must equal.

    Of equally frequent pairs the greatest (bytes, bytes) tuple is merged first, so the order of the texts
    does not matter. In "aaa" the pair (a, a) counts twice, although only one of the two can be merged. A pair
    that occurs once will do.
    """
    pieces = count_pieces((pattern, special_tokens), texts).elements()
    words = [[BYTES[value] for value in piece.encode()] for piece in pieces]
    merges = []
    while 256 + len(merges) + len(special_tokens) < vocab_size:
        counts = Counter(pair for word in words for pair in pairwise(word))
        if not counts:
            raise too_large(vocab_size, merges, special_tokens)
        best = max(counts, key=lambda pair: (counts[pair], pair))
        merges.append(best)
        words = [merge(word, best) for word in words]
    return merges


def merge(word, pair) -> list[bytes]:
    """The word with every occurrence of the pair joined, from left to right.

    >>> merge([b"a", b"a", b"a", b"b"], (b"a", b"a"))
    [b'aa', b'a', b'b']
    """
    merged, i = [], 0
    while i < len(word):
        width = 2 if tuple(word[i:i + 2]) == pair else 1
        merged.append(b"".join(word[i:i + width]))
        i += width
    return merged


def too_large(vocab_size, merges, special_tokens):
    most = 256 + len(merges) + len(special_tokens)
    return UserError(f"vocab_size {vocab_size} is more than this text gives: at most {most} (256 bytes, "
                     f"{len(merges)} merges, {len(special_tokens)} special tokens); lower it, or add text")


# ------------------------------------------------------------------------------------------------------------
# Cutting text into pre-tokens


WINDOW = 1 << 20  # characters that are cut, or sent to another process, at a time
HELD_BACK = 8     # pre-tokens at the end of a window that the text behind it may still change; in use are 2


@functools.lru_cache(maxsize=64)
def compile_pattern(pattern):
    """The compiled pattern. Text that it leaves out becomes pre-tokens too, as in `tokenizers`.

    What is a letter is for the Unicode tables of `regex` to say; libraries with older ones cut newer
    characters differently.
    """
    try:
        groups = regex.compile(pattern).groups
        compiled = regex.compile(rf"{pattern}|(?s:.)+?(?=(?:{pattern})|\Z)")
    except regex.error as error:
        raise UserError(f"the split pattern {pattern!r} does not compile: {error}") from None
    if groups:
        raise UserError(f"the split pattern {pattern!r} has a group that captures; write (?:…) for (…)")
    return compiled


def check_pattern(pattern) -> str:
    """The pattern, if it compiles and loses no text; UserError if not. What cuts is compile_pattern's."""
    compiled = compile_pattern(pattern)
    if compiled.flags & regex.REVERSE or regex.search(r"(?<!\\)(?:\\\\)*\\K", pattern):
        raise UserError(f"the split pattern {pattern!r} goes backwards, or leaves out what stands before its "
                        f"\\K, so it loses text")
    if compiled.fullmatch("") or "" in (pieces := compiled.findall(PROBE)):
        raise matches_empty(pattern)
    if "".join(pieces) != PROBE:
        raise UserError(f"the split pattern {pattern!r} loses text: the pieces of {PROBE!r:.40}… are not all "
                        f"of it")
    return pattern


PROBE = "The lowest's 12345 words,\r\n\tCan't  \n  it? e\u0301 春眠 ſ\u00a0\u200d🙂!!\n\n -- \x00x "


def split_stream(chunks: Iterable[str], pattern: str, window=WINDOW) -> Iterator[list[str]]:
    """Lists of the pre-tokens of a text that comes in chunks: those of the whole text, wherever it was cut.

    The last HELD_BACK pre-tokens wait for the text behind, which may lengthen them. That suffices for
    patterns that look ahead no further than to the end of a run of spaces, as all in use. Memory: a window,
    and the longest pre-token.
    """
    findall = compile_pattern(pattern).findall
    waiting, length, enough = [], 0, window
    for chunk in chunks:
        waiting.append(checked_text(chunk))
        length += len(chunk)
        if length >= enough:
            pieces = findall("".join(waiting))
            yield pieces[:-HELD_BACK]
            waiting = ["".join(pieces[-HELD_BACK:])]
            length = len(waiting[0])
            enough = max(window, 2 * length)  # a very long pre-token is not cut out again for every chunk
    yield findall("".join(waiting))


# Characters that change nothing before them in NFC: neither a mark nor a letter that may join another (Lo)
FIRM = regex.compile(r"(?r)[^\p{M}\p{Lo}\p{Cn}]|[\p{Han}\p{Hiragana}\p{Katakana}--\p{M}]", regex.V1)


def normalize_stream(chunks: Iterable[str]) -> Iterator[str]:
    """A text that comes in chunks, in Unicode's form NFC; what the text behind may still change waits."""
    waiting = ""
    for chunk in chunks:
        waiting += checked_text(chunk)
        last = FIRM.search(waiting)  # (?r): from the end
        end = last.start() if last else 0
        yield unicodedata.normalize("NFC", waiting[:end])
        waiting = waiting[end:]
    yield unicodedata.normalize("NFC", waiting)


def split(text: str, pattern: str) -> Iterator[list[str]]:
    """Lists of the pre-tokens of a text, a window at a time: all of them take 20 times the text's memory."""
    return split_stream(windows(text), pattern)


def windows(text: str) -> Iterator[str]:
    return (text[i:i + WINDOW] for i in range(0, len(text), WINDOW))


def checked_text(text) -> str:
    """The text, with U+FFFD for lone surrogates, half characters that bad JSON holds and UTF-8 has not."""
    if not isinstance(text, str):
        raise UserError(f"text must be str, not {type(text).__name__}; decode bytes first")
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        return regex.sub("[\ud800-\udfff]", "\ufffd", text)


def compile_special(special_tokens):
    """Matches special tokens; where two begin at one place, the longer. Matches nothing if there are none."""
    longest_first = sorted(special_tokens, key=len, reverse=True)
    return regex.compile("|".join(map(regex.escape, longest_first)) or "(?!)")


def count_pieces(cut, texts) -> Counter:
    """How often each pre-token occurs in the texts without special tokens. cut: (pattern, special_tokens)."""
    pattern, special_tokens = cut
    special, counts = compile_special(special_tokens), Counter()
    for text in texts:
        for part in special.split(text) if special_tokens else [text]:
            for pieces in split(part, pattern):
                counts.update(pieces)
    if "" in counts:
        raise matches_empty(pattern)
    return counts


def count_pieces_soon(cut, texts, workers) -> Counter:
    """count_pieces of any number of texts, in processes; of a pattern whose cuts are known, in less time."""
    pattern, special_tokens = cut
    counts, rule = Counter(), RULES.get(pattern)
    if rule is None:
        for some in in_processes(count_pieces, cut, batches(texts), workers):
            counts.update(some)
        return counts
    segments = Counter()
    counter = special_tokens, cuts.SegmentCounter(rule)
    for some in in_processes(count_segments, counter, batches(texts), workers):
        segments.update(some)
    findall = compile_pattern(pattern).findall
    while segments:
        segment, count = segments.popitem()
        for piece in findall(segment):
            counts[piece] += count
    return counts


def count_segments(counter, texts) -> Counter:
    """How often each segment (cuts.py) occurs. counter: (special_tokens, cuts.SegmentCounter)."""
    special_tokens, count = counter
    special = compile_special(special_tokens)
    return count([part for text in texts for part in special.split(text)] if special_tokens else texts)


def matches_empty(pattern):
    return UserError(f"the split pattern {pattern!r} matches the empty text, so it loses text; write + for *")


# ------------------------------------------------------------------------------------------------------------
# Encoding: of all merges that can be made, make the one that was learned first; until none is left


def merge_ids(ids: list[int], ranks: dict, results: list[int]) -> list[int]:
    """The ids, merged. ranks: (id, id) -> rank of the merge, its place in .merges; results: rank -> new id.

    Quadratic in the length, but for words the fastest, as min() and index() run in C. Changes `ids`.
    """
    never = len(results)
    here = [ranks.get(pair, never) for pair in pairwise(ids)]  # here[i]: the rank of ids[i], ids[i + 1]
    while here and (rank := min(here)) < never:
        i = here.index(rank)
        ids[i:i + 2] = [results[rank]]
        del here[i]
        if i > 0:
            here[i - 1] = ranks.get((ids[i - 1], ids[i]), never)
        if i < len(here):
            here[i] = ranks.get((ids[i], ids[i + 1]), never)
    return ids


def merge_long(ids: list[int], ranks: dict, results: list[int]) -> list[int]:
    """What merge_ids gives, in n log n steps: the merges wait in a heap, the ids stand in a linked list."""
    ids = [*ids, None]  # None: the end, or an id merged into the one before it; no pair with None has a rank
    size = len(ids)
    left, right = list(range(-1, len(ids) - 1)), [*range(1, len(ids)), len(ids) - 1]
    heap = [ranks[pair] * size + i for i, pair in enumerate(pairwise(ids)) if pair in ranks]
    heapq.heapify(heap)
    while heap:
        rank, i = divmod(heapq.heappop(heap), size)
        j = right[i]
        if ranks.get((ids[i], ids[j])) != rank:  # one of the two has been merged since
            continue
        ids[i], ids[j], right[i] = results[rank], None, right[j]
        left[right[j]] = i
        for k in (left[i], i):
            pair = ids[k], ids[right[k]]
            if pair in ranks:
                heapq.heappush(heap, ranks[pair] * size + k)
    return [id for id in ids if id is not None]


LONG = 256  # bytes of a pre-token from which on merge_long is the faster
LONG_TEXT = 2000  # characters from which on bpe_encode.py is the faster


class PieceCache(dict):
    """pre-token -> its ids, made when first asked for. Nearly all words of a text have been seen before."""
    SIZE, LONGEST = 1 << 18, 128  # pre-tokens, about 60 MB; characters of one that may come again

    def __init__(self, encode_piece):
        self.encode_piece = encode_piece

    def __missing__(self, piece):
        ids = self.encode_piece(piece)
        if len(piece) <= self.LONGEST:
            if len(self) >= self.SIZE:
                self.clear()  # the frequent ones are soon back
            self[piece] = ids
        return ids


class Tokenizer:
    """Text to ids and back. Ids: the 256 bytes, the merges in order of creation, the special tokens.

    merges: list of (bytes, bytes), in order of creation. special_tokens: texts, which get the ids behind the
    merges, or {text: id}. pattern: a regular expression of the `regex` package, whose matches are the
    pre-tokens, or the name of one of PATTERNS. vocab: {id: bytes} for the bytes and merges of a tokenizer
    that numbers them otherwise (GPT-2's). nfc: text is brought into Unicode's form NFC first (Qwen's), and
    comes back in it. ignore_merges: a pre-token that is a token is not merged from its bytes (Llama 3's).
    shown: those of the special tokens that a reader is meant to see (Qwen3's <think>), which is only recorded
    here. flags: {special token: names} of what it does where it is allowed: lstrip and rstrip take away the
    spaces before and behind it, a single_word is not found inside a word, a normalized one is looked for
    last, in the text's NFC.
    Attributes: merges, pattern, nfc, ignore_merges, shown, flags; special_tokens {text: id}; vocab
    {id: bytes}, special tokens included; vocab_size, the rows of an embedding; dtype, the smallest numpy type
    for the ids: uint16 for up to 65,536 tokens, else uint32. Raises UserError for a merge of unknown tokens,
    a token or id that stands twice, an empty special token, a bad pattern.
    """
    # What a model's folder says beside tokenizer.json, and is written into the next one:
    bos_token = None  # the special token that stands before every text (Llama's); `encode` adds none
    eos_token = None  # the one at which generation ends; None: the one that ends a document
    stop_ids = ()  # all at which it does
    chat_template = None  # Jinja, for transformers

    def __init__(self, merges, special_tokens=(), pattern=PATTERN, vocab=None, nfc=False, ignore_merges=False,
                 shown=(), flags=None):
        self.merges = [(bytes(left), bytes(right)) for left, right in merges]
        self.pattern = check_pattern(PATTERNS.get(pattern, pattern))
        self.nfc, self.ignore_merges, self.shown, self.flags = nfc, ignore_merges, tuple(shown), flags or {}
        if vocab is None:
            vocab = dict(enumerate(BYTES + [left + right for left, right in self.merges]))
        ids = {token: id for id, token in vocab.items()}
        check_vocabulary(vocab, ids, self.merges)
        self.special_tokens = number_special_tokens(special_tokens, vocab, ids)
        vocab = {**vocab, **{id: text.encode() for text, id in self.special_tokens.items()}}
        self.vocab = dict(sorted(vocab.items()))
        self.vocab_size = max(self.vocab) + 1
        self.dtype = np.dtype(np.uint16 if self.vocab_size <= 1 << 16 else np.uint32)
        self._byte_ids = [ids[byte] for byte in BYTES]
        self._ranks = {(ids[left], ids[right]): rank for rank, (left, right) in enumerate(self.merges)}
        self._results = [ids[left + right] for left, right in self.merges]
        self._whole = ids if ignore_merges else {}
        self._added = files.find_added(self.special_tokens, self.flags, nfc)
        self._cache = PieceCache(self._encode_piece)

    @functools.cached_property
    def _encoder(self) -> Encoder | None:
        """What encodes long texts, to the same ids; None for a pattern whose cuts are not known."""
        if self.pattern not in RULES:
            return None
        return Encoder(RULES[self.pattern], compile_pattern(self.pattern).findall, self._byte_ids,
                       self._ranks, self._results, self._whole,
                       functools.partial(merge_long, ranks=self._ranks, results=self._results))

    @classmethod
    def train(cls, texts, vocab_size, special_tokens=(), pattern=PATTERN, workers=None):
        """A tokenizer of vocab_size tokens, special ones included, from texts: an iterable of str, read once.

        Equals train_plain for any order of the texts and number of workers (processes; default: one a core).
        Memory grows with the different pre-tokens, not with the text. Raises UserError if vocab_size is below
        256 and the special tokens, or larger than the text can give.
        """
        smallest = cls((), special_tokens, pattern)  # a mistake in these is told before the work
        special_tokens, pattern, most = tuple(smallest.special_tokens), smallest.pattern, sys.maxunicode + 1
        if not smallest.vocab_size <= vocab_size <= most:
            raise UserError(f"vocab_size {vocab_size} is out of range; 256 bytes and {len(special_tokens)} "
                            f"special tokens need {smallest.vocab_size}, and {most} is the most")
        number = vocab_size - smallest.vocab_size
        merges = learn_merges(count_pieces_soon((pattern, special_tokens), texts, workers), number)
        if len(merges) < number:
            raise too_large(vocab_size, merges, special_tokens)
        return cls(merges, special_tokens, pattern)

    def encode(self, text: str, allow_special=False) -> list[int]:
        """The ids of a text. A special token spelled in it stays ordinary text, unless allow_special is true.

        Any text comes back from decode as it was (with nfc: in that form). Lone surrogates in a str are not
        text: they become U+FFFD. No beginning-of-text token is added, even where the file has a template.
        """
        text = checked_text(text)
        if allow_special:
            return self._encode_between(text, self._added)
        text = unicodedata.normalize("NFC", text) if self.nfc else text
        if len(text) >= LONG_TEXT and self._encoder:
            return np.concatenate([*self._encoder.stream(windows(text), WINDOW)]).tolist()
        return list(chain.from_iterable(map(self._ids, split(text, self.pattern))))

    def encode_batch(self, texts: Iterable[str], workers=None) -> list[np.ndarray]:
        """The ids of each text, as arrays of dtype self.dtype, made in processes (default: one a core)."""
        total = len(texts) if hasattr(texts, "__len__") else None
        arrays = []
        with tqdm(total=total, desc="encode", unit=" texts", delay=1, disable=None) as bar:
            for encoded in in_processes(encode_texts, self, batches(texts), workers):
                arrays += encoded
                bar.update(len(encoded))
        return arrays

    def encode_stream(self, chunks: Iterable[str]) -> Iterator[int]:
        """The ids of a text that comes in chunks: encode("".join(chunks)), in the memory of a window."""
        chunks = normalize_stream(chunks) if self.nfc else map(checked_text, chunks)
        if self._encoder:
            for ids in self._encoder.stream(chunks, WINDOW):
                yield from ids.tolist()
        else:
            for pieces in split_stream(chunks, self.pattern):
                yield from self._ids(pieces)

    def _encode_texts(self, texts: list[str]) -> list[np.ndarray]:
        """The ids of each text; all texts at once, if none is so long that it had better go in windows."""
        if not self._encoder or sum(map(len, texts)) < LONG_TEXT or max(map(len, texts)) > 2 * WINDOW:
            return [np.array(self.encode(text), self.dtype) for text in texts]
        if self.nfc:
            texts = [unicodedata.normalize("NFC", text) for text in texts]
        ids, first = self._encoder.encode(texts)
        return [ids[begin:end].astype(self.dtype) for begin, end in pairwise(first.tolist())]

    def _encode_between(self, text: str, added: list) -> list[int]:
        """The ids of a text with the special tokens that the first of `added` finds, then of the rest."""
        if not added:
            return self.encode(text)
        (found, special_ids, nfc), *rest = added
        text, ids, end = unicodedata.normalize("NFC", text) if nfc else text, [], 0
        for match in found.finditer(text):
            ids += [*self._encode_between(text[end:match.start()], rest), special_ids[match["token"]]]
            end = match.end()
        return ids + self._encode_between(text[end:], rest)

    def _ids(self, pieces: list[str]) -> Iterator[int]:
        return chain.from_iterable(map(self._cache.__getitem__, pieces))  # in C, but for new words

    def _encode_piece(self, piece: str) -> list[int]:
        if not piece:
            raise matches_empty(self.pattern)
        data = piece.encode()
        if data in self._whole:
            return [self._whole[data]]
        ids = [self._byte_ids[value] for value in data]
        return (merge_ids if len(ids) < LONG else merge_long)(ids, self._ranks, self._results)

    def decode_bytes(self, ids) -> bytes:
        """The bytes that the ids stand for; special tokens give their text. ids: list, array or tensor."""
        ids = ids.tolist() if hasattr(ids, "tolist") else ids  # numpy's and torch's integers make poor keys
        try:
            return b"".join([self.vocab[id] for id in ids])
        except KeyError as error:
            raise UserError(f"id {error} is not in the vocabulary of {self.vocab_size} tokens") from None
        except TypeError:
            raise UserError("ids must be whole numbers in a row; decode one text at a time") from None

    def decode(self, ids) -> str:
        """The text that the ids stand for; bytes that are not UTF-8 (half a character) become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_stream(self, ids: Iterable[int]) -> Iterator[str]:
        """Bits of text as the ids come in, together decode(ids). Half a character waits for its rest."""
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        for id in ids:
            if text := decoder.decode(self.decode_bytes([int(id)])):
                yield text
        if text := decoder.decode(b"", final=True):
            yield text

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 of everything that decides the ids: equal for equal tokenizers, wherever they come from."""
        content = [self.pattern, [[left.hex(), right.hex()] for left, right in self.merges],
                   [[id, token.hex()] for id, token in self.vocab.items()], list(self.special_tokens.items())]
        content += ["nfc"] * self.nfc + ["ignore_merges"] * self.ignore_merges
        content += [sorted(self.flags.items())] if self.flags else []
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def with_special_tokens(self, texts):
        """The tokenizer with those of the texts that it lacks as special tokens at its end: old ids stay."""
        missing = [text for text in texts if text not in self.special_tokens]
        if not missing:
            return self
        added = {text: id for id, text in enumerate(missing, self.vocab_size)}
        grown = Tokenizer(self.merges, self.special_tokens | added, *self._settings())
        return grown.beside(self)

    def beside(self, other: "Tokenizer") -> "Tokenizer":
        """This tokenizer, with what other's folder says."""
        for name in ("bos_token", "eos_token", "stop_ids", "chat_template"):
            setattr(self, name, getattr(other, name))
        return self

    def extend(self, texts: Iterable[str], new_tokens: int, workers=None) -> "Tokenizer":
        """This tokenizer with new_tokens more, from merges learned on texts like these: old ids stay.

        As if training went on with the new texts: they are encoded, and the most frequent pair of tokens is
        merged, again and again. The new ids stand behind all old ones, special tokens too, so a model's
        embedding need only grow (vocabulary.py). Texts that the new merges occur in get other, fewer ids.
        texts: an iterable of str, read once. Raises UserError if they do not give so many merges.
        """
        pieces, vocab = Counter(), self.ordinary_vocab()
        cut, lists = (self.pattern, tuple(self.special_tokens)), batches(texts)
        if self.nfc:
            lists = ([unicodedata.normalize("NFC", text) for text in batch] for batch in lists)
        for counts in in_processes(count_pieces, cut, lists, workers):
            pieces.update(counts)
        place = {id: chr(i) for i, id in enumerate(vocab)}
        words = ["".join([place[id] for id in self._encode_piece(piece)]) for piece in pieces]
        merges = learn_further(words, list(pieces.values()), list(vocab.values()), new_tokens)
        if len(merges) < new_tokens:
            raise UserError(f"new_tokens {new_tokens} is more than these texts give: at most {len(merges)}; "
                            f"lower it, or add text")
        vocab |= {id: left + right for id, (left, right) in enumerate(merges, self.vocab_size)}
        _, _, *settings = self._settings()
        grown = Tokenizer(self.merges + merges, self.special_tokens, self.pattern, vocab, *settings)
        return grown.beside(self)

    def ordinary_vocab(self) -> dict[int, bytes]:
        """The vocabulary without the special tokens."""
        special_ids = set(self.special_tokens.values())
        return {id: token for id, token in self.vocab.items() if id not in special_ids}

    def __reduce__(self):  # what a process is sent: the tokenizer without its cache
        return Tokenizer, (self.merges, self.special_tokens, *self._settings())

    def _settings(self):
        return self.pattern, self.ordinary_vocab(), self.nfc, self.ignore_merges, self.shown, self.flags

    def save(self, path):
        """Write the tokenizer.json of Hugging Face tokenizers, whole or not at all.

        There, a special token spelled in a text always gets its special id, as with allow_special=True here.
        """
        content = files.to_hugging_face(self)
        with config.open_whole(path, "w") as file:
            json.dump(content, file, ensure_ascii=False, indent=1)

    @classmethod
    def load(cls, path):
        """The tokenizer in a tokenizer.json of byte-level BPE: GPT-2's, Llama 3's, SmolLM2's, Qwen's, ours.

        Raises Unsupported for other kinds, by name, and UserError for broken files. The file's template for
        what stands before and after a text is not read: `encode` adds nothing.
        """
        with reading(path, "a tokenizer.json"):
            return cls(**files.from_hugging_face(files.read_tokenizer_json(path)))

    @classmethod
    def from_gpt2(cls, vocab_json, merges_txt):
        """GPT-2's tokenizer from its two files. Tokens that no merge gives (<|endoftext|>) are special."""
        arguments = files.read_gpt2(vocab_json, merges_txt)
        with reading(vocab_json, "GPT-2's vocab.json"):
            return cls(**arguments)

    def to_gpt2(self, vocab_json, merges_txt):
        """Write GPT-2's two files. Raises UserError where they cannot hold this tokenizer."""
        files.write_gpt2(self, vocab_json, merges_txt)

    @classmethod
    def from_tiktoken(cls, path, special_tokens, pattern):
        """The tokenizer in a .tiktoken file, which holds tokens by rank; special_tokens, pattern: as above.

        tiktoken merges any two neighbours that together are a token, that of the lowest rank first, and takes
        a pre-token that is a token as it is. So the merges, which the file leaves out, come from encoding
        each token with those before it: two are left. Where it is otherwise, any two will do.
        """
        with reading(path, "a .tiktoken file"):
            vocab = files.read_ranks(path)
            if missing := [byte for byte in BYTES if byte not in vocab.values()]:
                raise Unsupported(f"it lacks {len(missing)} of the 256 bytes, {missing[0]!r} first")
            merges, whole = merges_of_ranks(vocab)
            return cls(merges, special_tokens, pattern, vocab, ignore_merges=whole)

    def to_tiktoken(self, path):
        """Write a .tiktoken file; it leaves out pattern and special tokens. Raises UserError where tiktoken
        would make other ids of it: it merges by id, whatever the order of the merges was.
        """
        vocab = self.ordinary_vocab()
        ids = {token: id for id, token in vocab.items()}
        made = [ids[left + right] for left, right in self.merges]
        merges, whole = merges_of_ranks(vocab)
        if self.nfc or made != sorted(made) or not set(merges) <= set(self.merges) or \
                whole and not self.ignore_merges:
            why = "it normalises text" if self.nfc else "its merges are not those that its ids imply"
            raise UserError(f"a .tiktoken file cannot hold this tokenizer: {why}; save it as tokenizer.json")
        files.write_ranks(vocab, path)


def merges_of_ranks(vocab: dict[int, bytes]) -> tuple[list[tuple[bytes, bytes]], bool]:
    """(the merges by which tokens are made of those before them; whether some are not made of just two, so
    that pre-tokens must be looked up whole). vocab: {rank: token}
    """
    ids = {token: id for id, token in vocab.items()}
    merges, ranks, results, whole = [], {}, [], False
    for id, token in sorted(vocab.items()):
        if len(token) > 1:
            parts = merge_ids([ids[bytes([value])] for value in token], ranks, results)
            pairs = [tuple(vocab[part] for part in parts)]
            if len(parts) != 2:
                whole, pairs = True, [(token[:i], token[i:]) for i in range(1, len(token))
                                      if token[:i] in ids and token[i:] in ids]
            for left, right in pairs:
                ranks[ids[left], ids[right]] = len(merges)
                results.append(id)
                merges.append((left, right))
    return merges, whole


def check_vocabulary(vocab, ids, merges):
    """Raise UserError unless vocab, {id: bytes} with the inverse ids, holds all bytes and merged tokens."""
    for id, token in vocab.items():
        if not isinstance(id, int) or id < 0:
            raise UserError(f"the id {id!r} of the token {token!r} is not a whole number from 0 on")
    if len(ids) < len(vocab):
        raise UserError(f"the token {files.most_frequent(vocab.values())!r} stands twice in the vocabulary")
    if missing := [byte for byte in BYTES if byte not in ids]:
        raise Unsupported(f"the vocabulary lacks {len(missing)} of the 256 bytes, {missing[0]!r} first, "
                          f"so some text has no ids")
    if len(set(merges)) < len(merges):
        raise UserError(f"the merge {files.most_frequent(merges)} stands twice")
    for left, right in merges:
        for token in (left, right, left + right):
            if token not in ids:
                raise UserError(f"the merge {(left, right)} needs the token {token!r}, which is not there")


def number_special_tokens(special_tokens, vocab, ids) -> dict[str, int]:
    """{text: id} by id: as given, or with the ids behind the vocabulary's. Raises UserError for bad ones."""
    if not isinstance(special_tokens, dict):
        texts = [special_tokens] if isinstance(special_tokens, str) else list(special_tokens)
        if len(set(texts)) < len(texts):
            raise UserError(f"the special token {files.most_frequent(texts)!r} stands twice")
        special_tokens = {text: id for id, text in enumerate(texts, max(vocab) + 1)}
    taken = dict(vocab)
    for text, id in special_tokens.items():
        if not text or checked_text(text) != text:
            raise UserError(f"the special token {text!r} is not a text of at least one character")
        if text.encode() in ids or files.from_alphabet(text) in ids:
            raise UserError(f"the special token {text!r} is an ordinary token too; try one like <|{text}|>")
        if id in taken:
            raise UserError(f"the id {id} of the special token {text!r} belongs to {taken[id]!r}")
        taken[id] = text
    return dict(sorted(special_tokens.items(), key=lambda item: item[1]))


# ------------------------------------------------------------------------------------------------------------
# What the processes of workers.py get: batches of texts, a function


def batches(texts: Iterable[str]) -> Iterator[list[str]]:
    """Lists of texts, together about a window of characters long."""
    if isinstance(texts, str):
        raise UserError("texts is one str; pass a list of them")
    batch, length = [], 0
    for text in texts:
        batch.append(checked_text(text))
        length += len(text)
        if length >= WINDOW:
            yield batch
            batch, length = [], 0
    yield batch


def encode_texts(tokenizer, texts) -> list[np.ndarray]:
    return tokenizer._encode_texts(texts)


# ------------------------------------------------------------------------------------------------------------
# The command line


@dataclass
class Settings:
    input: tuple[str, ...] = ()  # text files to learn from; none: the Python standard library's source
    vocab_size: int = 4096  # bytes, merges and special tokens together
    pattern: str = "llama3"  # where text is cut: gpt2, cl100k, o200k, llama3, qwen, or a regular expression
    special_tokens: tuple[str, ...] = ("<|endoftext|>",)  # texts that only a program can insert
    out: str = "tokenizer.json"  # the file to write
    overwrite: bool = False  # replace `out` if it is there
    workers: int | None = None  # processes that cut and count; none: one a core

    def __post_init__(self):
        config.require(self, workers=(1, None))


def library_files() -> list[Path]:
    """The source of Python's standard library."""
    library = Path(sysconfig.get_path("stdlib"))
    return [path for path in sorted(library.rglob("*.py")) if "site-packages" not in path.parts]


def main():
    if sys.argv[1:2] == ["compare"]:  # what follows stands on this file, and is here only to be found
        import compare
        return compare.main(sys.argv[2:])
    if sys.argv[1:2] == ["extend"]:
        import vocabulary
        return vocabulary.main(sys.argv[2:])
    settings = config.parse(Settings)
    if Path(settings.out).exists() and not settings.overwrite:
        raise UserError(f"{settings.out} exists; pass --overwrite to replace it, or another --out")
    paths = list(map(Path, settings.input)) or library_files()
    progress = tqdm(paths, "read", unit=" files", delay=1, disable=None)
    texts = (path.read_text(encoding="utf-8", errors="replace") for path in progress)
    start = time.perf_counter()
    tokenizer = Tokenizer.train(texts, settings.vocab_size, settings.special_tokens, settings.pattern,
                                settings.workers)
    seconds = time.perf_counter() - start
    tokenizer.save(settings.out)
    print(f"{settings.out}: {tokenizer.vocab_size:,} tokens from {len(paths):,} files, in {seconds:.1f} s")


if __name__ == "__main__":
    config.run(main)
