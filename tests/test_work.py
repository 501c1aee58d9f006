"""work.py: units are done once, by whoever has them, and a mark without its files does not count."""
import json
import os
import threading
import time

import pytest

import work
from config import UserError
from work import Work, fingerprint


def write_number(shared):
    """A stage whose unit u writes u squared, and returns it."""
    def function(unit):
        shared.path("square", unit, "txt").write_text(str(unit * unit), encoding="utf-8")
        done.append(unit)
        return {"square": unit * unit}
    done = []
    return function, done


def test_units_are_done_in_order_and_their_results_returned(tmp_path):
    shared = Work(tmp_path)
    function, done = write_number(shared)
    assert shared.each("square", 4, function) == [{"square": n} for n in (0, 1, 4, 9)]
    assert done == [0, 1, 2, 3] and shared.path("square", 3, "txt").read_text(encoding="utf-8") == "9"
    assert shared.once("sum", lambda: {"sum": 14}) == {"sum": 14}


def test_what_is_marked_is_not_done_again_unless_its_key_or_files_differ(tmp_path, capsys):
    first = Work(tmp_path, "key")
    first.each("square", 4, write_number(first)[0])
    function, done = write_number(first)
    Work(tmp_path, "key").each("square", 4, function)
    assert done == []
    first.path("square", 1, "txt").unlink()
    first.path("square", 2, "txt").write_text("cut", encoding="utf-8")
    Work(tmp_path, "key").each("square", 4, function)
    assert done == [1, 2] and "square.00001.txt of an earlier run is missing" in capsys.readouterr().out
    Work(tmp_path, "other").each("square", 4, function)
    assert done == [1, 2, 0, 1, 2, 3], "made with other settings"
    first.path("square", 0, "json").write_text("{", encoding="utf-8")
    assert first.result("square", 0, "other") is None, "a damaged mark is none"


@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_processes_share_the_units_and_all_get_all_results(tmp_path, world_size):
    ranks = [Work(tmp_path, "", rank, world_size) for rank in range(world_size)]
    stages, results = [write_number(shared) for shared in ranks], {}

    def run(rank):
        squares = ranks[rank].each("square", 7, stages[rank][0])
        results[rank] = squares, ranks[rank].once("sum", lambda: {"by": rank})

    threads = [threading.Thread(target=run, args=(rank,)) for rank in reversed(range(world_size))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=20)
    assert [done for _, done in stages] == [list(range(rank, 7, world_size)) for rank in range(world_size)]
    assert list(results.values()) == [([{"square": n * n} for n in range(7)], {"by": 0})] * world_size


def test_who_waits_hears_of_a_failure(tmp_path):
    def fail():
        raise UserError("disk on fire")

    with pytest.raises(UserError):
        Work(tmp_path, "", 0, 2).once("burn", fail)
    with pytest.raises(UserError, match="process 0 failed: UserError: disk on fire"):
        Work(tmp_path, "", 1, 2).once("burn", fail)
    old = time.time() - 60
    os.utime(tmp_path / "failed.0", (old, old))
    waiting = Work(tmp_path, "", 1, 2)
    timer = threading.Timer(0.2, lambda: Work(tmp_path, "", 0, 2).once("burn", lambda: {"fine": 1}))
    timer.start()
    assert waiting.once("burn", fail) == {"fine": 1}, "the failure of an earlier run is none of this one's"


def test_rank_and_world_size_come_from_the_launcher(monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert work.place() == (0, 1)
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "3")
    assert work.place() == (3, 4)
    for rank in ("4", "-1", "x"):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(UserError, match="RANK"):
            work.place()


def test_fingerprints_are_of_the_content_alone():
    assert fingerprint({"a": 1, "b": [2]}) == fingerprint({"b": [2], "a": 1})
    assert fingerprint({"a": 1, "b": [2]}) != fingerprint({"a": 1, "b": [3]})
    assert fingerprint("x") == fingerprint(*json.loads('["x"]')), "the same after a way through JSON"
