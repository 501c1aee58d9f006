"""Classic wrong answers to the exercises, and right ones that are written differently.

tests/test_exercise.py (slow) shows that every wrong one is rejected by a hint that names the mistake.
"""
from dataclasses import dataclass


@dataclass(frozen=True)
class Wrong:
    mistake: str  # what is wrong, in a few words
    says: str  # a word or phrase that the hint must contain, in lower case
    change: dict[str, str] | None = None  # {a piece of the original's source, there exactly once: in its place}
    body: str | None = None  # or a whole other body, dedented, without signature and docstring


WRONG: dict[str, tuple[Wrong, ...]] = {
    "merge": (
        Wrong("overlapping pairs are all merged", "left", {"i += width": "i += 1"}),
        Wrong("the word comes back unchanged", "left", body="return list(word)"),
        Wrong("merged from the right", "left", body="""
            merged, i = [], len(word)
            while i > 0:
                width = 2 if tuple(word[max(i - 2, 0):i]) == pair else 1
                merged.insert(0, b"".join(word[i - width:i]))
                i -= width
            return merged"""),
    ),
}
RIGHT: dict[str, tuple[str, ...]] = {
    "merge": ("""
        merged = []
        for symbol in word:
            if merged and not merged[-1][1] and (merged[-1][0], symbol) == pair:
                merged[-1] = (b"".join(pair), True)
            else:
                merged.append((symbol, False))
        return [symbol for symbol, _ in merged]""",),
}
