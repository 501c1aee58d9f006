"""Raw text -> clean, unique documents -> token shards.

    python data.py                                      # the source of Python's own standard library, offline
    python data.py --input my_texts/ more.jsonl.gz --out runs/mine --vocab_size 32768
    python data.py --clean                              # with every step of pipeline.py, in about a minute
    torchrun --nproc-per-node 8 data.py --input crawl/ --clean     # the same bytes, by more processes

With no arguments it keeps 29.2 of 31.5 MB, 8.2 million tokens, in 14 s of processor time (Python 3.11).

A document is read (documents.py), cleaned, dropped if it is empty, a generated table or an exact duplicate,
or for what else is asked (pipeline.py); sent to `train` or `val` by the hash of its content; and turned into
tokens. Because the hash decides, the split depends neither on order nor on the other documents. Input files
are taken in shards, and what was done for a shard is kept until all is done (work.py): a run that was killed
goes on from there, and any number of processes can share it.

The output folder holds train.jsonl and val.jsonl (the cleaned documents), tokenizer.json, train.bin and
val.bin (raw little-endian ids of tokens, end-of-text after each document), meta.json (counts, checksums),
and the report of what was dropped and why: report.json, report.html. `Batches` (batches.py) serves windows of
those tokens as a pure function of (seed, step).
"""
import functools
import hashlib
import json
import lzma
import os
import shutil
import time
import zlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
from tqdm import tqdm

import bpe
import config
import funnel
import metaspace
# Some of these names are imported to be names of this file, too (F401)
from batches import IGNORE, SPLITS, Batches, Wrapped, open_shard  # noqa: F401
from bpe import END_OF_TEXT, Tokenizer
from config import UserError
from documents import (Rejected, accepted, content_suffix, digest, find_files,  # noqa: F401
                       parse_json, progress, read_documents, read_files, standard_library,
                       stored_documents, to_line, write_documents)
from mixture import Replay  # noqa: F401
from pipeline import (Cleaning, Tally, clean, is_table, kept_documents, rules, run_passes,  # noqa: F401
                      warn_of_ngram)
from privacy import redact_pii  # noqa: F401
from quality import quality_problems  # noqa: F401
from work import Work, fingerprint, place
from workers import cores, in_processes


@dataclass
class Settings(Cleaning):
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
        self.check_cleaning()


def prepare(settings: Settings) -> dict | None:
    """Write the folder `settings.out`, whole or not at all, and return its meta (what meta.json holds).

    Of several processes (RANK, WORLD_SIZE) all but the first return None. Raises UserError if the folder
    exists (without overwrite), if no text is left of the input, or if the tokenizer does not fit.
    """
    started, (rank, world_size) = time.perf_counter(), place()
    say = print if rank == 0 else lambda *words: None
    # A given tokenizer is loaded first: that it does not fit is better told before the work than after it.
    tokenizer = load_tokenizer(Path(settings.tokenizer)) if settings.tokenizer else None
    workers = settings.workers or max(1, cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    say(f"worker processes: {workers}; {rules(settings)}")
    with whole_folder(Path(settings.out), settings.overwrite, rank) as folder:
        shards = input_shards(settings)
        keys = [fingerprint(steps_key(settings), shard) for shard in shards]
        work = Work(folder / "work", fingerprint(keys), rank, world_size)
        begin(work, shards)
        read = functools.partial(read_shard, settings, shards)
        last, tally = run_passes(settings, work, len(shards), read, keys.__getitem__)
        if rank == 0 and settings.benchmark and not tally.steps["benchmark"]["reasons"]:
            left = stored_documents(*(work.path(last, unit, "jsonl") for unit in range(len(shards))))
            warn_of_ngram(settings, left)
        work.key = fingerprint(work.key, settings.val_fraction, settings.vocab_size, settings.tokenizer)
        split_documents(settings, work, folder, last, len(shards), tally)
        work.once("tokenizer", lambda: (tokenizer or train_tokenizer(settings, folder, workers)).save(
            folder / "tokenizer.json") or {})
        meta = write_shards(folder, load_tokenizer(folder, say=False), workers, work, settings.shard_bytes)
        # The first process ends, and the folder goes, when no other needs it: nor is still to begin.
        work.each("left", world_size, lambda rank: {}, wait=rank == 0)
        if rank > 0:
            return None
        told = funnel.make(tally, asdict(settings))
        meta |= {"funnel": funnel.counts(told), "settings": asdict(settings)}
        funnel.write(folder, told)
        with config.open_whole(folder / "meta.json", "w") as file:
            json.dump(meta, file, indent=1, ensure_ascii=False)
        shutil.rmtree(work.folder)
    print(funnel.table(told))
    print_splits(meta)
    print(f"{time.perf_counter() - started:.1f} s; written to {settings.out}, with report.html")
    return meta


# ---- 1. Shards of the input --------------------------------------------------------------------------------


def input_shards(settings: Settings) -> list[list[tuple[str, str, int, int]]]:
    """The files to read: (path, source, bytes, time of change), in lists of up to shard_bytes, or of one."""
    files = find_files(settings.input) if settings.input else standard_library()
    shards, size = [[]], 0
    for path, source in files:
        stat = path.stat()
        if shards[-1] and size + stat.st_size > settings.shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append((str(path), source, stat.st_size, stat.st_mtime_ns))
        size += stat.st_size
    return shards


def steps_key(settings: Settings) -> dict:
    """What the result of a shard depends on beside its files: the steps, and the files that these read."""
    steps = {field.name: getattr(settings, field.name) for field in fields(Cleaning)}
    named = (settings.languages, settings.perplexity, *settings.classifier, *settings.benchmark)
    changed = [[path, file.stat().st_mtime_ns] for path in filter(None, named)
               for file in (Path(path), *sorted(Path(path).glob("*"))) if file.exists()]
    return steps | {"input": bool(settings.input), "on_bad_line": settings.on_bad_line, "files": changed}


def begin(work: Work, shards: list) -> None:
    """Note what the run reads. Raises UserError where files that an unfinished run has read are gone."""
    if work.rank > 0:
        while not work.path("inputs", None, "json").is_file():
            time.sleep(0.05)
        return
    work.folder.mkdir(exist_ok=True)
    for name in sum(unfinished(work.folder.parent), []):
        if not Path(name).is_file():
            raise UserError(f"{name}, which the unfinished run in {work.folder.parent} has read, is missing; "
                            f"put it back, or delete {work.folder.parent} to do without it")
    with config.open_whole(work.path("inputs", None, "json"), "w") as file:
        json.dump([[name for name, *_ in shard] for shard in shards], file)


def unfinished(folder: Path) -> list[list[str]]:
    """The files of each shard that the unfinished run in a folder reads; [] where there is none."""
    try:
        return json.loads((folder / "work" / "inputs.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []


def read_shard(settings: Settings, shards: list, unit: int, tally: Tally) -> Iterator[dict]:
    """Yield the documents of a shard, cleaned; what cannot be read stops the run, or is counted."""
    # Python's tests hold files that are undecodable on purpose: in the default corpus those are skipped.
    on_bad_line = settings.on_bad_line if settings.input else "skip"
    files = ((Path(path), source) for path, source, *_ in shards[unit])
    for document in accepted(read_files(files, most=settings.most_bytes), on_bad_line, tally.rejected):
        yield document | {"text": clean(document["text"])}


# ---- 2. Splitting ------------------------------------------------------------------------------------------


def content_hash(text: str) -> int:
    """Return 128 bits that stand for the text, the same on every machine."""
    return int.from_bytes(digest(text), "big")


def split_documents(settings: Settings, work: Work, folder: Path, last: str, units: int, tally: Tally
                    ) -> None:
    """Write train.jsonl and val.jsonl from what the last pass has left: shard by shard, then joined."""
    threshold = int(settings.val_fraction * 2**128)

    def split_unit(unit):
        documents = stored_documents(work.path(last, unit, "jsonl"))
        paths = [work.path("split", unit, f"{split}.jsonl") for split in SPLITS]
        return write_splits(paths, documents, threshold)

    results = work.each("split", units, split_unit)
    work.once("joined", lambda: join_splits(settings, work, folder, results, threshold, tally))


def join_splits(settings: Settings, work: Work, folder: Path, results: list[dict], threshold: int,
                tally: Tally) -> dict:
    """Join the splits of all shards; where one would be empty, it gets a document, or part of one."""
    train, val = paths = [folder / f"{split}.jsonl" for split in SPLITS]
    if not tally.kept[0]:
        lost = {name: step["documents"] for name, step in tally.steps.items() if step["documents"]}
        lost |= {name: documents for name, (documents, _) in tally.rejected.items()}
        reasons = ", ".join(f"{documents:,} {name}" for name, documents in lost.items())
        raise UserError(f"no text is left of the input: {reasons or 'it holds no document'}")
    for path, name in zip(paths, SPLITS):
        with config.open_whole(path) as file:
            for unit in range(len(results)):
                with open(work.path("split", unit, f"{name}.jsonl"), "rb") as part:
                    shutil.copyfileobj(part, file, 2**20)
    lowest = min(int(result["lowest"]) for result in results)
    highest = max(int(result["highest"]) for result in results)
    if lowest == highest:
        cut_single_document(train, val, settings.val_fraction)
    elif lowest >= threshold:
        print("few documents: val would be empty, and takes the one with the lowest hash")
        write_splits(paths, stored_documents(train), threshold=lowest + 1)
    elif highest < threshold:
        print("few documents: train would be empty, and takes the one with the highest hash")
        write_splits(paths, stored_documents(val), threshold=highest)
    return {}


def write_splits(paths: list[Path], documents: Iterable[dict], threshold: int) -> dict:
    """Write documents whose hash is below `threshold` to the second path, val, the others to the first.

    Returns the lowest and the highest hash, as text: JSON's numbers are shorter.
    """
    lowest, highest = 2**128, -1
    with config.open_whole(paths[0], "w") as train, config.open_whole(paths[1], "w") as val:
        for document in documents:
            value = content_hash(document["text"])
            lowest, highest = min(lowest, value), max(highest, value)
            (val if value < threshold else train).write(to_line(document))
    return {"lowest": str(lowest), "highest": str(highest)}


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


def load_tokenizer(path: Path, say: bool = True) -> Tokenizer:
    """Return the tokenizer in a tokenizer.json or in the folder that holds one."""
    tokenizer = metaspace.load_tokenizer(path / "tokenizer.json" if path.is_dir() else path)
    end_of_text_id(tokenizer)
    if say:
        print(f"tokenizer: {path}, {tokenizer.vocab_size:,} tokens; --vocab_size plays no part")
    return tokenizer


def train_tokenizer(settings: Settings, folder: Path, workers: int) -> Tokenizer:
    """Return a tokenizer trained on the train split alone: val is to stay unseen."""
    documents = progress(stored_documents(folder / "train.jsonl"), "train tokenizer")
    return Tokenizer.train((document["text"] for document in documents), settings.vocab_size,
                           special_tokens=END_OF_TEXT[:1], workers=workers)


def end_of_text_id(tokenizer: Tokenizer) -> int:
    """Return the id that ends a document. Raises UserError if the tokenizer has none."""
    for token in END_OF_TEXT:
        if token in tokenizer.special_tokens:
            return tokenizer.special_tokens[token]
    raise UserError(f"the tokenizer has no end-of-text token, one of {' '.join(END_OF_TEXT)}; its special "
                    f"tokens are {' '.join(tokenizer.special_tokens) or 'none'}")


def write_shards(folder: Path, tokenizer: Tokenizer, workers: int | None, work: Work | None = None,
                 part_bytes: int = 2**24) -> dict:
    """Write train.bin and val.bin from the .jsonl files in `folder`; return what meta.json says of them."""
    meta = {"dtype": tokenizer.dtype.name, "vocab_size": tokenizer.vocab_size,
            "end_of_text": end_of_text_id(tokenizer), "tokenizer": tokenizer.fingerprint}
    with ThreadPoolExecutor(1) as background:  # a thread suffices: xz and gzip work outside Python's lock
        if work is None or work.rank == 0:
            compressors = background.submit(compressed_bits_per_byte, folder / "val.jsonl")
        for split in SPLITS:
            meta[split] = write_shard(folder, split, tokenizer, workers, work, part_bytes)
        return meta | {"compressors": compressors.result()} if meta["val"] else {}


def write_shard(folder: Path, split: str, tokenizer: Tokenizer, workers: int | None, work: Work | None = None,
                part_bytes: int = 2**24) -> dict:
    """Write the tokens of one split; return its counts, its size in bytes and its checksum.

    Parts of part_bytes of the documents are encoded by whichever process of `work`, and then joined by the
    first. The others return {} as soon as their parts are done.
    """
    with shared(folder, work) as work:
        parts = ranges(folder / f"{split}.jsonl", part_bytes)
        encode = functools.partial(encode_part, work, folder, tokenizer, workers, split, parts)
        counts = work.each(f"tokens-{split}", len(parts), encode, wait=work.rank == 0)
        return join_parts(work, folder, split, counts, tokenizer.dtype.itemsize) if work.rank == 0 else {}


@contextmanager
def shared(folder: Path, work: Work | None) -> Iterator[Work]:
    """The work given, or one of this process alone that leaves nothing behind."""
    if work:
        yield work
        return
    path = folder / "work"
    path.mkdir()
    try:
        yield Work(path)
    finally:
        shutil.rmtree(path)


def ranges(path: Path, size: int) -> list[tuple[int, int]]:
    """(start, end) in bytes of whole lines, about `size` each; one, if there is nothing."""
    with open(path, "rb") as file:
        ends = [0]
        while ends[-1] < path.stat().st_size:
            file.seek(min(ends[-1] + size, path.stat().st_size) - 1)
            file.readline()
            ends.append(file.tell())
    return list(zip(ends, ends[1:])) or [(0, 0)]


def lines_between(path: Path, start: int, end: int) -> Iterator[dict]:
    with open(path, "rb") as file:
        file.seek(start)
        while file.tell() < end:
            yield json.loads(file.readline())


def encode_part(work: Work, folder: Path, tokenizer: Tokenizer, workers: int | None, split: str,
                parts: list[tuple[int, int]], part: int) -> dict:
    """Write the tokens of the documents between two bytes of a split; return its counts."""
    dtype = tokenizer.dtype.newbyteorder("<")
    documents = text_bytes = 0
    texts = (document["text"] for document in lines_between(folder / f"{split}.jsonl", *parts[part]))
    with (config.open_whole(work.path(f"tokens-{split}", part, "bin")) as file,
          tqdm(desc=f"tokenize {split}", unit="B", unit_scale=True, disable=work.rank > 0 or None) as bar):
        for number, num_bytes, ids in in_processes(encode_texts, tokenizer, bpe.batches(texts), workers):
            file.write(ids.astype(dtype).tobytes())
            documents, text_bytes = documents + number, text_bytes + num_bytes
            bar.update(num_bytes)
    return {"documents": documents, "text_bytes": text_bytes}


def join_parts(work: Work, folder: Path, split: str, counts: list[dict], itemsize: int) -> dict:
    """Join the parts of a split; return its counts, its size in bytes and its checksum."""
    checksum, size = hashlib.sha256(), 0
    with config.open_whole(folder / f"{split}.bin") as file:
        for part in range(len(counts)):
            with open(work.path(f"tokens-{split}", part, "bin"), "rb") as tokens:
                while content := tokens.read(2**20):
                    file.write(content)
                    checksum.update(content)
                    size += len(content)
    return {name: sum(count[name] for count in counts) for name in ("documents", "text_bytes")} | {
        "tokens": size // itemsize, "bytes": size, "sha256": checksum.hexdigest()}


def encode_texts(tokenizer: Tokenizer, texts: list[str]) -> tuple[int, int, np.ndarray]:
    """Return (texts, bytes, ids of them in a row, end-of-text after each). Runs in worker processes."""
    end = np.array([end_of_text_id(tokenizer)], tokenizer.dtype)
    ids = [part for array in bpe.encode_texts(tokenizer, texts) for part in (array, end)]
    return len(texts), sum(len(text.encode("utf-8")) for text in texts), np.concatenate([end[:0], *ids])


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


def print_splits(meta: dict) -> None:
    print(f"{'':<10}{'documents':>12}{'bytes of text':>16}{'tokens':>14}{'bytes a token':>15}")
    for split in SPLITS:
        documents, size, tokens = (meta[split][key] for key in ("documents", "text_bytes", "tokens"))
        print(f"{split:<10}{documents:>12,}{size:>16,}{tokens:>14,}{size / tokens:>15.3f}")
    marks = meta["compressors"]
    print(f"bits per byte of the val text: xz -9e {marks['xz']:.3f}, gzip -9 {marks['gzip']:.3f}"
          f" (on {marks['text_bytes']:,} bytes)")


OUTPUTS = {"train.jsonl", "val.jsonl", "tokenizer.json", "train.bin", "val.bin", "meta.json", "report.json",
           "report.html"}


@contextmanager
def whole_folder(out: Path, overwrite: bool, rank: int = 0) -> Iterator[Path]:
    """Yield the folder `out`.tmp to write into; it becomes `out` if all goes well, and is removed if not.

    Unless there are several shards in work: these stay, for the next run to go on from. Of several processes
    only the first (rank 0) makes, renames or removes the folder. Raises UserError if `out` exists (without
    overwrite), or holds a file that this program did not write.
    """
    out = out.resolve()
    if out.exists() and not overwrite:
        raise UserError(f"--out {out} exists; pass --overwrite to replace it, or another --out")
    if rank > 0:
        yield out.with_name(out.name + ".tmp")
        return
    refuse_foreign(out)
    fresh, old = out.with_name(out.name + ".tmp"), out.with_name(out.name + ".old.tmp")
    if old.exists() and not out.exists():
        old.rename(out)  # an earlier run was killed between the two renames below
    for leftover in (old,) if unfinished(fresh) else (fresh, old):
        remove_own(leftover)
    fresh.mkdir(parents=True, exist_ok=True)
    try:
        yield fresh
        if out.exists():
            out.rename(old)
        fresh.rename(out)
        config.sync_folder(out.parent)
    except BaseException:
        if len(unfinished(fresh)) > 1:
            print(f"finished shards are kept in {fresh}; the same command goes on from there")
        else:
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
        own_work = path.name == "work" and (path / "inputs.json").is_file()
        if path.is_dir() and not own_work or not own_work and path.name.removesuffix(".tmp") not in OUTPUTS:
            raise UserError(f"{path} is not data.py's, so {folder} is not replaced; choose another --out")


def main() -> None:
    settings = config.parse(Settings)
    config.show(settings)
    prepare(settings)


if __name__ == "__main__":
    config.run(main)
