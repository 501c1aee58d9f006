"""What run folders say: settings.json, log.jsonl, results.json of a stage, meta.json and report.json of data.

    run = read(Path("runs/base"))
    run.kind, run.series["grad_norm"], run.problems        # "pretraining", [(1, 1.49), …], []

Nothing here trusts a file: it may be missing, cut in the middle of a line, be of another program, or still be
written. What cannot be read is named in `problems`, and the rest is told all the same.
"""
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

# ------------------------------------------------------------------------------------------------------------
# 1. A run


# which setting only this kind of run has, and what stands in its log: for logs whose settings are lost
KINDS = {"reinforcement": ("algorithm", "reward"), "distillation": ("kd_weight", "kd_nats_per_token"),
         "preferences": ("label_smoothing", "chosen_logp_nats_per_token"),
         "reward model": ("margin_from", "margin"),
         "fine-tuning": ("loss_on_prompts", "plain_val_bits_per_byte"),
         "pretraining": ("objective", "loss_nats_per_token")}
ORDER = ("data", "pretraining", "fine-tuning", "pairs", "preferences", "reward model", "reinforcement",
         "distillation", "unknown")
STEPS_NAMED = 3  # gaps of a log that are named one by one


@dataclass
class Run:
    """A folder. series: {key of the log: [(step, value), …]}, finite numbers alone, in the steps' order."""
    folder: Path
    name: str
    kind: str = "unknown"  # one of ORDER
    settings: dict = field(default_factory=dict)
    series: dict = field(default_factory=dict)
    samples: list = field(default_factory=list)  # {"prompt", "before", "after", "author"}: texts
    results: dict = field(default_factory=dict)
    meta: dict = field(default_factory=dict)  # of data: counts of documents and tokens, compressors
    funnel: dict = field(default_factory=dict)  # of data: report.json
    problems: list = field(default_factory=list)  # in words: what is missing or damaged

    @property
    def steps(self) -> int:
        return max((points[-1][0] for points in self.series.values() if points), default=0)

    @property
    def wanted(self) -> int | None:
        """The steps that the run is to make, by its settings."""
        value = number(self.settings.get("steps"))
        return None if value is None else int(value)

    @property
    def seconds(self) -> float:
        return sum(value for _, value in self.series.get("seconds", []))

    @property
    def memory(self) -> float | None:
        return max((value for _, value in self.series.get("memory_gib", [])), default=None)

    @property
    def tokens(self) -> int | None:
        """Those seen. ppo.py's log has each step's own, the others' all so far."""
        values = [value for _, value in self.series.get("tokens", [])]
        if self.kind == "data":
            values = [number(part(self.meta, "train", "tokens"))]
        if not values or values[-1] is None:
            return None
        return int(sum(values) if self.kind == "reinforcement" else values[-1])


def number(value) -> float | None:
    """A number that can be drawn, or None. (In Python's JSON there is NaN, and numbers of any length.)"""
    fits = type(value) in (int, float) and -1e30 < value < 1e30  # not isfinite(): it fails on 10 ** 400
    return float(value) if fits else None


def part(content, *keys):
    """content[key][key]…, or None where something on the way is no dictionary or has no such key."""
    for key in keys:
        content = content.get(key) if isinstance(content, dict) else None
    return content


def find(folder: Path) -> list[Path]:
    """The run folders below a folder, down to three levels: those where a stage has left one of its files.

    A folder `runs` further down is another place, with a report of its own: speedrun.py --quick makes one.
    """
    found = {}
    for place, folders, files in os.walk(folder, followlinks=True):  # (a link to itself is seen once)
        inside = Path(place).relative_to(folder).parts
        others = {"state", "adapter", "runs"} if inside else {"state", "adapter"}
        folders[:] = [] if len(inside) >= 3 else sorted(set(folders) - others)
        own = inside and {"log.jsonl", "settings.json", "made.json"} & set(files)
        if own or inside and isinstance(part(read_object(Path(place, "meta.json"), []), "train"), dict):
            found.setdefault(Path(place).resolve(), Path(place))
    return list(found.values())


def read(folder: Path, name: str | None = None) -> Run:
    """The run in a folder; problems say what is missing or damaged in it."""
    run = Run(Path(folder), name or str(folder))
    for attribute, file in (("settings", "settings.json"), ("results", "results.json"), ("meta", "meta.json"),
                            ("funnel", "report.json")):
        setattr(run, attribute, read_object(run.folder / file, run.problems) or {})
    made = read_object(run.folder / "made.json", run.problems)
    has_log = (run.folder / "log.jsonl").exists()
    if has_log:
        read_log(run)
    run.kind = next((kind for kind, (setting, _) in KINDS.items() if setting in run.settings), None) \
        or next((kind for kind, (_, key) in KINDS.items() if key in run.series), "unknown")
    if not has_log and isinstance(part(run.meta, "train"), dict):
        run.kind = "data"
        if not (run.folder / "report.json").exists():
            run.problems.append("report.json is missing: what cleaning took away is not known")
    elif not has_log and made is not None:
        counts = made.get("counts")
        run.kind, run.results = "pairs", counts if isinstance(counts, dict) else {}
    elif not has_log:
        run.problems.append("log.jsonl is missing: no curve can be drawn")
    elif not run.settings and not any("settings.json" in words for words in run.problems):
        run.problems.append("settings.json is missing: what kind of run it is, its log alone tells")
    read_samples(run)
    return run


def read_object(path: Path, problems: list[str]) -> dict | None:
    """The object in a JSON file; None where there is no such file, or with a problem where it is damaged."""
    try:
        if not path.exists():
            return None
        content = json.loads(path.read_text(encoding="utf-8-sig", errors="replace"))
        if isinstance(content, dict):
            return content
        problems.append(f"{path.name} holds no object")
    except OSError as error:
        problems.append(f"{path.name} cannot be read: {error.strerror}")
    except (ValueError, RecursionError):
        problems.append(f"{path.name} is not JSON: it may be cut or damaged")
    return None


def read_log(run: Run):
    """Fill a run's series from its log, line by line; what is no line of a log is counted as a problem."""
    bad, lines = 0, {}
    try:
        with open(run.folder / "log.jsonl", encoding="utf-8-sig", errors="replace") as file:
            for text in file:
                try:
                    line = json.loads(text)
                    step = line["step"]
                    good = type(step) is int and 0 <= step < 1e15
                except (ValueError, RecursionError, TypeError, KeyError):
                    good = False
                if good:
                    lines[step] = line  # what a run repeats after a kill counts once
                    if "samples" in line:
                        run.samples = line["samples"]
                else:
                    bad += bool(text.strip())
    except OSError as error:
        run.problems.append(f"log.jsonl cannot be read: {error.strerror}")
        return
    for step in sorted(lines):
        for key, value in lines[step].items():
            value = number(value)
            if value is not None and key != "step":
                run.series.setdefault(key, []).append((step, value))
    if bad:
        run.problems.append(f"log.jsonl has {bad:,} {'lines' if bad > 1 else 'line'} that cannot be read: "
                            f"cut by a kill, or damaged")
    if not lines:
        run.problems.append("log.jsonl is empty: the run has not made a step")
    steps = sorted(lines)
    gaps = [(a + 1, b - 1) for a, b in zip([0, *steps], steps) if b > a + 1]
    if gaps:
        named = ", ".join(f"{a}" if a == b else f"{a} to {b}" for a, b in gaps[:STEPS_NAMED])
        run.problems.append(f"log.jsonl lacks steps {named}" + " and others" * (len(gaps) > STEPS_NAMED))


def read_samples(run: Run):
    """Texts that the stage left in its results, or else those that the log's last line with any holds."""
    found = run.results.pop("samples", None) if run.kind != "pairs" else None
    rows = found if isinstance(found, list) else run.samples if isinstance(run.samples, list) else []
    names = {"prompt": "prompt", "before": "before", "after": "after", "reply": "after", "author": "author"}
    run.samples = [{new: row[old] for old, new in names.items() if isinstance(row.get(old), str)}
                   for row in rows if isinstance(row, dict) and isinstance(row.get("prompt"), str)]


def in_order(runs: Sequence[Run]) -> list[Run]:
    """Stages in the order of the lesson; those that do not begin with a pretrained model of these behind."""
    by_name = {Path(run.name).name: run for run in runs}

    def apart(run: Run) -> bool:
        seen = set()
        while run.kind in ("fine-tuning", "preferences", "reinforcement") and run.name not in seen:
            seen.add(run.name)
            parent = by_name.get(Path(str(run.settings.get("init_from"))).name)
            if parent is None:
                return any(other.kind == "pretraining" for other in runs)
            run = parent
        return False
    return sorted(runs, key=lambda run: (run.kind == "distillation", apart(run), ORDER.index(run.kind),
                                         bool(run.settings.get("lora_rank")), run.name))


# ------------------------------------------------------------------------------------------------------------
# 2. Curves of fewer points


def thin(points: Sequence[tuple[float, float]], most: int = 500) -> list[tuple[float, float]]:
    """At most so many of the points: of each stretch the lowest and the highest, so that a spike stays.

    By hand: of the values 1 5 2 2 0 3, at most 4, the stretches 1 5 2 and 2 0 3 leave 1 5 and 0 3.
    """
    if len(points) <= most:
        return list(points)
    kept = []
    for some in stretches(points, most // 2):
        ends = min(some, key=lambda point: point[1]), max(some, key=lambda point: point[1])
        kept += sorted(set(ends))
    return kept


def smooth(points: Sequence[tuple[float, float]], most: int = 60) -> list[tuple[float, float]]:
    """At most so many points, each the mean of a stretch."""
    return [tuple(math.fsum(values) / len(some) for values in zip(*some)) for some in stretches(points, most)]


def stretches(points: Sequence, number: int) -> list[Sequence]:
    """The points in order in so many parts, whose lengths differ by one at most; none is empty."""
    number = min(number, len(points))
    cuts = [i * len(points) // number for i in range(number + 1)] if number else [0]
    return [points[a:b] for a, b in zip(cuts, cuts[1:])]


# ------------------------------------------------------------------------------------------------------------
# 3. Figures, and what sets several runs apart


def figures(run: Run) -> list[tuple[str, float | None, float, str]]:
    """(what, before, after, note) of held-out data: from results.json, or else the log's first and last."""
    rows = []
    for name, value in run.results.items() if run.kind != "pairs" else ():
        if name == "held out" and isinstance(value, dict):  # distill.py's
            for key, unit in (("bits_per_byte", "bits per byte"), ("loss", "nats a token")):
                rows.append((f"{name}, {unit}", part(value, "before", key), part(value, "after", key), ""))
                rows.append((f"{name}, {unit}, the teacher", None, part(value, "teacher", key), ""))
        elif isinstance(value, dict) and "after" in value:
            note = value.get("note")
            rows.append((name, value.get("before"), value["after"], note if isinstance(note, str) else ""))
        elif isinstance(value, dict):
            rows += [(f"{name}: {inner}", None, it, "") for inner, it in value.items()]
        else:
            rows.append((name, None, value, ""))
    rows = [(in_words(name), number(before), number(after), note) for name, before, after, note in rows
            if number(after) is not None]
    return rows or measured(run)


def measured(run: Run) -> list[tuple[str, float | None, float, str]]:
    """The same from the log, where a stage writes no results."""
    rows = []
    for key, points in run.series.items():
        if "val_" in key:
            first, note = (points[0][1], f"before: at step {points[0][0]:,}") if points[1:] else (None, "")
            rows.append((f"{in_words(key.replace('val_', ''))}, held out", first, points[-1][1], note))
    return rows


def chief_key(run: Run) -> str | None:
    """The key of the log that shall fall, or rise if a reward; a distillation's bits are of its own loss."""
    keys = {"distillation": (), "reinforcement": ("reward",)}.get(run.kind, ("bits_per_byte",))
    return next((key for key in run.series if key in keys), None) or next(
        (key for key in run.series if key.startswith("loss")), None)


def in_words(key: str) -> str:
    words = key.replace("loss_nats", "loss, nats").replace("_per_", " a ")
    return words.replace("bits a byte", "bits per byte").replace("_", " ")


def differences(runs: Sequence[Run]) -> dict[str, list]:
    """{setting: its value in each run} of those that all have, and not all the same; `out` always differs."""
    known = [run.settings for run in runs if run.settings]
    names = [name for name in (known[0] if known else ()) if all(name in some for some in known)]
    found = {name: [run.settings.get(name, "–") for run in runs] for name in names if name != "out"}
    return {name: values for name, values in found.items() if any(value != values[0] for value in values)}
