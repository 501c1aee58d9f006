"""README.md, README.zh.md, COURSE.md, LOG.md: what they promise is there."""
import ast
import importlib
import re
import sysconfig
from pathlib import Path, PurePosixPath

import pytest
import torch.distributed.run

from config import UserError, checked, command_line, from_words, settings_of
from exercises import EXERCISES
from readme_commands import MODULES, REDUCED, Command, commands, reduced, run_all

ROOT = Path(__file__).resolve().parent.parent
TEXTS = ("README.md", "README.zh.md", "COURSE.md", "LOG.md")
README = (ROOT / "README.md").read_text(encoding="utf-8")
CHINESE = (ROOT / "README.zh.md").read_text(encoding="utf-8")


def read(name):
    return (ROOT / name).read_text(encoding="utf-8")


# ---- commands ----------------------------------------------------------------------------------------------


def test_a_block_becomes_commands_without_comments_continuations_and_other_languages():
    text = "```sh\npython a.py --x 1   # a comment\npython b.py --y \\\n    2; python c.py\n```\n```python\nx\n```\n" \
           "```sh\ntorchrun --nproc-per-node 2 a.py --z\n./go.sh && python a.py\n```\n"
    assert commands(text) == [
        Command("python a.py --x 1", ("python",), "a.py", ("--x", "1")),
        Command("python b.py --y 2", ("python",), "b.py", ("--y", "2")),
        Command("python c.py", ("python",), "c.py", ()),
        Command("torchrun --nproc-per-node 2 a.py --z", ("torchrun", "--nproc-per-node", "2"), "a.py", ("--z",)),
        Command("./go.sh && python a.py", (), "", ())]


def test_both_readmes_have_the_same_commands():
    english, chinese = ([one.text for one in commands(text)] for text in (README, CHINESE))
    assert english == chinese
    assert len(english) > 30, "no blocks marked as sh were found"


def test_the_first_two_commands_are_those_that_other_scripts_rely_on():
    setup = "python3 -m venv .venv && .venv/bin/pip install -r requirements"
    assert [one.text for one in commands(README)][:3] == [
        f"{setup}.txt && .venv/bin/torchrun train.py",
        f"{setup}-dev.txt && .venv/bin/python -m pytest -n 2 --dist loadfile", "./speedrun.sh"]


def settings_class(one):
    """(the dataclass that takes the words of a command, those words); None where there is none."""
    words = list(one.words)
    if one.script == "bpe.py" and words[:1] in (["compare"], ["extend"]):
        name = {"compare": "compare", "extend": "vocabulary"}[words.pop(0)]
        words = ["--tokenizers", *words] if name == "compare" else words
        return importlib.import_module(name).Settings, words
    if one.script == "lora.py":
        assert words.pop(0) == "merge"
        return importlib.import_module("adapters").Merge, words
    if "--train_reward_model" in words:
        words.remove("--train_reward_model")
        return importlib.import_module("reward_model").Settings, words
    if one.script == "bench.py" and words and not words[0].startswith("-"):
        words = ["--only", *words]
    if one.script == "report.py" and words and not words[0].startswith("-"):
        words = ["--compare", *words]
    if one.script.startswith("tests/"):
        return None
    module = importlib.import_module(one.script.removesuffix(".py"))
    return (module.Settings, words) if hasattr(module, "Settings") else None


def check_flags(one):
    """Raises UserError where the script has no such flag, or it does not take such a value."""
    found = settings_class(one)
    if found is None:
        return
    known = settings_of(found[0])
    for name, words in command_line(found[1], known).items():
        checked(from_words, words, known[name], f"{one.text}: --{name} {' '.join(words)}")


@pytest.mark.parametrize("name", ["README.md", "COURSE.md", "LOG.md"])
def test_scripts_of_all_commands_exist_and_have_their_flags(name):
    for one in commands(read(name)):
        if not one.script:
            continue
        assert (ROOT / one.script).exists(), f"{one.text}: there is no {one.script}"
        check_flags(one)
        if one.launcher[0] == "torchrun":
            torch.distributed.run.get_args_parser().parse_args([*one.launcher[1:], one.script])


@pytest.mark.parametrize("name", ["README.md", "COURSE.md"])
def test_a_run_folder_that_a_command_names_is_made_by_one_above_it(name):
    made = set()
    for one in commands(read(name)):
        missing = {name for name in one.runs(made=False)
                   if not {name, *map(str, PurePosixPath(name).parents)} & made}
        assert not missing, f"{one.text}: nothing above it makes {min(missing)}"
        made |= one.runs(made=True) | default_out(one)


def default_out(one) -> set[str]:
    """The folder that a command makes without --out."""
    if one.script == "dpo.py" and "--make_pairs" in one.words:
        return {"runs/pairs"}
    makes = one.script and not {"--out", "--dry_run", "--compare", "--measure"} & set(one.words)
    found = settings_class(one) if makes else None
    out = settings_of(found[0]).get("out") if found else None
    return {out.default} if out and isinstance(out.default, str) else set()


@pytest.mark.parametrize("line, message", [
    ("python train.py --stepz 3", "did you mean --steps"), ("python train.py --steps three", "a whole number"),
    ("python lora.py merge --bass x", "did you mean --base"), ("python ppo.py --train_reward_model --steps x", "steps")])
def test_a_wrong_flag_or_value_in_a_command_is_found(line, message):
    with pytest.raises(UserError, match=message):
        check_flags(commands(f"```sh\n{line}\n```\n")[0])


def test_flags_for_the_reduced_size_are_flags_of_their_scripts():
    """Put behind each command of the README they still are; and each of them is for one that is there."""
    for one in commands(README):
        if one.script:
            check_flags(reduced(one))
    assert {key.split()[0] for key in REDUCED} <= {one.script for one in commands(README)}


def test_what_is_not_run_has_a_reason(tmp_path):
    def reason(line):
        return commands(f"```sh\n{line}\n```\n")[0].why_not(ROOT)
    assert reason("python train.py --steps 3") is None
    assert reason("python train.py --preset 7b --dry_run") is None
    assert reason("python train.py --preset 7b") == "needs a GPU"
    assert reason("torchrun --nnodes 2 train.py") == "needs several machines"
    assert reason("python sample.py --chat path/to/model") == "needs a downloaded model"
    assert "my_texts" in reason("python data.py --input my_texts/")
    assert "network" in reason("python3 -m venv .venv && .venv/bin/pip install x")


def test_the_modules_of_the_reduced_corpus_are_in_this_pythons_library():
    library = Path(sysconfig.get_path("stdlib"))
    there = [module for module in MODULES if (library / module).with_suffix(".py").exists()]
    assert len(there) >= 15, there  # of 23, in any Python from 3.11 on: some moved


# ---- files, links, figures ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name, text", [("README.md", README), ("README.zh.md", CHINESE)])
def test_the_table_has_every_file_and_about_its_lines(name, text):
    rows = {file: int(lines) for file, lines in re.findall(r"^\| `(\w+\.py)` \| (\d+) \|", text, re.M)}
    files = {path.name: len(path.read_text(encoding="utf-8").splitlines()) for path in ROOT.glob("*.py")}
    assert set(files) - set(rows) == set(), f"{name}: files that the table does not name"
    assert set(rows) <= set(files), f"{name}: names of files that are not there"
    wrong = {file: (rows[file], files[file]) for file in files if abs(rows[file] - files[file]) > 0.15 * files[file]}
    assert not wrong, f"{name}: lines in the table, and in fact, more than 15 % apart: {wrong}"


@pytest.mark.parametrize("text", [README, CHINESE], ids=["en", "zh"])
def test_imports_run_downwards_in_the_reading_order(text):
    order = re.findall(r"^\| `(\w+)\.py` \| \d+ \|", text, re.M)
    for number, file in enumerate(order):
        for node in ast.parse(read(f"{file}.py")).body:  # at the top level: those in functions run later
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else \
                [node.module] if isinstance(node, ast.ImportFrom) else []
            later = set(names) & set(order[number:])
            assert not later, f"{file}.py imports {later}, which stands behind it"


def anchor(heading):
    """What GitHub makes of a heading: lower case, spaces as -, signs away."""
    words = re.sub(r"[`*]|\[([^]]*)\]\([^)]*\)", r"\1", heading.strip().lower())
    return re.sub(r"[^\w\- ]", "", words).replace(" ", "-")


def anchors(text):
    found, outside = set(), re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    for heading in re.findall(r"^#+ (.*)$", outside, re.M):
        name, number = anchor(heading), 0
        while (name if not number else f"{name}-{number}") in found:
            number += 1
        found.add(name if not number else f"{name}-{number}")
    return found


def test_anchors_are_spelled_as_github_does():
    assert anchors("# A `b.py`: c, d!\n## A b\n## A b\n```\n# no\n```\n## 术语表\n") == {"a-bpy-c-d", "a-b", "a-b-1", "术语表"}


@pytest.mark.parametrize("name", TEXTS)
def test_links_lead_somewhere(name):
    for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`\n]*`", "", read(name))):
        if re.match(r"https?://", target):
            continue
        file, _, place = target.partition("#")
        assert not file or (ROOT / file).exists(), f"{name}: no file {target}"
        assert not place or place in anchors(read(file or name)), f"{name}: no heading for {target}"


def test_files_that_the_texts_name_are_there():
    """In `code`, and in the course's comments for its exercises."""
    for name in TEXTS[:3]:
        named = set(re.findall(r"`(?:tests/)?(\w+\.py)", read(name)))
        for comment in re.findall(r"<!-- exercises: (.*?) -->", read(name)):
            named |= set(comment.split())
        missing = {file for file in named if not (ROOT / file).exists() and not (ROOT / "tests" / file).exists()}
        assert missing <= {"convert_hf_to_gguf.py"}, f"{name}: {missing}"


def test_the_course_has_each_exercise_once():
    named = [name for line in read("COURSE.md").splitlines() if line.startswith("* **Exercises**")
             for name in re.findall("`([^`]+)`", line)]
    assert sorted(named) == sorted(exercise.name for exercise in EXERCISES)


def test_the_course_reads_the_files_of_a_weeks_exercises():
    files = {exercise.name: exercise.file for exercise in EXERCISES}
    for week in read("COURSE.md").split("\n## ")[1:-1]:  # the last has no exercises of its own
        [reading], [named] = (re.findall(rf"^\* \*\*{word}\*\* (.*)$", week, re.M) for word in ("Read", "Exercises"))
        for name in re.findall("`([^`]+)`", named):
            assert f"`{files[name]}`" in reading, f"{week.splitlines()[0]}: {name} is of a file that is not read"


def test_the_readmes_state_the_same_measurements():
    found = [set(re.findall(r"\d[\d.,]* ± [\d.]*\d", text)) for text in (README, CHINESE)]
    assert found[0] == found[1]
    assert len(found[0]) > 10


def test_measurements_of_the_readme_stand_in_the_log():
    missing = set(re.findall(r"\d[\d.,]* ± [\d.]*\d", README)) - set(re.findall(r"\d[\d.,]* ± [\d.]*\d", read("LOG.md")))
    assert not missing, f"without a table, or a command, behind them: {missing}"


def test_no_path_of_anybodys_machine_is_in_the_texts():
    for name in TEXTS:
        assert not re.findall(r"(?:^|[\s`(\"'=])/(?:tmp|home|root|work|Users|mnt)/", read(name), re.M), name


# ---- running ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_reduced_commands_of_the_readme_run(tmp_path, monkeypatch):
    """Text, training, samples, costs; those of all stages: python tests/readme_commands.py, minutes."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    only = ("data.py", "funnel.py", "bpe.py", "train.py", "sample.py", "model.py", "arithmetic.py")
    failed = run_all(tmp_path, small=True, only=only, timeout=150)
    assert not failed, "\n\n".join(failed)
