"""Byte-level BPE: text becomes tokens, and tokens become exactly the same text again.

    python bpe.py --vocab_size 4096 --out tokenizer.json        # learns from the standard library's source, 30 MB
    python bpe.py --input my_texts/*.txt --vocab_size 32768 --out tokenizer.json

    text -> pre-tokens (words, numbers, punctuation) -> bytes of each -> merged, in the order in which merges were learned

Byte-pair encoding starts from single symbols and joins, again and again, the most frequent neighbours (Gage 1994; for
translation, Sennrich et al. 2016, https://arxiv.org/abs/1508.07909). GPT-2 (Radford et al. 2019) made the symbols bytes:
256 of them spell any text, so no text is unknown and nothing is normalised away. `train_plain` is the whole idea in twenty
lines; `Tokenizer.train` learns the same merges, as fast as plain Python goes; the tests hold them equal.

Files are the `tokenizer.json` of Hugging Face tokenizers, which gives the same ids for them.

    >>> tokenizer = Tokenizer.train(["low lower lowest"], vocab_size=256 + 3)
    >>> tokenizer.merges
    [(b'o', b'w'), (b'l', b'ow'), (b' ', b'low')]
    >>> tokenizer.encode("lowest")
    [257, 101, 115, 116]
"""
import base64
import codecs
import functools
import hashlib
import heapq
import json
import os
import signal
import sys
import sysconfig
import time
from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import chain, islice, pairwise
from pathlib import Path

import numpy as np
import regex
from tqdm import tqdm

import config
from config import UserError

# Where text may be cut, first match first. No merge crosses a cut: else "dog." and "dog!" would cost a token each.
PATTERN = "|".join([
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)",  # English endings
    r"[^\r\n\p{L}\p{N}]?\p{L}+",      # a word, with the one space or sign before it
    r"\p{N}{1,3}",                    # digits in groups of one to three, from the left
    r" ?[^\s\p{L}\p{N}]+[\r\n]*",     # signs, with the space before and the ends of lines behind
    r"\s*[\r\n]+",                    # empty lines and ends of lines
    r"\s+(?!\S)",                     # spaces, but for the last one, which goes with the word behind
    r"\s+",
])
GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
BYTES = [bytes([value]) for value in range(256)]


# ---------------------------------------------------------------------------------------------------------------------
# The lesson: count the pairs, merge the most frequent, count again


def train_plain(texts, vocab_size, special_tokens=(), pattern=PATTERN) -> list[tuple[bytes, bytes]]:
    """The merges, in order of creation. Slow and simple: what Tokenizer.train must equal.

    Of equally frequent pairs the greatest (bytes, bytes) tuple is merged first, so the order of the texts does not matter.
    In "aaa" the pair (a, a) counts twice, although only one of the two can be merged.
    """
    words = [[BYTES[value] for value in piece.encode()]
             for piece, count in count_pieces((pattern, tuple(special_tokens)), texts).items() for _ in range(count)]
    merges = []
    while len(merges) < vocab_size - 256 - len(special_tokens):
        counts = Counter(pair for word in words for pair in pairwise(word))
        if not counts:
            raise too_large(vocab_size, len(merges), special_tokens)
        best = max(counts, key=lambda pair: (counts[pair], pair))
        merges.append(best)
        words = [merge(word, best) for word in words]
    return merges


def merge(word, pair) -> list[bytes]:
    """The word with each occurrence of the pair joined, from left to right: aaa becomes aa a.

    >>> merge([b"a", b"a", b"a", b"b"], (b"a", b"a"))
    [b'aa', b'a', b'b']
    """
    merged, i = [], 0
    while i < len(word):
        if tuple(word[i:i + 2]) == pair:
            merged.append(word[i] + word[i + 1])
            i += 2
        else:
            merged.append(word[i])
            i += 1
    return merged


# ---------------------------------------------------------------------------------------------------------------------
# The same merges, much sooner: a text has few different words, and a merge changes few of them


def learn_merges(pieces: dict[str, int], number: int) -> list[tuple[bytes, bytes]]:
    """The first `number` merges of pre-tokens that occur so many times; fewer where no pair is left.

    A word is a str whose characters are token ids: chr(97) the byte "a", chr(256) the first merge. So Python's own
    split() and join() merge, in C, and the parts between show which neighbours have changed.
    """
    words = [piece.encode().decode("latin-1") for piece in pieces]  # latin-1: byte n becomes character n
    word_counts = list(pieces.values())
    tokens, merges = list(BYTES), []
    counts, where = defaultdict(int), defaultdict(list)  # of a pair: its occurrences; the indices of words that may hold it
    for index, word in enumerate(words):
        for pair in map(str.__add__, word, word[1:]):
            counts[pair] += word_counts[index]
            where[pair].append(index)

    # Most frequent first, then greatest first. heapq puts the smallest first, so counts and bytes are turned round: byte b
    # becomes character 255 - b, and an end mark greater than any byte puts the longer of "a" and "ab" in front.
    order = [chr(255 - value) + END for value in range(256)]
    heap = [(-count, order[ord(pair[0])], order[ord(pair[1])], pair) for pair, count in counts.items()]
    heapq.heapify(heap)
    with tqdm(total=number, desc="learn merges", unit=" merges", delay=1, disable=None) as bar:
        while heap and len(merges) < number:
            negative, *tie, pair = heapq.heappop(heap)
            if counts[pair] != -negative:  # other merges have taken some since it was pushed: put it where it belongs now
                if counts[pair] > 0:
                    heapq.heappush(heap, (-counts[pair], *tie, pair))
                continue
            left, right = ord(pair[0]), ord(pair[1])
            merges.append((tokens[left], tokens[right]))
            born = merge_words(words, word_counts, counts, where, pair, chr(len(tokens)))
            tokens.append(tokens[left] + tokens[right])
            order.append(order[left][:-1] + order[right])
            for pair, count in born.items():
                heapq.heappush(heap, (-count, order[ord(pair[0])], order[ord(pair[1])], pair))
            counts.update(born)
            bar.update()
    return merges


END = chr(256)


def merge_words(words, word_counts, counts, where, pair, new) -> dict[str, int]:
    """Merge the pair into the token `new` wherever it stands; the new pairs that arise and how often they occur.

    words, counts and where are brought up to date, but for the new pairs' counts.
    """
    a, b = pair
    born = defaultdict(int)
    for index in where.pop(pair):
        before, *behind = words[index].split(pair)
        if not behind:  # an earlier merge has taken it, or the word stood in the list twice
            continue
        count = word_counts[index]
        words[index] = new.join((before, *behind))
        for i, after in enumerate(behind):  # … before a b after …  ->  … before new after …
            if before or i:
                old, now = (before[-1], before[-1]) if before else (b, new)  # no before: a b a b -> new new
                counts[old + a] -= count
                born[now + new] += count
                where[now + new].append(index)
            if after:
                counts[b + after[0]] -= count
                born[new + after[0]] += count
                where[new + after[0]].append(index)
            before = after
    counts[pair] = 0
    return born


def too_large(vocab_size, merges, special_tokens):
    return UserError(f"vocab_size {vocab_size} is more than this text gives: at most {256 + merges + len(special_tokens)} "
                     f"(256 bytes, {merges} merges, {len(special_tokens)} special tokens); lower it, or train on more text")


# ---------------------------------------------------------------------------------------------------------------------
# Splitting text into pre-tokens


WINDOW = 1 << 20  # characters that are split, or sent to a process, at a time
HELD_BACK = 8     # pre-tokens at the end of a window that the text to come may still change


@functools.lru_cache(maxsize=64)
def compile_pattern(pattern):
    """The compiled pattern. Text it does not match becomes a pre-token too, as in `tokenizers`, so that none is lost."""
    try:
        groups = regex.compile(pattern).groups
        compiled = regex.compile(rf"{pattern}|(?s:.)+?(?=(?:{pattern})|\Z)")
    except regex.error as error:
        raise UserError(f"the split pattern {pattern!r} does not compile: {error}") from None
    if groups:
        raise UserError(f"the split pattern {pattern!r} has a group that captures; write (?:…) instead of (…)")
    return compiled


def split_stream(chunks: Iterable[str], pattern: str, window=WINDOW) -> Iterator[list[str]]:
    """Lists of the pre-tokens of a text that comes in chunks: those of the whole text, wherever it is cut.

    The last HELD_BACK pre-tokens wait for more text, which may lengthen them. That is enough for a pattern that, like all
    in use, looks no further ahead than to the end of a run of spaces and ends of lines. Memory: a window and the longest pre-token.
    """
    findall = compile_pattern(pattern).findall
    waiting, length, enough = [], 0, window
    for chunk in chunks:
        if not isinstance(chunk, str):
            raise UserError(f"text must be str, not {type(chunk).__name__}; bytes are decoded first, as in data.decode()")
        waiting.append(without_surrogates(chunk))
        length += len(chunk)
        if length >= enough:
            pieces = findall("".join(waiting))
            yield pieces[:-HELD_BACK]
            waiting = ["".join(pieces[-HELD_BACK:])]
            length = len(waiting[0])
            enough = max(window, 2 * length)  # twice: a pre-token of a million characters is not split a million times
    yield findall("".join(waiting))


def split(text: str, pattern: str) -> Iterator[list[str]]:
    """Lists of the pre-tokens of a text, a window at a time, as a list of all would take 20 times the text's memory."""
    if len(text) <= WINDOW:
        return split_stream([text], pattern)
    return split_stream((text[i:i + WINDOW] for i in range(0, len(text), WINDOW)), pattern)


def without_surrogates(text: str) -> str:
    """The text with U+FFFD for lone surrogates, halves of characters that no encoding can write (broken JSON has them)."""
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        return regex.sub("[\ud800-\udfff]", "\ufffd", text)


def special_pattern(special_tokens):
    """Matches special tokens, of two that begin at one place the longer; matches nothing if there are none."""
    longest_first = sorted(special_tokens, key=len, reverse=True)
    return regex.compile("|".join(map(regex.escape, longest_first)) or r"(?!)")


def count_pieces(settings, texts) -> Counter:
    """How often each pre-token occurs in the texts, special tokens taken out. settings: (pattern, special_tokens)."""
    pattern, special_tokens = settings
    special, counts = special_pattern(special_tokens), Counter()
    for text in texts:
        for part in special.split(text) if special_tokens else [text]:
            for pieces in split(part, pattern):
                counts.update(pieces)
    if "" in counts:
        raise matches_empty(pattern)
    return counts


def matches_empty(pattern):
    return UserError(f"the split pattern {pattern!r} matches the empty text, which would lose characters; use + for *")


# ---------------------------------------------------------------------------------------------------------------------
# Encoding: of all merges that can be made, always make the one that was learned first


def merge_ids(ids: list[int], ranks: dict, results: list[int]) -> list[int]:
    """The ids with all merges made. ranks: (id, id) -> rank of the merge; results: rank -> id it gives.

    Quadratic in the length, yet the fastest for words, as min() and index() run in C.
    """
    never = len(results)
    here = [ranks.get(pair, never) for pair in pairwise(ids)]  # here[i]: rank of the merge of ids[i] and ids[i + 1]
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
    """Equals merge_ids in n log n steps: the merges wait in a heap, the ids stand in a linked list."""
    ids = [*ids, None]  # None: an end, or an id that was merged into the one before it; no pair with it has a rank
    left, right = list(range(-1, len(ids) - 1)), [*range(1, len(ids)), len(ids) - 1]
    heap = [(ranks[pair], i) for i, pair in enumerate(pairwise(ids)) if pair in ranks]
    heapq.heapify(heap)
    while heap:
        rank, i = heapq.heappop(heap)
        j = right[i]
        if ranks.get((ids[i], ids[j])) != rank:  # one of the two has been merged since
            continue
        ids[i], ids[j], right[i] = results[rank], None, right[j]
        left[right[j]] = i
        for k in (left[i], i):
            if (pair := (ids[k], ids[right[k]])) in ranks:
                heapq.heappush(heap, (ranks[pair], k))
    return [token for token in ids if token is not None]


LONG = 256  # bytes of a pre-token from which merge_long is faster


class PieceCache(dict):
    """pre-token -> its ids, made when first asked for. A dict, as text is mostly made of words seen before."""
    SIZE = 1 << 18  # pre-tokens, about 60 MB
    LONGEST = 128   # characters; longer ones hardly come again

    def __init__(self, encode_piece):
        self.encode_piece = encode_piece

    def __missing__(self, piece):
        ids = self.encode_piece(piece)
        if len(piece) <= self.LONGEST:
            if len(self) >= self.SIZE:
                self.clear()  # the frequent ones are back at once
            self[piece] = ids
        return ids


class Tokenizer:
    """Text to ids and back. Ids: the 256 bytes, the merges in order of creation, the special tokens.

    merges: list of (bytes, bytes), in order of creation. special_tokens: texts, which get the ids after the merges, or
    {text: id}. pattern: a regular expression (of the `regex` package) whose matches are the pre-tokens.
    vocab: {id: bytes} of the bytes and merges, for tokenizers that number them otherwise, as GPT-2's.
    Raises UserError for a merge of unknown tokens, an id or token that stands twice, an empty or repeated special token.

    .merges, .pattern as given; .special_tokens: dict text -> id; .vocab: dict id -> bytes, special tokens included.
    """

    def __init__(self, merges, special_tokens=(), pattern=PATTERN, vocab=None):
        self.merges = [(bytes(left), bytes(right)) for left, right in merges]
        self.pattern = pattern
        compile_pattern(pattern)
        if vocab is None:
            vocab = dict(enumerate(BYTES + [left + right for left, right in self.merges]))
        ids = {token: id for id, token in vocab.items()}
        check_vocabulary(vocab, ids, self.merges)
        self.special_tokens = number_special_tokens(special_tokens, vocab, ids)
        self.vocab = dict(sorted({**vocab, **{id: text.encode() for text, id in self.special_tokens.items()}}.items()))
        self._byte_ids = [ids[byte] for byte in BYTES]
        self._ranks = {(ids[left], ids[right]): rank for rank, (left, right) in enumerate(self.merges)}
        self._results = [ids[left + right] for left, right in self.merges]
        self._special = special_pattern(self.special_tokens)
        self._cache = PieceCache(self._encode_piece)

    @classmethod
    def train(cls, texts, vocab_size, special_tokens=(), pattern=PATTERN, workers=None):
        """A tokenizer of vocab_size tokens, special ones included, learned from texts: any iterable of str, read once.

        Equals train_plain for any order of the texts and any number of workers (processes; default: one a core).
        Memory grows with the different pre-tokens, not with the text. Raises UserError if vocab_size is too small to
        hold the bytes and special tokens, or larger than the text can give.
        """
        special_tokens = tuple(special_tokens)
        number = vocab_size - 256 - len(special_tokens)
        if number < 0:
            raise UserError(f"vocab_size {vocab_size} is too small; 256 bytes and {len(special_tokens)} special tokens "
                            f"need at least {256 + len(special_tokens)}")
        cls((), special_tokens, pattern)  # a mistake in these is told now, not after the work
        pieces = Counter()
        for counts in in_processes(count_pieces, (pattern, special_tokens), batches(texts), workers):
            pieces.update(counts)
        merges = learn_merges(pieces, number)
        if len(merges) < number:
            raise too_large(vocab_size, len(merges), special_tokens)
        return cls(merges, special_tokens, pattern)

    @property
    def vocab_size(self) -> int:
        """One more than the largest id: the rows that a model's embedding needs."""
        return max(self.vocab) + 1

    @property
    def dtype(self):
        """The smallest numpy type that holds every id: uint16 for up to 65,536 tokens, else uint32."""
        return np.dtype(np.uint16 if self.vocab_size <= 1 << 16 else np.uint32)

    def encode(self, text: str, allow_special=False) -> list[int]:
        """The ids of a text. A special token spelled in it stays ordinary text unless allow_special is true.

        Lone surrogates, which are no text, become U+FFFD; any other str comes back from decode as it was.
        """
        if not allow_special or not self.special_tokens:
            return [id for pieces in split(text, self.pattern) for id in self._ids(pieces)]
        ids, end = [], 0
        for match in self._special.finditer(text):
            ids += self.encode(text[end:match.start()])
            ids.append(self.special_tokens[match.group()])
            end = match.end()
        return ids + self.encode(text[end:])

    def encode_batch(self, texts, workers=None) -> list[np.ndarray]:
        """The ids of each text, as arrays of self.dtype, encoded in processes (default: one a core)."""
        with tqdm(desc="encode", unit="B", unit_scale=True, delay=1, disable=None) as bar:
            arrays = []
            for encoded, size in in_processes(encode_texts, self, batches(texts), workers):
                arrays += encoded
                bar.update(size)
            return arrays

    def encode_stream(self, chunks: Iterable[str]) -> Iterator[int]:
        """The ids of a text that comes in chunks: those of encode("".join(chunks)), in the memory of a window of it."""
        for pieces in split_stream(chunks, self.pattern):
            yield from self._ids(pieces)

    def decode_bytes(self, ids) -> bytes:
        """The bytes that the ids stand for; special tokens give their text. ids: iterable, array or tensor of int."""
        ids = ids.tolist() if hasattr(ids, "tolist") else list(ids)
        try:
            return b"".join([self.vocab[id] for id in ids])
        except KeyError as error:
            raise UserError(f"id {error} is not in the vocabulary of {self.vocab_size} tokens") from None

    def decode(self, ids) -> str:
        """The text that the ids stand for; bytes that are not UTF-8 (half a character) become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_stream(self, ids: Iterable[int]) -> Iterator[str]:
        """Pieces of text as the ids come in, together decode(ids). Half a character waits for its other half."""
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        for id in ids:
            if text := decoder.decode(self.decode_bytes([int(id)])):
                yield text
        if text := decoder.decode(b"", final=True):
            yield text

    def _ids(self, pieces: list[str]) -> Iterator[int]:
        return chain.from_iterable(map(self._cache.__getitem__, pieces))

    def _encode_piece(self, piece: str) -> list[int]:
        if not piece:
            raise matches_empty(self.pattern)
        ids = [self._byte_ids[value] for value in piece.encode()]
        return (merge_ids if len(ids) < LONG else merge_long)(ids, self._ranks, self._results)

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 of all that decides ids: pattern, merges, vocabulary, special tokens. Equal for equal tokenizers."""
        content = [self.pattern, [[left.hex(), right.hex()] for left, right in self.merges],
                   [[id, token.hex()] for id, token in self.vocab.items()], sorted(self.special_tokens.items())]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def __reduce__(self):  # to a process goes what the tokenizer is, not what it has cached
        ordinary = {id: token for id, token in self.vocab.items() if id not in self.special_tokens.values()}
        return Tokenizer, (self.merges, self.special_tokens, self.pattern, ordinary)

    def save(self, path):
        """Write tokenizer.json of Hugging Face tokenizers, whole or not at all."""
        with config.open_whole(path, "w") as file:
            json.dump(to_hugging_face(self), file, ensure_ascii=False, indent=1)

    @classmethod
    def load(cls, path):
        """The tokenizer in a tokenizer.json that holds byte-level BPE. Raises UserError for any other kind, by name."""
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            return cls(**from_hugging_face(content))
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise UserError(f"{path} is not a tokenizer.json: {type(error).__name__} {error}") from None

    @classmethod
    def from_gpt2(cls, vocab_json, merges_txt):
        """GPT-2's tokenizer from its two files. Tokens that no merge gives (<|endoftext|>) are the special ones."""
        numbers = json.loads(Path(vocab_json).read_text(encoding="utf-8"))
        lines = Path(merges_txt).read_text(encoding="utf-8").split("\n")
        merges = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
        ordinary = {*VISIBLE.values(), *(left + right for left, right in merges)}
        special_tokens = {token: id for token, id in numbers.items() if token not in ordinary}
        return cls(*from_visible(numbers, merges, special_tokens), GPT2_PATTERN)

    @classmethod
    def from_tiktoken(cls, path, special_tokens, pattern):
        """The tokenizer in a .tiktoken file: a line a token, its bytes in base64 and its rank, which is its id too.

        The merges, which the file leaves out, come from encoding each token with those learned before it: two ids remain.
        """
        lines = Path(path).read_bytes().splitlines()
        vocab = {int(rank): base64.b64decode(token) for token, rank in (line.split() for line in lines if line)}
        ids = {token: id for id, token in vocab.items()}
        merges, ranks, results = [], {}, []
        for id, token in sorted(vocab.items()):
            if len(token) > 1:
                pair = merge_ids([ids[bytes([value])] for value in token], ranks, results)
                if len(pair) != 2:
                    raise UserError(f"{path}: token {id} {token!r} is not made of two tokens before it; is this BPE?")
                ranks[tuple(pair)] = len(merges)
                merges.append((vocab[pair[0]], vocab[pair[1]]))
                results.append(id)
        return cls(merges, special_tokens, pattern, vocab)


def check_vocabulary(vocab, ids, merges):
    """Raise UserError where the vocabulary ({id: bytes} and its inverse) does not hold what the merges need."""
    if len(ids) < len(vocab):
        twice = next(token for token, count in Counter(vocab.values()).items() if count > 1)
        raise UserError(f"the token {twice!r} stands twice in the vocabulary; two merges may not give the same bytes")
    if missing := [byte for byte in BYTES if byte not in ids]:
        raise UserError(f"{len(missing)} of the 256 bytes are not in the vocabulary, {missing[0]!r} first: "
                        f"not every text could be encoded")
    if len(set(merges)) < len(merges):
        raise UserError(f"the merge {Counter(merges).most_common(1)[0][0]} stands twice")
    for rank, (left, right) in enumerate(merges):
        for token in (left, right, left + right):
            if token not in ids:
                raise UserError(f"merge {rank} ({left!r}, {right!r}) needs the token {token!r}, which is not there")


def number_special_tokens(special_tokens, vocab, ids) -> dict[str, int]:
    """{text: id}, in order of ids: those given, or the ids after the vocabulary's. Raises UserError for bad ones."""
    if isinstance(special_tokens, str):
        raise UserError(f"special_tokens is one str; pass a list: [{special_tokens!r}]")
    if not isinstance(special_tokens, dict):
        special_tokens = list(special_tokens)
        if len(set(special_tokens)) < len(special_tokens):
            raise UserError(f"the special token {Counter(special_tokens).most_common(1)[0][0]!r} stands twice")
        special_tokens = {text: max(vocab) + 1 + i for i, text in enumerate(special_tokens)}
    taken = dict(vocab)
    for text, id in special_tokens.items():
        if not isinstance(text, str) or not text or text != without_surrogates(text):
            raise UserError(f"the special token {text!r} is not a text of at least one character")
        if id in taken:
            raise UserError(f"id {id} of the special token {text!r} is taken by {taken[id]!r}")
        if text.encode() in ids or from_visible_token(text) in ids:
            raise UserError(f"the special token {text!r} is an ordinary token too; choose a text such as <|{text}|>")
        taken[id] = text
    return dict(sorted(special_tokens.items(), key=lambda item: item[1]))


# ---------------------------------------------------------------------------------------------------------------------
# The files of Hugging Face tokenizers. They write bytes as visible characters (GPT-2's alphabet): Ġ is the space


def visible_bytes() -> dict[int, str]:
    """byte -> the character that stands for it: itself where it can be seen, else the next of those from U+0100 on."""
    seen = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    hidden = [value for value in range(256) if value not in seen]
    return {value: chr(value) if value in seen else chr(256 + hidden.index(value)) for value in range(256)}


VISIBLE = visible_bytes()
HIDDEN = {ord(character): value for value, character in VISIBLE.items()}


def visible(token: bytes) -> str:
    return token.decode("latin-1").translate(VISIBLE)


def from_visible_token(text: str) -> bytes | None:
    """The bytes of a token in a file; None where it is not in the alphabet."""
    return bytes(map(HIDDEN.get, map(ord, text))) if all(ord(character) in HIDDEN for character in text) else None


def from_visible(numbers: dict[str, int], merges, special_tokens: dict[str, int]) -> dict:
    """The arguments of Tokenizer, from visible tokens with their ids, and merges of visible tokens."""
    vocab = {}
    for text, id in numbers.items():
        if text in special_tokens:
            continue
        if (token := from_visible_token(text)) is None:
            raise UserError(f"the token {text!r} is not of byte-level BPE")
        if id in vocab:
            raise UserError(f"id {id} stands twice, for {visible(vocab[id])!r} and {text!r}")
        vocab[id] = token
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in merges]  # newer files have pairs
    for merge in merges:
        if len(merge) != 2 or None in map(from_visible_token, merge):
            raise UserError(f"the merge {merge} is not of two tokens of byte-level BPE")
    return {"merges": [tuple(map(from_visible_token, merge)) for merge in merges],
            "special_tokens": special_tokens, "vocab": vocab}


def to_hugging_face(tokenizer) -> dict:
    """The content of tokenizer.json."""
    special_ids = set(tokenizer.special_tokens.values())
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [{"id": id, "content": text, "single_word": False, "lstrip": False, "rstrip": False,
                          "normalized": False, "special": True} for text, id in tokenizer.special_tokens.items()],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": tokenizer.pattern}, "behavior": "Isolated", "invert": False},
            byte_level]},
        "post_processor": None, "decoder": byte_level,
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
                  "vocab": {visible(token): id for id, token in tokenizer.vocab.items() if id not in special_ids},
                  "merges": [[visible(left), visible(right)] for left, right in tokenizer.merges]},
    }


def from_hugging_face(content) -> dict:
    """The arguments of Tokenizer. Raises UserError for what would give other ids here: it is named."""
    model, added = content["model"], content.get("added_tokens") or []
    kind = model.get("type", "BPE")
    if kind != "BPE":
        raise UserError(f"its model is {kind}; only byte-level BPE is read")
    for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback", "ignore_merges"):
        if model.get(name):
            raise UserError(f"its model has {name} {model[name]!r}, which is not supported")
    if content.get("normalizer"):
        raise UserError(f"its normalizer {content['normalizer']['type']} changes text, which is not supported")
    for token in added:
        if flags := [flag for flag in ("single_word", "lstrip", "rstrip") if token.get(flag)]:
            raise UserError(f"its added token {token['content']!r} has {flags[0]}, which is not supported")
    special_tokens = {token["content"]: token["id"] for token in added}
    if len(special_tokens) < len(added):
        raise UserError("a text stands twice among its added tokens")
    return {**from_visible(model["vocab"], model["merges"], special_tokens),
            "pattern": pattern_of(content.get("pre_tokenizer") or {"type": "none"})}


def pattern_of(pre_tokenizer) -> str:
    """The split pattern: that of Split before ByteLevel, or GPT-2's, which ByteLevel alone brings along."""
    steps = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    kinds = [step["type"] for step in steps]
    byte_level = steps[-1]
    if kinds[-1] == "ByteLevel" and not byte_level.get("add_prefix_space"):
        if kinds == ["ByteLevel"] and byte_level.get("use_regex", True):
            return GPT2_PATTERN
        if kinds == ["Split", "ByteLevel"] and not byte_level.get("use_regex", True):
            split = steps[0]
            if split["behavior"] == "Isolated" and not split["invert"] and "Regex" in split["pattern"]:
                return split["pattern"]["Regex"]
    raise UserError(f"its pre_tokenizer {' + '.join(kinds)} is not supported; byte-level BPE has Split + ByteLevel")


# ---------------------------------------------------------------------------------------------------------------------
# Processes


def batches(texts: Iterable[str]) -> Iterator[list[str]]:
    """Lists of texts of about a million characters together."""
    if isinstance(texts, str):
        raise UserError("texts is one str; pass a list of str")
    batch, length = [], 0
    for text in texts:
        if not isinstance(text, str):
            raise UserError(f"each text must be str, not {type(text).__name__}")
        batch.append(text)
        length += len(text)
        if length >= WINDOW:
            yield batch
            batch, length = [], 0
    if batch:
        yield batch


def encode_texts(tokenizer, texts) -> tuple[list[np.ndarray], int]:
    """The ids of each text, and the length of the texts in bytes."""
    arrays = [np.array(tokenizer.encode(text), tokenizer.dtype) for text in texts]
    return arrays, sum(len(text.encode(errors="replace")) for text in texts)


def in_processes(function, context, batches, workers) -> Iterator:
    """Yield function(context, batch) for each batch, in their order, from `workers` processes (default: one a core).

    A single batch is done here: starting processes would take longer. At most two batches a process wait, so that
    endless input does not fill the memory (multiprocessing's imap would read ahead).
    """
    workers = workers or cores()
    if workers < 1:
        raise UserError(f"workers {workers} is out of range; it must be at least 1")
    first = list(islice(batches, 2))
    batches = chain(first, batches)
    if len(first) < 2 or workers == 1:
        yield from (function(context, batch) for batch in batches)
        return
    with ProcessPoolExecutor(workers, initializer=start_worker, initargs=(function, context)) as pool:
        waiting = deque()
        for batch in batches:
            waiting.append(pool.submit(run_in_worker, batch))
            if len(waiting) > 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def start_worker(function, context):
    """In a new process: keep what every batch needs. The context is sent once, and its cache lives as long as the process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer, in one line
    run_in_worker.job = functools.partial(function, context)


def run_in_worker(batch):
    return run_in_worker.job(batch)


def cores() -> int:
    """The cores that this process may use: in a container or a job of a cluster fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# ---------------------------------------------------------------------------------------------------------------------
# The command line


@dataclass
class Settings:
    input: tuple[str, ...] = ()  # text files to learn from; none: the Python standard library's source
    vocab_size: int = 4096  # bytes, merges and special tokens together
    special_tokens: tuple[str, ...] = ("<|endoftext|>",)
    out: str = "tokenizer.json"
    overwrite: bool = False  # replace `out` if it is there
    workers: int | None = None  # processes that split and count; none: one a core

    def __post_init__(self):
        config.require(self, vocab_size=(256, sys.maxunicode), workers=(1, None))


def main():
    settings = config.parse(Settings)
    if Path(settings.out).exists() and not settings.overwrite:
        raise UserError(f"{settings.out} exists; pass --overwrite to replace it, or another --out")
    library = Path(sysconfig.get_path("stdlib"))
    paths = list(map(Path, settings.input)) or [path for path in sorted(library.rglob("*.py"))
                                                if "site-packages" not in path.parts]
    texts = (path.read_text(encoding="utf-8", errors="replace") for path in tqdm(paths, "read", unit=" files", delay=1))
    start = time.perf_counter()
    tokenizer = Tokenizer.train(texts, settings.vocab_size, settings.special_tokens, workers=settings.workers)
    seconds = time.perf_counter() - start
    tokenizer.save(settings.out)
    longest = sorted(tokenizer.vocab.values(), key=len)[-5:]
    print(f"{settings.out}: {tokenizer.vocab_size:,} tokens from {len(paths):,} files in {seconds:.1f} s; the longest: "
          f"{' '.join(repr(token.decode(errors='replace')) for token in longest)}")


if __name__ == "__main__":
    config.run(main)
