"""A run's curves as figures of a page, and those of several runs over each other.

    charts_of(read(Path("runs/base")), explain=True)        # HTML, for report.py

Single steps scatter, so what is drawn strongly are means of stretches, and thin behind them the single steps,
of which a long log keeps the lowest and the highest of each stretch: no spike is lost.
"""
from collections.abc import Sequence
from pathlib import Path

import plot
from logs import Run, number, part, read_object, smooth, thin
from metrics import CHARTS, REFERENCE, REFERENCE_WHY, REFERENCES, lines_of, reference
from page import details, escape, printable, table

ALONG = {"step": "step", "val_kl_nats_per_reply": "KL, nats a reply"}  # what stands below the axis
MEANS, OVERLAID = 60, 10  # points of a smooth line; runs over each other at most


def shown(value) -> str:
    """A number in few digits."""
    if value is None:
        return "–"
    if float(value).is_integer() and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:.4g}" if 1e-4 <= abs(value) < 1e5 else f"{value:.2e}"


def points_of(run: Run, key: str, along: str = "step") -> list[tuple[float, float]]:
    """(x, value) of a key; nothing where the value is 0 from first to last: it was not computed."""
    points = run.series.get(key, [])
    if not any(value for _, value in points):
        return []
    if along == "step":
        return points
    places = dict(run.series.get(along, []))
    return [(places[step], value) for step, value in points if step in places]


def figure(title: str, unit: str, lines: dict, marks: dict | None = None, levels: dict | None = None,
           why: str = "", x_name: str = "step", more: dict | None = None) -> str:
    """A chart with its legend, its figures as a table to unfold, and what they mean.

    lines, marks: {name: points}; long lines are smoothed, with the single values thin behind them. more:
    lines that are smooth already.
    """
    lines = {printable(name): points for name, points in lines.items()}
    marks = {printable(name): points for name, points in (marks or {}).items()}
    drawn = {name: smooth(points, MEANS) if len(points) > MEANS else points
             for name, points in lines.items()} | (more or {})
    faint = {name: thin(points) for name, points in lines.items() if len(points) > MEANS}
    if max((len(points) for points in [*drawn.values(), *marks.values()]), default=0) < 2:
        return ""
    ends = ["{}: {:.4g} at {:.4g} to {:.4g} at {:.4g}, lowest {:.4g}, highest {:.4g}".format(
            name, *points[0][::-1], *points[-1][::-1], min(y for _, y in points), max(y for _, y in points))
            for name, points in [*lines.items(), *marks.items()] if points]
    chart = plot.line_chart(f"{title}, {unit}", x_name, unit, drawn, faint=faint, marks=marks, levels=levels,
                            about="; ".join([*ends, *(levels or {})]))
    legend = plot.legend(drawn, marks)
    kind, said = (' class="lead"', f"<p>{escape(why)}</p>\n") if why else ("", "")
    return (f'<figure{kind}>\n<h4>{escape(title)}</h4>\n<div class="drawn">{chart}{legend}</div>\n'
            f"<figcaption>{said}{details('figures', values(title, x_name, drawn, marks))}</figcaption>\n"
            f"</figure>\n")


def values(title: str, x_name: str, lines: dict, marks: dict) -> str:
    """The chart's figures: a dozen means of each line, and all rings."""
    columns = {name: smooth(points, 12) for name, points in lines.items() if points}
    columns |= {f"{name} (rings)" if name in lines else name: thin(points, 24)
                for name, points in marks.items() if points}
    places = sorted({x for points in columns.values() for x, _ in points})
    found = [dict(points) for points in columns.values()]
    rows = [(f"{x:.6g}", *(shown(column[x]) if x in column else "" for column in found)) for x in places]
    return table(f"{title}: means of stretches", (x_name, *columns), rows)


def charts_of(run: Run, explain: bool) -> str:
    """The charts of one run."""
    made, titles = [], set()
    for chart in CHARTS.get(run.kind, []) or CHARTS["pretraining"]:
        if chart.title in titles and chart.title == "Loss":
            continue  # in bits per byte, where that is known
        lines, marks = ({name: points_of(run, key, chart.along) for name, key in
                         lines_of(names, run.series).items()} for names in (chart.lines, chart.marks))
        ours = reference(run.kind, next(iter(chart.lines.values()), "")) if any(lines.values()) else []
        why = chart.why if explain else ""
        if ours and explain:
            why += " " + REFERENCE_WHY.format(steps=REFERENCES[next(iter(chart.lines.values()))][0])
        across = levels(run) if chart.unit == "bits per byte" else {}
        drawn = figure(chart.title, chart.unit, lines, marks, across, why,
                       ALONG[chart.along],
                       {REFERENCE: ours} if ours else {})
        if drawn:
            titles.add(chart.title)
            made.append(drawn)
    return f'<div class="charts">\n{"".join(made)}</div>\n' if made else ""


def lacking(run: Run) -> list[str]:
    """The titles of charts that this kind of run should have, and whose figures are not in its log."""
    wanted = [chart for chart in CHARTS.get(run.kind, []) if chart.lines and chart.along == "step"]
    there = {chart.title for chart in wanted if lines_of(chart.lines, run.series)}
    return [title for title in dict.fromkeys(chart.title for chart in wanted)
            if title not in there] if run.series else []


def levels(run: Run) -> dict[str, float]:
    """{name: bits per byte} that compressors need for the held-out text, by its data's meta.json."""
    name = Path(str(run.settings.get("data", "data"))).name
    found = part(read_object(run.folder.parent / name / "meta.json", []), "compressors")
    return {f"{name} {value:.3f}": value for name in ("xz", "gzip")
            if (value := number(part(found, name))) is not None}


def overlays(runs: Sequence[Run]) -> str:
    """The same curves of several runs over each other, each of those runs whose kind has it."""
    made, seen, titles = [], set(), set()
    charts = [chart for run in runs for chart in CHARTS.get(run.kind, [])]
    known = sorted({key for run in runs for key in run.series})
    for chart in (chart for i, chart in enumerate(charts) if chart not in charts[:i]):
        pairs = list(lines_of(chart.lines, known).items()) or [("", "")]
        rings = list(lines_of(chart.marks, known).values())
        fresh = chart.title not in titles or chart.title != "Loss"  # in bits per byte, where that is known
        for i, (label, key) in enumerate(pairs * fresh):
            mark = rings[i] if len(rings) == len(pairs) else ""
            if (key, mark, chart.along) in seen:
                continue
            seen.add((key, mark, chart.along))
            having = [run for run in runs[:OVERLAID] if chart in CHARTS.get(run.kind, [])]
            lines, marks = ({run.name: points_of(run, it, chart.along) if run in having else []
                             for run in runs[:OVERLAID]} for it in (key, mark))
            title = f"{chart.title}: {label}" if len(pairs) > 1 else chart.title
            drawn = figure(title, chart.unit, lines, marks, why=chart.why if not i else "",
                           x_name=ALONG[chart.along])
            titles |= {chart.title} if drawn else set()
            made.append(drawn)
    rest = ", ".join(run.name for run in runs[OVERLAID:])
    note = f'<p class="soft">Not drawn, as {OVERLAID} lines are enough: {escape(rest)}</p>\n' if rest else ""
    return f'<h3>Curves</h3>\n{note}<div class="charts">\n{"".join(made)}</div>\n' if any(made) else ""
