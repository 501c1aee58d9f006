"""Line charts as SVG: a picture that any browser shows, without a library and without a network.

    line_chart("Rewards", "step", "nats", {"chosen": [(1, 0.0), (2, -0.3)], "other": [(1, 0.0), (2, -1.1)]})
"""
import html
import math
from collections.abc import Mapping, Sequence

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 720, 380, 64, 150, 44, 44  # in pixels; margins for axes and names
# apart also for eyes that do not tell red from green, and by their dashes
LINES = (("#0072b2", ""), ("#d55e00", "7 3"), ("#009e73", "2 3"), ("#cc79a7", "10 3 2 3"), ("#8a6d00", "4 4"))
STYLE = """svg { background: #fdfdfb; font: 13px system-ui, sans-serif; fill: #1c1c1c }
.grid { stroke: #d9d9d4 } .zero { stroke: #6b6b6b } .line { fill: none; stroke-width: 2 }
@media (prefers-color-scheme: dark) { svg { background: #17181a; fill: #e4e4e0 } .grid { stroke: #3a3b3e }
.zero { stroke: #9a9a96 } }"""


def line_chart(title: str, x_name: str, y_name: str,
               lines: Mapping[str, Sequence[tuple[float, float]]]) -> str:
    """The SVG of some lines, {name: its points}, over axes that hold them; infinite points are left out."""
    lines = {name: [point for point in points if all(map(math.isfinite, point))]
             for name, points in lines.items()}
    xs, ys = zip(*([point for points in lines.values() for point in points] or [(0, 0)]))
    x_ticks, y_ticks = ticks(min(xs), max(xs)), ticks(min(ys), max(ys))

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - x_ticks[0]) / (x_ticks[-1] - x_ticks[0])
        up = (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0])
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
             f'aria-label="{html.escape(title)}"><style>{STYLE}</style>',
             text(LEFT, 24, title, 'font-weight="600"'), text(8, TOP - 6, y_name),
             text(WIDTH - RIGHT, HEIGHT - 8, x_name, 'text-anchor="end"')]
    for x in x_ticks:
        parts.append(text(place(x, 0)[0], HEIGHT - BOTTOM + 18, f"{x:g}", 'text-anchor="middle"'))
    for y in y_ticks:
        at = place(0, y)[1]
        parts += [f'<line class="{"grid" if y else "zero"}" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" '
                  f'y2="{at:.1f}"/>', text(LEFT - 8, at + 4, f"{y:g}", 'text-anchor="end"')]
    for number, (name, points) in enumerate(lines.items()):
        colour, dashes = LINES[number % len(LINES)]
        line = f'class="line" stroke="{colour}" stroke-dasharray="{dashes}"'
        path = " ".join("{:.1f},{:.1f}".format(*place(*point)) for point in points)
        y = TOP + 8 + 22 * number
        parts += [f'<polyline {line} points="{path}"/>',
                  f'<line {line} x1="{WIDTH - RIGHT + 12}" x2="{WIDTH - RIGHT + 40}" y1="{y}" y2="{y}"/>',
                  text(WIDTH - RIGHT + 46, y + 4, name)]
    return "\n".join([*parts, "</svg>", ""])


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
