"""Pages of HTML that need nothing else, no script, font or network; light or dark as the reader's screen is.

    document("A title", table("what stands in it", ["step", "loss"], [[1, 2.5], [2, 2.25]]))

What funnel.py and report.py share. Text is escaped unless it says that it is HTML already (`Raw`): what a
model wrote, or what a folder is called, may look like a tag.
"""
import html
import itertools
import re
from collections.abc import Iterable, Sequence

# Every text has a contrast of 4.5 : 1 to its ground at least, every bar one of 3 : 1 (WCAG 2.1, level AA)
STYLE = """
:root { color-scheme: light dark; --ink: #1c1c1c; --paper: #fdfdfb; --soft: #62625f; --line: #d9d9d4;
        --bar: #4a7db5; --lost: #c8553d; --link: #0b5394; --card: #f4f4ef; --warn: #8a4b00; }
@media screen and (prefers-color-scheme: dark) {
  :root { --ink: #e4e4e0; --paper: #17181a; --soft: #a3a39f; --line: #3a3b3e; --bar: #6c9fd6;
          --lost: #e07a5f; --link: #8ab8f0; --card: #202124; --warn: #f0b66a; } }
* { box-sizing: border-box; }
body { font: 16px/1.55 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 70rem;
       margin: 0 auto; padding: 2rem 1rem 4rem; overflow-wrap: anywhere; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .4rem; }
h2 { font-size: 1.4rem; margin: 3.5rem 0 .4rem; padding-top: .8rem; border-top: 1px solid var(--line); }
h3 { font-size: 1.1rem; margin: 2rem 0 .3rem; }
p, ul.plain { max-width: 46rem; margin: .4rem 0; } a { color: var(--link); }
:focus-visible { outline: 3px solid var(--link); outline-offset: 2px; }
.soft { color: var(--soft); } .warn { color: var(--warn); }
.scroll { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem;
        overflow-wrap: normal; }
caption { text-align: left; color: var(--soft); padding: 0 0 .3rem; }
th, td { padding: .35rem .9rem .35rem 0; text-align: left; vertical-align: top;
         border-bottom: 1px solid var(--line); }
thead th { vertical-align: bottom; font-weight: 600; } tbody th { font-weight: 600; }
.n { text-align: right; white-space: nowrap; } .wide { width: 100%; }
.bar { display: flex; height: .8em; min-width: 7rem; margin-top: .35em; }
.bar i { background: var(--bar); } .bar b { background: var(--lost); min-width: 1px; }
details { margin: .4rem 0; } summary { cursor: pointer; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; border-left: 3px solid var(--line);
      margin: .2rem 0 .8rem; padding-left: .8rem; font: 13px/1.5 ui-monospace, monospace; }
@media print { body { font-size: 11pt; max-width: none; padding: 0; } .scroll { overflow: visible; }
  h2, h3 { break-after: avoid; } figure, tr { break-inside: avoid; } }
"""


FIGURE, WIDE = ' class="n"', ' class="wide"'


class Raw(str):
    """Text that is HTML already."""


def escape(value) -> Raw:
    """A value as text within HTML."""
    return value if isinstance(value, Raw) else Raw(html.escape(printable(value)))


def printable(value) -> str:
    """Its text; control characters, which HTML does not allow, as a mark of replacement."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ufffe\uffff]", "\ufffd", str(value))


def document(title: str, body: str, style: str = "", before: str = "") -> str:
    """A whole page; style: rules beside those above, before: what stands before the main part."""
    return (f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f"<title>{escape(title)}</title>\n<style>{STYLE}{style}</style>\n</head>\n<body>\n{before}"
            f'<main id="main">\n{body}\n</main>\n</body>\n</html>\n')


def table(caption: str, heads: Sequence, rows: Iterable[Sequence], wide: bool = False) -> Raw:
    """A table whose first column names the rows; figures stand to the right. It scrolls by itself,
    by keys too.

    wide: it takes the whole width, as where bars stand in it.
    """
    rows = [list(map(escape, row)) for row in rows]
    kinds = ["", *(FIGURE * all(map(is_figure, column)) for column in list(zip(*rows))[1:])]
    body = [f'<tr><th scope="row">{name}</th>'
            + "".join(f"<td{kind}>{cell}</td>" for kind, cell in zip(kinds[1:], cells)) + "</tr>\n"
            for name, *cells in rows]
    head = "".join(f'<th scope="col"{kind}>{escape(name)}</th>'
                   for name, kind in itertools.zip_longest(heads, kinds, fillvalue=""))
    return Raw(f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(caption)}">\n'
               f'<table{WIDE * wide}>\n<caption>{escape(caption)}</caption>\n<thead><tr>{head}</tr>'
               f"</thead>\n<tbody>\n{''.join(body)}</tbody>\n</table>\n</div>\n")


def is_figure(cell: str) -> bool:
    """Whether it is a number, perhaps with a unit, several of these ("2 min 3 s"), or nothing."""
    words = cell.split(" ")
    return cell in ("", "–") or all(
        re.fullmatch(r"[-+−]?\d[\d.,]*(e[-+]?\d+)?%?" if i % 2 == 0 else "[A-Za-z]{1,4}|%", word)
        for i, word in enumerate(words))


def bar(share: float, lost: float = 0.0) -> Raw:
    """A bar of this share of the width, 0 to 1, and behind it what is lost."""
    share, lost = (min(max(x, 0.0), 1.0) for x in (share, lost))
    taken = f'<b style="width:{100 * lost:.2f}%"></b>' if lost else ""
    return Raw(f'<div class="bar"><i style="width:{100 * share:.2f}%"></i>{taken}</div>')


def details(summary: str, body: str) -> Raw:
    """What the reader unfolds."""
    return Raw(f"<details><summary>{escape(summary)}</summary>\n{escape(body)}</details>\n")
