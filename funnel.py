"""The funnel: what each step of the pipeline took away, in documents, bytes and time, and ten examples of it.

    python funnel.py --data runs/data          # the table, once more; the page is runs/data/report.html

data.py writes it three times: as a table on the screen, as report.json, and as report.html, a page that needs
nothing else (no script, no font, no network) and follows the reader's choice of light or dark.
"""
import json
from dataclasses import dataclass
from pathlib import Path

import config
from config import UserError
from page import Raw, bar, details, document, escape, table as html_table


def make(tally, settings: dict) -> dict:
    """The report from the counts of all passes (a pipeline.Tally): what report.json holds."""
    unread = [{"name": name, "documents": documents, "changed": 0, "bytes": size, "seconds": 0.0,
               "reasons": {name: documents}, "examples": []}
              for name, (documents, size) in sorted(tally.rejected.items())]
    read = [tally.read[i] + sum(step[key] for step in unread) for i, key in enumerate(("documents", "bytes"))]
    steps = [{"name": name} | step for name, step in tally.steps.items()]
    return {"read": read, "steps": unread + steps, "kept": tally.kept, "settings": settings}


def counts(report: dict) -> dict[str, list[int]]:
    """{"read", each step that took something away, "kept"} -> [documents, bytes]."""
    lost = {step["name"]: [step["documents"], step["bytes"]] for step in report["steps"]
            if step["documents"] or step["bytes"]}
    return {"read": report["read"]} | lost | {"kept": report["kept"]}


def table(report: dict) -> str:
    """The funnel in lines.

    In a step's row the documents that it dropped, the bytes it took away, from kept documents too, and the
    processor's seconds, of all processes together.
    """
    read = report["read"][1] or 1
    rows = [f"{'':<22}{'documents':>12}{'changed':>10}{'bytes of text':>18}{'share':>9}{'seconds':>9}",
            f"{'read':<22}{report['read'][0]:>12,}{'':>10}{report['read'][1]:>18,}{'':>9}{'':>9}"]
    for step in report["steps"]:
        rows.append(f"{'  - ' + step['name']:<22}{step['documents']:>12,}{step['changed'] or '':>10}"
                    f"{step['bytes']:>18,}{step['bytes'] / read:>9.2%}{step['seconds']:>9.2f}")
    documents, size = report["kept"]
    rows.append(f"{'kept':<22}{documents:>12,}{'':>10}{size:>18,}{size / read:>9.2%}{'':>9}")
    return "\n".join(row.rstrip() for row in rows)


def page(report: dict) -> str:
    """The report as one page of HTML."""
    title = "What is left of the text, and what went where"
    return document(title, f"<h1>{title}</h1>\n{body(report)}")


def body(report: dict) -> Raw:
    """What the page holds: the table, each step's reasons and examples, the settings."""
    rows, left, read = [], report["read"][1], report["read"][1] or 1
    rows.append(row("read", *report["read"], "", "", bar(left / read)))
    for step in report["steps"]:
        left -= step["bytes"]
        drawn = bar(left / read, max(0, step["bytes"]) / read)
        rows.append(row(step["name"], step["documents"], step["bytes"], step["changed"],
                        f"{step['seconds']:.2f}", drawn))
    rows.append(row("kept", *report["kept"], "", "", bar(report["kept"][1] / read)))
    heads = ("step", "documents dropped", "bytes taken", "documents changed", "seconds",
             "of all bytes: left, and taken here")
    drawn = html_table("From what was read to what was kept, step by step", heads, rows, wide=True)
    sections = "".join(map(section, filter(lambda step: step["reasons"], report["steps"])))
    settings = escape(json.dumps(report["settings"], ensure_ascii=False, indent=1))
    return Raw(drawn + sections + details("settings", Raw(f"<pre>{settings}</pre>")))


def row(name, documents, size, changed, seconds, drawn) -> tuple:
    return name, f"{documents:,}", f"{size:,}", f"{changed:,}" if changed else "", seconds, drawn


def section(step: dict) -> str:
    """A step's reasons by how frequent they are, and its examples: what the reader unfolds."""
    reasons = ", ".join(f"{escape(reason)} {number:,}" for reason, number in
                        sorted(step["reasons"].items(), key=lambda item: (-item[1], item[0])))
    examples = ""
    for example in step["examples"]:
        source, why, text = (escape(example[key]) for key in ("source", "why", "text"))
        examples += f'<div><b>{source}</b> <span class="soft">{why}</span><pre>{text}</pre></div>'
    return details(Raw(f'<b>{escape(step["name"])}</b> <span class="soft">{reasons}</span>'), Raw(examples))


def write(folder: Path, report: dict) -> None:
    with config.open_whole(folder / "report.json", "w") as file:
        json.dump(report, file, indent=1, ensure_ascii=False)
    with config.open_whole(folder / "report.html", "w") as file:
        file.write(page(report))


@dataclass
class Settings:
    data: str = "runs/data"  # a folder that data.py wrote
    examples: int = 0  # of each step to print

    def __post_init__(self):
        config.require(self, examples=(0, None))


def main():
    settings = config.parse(Settings)
    path = Path(settings.data, "report.json")
    if not path.is_file():
        raise UserError(f"{path}: no such file; python data.py --out {settings.data} writes it")
    report = json.loads(path.read_text(encoding="utf-8"))
    print(table(report))
    for step in report["steps"]:
        for example in step["examples"][:settings.examples]:
            print(f"\n{step['name']}: {example['source']}: {example['why']}\n    "
                  + example["text"].replace("\n", "\n    "))


if __name__ == "__main__":
    config.run(main)
