"""Passages that stand twice, wherever in the text they begin: a suffix array, sorted as deep as is asked.

Sort all suffixes of a text, and equal passages are neighbours, however long (Manber and Myers 1993). So Lee
et al. (2022, https://arxiv.org/abs/2107.06499) found a sentence of 61 words 60,000 times in a cleaned crawl.
10 MB of bytes take 5 s on one core, and 10.5 bytes a byte of memory.

    >>> duplicate_spans(np.array([7, 1, 2, 3, 8, 1, 2, 3, 9]), min_length=2).tolist()      # 1 2 3 again
    [[5, 8]]
"""
from collections.abc import Iterable, Iterator

import numpy as np

from config import UserError

PIECE = 2 ** 17  # places of the suffix array that are worked on at once: what bounds the memory beside it


def duplicate_spans(tokens, min_length: int, ends: np.ndarray | None = None) -> np.ndarray:
    """(N, 2) int64: spans [start, end), in order and apart, of tokens that stand earlier too.

    A token is in a span if it is in a window of `min_length` tokens that begins at an earlier place too (and
    may overlap it). Windows that overlap or touch are one span: cutting all spans leaves the first place of
    each repeated passage. (All of a span need not stand in one place earlier.)

    ends: where documents end, ascending; a window that reaches over an end counts neither way.
    Tokens are integers in [0, 2^32 - 2]. In memory: 10 to 11 bytes a token beside the tokens; more where a
    large part of the text is one window again and again (36 for one token throughout).
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
    """(order (N,) uint32, new (N,) bool): all suffixes, sorted, and which of them differ from the one before.

    Compared are `depth` tokens (None: all); suffixes that agree so far are in no stated order. The end of the
    text comes before every token.

    Prefix doubling (Manber and Myers 1993): sorted by their first h tokens, each suffix has a rank; the rank
    of the suffix h further on says how the next h tokens sort. So each round doubles h. Only those that still
    agree with another are sorted again (Larsson and Sadakane 2007). The last round looks less than h further,
    to end at `depth` exactly: then neighbours agree in `depth` tokens or more (their longest common prefix,
    LCP) just where `new` is False, and no array of prefix lengths need be computed.
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
    """(keys (N + 1,) uint32, h): the first h tokens of each suffix as the digits of a number of 32 bits."""
    if len(tokens) >= 2 ** 28:
        raise UserError(f"{len(tokens):,} tokens are too many for one suffix array; pass fewer than "
                        f"{2 ** 28:,}, a shard at a time")
    low, high = (tokens.min(), tokens.max()) if len(tokens) else (0, 0)
    if tokens.dtype.kind not in "ui" or low < 0 or high > 2 ** 32 - 2:
        raise UserError(f"tokens are {tokens.dtype} from {low} to {high}; they must be integers in "
                        f"[0, 2^32 - 2]")
    base, h = int(high) + 2, 1  # digit 0: behind the end
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
    """(order, new) by keys: those in a range of values are collected, and sorted with their places."""
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
    """Yield (lowest, highest, count): ranges of values with about `size` of the keys in each."""
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
    """Write each suffix's rank: 1 + the place in `order` of the first that agrees with it; 0: the end."""
    last = 0
    for start in range(0, len(order), PIECE):
        places = np.arange(start + 1, min(start + PIECE, len(order)) + 1, dtype=np.uint32)
        places[~new[start:start + PIECE]] = 0
        places[0] = places[0] or last
        np.maximum.accumulate(places, out=places)
        ranks[order[start:start + PIECE]] = places
        last = places[-1]
    ranks[len(order)] = 0


def unsorted_pieces(new: np.ndarray) -> Iterator[tuple[int, int, np.ndarray | slice]]:
    """Yield (low, high, active): pieces of whole groups, and the places in them that agree with another.

    A piece has at most PIECE places, or is a single group, and active a slice: all of it.
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
        if high - low > PIECE:
            yield low, high, slice(None)
        else:
            alone = new[low:high].copy()
            alone[:-1] &= new[low + 1:high]
            active = np.flatnonzero(~alone)
            if len(active):
                yield low, high, active
        low = high


def sort_again(order: np.ndarray, new: np.ndarray, active, ranks: np.ndarray, step: int):
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
    """The texts without passages of `min_length` bytes (UTF-8) that stand in one before, or earlier in it.

    A passage is in one text; cut are whole characters. All texts are in memory, and 12 bytes a byte of text.
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
    return [data[low:high][~dropped[low:high]].tobytes().decode("utf-8")
            for low, high in zip(starts, starts[1:])]
