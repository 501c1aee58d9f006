"""pipeline.py: what each step drops, in which order; that shards and processes change nothing."""
import functools
import gzip
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import config
import data
import dedup
import documents
import pipeline
from bpe import Tokenizer
from classifier import Classifier
from config import UserError
from data import Settings, prepare, stored_documents, write_documents
from languages import Languages
from perplexity import NgramModel, percentile_bounds

ROOT = Path(data.__file__).parent
WORDS = "river mountain winter lantern paper morning silver garden letter window".split()


def sentences(seed, count=30):
    """A text of its own words: `count` lines of twelve, with a few that are in every language's top eight."""
    rng = random.Random(seed)
    return "".join(f"The {' '.join(rng.choices(WORDS, k=4))} and number {rng.randrange(10**6)} of the "
                   f"{' '.join(rng.choices(WORDS, k=4))}.\n" for _ in range(count))


def run(folder, documents=None, out="out", **settings):
    """(texts that are kept, in order; report; meta) of documents, or of what lies in folder/in already."""
    (folder / "in").mkdir(exist_ok=True)
    if documents is not None:
        documents = [{"text": text} if isinstance(text, str) else text for text in documents]
        write_documents(folder / "in" / "a.jsonl", documents)
    settings = {"vocab_size": 300, "workers": 1, "overwrite": True} | settings
    meta = prepare(Settings(input=(str(folder / "in"),), out=str(folder / out), **settings))
    told = json.loads((folder / out / "report.json").read_text(encoding="utf-8"))
    kept = list(stored_documents(*(folder / out / f"{split}.jsonl" for split in data.SPLITS)))
    return {document["source"]: document["text"] for document in kept}, told, meta


def step(told, name):
    return next(step for step in told["steps"] if step["name"] == name)


# ---- steps -------------------------------------------------------------------------------------------------


def test_quality_rules_are_those_of_the_source(tmp_path):
    good = sentences(0)
    kept, told, _ = run(tmp_path, [good, "click here " * 50, {"text": "x = 1\n" * 3, "source": "a.py"}],
                        quality="auto", vocab_size=257)
    assert list(kept.values()).count(good) == 1 and "a.py" in kept, "code need not read like prose"
    found = step(told, "quality")
    assert found["documents"] == 1 and found["reasons"]["stop_words"] == 1
    assert found["examples"][0]["source"] == "a.jsonl:2" and "at least" in found["examples"][0]["why"]


def test_a_rule_can_be_changed_or_switched_off(tmp_path):
    short = ("The end of the day and that was to be all. The lantern burned. Nobody came. Winter was long. "
             "It snowed.\n")
    for rules, count in (((), 1), (("words=5:",), 2)):
        kept, _, _ = run(tmp_path, [sentences(0), short], quality="web", rules=rules)
        assert len(kept) == count


def test_web_pages_lose_their_boilerplate_first(tmp_path):
    page = sentences(0) + "Home | About | Contact\nPlease enable javascript to see this.\n"
    kept, told, _ = run(tmp_path, [page], quality="web", val_fraction=0.01)
    assert step(told, "web lines")["changed"] == 1 and "javascript" not in "".join(kept.values())


def test_personal_data_is_replaced_and_much_of_it_drops_the_document(tmp_path):
    listed = "".join(f"person{n}@mail{n}.org\n" for n in range(6))
    texts = [sentences(0) + "Write to ann@mail.org.", sentences(1) + listed]
    kept, told, _ = run(tmp_path, texts, redact=True)
    assert "Write to [EMAIL_ADDRESS]." in "".join(kept.values())
    found = step(told, "personal data")
    assert (found["documents"], found["changed"]) == (1, 1) and "6 found, at most 5" in str(found["examples"])


def test_near_duplicates_leave_the_first_and_say_whom_they_resemble(tmp_path):
    texts = [sentences(n) for n in range(8)]
    twin = texts[3].replace("river", "RIVER,").replace("number", "number:", 1)
    kept, told, _ = run(tmp_path, [*texts, twin], near=0.8)
    assert len(kept) == 8 and twin not in kept.values()
    found = step(told, "near-duplicate")
    assert found["documents"] == 1 and found["examples"][0]["why"] == "Jaccard 1.00 with a.jsonl:4"


def test_lines_of_earlier_documents_are_cut_and_those_of_its_own_stay(tmp_path):
    licence = "Permission is hereby granted to whoever reads this line to the end, and to the next.\n"
    refrain = "And the lantern burned by the river until the morning came to the mountain again.\n"
    kept, told, _ = run(tmp_path, [licence + sentences(0), sentences(1) + licence, licence,
                                   refrain + sentences(2) + refrain], lines=60, val_fraction=1e-6)
    texts = [kept[name] for name in sorted(kept)]
    assert texts == [licence + sentences(0), sentences(1), refrain + sentences(2) + refrain]
    found = step(told, "repeated lines")
    assert (found["documents"], found["changed"], found["bytes"]) == (1, 1, 2 * len(licence))
    assert found["examples"][0]["text"] == licence and found["examples"][0]["why"] == "lines: 1 of 31"


def test_lines_across_shards_are_those_that_dedup_cuts(tmp_path):
    rng = random.Random(0)
    texts = ["".join(rng.choices(["a" * 70 + "\n", "b" * 70 + "\n", "c\n", "\n", "d" * 80 + "\n"], k=5))
             + f"document {n}\n" for n in range(40)]
    for n in range(8):
        write_documents(tmp_path / f"in{n}.jsonl", [{"text": text, "source": f"{n}:{i}"}
                                                    for i, text in enumerate(texts[5 * n:5 * n + 5])])
    (tmp_path / "in").mkdir()
    for n in range(8):
        (tmp_path / f"in{n}.jsonl").rename(tmp_path / "in" / f"{n}.jsonl")
    kept, _, _ = run(tmp_path, lines=60, shard_bytes=1, val_fraction=1e-6)
    expected = list(dedup.without_repeated_lines(texts, min_length=60))
    assert [kept[f"{n // 5}:{n % 5}"] for n in range(40)] == expected


@pytest.mark.parametrize("form", [lambda text: {"text": text}, lambda text: {"question": text, "answer": "4"},
                                  lambda text: {"choices": [{"label": "A", "said": text}, "B"], "gold": 0}])
@pytest.mark.parametrize("action", ["drop", "cut"])
def test_what_stands_in_a_benchmark_is_dropped_or_cut_with_the_words_named(tmp_path, action, form):
    question = "If seven lanterns burn for eleven nights on nine litres of oil how many burn for three?"
    other = "Another question, of no interest to anybody in this file."
    write_documents(tmp_path / "test.jsonl", [form(other), form(question)])
    texts = [sentences(0), "Before it. " + question.upper() + " After it. " + sentences(1)]
    kept, told, _ = run(tmp_path, texts, benchmark=(str(tmp_path / "test.jsonl"),), contaminated=action,
                        val_fraction=0.01)
    found = step(told, "benchmark")
    assert (found["documents"], found["changed"]) == ((1, 0) if action == "drop" else (0, 1))
    assert found["examples"][0]["why"].endswith("test.jsonl: item 1")
    assert "lanterns burn" in str(found["examples"])
    assert "SEVEN" not in "".join(kept.values())


def test_scripts_keep_the_documents_that_are_mostly_written_in_them(tmp_path):
    kept, told, _ = run(tmp_path, [sentences(0), "Река течёт, и горы стоят.", "床前明月光", "17 + 4"],
                        scripts=("Latin", "Han"), vocab_size=257)
    assert {"a.jsonl:1", "a.jsonl:3"} == set(kept)
    reasons = [one["why"] for one in step(told, "script")["examples"]]
    assert reasons == ["script: Cyrillic", "script: no letters"]


def test_languages_keep_the_documents_in_those_that_are_named(tmp_path):
    german = ["Der Fluss fließt ruhig und die Berge stehen im Winter still.",
              "Am Morgen brennt das Licht nicht."]
    model = Languages.train({"english": [sentences(n) for n in range(5)], "german": german})
    model.save(tmp_path / "languages.npz")
    kept, told, _ = run(tmp_path, [sentences(9), *german], languages=str(tmp_path / "languages.npz"),
                        keep_languages=("english",))
    assert list(kept) == ["a.jsonl:1"] and step(told, "language")["documents"] == 2
    assert step(told, "language")["examples"][0]["why"].startswith("language: german, by ")


def gibberish(seed):
    return "".join(random.Random(seed).choices("qxzjkvw #%", k=400))


def test_most_classifiers_must_vote_for_a_document(tmp_path):
    texts = [f(n) for n in range(8) for f in (sentences, gibberish)]
    classifier = Classifier.train(texts, [True, False] * 8, "words")
    classifier.save(tmp_path / "words.npz")
    classifier.threshold = 2.0                               # a probability that none has: always against
    classifier.save(tmp_path / "never.npz")
    paths = [str(tmp_path / f"{name}.npz") for name in ("words", "never")]
    for chosen, count in (((paths[0],), 1), ((paths[0], paths[0], paths[1]), 1)):
        kept, told, _ = run(tmp_path, [sentences(20), gibberish(20)], classifier=chosen)
        assert list(kept) == ["a.jsonl:1"]
        assert step(told, "classifier")["reasons"] == {"classifier": count}
    with pytest.raises(UserError, match="no text is left of the input: 2 classifier"):
        run(tmp_path, [sentences(20), gibberish(20)], classifier=tuple(paths))  # one to one is no majority


def test_what_lies_outside_of_the_bounds_of_perplexity_is_dropped(tmp_path):
    tokenizer = Tokenizer.train([sentences(0)], 300)
    model = NgramModel.train([np.array(tokenizer.encode(sentences(n))) for n in range(6)], 300, 3)
    model.tokenizer = tokenizer
    model.save(tmp_path / "unbounded")
    model.bounds = percentile_bounds(model.bits_per_byte([sentences(n) for n in range(6, 16)]), 0, 100)
    model.save(tmp_path / "bounded")
    documents = [*map(sentences, range(6, 9)), gibberish(0)]
    kept, told, _ = run(tmp_path, documents, perplexity=str(tmp_path / "bounded"))
    assert sorted(kept) == ["a.jsonl:1", "a.jsonl:2", "a.jsonl:3"]
    assert "at most" in step(told, "perplexity")["examples"][0]["why"]
    with pytest.raises(UserError, match="unbounded has no bounds"):
        run(tmp_path, documents, perplexity=str(tmp_path / "unbounded"))


def test_passages_that_stood_before_are_cut(tmp_path):
    passage = sentences(9, 5)
    kept, told, _ = run(tmp_path, [sentences(0) + passage, sentences(1) + passage], passages=200,
                        val_fraction=1e-6)
    assert step(told, "passages")["changed"] == 1
    assert "".join(kept.values()).count(passage[:100]) == 1


def test_clean_switches_the_steps_on_and_a_setting_goes_before(tmp_path):
    settings = Settings(clean=True, near=0.0)
    assert (settings.quality, settings.redact, settings.near) == ("auto", True, 0)
    assert (Settings().quality, Settings().redact, Settings().near, Settings().lines) == ("off", False, 0, 0)


def test_each_step_of_clean_can_be_switched_off_on_the_command_line():
    words = "--clean --quality off --lines 0 --near 0 --passages 0 --redact false".split()
    settings = config.parse(Settings, words)                 # "none" would mean: not said
    assert all(getattr(settings, name) == value for name, value in pipeline.OFF.items())


def test_without_a_step_asked_for_the_funnel_is_empty_tables_and_duplicates(tmp_path):
    _, told, _ = run(tmp_path, ["a" * 30, "b" * 30, "a" * 30, " "], vocab_size=257)
    assert [s["name"] for s in told["steps"]] == ["empty", "table", "duplicate"]
    assert step(told, "duplicate")["examples"] == [
        {"source": "a.jsonl:3", "why": "equal to a.jsonl:1", "text": "a" * 30}]


# ---- decisions ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("band", [1, 7, 10**6])
@pytest.mark.parametrize("seed", range(3))
def test_repeated_keys_are_found_band_by_band_as_by_brute_force(tmp_path, monkeypatch, seed, band):
    monkeypatch.setattr(pipeline, "BAND", band)              # how many are sorted at once changes nothing
    rng = np.random.default_rng(seed)
    shared = pipeline.Work(tmp_path)
    values = rng.integers(0, 2**64, 12, dtype=np.uint64)
    values[0] = 0
    sizes, rows, owners = [5, 0, 9, 3], [], []
    for unit, size in enumerate(sizes):
        owner = np.sort(rng.integers(0, max(size, 1), 2 * size)).astype(np.uint64)
        keys = rng.choice(values, 2 * size)
        np.column_stack([keys, owner]).tofile(shared.path("before", unit, "keys"))
        rows += keys.tolist()
        owners += (owner + np.uint64(sum(sizes[:unit]))).tolist()
    twins = pipeline.decide_repeated(shared, "before", "it", [0, 5, 5, 14, 17], columns=1)
    first = {}
    expected = [key != 0 and first.setdefault(key, owner) < owner for key, owner in zip(rows, owners)]
    drops = [np.fromfile(shared.path("it-decided", unit, "drop"), np.uint8) for unit in range(4)]
    assert np.concatenate(drops).tolist() == expected
    assert set(twins) <= {(owner, first[key]) for key, owner, drop in zip(rows, owners, expected) if drop}
    assert bool(twins) == any(expected)


# ---- shards and processes ----------------------------------------------------------------------------------


def write_shards(folder, shards=4, seed=0):
    """Files with duplicates, near-duplicates and shared lines across them."""
    (folder / "in").mkdir()
    rng = random.Random(seed)
    texts = [sentences(n) for n in range(40)]
    texts += [texts[n] for n in (3, 17)]
    texts += [texts[n].replace("The ", "the ").replace("\n", "\n\n") for n in (5, 20)]
    texts += ["contact: someone@somewhere.org, as it was.\n" + sentences(99)]
    rng.shuffle(texts)
    for n in range(shards):
        documents = [{"text": text, "source": f"{n}:{i}"} for i, text in enumerate(texts[n::shards])]
        write_documents(folder / "in" / f"{n}.jsonl{'.gz' * (n % 2)}", documents)


STEPS = ("--quality", "web", "--near", "0.8", "--lines", "60", "--redact", "--vocab_size", "300",
         "--workers", "1", "--val_fraction", "0.1")


def start(folder, out, rank=0, world_size=1, shard_bytes=1):
    """data.py in a process of its own, as torchrun starts it."""
    environment = os.environ | {"RANK": str(rank), "WORLD_SIZE": str(world_size)}
    return subprocess.Popen(
        [sys.executable, ROOT / "data.py", "--input", folder / "in", "--out", folder / out, *STEPS,
         "--shard_bytes", str(shard_bytes)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        encoding="utf-8")


def finish(processes):
    for process in processes:
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors


def contents(folder):
    """The bytes of all files, but for times and the names of folders."""
    found = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "report.html"}
    for name in ("meta.json", "report.json"):
        value = json.loads(found[name])
        value["settings"] = None
        for one in value.get("steps", ()):
            one["seconds"] = None
        found[name] = value
    return found


def test_any_number_of_processes_gives_the_same_bytes(tmp_path):
    write_shards(tmp_path)
    finish([start(tmp_path, "one")])
    finish([start(tmp_path, "three", rank, 3) for rank in reversed(range(3))])
    one, three = contents(tmp_path / "one"), contents(tmp_path / "three")
    assert one == three
    dropped = {name: documents for name, (documents, _) in one["meta.json"]["funnel"].items()}
    assert dropped["duplicate"] == 2 and dropped["near-duplicate"] == 2
    assert sorted(os.listdir(tmp_path)) == ["in", "one", "three"], "no work is left behind"


def test_a_process_that_comes_late_and_finds_nothing_to_do_ends_well(tmp_path):
    write_shards(tmp_path)
    first, work = start(tmp_path, "out", 0, 2, shard_bytes=10**9), tmp_path / "out.tmp" / "work"
    while not (work / "tokens-val.00000.json").is_file() and first.poll() is None:
        time.sleep(0.01)
    time.sleep(0.5)                                          # all that is to be done, the first has done
    finish([first, start(tmp_path, "out", 1, 2, shard_bytes=10**9)])
    assert sorted(os.listdir(tmp_path)) == ["in", "out"]


def test_the_size_of_shards_changes_no_text(tmp_path):
    write_shards(tmp_path)
    whole, _, meta = run(tmp_path, out="whole", near=0.8, lines=60, redact=True)
    parts, _, again = run(tmp_path, out="parts", near=0.8, lines=60, redact=True, shard_bytes=1)
    assert whole == parts and meta["train"] == again["train"] and meta["funnel"] == again["funnel"]


def interrupted(folder, monkeypatch, unit, error=KeyboardInterrupt):
    """Run until the near pass comes to a shard, and end there."""
    original = pipeline.run_pass

    def run_pass(one, *arguments):
        if one.name == "near" and arguments[-1] == unit:
            raise error
        return original(one, *arguments)

    monkeypatch.setattr(pipeline, "run_pass", run_pass)
    with pytest.raises(error):
        run(folder, near=0.8, shard_bytes=1)
    monkeypatch.setattr(pipeline, "run_pass", original)


def test_a_run_that_was_stopped_goes_on_from_its_finished_shards(tmp_path, monkeypatch, capsys):
    write_shards(tmp_path)
    expected, _, _ = run(tmp_path, out="expected", near=0.8, shard_bytes=1)
    interrupted(tmp_path, monkeypatch, unit=2)
    assert "the same command goes on from there" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()
    (tmp_path / "out.tmp" / "work" / "near.00001.jsonl").unlink()
    done, original = [], pipeline.run_pass
    monkeypatch.setattr(pipeline, "run_pass", lambda one, *arguments: done.append(
        (one.name, arguments[-1])) or original(one, *arguments))
    kept, _, _ = run(tmp_path, near=0.8, shard_bytes=1)
    assert done == [("near", 1), ("near", 2), ("near", 3)] and kept == expected
    assert "near.00001.jsonl of an earlier run is missing" in capsys.readouterr().out
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")


def test_after_a_change_of_settings_or_of_a_file_what_depends_on_it_is_done_anew(tmp_path, monkeypatch):
    write_shards(tmp_path)
    interrupted(tmp_path, monkeypatch, unit=2)
    shutil.copytree(tmp_path / "out.tmp", tmp_path / "saved")
    expected, _, _ = run(tmp_path, out="expected", near=0.5, shard_bytes=1)
    assert run(tmp_path, near=0.5, shard_bytes=1)[0] == expected
    shutil.copytree(tmp_path / "saved", tmp_path / "out.tmp")
    write_documents(tmp_path / "in" / "2.jsonl", [{"text": "Something new.", "source": "new"}])
    assert run(tmp_path, near=0.8, shard_bytes=1)[0]["new"] == "Something new."


def test_an_input_file_that_is_missing_on_restart_is_named(tmp_path, monkeypatch):
    write_shards(tmp_path)
    interrupted(tmp_path, monkeypatch, unit=2)
    (tmp_path / "in" / "2.jsonl").rename(tmp_path / "2.jsonl")
    with pytest.raises(UserError, match=r"2\.jsonl, which the unfinished run in .* has read, is missing"):
        run(tmp_path, near=0.8, shard_bytes=1)
    (tmp_path / "2.jsonl").rename(tmp_path / "in" / "2.jsonl")
    assert run(tmp_path, near=0.8, shard_bytes=1)[0]


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_two_processes_killed_again_and_again_end_with_the_same_bytes_even_as_one(tmp_path):
    write_shards(tmp_path, shards=12)
    finish([start(tmp_path, "expected")])
    work = tmp_path / "killed.tmp" / "work"
    for marks in (3, 14, 30):                                # in three passes
        processes = [start(tmp_path, "killed", rank, 2) for rank in range(2)]
        while len(list(work.glob("*.json"))) < marks and all(process.poll() is None for process in processes):
            time.sleep(0.01)
        for process in processes:
            process.send_signal(signal.SIGKILL)
            process.communicate()
    finish([start(tmp_path, "killed")])
    assert contents(tmp_path / "killed") == contents(tmp_path / "expected")


# ---- when something is wrong -------------------------------------------------------------------------------


def test_documents_and_lines_that_are_too_large_stop_the_run_or_are_counted(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_text(sentences(0), encoding="utf-8")
    (tmp_path / "in" / "b.txt.gz").write_bytes(gzip.compress(b"x" * 50_000))
    (tmp_path / "in" / "c.jsonl").write_bytes(b'{"text": "' + b"y" * 50_000 + b'"}\n{"text": "short"}\n')
    with pytest.raises(UserError, match=r"b\.txt\.gz: a document of 50,000 bytes, over --most_bytes 10,000"):
        run(tmp_path, most_bytes=10_000)
    kept, _, meta = run(tmp_path, most_bytes=10_000, on_bad_line="skip", vocab_size=257)
    assert len(kept) == 2 and meta["funnel"]["large"] == [2, 50_000 + 50_013]


@pytest.mark.parametrize("texts, dropped", [([" ", "\n"], "2 empty"),
                                            (["too short for a page"] * 2, "1 quality")])
def test_where_nothing_is_left_all_steps_pass_and_it_is_one_line(tmp_path, texts, dropped):
    with pytest.raises(UserError, match=f"no text is left of the input: .*{dropped}"):
        run(tmp_path, texts, clean=True, benchmark=(), scripts=("Latin",))


def test_a_line_of_any_length_takes_bounded_memory():
    class Endless:
        """A line of a gigabyte that is made as it is read."""
        left = 2**30

        def readline(self, most):
            size = min(most, self.left)
            self.left -= size
            longest.append(size)
            return b"x" * size

    longest = []
    (rejected,) = documents.read_json_lines(Endless(), Path("big.jsonl"), "big", most=2**20)
    assert rejected.reason == "large" and rejected.num_bytes == 2**30 and max(longest) <= 2**20 + 1
    assert "big.jsonl:1: a line of 1,073,741,824 bytes" in rejected.message


@pytest.mark.parametrize("settings, complaint", [
    ({"quality": "web", "rules": ("wrods=5:",)}, "wrods"), ({"rules": ("words=5:",)}, "needs --quality"),
    ({"quality": "poetry"}, "--quality poetry is not one of"), ({"near": 1.5}, "--near 1.5 is out of range"),
    ({"languages": "x"}, "pass both"), ({"ngram": 0}, "--ngram 0 is out of range"),
    ({"ngram": 8}, "--ngram 8 is for --benchmark, and there is none; leave it out"),
    ({"shard_bytes": 0}, "--shard_bytes 0")])
def test_settings_that_make_no_sense_are_refused(settings, complaint):
    with pytest.raises(UserError, match=complaint):
        Settings(**settings)


@pytest.mark.parametrize("content, complaint", [("", "is empty"), ('{"text": " "}', "is empty"),
                                                ('{"text": "too short"}', "no item of at least")])
def test_a_benchmark_without_words_is_refused_before_the_work(tmp_path, content, complaint, monkeypatch):
    monkeypatch.setattr(pipeline, "run_pass", None)          # none is run
    (tmp_path / "test.jsonl").write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=complaint):
        run(tmp_path, [sentences(0)], benchmark=(str(tmp_path / "test.jsonl"),))


def test_an_ngram_longer_than_every_document_finds_nothing_and_that_is_told(tmp_path, capsys):
    write_documents(tmp_path / "test.jsonl", [{"text": sentences(5)}])
    kept, told, _ = run(tmp_path, [sentences(5, 2), sentences(1, 2)], ngram=200,
                        benchmark=(str(tmp_path / "test.jsonl"),), val_fraction=0.01)
    assert len(kept) == 2 and step(told, "benchmark")["documents"] == 0
    warning = "warning: no document has 200 words, so nothing of --benchmark could be found"
    assert warning in capsys.readouterr().out
    run(tmp_path, [sentences(1), sentences(2, 2)], ngram=200, benchmark=(str(tmp_path / "test.jsonl"),))
    assert "warning" not in capsys.readouterr().out, "one is long enough"
