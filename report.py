"""One page about all runs: what each stage did, its curves, what is normal, and texts side by side.

    python report.py                                # all folders below runs -> runs/report.html
    python report.py runs/base runs/a runs/b        # these over each other, and in which settings they differ
    python report.py --terminal                     # the curves of the losses, here, with block characters

The page needs nothing else: no script, no network. It is made anew each time, whatever stood there. Files
that are missing, cut or damaged are named on it; a run that is under way is shown as far as it is.
"""
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import config
import funnel
import plot
from charts import charts_of, figure, lacking, overlays, shown
from config import UserError
from logs import (ORDER, Run, chief_key, differences, figures, find, in_order, in_words, number, part, read,
                  smooth)
from metrics import INTRODUCTIONS
from page import bar, document, escape, printable, table

STYLE = plot.STYLE + """
svg { background: none; max-width: 100%; }
.chart { width: 100%; max-width: 44rem; height: auto; display: block; }
.chart text { paint-order: stroke; stroke: var(--paper); stroke-width: 4px; stroke-linejoin: round; }
svg { fill: var(--ink); } figure { margin: 0; } figure h4 { margin: 0; font-size: 1rem; }
figcaption p { margin: 0 0 .4rem; font-size: .88rem; color: var(--soft); }
figcaption { margin-top: .4rem; } .drawn { min-width: 0; }
@media (min-width: 64rem) {
  .charts .lead:first-child:nth-last-child(odd) { grid-column: 1 / -1; display: grid;
    grid-template-columns: 3fr 2fr; column-gap: 2.5rem; }
  .lead:first-child:nth-last-child(odd) h4 { grid-column: 1 / -1; } }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 27rem), 1fr));
          gap: 2.2rem 2.5rem; margin: 1.4rem 0; }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: .1rem 1.2rem; margin: .2rem 0 0; padding: 0;
          font-size: .85rem; }
nav ul { list-style: none; display: flex; flex-wrap: wrap; gap: .2rem 1.3rem; padding: 0;
         margin: 0 0 1.6rem; }
.skip { position: absolute; left: -99rem; } .skip:focus { left: 1rem; top: .5rem; background: var(--paper);
        padding: .4rem .8rem; z-index: 1; }
.sample { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 17rem), 1fr));
          gap: .2rem 1.6rem; background: var(--card); padding: .8rem 1rem .3rem;
          margin: 0 0 1rem; border-radius: 6px; }
.sample .prompt { grid-column: 1 / -1; } .sample dt { font-size: .8rem; color: var(--soft); }
.sample dd { margin: 0; } .sample pre { max-height: 18rem; overflow: auto; }
@media (max-width: 40rem) { .scroll table { width: max-content; max-width: 56rem; }
  .wide { min-width: 36rem; } .scroll :is(td, th) { white-space: nowrap; }
  .chart text { font-size: 21px; } .chart .odd { display: none; } }
"""
CHIEF = {"pretraining": "bits per byte, held out", "preferences": "margin of the rewards",
         "reward model": "accuracy", "reinforcement": "sampled: reward",
         "distillation": "held out, bits per byte"}  # the one of a kind's figures that the story tells
OWN_SECTIONS = 4  # more runs of a kind than this are laid over each other
SAMPLES, SAMPLE_LENGTH = 8, 1500  # of a run; characters of a text


# ------------------------------------------------------------------------------------------------------------
# 1. The story


def chief(run: Run) -> tuple[str, float | None, float | None]:
    """(what, before, after): the one figure of a run that the story tells."""
    found = {name: (name, before, after) for name, before, after, _ in figures(run)}
    what = found.get(CHIEF.get(run.kind), next(iter(found.values()), None))
    key = chief_key(run)
    if run.kind == "pairs":
        return "train pairs", None, number(run.results.get("train pairs"))
    if what is None:  # nothing held out yet
        return ("–", None, None) if key is None else (
            f"{in_words(key)}, training", run.series[key][0][1], smooth(run.series[key])[-1][1])
    if run.kind == "pretraining" and what[1] is None and "bits_per_byte" in run.series:
        return f"{what[0]} (before: of the first step)", run.series["bits_per_byte"][0][1], what[2]
    return what


def duration(seconds: float) -> str:
    whole = round(seconds)
    return "–" if not seconds else f"{seconds:.1f} s" if seconds < 10 else f"{whole} s" if whole < 120 else \
        f"{whole // 60} min {whole % 60} s" if whole < 7200 else f"{seconds / 3600:.1f} h"


def memory(run: Run) -> str:
    return "–" if run.memory is None else f"{run.memory:.2f} GiB"


def story(runs: Sequence[Run]) -> str:
    rows = []
    for run in runs:
        what, before, after = chief(run)
        if run.kind == "data":
            sizes = (part(run.meta, "funnel", name) for name in ("read", "kept"))  # [documents, bytes]
            before, after = (number(size[-1]) if isinstance(size, list) and size else None for size in sizes)
            what = "bytes of text"
        steps = f"{shown(run.steps)} of {shown(run.wanted)}" if (run.wanted or 0) > run.steps else shown(
            run.steps or None)
        rows.append((run.name, run.kind, steps, duration(run.seconds), memory(run), shown(run.tokens), what,
                     shown(before), shown(after)))
    heads = ("run", "what it is", "steps", "time in steps", "peak memory", "tokens", "chief figure", "before",
             "after")
    return table("The stages in order: each begins with what an earlier one left", heads, rows)


def costs(runs: Sequence[Run]) -> str:
    """Time and memory as bars."""
    longest = max((run.seconds for run in runs), default=0) or 1
    most = max((run.memory or 0 for run in runs), default=0) or 1
    rows = [(run.name, duration(run.seconds), bar(run.seconds / longest), memory(run),
             bar((run.memory or 0) / most)) for run in runs if run.seconds or run.memory]
    return table("Seconds in steps (evaluation and samples not counted), and the most memory held", (
        "run", "time", "beside the longest", "memory", "beside the largest"), rows, wide=True) if rows else ""


# ------------------------------------------------------------------------------------------------------------
# 2. Sections


def section(kind: str, runs: Sequence[Run]) -> str:
    """All runs of a kind: each by itself or, where they are many or belong side by side, over each other."""
    together = len(runs) > OWN_SECTIONS or kind == "distillation" and len(runs) > 1
    parts = [f'<section id="{anchor(kind)}">\n<h2>{escape(kind.capitalize())}</h2>\n'
             f"<p>{escape(INTRODUCTIONS[kind])}</p>\n"]
    if together:
        parts += [side_by_side(runs), overlays(runs)]
    for i, run in enumerate(runs):
        own = "" if together else charts_of(run, explain=not i) + held_out(run)
        told = state(run) + of_data(run) + own + of_rewards(run) + samples(run)
        parts.append(f"<h3>{escape(run.name)}</h3>\n{told}" if told else "")
    return "".join(parts) + "</section>\n"


def anchor(kind: str) -> str:
    return kind.replace(" ", "-")


def state(run: Run) -> str:
    """How far a run is, and what is missing of it."""
    words = list(map(printable, run.problems))
    if run.wanted and run.steps < run.wanted and run.series:
        words.insert(0, f"Step {run.steps:,} of {run.wanted:,}: under way, or stopped before its end.")
    if run.kind in CHIEF and run.kind != "pretraining" and not (run.folder / "results.json").exists():
        words.append("results.json is missing: it is written at the end, with the figures before and after")
    if missing := lacking(run):
        words.append(f"log.jsonl has no figures for: {', '.join(missing)}")
    rows = "".join(f"<li>{escape(word)}</li>" for word in words)
    return f'<ul class="plain warn">{rows}</ul>\n' if rows else ""


def held_out(run: Run) -> str:
    """The figures before and after; columns of which nothing is known are left out."""
    rows = [(name, shown(before), shown(after), note) for name, before, after, note in figures(run)]
    if not rows:
        return ""
    columns = zip(("figure", "before", "after", "note"), *rows)
    heads, *rows = zip(*(column for column in columns if set(column[1:]) - {"–", ""}))
    return table(f"{run.name}: held-out data, before and after", heads, rows)


def side_by_side(runs: Sequence[Run]) -> str:
    """A table of several runs: settings that tell them apart, and their figures."""
    known = [{how: value for name, *values, _ in figures(run) for how, value in
              zip((f"{name}, before", name), values) if value is not None} for run in runs]
    names = dict.fromkeys(name for found in known for name in found)
    costs_ = [("steps", [shown(run.steps) for run in runs]), ("tokens", [shown(run.tokens) for run in runs]),
              ("time in steps", [duration(run.seconds) for run in runs]),
              ("peak memory", [memory(run) for run in runs]),
              *((f"{in_words(key)}, training, last 60th", [
                  shown(smooth(run.series[key])[-1][1]) if chief_key(run) == key else "–" for run in runs])
                for key in dict.fromkeys(map(chief_key, runs)) if key)]
    rows = [(name, *values) for name, values in costs_]
    rows += [(name, *(shown(found.get(name)) for found in known)) for name in names]
    heads = ("figure", *(run.name for run in runs))
    settings = [(name, *map(setting, values)) for name, values in differences(runs).items()]
    told = table("Settings in which they differ", ("setting", *heads[1:]), settings) if settings else \
        '<p class="soft">Their settings are the same, or not known.</p>\n'
    return table("Last figures", heads, rows) + told


def setting(value) -> str:
    return cut(" ".join(map(str, value)) if isinstance(value, list) else config.as_text(value), 200)


def of_data(run: Run) -> str:
    """Documents and tokens by split, the compressors, and the funnel; of pairs their counts."""
    if run.kind == "pairs":
        rows = [(name, shown(value)) for name, value in run.results.items() if number(value) is not None]
        return table(f"{run.name}: what was made", ("what", "number"), rows) if rows else ""
    if run.kind != "data":
        return ""
    rows = []
    for split in ("train", "val"):
        documents, size, tokens = (number(part(run.meta, split, key)) for key in
                                   ("documents", "text_bytes", "tokens"))
        bytes_a_token = size / tokens if size and tokens else None
        rows.append((split, *map(shown, (documents, size, tokens, bytes_a_token))))
    text = table("Tokens", ("split", "documents", "bytes of text", "tokens", "bytes a token"), rows)
    needed = " and ".join(f"{name} {value:.3f}" for name in ("xz", "gzip")
                          if (value := number(part(run.meta, "compressors", name))))
    if needed:
        text += (f"<p>Programs that compress need this many bits per byte of the held-out text: "
                 f"{escape(needed)}. A model that needs fewer has found more in the text than they do.</p>\n")
    try:
        return text + (funnel.body(run.funnel) if run.funnel else "")
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError):
        return f'{text}<p class="warn">report.json is damaged: it has no funnel that can be read</p>\n'


def of_rewards(run: Run) -> str:
    """What a reward model's probabilities and rewards are worth on held-out pairs."""
    rows = [[number(row.get(key)) for key in ("from", "to", "pairs", "predicted", "came_true")]
            for row in part(run.results, "calibration") or [] if isinstance(row, dict)] \
        if isinstance(part(run.results, "calibration"), list) else []
    text = table(f"{run.name}: how often what is predicted comes true; equal is calibrated", (
        "predicted, from", "to", "pairs", "mean prediction", "came true"),
        [list(map(shown, row)) for row in rows]) if rows else ""
    edges = part(run.results, "histogram", "edges")
    lines = {side: [(x, y) for x, y in zip(edges, counts) if None not in (number(x), number(y))]
             for side in ("chosen", "rejected") if isinstance(edges, list) and isinstance(
                 counts := part(run.results, "histogram", side), list)}
    drawn = figure("Rewards of held-out answers", "answers", lines, x_name="reward",
                   why="Where the rewards lie: two hills apart are a judge that sees a difference, hills "
                       "that lie on each other are one that guesses.")
    return text + (f'<div class="charts">{drawn}</div>\n' if drawn else "")


def samples(run: Run) -> str:
    """Texts before and after, side by side."""
    made = []
    for sample in run.samples[:SAMPLES]:
        made.append('<dl class="sample">' + "".join(
            f'<div class="{name}"><dt>{name}</dt><dd><pre>{escape(cut(sample[name]))}</pre></dd></div>'
            for name in ("prompt", "before", "after", "author") if name in sample) + "</dl>\n")
    return f"<h4>Samples</h4>\n{''.join(made)}" if made else ""


def cut(text: str, most: int = SAMPLE_LENGTH) -> str:
    return text if len(text) <= most else text[:most] + " …"


# ------------------------------------------------------------------------------------------------------------
# 3. The page, and the terminal


def page(runs: Sequence[Run], compared: bool) -> str:
    """The report on all runs, or with `compared` on what sets these apart."""
    kinds = [kind for kind in ORDER if any(run.kind == kind for run in runs)]
    title = "Runs compared" if compared else "The life of a language model, run by run"
    parts = [f"<h1>{title}</h1>\n<p>Each run is a folder that a stage has written. Curves are means of "
             f"stretches, with the single steps thin behind them; rings are measured on held-out data.</p>\n"]
    if compared:
        sections = {"Side by side": side_by_side(runs) + overlays(runs), "Run by run": "".join(
            f"<h3>{escape(run.name)}</h3>\n{state(run)}{samples(run)}" for run in runs)}
    else:
        sections = {"The story": story(runs)}
        sections |= {kind: section(kind, [run for run in runs if run.kind == kind]) for kind in kinds}
    sections["Time and memory"] = costs(runs)
    for name, body in sections.items():
        parts.append(body if body.startswith("<section") else
                     f'<section id="{anchor(name)}">\n<h2>{name}</h2>\n{body}</section>\n')
    links = "".join(f'<li><a href="#{anchor(name)}">{name.capitalize()}</a></li>' for name in sections)
    before = (f'<a class="skip" href="#main">To the report</a>\n<nav aria-label="sections"><ul>{links}</ul>'
              f"</nav>\n")
    return document(title, "".join(parts), STYLE, before)


def terminal(run: Run, columns: int, rows: int = 6, encoding: str = "utf-8") -> str:
    """The run's loss, or its reward, from its first step to its last, drawn with block characters."""
    key = chief_key(run)
    if key is None:
        return f"{run.name}: no curve; {'; '.join(run.problems) or 'its log has no loss'}"
    points = run.series[key]
    means = smooth(points, max(4, columns - 10))
    low, high = min(y for _, y in means), max(y for _, y in means)
    least = 1 / (8 * rows)  # so that the lowest is seen, too
    heights = [least + (1 - least) * ((y - low) / (high - low) if high > low else 1.0) for _, y in means]
    lines = plot.blocks(heights, rows)
    try:
        "".join(lines).encode(encoding)
    except (UnicodeEncodeError, LookupError):  # Windows' code pages
        lines = [line.translate(str.maketrans("▁▂▃▄▅▆▇█", "..::||##")) for line in lines]
    names = [f"{high:.4g}", *[""] * (rows - 2), f"{low:.4g}"]
    last = f"{points[-1][0]:,}"
    return "\n".join([f"{run.name}: {in_words(key)}",
                      *(f"{name:>8} |{line}" for name, line in zip(names, lines)),
                      f"{'':>8} +{'-' * len(means)}",
                      f"{'':>10}{points[0][0]:,}{last:>{max(1, len(means) - len(str(points[0][0])))}}"])


# ------------------------------------------------------------------------------------------------------------
# 4. The command


@dataclass
class Settings:
    runs: str = "runs"  # the folder below which all run folders are taken
    compare: tuple[str, ...] = ()  # only these run folders, over each other; their names alone do as well:
                                   # python report.py runs/base runs/seed1
    out: str | None = None  # the page, which is made anew each time; none: report.html in `runs`
    terminal: bool = False  # draw the losses here, with block characters, in place of the page


def chosen(settings: Settings) -> list[Run]:
    """The runs that are asked for; UserError where there are none."""
    for name in settings.compare:
        if not Path(name).is_dir():
            raise UserError(f"{name!r}: no such folder; name run folders, such as runs/base, or none for all "
                            f"below --runs")
    if settings.compare:
        folders = {Path(name).resolve(): name for name in settings.compare}
        short = len({folder.name for folder in folders}) == len(folders)  # "base", where that says enough
        return [read(folder, printable(folder.name if short else name)) for folder, name in folders.items()]
    top = Path(settings.runs)
    runs = in_order([read(folder, printable(folder.relative_to(top))) for folder in find(top)])
    if not runs:
        raise UserError(f"{settings.runs}: no run folder in it; train.py makes the first, in runs/base, and "
                        f"--runs names another place, such as runs/quick/runs")
    return runs


def main(argv: Sequence[str] | None = None):
    """argv: default sys.argv[1:]; run folders, then flags."""
    argv = sys.argv[1:] if argv is None else list(argv)
    named = argv[:1] and not argv[0].startswith("-")
    settings = config.parse(Settings, ["--compare", *argv] if named else argv)
    runs = chosen(settings)
    if settings.terminal:
        columns, encoding = shutil.get_terminal_size().columns, sys.stdout.encoding or "utf-8"
        drawn = [terminal(run, columns, encoding=encoding)
                 for run in runs if run.kind not in ("data", "pairs")]
        return print("\n\n".join(drawn) or "data and pairs have no curves, and there is no other run yet")
    out = Path(settings.out or Path(settings.runs, "report.html"))
    text = page(runs, compared=len(settings.compare) > 1)
    out.parent.mkdir(parents=True, exist_ok=True)
    with config.open_whole(out) as file:
        file.write(text.encode("utf-8", "replace"))  # half a character, as in a name that is no UTF-8: a "?"
    print(f"{len(runs)} {'run' if len(runs) == 1 else 'runs'}; written to {out}")


if __name__ == "__main__":
    config.run(main)
