"""Two tokenizers on the same text: how short do they write it, which tokens are of use, what is cut up?

    python bpe.py compare runs/base/tokenizer.json other/tokenizer.json --text my_texts/ poems.jsonl
    python bpe.py compare gpt2/ cl100k_base.tiktoken --pattern cl100k --show "def f(x): return x ** 2  # 平方"

A token costs a model the same whatever it holds, so bytes a token are what its compute and its context reach.
But they depend on the kind of text: a tokenizer that learned from English spells Chinese in bytes. So text is
counted by kind, line by line: Chinese by its script, numbers where digits are half of a line, code in files
of code but for comments and docstrings, elsewhere by its signs. Without --text: Python's standard library,
and lines of Chinese and of numbers that stand below.
"""
import random
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import regex

import config
from bpe import Tokenizer, checked_text
from config import UserError
from documents import read_documents, read_files, standard_library
from languages import PROSE_IN_CODE, dominant_script, script_counts
from metaspace import load_tokenizer

KINDS = ("English", "code", "Chinese", "numbers", "other")
CODE_FILES = (".py", ".pyi", ".c", ".h", ".cpp", ".js", ".ts", ".rs", ".go", ".java", ".sh")
SIGNS = frozenset("(){}[]=<>;_\\/*+|&^%$#@~`")
CHINESE = """春眠不覺曉,處處聞啼鳥。夜來風雨聲,花落知多少。
床前明月光,疑是地上霜。舉頭望明月,低頭思故鄉。
白日依山盡,黃河入海流。欲窮千里目,更上一層樓。
语言模型从大量的文字中学习下一个词的概率。一个词元平均代表几个字节,取决于分词器学过什么样的文字。
今天天气很好,我们去公园散步,看见许多孩子在湖边放风筝。"""


@dataclass
class Settings:
    tokenizers: tuple[str, ...] = ()  # tokenizer.json or its folder, a folder of GPT-2's two files, .tiktoken
    text: tuple[str, ...] = ()  # documents, as data.py reads them; none: the standard library and a few lines
    show: str | None = None  # a text whose tokens are shown, in colours where the terminal has them
    pattern: str = "cl100k"  # of a .tiktoken file, which does not say where text is cut
    top: int = 5  # how many of the longest tokens, and of the words in most tokens

    def __post_init__(self):
        config.require(self, top=(0, 1000))
        if not self.tokenizers:
            raise UserError("no tokenizer is named: python bpe.py compare A B --text F")
        if self.show is not None:
            config.refuse(self, "is for counting, and --show shows one text", "text", "top")
        if not any(name.endswith(".tiktoken") for name in self.tokenizers):
            config.refuse(self, "is for .tiktoken files, and none is named", "pattern")


def open_tokenizer(path: str, pattern: str) -> Tokenizer:
    """The tokenizer in a file or folder of any kind that can be read here."""
    place = Path(path)
    if place.suffix == ".tiktoken":
        return Tokenizer.from_tiktoken(place, (), pattern)
    if place.is_dir() and not (place / "tokenizer.json").exists() and (place / "merges.txt").exists():
        return Tokenizer.from_gpt2(place / "vocab.json", place / "merges.txt")
    return load_tokenizer(place / "tokenizer.json" if place.is_dir() else place)


# ---- 1. Text by kind ---------------------------------------------------------------------------------------


def kind_of(line: str) -> str:
    """The kind of a line, one of KINDS; "" without a letter or digit: it goes with the line before."""
    letters, visible = script_counts(line), [character for character in line if not character.isspace()]
    digits, signs = sum(map(str.isdigit, visible)), sum(map(SIGNS.__contains__, visible))
    if not letters and not digits:
        return ""
    if 2 * digits >= len(visible):
        return "numbers"
    if signs >= 0.06 * len(visible) and letters["Latin"]:
        return "code"
    return {"Han": "Chinese", "Latin": "English"}.get(dominant_script(letters), "other")


def by_kind(text: str) -> Iterator[tuple[str, str]]:
    """(kind, text) of the parts of a text: as many lines in a row as are of one kind, line ends and all."""
    kind, parts = "", []
    for line in text.splitlines(keepends=True):
        kind = kind_of(line) or kind
        parts.append((kind or "other", line))
    for kind, lines in groupby(parts, key=lambda part: part[0]):
        yield kind, "".join(line for _, line in lines)


def parts_of(document: dict) -> Iterator[tuple[str, str]]:
    """(kind, text) of the parts of a document."""
    text = checked_text(document["text"])
    if not document.get("source", "").endswith(CODE_FILES):
        yield from by_kind(text)
        return
    yield "code", PROSE_IN_CODE.sub("", text)
    for prose in PROSE_IN_CODE.findall(text):
        yield from by_kind(prose)


def documents_of(paths: Iterable[str]) -> Iterator[dict]:
    if paths:
        yield from read_documents(paths)
        return
    yield from (document for document in read_files(standard_library()) if isinstance(document, dict))
    rng = random.Random(0)
    numbers = [f"{rng.randrange(10 ** rng.randrange(1, 12))}\t{rng.uniform(-1000, 1000):.3f}\t"
               f"{rng.randrange(1900, 2030)}-{rng.randrange(1, 13):02}-{rng.randrange(1, 29):02}\n"
               for _ in range(500)]
    yield from ({"text": text} for text in (CHINESE, "".join(numbers)))


# ---- 2. What is counted ------------------------------------------------------------------------------------


@dataclass
class Figures:
    num_bytes: Counter  # by kind
    num_tokens: Counter  # by kind
    used: Counter  # id -> how often


def measure(tokenizers: list[Tokenizer], documents: Iterable[dict]) -> tuple[list[Figures], Counter]:
    """(figures of each tokenizer, the words of the text and how often they occur)"""
    figures, words = [Figures(Counter(), Counter(), Counter()) for _ in tokenizers], Counter()
    for document in documents:
        for kind, text in parts_of(document):
            words.update(WORD.findall(text))
            for tokenizer, of in zip(tokenizers, figures):
                ids = tokenizer.encode(text)
                of.num_bytes[kind] += len(text.encode())
                of.num_tokens[kind] += len(ids)
                of.used.update(ids)
    if not figures[0].used:
        raise UserError("the text is empty: there is nothing to compare; give --text other files")
    return figures, words


# A word of a script that puts spaces between words
WORD = regex.compile(r"[\p{L}--[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}]]+", regex.V1)


def longest_tokens(tokenizer: Tokenizer, top: int) -> list[bytes]:
    """The ordinary tokens of most bytes, without those that are part of a longer one of these."""
    found = []
    for token in sorted(tokenizer.ordinary_vocab().values(), key=lambda token: (-len(token), token)):
        if len(found) == top:
            break
        if not any(token in longer for longer in found):
            found.append(token)
    return found


def most_split(tokenizer: Tokenizer, words: Counter, top: int) -> list[tuple[str, int]]:
    """(word, tokens) of the words that take most tokens, behind a space as in running text."""
    counts = ((word, len(tokenizer.encode(" " + word))) for word in words)
    return sorted(counts, key=lambda item: (-item[1], -words[item[0]], item[0]))[:top]


# ---- 3. What is printed ------------------------------------------------------------------------------------


def table(names: list[str], tokenizers: list[Tokenizer], figures: list[Figures]) -> str:
    """Bytes a token by kind, and the vocabulary: a column a tokenizer."""
    width = max(12, *(len(name) + 2 for name in names))
    rows = [("", *names),
            ("tokens in the vocabulary", *(f"{len(tokenizer.vocab):,}" for tokenizer in tokenizers)),
            ("of these in the text", *(f"{len(of.used) / len(tokenizer.vocab):.1%}"
                                       for tokenizer, of in zip(tokenizers, figures)))]
    for kind in KINDS:
        if size := figures[0].num_bytes[kind]:
            rows.append((f"bytes a token, {kind}", *(f"{size / of.num_tokens[kind]:.3f}" for of in figures),
                         f"{size:,} bytes"))
    total = figures[0].num_bytes.total()
    rows.append(("bytes a token, all", *(f"{total / of.num_tokens.total():.3f}" for of in figures),
                 f"{total:,} bytes"))
    return "\n".join(f"{row[0]:26}" + "".join(f"{cell:>{width}}" for cell in row[1:len(names) + 1])
                     + "".join(f"  {cell:>16}" for cell in row[len(names) + 1:]) for row in rows)


def shown(token: bytes) -> str:
    """A token as it can be read: spaces and line ends too, and many equal characters by their number."""
    text = token.decode("utf-8", errors="replace")
    if len(text) > 4 and len(set(text)) == 1:
        return f"{text[0]!r} x {len(text)}"
    return repr(text if len(text) <= 40 else text[:37] + "…")


def coloured(tokenizer: Tokenizer, text: str, colours: bool) -> str:
    """The text with its tokens set off: by turns in five colours, or by |. Where a character is in several
    tokens, these are one group, which a small number counts.
    """
    groups, waiting = [], []
    for id in tokenizer.encode(text):
        waiting.append(id)
        piece = tokenizer.decode_bytes(waiting)
        if is_whole(piece):
            number = str(len(waiting)).translate(SMALL) if len(waiting) > 1 else ""
            groups.append(piece.decode().replace("\n", "↵\n") + number)
            waiting = []
    if not colours:
        return "|".join(groups)
    return "".join(f"\033[30;{BACKGROUNDS[i % len(BACKGROUNDS)]}m" + group.replace("\n", "\033[0m\n")
                   + "\033[0m" for i, group in enumerate(groups))


SMALL = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")
BACKGROUNDS = ("48;5;153", "48;5;157", "48;5;222", "48;5;217", "48;5;183")  # pale blue, green, orange …


def is_whole(piece: bytes) -> bool:
    try:
        piece.decode()
        return True
    except UnicodeDecodeError:
        return False


def compare(settings: Settings):
    tokenizers = [open_tokenizer(path, settings.pattern) for path in settings.tokenizers]
    if settings.show is not None:
        for path, tokenizer in zip(settings.tokenizers, tokenizers):
            print(f"{path}: {len(tokenizer.encode(settings.show))} tokens\n"
                  f"{coloured(tokenizer, settings.show, sys.stdout.isatty())}")
        return
    names = [str(Path(path)) if len(path) <= 24 else "…" + path[-23:] for path in settings.tokenizers]
    figures, words = measure(tokenizers, documents_of(settings.text))
    print(table(names, tokenizers, figures))
    for name, tokenizer in zip(names, tokenizers):
        longest = ", ".join(map(shown, longest_tokens(tokenizer, settings.top)))
        split = ", ".join(f"{word:.40} {n}" for word, n in most_split(tokenizer, words, settings.top))
        print(f"\n{name}\n  longest tokens: {longest}\n  words in most tokens: {split or 'none'}")


def main(argv=None):
    """argv: the tokenizers, then flags."""
    argv = sys.argv[1:] if argv is None else argv
    named = argv[:1] and not argv[0].startswith("-")
    compare(config.parse(Settings, ["--tokenizers", *argv] if named else argv))


if __name__ == "__main__":
    config.run(main)
