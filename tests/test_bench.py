"""bench.py: sides take turns, figures are medians, a peer that is not installed is passed over by name."""
import json
import statistics

import pytest

import bench
from support import in_process


def test_the_sides_take_turns_after_a_warm_call_each_and_the_figure_is_the_median(capsys):
    calls = []
    seconds = bench.alternate(3, ours=lambda: calls.append("ours"), peer=lambda: calls.append("peer"))
    assert calls == ["ours", "peer"] * 4
    assert len(seconds["ours"].runs) == 3 and seconds["ours"] == statistics.median(seconds["ours"].runs)
    assert "ours: 0.0000 s (0.0000 to " in capsys.readouterr().out


@pytest.fixture
def command(monkeypatch, capsys):
    return lambda *words: in_process(monkeypatch, capsys, bench.main, *words)


def test_measures_are_named_and_their_figures_go_into_a_file(command, monkeypatch, tmp_path):
    monkeypatch.setattr(bench, "loss", lambda rounds: print(bench.alternate(rounds, ours=lambda: None)["ours"] >= 0))
    monkeypatch.setattr(bench.bench_bpe, "report", lambda rounds: [{"kind": "training"}])
    code, out, err = command("loss", "bpe", "--rounds", "2", "--json", tmp_path / "figures.json")
    assert code == 0 and "True" in out, err
    figures = json.loads((tmp_path / "figures.json").read_text("utf-8"))
    assert figures["bpe"] == [{"kind": "training"}] and len(figures["loss"]) == 1
    assert len(figures["loss"][0]["runs"]) == 2 and figures["loss"][0]["side"] == "ours"


def test_a_peer_that_is_not_installed_is_named_and_the_other_measures_are_made(command, monkeypatch):
    for name in ("peft", "transformers", "trl", "datasketch"):
        monkeypatch.setitem(bench.sys.modules, name, None)  # as if it were not there
    monkeypatch.setattr(bench, "loss", lambda rounds: print("measured"))
    code, out, err = command("training", "lora", "dpo", "loss", "--rounds", "1")
    assert code == 0 and "measured" in out, err
    for words in ("training is passed over: transformers is not installed", "lora is passed over: peft is not",
                  "dpo is passed over: trl is not"):
        assert words in out, out


def test_what_is_no_measure_is_refused(command):
    code, _, err = command("speed")
    assert code == 2 and "each one of training, loss" in err
