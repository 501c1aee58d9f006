"""Documents: JSON Lines, .txt, .md and .py, each also .gz, and folders of these -> {"text": …, "source": …}.

    for document in read_documents(["my_texts/", "more.jsonl.gz"]): …

One after the other, in the memory of one; a line or file over MOST_BYTES is refused before it is read whole.
Without any input there is a corpus on every machine: the source of Python's own standard library.
"""
import functools
import gzip
import hashlib
import io
import json
import os
import sysconfig
import tokenize
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

import config
from config import UserError

SUFFIXES = (".jsonl", ".json", ".txt", ".md", ".py")  # .json: one document a line, as in .jsonl
MOST_BYTES = 64 * 2**20  # of a document, or a line of JSON: this bounds the memory that reading takes


# ---- 1. Reading --------------------------------------------------------------------------------------------


def read_documents(paths: Iterable[str | Path], on_bad_line: str = "stop") -> Iterator[dict]:
    """Yield every document of `paths`: {"text": …, "source": where it came from, and the keys it had}.

    A path is a file, or a folder to search in sorted order; hidden files and __pycache__ are passed over.
    on_bad_line: "stop" raises UserError with file and line; "skip" goes on, and tells at the end of how many.
    """
    return accepted(read_files(find_files(paths)), on_bad_line, {})


def corpus(paths: Iterable[str | Path]) -> Iterator[dict]:
    """Yield every document of `paths`, with a progress bar; where there are none, the standard library's.

    (The library's tests hold files that are undecodable on purpose: these are skipped.)
    """
    files, on_bad_line = (find_files(paths), "stop") if paths else (standard_library(), "skip")
    return iter(progress(accepted(read_files(files), on_bad_line, {}), "read"))


@dataclass
class Rejected:
    """A line or file that is no document: why in a word, why in a line, and its size in bytes."""
    reason: str
    message: str
    num_bytes: int


def accepted(items: Iterable[dict | Rejected], on_bad_line: str, counts: dict) -> Iterator[dict]:
    """Yield the documents among `items`; stop at a rejected one, or note it in `counts` and go on.

    counts: {reason: [documents, bytes]}.
    """
    first, skipped = None, 0
    for item in items:
        if not isinstance(item, Rejected):
            yield item
        elif on_bad_line == "stop":
            raise UserError(f"{item.message}; correct it, or pass --on_bad_line skip")
        else:
            first, skipped = first or item, skipped + 1
            documents, num_bytes = counts.get(item.reason, (0, 0))
            counts[item.reason] = [documents + 1, num_bytes + item.num_bytes]
    if first:
        print(f"bad lines or files skipped: {skipped:,}; the first: {first.message}")


def visible(name: str) -> bool:
    return not name.startswith(".") and name != "__pycache__"


def importable(name: str) -> bool:
    """True for the names of modules and packages; not for site-packages, lib-dynload, LICENSE.txt."""
    return name.removesuffix(".py").isidentifier() and name != "__pycache__"


def standard_library() -> Iterator[tuple[Path, str]]:
    """Yield (path, source) of every module of this Python's standard library."""
    root = Path(sysconfig.get_path("stdlib"))
    if not (root / "this.py").is_file():
        raise UserError(f"this Python keeps no source of its standard library in {root}; pass --input")
    print(f"corpus: the source of Python's standard library, {root}")
    return ((path, source) for path, source in find_files([root], importable) if source.endswith(".py"))


def find_files(paths: Iterable, keep: Callable[[str], bool] = visible) -> Iterator[tuple[Path, str]]:
    """Yield (path, source) of each readable file; source is the path inside the folder that was named."""
    for path in map(Path, paths):
        if path.is_dir():
            files = 0
            for files, file in enumerate(walk(path, keep), start=1):
                name = os.fsencode(file.relative_to(path).as_posix())
                yield file, name.decode("utf-8", "replace")  # a file name may hold any bytes, JSON may not
            if not files:
                raise UserError(f"no text in {path}: a file {' '.join(SUFFIXES)} (also .gz) is expected")
        elif not path.exists():
            raise UserError(f"{path}: no such file or folder")
        elif content_suffix(path) not in SUFFIXES:
            raise UserError(f"{path}: not a kind that is read: {' '.join(SUFFIXES)} (also .gz)")
        else:
            yield path, path.name


def walk(root: Path, keep: Callable[[str], bool]) -> Iterator[Path]:
    """Yield readable files below `root` in sorted order, each folder once, even where links form a loop."""
    def fail(error: OSError):
        raise error  # os.walk would pass over a folder that it may not open, without a word

    seen = set()
    for folder, subfolders, names in os.walk(root, onerror=fail, followlinks=True):
        real = os.path.realpath(folder)
        new = real not in seen
        seen.add(real)
        subfolders[:] = sorted(filter(keep, subfolders)) if new else []
        for path in (Path(folder, name) for name in sorted(names) if new and keep(name)):
            if content_suffix(path) in SUFFIXES and path.is_file():  # not a pipe, not a dangling link
                yield path


def content_suffix(path: Path) -> str:
    return Path(path.name.lower().removesuffix(".gz")).suffix


def read_files(files: Iterable[tuple[Path, str]], read_json: Callable | None = None, most: int = MOST_BYTES
               ) -> Iterator[dict | Rejected]:
    """Yield what the files hold: a document for each line of JSON Lines, one for each other file.

    read_json(file, path, source): another reader of .jsonl and .json, default read_json_lines. most: bytes of
    a document; one that is larger is rejected, and no more of it is held in memory.
    """
    read_json, read_whole = (read_json or functools.partial(read_json_lines, most=most),
                             functools.partial(read_text, most=most))
    for path, source in files:
        read = read_json if content_suffix(path) in (".jsonl", ".json") else read_whole
        try:
            with (gzip.open if path.name.lower().endswith(".gz") else open)(path, "rb") as file:
                yield from read(file, path, source)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            yield Rejected("gzip", f"{path}: not a whole gzip file ({error})", path.stat().st_size)


def read_json_lines(file: io.BufferedIOBase, path: Path, source: str, most: int = MOST_BYTES,
                    parse: Callable[[bytes], dict] | None = None) -> Iterator[dict | Rejected]:
    """parse: what makes a document of a line; default parse_line."""
    for number, (line, size) in enumerate(bounded_lines(file, most), start=1):
        if size > most:
            yield too_large(f"{path}:{number}: a line", size, most)
        elif line.strip():
            try:
                document = (parse or parse_line)(line)
                document.setdefault("source", f"{source}:{number}")
                yield document
            except (ValueError, RecursionError) as error:
                yield Rejected("json", f"{path}:{number}: {error}", len(line))


def bounded_lines(file: io.BufferedIOBase, most: int) -> Iterator[tuple[bytes, int]]:
    """Yield (line, its bytes); of a line of more than `most` bytes only the last are held."""
    while line := file.readline(most + 1):
        size = len(line)
        while not line.endswith(b"\n") and len(line) == most + 1 and (line := file.readline(most + 1)):
            size += len(line)
        yield line, size


def too_large(what: str, size: int, most: int) -> Rejected:
    return Rejected("large", f"{what} of {size:,} bytes, over --most_bytes {most:,}", size)


def parse_line(line: bytes) -> dict:
    """Return the document that a line of JSON spells. Raises ValueError, its message saying what is wrong."""
    document = parse_json(line)
    if not isinstance(document, dict):
        raise ValueError(f'an object with a string "text" is expected, not {type(document).__name__}')
    if not isinstance(document.get("text"), str):
        kinds = {key: type(value).__name__ for key, value in document.items()}
        raise ValueError(f'an object with a string "text" is expected, not one of {kinds}')
    return document


def parse_item(line: bytes) -> dict:
    """Return the item of a benchmark: its "text", or all that its strings say: question, choices, answer."""
    item = parse_json(line)
    if isinstance(item, dict) and isinstance(item.get("text"), str):
        return item
    return {"text": "\n".join(strings_in(item))}


def strings_in(value) -> Iterator[str]:
    """Yield the strings in what JSON spelt, in their order; not the names of keys."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (dict, list)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from strings_in(part)


def parse_json(content: bytes):
    """Return what a line (or file) of JSON spells. Raises ValueError, also for what UTF-8 cannot write."""
    text = content.decode("utf-8").removeprefix("\ufeff")
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        line = f" of line {error.lineno}" if error.lineno > 1 else ""  # where a whole file is one value
        raise ValueError(f"not JSON: {error.msg} at column {error.colno}{line}") from None
    if r"\u" in text:  # JSON can spell half of a surrogate pair; UTF-8 cannot
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    return value


def read_text(file: io.BufferedIOBase, path: Path, source: str, most: int = MOST_BYTES
              ) -> Iterator[dict | Rejected]:
    data = file.read(most + 1)
    try:
        if len(data) > most:
            size = len(data) + sum(len(block) for block in iter(lambda: file.read(2**20), b""))
            yield too_large(f"{path}: a document", size, most)
        elif b"\0" in data:
            message = f"{path}: byte {data.index(0)} is NUL: a binary file, or UTF-16"
            yield Rejected("binary", message, len(data))
        else:
            text = data.decode(python_encoding(data) if content_suffix(path) == ".py" else "utf-8")
            text.encode("utf-8")  # a declared utf-7 or unicode_escape can give half of a surrogate pair
            yield {"text": text, "source": source}
    except (UnicodeError, LookupError) as error:  # the message of a decoding error holds the byte's position
        yield Rejected("encoding", f"{path}: {error}", len(data))


def python_encoding(data: bytes) -> str:
    """Return the encoding that a Python source declares (PEP 263), UTF-8 where it declares none."""
    try:
        return tokenize.detect_encoding(io.BytesIO(data).readline)[0].replace("utf-8-sig", "utf-8")
    except SyntaxError as error:
        data.decode("utf-8")  # no declaration, and not UTF-8: this error names the byte
        raise LookupError(error.msg) from None


def progress(documents: Iterable[dict], name: str) -> Iterable[dict]:
    return tqdm(documents, name, unit=" documents", disable=None)  # None: no bar where the output is a file


def digest(text: str, size: int = 16) -> bytes:
    """`size` bytes that stand for the text, the same on every machine."""
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=size).digest()


# ---- 2. Writing --------------------------------------------------------------------------------------------


def write_documents(path: str | Path, documents: Iterable[dict]) -> None:
    """Write JSON Lines, gzipped if the name ends in .gz; the file appears whole or not at all."""
    lines = (to_line(document).encode("utf-8") for document in documents)
    with config.open_whole(path, "wb") as file:
        if Path(path).name.lower().endswith(".gz"):
            with gzip.GzipFile("", "wb", fileobj=file, mtime=0) as packed:  # no time: same bytes again
                packed.writelines(lines)
        else:
            file.writelines(lines)


def to_line(document: dict) -> str:
    return json.dumps(document, ensure_ascii=False) + "\n"


def stored_documents(*paths: Path) -> Iterator[dict]:
    """Yield the documents of JSON Lines files that this program wrote."""
    for path in paths:
        with open(path, encoding="utf-8", newline="\n") as file:
            yield from map(json.loads, file)
