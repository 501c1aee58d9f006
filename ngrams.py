"""A text as numbers: its n-grams of characters and of words, hashed into a fixed number of buckets.

    >>> buckets = character_ngrams("the cat", lengths=(3,), bits=18)      # the, he_, e_c, _ca, cat
    >>> counts = np.bincount(buckets, minlength=1 << 18)

With hashing there is no vocabulary to build, to store, or to run out of (Weinberger et al. 2009,
https://arxiv.org/abs/0902.2206); that two n-grams may share a bucket costs little. The hash is stated below,
so a model that was saved means the same on every machine. languages.py and classifier.py learn from these;
the texts that they learn from by default, and the file that they are saved to, are here too.
"""
import json
import re
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np

from config import UserError, open_whole
from documents import corpus
from quality import STOP_WORDS

MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # 2^64 over the golden ratio, odd: Knuth's multiplicative hash
SHIFT = np.uint64(29)


def character_ngrams(text: str, lengths: Iterable[int] = (1, 2, 3, 4), bits: int = 18) -> np.ndarray:
    """The bucket of each n-gram of characters, in small letters, one space for all white space."""
    plain = f" {' '.join(text.lower().split())} "
    codes = np.frombuffer(plain.encode("utf-32-le", "surrogatepass"), np.uint32).astype(np.uint64)
    return hashed(codes, lengths, bits)


def word_ngrams(text: str, lengths: Iterable[int] = (1, 2), bits: int = 18) -> np.ndarray:
    """The bucket of each n-gram of words, for all lengths; a word is letters or digits, or one sign."""
    codes = {}
    for word in (words := WORD.findall(text.lower())):
        if word not in codes:
            codes[word] = zlib.crc32(word.encode("utf-8", "surrogatepass"))
    return hashed(np.fromiter(map(codes.__getitem__, words), np.uint64, len(words)), lengths, bits)


WORD = re.compile(r"[^\W\d_]+|\d+|[^\w\s]|_")


def hashed(codes: np.ndarray, lengths: Iterable[int], bits: int) -> np.ndarray:
    """Buckets below 2^bits for the n-grams of a sequence of numbers: h(x1 … xn) = mix(h(x1 … xn-1) + xn)."""
    found, state = [np.zeros(0, np.int64)], np.zeros(len(codes), np.uint64)
    for n in range(1, max(lengths) + 1):
        if n > len(codes):
            break
        state = (state[:len(codes) - n + 1] + codes[n - 1:]) * MULTIPLIER  # wraps modulo 2^64, as meant
        state ^= state >> SHIFT
        if n in lengths:
            found.append((state * MULTIPLIER >> np.uint64(64 - bits)).astype(np.int64))
    return np.concatenate(found)


# ---- The texts of the default corpus -----------------------------------------------------------------------

DOCSTRING = re.compile(r'"""(.+?)"""', re.DOTALL)
COMMENTS = re.compile(r"(?:^[ \t]*#[^\n]*\n)+", re.MULTILINE)


def prose(paths: Iterable[str] = (), least: int = 200, most: int = 2000) -> Iterator[dict]:
    """Yield {"text", "source"}: pieces of prose of `least` to `most` characters.

    From files that are named: their documents, cut. From Python's library: paragraphs of docstrings and of
    comments, joined to that length; those that read as prose, with stop words and few signs.
    """
    for document in corpus(paths):
        if paths:
            texts = [document["text"]]
        else:
            strings = DOCSTRING.findall(document["text"])
            strings += (block.replace("#", " ") for block in COMMENTS.findall(document["text"]))
            parts = (part for string in strings for part in re.split(r"\n\s*\n", string) if is_prose(part))
            texts = ["\n\n".join(dict.fromkeys(" ".join(part.split()) for part in parts))]
        for text in texts:
            for start in range(0, len(text), most):
                piece = text[start:start + most].strip()
                if len(piece) >= least:
                    yield {"text": piece, "source": document["source"]}


def is_prose(paragraph: str) -> bool:
    words = paragraph.split()
    plain = sum(word.strip(".,;:'\"()").isalpha() for word in words)
    return len(words) >= 8 and plain > 0.8 * len(words) and len(STOP_WORDS.intersection(words)) >= 2


# ---- Files of arrays ---------------------------------------------------------------------------------------


def save_arrays(path, kind: str, arrays: Mapping[str, np.ndarray], about: dict):
    """Write arrays and what JSON can hold into one .npz file, whole or not at all."""
    header = np.frombuffer(json.dumps({"kind": kind, **about}, ensure_ascii=False).encode(), np.uint8)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with open_whole(path) as file:
        np.savez(file, header=header, **arrays)


def load_arrays(path, kind: str) -> tuple[dict[str, np.ndarray], dict]:
    """(arrays, about) of save_arrays. Raises UserError for a file of another kind; never unpickles."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        about = json.loads(arrays.pop("header").tobytes().decode())
        found = about["kind"]
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; it is written by {kind}.py") from None
    except (ValueError, KeyError, TypeError, AttributeError, EOFError, OSError, zipfile.BadZipFile,
            zlib.error):
        raise UserError(f"{path} is not a file that {kind}.py wrote, or is damaged") from None
    if found != kind:
        raise UserError(f"{path} was written by {found}.py, not by {kind}.py")
    return arrays, about
