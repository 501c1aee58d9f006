"""Line charts: as SVG, which any browser shows without a library or a network, and as blocks of text.

    line_chart("Rewards", "step", "nats", {"chosen": [(1, 0.0), (2, -0.3)], "other": [(1, 0.0), (2, -1.1)]})
"""
import html
import math
from collections.abc import Mapping, Sequence

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 720, 380, 64, 150, 44, 44  # in pixels; margins for axes and names
# apart also for eyes that do not tell red from green, and by their dashes
LINES = (("#0072b2", ""), ("#d55e00", "7 3"), ("#009e73", "2 3"), ("#cc79a7", "10 3 2 3"), ("#8a6d00", "4 4"))
STYLE = """svg { background: #fdfdfb; font: 13px system-ui, sans-serif; fill: #1c1c1c }
.grid { stroke: #d9d9d4 } .zero, .level { stroke: #6b6b6b } .level { stroke-dasharray: 1 3 }
.line, .mark { fill: none; stroke-width: 2 } .faint { stroke-width: 1; opacity: .35 }
@media screen and (prefers-color-scheme: dark) { svg { background: #17181a; fill: #e4e4e0 }
.grid { stroke: #3a3b3e } .zero, .level { stroke: #9a9a96 }
.c0 { stroke: #4ea6dc } .c1 { stroke: #f08a4b } .c2 { stroke: #3fc79e } .c3 { stroke: #dd96bd }
.c4 { stroke: #c9a83c } }"""
Points = Sequence[tuple[float, float]]


def line_chart(title: str, x_name: str, y_name: str, lines: Mapping[str, Points], *,
               faint: Mapping[str, Points] | None = None, marks: Mapping[str, Points] | None = None,
               levels: Mapping[str, float] | None = None, about: str | None = None) -> str:
    """The SVG of some lines, {name: its points}, over axes that hold them; infinite points are left out.

    faint: {name of a line: what it is the mean of}, drawn thin behind it. marks: {name: points} as rings, of
    the colour of the line of that name, if there is one. levels: {name: y}, from side to side. about: what is
    seen, for those who do not see it; the SVG is then part of a page, which has STYLE in it once and names
    the lines by `legend` beside the chart.
    """
    lines, faint, marks = ({name: [point for point in points if all(map(math.isfinite, point))]
                            for name, points in (some or {}).items()} for some in (lines, faint, marks))
    levels = {name: y for name, y in (levels or {}).items() if math.isfinite(y)}
    everything = [point for some in (lines, faint, marks) for points in some.values() for point in points]
    xs, ys = zip(*(everything or [(0, 0)]))
    x_ticks, y_ticks = (ticks(min(values), max(values)) for values in (xs, [*ys, *levels.values()]))

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - x_ticks[0]) / (x_ticks[-1] - x_ticks[0])
        up = (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0])
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)
    parts = [*opening(title, about), text(LEFT, TOP - 8, y_name),
             text(WIDTH - RIGHT, HEIGHT - 8, x_name, 'text-anchor="end"'), *axes(x_ticks, y_ticks, place)]
    for at in (place(0, y)[1] for y in levels.values()):
        parts.append(f'<line class="level" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
    for number, (name, points) in enumerate(lines.items()):
        if faint.get(name):
            parts.append(polyline(number, faint[name], place, " faint"))
        parts.append(polyline(number, points, place))
        if about is None:
            y = TOP + 8 + 22 * number
            parts += [f'<line {stroke(number)} x1="{WIDTH - RIGHT + 12}" x2="{WIDTH - RIGHT + 40}" y1="{y}" '
                      f'y2="{y}"/>', text(WIDTH - RIGHT + 46, y + 4, name)]
    number_of = numbers(lines, marks)
    parts += [ring(number_of[name], *place(*point)) for name, points in marks.items() for point in points]
    parts += [text(WIDTH - RIGHT - 4 - 150 * number, place(0, y)[1] - 5, name, 'text-anchor="end"')
              for number, (name, y) in enumerate(levels.items())]  # side by side, and on top
    return "\n".join([*parts, "</svg>", ""])


def opening(title: str, about: str | None) -> list[str]:
    """How the SVG begins: its size, its name, and either its style and title or, in a page, what is seen."""
    width = WIDTH if about is None else WIDTH - RIGHT + 16  # a page names the lines beside the chart
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {HEIGHT}" role="img" '
    if about is not None:
        return [f'{head}class="chart"><title>{html.escape(title)}</title><desc>{html.escape(about)}</desc>']
    return [f'{head}aria-label="{html.escape(title)}"><style>{STYLE}</style>',
            text(LEFT, 24, title, 'font-weight="600"')]


def axes(x_ticks: list[float], y_ticks: list[float], place) -> list[str]:
    """The figures along both axes and the lines across. Every second figure has a class: it may be hidden."""
    odd = ("", ' class="odd"')
    parts = [text(place(x, 0)[0], HEIGHT - BOTTOM + 18, f"{x:g}", 'text-anchor="middle"' + odd[i % 2])
             for i, x in enumerate(x_ticks)]
    for i, y in enumerate(y_ticks):
        at = place(0, y)[1]
        parts += [f'<line class="{"grid" if y else "zero"}" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" '
                  f'y2="{at:.1f}"/>', text(LEFT - 8, at + 4, f"{y:g}", 'text-anchor="end"' + odd[i % 2])]
    return parts


def polyline(number: int, points: Points, place, more: str = "") -> str:
    path = " ".join("{:.1f},{:.1f}".format(*place(*point)) for point in points)
    return f'<polyline {stroke(number, more)} points="{path}"/>'


def stroke(number: int, more: str = "") -> str:
    """The attributes of line `number`: 25 pairs of a colour and dashes, those side by side unlike in both."""
    kinds = len(LINES)
    colour, dashes = LINES[number % kinds][0], LINES[(number + number // kinds) % kinds][1]
    dashes = "" if more else dashes  # what is faint is too fine for dashes
    return f'class="line c{number % kinds}{more}" stroke="{colour}" stroke-dasharray="{dashes}"'


def ring(number: int, x: float, y: float) -> str:
    kind = number % len(LINES)
    return f'<circle class="mark c{kind}" stroke="{LINES[kind][0]}" cx="{x:.1f}" cy="{y:.1f}" r="4.5"/>'


def numbers(lines: Mapping[str, Points], marks: Mapping[str, Points]) -> dict[str, int]:
    """{name: its number, which is its colour}: rings have that of the line of their name."""
    return {name: number for number, name in enumerate(dict.fromkeys([*lines, *marks]))}


def legend(lines: Mapping[str, Points], marks: Mapping[str, Points]) -> str:
    """The names of lines and rings, a list of HTML to stand beside a chart; not of those without points."""
    items = ""
    for name, number in numbers(lines, marks).items():
        drawn = f'<line {stroke(number)} x1="0" x2="34" y1="6" y2="6"/>' if lines.get(name) else \
            ring(number, 17, 6)
        if lines.get(name) or marks.get(name):
            items += (f'<li><svg viewBox="0 0 34 12" width="34" height="12" aria-hidden="true">{drawn}</svg> '
                      f"{html.escape(name)}</li>")
    return f'<ul class="legend">{items}</ul>\n'


def blocks(shares: Sequence[float], rows: int) -> list[str]:
    """Columns of these heights, 0 to 1 of so many rows of text, drawn with block characters."""
    lines = []
    for row in reversed(range(rows)):
        eighths = (round(8 * (share * rows - row)) for share in shares)
        lines.append("".join(" ▁▂▃▄▅▆▇█"[min(8, max(0, n))] for n in eighths).rstrip())
    return lines


def text(x: float, y: float, words: str, more: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" {more}>{html.escape(words)}</text>'


def ticks(low: float, high: float) -> list[float]:
    """Four to nine round numbers, evenly apart, from at most `low` to at least `high`."""
    span, size = high - low, max(abs(low), abs(high))
    if span <= max(1e-9 * size, 1e-99):  # all but equal
        span = size if size > 1e-99 else 1.0
    power = 10.0 ** math.floor(math.log10(span / 4))
    step = next(power * m for m in (1, 2, 5, 10) if span / (power * m) <= 6)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [float(f"{i * step:.12g}") for i in range(first, max(last, first + 1) + 1)]
