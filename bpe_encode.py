"""The ids of bpe.Tokenizer.encode, for long texts and many: each different piece of them is merged once, in numpy.

    texts -> segments, numbered (cuts.py) -> by number: where its ids stand in a pool -> all of them, copied

A text of a million characters has 180,000 segments, and 15,000 different ones. What is done for each of the
many is done in numpy for all at once. New segments are cut by the pattern and merged, all of them side by side.
"""
from itertools import chain

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

    def __init__(self, rule, findall, byte_ids, pairs, results, whole, merge_long):
        self.table, self.findall, self.merge_long = cuts.table_of(rule), findall, merge_long
        self.byte_ids, self.results = np.array(byte_ids, np.int32), np.array(results, np.int32)
        self.whole = whole
        self.ranks = cuts.Numbering()
        left, right = np.array(pairs, np.uint64).reshape(-1, 2).T
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
        numbers, new = self.segments.numbers(data, bounds)
        if len(new):
            self.learn(numbers[new], [data[bounds[i]:bounds[i + 1]].tobytes().decode() for i in new])
        start, length = self.start[numbers], self.length[numbers]
        long = {i: self.merged([data[bounds[i]:bounds[i + 1]].tobytes().decode()])[0]
                for i in np.flatnonzero(numbers < 0)}
        for i, ids in long.items():
            length[i] = len(ids)
        ends = np.zeros(len(bounds), np.int64)
        np.cumsum(length, out=ends[1:])
        places = np.repeat(start - ends[:-1], length)
        places += np.arange(len(places))
        ids = self.pool.take(places, mode="clip")
        for i, ids_of_long in long.items():
            ids[ends[i]:ends[i + 1]] = ids_of_long
        return ids, ends

    def learn(self, numbers, segments: list[str]):
        """Put the ids of segments into the pool."""
        ids, lengths = self.merged(segments)
        size = self.segments.numbering.size
        self.start, self.length = cuts.grown(self.start, size), cuts.grown(self.length, size)
        self.pool = cuts.grown(self.pool, self.used + len(ids))
        self.pool[self.used:self.used + len(ids)] = ids
        self.start[numbers] = self.used + np.cumsum(lengths) - lengths
        self.length[numbers] = lengths
        self.used += len(ids)

    def merged(self, segments: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """(the ids of the segments, in a row; how many each has)."""
        cut = list(map(self.findall, segments))
        pieces = [piece.encode() for piece in chain.from_iterable(cut)]
        ids, owners = self.merge([b"" if self.apart(piece) else piece for piece in pieces])
        apart = {i: self.merge_apart(piece) for i, piece in enumerate(pieces) if self.apart(piece)}
        if apart:
            ids = np.concatenate([ids, *apart.values()])
            owners = np.concatenate([owners, *(np.full(len(some), i) for i, some in apart.items())])
            order = np.argsort(owners, kind="stable")
            ids, owners = ids[order], owners[order]
        segment = np.repeat(np.arange(len(cut)), list(map(len, cut)))
        return ids, np.bincount(segment[owners], minlength=len(cut))

    def apart(self, piece: bytes) -> bool:
        return len(piece) >= self.LONG or piece in self.whole

    def merge_apart(self, piece: bytes) -> list[int]:
        return [self.whole[piece]] if piece in self.whole else self.merge_long(self.byte_ids[list(piece)].tolist())

    def merge(self, pieces: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
        """(the ids of all pieces, in a row; to which piece each belongs).

        Each round makes the lowest merge of each piece, wherever it can be made there. Pieces in which none
        is left are put aside.
        """
        ids = self.byte_ids[np.frombuffer(b"".join(pieces), np.uint8)]
        owner = np.repeat(np.arange(len(pieces)), list(map(len, pieces)))
        rank = self.rank(ids, owner, np.arange(len(ids)))
        done = []
        while len(ids):
            begins = np.flatnonzero(np.diff(owner, prepend=-1))
            lengths = np.diff(begins, append=len(ids))
            lowest = np.minimum.reduceat(rank, begins)
            here = np.repeat(lowest, lengths)
            ready = here == NEVER
            if ready.any():
                done.append((ids[ready], owner[ready]))
                ids, owner, rank, here = ids[~ready], owner[~ready], rank[~ready], here[~ready]
            at = every_other(np.flatnonzero(rank == here))
            ids[at] = self.results[rank[at]]
            stays = np.ones(len(ids), bool)
            stays[at + 1] = False
            ids, owner, rank = ids[stays], owner[stays], rank[stays]
            at -= np.arange(len(at))  # so many have gone before it
            for changed in (at, at[at > 0] - 1):
                rank[changed] = self.rank(ids, owner, changed)
        if not done:
            return ids, owner
        ids, owner = map(np.concatenate, zip(*done))
        order = np.argsort(owner, kind="stable")
        return ids[order], owner[order]

    def rank(self, ids, owner, places):
        """The ranks of the pairs that begin at these places."""
        ranks = np.full(len(places), NEVER)
        behind = np.minimum(places + 1, len(ids) - 1)
        inside = np.flatnonzero((owner[places] == owner[behind]) & (places < behind))
        places, behind = places[inside], behind[inside]
        found = self.ranks.find(ids[places].astype(np.uint64) << np.uint64(32) | ids[behind].astype(np.uint64))
        ranks[inside] = np.where(found < 0, NEVER, found)
        return ranks


def every_other(places):
    """Of rising places where one merge can be made those where it is: in "aaa", (a, a) at the first."""
    index = np.arange(len(places))
    begins = np.diff(places, prepend=-2) != 1
    return places[(index - np.maximum.accumulate(np.where(begins, index, 0))) % 2 == 0]
