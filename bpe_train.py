"""The merges of bpe.train_plain, many at a time: where they cannot disturb each other, order is no matter.

    >>> learn_merges({"low": 5, "lower": 2, "newest": 6, "widest": 3}, 3)
    [(b's', b't'), (b'e', b'st'), (b'o', b'w')]

The plain trainer goes over all words for each merge, and there are 32,000 of them. But most could be made at
the same time. For take a pair that occurs more often than every pair that it overlaps somewhere:

    l o w e r      (o, w) occurs 7 times, (l, o) 6 times and (w, e) 2 times

Whatever is merged meanwhile, (o, w) will be merged with just the count it has now. To lose an "o" or a "w", a
pair that overlaps it would have to be merged first. The pairs that do now are less frequent; and what merging
makes of them, as (l, o) becomes (yel, o), occurs no more often than they. So each round merges all such pairs
at once, in numpy, wherever they stand. The counts then say in which order the plain trainer would have made
them: the most frequent first.

Equal counts are what makes it difficult, because then the bytes decide, and merging changes them: see `tied`.
"""
import heapq
from itertools import groupby

import numpy as np
from tqdm import tqdm

from cuts import grown

BYTES = [bytes([value]) for value in range(256)]
END = 255  # stands between words, as a byte and as a token: no text in UTF-8 has this byte
TURNED = bytes(range(255, -1, -1))
NO_PAIR = 0  # the number of what is no pair: a place at the end of a word, or merged away. Its count is 0


def learn_merges(pieces: dict[str, int], number: int) -> list[tuple[bytes, bytes]]:
    """The first `number` merges of pre-tokens that occur so many times; fewer where no pair is left."""
    words = Words(pieces)
    with tqdm(total=number, desc="learn merges", unit=" merges", delay=1, disable=None) as bar:
        while len(words.made) < number and (least := words.next_threshold(number)):
            for merged in words.merge_down_to(least):
                bar.update(merged)
    tokens = words.tokens
    return [(tokens[left], tokens[right]) for _, left, right, _ in in_order(words.made, tokens)][:number]


class Words:
    """All words in a row, END between them, as a linked list of tokens; and the pairs in them, numbered.

    By place in the row: token, pair (the number of the pair that begins here), before and after (the places
    of the neighbours) and weight (how often the word occurs). By number of a pair: left and right, its
    tokens; count. By token: tokens, its bytes; and what `tied` compares. made: the merges, in no order, as
    (count, left, right, new token).
    """

    def __init__(self, pieces: dict[str, int]):
        end = bytes([END])
        row = np.frombuffer(end + end.join(map(str.encode, pieces)) + end, np.uint8)
        self.token = row.astype(np.int32)
        lengths = np.diff(np.flatnonzero(row == END))
        self.weight = np.append(0, np.repeat(np.fromiter(pieces.values(), np.int64, len(pieces)), lengths))
        places = np.arange(len(row), dtype=np.int32)
        self.before, self.after = np.maximum(places - 1, 0), np.minimum(places + 1, len(row) - 1)
        self.pair = np.zeros(len(row), np.int32)
        self.left, self.right, self.count = (np.zeros(1, kind) for kind in (np.int32, np.int32, np.int64))
        self.pairs = 1  # how many numbers of pairs are in use
        self.tokens, self.made = list(BYTES), []
        self.head = np.array([int.from_bytes(token.ljust(8, b"\0"), "big") for token in BYTES], np.uint64)
        self.mask = np.full(256, 0xFF << 56, np.uint64)
        self.made_at, self.waited = np.zeros(256, np.int64), np.zeros(256, np.uint64)
        self.number_pairs(places)

    def number_pairs(self, places):
        """Give numbers to the pairs that begin at these places, none of which has one yet; return places."""
        left, right = self.token[places], self.token[self.after[places]]
        inside = (left != END) & (right != END)
        self.pair[places[~inside]] = NO_PAIR
        places, left, right = places[inside], left[inside], right[inside]
        keys, numbers = self.distinct(left, right)
        start, self.pairs = self.pairs, self.pairs + len(keys)
        self.left, self.right, self.count = (
            grown(array, self.pairs) for array in (self.left, self.right, self.count))
        self.left[start:self.pairs], self.right[start:self.pairs] = keys >> 32, keys & 0xFFFFFFFF
        self.count[start:self.pairs] = np.bincount(numbers, self.weight[places], len(keys))
        self.pair[places] = start + numbers
        return places

    def distinct(self, left, right):
        """As np.unique of left << 32 | right, and which of these each is."""
        if len(self.tokens) > len(BYTES):
            return np.unique(left.astype(np.int64) << 32 | right, return_inverse=True)
        keys = left << 8 | right  # at the beginning they are many, but small: no need to sort them
        numbers = np.zeros(1 << 16, np.int32)
        numbers[keys] = 1
        found = np.flatnonzero(numbers)
        numbers[found] = np.arange(len(found))
        return found >> 8 << 32 | found & 0xFF, numbers[keys]

    def next_threshold(self, number) -> int:
        """The count down to which all is merged next: some hundred more merges at first, then thousands.

        What is merged beyond `number` is work in vain, what is not merged now is looked at again.
        """
        counts = self.count[1:self.pairs]
        counts = counts[counts > 0]
        wanted = min(len(counts), max(64, min(len(self.made) // 4, number - len(self.made))))
        return int(np.partition(counts, -wanted)[-wanted]) if wanted else 0

    def merge_down_to(self, least: int):
        """Make all merges whose count is at least so high; yield how many, round by round."""
        places = np.flatnonzero(self.count[self.pair] >= least)
        while len(places := places[self.count[self.pair[places]] >= least]):
            undisturbed = places[self.undisturbed(places)]
            if not len(undisturbed):
                undisturbed = places[self.pair[places] == self.very_next()]
            made, known = len(self.made), self.pairs
            changed = self.merge(undisturbed)
            places = np.concatenate([places[self.pair[places] < known], changed])
            yield len(self.made) - made

    def undisturbed(self, places):
        """Mask of the places of those pairs that no pair which overlaps them can come before."""
        pair, before, after = self.pair[places], self.before[places], self.after[places]
        count = self.count[pair]
        pair_before, pair_after = self.pair[before], self.pair[after]
        count_before, count_after = self.count[pair_before], self.count[pair_after]
        lost = (count_before > count) | (count_after > count)
        # (a, a) overlaps itself in "aaa", which does not count
        equal_before = (count_before == count) & (pair_before != pair)
        equal_after = (count_after == count) & (pair_after != pair)
        tied = np.flatnonzero((equal_before | equal_after) & ~lost)
        lost[tied] = self.tied(pair[tied], before[tied], equal_before[tied], equal_after[tied])
        disturbed = np.zeros(self.pairs, bool)
        disturbed[pair[lost]] = True
        return ~disturbed[pair]

    def tied(self, pair, before, equal_before, equal_after):
        """Mask of those that may lose to a pair of the same count which overlaps them.

        Of equal counts the greatest (bytes, bytes) goes first. So (c, d) goes before (d, y), and before any
        (d, y…) that merging makes of it, if d < c. To go before (x, c) it needs x < c; and where pairs
        before that one are as frequent, x may have grown to the left by then: so each token up to where they
        begin must be smaller than c, whatever follows it. Only first tokens are compared, and of these the
        first eight bytes: what is not decided by that waits for another round.

        One more care: where c itself was merged at this very count, (c, d) had to wait for that; so what
        counts is the smallest of the two, and so on back (`waited`).
        """
        count, mine = self.count[pair], self.waits(pair)
        lost = equal_after & (self.head[self.right[pair]] >= mine)
        which, exact = np.flatnonzero(equal_before & ~lost), True
        while len(which):
            token = self.token[before[which]]
            start = mine[which] if exact else mine[which] & self.mask[token]
            loses = start <= self.head[token]
            lost[which[loses]] = True
            before[which] = self.before[before[which]]
            which = which[~loses & (self.count[self.pair[before[which]]] >= count[which])]
            exact = False
        return lost

    def waits(self, pair):
        """The first bytes by which the pairs are ranked among those of their count."""
        mine, count = self.head[self.left[pair]], self.count[pair]
        for token in (self.left[pair], self.right[pair]):
            mine = np.where(self.made_at[token] == count, np.minimum(mine, self.waited[token]), mine)
        return mine

    def very_next(self) -> int:
        """The number of the pair that the plain trainer would merge next, of those not merged yet.

        It is one of the highest count. Those already merged with that count come in their turn.
        """
        counts = self.count[:self.pairs]
        count = counts.max()
        waiting = [(count, int(self.left[pair]), int(self.right[pair]), -int(pair))
                   for pair in np.flatnonzero(counts == count)]
        merged = [merge for merge in self.made if merge[0] == count]
        return next(-new for _, _, _, new in in_order(merged + waiting, self.tokens) if new < 0)

    def merge(self, places):
        """Merge the pairs that begin at these places, which are all places of these pairs; return those
        whose pairs are new."""
        own = self.left[self.pair[places]] == self.right[self.pair[places]]
        if own.any():
            places = np.concatenate([places[~own], self.every_other(np.sort(places[own]))])
        pairs, numbers = np.unique(self.pair[places], return_inverse=True)
        new = len(self.tokens) + numbers
        self.add_tokens(pairs)
        second, before = self.after[places], self.before[places]
        for lost in (second, before):  # one's second may be what stands before another: lost only once
            np.subtract.at(self.count, self.pair[lost], self.weight[lost])
            self.pair[lost] = NO_PAIR
            self.count[NO_PAIR] = 0
        self.count[pairs] = 0
        self.token[places] = new
        self.after[places] = self.after[second]
        self.before[self.after[places]] = places
        self.pair[places] = -1
        before = self.before[places]
        return self.number_pairs(np.concatenate([places, before[self.pair[before] != -1]]))

    def every_other(self, places):
        """Of places where pairs (a, a) begin, in rising order, those that are merged: in "aaa" the first."""
        begins = np.concatenate([[True], self.after[places[:-1]] != places[1:]])
        index = np.arange(len(places))
        return places[(index - np.maximum.accumulate(np.where(begins, index, 0))) % 2 == 0]

    def add_tokens(self, pairs):
        """Make tokens of these pairs."""
        first, size = len(self.tokens), len(self.tokens) + len(pairs)
        for pair, left, right in zip(pairs.tolist(), self.left[pairs].tolist(), self.right[pairs].tolist()):
            self.made.append((int(self.count[pair]), left, right, len(self.tokens)))
            self.tokens.append(self.tokens[left] + self.tokens[right])
        waited = self.waits(pairs)
        self.head, self.mask, self.made_at, self.waited = (
            grown(array, size) for array in (self.head, self.mask, self.made_at, self.waited))
        starts = [token[:8] for token in self.tokens[first:]]
        self.head[first:size] = [int.from_bytes(start.ljust(8, b"\0"), "big") for start in starts]
        self.mask[first:size] = [(1 << 64) - (1 << 64 - 8 * len(start)) for start in starts]
        self.made_at[first:size], self.waited[first:size] = self.count[pairs], waited


def in_order(made, tokens):
    """Yield the merges (count, left, right, new) as the plain trainer makes them.

    The most frequent first; of those of one count the greatest (bytes, bytes), as soon as its tokens are
    there.
    """
    def turned(token):  # heapq gives the smallest first: byte b becomes character 255 - b, and an end above
        return tokens[token].translate(TURNED).decode("latin-1") + chr(256)  # all puts "ab" before "a"

    for _, merges in groupby(sorted(made, reverse=True), key=lambda merge: merge[0]):
        merges = list(merges)
        missing, waiting, ready = {new for _, _, _, new in merges if new >= 0}, {}, []

        def sort_in(merge):
            for token in merge[1:3]:
                if token in missing:
                    return waiting.setdefault(token, []).append(merge)
            heapq.heappush(ready, (turned(merge[1]), turned(merge[2]), merge))

        for merge in merges:
            sort_in(merge)
        while ready:
            *_, merge = heapq.heappop(ready)
            yield merge
            missing.discard(merge[3])
            for follower in waiting.pop(merge[3], ()):
                sort_in(follower)
