"""Several corpora in one run: in which shares, in which order, how often each is seen.

    python mixture.py --sources general=runs/data old=runs/old --phases "80% general" "20% old general:0.5"
    python train.py --data mix.json

The first writes mix.json, some lines that can as well be written by hand, draws it and counts the epochs; the
second trains on it. Each source is a folder of token shards, as data.py writes it. A phase has a length (a
share of the run, or a number of tokens) and shares of its windows: weights of named sources; or a
temperature, p ~ size^(1/t) (Raffel et al. 2020, https://arxiv.org/abs/1910.10683, section 3.5.2: t = 1 goes
by size, a large t gives every source as much); or both: 5 % of old text, say, and the rest by size.

Over four epochs the same text is worth less and less (Muennighoff et al. 2023,
https://arxiv.org/abs/2305.16264): a source that would be seen more often is warned of.

Which window comes next is a function of (seed, step): nothing is drawn, the sources take turns as evenly as
their shares allow. `Replay`, against forgetting in continued pretraining, is the case of two sources and one
phase. With `--score runs/base` the windows of a phase can come in the order of their loss under that model:
a curriculum (Bengio et al. 2009), easy or hard ones first.
"""
import hashlib
import json
import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
from tqdm import tqdm

import config
from batches import IGNORE, Batches, Wrapped
from config import UserError

MOST_EPOCHS = 4  # so often the same text is about as good as new (Muennighoff et al. 2023, section 5)
ORDERS = ("random", "easy_first", "hard_first")

# ------------------------------------------------------------------------------------------------------------
# One row of windows from several


@dataclass(frozen=True)
class Phase:
    """A stretch of the row: how many windows (None: to the end), and each source's share of them."""
    windows: int | None
    weights: tuple[Fraction, ...]  # one a source, together 1
    order: str = "random"  # of the windows of a source; easy_first, hard_first: by their difficulty
    name: str = ""


def turns(n: int, weights: Sequence[Fraction]) -> list[int]:
    """How many of the first n windows are each source's.

    The last source has floor(n * its weight); what is left is divided among the others in the same way. So
    from n to n + 1 exactly one number rises, by 1, and each stays within the number of sources of
    n * weight: turns(5, (3/5, 2/5)) is [3, 2], and of those five windows the third and the fifth are the
    second source's.
    """
    counts, rest = [], Fraction(1)
    for weight in reversed(weights):
        own = math.floor(n * weight / rest) if weight else 0
        counts.append(own)
        n, rest = n - own, rest - weight
    return counts[::-1]


class Mixture(Wrapped):
    """Windows of several sources in one endless row that all ranks share, phase after phase.

    Each source's windows come in its own order (see Batches), without gaps, across phases: no window comes
    twice in one of its epochs, however many ranks there are. After the last phase its shares go on.

    difficulty: for each source, by its number, a value a window (the mean loss of its tokens, say): a phase
    with an order needs it. Such a phase sees the same windows as without, and within an epoch of a source
    they are sorted.

    Attributes: sources, phases; all others (meta, tokens, numbers …) are those of the first source. Raises
    UserError where sources were made by different tokenizers.
    """

    def __init__(self, sources: Sequence[Batches], phases: Sequence[Phase],
                 difficulty: dict[int, np.ndarray] | None = None):
        assert sources and phases and all(isinstance(source, Batches) for source in sources)
        for phase in phases:
            assert len(phase.weights) == len(sources) and sum(phase.weights) == 1 and min(phase.weights) >= 0
            assert phase.order == "random" or phase.windows is not None, "only an end makes an order"
        same_rows(sources)
        super().__init__(sources[0])
        self.sources, self.phases, self.difficulty = tuple(sources), tuple(phases), difficulty or {}
        self.starts, self._before = [0], [[0] * len(sources)]  # of each phase: its first window, and how
        for phase in phases[:-1]:                               # many of each source come before it
            self.starts.append(self.starts[-1] + phase.windows)
            self._before.append(add(self._before[-1], turns(phase.windows, phase.weights)))
        self._sorted = {}

    def at(self, step: int):
        """Return this rank's (inputs, targets) for `step`, int64 (B, T) each: a function of (seed, step)."""
        places = [self.place(number) for number in self.numbers(step)]
        whole = None
        for source in sorted({source for source, _ in places}):
            rows = [row for row, place in enumerate(places) if place[0] == source]
            parts = self.sources[source].rows([places[row][1] for row in rows])  # inputs, targets, …
            whole = whole or tuple(part.new_empty(len(places), *part.shape[1:]) for part in parts)
            for mixed, part in zip(whole, parts):
                mixed[rows] = part
        return whole

    def place(self, number: int) -> tuple[int, int]:
        """(source, number in the source's own row) of window `number` of the row of all."""
        phase = bisect_right(self.starts, number) - 1
        n, weights = number - self.starts[phase], self.phases[phase].weights
        counts, after = turns(n, weights), turns(n + 1, weights)
        source = next(i for i, (count, next_count) in enumerate(zip(counts, after)) if next_count > count)
        own = self._before[phase][source] + counts[source]
        if self.phases[phase].order != "random" and n < self.phases[phase].windows:
            own = self.by_difficulty(phase, source, own)
        return source, own

    def by_difficulty(self, phase: int, source: int, own: int) -> int:
        """Which number of the source's row stands at `own`, where its windows of this phase are sorted.

        Those of one epoch are sorted among themselves: across epochs, the same windows would come in pairs.
        """
        batches, first = self.sources[source], self._before[phase][source]
        last = first + turns(self.phases[phase].windows, self.phases[phase].weights)[source]
        epoch = own // batches.windows
        low, high = max(first, epoch * batches.windows), min(last, (epoch + 1) * batches.windows)
        key = phase, source, epoch
        if key not in self._sorted:
            start = epoch * batches.windows
            values = self.difficulty[source][batches.order(epoch)[low - start:high - start]]
            values = -values if self.phases[phase].order == "hard_first" else values
            self._sorted = {k: order for k, order in self._sorted.items() if k[1] != source}  # one a source
            self._sorted[key] = low + np.argsort(values, kind="stable")
        return int(self._sorted[key][own - low])

    def seen(self, windows: int) -> list[int]:
        """How many of the first `windows` windows of the row are each source's."""
        phase = max(0, bisect_right(self.starts, windows) - 1)
        return add(self._before[phase], turns(windows - self.starts[phase], self.phases[phase].weights))

    @property
    def identity(self) -> dict:
        """What a run on these batches must have in common with the one it goes on from: for train.py."""
        checks = {str(i): hashlib.sha256(values).hexdigest() for i, values in sorted(self.difficulty.items())}
        return {"mixture": {"sources": [source.meta["train"]["sha256"] for source in self.sources],
                            "phases": [[phase.windows, list(map(str, phase.weights)), phase.order]
                                       for phase in self.phases], "difficulty": checks}}


class Replay(Mixture):
    """Windows of a new corpus and, in between, of an old one: against forgetting, in continued pretraining.

    share: of the windows, in [0, 1), taken as the decimal number that it is written as. Of the first n
    windows of the endless row that all ranks share, floor(n * share) are old. Attributes are those of `new`.
    """

    def __init__(self, new: Batches, old: Batches, share: float):
        assert 0 <= share < 1
        self.old, self.share = old, Fraction(str(share))
        super().__init__([new, old], [Phase(None, (1 - self.share, self.share))])

    @property
    def identity(self) -> dict:
        return {"replay": self.old.meta["train"]["sha256"]}


def same_rows(sources: Sequence[Batches]) -> None:
    """Raise UserError where two sources' tokens differ in meaning; rows of another size are our mistake."""
    last = sources[-1]
    for source in sources[:-1]:
        for name in ("seq_len", "batch_size", "rank", "world_size"):
            assert getattr(source, name) == getattr(last, name), f"{name} of two sources differ"
        if source.meta.get("tokenizer") != last.meta.get("tokenizer"):
            raise UserError(f"{source.folder} and {last.folder} were made by different tokenizers; make the "
                            f"first anew with that of the second: python data.py --tokenizer {last.folder}")


def add(one: Sequence[int], other: Sequence[int]) -> list[int]:
    return [a + b for a, b in zip(one, other)]


# ------------------------------------------------------------------------------------------------------------
# The file


def open_mixture(path: str | Path, batch_size: int, seq_len: int, windows: int, content: dict | None = None,
                 **place) -> Mixture:
    """The mixture of the train splits that a file describes; `names` has what it calls them.

    windows: of the whole run, of which phases have shares. content: of the file, if it is not written yet.
    place: seed, rank, world_size, verify, as of Batches. tokens and text_bytes are those of all sources, data
    (which a bigram start counts) those of the source that the run sees most of.
    Raises UserError for a file that makes no sense, and for shards that are missing or damaged.
    """
    content = content or read_mixture(path)
    sources = [Batches(folder, "train", batch_size, seq_len, **place)
               for folder in content["sources"].values()]
    sizes = {name: source.tokens for name, source in zip(content["sources"], sources)}
    phases = []
    for i, length in enumerate(lengths(content["phases"], seq_len, windows, str(path))):
        phase, name = content["phases"][i], title(content["phases"][i], i)
        weights = shares(phase, sizes, f"{path}: {name}")
        phases.append(Phase(length, weights, phase.get("order", "random"), name))
    mixture = Mixture(sources, phases, read_difficulty(Path(path), content, sources, phases))
    mixture.names, seen = tuple(content["sources"]), mixture.seen(windows)
    mixture.data = sources[seen.index(max(seen))].data
    mixture.tokens, mixture.text_bytes = (sum(getattr(source, name) for source in sources)
                                          for name in ("tokens", "text_bytes"))
    return mixture


def read_mixture(path: str | Path) -> dict:
    """What the file holds, its form checked: {"sources": {name: folder}, "phases": [{…}, …]}."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; python mixture.py --sources … writes one") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON: {error}") from None
    return checked(content, str(path))


def first_source(data: str) -> Path:
    """The folder of token shards that `data` names: itself, or the first source of a mixture."""
    return Path(next(iter(read_mixture(data)["sources"].values())) if data.endswith(".json") else data)


KEYS = {"name": (str, "text"), "share": (float, "a number"), "tokens": (int, "a whole number"),
        "weights": (dict, "{source: share}"), "temperature": (float, "a number"), "order": (str, "text")}


def checked(content, where: str) -> dict:
    """The content of a file, its form found to be right; UserError, which begins with `where`, if not."""
    def refuse(unless: bool, message: str):
        if not unless:
            raise UserError(f"{where}: {message}")

    refuse(isinstance(content, dict) and content.keys() <= {"sources", "phases", "difficulty"},
           'one object is expected, {"sources": {name: folder}, "phases": [{"share": …, "weights": …}]}')
    sources, phases = content.get("sources"), content.get("phases")
    refuse(isinstance(sources, dict) and sources and all(isinstance(x, str) for x in sources.values()),
           'it names no source; "sources" is {name: folder of token shards}')
    refuse(isinstance(phases, list) and phases and all(isinstance(phase, dict) for phase in phases),
           'it has no phase; "phases" is a list of {"share": of the run, "weights": {source: share}}')
    for i, phase in enumerate(phases):
        about = title(phase, i)
        for key, value in phase.items():
            refuse(key in KEYS, f"{about}: unknown key {key!r}; there are {', '.join(KEYS)}")
            kind, words = KEYS[key]
            right = type(value) is kind or (kind is float and type(value) is int)
            refuse(right and (type(value) is not float or math.isfinite(value)),
                   f"{about}: {key} {value!r} is not {words}")
        order = phase.get("order", "random")
        refuse(order in ORDERS, f"{about}: order {order!r} is not one of {', '.join(ORDERS)}")
    files = content.get("difficulty", {"files": {}})
    files = files.get("files") if isinstance(files, dict) else None
    needed = {"file", "sha256", "shard"}
    refuse(isinstance(files, dict) and all(isinstance(entry, dict) and needed <= entry.keys()
                                           for entry in files.values()),
           '"difficulty" is not what --score writes; remove it, and score anew')
    return content


def title(phase: dict, number: int) -> str:
    return str(phase.get("name") or f"phase {number + 1}")


def lengths(phases: list[dict], seq_len: int, windows: int, where: str) -> list[int]:
    """Windows of each phase. Its end is rounded, not its length: so nothing is lost over many phases."""
    key = "share" if "share" in phases[0] else "tokens"
    values = [phase.get(key) for phase in phases]
    if len(phases) == 1 and values == [None]:
        return [windows]
    if None in values or any({"share", "tokens"} <= phase.keys() for phase in phases):
        raise UserError(f'{where}: each phase needs a length, all "share" (of the run) or all "tokens"')
    if min(values) <= 0:
        raise UserError(f"{where}: {key} {min(values)} is out of range; it must be more than 0")
    exact = [Fraction(str(value)) for value in values]
    if key == "share" and abs(sum(exact) - 1) > Fraction(1, 10**6):
        raise UserError(f"{where}: the phases' shares {', '.join(map(str, values))} sum to "
                        f"{float(sum(exact)):g}; they must sum to 1")
    scale = windows if key == "share" else Fraction(1, seq_len)
    ends = [round(sum(exact[:i]) * scale) for i in range(len(exact) + 1)]
    return [end - start for start, end in zip(ends, ends[1:])]


def shares(phase: dict, sizes: dict[str, int], where: str = "phase") -> tuple[Fraction, ...]:
    """Each source's share of a phase: its weight; what these leave goes by temperature to all others.

    sizes: tokens by source. A phase that says nothing has temperature 1. Weights are taken as the decimal
    numbers that they are written as; those of a temperature are rounded to a millionth, so that they are the
    same on every machine.
    """
    weights = phase.get("weights", {})
    for name, weight in weights.items():
        if name not in sizes:
            raise UserError(f"{where}: {name!r} is none of the sources {', '.join(sizes)}")
        if type(weight) not in (int, float) or not 0 <= weight <= 1:
            raise UserError(f"{where}: weight {weight!r} of {name} is out of range; it must be 0 to 1")
    exact = {name: Fraction(str(weight)) for name, weight in weights.items()}
    total, others = sum(exact.values()), [name for name in sizes if name not in weights]
    temperature = phase.get("temperature", None if weights else 1)
    if temperature is not None and not 10**-6 <= temperature <= 10**6:
        raise UserError(f"{where}: temperature {temperature} is out of range; it must be 1e-6 to 1e6")
    if temperature is not None and others and total < 1:
        parts = by_temperature({name: sizes[name] for name in others}, temperature)
        exact |= {name: (1 - total) * part for name, part in parts.items()}
    elif not total or abs(total - 1) > Fraction(1, 10**6):
        sized = ", ".join(f"{name} {float(weight / total):.4g}" for name, weight in exact.items() if total)
        raise UserError(f"{where}: the weights sum to {float(total):g}, not 1"
                        + f"; in these proportions: {sized}" * bool(sized))
    else:
        exact = {name: weight / total for name, weight in exact.items()}
    return tuple(exact.get(name, Fraction(0)) for name in sizes)


def by_temperature(sizes: dict[str, int], temperature: float) -> dict[str, Fraction]:
    """p ~ size^(1/t), together 1."""
    logs = {name: math.log(size) / temperature for name, size in sizes.items()}
    powers = {name: math.exp(value - max(logs.values())) for name, value in logs.items()}  # at most 1
    parts = {name: max(1, round(10**6 * power / sum(powers.values()))) for name, power in powers.items()}
    return {name: Fraction(part, sum(parts.values())) for name, part in parts.items()}


# ------------------------------------------------------------------------------------------------------------
# The picture


def picture(mixture: Mixture, windows: int, columns: int = 60) -> str:
    """The shares from the first window to the last, a line a source, with its tokens and epochs."""
    edges = [windows * i // columns for i in range(columns + 1)]
    seen = [mixture.seen(edge) for edge in edges]
    width = max(map(len, mixture.names))
    lines = [" " * (width + 1) + phase_marks(mixture, windows, columns) + f"{'tokens':>15}{'epochs':>9}"]
    for i, (name, source) in enumerate(zip(mixture.names, mixture.sources)):
        bars = [(after[i] - before[i]) / max(1, end - start)
                for before, after, start, end in zip(seen, seen[1:], edges, edges[1:])]
        drawn = "".join(" " if not bar else "▁▂▃▄▅▆▇█"[min(7, int(8 * bar))] for bar in bars)
        count = seen[-1][i]
        lines.append(f"{name:<{width}} {drawn}{count * source.seq_len:>15,}{count / source.windows:>9.2f}")
    return "\n".join(lines)


def phase_marks(mixture: Mixture, windows: int, columns: int) -> str:
    """A line with a bar and a name where each phase begins."""
    line = [" "] * columns
    for start, phase in zip(mixture.starts, mixture.phases):
        at = columns * start // windows if start < windows else columns
        for offset, character in enumerate("|" + phase.name):
            if at + offset < columns:
                line[at + offset] = character
    return "".join(line)


def warnings(mixture: Mixture, windows: int) -> list[str]:
    """A line for each source that would be seen over MOST_EPOCHS times, and one if the phases end before."""
    lines = []
    for name, source, count in zip(mixture.names, mixture.sources, mixture.seen(windows)):
        if count > MOST_EPOCHS * source.windows:
            lines.append(f"warning: {name} is seen {count / source.windows:.1f} times; over {MOST_EPOCHS}, "
                         f"the same text is worth less and less. A smaller weight, or more text, helps")
    end = mixture.starts[-1] + (mixture.phases[-1].windows or 0)
    if mixture.phases[-1].windows is not None and end < windows:
        lines.append(f"warning: the phases end after {end * mixture.seq_len:,} tokens of "
                     f"{windows * mixture.seq_len:,}; the shares of the last go on")
    elif mixture.starts[-1] >= windows and len(mixture.phases) > 1:
        lines.append(f"warning: the run ends before its last phase, {mixture.phases[-1].name}, begins")
    return lines


# ------------------------------------------------------------------------------------------------------------
# Difficulty: the loss of each window under a model


def scored(content: dict, path: Path, folder: str, seq_len: int, batch_size: int) -> dict:
    """The content of a mixture, with the loss of all its sources' train windows under the model in `folder`.

    Beside the mixture each source gets a file of raw little-endian float32, one a window: nats a token.
    """
    from checkpoint import load_model  # here, as these need torch, and processes that import data.py do not
    from parallel import choose_device
    model, _ = load_model(folder, choose_device("auto"))
    files = {}
    for name, source in content["sources"].items():
        batches = Batches(source, "train", batch_size, seq_len)
        values = losses(model.eval(), batches, name).astype("<f4").tobytes()
        file = path.with_name(f"{path.stem}.{len(files)}.{seq_len}.f32")
        with config.open_whole(file) as out:
            out.write(values)
        files[name] = {"file": file.name, "sha256": hashlib.sha256(values).hexdigest(),
                       "shard": batches.meta["train"]["sha256"]}
    return content | {"difficulty": {"model": folder, "seq_len": seq_len, "files": files}}


def losses(model, batches: Batches, name: str) -> np.ndarray:
    """The mean loss of each window's targets, nats a token, in the order of the file: (windows,)."""
    import torch
    found, device = [], next(model.parameters()).device
    with torch.inference_mode():
        for step in tqdm(range(batches.steps), f"score {name}", unit="batch", disable=None):
            inputs, targets = (part.to(device) for part in batches.in_order(step))
            logits = model(inputs).float()  # (B, T, V)
            nats = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(),
                                                     reduction="none", ignore_index=IGNORE)  # (B T,)
            found.append(nats.view_as(targets).sum(1) / (targets != IGNORE).sum(1).clamp(min=1))
    return torch.cat(found)[:batches.windows].cpu().numpy()


def read_difficulty(path: Path, content: dict, sources: Sequence[Batches], phases: Sequence[Phase]
                    ) -> dict[int, np.ndarray]:
    """Difficulties by number of the source, of those sources that an ordered phase takes windows of."""
    needed = {i for phase in phases if phase.order != "random" for i, w in enumerate(phase.weights) if w}
    names, found, seq_len = list(content["sources"]), {}, sources[0].seq_len
    remedy = f"python mixture.py --mix {path} --score MODEL --seq_len {seq_len}"
    for i in sorted(needed):
        about = content.get("difficulty", {})
        entry = about.get("files", {}).get(names[i])
        if entry is None or about.get("seq_len") != seq_len:
            raise UserError(f"{path}: an ordered phase needs the loss of {names[i]}'s windows of {seq_len} "
                            f"tokens; score them: {remedy}")
        file = path.with_name(Path(entry["file"]).name)
        values = np.fromfile(file, "<f4") if file.is_file() else np.empty(0, "<f4")
        whole = hashlib.sha256(values).hexdigest() == entry["sha256"] and len(values) == sources[i].windows
        if not whole or entry["shard"] != sources[i].meta["train"]["sha256"]:
            raise UserError(f"{file} is not the loss of {names[i]}'s windows as they are now; score them "
                            f"anew: {remedy}")
        found[i] = values
    return found


# ------------------------------------------------------------------------------------------------------------
# The command line


@dataclass
class Settings:
    mix: str | None = None  # a mixture to draw (and to score); none: write one from the next three
    sources: tuple[str, ...] = ()  # name=folder of token shards, each
    phases: tuple[str, ...] = ("100% temperature:1",)  # each "LENGTH WHAT …": 80% (of the run) or 2e6
        # (tokens), then source:weight, a source alone (the rest), temperature:t (the rest), easy_first …
    out: str = "mix.json"  # the file to write
    overwrite: bool = False  # replace it
    score: str | None = None  # a model folder: note each window's loss under it, for phases with an order
    tokens: int = 900 * 16 * 128  # of the run, to count epochs and to draw; default: of train.py's main job
    seq_len: int = 128  # tokens a window
    batch_size: int = 16  # windows at a time, where they are scored

    def __post_init__(self):
        config.require(self, tokens=(1, None), seq_len=(2, None), batch_size=(1, None))
        if (self.mix is None) == (not self.sources):
            raise UserError("pass --sources name=folder …, to write a mixture, or --mix file, to draw one")
        if self.mix is not None:
            config.refuse(self, f"is of a mixture that is written, and --mix {self.mix} is one that was",
                          "phases", "out", "overwrite")
        if self.score is None:
            config.refuse(self, "is of windows that a model scores, and --score names none", "batch_size")


def parse_phase(text: str) -> dict:
    """The phase that words of the command line stand for: "15% code general:0.05" -> its JSON."""
    length, *words = text.split()
    phase, alone = {"name": text}, []
    try:
        phase |= ({"share": float(Fraction(length[:-1]) / 100)} if length.endswith("%")
                  else {"tokens": int(float(length))})
        for word in words:
            name, colon, value = word.partition(":")
            if word in ORDERS:
                phase["order"] = word
            elif colon and name == "temperature":
                phase["temperature"] = float(value)
            elif colon:
                phase.setdefault("weights", {})[name] = float(value)
            else:
                alone.append(name)
    except (ValueError, OverflowError):
        raise UserError(f'--phases {text!r} is not "LENGTH WHAT …", as "15% code general:0.05"') from None
    if len(alone) > 1 or (alone and "temperature" in phase):
        raise UserError(f"--phases {text!r}: {alone[-1]} has no weight; one source alone can have the rest")
    if alone:
        weights = phase.setdefault("weights", {})
        weights[alone[0]] = float(1 - sum(Fraction(str(weight)) for weight in weights.values()))
    return phase


def new_mixture(settings: Settings) -> dict:
    """What --sources and --phases describe."""
    if Path(settings.out).exists() and not settings.overwrite:
        raise UserError(f"--out {settings.out} exists; pass --overwrite to replace it, or another --out")
    sources = {}
    for source in settings.sources:
        name, _, folder = source.partition("=")
        if not name or not folder or name in sources:
            raise UserError(f"--sources {source} is not name=folder, each name once")
        sources[name] = folder
    content = {"sources": sources, "phases": [parse_phase(text) for text in settings.phases]}
    return checked(content, settings.out)


def main():
    settings = config.parse(Settings)
    path, windows = Path(settings.mix or settings.out), max(1, settings.tokens // settings.seq_len)
    content = read_mixture(path) if settings.mix else new_mixture(settings)
    if settings.score:
        content = scored(content, path, settings.score, settings.seq_len, settings.batch_size)
    mixture = open_mixture(path, 1, settings.seq_len, windows, content)  # before it is written: is it right?
    if settings.score or settings.sources:
        with config.open_whole(path, "w") as file:
            file.write(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    print(f"{path}: {settings.tokens:,} tokens", picture(mixture, windows), sep="\n")
    print(*warnings(mixture, windows), sep="\n")


if __name__ == "__main__":
    config.run(main)
