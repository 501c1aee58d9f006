"""From raw documents to those worth training on: the steps, cheap ones first, and what each of them drops.

    python data.py --clean                                    # all steps, with their usual settings
    python data.py --input crawl/ --quality web --redact --near 0.8 --benchmark test.jsonl

    read       empty; generated table
    distinct   exact duplicates; rules of quality; scripts and languages
    near       near-duplicates
    lines      lines that stood in earlier documents
    and in the last of these passages, benchmarks, classifiers, perplexity, personal data

A step that compares documents (duplicates) needs all that came before it. So the steps stand in passes: a
pass reads each shard once, a chunk of documents at a time, does its steps, and leaves a few bytes for each
document (digests, keys of MinHash). Between passes one process decides, from these alone, which documents are
twins. What is expensive sees only what the cheap steps have left, and no step sees more than a chunk of text.

The split into train and val comes after all this: what is alike cannot stand on both sides.
"""
import functools
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import islice
from typing import NamedTuple

import numpy as np

import config
import dedup
import suffixes
from config import UserError
from documents import (MOST_BYTES, accepted, digest, find_files, parse_item, read_files, read_json_lines,
                       stored_documents, to_line)
from privacy import pii_problem, redact_pii
from quality import TABLES, adjusted, kept_lines, quality_problems
from work import Work

CHUNK = 2**24  # characters of text that are worked on at once
EXAMPLES = 10  # of what a step drops, for the report


@dataclass
class Cleaning:
    """The steps that drop or change documents. None: off, or with --clean the value in CLEAN."""
    clean: bool = False  # switch on every step below that needs no file of yours, as CLEAN says
    quality: str | None = None  # rules of quality: web, encyclopedia, forum, code; auto: code for Python
                                # sources, else web; off
    rules: tuple[str, ...] = ()  # bounds of those to change: words=20: html=off
    scripts: tuple[str, ...] = ()  # keep documents that are mostly in these: Latin Han …
    languages: str | None = None  # a file of languages.py, to tell languages by
    keep_languages: tuple[str, ...] = ()  # and those to keep
    lines: int | None = None  # cut lines of so many characters that stood in earlier documents; 0: none
    near: float | None = None  # drop documents of this Jaccard similarity with an earlier one; 0: none
    passages: int | None = None  # cut passages of so many bytes that stood before, in the same chunk; 0: none
    benchmark: tuple[str, ...] = ()  # files to be tested on: drop what shares an n-gram with what they say
    ngram: int = 13  # words of that n-gram
    contaminated: str = "drop"  # drop such documents, or cut the shared words out
    classifier: tuple[str, ...] = ()  # files of classifier.py: most must vote for a document
    perplexity: str | None = None  # a model of perplexity.py: drop what lies outside its bounds
    redact: bool | None = None  # personal data become placeholders, and much of it drops a document
    most_bytes: int = MOST_BYTES  # of a document, or a line of JSON; larger ones are bad lines
    shard_bytes: int = 16 * 2**20  # input files are taken together up to so many bytes: a shard, which one
                                   # process works on at a time

    def check_cleaning(self):
        for name, value in CLEAN.items():
            if getattr(self, name) is None:
                setattr(self, name, value if self.clean else OFF[name])
        config.require(self, quality={"off", "auto", *TABLES}, near=(0, 1), lines=(0, None),
                       passages=(0, None), ngram=(1, None), contaminated={"drop", "cut"},
                       most_bytes=(1, None), shard_bytes=(1, None))
        if self.rules and self.quality in ("off", "auto"):
            raise UserError(f"--rules {' '.join(self.rules)} needs --quality {' or '.join(TABLES)}: of which "
                            f"table")
        if bool(self.languages) != bool(self.keep_languages):
            raise UserError("--languages names a file to tell languages by, --keep_languages those to keep; "
                            "pass both")
        if not self.benchmark:
            config.refuse(self, "is for --benchmark, and there is none", "ngram", "contaminated")
        adjusted(TABLES.get(self.quality, {}), self.rules)


CLEAN = {"quality": "auto", "lines": 60, "near": 0.8, "passages": 400, "redact": True}
OFF = {"quality": "off", "lines": 0, "near": 0.0, "passages": 0, "redact": False}


def rules(settings: Cleaning) -> str:
    """What will be dropped, in a line or two, for the start of a run."""
    lines = [f"dropped are documents that are empty, equal to an earlier one, or a generated table (Python "
             f"of {TABLE_CHARACTERS:,} characters\nor more, over {TABLE_SHARE:.0%} of them on lines that "
             f"begin with a string or a number)"]
    if settings.quality != "off":
        lines.append(f"by rules of quality: {settings.quality} {' '.join(settings.rules)}".rstrip())
    if settings.near:
        lines.append(f"near-duplicates from Jaccard {settings.near:g} on: {dedup.curve_line()}")
    if settings.lines:
        lines.append(f"lines of {settings.lines} characters or more that stood in earlier documents are cut")
    if settings.redact:
        lines.append("personal data become placeholders")
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------------------
# Steps


class Verdict(NamedTuple):
    """What a step has against a document: it is dropped (text None), or changed to `text`."""
    text: str | None
    why: str
    sample: str | None = None  # what went, for the report; None: the document


class Step(NamedTuple):
    """judge(documents, places) -> for each a Verdict, or None where it stays as it is.

    places: numbers of the documents in the shard, as the pass received them.
    """
    name: str
    judge: Callable[[list[dict], list[int]], Iterable[Verdict | None]]


def alone(name: str, judge: Callable[[dict], Verdict | None]) -> Step:
    """A step that looks at each document by itself."""
    return Step(name, lambda documents, places: map(judge, documents))


TABLE_CHARACTERS, TABLE_SHARE = 8192, 2 / 3
TABLE_ROW = re.compile(r"""^[ \t\[({]*(?:[rRbBuU]{0,2}(?!'''|\"\"\")['"]|[-+]?\d).*$""", re.MULTILINE)


def is_table(text: str) -> bool:
    """True where Python source is a generated table: many near-copies, with nothing to learn but digits.

    In the libraries of Python 3.10 to 3.13 tables score 0.75 to 0.98, and the code next to them at most 0.61.
    """
    in_rows = sum(row.end() - row.start() for row in TABLE_ROW.finditer(text))
    return len(text) >= TABLE_CHARACTERS and in_rows > TABLE_SHARE * len(text)


def is_python(document: dict) -> bool:
    return str(document["source"]).endswith((".py", ".py.gz"))


def judge_empty(document: dict) -> Verdict | None:
    return None if document["text"].strip() else Verdict(None, "nothing but white space")


def judge_table(document: dict) -> Verdict | None:
    if is_python(document) and is_table(document["text"]):
        return Verdict(None, f"over {TABLE_SHARE:.0%} of it on lines that begin with a string or a number")
    return None


def clean(text: str) -> str:
    """Return the text with \\n for every newline and without a byte-order mark; all else stays as it was."""
    return text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")


def kept_documents(documents: Iterable[dict]) -> Iterator[dict]:
    """Yield those that the steps which are always there keep, cleaned: without shards and files."""
    seen = set()
    for document in documents:
        document = document | {"text": clean(document["text"])}
        if not judge_empty(document) and not judge_table(document):
            if (value := digest(document["text"])) not in seen:
                seen.add(value)
                yield document


def quality_step(settings: Cleaning) -> Step:
    tables = {name: adjusted(table, settings.rules if name == settings.quality else ())
              for name, table in TABLES.items()}

    def judge(document):
        name = settings.quality
        if name == "auto":
            name = "code" if is_python(document) else "web"
        problems = quality_problems(document["text"], tables[name], document)
        return Verdict(None, "; ".join(problems)) if problems else None
    return alone("quality", judge)


def web_lines(document: dict) -> Verdict | None:
    """C4's rules for lines, where the source is the web: a change, before the rules see the text."""
    text, dropped = kept_lines(document["text"])
    return Verdict(text or None, f"boilerplate: {dropped} lines") if dropped else None


def script_step(scripts: tuple[str, ...]) -> Step:
    from languages import dominant_script, script_counts

    def judge(document):
        script = dominant_script(script_counts(document["text"]))
        return None if script in scripts else Verdict(None, f"script: {script or 'no letters'}")
    return alone("script", judge)


def language_step(path: str, keep: tuple[str, ...]) -> Step:
    from languages import Languages
    languages = Languages.load(path)

    def judge(document):
        language, margin = languages.identify(document["text"])
        if language in keep:
            return None
        return Verdict(None, f"language: {language}, by {margin:.2f} nats an n-gram")
    return alone("language", judge)


def passages_step(length: int) -> Step:
    """Passages that stand twice within a chunk: a suffix array takes memory, so not within the corpus."""
    def judge(documents, places):
        texts = [document["text"] for document in documents]
        for text, rest in zip(texts, suffixes.without_repeated_spans(texts, length)):
            what = f"passages: {len(text) - len(rest):,} characters stood before"
            yield None if rest == text else Verdict(rest if rest.strip() else None, what)
    return Step("passages", judge)


def benchmark_step(settings: Cleaning) -> Step:
    benchmarks = {path: [item["text"] for item in benchmark_items(path)] for path in settings.benchmark}
    dedup.contamination([], benchmarks, settings.ngram)  # a file that cannot be used is told now, not later

    def judge(documents, places):
        texts = [document["text"] for document in documents]
        for text, found in zip(texts, dedup.contamination(texts, benchmarks, settings.ngram)):
            rest = suffixes.cut(text, [(overlap.start, overlap.end) for overlap in found])
            kept = rest if settings.contaminated == "cut" and rest.strip() else None
            why = f"{found[0].benchmark}: item {found[0].item}" if found else ""
            yield Verdict(kept, why, found[0].words) if found else None
    return Step("benchmark", judge)


def benchmark_items(path: str) -> list[dict]:
    """The items of an evaluation file: documents, or JSON Lines of any form (question and answer, say)."""
    files = read_files(find_files([path]), functools.partial(read_json_lines, parse=parse_item))
    items = list(accepted(files, "stop", {}))
    if not any(item["text"].strip() for item in items):
        raise UserError(f"--benchmark {path} is empty; name a file of the texts that will be tested on")
    return items


def warn_of_ngram(settings: Cleaning, documents: Iterable[dict]) -> None:
    """Tell where every document is shorter than what --benchmark looks for. Reads up to one that is not."""
    ngram = settings.ngram
    items = (len(dedup.words_of(item["text"])) for path in settings.benchmark
             for item in benchmark_items(path))
    least = min(min(ngram, words) for words in items if words >= min(dedup.SHORTEST, ngram))
    if all(len(dedup.words_of(document["text"])) < least for document in documents):
        print(f"warning: no document has {least:,} words, so nothing of --benchmark could be found; pass a "
              f"smaller --ngram than {ngram:,}")


def classifier_step(paths: tuple[str, ...]) -> Step:
    from classifier import Classifier, votes
    classifiers = [Classifier.load(path) for path in paths]

    def judge(documents, places):
        for keep in votes(classifiers, [document["text"] for document in documents]):
            yield None if keep else Verdict(None, "classifier: most vote against it")
    return Step("classifier", judge)


def perplexity_step(folder: str) -> Step:
    from perplexity import NgramModel, perplexity_problem
    model = NgramModel.load(folder)
    if model.bounds is None:
        raise UserError(f"--perplexity {folder} has no bounds; make one that has: "
                        f"python perplexity.py --out …")

    def judge(documents, places):
        for bits in model.bits_per_byte([document["text"] for document in documents]):
            problem = perplexity_problem(bits, model.bounds)
            yield Verdict(None, problem) if problem else None
    return Step("perplexity", judge)


def redact(document: dict) -> Verdict | None:
    """Personal data; in source code what belongs to nobody (127.0.0.1, user@example.com) stays."""
    text, counts = redact_pii(document["text"], reserved=not is_python(document))
    if problem := pii_problem(counts):
        return Verdict(None, problem)
    found = ", ".join(f"{number} {kind}" for kind, number in sorted(counts.items()))
    return Verdict(text, f"redacted: {found}", found) if counts else None


# ------------------------------------------------------------------------------------------------------------
# What each step did


@dataclass
class Tally:
    """Counts by step, of a shard or, added up, of all."""
    read: list[int] = field(default_factory=lambda: [0, 0])  # documents, bytes of UTF-8
    kept: list[int] = field(default_factory=lambda: [0, 0])
    rejected: dict = field(default_factory=dict)  # reason: [documents, bytes]; what could not be read
    steps: dict = field(default_factory=dict)  # name: {"documents", "changed", "bytes", "seconds", …}

    def step(self, name: str) -> dict:
        return self.steps.setdefault(name, {"documents": 0, "changed": 0, "bytes": 0, "seconds": 0.0,
                                            "reasons": {}, "examples": []})

    def note(self, name: str, document: dict, verdict: Verdict, lost: int) -> None:
        step, reason = self.step(name), verdict.why.partition(":")[0]
        step["documents" if verdict.text is None else "changed"] += 1
        step["bytes"] += lost
        step["reasons"][reason] = step["reasons"].get(reason, 0) + 1
        if len(step["examples"]) < EXAMPLES:
            text = document["text"] if verdict.sample is None else verdict.sample
            example = {"source": str(document["source"]), "why": verdict.why, "text": text[:300]}
            step["examples"].append(example)

    def add(self, other: "Tally") -> None:
        """Add another shard's: its examples come after ours."""
        self.read, self.kept = ([a + b for a, b in zip(*pair)] for pair in
                                ((self.read, other.read), (self.kept, other.kept)))
        for reason, (documents, size) in other.rejected.items():
            was = self.rejected.get(reason, (0, 0))
            self.rejected[reason] = [was[0] + documents, was[1] + size]
        for name, more in other.steps.items():
            step = self.step(name)
            for key in ("documents", "changed", "bytes", "seconds"):
                step[key] += more[key]
            step["reasons"] = dict(Counter(step["reasons"]) + Counter(more["reasons"]))
            step["examples"] = (step["examples"] + more["examples"])[:EXAMPLES]


def num_bytes(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode("utf-8"))


def take(steps: list[Step], documents: list[dict], places: list[int], tally: Tally) -> list[dict]:
    """The documents that all steps keep, as they leave them."""
    for step in steps:
        began, kept, kept_places = time.process_time(), [], []
        for document, at, verdict in zip(documents, places, step.judge(documents, places), strict=True):
            if verdict is not None:
                left = 0 if verdict.text is None else num_bytes(verdict.text)
                tally.note(step.name, document, verdict, num_bytes(document["text"]) - left)
                document = document | {"text": verdict.text}
            if document["text"] is not None:
                kept.append(document)
                kept_places.append(at)
        documents, places = kept, kept_places
        tally.step(step.name)["seconds"] += time.process_time() - began
    return documents


# ------------------------------------------------------------------------------------------------------------
# Passes


class Pass(NamedTuple):
    """Steps that a shard goes through at once.

    steps(unit, offsets): list of steps, some of which know which of the unit's documents are twins.
    keys(texts, first): of the texts that the pass before leaves, as rows of 64 bits; first: number of the
    first in its shard. decide(work, pass before, this pass, offsets): what one process does with all keys.
    offsets: how many documents of the pass before stand before each shard, and in all.
    """
    name: str
    steps: Callable[[int, list[int]], list[Step]]
    keys: Callable[[list[str], int], np.ndarray] | None = None
    decide: Callable[[Work, str, str, list[int]], dict] | None = None


def passes(settings: Cleaning, work: Work) -> list[Pass]:
    """The passes that these settings ask for, the first two always."""
    cheap = []
    if settings.quality != "off":
        cheap += [alone("web lines", web_lines)] * (settings.quality == "web") + [quality_step(settings)]
    if settings.scripts:
        cheap.append(script_step(settings.scripts))
    if settings.languages:
        cheap.append(language_step(settings.languages, settings.keep_languages))
    found = [Pass("read", lambda unit, offsets: [alone("empty", judge_empty), alone("table", judge_table)]),
             Pass("distinct", lambda *place: [twin_step("duplicate", work, "distinct", *place), *cheap],
                  digests, decide_equal)]
    if settings.near:  # before lines: of a near-duplicate only scraps would be left
        found.append(Pass("near", lambda *place: [twin_step("near-duplicate", work, "near", *place)],
                          lambda texts, first: dedup.band_keys(texts),
                          lambda *place: decide_near(*place, settings.near)))
    if settings.lines:
        found.append(Pass("lines", lambda unit, offsets: [lines_step(work, unit)],
                          lambda texts, first: line_keys(texts, first, settings.lines), decide_lines))
    late = late_steps(settings)
    last = found.pop()
    return [*found, last._replace(steps=lambda *place: [*last.steps(*place), *late])]


def late_steps(settings: Cleaning) -> list[Step]:
    """The steps that cost most, or must see a text as it will be: in the last pass, whichever that is."""
    late = []
    if settings.passages:
        late.append(passages_step(settings.passages))
    if settings.benchmark:
        late.append(benchmark_step(settings))
    if settings.classifier:
        late.append(classifier_step(settings.classifier))
    if settings.perplexity:
        late.append(perplexity_step(settings.perplexity))
    if settings.redact:
        late.append(alone("personal data", redact))
    return late


def run_passes(settings: Cleaning, work: Work, units: int, read: Callable[[int, Tally], Iterator[dict]],
               key: Callable[[int], str]) -> tuple[str, Tally]:
    """Take all units through all passes; return the name of the last, whose files hold what is left, and
    counts.

    read(unit, tally): the documents of a unit. key(unit): stands for all that its first pass depends on.
    """
    total, before, offsets, order, seconds = Tally(), None, [], passes(settings, work), 0.0
    for one, next_one in zip(order, [*order[1:], None]):
        keys = next_one.keys if next_one else None
        if one.decide:
            decision = functools.partial(timed, one.decide, work, before, one.name, offsets)
            seconds += work.once(f"{one.name}-decided", decision)["seconds"]
        documents = functools.partial(shard_before, work, before) if before else read
        job = functools.partial(run_pass, one, work, offsets, documents, keys)
        results = work.each(one.name, units, job, None if before else key)
        tally = Tally()
        for result in results:
            tally.add(Tally(**result["tally"]))
        if one.decide:  # keys and decision are part of the step that they decide
            next(iter(tally.steps.values()))["seconds"] += seconds
        seconds = sum(result["seconds"] for result in results)
        offsets = np.cumsum([0] + [result["tally"]["kept"][0] for result in results]).tolist()
        if before:
            tally.read = [0, 0]  # they are counted already
        total.kept, before = [0, 0], one.name
        total.add(tally)
    return before, total


def shard_before(work: Work, before: str, unit: int, tally: Tally) -> Iterator[dict]:
    return stored_documents(work.path(before, unit, "jsonl"))


def timed(function: Callable, *arguments) -> dict:
    began = time.process_time()
    result = function(*arguments)
    return result | {"seconds": time.process_time() - began}


def run_pass(one: Pass, work: Work, offsets: list[int], documents: Callable, keys: Callable | None, unit: int
             ) -> dict:
    """Take a unit through the steps of a pass: <pass>.<unit>.jsonl, and .keys for the next decision."""
    steps = one.steps(unit, offsets)
    tally, at, left, seconds = Tally(), 0, 0, 0.0
    for step in steps:
        tally.step(step.name)  # so that the report has a line for it, whatever it finds
    with (config.open_whole(work.path(one.name, unit, "jsonl"), "w") as out,
          config.open_whole(work.path(one.name, unit, "keys")) as keys_out):
        for chunk in chunks(documents(unit, tally)):
            for document in chunk:
                count_document(tally.read, document)
            kept = take(steps, chunk, list(range(at, at + len(chunk))), tally)
            for document in kept:
                count_document(tally.kept, document)
                out.write(to_line(document))
            began = time.process_time()
            if keys and kept:
                keys_out.write(keys([document["text"] for document in kept], left).astype("<u8").tobytes())
            seconds += time.process_time() - began
            at, left = at + len(chunk), left + len(kept)
    return {"tally": asdict(tally), "seconds": seconds}


def chunks(documents: Iterable[dict]) -> Iterator[list[dict]]:
    """Lists of documents, together about CHUNK characters long."""
    chunk, length = [], 0
    for document in documents:
        chunk.append(document)
        length += len(document["text"])
        if length >= CHUNK:
            yield chunk
            chunk, length = [], 0
    if chunk:
        yield chunk


def count_document(counts: list[int], document: dict) -> None:
    counts[0] += 1
    counts[1] += num_bytes(document["text"])


# ------------------------------------------------------------------------------------------------------------
# Decisions: who is whose twin, from keys alone


BAND = 2**24  # keys that are sorted at once


def digests(texts: list[str], first: int) -> np.ndarray:
    """(N, 3) uint64: 128 bits of BLAKE2b of each text, and its number in the shard."""
    content = b"".join(map(digest, texts))
    return np.column_stack([np.frombuffer(content, "<u8").reshape(-1, 2),
                            np.arange(first, first + len(texts), dtype=np.uint64)])


def line_keys(texts: list[str], first: int, shortest: int) -> np.ndarray:
    """(lines, 2) uint64: 64 bits of each line, 0 where it always stays, and the number of its text."""
    keys = [[dedup.line_key(piece, False, shortest) for piece in dedup.pieces(text, "line")]
            for text in texts]
    owners = np.repeat(np.arange(first, first + len(texts), dtype=np.uint64), list(map(len, keys)))
    return np.column_stack([np.array([key for line in keys for key in line], np.uint64), owners])


def decide_repeated(work: Work, before: str, name: str, offsets: list[int], columns: int
                    ) -> list[tuple[int, int]]:
    """Mark the keys that an earlier document has; return (document, the earlier one) of the first of them.

    Rows of the .keys files are `columns` numbers of key and the number of the document in its shard; offsets:
    how many documents stand before each shard. Written are the .drop files, a byte a row. A band of keys
    (by their leading bits) is sorted at a time, so that memory does not grow with the corpus but for a byte a
    row.
    """
    parts = [np.fromfile(path, "<u8").reshape(-1, columns + 1) if path.stat().st_size < 2**20
             else np.memmap(path, "<u8", mode="r").reshape(-1, columns + 1)
             for path in (work.path(before, unit, "keys") for unit in range(len(offsets) - 1))]
    drops, twins = [np.zeros(len(part), bool) for part in parts], []
    bits = (sum(map(len, parts)) // BAND).bit_length()
    for band in range(2**bits):
        rows = [np.flatnonzero(part[:, 0] >> np.uint64(64 - bits) == band) if bits else slice(None)
                for part in parts]
        keys = np.concatenate([part[row, :columns] for part, row in zip(parts, rows)])
        owners = np.concatenate([part[row, columns].astype(np.int64) + start
                                 for part, row, start in zip(parts, rows, offsets)])
        firsts = owners[dedup.first_equal(keys)]  # owners ascend: the first row is the first owner's
        again = (firsts < owners) & (keys[:, 0] != 0)
        where = np.flatnonzero(again)[:EXAMPLES]
        twins += zip(owners[where].tolist(), firsts[where].tolist())
        ends = np.cumsum([len(drop[row]) for drop, row in zip(drops, rows)])
        for drop, row, marked in zip(drops, rows, np.split(again, ends[:-1])):
            drop[row] = marked
    write_drops(work, name, drops)
    return sorted(twins)[:EXAMPLES]


def write_drops(work: Work, name: str, drops: list[np.ndarray]) -> None:
    for unit, drop in enumerate(drops):
        with config.open_whole(work.path(f"{name}-decided", unit, "drop")) as file:
            file.write(drop.astype(np.uint8).tobytes())


def decide_equal(work: Work, before: str, name: str, offsets: list[int]) -> dict:
    twins = decide_repeated(work, before, name, offsets, columns=2)
    return {"why": {one: f"equal to {source_of(work, before, offsets, other)}" for one, other in twins}}


def decide_lines(work: Work, before: str, name: str, offsets: list[int]) -> dict:
    decide_repeated(work, before, name, offsets, columns=1)
    return {}


def decide_near(work: Work, before: str, name: str, offsets: list[int], threshold: float) -> dict:
    """MinHash's keys are there; who shares one is compared, with the texts on the disk."""
    paths = [work.path(before, unit, "jsonl") for unit in range(len(offsets) - 1)]
    keys = np.concatenate([np.fromfile(work.path(before, unit, "keys"), "<u8") for unit in range(len(paths))])
    texts = dedup.StoredTexts(paths)
    keys = keys.reshape(len(texts), dedup.band_keys([]).shape[1])  # -1 would not do where no text is left
    kept = dedup.near_duplicates(texts, threshold, keys=keys)
    drop = kept != np.arange(len(kept))
    write_drops(work, name, [drop[start:end] for start, end in zip(offsets, offsets[1:])])
    why = {one: f"Jaccard {dedup.jaccard(texts[one], texts[int(kept[one])]):.2f} with "
                f"{source_of(work, before, offsets, int(kept[one]))}"
           for one in np.flatnonzero(drop)[:EXAMPLES].tolist()}
    return {"why": why}


def source_of(work: Work, before: str, offsets: list[int], number: int) -> str:
    """Where a document of the pass before comes from."""
    unit = int(np.searchsorted(offsets, number, side="right")) - 1
    documents = stored_documents(work.path(before, unit, "jsonl"))
    return str(next(islice(documents, number - offsets[unit], None))["source"])


def twin_step(name: str, work: Work, decided: str, unit: int, offsets: list[int]) -> Step:
    """Drop the documents of this unit that were found to be an earlier one's twins."""
    drop = np.fromfile(work.path(f"{decided}-decided", unit, "drop"), np.uint8)
    why = work.result(f"{decided}-decided", None, work.key)["why"]  # numbers became text, in JSON

    def judge(documents, places):
        for at in places:
            reason = why.get(str(offsets[unit] + at), "twin of an earlier document")
            yield Verdict(None, reason) if drop[at] else None
    return Step(name, judge)


def lines_step(work: Work, unit: int) -> Step:
    """Cut the lines of this unit that stood in earlier documents. Documents come in order, all of them."""
    drop, at = np.fromfile(work.path("lines-decided", unit, "drop"), np.uint8), [0]

    def judge(documents, places):
        for document in documents:
            pieces = dedup.pieces(document["text"], "line")
            gone = drop[at[0]:at[0] + len(pieces)]
            at[0] += len(pieces)
            if not gone.any():
                yield None
                continue
            text = "".join(piece for piece, is_gone in zip(pieces, gone) if not is_gone)
            sample = "".join(piece for piece, is_gone in zip(pieces, gone) if is_gone)
            why = f"lines: {gone.sum()} of {sum(map(bool, pieces))}"
            yield Verdict(text if text.strip() else None, why, sample)
    return Step("repeated lines", judge)
