"""funnel.py: the funnel adds up, as a table, as JSON, and as a page that needs nothing else."""
import html.parser
import json

import pytest

import funnel
from pipeline import Tally, Verdict
from support import in_process


def tally():
    """Ten documents of 100 bytes; three are dropped, one is shortened by 40, one could not be read."""
    counts = Tally(read=[10, 1000], kept=[7, 660], rejected={"json": [1, 9]})
    for number in range(3):
        document = {"source": f"<b>{number}</b>", "text": "<script>alert(1)</script> & more"}
        counts.note("quality", document, Verdict(None, f"words: {number}, at least 5"), 100)
    counts.note("lines", {"source": "a.txt", "text": "…"}, Verdict("…", "lines: 2 of 9", "gone"), 40)
    return counts


@pytest.fixture
def made():
    return funnel.make(tally(), {"near": 0.8})


def test_the_funnel_adds_up(made):
    assert funnel.counts(made) == {"read": [11, 1009], "json": [1, 9], "quality": [3, 300], "lines": [0, 40],
                                   "kept": [7, 660]}
    assert 1009 - 9 - 300 - 40 == 660


def test_the_table_has_a_line_a_step_with_its_share(made):
    lines = funnel.table(made).split("\n")
    assert [line.split()[0] for line in lines[1:]] == ["read", "-", "-", "-", "kept"]
    assert lines[3].split() == ["-", "quality", "3", "300", "29.73%", "0.00"], "300 of 1,009 bytes"
    assert lines[4].split() == ["-", "lines", "0", "1", "40", "3.96%", "0.00"]


class Page(html.parser.HTMLParser):
    def __init__(self, content):
        super().__init__()
        self.tags, self.attributes, self.text = [], [], []
        self.feed(content)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes

    def handle_data(self, data):
        self.text.append(data)


def test_the_page_needs_nothing_else_and_escapes_what_documents_say(made):
    page = Page(funnel.page(made))
    assert not {"script", "link", "img", "iframe"} & set(page.tags)
    assert not [name for name, _ in page.attributes if name in ("src", "href") or name.startswith("on")]
    text = "".join(page.text)
    assert "<script>alert(1)</script> & more" in text, "an example is shown as it is, as text"
    assert "url(" not in text and "@import" not in text and "prefers-color-scheme: dark" in text
    for figure in ("1,009", "quality", "words 3", "lines 1", "gone"):
        assert figure in text


def test_ten_examples_are_kept_the_first_of_all_shards():
    total = Tally()
    for shard in range(3):
        counts = Tally()
        for number in range(7):
            document = {"source": f"{shard}/{number}", "text": "x" * 1000}
            counts.note("near", document, Verdict(None, "twin"), 1000)
        total.add(counts)
    step = total.steps["near"]
    assert [example["source"] for example in step["examples"]] == [
        *(f"0/{n}" for n in range(7)), "1/0", "1/1", "1/2"]
    assert (step["documents"], step["bytes"], step["reasons"]) == (21, 21_000, {"twin": 21})
    assert len(step["examples"][0]["text"]) == 300


def test_the_command_prints_the_table_again(tmp_path, monkeypatch, capsys, made):
    funnel.write(tmp_path, made)
    assert json.loads((tmp_path / "report.json").read_text(encoding="utf-8")) == made
    code, text, _ = in_process(monkeypatch, capsys, funnel.main, "--data", tmp_path, "--examples", 1)
    assert code == 0 and text.startswith(funnel.table(made)) and "words: 0, at least 5" in text
    code, _, errors = in_process(monkeypatch, capsys, funnel.main, "--data", tmp_path / "none")
    assert code == 2 and "no such file" in errors
