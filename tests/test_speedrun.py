"""speedrun.py: stages in order, each once, gone on with after a stop; a failure says how to repeat it alone."""
import importlib
import json
import os
import shlex
import signal
import stat
import subprocess
import threading

import pytest
from support import ROOT, in_process

import config
import speedrun
from config import UserError
from speedrun import STAGES, Done, Stage, command, processes_for, run_stage
from survive import alone


@pytest.fixture
def stages(monkeypatch, tmp_path):
    """Three stages that write a line each into said.txt; the second fails while there is no file `mended`."""
    monkeypatch.chdir(tmp_path)
    note = "open('said.txt', 'a', encoding='utf-8').write('{0}\\n'); print('this is {0}, é')"
    codes = {"one": note.format("one"),
             "two": note.format("two") + "; import os; os.path.exists('mended') or os._exit(7)",
             "three": note.format("three")}
    monkeypatch.setattr(speedrun, "STAGES", tuple(Stage(name, f"what {name} is for", name, 1)
                                                  for name in codes))
    monkeypatch.setattr(speedrun, "command", lambda stage, *_: ["python", "-c", codes[stage.name]])
    monkeypatch.setattr(speedrun, "count_gpus", lambda: 0)
    return tmp_path


def said(folder):
    return (folder / "said.txt").read_text("utf-8").split()


# ---- the stages --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quick", [False, True], ids=["full", "quick"])
@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.name)
def test_each_command_is_one_that_its_script_understands(stage, quick, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _, script, *words = command(stage, quick, 1)
    if script == "bpe.py":
        script, words = "compare.py", ["--tokenizers", *words[1:]]
    if words[:1] == ["--train_reward_model"]:
        script, words = "reward_model.py", words[1:]
    config.parse(importlib.import_module(script[:-3]).Settings, words)  # ends with code 2 on an unknown flag


def test_a_stage_reads_what_an_earlier_one_writes():
    written = {"runs/chat"}  # sft.py makes it, where it is missing
    for stage in STAGES:
        words = shlex.split(stage.words)
        module = importlib.import_module({"ppo.py --train_reward_model": "reward_model"}.get(
            " ".join(words[:2]), words[0][:-3]))
        folders = {word for word in words if word.startswith("runs/")}
        out = words[words.index("--out") + 1] if "--out" in words else \
            getattr(getattr(module, "Settings", None), "data" if "--make_pairs" in words else "out", None)
        for folder in folders - {out}:
            assert any(folder.startswith(earlier) for earlier in written), f"{stage.name}: who makes {folder}?"
        assert stage.makes == (out if stage.trains else ""), f"{stage.name}: it is done where {out} is there"
        written.add(out)


@pytest.mark.parametrize("gpus, expected", [(0, {"pairs": 2}), (1, {}), (4, {"pretrain": 4, "pairs": 4,
                                                                            "ppo": 4})])
def test_gpus_share_the_training_and_without_any_the_cores_share_the_sampling(gpus, expected, monkeypatch):
    monkeypatch.setattr(speedrun, "cores", lambda: 2)
    found = {stage.name: processes_for(stage, gpus) for stage in STAGES}
    assert all(found[name] == expected.get(name, 1) for name in ("data", "pairs", "report", *expected))
    assert all((number > 1) == (command(stage, False, number)[0] == "torchrun")
               for stage, number in zip(STAGES, found.values()))


def test_windows_whose_torchrun_fails_does_without(monkeypatch):
    monkeypatch.setattr(speedrun, "cores", lambda: 8)
    monkeypatch.setattr(speedrun.sys, "platform", "win32")
    assert {processes_for(stage, gpus) for stage in STAGES for gpus in (0, 2)} == {1}


def test_what_is_typed_elsewhere_names_the_script_by_its_place(tmp_path):
    stage = Stage("a", "", "train.py --steps 5", 1, "--steps 2")
    assert command(stage, False, 1) == ["python", "train.py", "--steps", "5"]
    assert command(stage, True, 1, tmp_path) == ["python", str(ROOT / "train.py"), "--steps", "5", "--steps",
                                                 "2"]


# ---- one after the other -----------------------------------------------------------------------------------


def test_a_stage_that_fails_stops_all_and_is_where_the_same_command_goes_on(stages, monkeypatch, capfd):
    code, _, _ = in_process(monkeypatch, capfd, speedrun.main)
    assert code == 7 and said(stages) == ["one", "two"]
    log = stages / "runs" / "speedrun" / "02-two.log"
    assert log.read_text("utf-8").strip() == "this is two, é"
    (stages / "mended").touch()
    code, out, err = in_process(monkeypatch, capfd, speedrun.main)
    assert code == 0, err
    assert said(stages) == ["one", "two", "two", "three"], "what is done is not run again"
    assert "one is there already" in out and "report.html" in out


def test_the_message_of_a_failure(stages, monkeypatch, capfd):
    code, out, err = in_process(monkeypatch, capfd, speedrun.main)
    assert len(err.splitlines()) == 1
    for words in ("stage two", "exit code 7", "02-two.log", "python -c", "goes on there"):
        assert words in err, err
    assert "what two is for" in out and "this is two" in out, "what a stage says is shown too"


def test_a_failing_stage_in_another_folder_is_repeated_there(stages, monkeypatch, capfd):
    code, out, err = in_process(monkeypatch, capfd, speedrun.main, "--folder", "my runs")
    assert code == 7 and "cd 'my runs' && python -c" in err
    assert (stages / "my runs" / "said.txt").exists(), "stages run in the folder"


def test_a_stage_is_run_again_where_its_command_or_what_came_before_is_another(stages, monkeypatch, capfd):
    (stages / "mended").touch()
    assert in_process(monkeypatch, capfd, speedrun.main)[0] == 0
    path = stages / "runs" / "speedrun" / "done.json"
    done = json.loads(path.read_text("utf-8"))
    done["two"]["command"] = "python -c pass"
    path.write_text(json.dumps(done), encoding="utf-8")
    assert in_process(monkeypatch, capfd, speedrun.main)[0] == 0
    assert said(stages)[3:] == ["two", "three"]


def test_a_stage_whose_folder_was_deleted_is_run_again(stages, monkeypatch, capfd):
    (stages / "mended").touch()
    monkeypatch.setattr(speedrun, "STAGES", (*speedrun.STAGES[:1], Stage("two", "", "two", 1, out="runs/two"),
                                             *speedrun.STAGES[2:]))
    (stages / "runs" / "two").mkdir(parents=True)
    for expected in ("one two three", "three"):  # the last one always is
        (stages / "said.txt").unlink(missing_ok=True)
        assert in_process(monkeypatch, capfd, speedrun.main)[0] == 0
        assert said(stages) == expected.split()
    (stages / "runs" / "two").rmdir()
    assert in_process(monkeypatch, capfd, speedrun.main)[0] == 0
    assert said(stages) == ["three", "two", "three"], "what was deleted was said to be there already"


def test_two_at_once_in_a_folder_are_one_too_many(stages, monkeypatch, capfd):
    (stages / "runs" / "speedrun").mkdir(parents=True)
    with alone(stages / "runs" / "speedrun"):
        code, out, err = in_process(monkeypatch, capfd, speedrun.main)
    assert code == 2 and err.count("\n") == 1 and "another process is at work in" in err
    assert not (stages / "said.txt").exists()


def test_seconds_add_up_over_the_parts_of_a_stage(tmp_path):
    stage, done = STAGES[2], Done(tmp_path)
    done.add(stage, ["python", "a b"], 2.0, False)
    assert not Done(tmp_path).has(stage, ["python", "a b"]), "it was stopped"
    Done(tmp_path).add(stage, ["python", "a b"], 3.5, True)
    assert Done(tmp_path).seconds(stage) == 5.5 and Done(tmp_path).has(stage, ["python", "a b"])


@pytest.mark.parametrize("content", ["{", "[]", '{"one": 3}', '{"one": {"seconds": "x"}}', "\x00",
                                     '{"one": {"seconds": NaN}}', "[" * 100_000],
                         ids=lambda content: repr(content)[:24])
def test_a_damaged_list_of_what_is_done_is_told_of(tmp_path, content):
    (tmp_path / "done.json").write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match="done.json is damaged; delete it"):
        Done(tmp_path)


def test_what_a_folder_has_already_is_taken_as_it_is(stages, monkeypatch, capfd):
    (stages / "mended").touch()
    monkeypatch.setattr(speedrun, "STAGES", (Stage("one", "", "one", 1, kept="mended"),
                                             *speedrun.STAGES[1:]))
    assert in_process(monkeypatch, capfd, speedrun.main)[0] == 0
    assert said(stages) == ["two", "three"]


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGTERM that a process could answer")
def test_a_signal_to_stop_is_handed_on_and_waited_for(tmp_path):
    code = ("import signal, sys, time\n"
            "signal.signal(signal.SIGTERM, lambda *_: (time.sleep(0.3), print('state written'), sys.exit(3)))\n"
            "print('begun', flush=True)\nwhile True: time.sleep(0.05)")
    log = tmp_path / "log"

    def kill():
        while not log.exists() or b"begun" not in log.read_bytes():
            threading.Event().wait(0.02)
        os.kill(os.getpid(), signal.SIGTERM)
    threading.Thread(target=kill, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        run_stage(["python", "-c", code], tmp_path, log)
    assert log.read_text("utf-8").split("\n")[:2] == ["begun", "state written"], "it was not waited for"
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL, "whoever calls us gets the signals back"


def test_the_list_can_be_typed(monkeypatch, capsys):
    monkeypatch.setattr(speedrun, "count_gpus", lambda: 0)
    code, out, _ = in_process(monkeypatch, capsys, speedrun.main, "--list")
    lines = [line for line in out.splitlines() if not line.startswith("#")]
    assert code == 0 and len(lines) == len(STAGES)
    assert "python sft.py" in lines and "python dpo.py" in lines


def test_the_list_for_another_folder_is_typed_there(monkeypatch, capsys):
    monkeypatch.setattr(speedrun, "count_gpus", lambda: 0)
    monkeypatch.setattr(speedrun.sys, "platform", "linux")
    _, out, _ = in_process(monkeypatch, capsys, speedrun.main, "--list", "--quick", "--folder", "my runs")
    lines = [line for line in out.splitlines() if not line.startswith("#")]
    assert lines[0] == "mkdir -p 'my runs' && cd 'my runs'"
    assert shlex.join(["python", str(ROOT / "sft.py"), *shlex.split(STAGES[3].quick)]) in lines


def test_on_windows_the_list_has_the_quotes_of_its_shell(monkeypatch, capsys):
    monkeypatch.setattr(speedrun, "count_gpus", lambda: 0)
    monkeypatch.setattr(speedrun.sys, "platform", "win32")
    _, out, _ = in_process(monkeypatch, capsys, speedrun.main, "--list", "--folder", "my runs")
    lines = [line for line in out.splitlines() if not line.startswith("#")]
    assert lines[:2] == ['mkdir "my runs"', 'cd "my runs"'] and not any("'" in line for line in lines)


@pytest.mark.skipif(os.name == "nt", reason="a shell script; on Windows speedrun.py itself is called")
def test_the_shell_script_sets_up_once_and_hands_its_flags_on(tmp_path):
    script = tmp_path / "speedrun.sh"
    script.write_bytes((ROOT / "speedrun.sh").read_bytes())
    fake = tmp_path / "bin" / "python3"
    fake.parent.mkdir()
    fake.write_text("#!/bin/sh\necho python3 \"$@\"\nmkdir -p .venv/bin\n"
                    "printf '#!/bin/sh\\necho python \"$@\"\\n' > .venv/bin/python\n"
                    "chmod +x .venv/bin/python\n", encoding="utf-8")
    fake.chmod(fake.stat().st_mode | stat.S_IXUSR)

    def run(*flags):
        environment = {**os.environ, "PATH": f"{fake.parent}{os.pathsep}{os.environ['PATH']}"}
        return subprocess.run(["sh", str(script), *flags], env=environment, capture_output=True, check=True,
                              encoding="utf-8").stdout.splitlines()
    assert run("--quick") == ["python3 -m venv .venv", "python -m pip install -r requirements.txt",
                              "python speedrun.py --quick"]
    assert run("--folder", "a b") == ["python speedrun.py --folder a b"]
