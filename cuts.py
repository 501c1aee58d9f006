"""Where text is cut into pre-tokens, seen for a million characters at once; and a number for each piece.

A split pattern looks at one character after another. But whether text is cut in front of a character can
nearly always be told from what kind of character it is, and what kinds its neighbours are: between a letter
and a space it is, between two letters it is not. So numpy looks up all cuts at once. Where three characters
do not suffice (within a long number, between a sign and letters), the text is left uncut. What lies between
two cuts is a segment: a pre-token in nearly all cases, and a few in the others. The pattern then has to look
at each different segment once.

    "It isn't 12345!"  ->  "It" " isn" "'t" " " "12345" "!"  ->  numbers 0 1 2 3 4 5  ->  "12345" is 123 45

For a rule to be right, each of its cuts must be one that the pattern makes whatever stands elsewhere; and the
pattern must make the same of the text before the cut if it sees nothing behind. tests/test_cuts.py tries all
short texts of characters that patterns tell apart.
"""
import functools
from collections import Counter

import numpy as np
import regex

# Kinds of characters: letter, number, mark, apostrophe, other sign, blank, newline; and "." beyond the text
KINDS = ".LNM'S_n"
KIND = regex.compile(r"(?P<n>[\r\n])|(?P<_>\s)|(?P<L>\p{L})|(?P<N>\p{N})|(?P<M>\p{M})|(?P<A>')")
VISIBLE, ANY = "LNM'S", KINDS

# Text is cut between a character of the first kinds and one of the second, if one of the third comes next
CL100K = (
    (VISIBLE, "_", ANY),  # a blank goes with what is behind it
    ("L", "NM'Sn", ANY), ("N", "LM'Sn", ANY), ("M'S", "N", ANY),  # but a sign may go with letters behind it
    ("n", VISIBLE, ANY),
)
LLAMA3 = (*CL100K,  # that has \s++$ besides, which takes all blanks in a row if it is shown nothing more
          ("_n", "_", VISIBLE),  # of several blanks the last, which goes with the word behind
          ("_", "N", ANY))       # but not with a number
QWEN = (*LLAMA3, ("N", "N", ANY))
GPT2 = ((VISIBLE, "_n", ANY), ("L", "NM'S", ANY), ("N", "LM'S", ANY), ("M'S", "N", ANY), ("MS", "L", ANY),
        ("_n", "_n", VISIBLE), ("n", VISIBLE, ANY))
DIGITS = (*GPT2[:-2], ("N", "N", ANY), ("_n", "_n", "LM'S"), ("_n", "N", ANY), ("n", "LM'S", ANY))
O200K = ((VISIBLE, "_", ANY), ("L", "NSn", ANY), ("N", "LM'Sn", ANY), ("M'S", "N", ANY), ("n", "LN", ANY),
         ("_n", "_", VISIBLE), ("_", "N", ANY))


BEYOND = b"\xff" * 8  # stands behind all bytes, so that eight can be read from each on


def table_of(rule) -> bytes:
    """[8 first + second]: bit n is set if text is cut between two such kinds when kind n comes next."""
    table = np.zeros((8, 8, 8), bool)
    for kinds in rule:
        table[np.ix_(*([KINDS.index(kind) for kind in some] for some in kinds))] = True
    return np.packbits(table, axis=-1, bitorder="little").tobytes().ljust(256, b"\0")


BITS = bytes([1 << kind for kind in range(8)]).ljust(256, b"\0")


def looked_up(numbers: np.ndarray, table: bytes) -> np.ndarray:
    """table[numbers], by the fastest means for bytes."""
    return np.frombuffer(numbers.tobytes().translate(table), np.uint8)


class Kinds:
    """The kinds of a text's characters, as numbers; each character is looked at when it first comes."""
    UNKNOWN = 255

    def __init__(self):
        self.table = np.full(0x110000, self.UNKNOWN, np.uint8)
        self.learn(range(256))
        self.of_bytes = self.table[:256].tobytes()

    def learn(self, codes):
        for code in codes:
            match = KIND.match(chr(code))
            kind = match.lastgroup.replace("A", "'") if match else "S"
            self.table[code] = KINDS.index(kind)

    def __call__(self, text: str) -> np.ndarray:
        if text.isascii():
            return looked_up(np.frombuffer(text.encode(), np.uint8), self.of_bytes)
        codes = np.frombuffer(text.encode("utf-32-le"), "<u4")
        kinds = self.table[codes]
        if len(unknown := codes[kinds == self.UNKNOWN]):
            self.learn(np.unique(unknown).tolist())
            kinds = self.table[codes]
        return kinds


kinds_of = functools.cache(Kinds)


def cut(texts: list[str], table: bytes) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(bytes, bounds, first): all texts in UTF-8, with BEYOND behind; where each segment begins, and the last
    one ends; and which is each text's first segment, and how many there are.

    Texts without lone surrogates. No segment is part of two texts; the last one may become longer with
    text behind it, all others stay.
    """
    text = "".join(texts)
    ends = np.cumsum([len(text) for text in texts], dtype=np.int64)
    data = np.frombuffer(text.encode() + BEYOND, np.uint8)
    kinds = np.zeros(len(text) + 2, np.uint8)
    kinds[1:-1] = kinds_of()(text)
    wanted = looked_up(kinds[:-2] * 8 + kinds[1:-1], table)
    cuts = wanted & looked_up(kinds[2:], BITS) != 0  # [i]: in front of character i
    last = ends[ends > 0] - 1  # behind these, kinds of another text stood in for "."
    cuts[last] = wanted[last] & 1
    begins = np.concatenate([[0], ends])[:-1]
    cuts[begins[begins < len(text)]] = True
    bounds = np.append(np.flatnonzero(cuts), len(text))
    first = np.searchsorted(bounds, np.append(begins, len(text)))
    if len(text) < len(data) - 8:  # from characters to bytes: those that do not go on with one (10xxxxxx)
        bounds = np.flatnonzero((data[:-7] & 0xC0) != 0x80)[bounds]
    return data, bounds, first


def spell(data, bounds, which) -> list[bytes]:
    """The bytes of those segments."""
    data = data.tobytes()
    return [data[begin:end] for begin, end in zip(bounds[which].tolist(), bounds[which + 1].tolist())]


def first_of(numbers, wanted) -> np.ndarray:
    """Where each of the numbers n for which wanted[n] is true comes first. -1 is none of them."""
    places = np.flatnonzero(wanted[numbers] & (numbers >= 0))
    return places[np.unique(numbers[places], return_index=True)[1]]


def grown(array, size: int) -> np.ndarray:
    """The array, with zeros behind it if it is shorter than `size`: then twice as long, so this is rare."""
    if len(array) >= size:
        return array
    return np.concatenate([array, np.zeros(max(len(array), size - len(array)), array.dtype)])


class Numbering:
    """A number for each different uint64, from 0 on: a hash table that is asked for many at once."""
    EMPTY = np.uint64(2 ** 64 - 1)  # no key

    def __init__(self):
        self.size = 0
        self.clear(1 << 16)

    def clear(self, slots: int):
        self.keys, self.numbers = np.full(slots, self.EMPTY), np.zeros(slots, np.int32)

    def slots(self, keys):
        """Where to look for the keys first; then in the slots behind (linear probing)."""
        mixed = (keys ^ (keys >> np.uint64(29))) * np.uint64(0x9E3779B97F4A7C15)
        return (mixed >> np.uint64(65 - len(self.keys).bit_length())).astype(np.int64)

    def find(self, keys) -> np.ndarray:
        """The numbers of the keys, and -1 for those that have none."""
        slots = self.slots(keys)
        numbers = self.numbers[slots]
        unsure = np.flatnonzero(self.keys[slots] != keys)
        while len(unsure):
            here = self.keys[slots[unsure]]
            there = here == keys[unsure]
            numbers[unsure[there]] = self.numbers[slots[unsure[there]]]
            numbers[unsure[here == self.EMPTY]] = -1
            unsure = unsure[~there & (here != self.EMPTY)]
            slots[unsure] = (slots[unsure] + 1) % len(self.keys)
        return numbers

    def find_or_add(self, keys) -> np.ndarray:
        numbers = self.find(keys)
        missing = np.flatnonzero(numbers < 0)
        if len(missing):
            new, inverse = np.unique(keys[missing], return_inverse=True)
            start = self.size
            self.add(new)
            numbers[missing] = start + inverse
        return numbers

    def add(self, keys):
        """Give the next numbers to these different keys, all of them new."""
        numbers = np.arange(self.size, self.size + len(keys), dtype=np.int32)
        self.size += len(keys)
        if 2 * self.size > len(self.keys):  # half of the slots are to be free
            full = self.keys != self.EMPTY
            keys, numbers = np.append(self.keys[full], keys), np.append(self.numbers[full], numbers)
            self.clear(2 << (2 * self.size).bit_length())
        slots = self.slots(keys)
        while len(keys):
            free = self.keys[slots] == self.EMPTY
            self.keys[slots[free]] = keys[free]  # of several keys for a slot one gets it
            placed = self.keys[slots] == keys
            self.numbers[slots[placed]] = numbers[placed]
            keys, numbers, slots = keys[~placed], numbers[~placed], (slots[~placed] + 1) % len(self.keys)


class Segments:
    """Numbers for the segments of texts: equal ones have the same, whichever text they stand in.

    A number stands for up to eight bytes; with more of them, for the number of the bytes so far and that of
    the next eight. No hash stands in for the bytes, so different segments have different numbers.
    """
    LONGEST = 128  # bytes of a segment that is numbered

    def __init__(self):
        self.numbering = Numbering()

    def numbers(self, data, bounds):
        """The number of each segment; -1 for those that are too long."""
        starts, lengths = bounds[:-1], np.diff(bounds)
        words = np.ndarray(len(data) - 7, "<u8", data, strides=(1,))  # the eight bytes from each on

        def number(places, left):
            return self.numbering.find_or_add(words[places] | BEHIND[np.minimum(left, 8)])

        numbers = number(starts, lengths)
        going_on = np.flatnonzero((lengths > 8) & (lengths <= self.LONGEST))
        done = 8
        while len(going_on):
            more = number(starts[going_on] + done, lengths[going_on] - done)
            pairs = LONGER | numbers[going_on].astype(np.uint64) << np.uint64(28) | more.astype(np.uint64)
            numbers[going_on] = self.numbering.find_or_add(pairs)
            done += 8
            going_on = going_on[lengths[going_on] > done]
        numbers[lengths > self.LONGEST] = -1
        return numbers


# 0xFF for the bytes behind a segment's end, where another one stands; and what begins a number for more than
# eight bytes. Neither 0xFF nor 0xFE stands in UTF-8, so no two of these are the same.
BEHIND = np.array([(1 << 64) - (1 << 8 * length) for length in range(9)], np.uint64)
LONGER = np.uint64(0xFE << 56)


class SegmentCounter:
    """How often each segment occurs in texts. What it has seen it knows again, but not in another process."""
    SIZE = 1 << 19  # numbers after which all is forgotten, about 60 MB

    def __init__(self, rule):
        self.rule, self.table = rule, table_of(rule)
        self.forget()

    def __reduce__(self):
        return SegmentCounter, (self.rule,)

    def forget(self):
        self.segments, self.seen = Segments(), np.zeros(1 << 16, bool)
        self.spelled = np.zeros(1 << 16, object)  # number -> segment

    def __call__(self, texts: list[str]) -> Counter:
        if self.segments.numbering.size > self.SIZE:
            self.forget()
        data, bounds, _ = cut(texts, self.table)
        numbers = self.segments.numbers(data, bounds)
        counts = Counter(map(bytes.decode, spell(data, bounds, np.flatnonzero(numbers < 0))))
        frequency = np.bincount(numbers[numbers >= 0], minlength=1)
        self.seen, self.spelled = (grown(array, len(frequency)) for array in (self.seen, self.spelled))
        new = first_of(numbers, ~self.seen)
        self.seen[numbers[new]] = True
        self.spelled[numbers[new]] = list(map(bytes.decode, spell(data, bounds, new)))
        here = np.flatnonzero(frequency)
        counts.update(dict(zip(self.spelled[here].tolist(), frequency[here].tolist())))
        return counts
