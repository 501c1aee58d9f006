"""Rules of quality: a document passes, or every reason why not is named, with its figure and its bound.

    >>> quality_problems("click here " * 30)
    ['stop_words: 0, at least 2', 'sentences: 1, at least 5', 'repeated_lines…', …]

    python quality.py --input my_texts/ --rules web --change words=20: html=off   # what is dropped, and why

A rule is a measure, a short pure function from a text to a number, and the bounds of that number: data, in a
table for each kind of source, so a rule is switched off, or its bound changed, without touching code:

    WEB | {"words": Rule(words, 20, None)}        adjusted(WEB, ["words=20:", "html=off"])

Python's standard library under CODE: 72 of 1,783 modules dropped (71 generated), at 23 MB/s on one core.

Sources. Gopher: Rae et al. 2021, https://arxiv.org/abs/2112.11446, appendix A.1.1 and table A1. C4: Raffel et
al. 2020, https://jmlr.org/papers/v21/20-074.html, section 2.2. Dolma: Soldaini et al. 2024,
https://arxiv.org/abs/2402.00159, section 3 (repeats, scores, encyclopedia). Code: Chen et al. 2021,
https://arxiv.org/abs/2107.03374, section 3.1 (lines, letters, generated files).

Chinese and Japanese are counted in characters: each is a word, and their punctuation parts words as a space
does. Rules that mean nothing there (stop words, length of words) do not apply; a measure then gives None.
"""
import re
import string
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import NamedTuple

import numpy as np

import config
from config import UserError
from documents import corpus


class Rule(NamedTuple):
    """A measure, Text -> number (None: it does not apply), and the bounds it must keep, both inclusive."""
    measure: Callable
    low: float | None = None
    high: float | None = None


def quality_problems(text: str, rules: Mapping[str, Rule] | None = None, document: Mapping | None = None
                     ) -> list[str]:
    """The reasons against a text, as "name: figure, bound"; an empty list when it passes.

    rules: a table as those below, default WEB. document: where its other keys matter, as the score of a
    forum.
    """
    view, problems = Text(text, document or {}), []
    for name, rule in (WEB if rules is None else rules).items():
        figure = rule.measure(view)
        if figure is None:
            continue
        if rule.low is not None and not figure >= rule.low:
            problems.append(f"{name}: {in_figures(figure, rule.low)}, at least {rule.low:,}")
        elif rule.high is not None and not figure <= rule.high:
            problems.append(f"{name}: {in_figures(figure, rule.high)}, at most {rule.high:,}")
    return problems


def in_figures(figure: float, bound: float) -> str:
    """The figure with three digits, or as many as tell it from the bound that it breaks."""
    if float(figure).is_integer():
        return f"{int(figure):,}"
    return next(text for text in (f"{figure:.{digits}g}" for digits in range(3, 18)) if float(text) != bound)


# ---- 1. A text, seen as words, lines, sentences and n-grams ------------------------------------------------

# Written without spaces: CJK ideographs, kana; and the punctuation that stands between them
IDEOGRAPHS = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003134f"
CJK_PUNCTUATION = "\u3000-\u303f\uff01-\uff0f\uff1a-\uff20\uff3b-\uff40\uff5b-\uff65\u2018-\u201d\u2026\u2014"
HAS_IDEOGRAPH = re.compile(f"[{IDEOGRAPHS}]")
CJK_WORD = re.compile(f"[{IDEOGRAPHS}]|[^\\s{IDEOGRAPHS}{CJK_PUNCTUATION}]+")
SENTENCE_END = re.compile(r"[.!?]+[\"')\]\u2019\u201d]*(?=\s|$)|[。！？]+[」』”’]*")
MAX_WORDS = 1 << 20  # n-grams are looked for in the first million words: three positions fit 63 bits


@dataclass
class Text:
    """What several rules look at, each made once and only when a rule asks for it."""
    text: str
    document: Mapping

    @cached_property
    def words(self) -> list[str]:
        if self.text.isascii() or not HAS_IDEOGRAPH.search(self.text):
            return self.text.split()
        return CJK_WORD.findall(self.text)

    @cached_property
    def is_spaced(self) -> bool:
        """Whether most words stand between spaces, as Chinese ones do not."""
        if self.text.isascii():
            return True
        return 2 * len(HAS_IDEOGRAPH.findall(self.text)) <= len(self.words)

    @cached_property
    def lines(self) -> list[str]:
        """The lines that are not empty, without the white space around them."""
        return list(filter(None, map(str.strip, self.text.split("\n"))))

    @cached_property
    def paragraphs(self) -> list[str]:
        return list(filter(None, map(str.strip, re.split(r"\n\s*\n", self.text))))

    @cached_property
    def sentences(self) -> list[str]:
        """Parts that end in . ! ? or their Chinese forms; what stands behind the last of them is none."""
        ends = [0, *(match.end() for match in SENTENCE_END.finditer(self.text))]
        return [self.text[start:end].strip() for start, end in zip(ends, ends[1:])]

    @cached_property
    def vocabulary(self) -> dict[str, int]:
        """{word: its number}, by first occurrence."""
        return {word: number for number, word in enumerate(dict.fromkeys(self.words))}

    @cached_property
    def numbers(self) -> np.ndarray:
        """The number of each word: equal words, equal numbers."""
        return np.fromiter(map(self.vocabulary.__getitem__, self.words), np.int64, len(self.words))

    def of_words(self, measure: Callable[[str], float], dtype=np.int64) -> np.ndarray:
        """What a measure gives for each word, called once for each different word."""
        return np.fromiter(map(measure, self.vocabulary), dtype, len(self.vocabulary))[self.numbers]

    @cached_property
    def word_lengths(self) -> np.ndarray:
        return self.of_words(len)

    @cached_property
    def _grams(self) -> dict:
        return {1: (self.numbers[:MAX_WORDS], None, None)}

    def ngrams(self, n: int):
        """(ids, later, top): ids[i] numbers the n words from i on; later: where n-grams stand that stood
        earlier too; top: (how often the most frequent stands, where first).

        An n-gram is the (n-1)-gram at its start and one word more. Both numbers and the position go into one
        integer; sorted, equal n-grams lie side by side, first come first. Exact: no hash.
        """
        if n not in self._grams:
            starts, later, _ = self.ngrams(n - 1)
            self._grams[n] = self._longer(starts, n) if n == 2 or len(later) else NO_REPEATS
        return self._grams[n]

    def _longer(self, starts: np.ndarray, n: int):
        bits = len(self._grams[1][0]).bit_length()
        ids = (starts[:-1] << bits) | self.numbers[n - 1:MAX_WORDS]
        merged = np.sort((ids << bits) | np.arange(len(ids)))
        position, gram = merged & ((1 << bits) - 1), merged >> bits
        new = np.ones(len(gram), bool)
        np.not_equal(gram[1:], gram[:-1], out=new[1:])
        if new.all():
            return NO_REPEATS
        number = np.empty_like(position)
        number[position] = np.cumsum(new) - 1
        counts = np.bincount(number)
        top = counts.max()
        return number, position[~new], (top, position[new][counts == top].min())


NO_REPEATS = None, np.zeros(0, np.int64), (1, 0)  # then no longer n-gram stands twice either


# ---- 2. Measures: length and words (Gopher) ----------------------------------------------------------------

STOP_WORDS = {"the", "be", "to", "of", "and", "that", "have", "with"}
PUNCTUATION = "!\"'(),-.:;?[]{}‘’“”"
BULLETS = ("•", "‣", "▪", "●", "*", "-", "–")


def words(text: Text) -> int:
    return len(text.words)


def word_length(text: Text) -> float | None:
    """Mean characters a word. Gopher's rule, for words between spaces."""
    return float(text.word_lengths.mean()) if text.words and text.is_spaced else None


def stop_words(text: Text) -> int | None:
    """How many of Gopher's eight English stop words occur: prose has them, lists of keywords do not."""
    if text.words and not text.is_spaced:
        return None
    return len({word.strip(PUNCTUATION).lower() for word in text.vocabulary} & STOP_WORDS)


def letter_words(text: Text) -> float | None:
    """Share of words with a letter."""
    return float(text.of_words(has_letter).mean()) if text.words else None


def has_letter(word: str) -> bool:
    return word.isalpha() or any(map(str.isalpha, word))


def hashes(text: Text) -> float | None:
    return share(text.text.count("#"), len(text.words))


def ellipses(text: Text) -> float | None:
    return share(text.text.count("...") + text.text.count("…"), len(text.words))


def bullet_lines(text: Text) -> float | None:
    return share(sum(line.startswith(BULLETS) for line in text.lines), len(text.lines))


def ellipsis_lines(text: Text) -> float | None:
    return share(sum(line.endswith(("...", "…")) for line in text.lines), len(text.lines))


def share(part: float, whole: float) -> float | None:
    return part / whole if whole else None


# ---- 3. Measures: repetition (Gopher's table A1, Dolma) ----------------------------------------------------


def repeated(kind: str, of: str, text: Text) -> float | None:
    """Share of lines or paragraphs that stood earlier in the text too, of their number or of all
    characters."""
    parts = getattr(text, kind)
    if of == "number":
        return share(len(parts) - len(set(parts)), len(parts))
    return share(sum(map(len, parts)) - sum(map(len, set(parts))), len(text.text))


def top_ngram(n: int, text: Text) -> float | None:
    """Share of the characters that the most frequent n-gram of words takes, all its places together.

    Of equally frequent ones the first. Its length is that of its words and the spaces between. One that
    stands once repeats nothing and counts 0, so that a text of six words passes; unlike DataTrove.
    """
    if len(text.words) < n:
        return None
    count, first = text.ngrams(n)[2]
    if count == 1:
        return 0.0
    spaces = n - 1 if text.is_spaced else 0
    return int(count) * (int(text.word_lengths[first:first + n].sum()) + spaces) / len(text.text)


def repeated_ngrams(n: int, text: Text) -> float | None:
    """Share of the characters in words of n-grams that stood earlier too, each word counted once."""
    if len(text.words) < n:
        return None
    later = text.ngrams(n)[1]
    if not len(later):
        return 0.0
    covered = np.zeros(len(text.words) + 1, np.int64)
    covered[later] += 1  # an n-gram opens here
    covered[later + n] -= 1  # and closes before here; each position is in `later` once
    return int(text.word_lengths[np.cumsum(covered[:-1]) > 0].sum()) / len(text.text)


def word_run(text: Text) -> int:
    """The longest run of one and the same word."""
    changes = np.flatnonzero(text.numbers[1:] != text.numbers[:-1]) + 1
    return int(np.diff(np.concatenate(([0], changes, [len(text.words)]))).max())


def same_sentence(text: Text) -> int:
    """How often the most frequent line or sentence stands in the text."""
    lines, sentences = Counter(text.lines), Counter(text.sentences)
    return max([*lines.values(), *sentences.values()], default=0)


# ---- 4. Measures: what is no prose (C4, Dolma) -------------------------------------------------------------

TAGS = ("a abbr article aside b blockquote body br button center code dd div dl dt em font footer form frame "
        "h[1-6] head header hr html i iframe img input label li link main meta nav ol option p param pre s "
        "script section select small span strike strong style sub sup table tbody td textarea tfoot th thead "
        "title tr u ul video")
# An entity without its semicolon is a query: ?a=1&copy=2
HTML = re.compile(rf"</?(?:{TAGS.replace(' ', '|')})(?:\s[^<>]{{0,1000}})?\s*/?>|<!--|<!doctype\b"
                  r"|&(?:nbsp|amp|lt|gt|quot|copy|#\d{1,7}|#x[0-9a-f]{1,6});", re.IGNORECASE)


def html(text: Text) -> int:
    """Tags, comments and entities of HTML that an extractor left behind."""
    if "<" not in text.text and "&" not in text.text:
        return 0
    return sum(1 for _ in HTML.finditer(text.text))


def sentences(text: Text) -> int:
    return len(text.sentences)


def curly_brackets(text: Text) -> int:
    """Code, to C4: a natural language hardly uses them."""
    return text.text.count("{")


def lorem_ipsum(text: Text) -> int:
    return text.text.lower().count("lorem ipsum")


CITATION = re.compile(r"\[(?:\d+|edit|citation needed)\]")
TERMINAL = (".", "?", "!", '"', "”", "。", "？", "！", "」", "』")
POLICIES = ("terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies",
            "use cookies")


def kept_lines(text: str, min_words: int = 3) -> tuple[str, int]:
    """(the text without the lines that C4 drops, and without marks of citation; how many it dropped).

    A line stays if it ends in terminal punctuation, but not in an ellipsis, has min_words words and none over
    1,000 characters, and speaks neither of Javascript nor of cookies and terms. A change to a text rather
    than a reason against it: for pages of the web alone, before quality_problems. The paper has 5 sentences a
    page and 3 words a line, its published code 3 and 5; ours are the paper's.
    """
    kept, dropped = [], 0
    for line in text.split("\n"):
        line = CITATION.sub("", line).strip()
        lower = line.lower()
        parts = Text(line, {}).words
        if (line.endswith(TERMINAL) and not line.endswith("...") and len(parts) >= min_words
                and max(map(len, parts)) <= 1000 and "javascript" not in lower
                and not any(policy in lower for policy in POLICIES)):
            kept.append(line)
        else:
            dropped += bool(line)
    return "\n".join(kept), dropped


# ---- 5. Measures: forums and code --------------------------------------------------------------------------


def score(text: Text) -> float | None:
    """What the readers of a forum gave: the document's key "score"."""
    value = text.document.get("score")
    try:
        return None if value is None or isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        return None


def longest_line(text: Text) -> int:
    return max(map(len, text.text.split("\n")))


def mean_line(text: Text) -> float:
    return len(text.text) / (text.text.count("\n") + 1)


def letters(text: Text) -> float | None:
    """Share of letters among all that is not white space."""
    return share_of_kind(text, str.isalpha, string.ascii_letters)


def alphanumeric(text: Text) -> float | None:
    """Share of letters and digits among all that is not white space."""
    return share_of_kind(text, str.isalnum, string.ascii_letters + string.digits)


def share_of_kind(text: Text, is_kind: Callable[[str], bool], ascii_kind: str) -> float | None:
    """ASCII is counted in C, by what deleting it takes away; other characters one by one."""
    data = text.text.encode("ascii", "ignore")
    found = len(data) - len(data.translate(None, ascii_kind.encode()))
    if not text.text.isascii():
        found += sum(map(is_kind, "".join(NOT_ASCII.findall(text.text))))
    return share(found, sum(map(len, text.text.split())))


NOT_ASCII = re.compile(r"[^\0-\x7f]+")


GENERATED = re.compile(r"auto-?\s?generated|automatically generated|@generated|machine generated"
                       r"|generated (?:automatically )?(?:by|from|using)\b"
                       r"|do not (?:edit|modify)", re.IGNORECASE)
COMMENT = re.compile(r"^\s*(?:#|//|/?\*|--|;|<!--|\"\"\"|''')")


def generated(text: Text) -> int:
    """Marks of a generated file in the comments of its first ten lines."""
    lines = text.text[:2000].split("\n")[:10]
    return sum(1 for line in lines if COMMENT.match(line) and GENERATED.search(line))


# ---- 6. The tables -----------------------------------------------------------------------------------------

GOPHER_QUALITY = {
    "words": Rule(words, 50, 100_000),
    "word_length": Rule(word_length, 3, 10),
    "hashes": Rule(hashes, None, 0.1),
    "ellipses": Rule(ellipses, None, 0.1),
    "bullet_lines": Rule(bullet_lines, None, 0.9),
    "ellipsis_lines": Rule(ellipsis_lines, None, 0.3),
    "letter_words": Rule(letter_words, 0.8),
    "stop_words": Rule(stop_words, 2),
}
GOPHER_REPETITION = {
    "repeated_lines": Rule(partial(repeated, "lines", "number"), None, 0.30),
    "repeated_paragraphs": Rule(partial(repeated, "paragraphs", "number"), None, 0.30),
    "repeated_line_characters": Rule(partial(repeated, "lines", "characters"), None, 0.20),
    "repeated_paragraph_characters": Rule(partial(repeated, "paragraphs", "characters"), None, 0.20),
    **{f"top_{n}_gram": Rule(partial(top_ngram, n), None, high) for n, high in
       ((2, 0.20), (3, 0.18), (4, 0.16))},
    **{f"repeated_{n}_grams": Rule(partial(repeated_ngrams, n), None, high) for n, high in
       ((5, 0.15), (6, 0.14), (7, 0.13), (8, 0.12), (9, 0.11), (10, 0.10))},
}
RUNS = {  # Dolma: over 100 repeats of a word or sentence
    "word_run": Rule(word_run, None, 100),
    "same_sentence": Rule(same_sentence, None, 100),
}
C4 = {
    "sentences": Rule(sentences, 5),
    "curly_brackets": Rule(curly_brackets, None, 0),
    "lorem_ipsum": Rule(lorem_ipsum, None, 0),
}
HTML_LEFT = {"html": Rule(html, None, 0)}

WEB = GOPHER_QUALITY | C4 | HTML_LEFT | RUNS | GOPHER_REPETITION
ENCYCLOPEDIA = {"words": Rule(words, 25)} | HTML_LEFT | RUNS
FORUM = {"score": Rule(score, 3)} | HTML_LEFT | RUNS
CODE = {
    "longest_line": Rule(longest_line, None, 1000),
    "mean_line": Rule(mean_line, None, 100),
    "letters": Rule(letters, 0.25),
    "alphanumeric": Rule(alphanumeric, 0.40),
    "generated": Rule(generated, None, 0),
}
TABLES = {"web": WEB, "encyclopedia": ENCYCLOPEDIA, "forum": FORUM, "code": CODE}


def adjusted(rules: Mapping[str, Rule], changes: Iterable[str]) -> dict[str, Rule]:
    """The table with its bounds changed: "words=20:1000", "words=20:" (open above), "html=:5", "html=off".

    Raises UserError for a rule that the table has not, and for bounds that are no numbers.
    """
    table = dict(rules)
    for change in changes:
        name, equals, bounds = change.partition("=")
        if name not in rules:
            raise UserError(f"rule {name!r} is not one of {', '.join(rules)}")
        low, colon, high = bounds.partition(":")
        try:
            if bounds == "off":
                table.pop(name, None)
            elif not colon:
                raise ValueError
            else:
                limits = (number(word) if word else None for word in (low, high))
                table[name] = Rule(rules[name].measure, *limits)
        except ValueError:
            raise UserError(f"rule {change!r} is not NAME=LOW:HIGH, either of which may be empty, or "
                            f"NAME=off") from None
    return table


def number(word: str) -> float:
    value = float(word)
    if value != value:
        raise ValueError
    return int(value) if value.is_integer() else value


# ---- 7. The command line -----------------------------------------------------------------------------------


@dataclass
class Settings:
    input: tuple[str, ...] = ()  # files, folders (.jsonl .txt .md .py, also .gz); none: Python's library
    rules: str = "code"  # the table: web, encyclopedia, forum or code
    change: tuple[str, ...] = ()  # bounds to change: words=20:1000 html=off
    examples: int = 3  # documents shown for each reason

    def __post_init__(self):
        config.require(self, rules=set(TABLES), examples=(0, None))
        adjusted(TABLES[self.rules], self.change)


def main():
    settings = config.parse(Settings)
    config.show(settings)
    rules = adjusted(TABLES[settings.rules], settings.change)
    reasons, examples, total = Counter(), {}, Counter()
    for document in corpus(settings.input):
        problems = quality_problems(document["text"], rules, document)
        total.update(documents=1, dropped=bool(problems))
        for problem in problems:
            name = problem.partition(":")[0]
            reasons[name] += 1
            examples.setdefault(name, []).append(f"{document['source']} ({problem.partition(': ')[2]})")
    for name, count in reasons.most_common():
        print(f"{name:30} {count:7,}   {'; '.join(examples[name][:settings.examples])}")
    print(f"dropped for one reason or more: {total['dropped']:,} of {total['documents']:,} documents")


if __name__ == "__main__":
    config.run(main)
