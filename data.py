"""Raw text -> clean, unique documents -> token shards -> batches.

    python data.py                                      # the source of Python's own standard library, offline
    python data.py --input my_texts/ more.jsonl.gz --out runs/mine --vocab_size 32768

With no arguments it keeps 29.2 of 31.5 MB, 8.2 million tokens, in 14 s of processor time (Python 3.11).

A document is read (JSON Lines, .txt, .md, .py, each also .gz, and folders of these), cleaned, dropped if it
is empty, a generated table or an exact duplicate, sent to `train` or `val` by the hash of its content, and
turned into tokens. Because the hash decides, the split depends neither on order nor on the other documents.
Everything streams: all that grows with the corpus is one digest a document (90 bytes, as a Python integer).

The output folder holds train.jsonl and val.jsonl (the cleaned documents), tokenizer.json, train.bin and
val.bin (raw little-endian ids of tokens, end-of-text after each document) and meta.json (counts, checksums).
`Batches` (batches.py) serves windows of those tokens as a pure function of (seed, step).
"""
import gzip
import hashlib
import io
import json
import lzma
import math
import os
import re
import shutil
import sysconfig
import time
import tokenize
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
from tqdm import tqdm

import bpe
import config
import metaspace
from batches import IGNORE, SPLITS, Batches, Wrapped, file_checksum, open_shard  # noqa: F401: public names of
from mixture import Replay                                                       # noqa: F401: this file too
from bpe import END_OF_TEXT, Tokenizer
from config import UserError

SUFFIXES = (".jsonl", ".json", ".txt", ".md", ".py")  # .json: one document a line, as in .jsonl


@dataclass
class Settings:
    input: tuple[str, ...] = ()  # files, folders (.jsonl .txt .md .py, also .gz); none: Python's library
    out: str = "runs/data"  # the folder to write
    vocab_size: int = 4096  # tokens of the tokenizer trained on the train split; small, for a small model
    tokenizer: str | None = None  # a tokenizer.json, or its folder, to use instead of training one
    val_fraction: float = 0.03  # share of documents held out, chosen by the hash of their content
    workers: int | None = None  # processes that tokenize; none: one for each usable core
    on_bad_line: str = "stop"  # a line or file that cannot be read: stop, or skip it and count it
    overwrite: bool = False  # replace an existing output folder, once the new one is whole

    def __post_init__(self):
        config.require(self, vocab_size=(257, None), val_fraction=(1e-6, 0.5), workers=(1, None),
                       on_bad_line={"stop", "skip"})


def prepare(settings: Settings) -> dict:
    """Write the folder `settings.out`, whole or not at all, and return its meta (what meta.json holds).

    Raises UserError if the folder exists (without overwrite), if no text is left of the input, or if the
    tokenizer does not fit.
    """
    started = time.perf_counter()
    # A given tokenizer is loaded first: that it does not fit is better told before the work than after it.
    tokenizer = load_tokenizer(Path(settings.tokenizer)) if settings.tokenizer else None
    print(f"worker processes: {settings.workers or bpe.cores()}")
    with whole_folder(Path(settings.out), settings.overwrite) as folder:
        funnel = split_documents(settings, folder)
        tokenizer = tokenizer or train_tokenizer(settings, folder)
        tokenizer.save(folder / "tokenizer.json")
        meta = write_shards(folder, tokenizer, settings.workers)
        meta |= {"funnel": funnel, "settings": asdict(settings)}
        with config.open_whole(folder / "meta.json", "w") as file:
            json.dump(meta, file, indent=1, ensure_ascii=False)
    print_funnel(meta)
    print(f"{time.perf_counter() - started:.1f} s; written to {settings.out}")
    return meta


# ---- 1. Reading --------------------------------------------------------------------------------------------


def read_documents(paths: Iterable[str | Path], on_bad_line: str = "stop") -> Iterator[dict]:
    """Yield every document of `paths`: {"text": …, "source": where it came from, and the keys it had}.

    A path is a file, or a folder to search in sorted order; hidden files and __pycache__ are passed over.
    on_bad_line: "stop" raises UserError with file and line; "skip" goes on, and tells at the end of how many.
    """
    return accepted(read_files(find_files(paths)), on_bad_line, {})


@dataclass
class Rejected:
    """A line or file that is no document: why in a word, why in a line, and its size in bytes."""
    reason: str
    message: str
    num_bytes: int


def accepted(items: Iterable[dict | Rejected], on_bad_line: str, funnel: dict) -> Iterator[dict]:
    """Yield the documents among `items`; stop at a rejected one, or count it in `funnel` and go on."""
    first, skipped = None, 0
    for item in items:
        if not isinstance(item, Rejected):
            yield item
        elif on_bad_line == "stop":
            raise UserError(f"{item.message}; correct it, or pass --on_bad_line skip")
        else:
            first, skipped = first or item, skipped + 1
            count(funnel, item.reason, item.num_bytes)
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


def read_files(files: Iterable[tuple[Path, str]], read_json: Callable | None = None
               ) -> Iterator[dict | Rejected]:
    """Yield what the files hold: a document for each line of JSON Lines, one for each other file.

    read_json(file, path, source): another reader of .jsonl and .json, default read_json_lines.
    """
    for path, source in files:
        read = (read_json or read_json_lines) if content_suffix(path) in (".jsonl", ".json") else read_text
        try:
            with (gzip.open if path.name.lower().endswith(".gz") else open)(path, "rb") as file:
                yield from read(file, path, source)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            yield Rejected("gzip", f"{path}: not a whole gzip file ({error})", path.stat().st_size)


def read_json_lines(file: io.BufferedIOBase, path: Path, source: str) -> Iterator[dict | Rejected]:
    for number, line in enumerate(file, start=1):
        if line.strip():
            try:
                document = parse_line(line)
                document.setdefault("source", f"{source}:{number}")
                yield document
            except (ValueError, RecursionError) as error:
                yield Rejected("json", f"{path}:{number}: {error}", len(line))


def parse_line(line: bytes) -> dict:
    """Return the document that a line of JSON spells. Raises ValueError, its message saying what is wrong."""
    document = parse_json(line)
    if not isinstance(document, dict):
        raise ValueError(f'an object with a string "text" is expected, not {type(document).__name__}')
    if not isinstance(document.get("text"), str):
        kinds = {key: type(value).__name__ for key, value in document.items()}
        raise ValueError(f'an object with a string "text" is expected, not one of {kinds}')
    return document


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


def read_text(file: io.BufferedIOBase, path: Path, source: str) -> Iterator[dict | Rejected]:
    data = file.read()
    try:
        if b"\0" in data:
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


# ---- 2. Cleaning, dropping, splitting ----------------------------------------------------------------------

TABLE_CHARACTERS, TABLE_SHARE = 8192, 2 / 3
TABLE_ROW = re.compile(r"""^[ \t\[({]*(?:[rRbBuU]{0,2}(?!'''|\"\"\")['"]|[-+]?\d).*$""", re.MULTILINE)
RULES = f"""\
dropped are documents that are
  empty       nothing but white space
  table       Python of {TABLE_CHARACTERS:,} characters or more, over {TABLE_SHARE:.0%} of them on lines that
              begin with a string or a number, as in code pages; tests are kept, they are code
  duplicate   equal to an earlier document
and lines and files that cannot be read: json, encoding, binary, gzip"""


def clean(text: str) -> str:
    """Return the text with \\n for every newline and without a byte-order mark; all else stays as it was."""
    return text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")


def content_hash(text: str) -> int:
    """Return 128 bits that stand for the text, the same on every machine."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8"), digest_size=16).digest(), "big")


def is_table(text: str) -> bool:
    """True where Python source is a generated table: many near-copies, with nothing to learn but digits.

    In the libraries of Python 3.10 to 3.13 tables score 0.75 to 0.98, and the code next to them at most 0.61.
    """
    in_rows = sum(row.end() - row.start() for row in TABLE_ROW.finditer(text))
    return len(text) >= TABLE_CHARACTERS and in_rows > TABLE_SHARE * len(text)


def kept_documents(documents: Iterable[dict], funnel: dict) -> Iterator[dict]:
    """Yield the documents worth training on, cleaned; count all of them in `funnel`, by reason."""
    seen = set()
    for document in documents:
        text = clean(document["text"])
        digest = content_hash(text)
        is_python = str(document["source"]).endswith((".py", ".py.gz"))
        reason = ("empty" if not text.strip() else
                  "table" if is_python and is_table(text) else
                  "duplicate" if digest in seen else
                  "kept")  # rules of quality and near-duplicates belong just before this, ahead of the split
        count(funnel, reason, len(text.encode("utf-8")))
        if reason == "kept":
            seen.add(digest)
            yield document | {"text": text}


def split_documents(settings: Settings, folder: Path) -> dict:
    """Write train.jsonl and val.jsonl; return the funnel: read, kept or a reason -> [documents, bytes]."""
    print(RULES)
    funnel = {}
    # Python's tests hold files that are undecodable on purpose: in the default corpus those are skipped.
    files, on_bad_line = ((find_files(settings.input), settings.on_bad_line) if settings.input else
                          (standard_library(), "skip"))
    documents = progress(accepted(read_files(files), on_bad_line, funnel), "read")
    threshold = int(settings.val_fraction * 2**128)
    lowest, highest = write_splits(folder, kept_documents(documents, funnel), threshold)
    train, val = (folder / f"{split}.jsonl" for split in SPLITS)
    if "kept" not in funnel:
        reasons = ", ".join(f"{documents:,} {reason}" for reason, (documents, _) in funnel.items())
        raise UserError(f"no text is left of the input: {reasons or 'it holds no document'}")
    if lowest == highest:
        cut_single_document(train, val, settings.val_fraction)
    elif lowest >= threshold:
        print("few documents: val would be empty, and takes the one with the lowest hash")
        write_splits(folder, stored_documents(train), threshold=lowest + 1)
    elif highest < threshold:
        print("few documents: train would be empty, and takes the one with the highest hash")
        write_splits(folder, stored_documents(val), threshold=highest)
    return {"read": [sum(column) for column in zip(*funnel.values())]} | funnel


def write_splits(folder: Path, documents: Iterable[dict], threshold: int) -> tuple[int, int]:
    """Write documents whose hash is below `threshold` to val.jsonl, the others to train.jsonl.

    Returns the lowest and the highest hash.
    """
    lowest, highest = 2**128, -1
    with (config.open_whole(folder / "train.jsonl", "w") as train,
          config.open_whole(folder / "val.jsonl", "w") as val):
        for document in documents:
            digest = content_hash(document["text"])
            lowest, highest = min(lowest, digest), max(highest, digest)
            (val if digest < threshold else train).write(to_line(document))
    return lowest, highest


def cut_single_document(train: Path, val: Path, val_fraction: float) -> None:
    """Make the last part of the only document the val split: there is no other text to hold out."""
    document = next(stored_documents(train, val))
    text = document["text"]
    if len(text) < 2:
        raise UserError("the input is a single character; training needs more text")
    at = min(max(1, round(len(text) * (1 - val_fraction))), len(text) - 1)
    at = text.rfind("\n", max(0, at - 1000), at) + 1 or at  # at the start of a line, where one is near
    print(f"a single document: the last {len(text) - at:,} of its {len(text):,} characters are the val split")
    write_documents(train, [document | {"text": text[:at]}])
    write_documents(val, [document | {"text": text[at:]}])


# ---- 3. Tokens ---------------------------------------------------------------------------------------------


def load_tokenizer(path: Path) -> Tokenizer:
    """Return the tokenizer in a tokenizer.json or in the folder that holds one."""
    tokenizer = metaspace.load_tokenizer(path / "tokenizer.json" if path.is_dir() else path)
    end_of_text_id(tokenizer)
    print(f"tokenizer: {path}, {tokenizer.vocab_size:,} tokens; --vocab_size plays no part")
    return tokenizer


def train_tokenizer(settings: Settings, folder: Path) -> Tokenizer:
    """Return a tokenizer trained on the train split alone: val is to stay unseen."""
    documents = progress(stored_documents(folder / "train.jsonl"), "train tokenizer")
    return Tokenizer.train((document["text"] for document in documents), settings.vocab_size,
                           special_tokens=END_OF_TEXT[:1], workers=settings.workers)


def end_of_text_id(tokenizer: Tokenizer) -> int:
    """Return the id that ends a document. Raises UserError if the tokenizer has none."""
    for token in END_OF_TEXT:
        if token in tokenizer.special_tokens:
            return tokenizer.special_tokens[token]
    raise UserError(f"the tokenizer has no end-of-text token, one of {' '.join(END_OF_TEXT)}; its special "
                    f"tokens are {' '.join(tokenizer.special_tokens) or 'none'}")


def write_shards(folder: Path, tokenizer: Tokenizer, workers: int | None) -> dict:
    """Write train.bin and val.bin from the .jsonl files in `folder`; return what meta.json says of them."""
    meta = {"dtype": tokenizer.dtype.name, "vocab_size": tokenizer.vocab_size,
            "end_of_text": end_of_text_id(tokenizer), "tokenizer": tokenizer.fingerprint}
    with ThreadPoolExecutor(1) as background:  # a thread suffices: xz and gzip work outside Python's lock
        compressors = background.submit(compressed_bits_per_byte, folder / "val.jsonl")
        for split in SPLITS:
            meta[split] = write_shard(folder, split, tokenizer, workers)
        return meta | {"compressors": compressors.result()}


def write_shard(folder: Path, split: str, tokenizer: Tokenizer, workers: int | None) -> dict:
    """Write the tokens of one split; return its counts, its size in bytes and its checksum."""
    dtype = tokenizer.dtype.newbyteorder("<")
    documents = text_bytes = size = 0
    checksum = hashlib.sha256()
    texts = (document["text"] for document in stored_documents(folder / f"{split}.jsonl"))
    with (config.open_whole(folder / f"{split}.bin", "wb") as file,
          tqdm(desc=f"tokenize {split}", unit="B", unit_scale=True, disable=None) as bar):
        batches = bpe.in_processes(encode_texts, tokenizer, bpe.batches(texts), workers)
        for number, num_bytes, ids in batches:
            content = ids.astype(dtype).tobytes()
            file.write(content)
            checksum.update(content)
            documents, text_bytes, size = documents + number, text_bytes + num_bytes, size + len(content)
            bar.update(num_bytes)
    return {"documents": documents, "text_bytes": text_bytes, "tokens": size // dtype.itemsize,
            "bytes": size, "sha256": checksum.hexdigest()}


def encode_texts(tokenizer: Tokenizer, texts: list[str]) -> tuple[int, int, np.ndarray]:
    """Return (texts, bytes, ids of them in a row, end-of-text after each). Runs in worker processes."""
    end = end_of_text_id(tokenizer)
    ids = [id for text in texts for id in (*tokenizer.encode(text), end)]
    return len(texts), sum(len(text.encode("utf-8")) for text in texts), np.array(ids, tokenizer.dtype)


def compressed_bits_per_byte(path: Path, limit: int = 64 * 2**20) -> dict:
    """Return what xz -9e and gzip -9 need for the texts in a row, in bits a byte: marks for a model to beat.

    Only the first `limit` bytes are compressed; "text_bytes" says how many that was.
    """
    xz = lzma.LZMACompressor(preset=9 | lzma.PRESET_EXTREME)
    gz = zlib.compressobj(9, wbits=31)  # 31: with the header and checksum of a gzip file
    text_bytes = xz_bytes = gz_bytes = 0
    for document in stored_documents(path):
        data = document["text"].encode("utf-8")[:limit - text_bytes]
        text_bytes += len(data)
        xz_bytes += len(xz.compress(data))
        gz_bytes += len(gz.compress(data))
        if text_bytes == limit:
            break
    xz_bytes, gz_bytes = xz_bytes + len(xz.flush()), gz_bytes + len(gz.flush())
    return {"xz": 8 * xz_bytes / text_bytes, "gzip": 8 * gz_bytes / text_bytes, "text_bytes": text_bytes}


# ---- 4. Plumbing -------------------------------------------------------------------------------------------


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


def progress(documents: Iterable[dict], name: str) -> Iterable[dict]:
    return tqdm(documents, name, unit=" documents", disable=None)  # None: no bar where the output is a file


def count(funnel: dict, name: str, num_bytes: int) -> None:
    documents, total = funnel.get(name, (0, 0))
    funnel[name] = [documents + 1, total + num_bytes]


def print_funnel(meta: dict) -> None:
    funnel = meta["funnel"]
    print(f"{'':<20}{'documents':>12}{'bytes of text':>16}{'tokens':>14}{'bytes a token':>15}")
    for name in ("read", *sorted(funnel.keys() - {"read", "kept"}), "kept"):
        documents, size = funnel[name]
        print(f"{name if name in ('read', 'kept') else f'  dropped: {name}':<20}{documents:>12,}{size:>16,}")
    for split in SPLITS:
        documents, size, tokens = (meta[split][key] for key in ("documents", "text_bytes", "tokens"))
        print(f"{'  ' + split:<20}{documents:>12,}{size:>16,}{tokens:>14,}{size / tokens:>15.3f}")
    marks = meta["compressors"]
    print(f"bits per byte of the val text: xz -9e {marks['xz']:.3f}, gzip -9 {marks['gzip']:.3f}"
          f" (on {marks['text_bytes']:,} bytes)")


OUTPUTS = {"train.jsonl", "val.jsonl", "tokenizer.json", "train.bin", "val.bin", "meta.json"}


@contextmanager
def whole_folder(out: Path, overwrite: bool) -> Iterator[Path]:
    """Yield the folder `out`.tmp to write into; it becomes `out` if all goes well, and is removed if not.

    Raises UserError if `out` exists (without overwrite), or holds a file that this program did not write.
    """
    out = out.resolve()
    if out.exists() and not overwrite:
        raise UserError(f"--out {out} exists; pass --overwrite to replace it, or another --out")
    refuse_foreign(out)
    fresh, old = out.with_name(out.name + ".tmp"), out.with_name(out.name + ".old.tmp")
    if old.exists() and not out.exists():
        old.rename(out)  # an earlier run was killed between the two renames below
    for leftover in (fresh, old):
        remove_own(leftover)
    fresh.mkdir(parents=True)
    try:
        yield fresh
        if out.exists():
            out.rename(old)
        fresh.rename(out)
        config.sync_folder(out.parent)
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise
    remove_own(old)


def remove_own(folder: Path) -> None:
    refuse_foreign(folder)
    if folder.exists():
        shutil.rmtree(folder)


def refuse_foreign(folder: Path) -> None:
    """Raise UserError if the folder holds what this program did not write: that is not ours to remove."""
    found = [folder] if folder.is_file() else sorted(folder.iterdir()) if folder.exists() else []
    for path in found:
        if path.is_dir() or path.name.removesuffix(".tmp") not in OUTPUTS:
            raise UserError(f"{path} is not data.py's, so {folder} is not replaced; choose another --out")


def main() -> None:
    settings = config.parse(Settings)
    config.show(settings)
    prepare(settings)


if __name__ == "__main__":
    config.run(main)
