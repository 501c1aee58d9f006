"""report.py: the page's figures are those of the logs, and no file, however broken, keeps it from opening."""
import html.parser
import json
import math
import re
import time
from pathlib import Path

import pytest

import funnel
import logs
import page
import plot
import report
from metrics import CHARTS, REFERENCES, reference
from support import in_process
from test_funnel import tally

VOID = {"meta", "link", "br", "img", "hr", "input"}  # the only tags that HTML does not close


class Page(html.parser.HTMLParser):
    """A page taken to pieces: tags, ids, attributes, the cells of its tables, its text without the style."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.attributes, self.tables, self.text = [], [], [], {}, []
        self.rows, self.caption = [], ""
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.attributes += attributes
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.rows = []
        elif tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag, attributes):  # within SVG
        self.tags.append((tag, dict(attributes)))
        self.attributes += attributes

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-1:]}"
        self.open.pop()
        if tag == "table":
            self.tables[self.caption] = self.rows

    def handle_data(self, data):
        if self.open and self.open[-1] == "style":
            return
        self.text.append(data)
        if self.open and self.open[-1] == "caption":
            self.caption = data
        elif {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data


def line(step, **more):
    return {"step": step, "loss_nats_per_token": 4 - step / 100, "bits_per_byte": 2 - step / 200, "lr": 0.01,
            "grad_norm": 0.5, "tokens": 1000 * step, "seconds": 0.25, "memory_gib": 0.5} | more


def make(folder, lines=(), settings=None, results=None):
    """A run's folder with what its files hold."""
    folder.mkdir(parents=True)
    (folder / "log.jsonl").write_text("".join(json.dumps(it) + "\n" for it in lines), encoding="utf-8")
    for name, content in (("settings", settings), ("results", results)):
        if content is not None:
            (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


def written(monkeypatch, capsys, tmp_path, *arguments):
    """The page that the command writes, taken to pieces."""
    out = tmp_path / "page.html"
    code, _, errors = in_process(monkeypatch, capsys, report.main, *arguments, "--out", out)
    assert code == 0, errors
    return Page(out.read_text(encoding="utf-8"))


BASE = {"objective": "next_token", "steps": 100, "data": "runs/data", "seed": 0, "out": "runs/base"}


@pytest.fixture
def runs(tmp_path):
    """Data, pretraining with held-out figures, and stages of each other kind."""
    top = tmp_path / "runs"
    (top / "data").mkdir(parents=True)
    meta = {"train": {"documents": 9, "text_bytes": 5000, "tokens": 2500},
            "val": {"documents": 1, "text_bytes": 600, "tokens": 200},
            "compressors": {"xz": 1.44, "gzip": 1.72}, "funnel": {"read": [11, 6009], "kept": [10, 5600]}}
    (top / "data" / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
    told = json.dumps(funnel.make(tally(), {"near": 0.8}))
    (top / "data" / "report.json").write_text(told, encoding="utf-8")
    held_out = {50: {"val_bits_per_byte": 1.85}, 100: {"val_bits_per_byte": 1.625}}
    make(top / "base", [line(i, **held_out.get(i, {})) for i in range(1, 101)], BASE)
    make(top / "dpo", [{"step": i, "loss_nats_per_pair": 0.7 - i / 100, "chosen_reward": -i / 50,
                        "rejected_reward": -i / 20, "margin": 0.03 * i, "accuracy": 0.5 + i / 20,
                        "grad_norm": 1.0, "seconds": 1.0, "tokens": 10 * i} for i in range(1, 6)],
         {"label_smoothing": 0.0, "init_from": "runs/base", "steps": 5},
         {"margin of the rewards": {"before": 0.0, "after": 0.1417, "note": ""}, "each question": {"a": [1]},
          "samples": [{"prompt": "Why?", "before": "no", "after": "yes", "author": "because"}]})
    make(top / "ppo", [{"step": i, "reward": i / 10, "reward_f1": 0.3, "reward_f1_std": 9.0, "tokens": 40,
                        "kl_nats_per_reply": i / 5, "seconds": 2.0, "val_reward": i / 9,
                        "val_kl_nats_per_reply": i / 4} for i in range(1, 5)],
         {"algorithm": "ppo", "prompts_data": "x", "init_from": "runs/base", "steps": 4},
         {"sampled: reward": {"before": 0.25, "after": 0.5, "note": "3 better", "each question": [[1], [2]]}})
    return top


# ---- the figures -------------------------------------------------------------------------------------------

STORY = "The stages in order: each begins with what an earlier one left"


def test_the_story_tells_what_stands_in_the_logs(monkeypatch, capsys, tmp_path, runs):
    made = written(monkeypatch, capsys, tmp_path, "--runs", runs)
    story = {row[0]: row[1:] for row in made.tables[STORY]}
    assert list(story) == ["run", "data", "base", "dpo", "ppo"], "in the order in which they are made"
    assert story["base"] == ["pretraining", "100", "25 s", "0.50 GiB", "100,000", "bits per byte, held out",
                             "1.85", "1.625"], "100 steps of 0.25 s"
    assert story["dpo"][-3:] == ["margin of the rewards", "0", "0.1417"]
    assert story["ppo"][-4:] == ["160", "sampled: reward", "0.25", "0.5"], "160: 4 steps, each of 40"
    assert story["data"][-4:] == ["2,500", "bytes of text", "6,009", "5,600"]


def test_the_funnel_on_the_page_is_funnel_py_s(monkeypatch, capsys, tmp_path, runs):
    made = written(monkeypatch, capsys, tmp_path, "--runs", runs)
    own = Page(funnel.page(funnel.make(tally(), {"near": 0.8})))
    caption = "From what was read to what was kept, step by step"
    assert made.tables[caption] == own.tables[caption] and len(own.tables[caption]) == 6


def test_the_points_of_a_curve_are_those_of_the_log(runs):
    run = logs.read(runs / "dpo", "dpo")
    drawn = report.charts_of(run, explain=True)
    points = re.findall(r'points="([^"]+)"', drawn.split("</figure>")[0])
    heights = [[float(pair.split(",")[1]) for pair in one.split()] for one in points]
    assert [len(one) for one in heights] == [5, 5], "chosen and rejected"
    chosen, rejected = heights
    scale = (rejected[4] - rejected[0]) / (5 / 20 - 1 / 20)  # pixels for a reward of 1, by the other line
    for i in range(5):
        assert chosen[i] - chosen[0] == pytest.approx(scale * i / 50, abs=0.15), "places are rounded to 0.1"


def test_pretraining_stands_beside_compressors_and_our_own_run(runs):
    drawn = report.charts_of(logs.read(runs / "base", "base"), explain=True)
    loss = Page(drawn.split("</figure>")[0] + "</figure></div>")
    text = " ".join(loss.text)
    assert "xz 1.440" in text and "gzip 1.720" in text and "ours" in text and "ln V = 8.3" in text
    rings = [attributes for tag, attributes in loss.tags if tag == "circle"]
    assert len(rings) == 2 + 1, "two held-out figures, and the ring of the legend"
    steps, values = REFERENCES["bits_per_byte"]
    assert reference("pretraining", "bits_per_byte")[0] == ((1 + steps) / 2, values[0])
    assert steps * len(values) == 900 and reference("reinforcement", "reward") == []


def test_every_chart_says_what_is_normal_and_has_its_figures_as_a_table(monkeypatch, capsys, tmp_path, runs):
    made = written(monkeypatch, capsys, tmp_path, "--runs", runs)
    text = "".join(made.text)
    charts = [attributes for tag, attributes in made.tags if tag == "svg" and "aria-hidden" not in attributes]
    assert len(charts) == 3 + 5 + 3 and all(attributes["role"] == "img" for attributes in charts)
    for tag in ("desc", "figcaption"):
        assert sum(name == tag for name, _ in made.tags) == len(charts), f"a chart without its {tag}"
    for chart in (CHARTS["preferences"][0], CHARTS["reinforcement"][0], CHARTS["reinforcement"][1]):
        assert chart.why in text
    assert all(len(chart.why) > 60 for charts in CHARTS.values() for chart in charts)
    against = made.tables["Reward against KL: means of stretches"]
    assert against[1:] == [["0.25", "0.1111"], ["0.5", "0.2222"], ["0.75", "0.3333"], ["1", "0.4444"]]


# ---- the page ----------------------------------------------------------------------------------------------

def test_the_page_is_well_formed_and_needs_nothing_else(monkeypatch, capsys, tmp_path, runs):
    made = written(monkeypatch, capsys, tmp_path, "--runs", runs)
    names = [name for name, _ in made.tags]
    assert not {"script", "link", "img", "iframe", "object", "form"} & set(names)
    assert not [name for name, _ in made.attributes if name == "src" or name.startswith("on")]
    ids = [value for name, value in made.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    links = [value for name, value in made.attributes if name == "href"]
    assert links and all(link[0] == "#" and link[1:] in ids for link in links), "a link that leads nowhere"
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert set(re.findall(r"https?://[^\"]+", text)) == {"http://www.w3.org/2000/svg"}, "the format's name"
    assert "url(" not in text and "@import" not in text and ("html", {"lang": "en"}) in made.tags


def test_headings_tables_and_scrolling_parts_can_be_read_aloud(monkeypatch, capsys, tmp_path, runs):
    made = written(monkeypatch, capsys, tmp_path, "--runs", runs)
    levels = [int(name[1]) for name, _ in made.tags if re.fullmatch("h[1-6]", name)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(b <= a + 1 for a, b in zip(levels, levels[1:])), f"a level of headings is left out: {levels}"
    count = {tag: sum(name == tag for name, _ in made.tags) for tag in ("table", "caption")}
    assert count["table"] == count["caption"]
    assert all(attributes.get("scope") in ("row", "col") for name, attributes in made.tags if name == "th")
    parts = [attributes for name, attributes in made.tags if attributes.get("class") == "scroll"]
    assert len(parts) == count["table"]
    assert all(part["tabindex"] == "0" and part["role"] == "region" and part["aria-label"] for part in parts)
    assert made.tags[[name for name, _ in made.tags].index("a")][1] == {"class": "skip", "href": "#main"}


def test_figures_stand_to_the_right_and_long_cells_are_no_trouble():
    figures = ["1", "-2.5", "1,000", "1e-05", "0.5 GiB", "2 min 3 s", "198 of 300", "–", "", "12 %"]
    assert all(map(page.is_figure, figures))
    assert not any(map(page.is_figure, ["a", "1 better, 2 worse", "runs/base", "-", "1 2", "x 1"]))
    began = time.perf_counter()
    assert not page.is_figure("1" * 100_000 + "x") and not page.is_figure("1 s " * 20_000 + "!")
    assert time.perf_counter() - began < 2, "an expression that tries all ways to cut the cell"


def luminance(colour):
    """WCAG 2.1's relative luminance of #rrggbb."""
    parts = (int(colour[i:i + 2], 16) / 255 for i in (1, 3, 5))
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one, other):
    low, high = sorted(map(luminance, (one, other)))
    return (high + 0.05) / (low + 0.05)


def test_contrasts_reach_aa_by_day_and_by_night():
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    light, dark = page.STYLE.split("prefers-color-scheme: dark")
    lines = [colour for colour, _ in plot.LINES], re.findall(r"\.c\d \{ stroke: (#\w{6})", plot.STYLE)
    for rules, drawn in zip((light, dark), lines):
        colour = dict(re.findall(r"--(\w+): (#\w{6})", rules))
        for name in ("ink", "soft", "link", "warn"):
            for ground in ("paper", "card"):
                assert contrast(colour[name], colour[ground]) >= 4.5, f"text: {name} on {ground}"
        assert len(drawn) == 5
        for one in (*drawn, colour["bar"], colour["lost"]):
            assert contrast(one, colour["paper"]) >= 3, f"a line or bar: {one}"
    assert len({dashes for _, dashes in plot.LINES}) == 5, "lines are told apart without colours, too"


HOSTILE = '<script>alert(1)</script>"\'&\x00\ud800</pre>'


def test_what_models_say_and_folders_are_called_is_shown_as_text(monkeypatch, capsys, tmp_path):
    name = "<img src=x onerror=alert(1)>& 'ä' \n"
    (tmp_path / "top").mkdir()
    try:
        make(tmp_path / "top" / name, [line(1), line(2, **{"reward_<b>": 1.0})], BASE | {HOSTILE: HOSTILE},
             {HOSTILE: {"before": 1, "after": 2, "note": HOSTILE},
              "samples": [{"prompt": HOSTILE, "before": HOSTILE, "after": HOSTILE, "author": 5}, 3, None]})
    except OSError:
        pytest.skip("this file system has no such names")
    other = make(tmp_path / "b", [line(1)])
    for arguments in (("--runs", tmp_path / "top"), (tmp_path / "top" / name, other)):
        made = written(monkeypatch, capsys, tmp_path, *arguments)
        assert not {"script", "img"} & {tag for tag, _ in made.tags}
        text = "".join(made.text)
        assert "<script>alert(1)</script>\"'&\ufffd?</pre>" in text, "not as it was written"
        assert "<img src=x onerror=alert(1)>& 'ä'" in text


# ---- broken files, and none --------------------------------------------------------------------------------

def broken(folder, content):
    folder.mkdir(parents=True)
    (folder / "log.jsonl").write_bytes(content)
    return folder


LINE = json.dumps(line(1)).encode()


@pytest.mark.parametrize("content, said", [
    (b"", "log.jsonl is empty"), (LINE + b'\n{"step": 2, "loss', "1 line that cannot be read"),
    (bytes(range(256)) * 40, "cannot be read"), (b"[" * 100_000, "1 line that cannot be read"),
    (b'{"step": "1"}\n{"step": true}\n{"step": -1}\n[]\nnull\n{}\n', "6 lines that cannot be read"),
    (LINE + b'\n{"step": 5, "loss_nats_per_token": NaN, "lr": 1' + b"0" * 400 + b', "grad_norm": null}\n',
     "lacks steps 2 to 4"),
    (b'{"step": 1, "loss_nats_per_token": Infinity, "bits_per_byte": "x", "lr": [1]}\n', "Loss")])
def test_a_broken_log_is_named_and_the_page_opens(monkeypatch, capsys, tmp_path, content, said):
    broken(tmp_path / "runs" / "odd", content)
    (tmp_path / "runs" / "odd" / "settings.json").write_text('{"objective": "x"', encoding="utf-8")
    make(tmp_path / "runs" / "good", [line(1), line(2)], BASE)
    made = written(monkeypatch, capsys, tmp_path, "--runs", tmp_path / "runs")
    text = "".join(made.text)
    assert said in text and "settings.json is not JSON" in text and "nan" not in text.lower()
    assert "Step 2 of 100" in text, "the run beside it is under way"


def test_a_quick_run_in_the_same_folder_has_a_page_of_its_own(tmp_path, runs):
    make(runs / "quick" / "runs" / "base", [line(1)])
    make(runs / "mine" / "seed1", [line(1)])
    assert {folder.name for folder in logs.find(runs)} == {"data", "base", "dpo", "ppo", "seed1"}
    assert logs.find(runs / "quick" / "runs") == [runs / "quick" / "runs" / "base"]
    assert len(logs.find(tmp_path)) == 5, "seen from the folder above, runs is where they are"


@pytest.mark.parametrize("name", ["ä" * 255, "x" * 5000, "a\0b", 5, ["x"]], ids=lambda name: repr(name)[:6])
def test_data_of_an_impossible_name_are_as_if_they_were_not_there(tmp_path, name):
    run = logs.read(make(tmp_path / "base", [line(1), line(2)], BASE | {"data": name}))
    Page(report.page([run], compared=False))


def test_missing_files_are_named(tmp_path):
    (tmp_path / "bare").mkdir()
    assert logs.read(tmp_path / "bare").problems == ["log.jsonl is missing: no curve can be drawn"]
    run = logs.read(make(tmp_path / "lost", [line(1, kd_nats_per_token=1.0)]))
    assert run.kind == "distillation" and "settings.json is missing" in run.problems[0]
    early = make(tmp_path / "early", [{"step": 1, "reward": 0.5}], {"algorithm": "rloo"})
    said = report.state(logs.read(early))
    assert "results.json is missing" in said and "no figures for:" in said and "Entropy" in said


@pytest.mark.parametrize("results", [
    [], {"samples": {"a": 1}}, {"held out": 3, "histogram": {"edges": 3}},
    {"calibration": [3, {"from": "x"}], "samples": [{"prompt": 1}]}, {"calibration": 5, "histogram": [1]},
    {"a": {"after": None}, "b": {"after": True}, "rewards": {"all": {"mean": 1}},
     "histogram": {"edges": [1, None], "chosen": [1, 2], "rejected": "x"}}])
def test_results_of_any_form_open(tmp_path, results):
    run = logs.read(make(tmp_path / "run", [line(1), line(2)], {"margin_from": "constant"}, results))
    Page(report.page([run], compared=False))
    assert report.samples(run) == ""


def test_data_whose_report_is_damaged_opens(tmp_path):
    (tmp_path / "data").mkdir()
    meta = '{"train": {"tokens": "x"}, "funnel": [], "compressors": 3}'
    (tmp_path / "data" / "meta.json").write_text(meta, encoding="utf-8")
    (tmp_path / "data" / "report.json").write_text('{"read": 3}', encoding="utf-8")
    assert "report.json is damaged" in report.page([logs.read(tmp_path / "data")], compared=False)


@pytest.mark.parametrize("made", ["{}", '{"counts": 3}', '{"counts": {"train pairs": "x", "samples": 5}}', "[]"])
def test_pairs_whose_counts_are_damaged_open(tmp_path, made):
    (tmp_path / "pairs").mkdir()
    (tmp_path / "pairs" / "made.json").write_text(made, encoding="utf-8")
    Page(report.page([logs.read(tmp_path / "pairs")], compared=False))


def test_no_such_folder_and_no_runs_end_in_one_line_and_code_2(monkeypatch, capsys, tmp_path):
    for arguments, said in ((("--runs", tmp_path), "no run folder"), ((tmp_path / "none",), "no such folder"),
                            (("--runs", tmp_path / "none"), "no run folder")):
        code, _, errors = in_process(monkeypatch, capsys, report.main, *arguments)
        assert code == 2 and said in errors and errors.count("\n") == 1
    assert not list(tmp_path.iterdir()), "nothing is written where there is nothing to tell"


# ---- several runs ------------------------------------------------------------------------------------------

def test_runs_are_compared_by_figures_curves_and_settings_that_differ(monkeypatch, capsys, tmp_path):
    folders = [make(tmp_path / f"seed{i}", [line(n, bits_per_byte=2.0 + i) for n in (1, 2, 3)],
                    BASE | {"seed": i, "out": f"seed{i}"}) for i in range(3)]
    made = written(monkeypatch, capsys, tmp_path, *folders)
    assert made.tables["Settings in which they differ"] == [["setting", "seed0", "seed1", "seed2"],
                                                            ["seed", "0", "1", "2"]]
    figures = {row[0]: row[1:] for row in made.tables["Last figures"]}
    assert figures["steps"] == ["3", "3", "3"]
    assert figures["bits per byte, training, last 60th"] == ["2", "3", "4"]
    loss = made.tables["Loss: means of stretches"]
    assert loss == [["step", "seed0", "seed1", "seed2"], *[[str(i), "2", "3", "4"] for i in (1, 2, 3)]]


def test_students_stand_side_by_side_with_and_without_a_teacher(monkeypatch, capsys, tmp_path):
    top = tmp_path / "runs"
    for name, weight, after in (("alone", 0.0, 1.67), ("student", 1.0, 1.62)):
        lines = [line(i, kd_nats_per_token=weight / i, ce_nats_per_token=(1 - weight) * 5) for i in (1, 2)]
        make(top / name, lines, {"kd_weight": weight, "steps": 2},
             {"held out": {"teacher": {"bits_per_byte": 1.459}, "before": {"bits_per_byte": 2.24},
                           "after": {"bits_per_byte": after, "loss": None}}})
    made = written(monkeypatch, capsys, tmp_path, "--runs", top)
    figures = {row[0]: row[1:] for row in made.tables["Last figures"]}
    assert figures["figure"] == ["alone", "student"]
    assert figures["held out, bits per byte"] == ["1.67", "1.62"]
    assert figures["held out, bits per byte, before"] == ["2.24"] * 2
    assert figures["held out, bits per byte, the teacher"] == ["1.459"] * 2
    assert made.tables["Distance from the teacher: means of stretches"][0] == ["step", "student"], \
        "without a teacher there is no distance: its zeros are not drawn"
    assert made.tables["Loss on the text: means of stretches"][0] == ["step", "alone"]


def test_a_run_keeps_its_colour_where_another_has_no_points():
    lines = {"a": [], "b": [(0, 1), (1, 2)]}
    drawn = plot.line_chart("t", "x", "y", lines, marks={"b": [(1, 1)], "c": [(1, 2)]}, about="")
    assert re.findall(r'circle class="mark c(\d)', drawn) == ["1", "2"] and "line c1" in drawn
    names = re.findall("</svg> ([^<]*)</li>", plot.legend(lines, {"c": [(1, 2)]}))
    assert names == ["b", "c"]


def test_stages_are_in_order_and_those_of_another_start_behind(tmp_path):
    settings = {"sums": {"loss_on_prompts": False, "init_from": "elsewhere/start"},
                "ppo": {"algorithm": 1, "init_from": "runs/sft"}, "student": {"kd_weight": 1},
                "sums-grpo": {"algorithm": 1, "init_from": "runs/sums"}, "base": {"objective": "next_token"},
                "sft": {"loss_on_prompts": False, "init_from": "runs/base"},
                "loop": {"algorithm": 1, "init_from": "runs/loop"}}
    made = {name: make(tmp_path / name, [line(1)], some) for name, some in settings.items()}
    runs = logs.in_order([logs.read(folder, name) for name, folder in made.items()])
    assert [run.name for run in runs] == ["base", "sft", "loop", "ppo", "sums", "sums-grpo", "student"]


# ---- fewer points ------------------------------------------------------------------------------------------

def test_thinning_by_hand():
    points = list(enumerate((1, 5, 2, 2, 0, 3)))
    assert [y for _, y in logs.thin(points, 4)] == [1, 5, 0, 3] and logs.thin(points, 6) == points


def test_thinning_keeps_every_spike_and_the_order_and_smoothing_the_mean():
    points = [(i, math.sin(i)) for i in range(100_000)]
    spikes = [(7, 50.0), (500, -9.0), (99_999, 20.0)]
    for step, value in spikes:
        points[step] = (step, value)
    few, means = logs.thin(points), logs.smooth(points, 60)
    assert len(few) <= 500 and set(spikes) <= set(few) and few == sorted(few) and set(few) <= set(points)
    assert len(means) == 60 and sum(y for _, y in logs.smooth(points, 50)) / 50 == pytest.approx(
        sum(y for _, y in points) / 100_000), "50 stretches of equal length"


def test_a_hundred_thousand_steps_are_a_small_page_in_seconds(monkeypatch, capsys, tmp_path):
    broken(tmp_path / "runs" / "long", "".join(
        f'{{"step": {i}, "bits_per_byte": {2 + (i == 70_123) * 40}, "grad_norm": {i % 7}, "lr": 0.1}}\n'
        for i in range(1, 100_001)).encode())
    began = time.perf_counter()
    made = written(monkeypatch, capsys, tmp_path, "--runs", tmp_path / "runs")
    assert time.perf_counter() - began < 20, "about one second; far more, and each point is looked at often"
    assert (tmp_path / "page.html").stat().st_size < 200_000
    assert any("highest 42" in text for text in made.text), "the spike is gone"


# ---- the terminal ------------------------------------------------------------------------------------------

def curve(tmp_path, values, name="run"):
    lines = [{"step": i, "loss_nats_per_token": y} for i, y in enumerate(values, 1)]
    return logs.read(make(tmp_path / name, lines), name)


def test_the_terminal_s_curve_by_hand(tmp_path):
    drawn = report.terminal(curve(tmp_path, [3.0, 2.0, 1.0, 1.0]), 40, rows=2)
    assert drawn.split("\n") == ["run: loss, nats a token",  # heights of 16ths: 16, 8.5, 1, 1
                                 "       3 |█", "       1 |██▁▁", "         +----", "          1  4"]


def test_the_terminal_s_curve_fits_narrow_screens_and_code_pages(tmp_path):
    run = curve(tmp_path, [5 - i / 100 for i in range(300)])
    for columns in (24, 40, 200):
        lines = report.terminal(run, columns).split("\n")
        assert max(map(len, lines)) <= columns, f"{columns} columns"
    for encoding in ("cp1252", "cp437", "ascii", "no such"):  # Windows in western Europe and the USA, LANG=C
        lines = report.terminal(run, 40, encoding=encoding).split("\n")
        assert lines[1].isascii() and "|#" in lines[1]


def test_the_terminal_shows_all_runs_and_says_which_have_no_curve(monkeypatch, capsys, tmp_path, runs):
    broken(runs / "empty", b"")
    code, text, _ = in_process(monkeypatch, capsys, report.main, "--runs", runs, "--terminal")
    assert code == 0 and not (runs / "report.html").exists()
    assert "base: bits per byte" in text and "ppo: reward" in text
    assert "empty: no curve; log.jsonl is empty" in text
    assert "no other run yet" in in_process(monkeypatch, capsys, report.main, runs / "data", "--terminal")[1]


def test_the_page_lies_in_the_runs_folder_and_is_made_anew(monkeypatch, capsys, runs):
    for _ in range(2):
        code, text, _ = in_process(monkeypatch, capsys, report.main, "--runs", runs)
        assert code == 0 and str(Path(runs, "report.html")) in text and text.startswith("4 runs")
