"""The exercises: blanking, the folder my/, verdicts in words; slow: that every classic mistake is found."""
import ast
import json
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import exercise as course
import grading
from config import UserError
from exercises import EXERCISES
from support import in_process, is_alive, wait_until
from wrong_answers import RIGHT, WRONG

ROOT = Path(course.__file__).parent
ALL = {one.name: one for one in EXERCISES}


def original_of(one) -> bytes:
    return (ROOT / one.file).read_bytes()


# --- The table ----------------------------------------------------------------------------------------------


def test_names_are_unique_and_each_exercise_has_hints():
    assert len(ALL) == len(EXERCISES)
    for one in EXERCISES:
        assert re.fullmatch("[a-z0-9-]+", one.name) and 5 <= one.minutes <= 90 and one.learns, one.name
        assert 2 <= len(one.hints) <= 4 and all(one.hints) and all(one.tests.values()), one.name
        assert 1 <= len(one.tests) <= 6, one.name


def test_the_order_is_that_of_the_readme():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    files = re.findall(r"^\| `(\w+\.py)` \| \d+ \|", readme, re.MULTILINE)
    order = [files.index(one.file) for one in EXERCISES]
    assert order == sorted(order), "an exercise stands before one whose file is read earlier"


def test_every_test_of_the_table_exists_and_is_one_of_the_quick_ones():
    for one in EXERCISES:
        for test in one.tests:
            file, _, name = test.partition("::")
            body = ast.parse((ROOT / "tests" / file).read_bytes()).body
            [found] = [node for node in body if getattr(node, "name", None) == name] or [None]
            assert found, f"{one.name}: there is no {test}"
            assert not any("slow" in ast.unparse(line) for line in found.decorator_list), f"{test} is slow"


def test_each_exercise_has_three_wrong_answers_and_every_second_a_right_one():
    assert set(WRONG) == set(ALL) and set(RIGHT) <= set(ALL)
    assert all(len(wrong) >= 3 for wrong in WRONG.values())
    assert 2 * len(RIGHT) >= len(ALL)


# --- Blanking -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("one", EXERCISES, ids=lambda one: one.name)
@pytest.mark.parametrize("line_end", [b"\n", b"\r\n"], ids=["unix", "windows"])
def test_blanking_takes_the_body_and_leaves_all_else_byte_for_byte(one, line_end):
    source = original_of(one).replace(b"\r\n", b"\n").replace(b"\n", line_end)
    bare = grading.blank(source, one.function, one.name)
    compile(bare, one.file, "exec")
    place, left = grading.find(source, one.function), grading.find(bare, one.function)
    lines, bare_lines = source.splitlines(keepends=True), bare.splitlines(keepends=True)
    assert lines[:place.first] == bare_lines[:left.first] and lines[place.last:] == bare_lines[left.last:]
    kept = bare_lines[left.first:left.last - 1]
    assert kept == lines[place.first:place.first + len(kept)], "signature or docstring changed"
    assert ast.get_docstring(left.node) == ast.get_docstring(place.node)
    assert grading.is_blank(left.node, one.name) and not grading.is_blank(place.node, one.name)
    restored, numbers = grading.with_functions(bare, source, [one.function])
    assert restored == source and numbers[-1] == len(bare_lines)
    assert 0 <= place.last - left.last <= 40, "a function of 40 lines is enough for an exercise"


ODD = '''# -*- coding: utf-8 -*-
class Ä:
\t@staticmethod
\tdef ü(x, *, y="é"):  # 春
\t\t"""Says 春眠.\r
\t\tTwo lines."""  # why
\t\t# a comment that would tell
\t\treturn [
\t\t\tx, "ñ"]  # Eq. 7

def one(x): return x
async def last():
    @property
    def inner(): pass
    return inner'''


@pytest.mark.parametrize("function", ["Ä.ü", "one", "last"])
def test_blanking_is_safe_for_tabs_other_letters_and_odd_layouts(function):
    source = ODD.encode()
    bare = grading.blank(source, function, "odd")
    place, left = grading.find(source, function), grading.find(bare, function)
    assert bare.splitlines()[:left.first] == source.splitlines()[:place.first]
    assert bare.splitlines()[left.last:] == source.splitlines()[place.last:]
    assert grading.is_blank(left.node, "odd") and b"Eq. 7" not in bare[:-1] or function != "Ä.ü"
    assert ast.get_docstring(left.node) == ast.get_docstring(place.node)
    assert grading.with_functions(bare, source, [function])[0].rstrip(b"\n") == source


# --- The commands, on a product of one function -------------------------------------------------------------


TOY = '''"""A toy."""
import math


def helper(x):
    return x


def double(x):
    """Twice x."""
    y = x + x
    return y


def triple(x):
    """Thrice x."""
    return 3 * x
'''
TESTS = '''
import pytest
import toy


def test_two_becomes_four():
    assert toy.double(2) == 4, "is it the square?"


@pytest.mark.parametrize("x", [3, 0])
def test_others(x):
    assert toy.double(x) == 2 * x


def test_triple_is_used():
    assert toy.triple(1) == 3
'''


@pytest.fixture
def toy(tmp_path, monkeypatch, capsys):
    """Calls a command in a product of one file: (exit code, output and errors)."""
    Exercise = type(EXERCISES[0])
    make = {name: Exercise(name, "toy.py", name, "twice", 5, "easy", tests, ("think", "x + x"))
            for name, tests in [("double", {"test_toy.py::test_two_becomes_four": "hint one",
                                            "test_toy.py::test_others": "hint two",
                                            "test_toy.py::test_triple_is_used": "hint three"}),
                                ("triple", {"test_toy.py::test_triple_is_used": "hint four"})]}
    for name, content in [("toy.py", TOY), ("config.py", ""), ("tests/test_toy.py", TESTS),
                          ("tests/conftest.py", (ROOT / "tests" / "conftest.py").read_text("utf-8"))]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content, encoding="utf-8")
    monkeypatch.setattr(course, "ROOT", tmp_path)
    monkeypatch.setattr(course, "MY", tmp_path / "my")
    monkeypatch.setattr(course, "read_table", lambda: make)

    def call(*words):
        code, said, errors = in_process(monkeypatch, capsys, course.main, *words)
        assert "Traceback" not in said + errors or "--traceback" in words
        assert not errors or (code == 2 and errors.count("\n") == 1), "errors are one line"
        return code, said + errors
    return call


def answer(tmp_path, body, name="double"):
    """Write a body into the function in my/, as a learner does."""
    path = tmp_path / "my" / "toy.py"
    bare = grading.blank(path.read_bytes(), name, name).decode()
    line = f'    raise NotImplementedError("exercise {name}: write this function")\n'
    assert line in bare
    written = textwrap.indent(textwrap.dedent(body), "    ") + "\n"
    path.write_text(bare.replace(line, written), encoding="utf-8")


def test_from_the_list_to_the_first_pass(toy, tmp_path):
    code, said = toy()
    assert code == 0 and "double" in said and "begin with: python exercise.py start double" in said
    code, said = toy("start", "double")
    assert code == 0 and "my/toy.py, line 11" in said and "grade double" in said
    assert (tmp_path / "toy.py").read_text("utf-8") == TOY, "the original was touched"
    code, said = toy("grade", "double")
    assert code == 1 and "still to be written" in said and "line 11" in said
    answer(tmp_path, "return x * x")
    code, said = toy("grade", "double")
    assert code == 1 and "2 of its 3 tests pass" in said
    assert "others (test_toy.py)" in said and "hint two" in said
    answer(tmp_path, "return 2 * x")
    code, said = toy("grade", "double")
    assert code == 0 and "passed" in said and "next: python exercise.py start triple" in said
    code, said = toy("progress")
    assert re.search(r"toy\.py +1 of 2 +passed, 0 started  \[#\.\]", said)
    assert "passed" in toy("list")[1]
    assert "reset" not in toy("start", "triple")[1]
    assert "-" in toy("progress")[1].splitlines()[-2]


def test_an_answer_that_is_there_is_not_lost(toy, tmp_path):
    toy("start", "double")
    answer(tmp_path, "return 7")
    code, said = toy("start", "double")
    assert code == 2 and "work of yours" in said and "--overwrite" in said
    assert "return 7" in (tmp_path / "my" / "toy.py").read_text("utf-8")
    code, said = toy("start", "double", "--overwrite")
    assert code == 0 and "my/toy.py.backup-1" in said
    assert "return 7" in (tmp_path / "my" / "toy.py.backup-1").read_text("utf-8")
    answer(tmp_path, "return 8")
    code, said = toy("reset", "double")
    assert code == 0 and "my/toy.py.backup-2" in said
    assert (tmp_path / "my" / "toy.py").read_text("utf-8") == TOY
    assert toy("grade", "double")[0] == 2 and "not started" in toy("grade", "double")[1]


def test_a_file_without_the_function_or_with_half_a_line_is_refused_and_can_be_reset(toy, tmp_path):
    toy("start", "double")
    path = tmp_path / "my" / "toy.py"
    for content, words in [(TOY.replace("def double", "def twice"), "must keep its name"),
                           (TOY.replace("y = x + x", "y = (x +"), "SyntaxError in line 1"),
                           (TOY.replace("double(x)", "double(x, y)"), "(x, y) instead of (x)"),
                           (TOY.replace("double(x)", "double(x=1)"), "(x=1) instead of (x)"),
                           ("\0" + TOY, "no Python"), ("", "must keep its name")]:
        path.write_text(content, encoding="utf-8")
        code, said = toy("grade", "double")
        assert code == 1 and words in said, said
    assert toy("start", "double")[0] == 2
    assert toy("reset", "double")[0] == 0 and path.read_text("utf-8") == TOY


@pytest.mark.parametrize(("body", "words"), [
    ("return [1][x]", "my/toy.py, line 11, raised IndexError: list index out of range\n      return [1][x]"),
    ("return math.sqrt(-x)", "line 11, raised ValueError"),
    ("return helper(None) + x", "line 11, raised TypeError"),
    ("return None", "is it the square?"),
    ("raise SystemExit(0)", "line 11, raised SystemExit"),
    ("raise KeyboardInterrupt", "was not run"),
    ("import os\nos._exit(0)", "It ended Python"),
    ("import nothing_of_that_name", "line 11, raised ModuleNotFoundError"),
    ("import pytest\npytest.skip('no')", "skipped, which is no pass"),
    ("assert x > 9, 'too small'", "line 11, raised AssertionError: too small"),
])
def test_what_an_answer_does_is_said_in_words_with_its_line(toy, tmp_path, body, words):
    toy("start", "double")
    answer(tmp_path, body)
    code, said = toy("grade", "double")
    assert code == 1 and words in said, said
    assert "hint one" in said or "ended Python" in said


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such signals")
def test_an_answer_that_kills_python_is_told_by_the_signal(toy, tmp_path):
    toy("start", "double")
    answer(tmp_path, "import os\nos.kill(os.getpid(), 9)")
    assert "SIGKILL" in toy("grade", "double")[1]


def test_a_loop_is_stopped_with_all_that_it_started(toy, tmp_path):
    toy("start", "double")
    answer(tmp_path, f"""
        import subprocess, sys
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        open({str(tmp_path / "pid")!r}, "w").write(str(child.pid))
        while True:
            pass""")
    code, said = toy("grade", "double", "--seconds", "2")
    assert code == 1 and "stopped after 2 seconds: is there a loop" in said, said
    assert "while True:" in said or "pass" in said
    if os.name != "nt":
        child = (tmp_path / "pid").read_text()
        assert wait_until(lambda: not is_alive(child)), "the answer's child lives on"


@pytest.mark.parametrize("variable", ["CI", "BUILD_NUMBER"])
def test_a_long_list_that_is_wrong_is_judged_at_once_where_pytest_writes_whole_differences(
        toy, tmp_path, monkeypatch, variable):
    # Like one another and none the same, so that difflib compares each with each, for minutes.
    numbers = "[10_000 + 2 * (i ** 3 % 9973) for i in range(400)]"
    (tmp_path / "tests" / "test_toy.py").write_text(TESTS.replace(
        "toy.double(2) == 4", f"toy.double({numbers}) == 2 * {numbers}"), encoding="utf-8")
    monkeypatch.setenv(variable, "true")
    toy("start", "double")
    answer(tmp_path, "return [y + 1 for y in x + x]")
    code, said = toy("grade", "double", "--seconds", "20")
    assert code == 1 and "is it the square?" in said and "hint one" in said, said


def test_the_traceback_is_there_for_those_who_want_it_without_pytests_own(toy, tmp_path):
    toy("start", "double")
    answer(tmp_path, "return [1][x]")
    said = toy("grade", "double", "--traceback")[1]
    assert 'File "my/toy.py", line 11, in double' in said and "pluggy" not in said


def test_another_exercise_that_is_begun_or_wrong_does_not_fail_this_one(toy, tmp_path):
    toy("start", "double")
    toy("start", "triple")
    answer(tmp_path, "return helper(x) + x")
    assert toy("grade", "double")[0] == 0, "triple, which has no body, failed it"
    answer(tmp_path, "return 4 * x", "triple")
    assert toy("grade", "double")[0] == 0
    code, said = toy("grade", "triple")
    assert code == 1 and "hint four" in said


def test_line_numbers_are_those_of_the_learners_file(toy, tmp_path):
    toy("start", "double")  # grading puts its body back, which is longer
    toy("start", "triple")
    answer(tmp_path, "return [1][7]", "triple")
    line = (tmp_path / "my" / "toy.py").read_text("utf-8").splitlines().index("    return [1][7]") + 1
    assert f"my/toy.py, line {line}, raised IndexError" in toy("grade", "triple")[1]


@pytest.mark.parametrize("indent", ["\t", "  "], ids=["tabs", "two spaces"])
def test_a_class_that_an_editor_has_indented_anew_is_told_of(indent):
    original = "class A:\n    def f(self):\n        return 1\n\n    def g(self):\n        return 2\n"
    f, g = (type(EXERCISES[0])(name, "toy.py", f"A.{name}", "", 5, "easy", {}, ()) for name in "fg")
    mine = original.replace("    ", indent).encode()
    for one in (f, g):
        assert "four spaces" in grading.prepare(one, {"f": f, "g": g}, mine, original.encode()).problem
    assert grading.prepare(f, {"f": f}, mine, original.encode()).problem is None, "it is Python all the same"


def test_helpers_and_imports_of_the_learners_own_are_welcome(toy, tmp_path):
    toy("start", "double")
    answer(tmp_path, "return mine(x) + int(random.random() / 2)")
    path = tmp_path / "my" / "toy.py"
    path.write_text("import random\r\n" + path.read_text("utf-8")
                    + "\r\ndef mine(x: int):\r\n    return x * 2\r\n",
                    encoding="utf-8")
    assert toy("grade", "double")[0] == 0


def test_hints_come_one_after_the_other_and_the_solution_is_a_diff(toy, tmp_path):
    assert toy("hint", "double")[0] == 2
    toy("start", "double")
    assert [toy("hint", "double")[1].splitlines()[0] for _ in range(3)] == [
        "hint 1 of 2: think", "hint 2 of 2: x + x", "hint 2 of 2: x + x"]
    said = toy("solution", "double")[1]
    assert "--- my/toy.py" in said and "+    y = x + x" in said and "-    raise NotImplemented" in said
    toy("reset", "double")
    assert "is the original" in toy("solution", "double")[1]


def test_what_was_not_touched_follows_the_product(toy, tmp_path):
    toy("start", "double")
    for name in ("toy.py", "tests/test_toy.py"):
        (tmp_path / name).write_text((tmp_path / name).read_text("utf-8") + "# new\n", encoding="utf-8")
    toy("start", "triple")
    assert "# new" in (tmp_path / "my" / "tests" / "test_toy.py").read_text("utf-8")
    assert "# new" not in (tmp_path / "my" / "toy.py").read_text("utf-8"), "what was worked in was replaced"
    assert "has changed since your copy" in toy("grade", "double")[1]


def test_misuse_is_one_line(toy, tmp_path):
    for words, said in [(("grade", "duble"), "did you mean double?"), (("start",), "which exercise?"),
                        (("grade", "--seconds", "3"), "which exercise?"), (("gade", "double"), "grade"),
                        (("list", "all"), "unexpected word"),
                          (("hint", "double", "--all"), "unexpected word"),
                        (("grade", "double"), "not started"), (("solution", "double"), "not started"),
                        (("reset", "double"), "not started")]:
        code, message = toy(*words)
        assert code == 2 and said in message, (words, message)
    assert not (tmp_path / "my").exists()


def test_a_damaged_record_is_one_line_with_the_remedy_which_works(toy, tmp_path):
    toy("start", "double")
    answer(tmp_path, "return 2 * x")
    for content in ("{", "[]", '{"files": {}, "exercises": {"double": {"passed": "yes"}}}', '{"files": 1}',
                    '{"files": {}, "exercises": {"double": {"hints": NaN}}}',
                    '{"files": {}, "exercises": {"double": {"hints": -3}}}'):
        (tmp_path / "my" / course.STATE).write_text(content, encoding="utf-8")
        code, said = toy("progress")
        assert code == 2 and "damaged; delete it" in said, content
    (tmp_path / "my" / course.STATE).unlink()
    assert toy("grade", "double")[0] == 0, "what was begun need not be recorded"


def test_a_folder_of_that_name_which_is_the_users_own_is_left_alone(toy, tmp_path):
    (tmp_path / "my").mkdir()
    code, said = toy("start", "double")
    assert code == 2 and "move it away" in said and not list((tmp_path / "my").iterdir())


@pytest.mark.parametrize(("package", "words"), [("pytest", "pytest is not installed"),
                                                ("transformers", "the package transformers")])
def test_a_missing_package_is_one_line_with_what_to_install(toy, tmp_path, monkeypatch, package, words):
    if package == "pytest":
        monkeypatch.setattr(grading, "pytest_words", lambda *_: [])
        monkeypatch.setattr(grading.subprocess, "Popen", without_pytest(subprocess.Popen))
    else:
        path = tmp_path / "tests" / "test_toy.py"
        path.write_text("import transformers.nothing_of_that_name\n" + TESTS, encoding="utf-8")
    toy("start", "double")
    answer(tmp_path, "return 2 * x")
    code, said = toy("grade", "double")
    assert code == 2 and words in said and "pip install -r requirements-dev.txt" in said, said


def without_pytest(Popen):
    """A Popen in whose Python there is no pytest."""
    return lambda command, **more: Popen([command[0], "-S", *command[1:]], **more)


# --- Every classic mistake is found, and every right answer passes ------------------------------------------


# A Python that has imported what tests import, but no file of ours; each answer is graded in a fork of it.
# Its time is the processor's: a loop uses it up, a machine that stands still (a slow disk, say) does not.
SERVER = """
import json, os, resource, signal, sys, time
import pytest, torch, numpy, hypothesis, tokenizers, transformers, datasketch
import _pytest.junitxml
from transformers import LlamaForCausalLM, MistralForCausalLM, Qwen3ForCausalLM
for line in sys.stdin:
    folder, words, seconds = json.loads(line)
    child = os.fork()
    if not child:
        os.setsid()
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
        os.chdir(folder)
        place = os.open("output", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(place, 1)
        os.dup2(place, 2)
        sys.path[0] = folder
        os._exit(pytest.main(words))
    end, code = time.monotonic() + 5 * seconds, None  # for what waits for ever
    while code is None and time.monotonic() < end:
        ended, status = os.waitpid(child, os.WNOHANG)
        code = os.waitstatus_to_exitcode(status) if ended else time.sleep(0.01)
    try:
        os.killpg(child, signal.SIGKILL)
    except ProcessLookupError:
        pass
    if code is None:
        os.waitpid(child, 0)
    print(json.dumps(None if code == -signal.SIGXCPU else code), flush=True)
"""
LIMIT = 60  # seconds an answer may take: as many as exercise.py grade gives it


@pytest.fixture(scope="module")
def verdict(tmp_path_factory):
    """Gives the Verdict on a learner's file for an exercise, as exercise.py grade does, but in less time."""
    folder, count = tmp_path_factory.mktemp("product").resolve(), 0
    course.copy_product(folder)
    environment = grading.environment_of_tests()
    del environment["PYTHONDONTWRITEBYTECODE"]  # the files of tests are read some 400 times
    server = subprocess.Popen([sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                              text=True, env=environment) if hasattr(os, "fork") else None

    def run(one):
        if server is None:
            return grading.run_tests(one, folder, LIMIT)
        asked = [str(folder), grading.pytest_words(one, LIMIT), LIMIT]
        print(json.dumps(asked), file=server.stdin, flush=True)
        return json.loads(server.stdout.readline())

    def judge(one, source):
        nonlocal count
        count += 1
        answer = grading.prepare(one, ALL, source, original_of(one))
        if answer.problem:
            return grading.Verdict(False, answer.problem)
        path = folder / one.file
        path.write_bytes(answer.content)
        os.utime(path, (count, count))  # or the bytecode of the last answer would do for one of equal length
        for name in ("report.xml", "output"):
            (folder / name).unlink(missing_ok=True)
        try:
            return grading.judge(one, answer, folder, run(one), LIMIT)
        finally:
            path.write_bytes(original_of(one))
    yield judge
    if server:
        server.stdin.close()
        server.wait(60)


def with_body(one, body) -> bytes:
    """The exercise's file with another body of the function."""
    bare = grading.blank(original_of(one), one.function, one.name)
    line = next(line for line in bare.splitlines(keepends=True) if b"NotImplementedError(\"exercise " in line)
    indent = line[:len(line) - len(line.lstrip())].decode()
    return bare.replace(line, textwrap.indent(textwrap.dedent(body).strip("\n") + "\n", indent).encode())


def with_change(one, change) -> bytes:
    source, place = original_of(one), grading.find(original_of(one), one.function)
    lines = source.splitlines(keepends=True)
    text = b"".join(lines[place.first:place.last]).decode()
    for piece, instead in change.items():
        assert text.count(piece) == 1, f"{one.name}: {piece!r} is {text.count(piece)} times in the original"
        text = text.replace(piece, instead)
    return b"".join([*lines[:place.first], text.encode(), *lines[place.last:]])


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL)
def test_every_classic_mistake_is_rejected_with_a_hint_that_names_it(verdict, name):
    one, problems = ALL[name], []
    for wrong in WRONG[name]:
        source = with_body(one, wrong.body) if wrong.body else with_change(one, wrong.change)
        found = verdict(one, source)
        hint = found.words.rpartition("\n")[2]  # of the table; what is above it says what was seen
        if found.passed or wrong.says not in hint.lower():
            problems.append(f"{wrong.mistake}: {wrong.says!r} is not in the hint: {found.words}\n"
                            f"{found.traceback}")
    assert not problems, "\n\n".join(problems)


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL)
def test_the_original_and_every_right_answer_pass(verdict, name):
    one = ALL[name]
    for source in [original_of(one), *(with_body(one, body) for body in RIGHT.get(name, ()))]:
        found = verdict(one, source)
        assert found.passed, f"{found.words}\n{found.traceback}"


def test_the_commands_table_is_that_of_the_tests():
    assert list(course.read_table()) == list(ALL)
    with pytest.raises(UserError, match="did you mean"):
        course.find_exercise(EXERCISES[0].name + "x", ALL)
