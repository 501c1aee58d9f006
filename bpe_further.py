"""Merges that go on where a tokenizer ends: those of Tokenizer.extend.

    "ab cd" -> tokens of the old merges -> the most frequent pair of tokens is merged, counted again, merged …

As in bpe.train_plain, but words begin as tokens, whatever these are; and as few words hold a pair, only those
are looked at again when it is merged. A word is a str whose characters are tokens, chr(i) for the i-th: so
str.split and str.join do the merging, in C, and the ends of the parts between are the neighbours whose pairs
change.
"""
import heapq
from collections import defaultdict

from tqdm import tqdm


def learn_further(words: list[str], word_counts: list[int], tokens: list[bytes], number: int
                  ) -> list[tuple[bytes, bytes]]:
    """The first `number` merges of words that are tokens already; fewer where no pair is left.

    In a word chr(i) is tokens[i]. Of equally frequent pairs the greatest (bytes, bytes) goes first. A pair
    that together is a token already, of which there must not be two, stays a pair. Changes words and tokens.
    """
    counts, where, merges, known = defaultdict(int), defaultdict(list), [], set(tokens)
    for index, word in enumerate(words):
        for pair in map(str.__add__, word, word[1:]):
            counts[pair] += word_counts[index]
            where[pair].append(index)

    def entry(pair):
        return -counts[pair], Greatest((tokens[ord(pair[0])], tokens[ord(pair[1])])), pair

    heap = [entry(pair) for pair in counts]
    heapq.heapify(heap)
    with tqdm(total=number, desc="learn merges", unit=" merges", delay=1, disable=None) as bar:
        while heap and len(merges) < number:
            negative, merge, pair = heapq.heappop(heap)
            new = b"".join(merge)
            if counts[pair] != -negative:  # some were merged otherwise since: it goes where it belongs now
                if counts[pair]:
                    heapq.heappush(heap, entry(pair))
            elif new not in known:
                merges.append(tuple(merge))
                tokens.append(new)
                known.add(new)
                for born in merge_words(words, word_counts, counts, where, pair, chr(len(tokens) - 1)):
                    heapq.heappush(heap, entry(born))
                bar.update()
    return merges


class Greatest(tuple):
    """A tuple that a heap, which gives the smallest first, gives in the order of the greatest."""
    __lt__ = tuple.__gt__


def merge_words(words, word_counts, counts, where, pair, new) -> set[str]:
    """Merge the pair into the token `new` in all words, update counts and where, and return the new pairs."""
    a, b = pair
    born = set()
    for index in where.pop(pair):
        parts = words[index].split(pair)
        if len(parts) == 1:  # gone: another merge took it, or the index stood in the list twice
            continue
        words[index] = new.join(parts)
        changes = []
        for i, (before, after) in enumerate(zip(parts, parts[1:])):  # before a b after  ->  before new after
            if before:
                changes.append((before[-1] + a, before[-1] + new))
            elif i:  # a b a b  ->  new new
                changes.append((b + a, new + new))
            if after:
                changes.append((b + after[0], new + after[0]))
        for old, now in changes:
            counts[old] -= word_counts[index]
            counts[now] += word_counts[index]
            where[now].append(index)
            born.add(now)
    del counts[pair]
    return born
