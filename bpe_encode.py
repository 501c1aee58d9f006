"""The ids of bpe.Tokenizer.encode, for long texts and many: each different piece is merged once, in numpy.

    texts -> segments, numbered (cuts.py) -> by number: where its ids stand in a pool -> all of them, copied

A text of a million characters has 180,000 segments, and 15,000 different ones. What is done for each of
the many is done in numpy for all at once. New segments are cut by the pattern, and their pre-tokens are
merged side by side.
"""
from itertools import chain, pairwise

import numpy as np

import cuts

NEVER = np.int32(2 ** 31 - 1)  # the rank of a pair that is no merge


class Encoder:
    """Encodes by the rule of cuts.py that belongs to a pattern.

    findall: text -> its pre-tokens. byte_ids: 256 ids. pairs: the two ids of each merge, in order; results:
    the id that each gives. whole: {bytes: id} of pre-tokens that are not merged. merge_long: a pre-token's
    ids -> merged.
    """
    SIZE = 1 << 19  # numbers after which all is forgotten, about 60 MB; the frequent segments are soon back
    LONG = 256  # bytes of a pre-token that is merged by itself
    FEW = 1000  # ids of which the last rounds are not made in numpy

    def __init__(self, rule, findall, byte_ids, pairs, results, whole, merge_long):
        self.table, self.findall, self.merge_long = cuts.table_of(rule), findall, merge_long
        self.byte_ids, self.results = np.array(byte_ids, np.int32), np.array(results, np.int32)
        self.whole = whole
        self.ranks = cuts.Numbering()
        left, right = np.array(list(pairs), np.uint64).reshape(-1, 2).T
        self.ranks.add(left << np.uint64(32) | right)
        self.forget()

    def forget(self):
        self.segments = cuts.Segments()
        self.start, self.length = np.zeros(1 << 16, np.int64), np.zeros(1 << 16, np.int64)
        self.pool, self.used = np.zeros(1 << 18, np.int32), 0

    def encode(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """(the ids of all texts in a row, where each text's begin, and the last text's end)."""
        data, bounds, first = cuts.cut(texts, self.table)
        ids, ends = self.ids_of(data, bounds)
        return ids, ends[first]

    def stream(self, chunks, window: int):
        """Yield arrays of the ids of a text that comes in chunks."""
        waiting, length, enough = [], 0, window
        for chunk in chunks:
            waiting.append(chunk)
            length += len(chunk)
            if length >= enough:
                data, bounds, _ = cuts.cut(["".join(waiting)], self.table)
                yield self.ids_of(data, bounds[:-1])[0]
                waiting = [data[bounds[-2]:-8].tobytes().decode()]  # the last may become longer
                length = len(waiting[0])
                enough = max(window, 2 * length)
        yield self.encode(["".join(waiting)])[0]

    def ids_of(self, data, bounds) -> tuple[np.ndarray, np.ndarray]:
        """(the ids of segments, in a row; where those of each segment begin, and the last one's end)."""
        if self.segments.numbering.size > self.SIZE:
            self.forget()
        return self.look_up(data, bounds, self.cut_further)

    def look_up(self, data, bounds, make) -> tuple[np.ndarray, np.ndarray]:
        """As ids_of; make: list of bytes -> (ids, in a row; how many each has) of what is not in the pool."""
        numbers = self.segments.numbers(data, bounds)
        new, long = self.first_of_unknown(numbers), np.flatnonzero(numbers < 0)
        unknown = np.concatenate([new, long])
        found, lengths = make(cuts.spell(data, bounds, unknown)) if len(unknown) else (self.pool[:0], unknown)
        self.learn(numbers[new], found, lengths[:len(new)])

        length = self.length[numbers]
        length[long] = lengths[len(new):]
        ends = np.zeros(len(bounds), np.int64)
        np.cumsum(length, out=ends[1:])
        places = np.repeat(self.start[numbers] - ends[:-1], length)
        places += np.arange(len(places))
        ids = self.pool.take(places, mode="clip")
        end = lengths[:len(new)].sum()
        for i in long:  # these are not in the pool
            ids[ends[i]:ends[i + 1]] = found[end:end + length[i]]
            end += length[i]
        return ids, ends

    def first_of_unknown(self, numbers):
        """Where numbers that have no ids yet come first."""
        size = self.segments.numbering.size
        self.start, self.length = cuts.grown(self.start, size), cuts.grown(self.length, size)
        return cuts.first_of(numbers, self.length == 0)

    def learn(self, numbers, ids, lengths):
        """Put the ids of these numbers into the pool; there may be further ones behind them."""
        end = self.used + lengths.sum()
        self.pool = cuts.grown(self.pool, end)
        self.pool[self.used:end] = ids[:end - self.used]
        self.start[numbers] = self.used + np.cumsum(lengths) - lengths
        self.length[numbers] = lengths
        self.used = end

    def cut_further(self, segments: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
        """(the ids of the segments, in a row; how many each has): each is cut into its pre-tokens."""
        cut = [self.findall(segment.decode()) for segment in segments]
        pieces = [piece.encode() for piece in chain.from_iterable(cut)]
        bounds = np.zeros(len(pieces) + 1, np.int64)
        np.cumsum(np.fromiter(map(len, pieces), np.int64, len(pieces)), out=bounds[1:])
        data = np.frombuffer(b"".join(pieces) + cuts.BEYOND, np.uint8)
        ids, ends = self.look_up(data, bounds, self.merged)
        number = np.cumsum(np.fromiter(map(len, cut), np.int64, len(cut)))
        return ids, np.diff(ends[number], prepend=0)

    def merged(self, pieces: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
        """(the ids of pre-tokens, in a row; how many each has)."""
        apart = {i: self.merge_apart(piece) for i, piece in enumerate(pieces)
                 if len(piece) >= self.LONG or piece in self.whole}
        ids, owners = self.merge([b"" if i in apart else piece for i, piece in enumerate(pieces)])
        if apart:
            ids = np.concatenate([ids, *apart.values()])
            owners = np.concatenate([owners, *(np.full(len(some), i) for i, some in apart.items())])
            order = np.argsort(owners, kind="stable")
            ids, owners = ids[order], owners[order]
        return ids, np.bincount(owners, minlength=len(pieces))

    def merge_apart(self, piece: bytes) -> list[int]:
        """The ids of one pre-token: rounds as in `merge`, for as long as they make many merges each."""
        if piece in self.whole:
            return [self.whole[piece]]
        ids = self.byte_ids[np.frombuffer(piece, np.uint8)]
        owner = np.zeros(len(ids), np.int64)
        rank = self.rank(ids, owner, np.arange(len(ids)))
        while (lowest := rank.min()) != NEVER and 50 * len(at := np.flatnonzero(rank == lowest)) > len(ids):
            ids, owner, rank = self.merge_at(at, ids, owner, rank)
        return self.merge_long(ids.tolist())

    def merge(self, pieces: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
        """(the ids of all pieces, in a row; to which piece each belongs).

        Each round makes the lowest merge of each piece, wherever it can be made there. Pieces in which none
        is left are put aside; when few go on, the longest ones, they are merged one by one.
        """
        ids = self.byte_ids[np.frombuffer(b"".join(pieces), np.uint8)]
        owner = np.repeat(np.arange(len(pieces)), np.fromiter(map(len, pieces), np.int64, len(pieces)))
        rank = self.rank(ids, owner, np.arange(len(ids)))
        done = []
        while len(ids) > self.FEW:
            begins = np.flatnonzero(np.diff(owner, prepend=-1))
            lengths = np.diff(begins, append=len(ids))
            lowest = np.minimum.reduceat(rank, begins)
            here = np.repeat(lowest, lengths)
            ready = here == NEVER
            if ready.any():
                done.append((ids[ready], owner[ready]))
                ids, owner, rank, here = ids[~ready], owner[~ready], rank[~ready], here[~ready]
            ids, owner, rank = self.merge_at(np.flatnonzero(rank == here), ids, owner, rank)
        bounds = np.append(np.flatnonzero(np.diff(owner, prepend=-1)), len(ids))
        for begin, end in pairwise(bounds.tolist()):
            last = self.merge_long(ids[begin:end].tolist())
            done.append((np.array(last, np.int32), np.full(len(last), owner[begin])))
        if not done:
            return ids, owner
        ids, owner = map(np.concatenate, zip(*done))
        order = np.argsort(owner, kind="stable")
        return ids[order], owner[order]

    def merge_at(self, places, ids, owner, rank):
        """The three after the merges at these places, where neighbours are those of (a, a) in "aaa"."""
        places = every_other(places)
        ids[places] = self.results[rank[places]]
        stays = np.ones(len(ids), bool)
        stays[places + 1] = False
        ids, owner, rank = ids[stays], owner[stays], rank[stays]
        places -= np.arange(len(places))  # so many have gone before it
        changed = np.concatenate([places, places[places > 0] - 1])
        rank[changed] = self.rank(ids, owner, changed)
        return ids, owner, rank

    def rank(self, ids, owner, places):
        """The ranks of the pairs that begin at these places."""
        ranks = np.full(len(places), NEVER)
        behind = np.minimum(places + 1, len(ids) - 1)
        inside = np.flatnonzero((owner[places] == owner[behind]) & (places < behind))
        places, behind = places[inside], behind[inside]
        left, right = ids[places].astype(np.uint64), ids[behind].astype(np.uint64)
        found = self.ranks.find(left << np.uint64(32) | right)
        ranks[inside] = np.where(found < 0, NEVER, found)
        return ranks


def every_other(places):
    """Of rising places where one merge can be made those where it is: in "aaa", (a, a) at the first."""
    index = np.arange(len(places))
    begins = np.diff(places, prepend=-2) != 1
    return places[(index - np.maximum.accumulate(np.where(begins, index, 0))) % 2 == 0]
