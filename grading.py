"""Grading: a learner's file among the product's other files, one function's tests, a verdict in words.

What stands in a file is found by its syntax tree and replaced as bytes, so that all else stays as it was.
pytest runs the tests in a process that is ended with all that it started. Its report is then put into words:
which test does not pass, where the answer broke, and the hint that tests/exercises.py has for that test.
exercise.py holds the commands.
"""
import ast
import itertools
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

from config import UserError

# ------------------------------------------------------------------------------------------------------------
# 1. A function in its file: where it stands, without its body, with another's


class Lines(NamedTuple):
    """A function in a source file."""
    node: ast.FunctionDef
    first: int  # its lines as a slice of the file's: [first:last], decorators included
    last: int


def find(source: bytes, function: str) -> Lines | None:
    """Where "name" or "Class.name" stands; None if it is not there. SyntaxError if that is no Python."""
    try:
        body = ast.parse(source).body
    except (ValueError, RecursionError, MemoryError) as error:  # a NUL; brackets a thousand deep
        raise SyntaxError(str(error) or "it is nested too deep") from None
    for name in function.split("."):
        found = [node for node in body if getattr(node, "name", None) == name]
        if not found:
            return None
        node = found[-1]  # of two the last counts, as Python has it
        body = getattr(node, "body", [])
    is_function = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    return Lines(node, first_line(node) - 1, node.end_lineno) if is_function else None


def first_line(node: ast.stmt) -> int:
    """The number of its first line; a decorator's, where it has one."""
    return min([node.lineno, *(other.lineno for other in getattr(node, "decorator_list", []))])


def blank(source: bytes, function: str, name: str) -> bytes:
    """The source in which a function's body is a line that says so; all else stays byte for byte.

    Decorators, signature and docstring stay. Works on bytes: so do ast's columns, and no line end changes.
    """
    node, lines = find(source, function).node, source.splitlines(keepends=True)
    has_docstring = ast.get_docstring(node, clean=False) is not None
    statement, last = node.body[has_docstring], node.body[-1]
    assert not has_docstring or node.body[0].end_lineno < first_line(statement), function
    row = first_line(statement) - 1
    before = lines[row][:statement.col_offset]  # the indent; all of `def f(x): ` too, if that is on the line
    start = node.body[0].end_lineno if has_docstring else row  # comments between the two would tell
    end = lines[last.end_lineno - 1]
    line_end = end[len(end.rstrip(b"\r\n")):]
    raised = f'raise NotImplementedError("exercise {name}: write this function")'.encode()
    return b"".join([*lines[:start], before + raised + line_end, *lines[last.end_lineno:]])


def is_blank(node: ast.FunctionDef, name: str) -> bool:
    last = ast.unparse(node.body[-1])
    has_docstring = ast.get_docstring(node, clean=False) is not None
    return len(node.body) == 1 + has_docstring and last.startswith(
        f"raise NotImplementedError('exercise {name}:")


def text_of(source: bytes, function: str) -> list[str]:
    """The function's lines without what an editor changes by itself: line ends and spaces before them."""
    place = find(source, function)
    lines = source.splitlines()[place.first:place.last] if place else []
    return [line.decode("utf-8", "replace").rstrip() for line in lines]


def with_functions(source: bytes, original: bytes, functions) -> tuple[bytes, list[int]]:
    """(the source in which some functions are the original's, for each of its lines the source's number)."""
    lines = list(enumerate(source.splitlines(keepends=True), 1))
    kept = original.splitlines(keepends=True)
    places = [(find(source, function), find(original, function)) for function in functions]
    for mine, theirs in sorted((pair for pair in places if all(pair)), key=lambda pair: -pair[0].first):
        number = mine.node.lineno
        end = b"" if kept[theirs.last - 1].endswith((b"\n", b"\r")) else b"\n"
        text = b"".join(kept[theirs.first:theirs.last]) + end
        lines[mine.first:mine.last] = [(number, line) for line in text.splitlines(keepends=True)]
    return b"".join(line for _, line in lines), [number for number, _ in lines]


# ------------------------------------------------------------------------------------------------------------
# 2. The answer, its tests, the verdict


class Verdict(NamedTuple):
    passed: bool
    words: str
    traceback: str = ""


class Result(NamedTuple):
    outcome: str  # passed, failed, skipped, missing
    message: str
    text: str = ""  # the traceback


class Answer(NamedTuple):
    """A learner's file as it is graded."""
    content: bytes
    numbers: list[int]  # of each of its lines, in the learner's file
    problem: str | None  # why it cannot be graded


def prepare(exercise, exercises: dict, source: bytes, original: bytes) -> Answer:
    """What to grade of a learner's file: with the other exercises' functions as they were."""
    here = f"my/{exercise.file}"
    try:
        place = find(source, exercise.function)
    except SyntaxError as error:
        line, lines = error.lineno or 1, source.splitlines()
        text = lines[line - 1].decode("utf-8", "replace").strip() if line <= len(lines) else ""
        return Answer(source, [], f"{here} is no Python, SyntaxError in line {line}: {error.msg}\n    {text}")
    if place is None:
        return Answer(source, [], f"{here} has no {exercise.function} any more; it must keep its name")
    if is_blank(place.node, exercise.name):
        return Answer(source, [], f"{exercise.function} is still to be written: NotImplementedError, {here}, "
                                  f"line {place.node.body[-1].lineno}")
    wanted, given = signature(find(original, exercise.function).node), signature(place.node)
    if wanted != given:
        return Answer(source, [], f"{exercise.function} in {here}, line {place.node.lineno}, takes other "
                                  f"parameters than it must: ({given}) instead of ({wanted})")
    others = [other.function for other in exercises.values()
              if other.file == exercise.file and other.function != exercise.function]
    content, numbers = with_functions(source, original, others)
    if not same_functions(content, source, [exercise.function, *others]):
        return Answer(source, [], f"{here} is indented otherwise than the original: four spaces, no tabs")
    return Answer(content, numbers, None)


def same_functions(content: bytes, source: bytes, functions) -> bool:
    """Whether both have the same of them; not, where methods with four spaces came into a class with tabs."""
    try:
        return all(find(content, name) for name in functions if find(source, name))
    except SyntaxError:
        return False


def signature(node: ast.FunctionDef) -> str:
    """Its parameters with their defaults; types may be what they like."""
    arguments = ast.parse(f"def f({ast.unparse(node.args)}): pass").body[0].args
    for one in ast.walk(arguments):
        if isinstance(one, ast.arg):
            one.annotation = None
    return ast.unparse(arguments)


def run_tests(exercise, folder: Path, seconds: float) -> int | None:
    """The exit code of the exercise's tests in that folder; None where they had to be stopped."""
    group = {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP} if os.name == "nt" else \
        {"start_new_session": True}
    with open(folder / "output", "wb") as output:
        process = subprocess.Popen([sys.executable, "-m", "pytest", *pytest_words(exercise, seconds)],
                                   cwd=folder, env=environment_of_tests(), stdin=subprocess.DEVNULL,
                                   stdout=output, stderr=output, **group)
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:
            stop(process)


def environment_of_tests() -> dict[str, str]:
    """The environment in which pytest runs, wherever the command is given.

    Without CI and BUILD_NUMBER: where one is set, pytest writes the whole difference of two lists that
    should be equal, and difflib's time is cubic: 36 seconds for a wrong answer of 400 numbers.
    """
    own = {name: value for name, value in os.environ.items()
           if not name.startswith("PYTEST_") and name not in ("CI", "BUILD_NUMBER")}
    return own | {"OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8", "PYTHONDONTWRITEBYTECODE": "1",
                  "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}  # others take seconds, or shuffle


def pytest_words(exercise, seconds: float) -> list[str]:
    """What pytest is asked; native: tracebacks as Python's own, which judge() reads."""
    return ["--junitxml=report.xml", "--tb=native", "-q", "-p", "no:cacheprovider", "-o", "addopts=",
            "-o", f"faulthandler_timeout={seconds / 2}", *(f"tests/{test}" for test in exercise.tests)]


def stop(process: subprocess.Popen):
    """End a process and all that it started."""
    if os.name == "nt":
        if process.poll() is None:
            subprocess.run(["taskkill", "/F", "/T", "/PID", str(process.pid)], capture_output=True)
    else:
        try:
            os.killpg(process.pid, signal.SIGKILL)  # its group, even if it has ended itself
        except (ProcessLookupError, PermissionError):
            pass
    process.wait()


def judge(exercise, answer: Answer, folder: Path, code: int | None, seconds: float) -> Verdict:
    """The verdict on an answer whose tests have run: from pytest's report, and what it printed.

    code: pytest's exit code, None where it was stopped after so many seconds.
    """
    path = folder / "output"
    output = as_in_my(path.read_text("utf-8", errors="replace"), exercise, answer, folder)
    if code is None:
        places = frames_in(output, exercise)  # the latest call first
        words = f"It was stopped after {seconds:g} seconds: is there a loop that never ends?"
        where = f"\n  it was in {in_words(places[0], answer)}" if places else ""
        return Verdict(False, words + where, output)
    try:
        results = read_report(folder / "report.xml", exercise, answer, folder)
    except (OSError, ElementTree.ParseError):
        return Verdict(False, without_report(code, output), output)
    outcomes = {test: results.get(test) or results.get(test.partition("::")[0]) or Result("missing", "")
                for test in exercise.tests}
    passed = sum(result.outcome == "passed" for result in outcomes.values())
    if passed == len(outcomes):
        return Verdict(True, f"All its {passed} tests pass.")
    test, result = next(item for item in outcomes.items() if item[1].outcome != "passed")
    return Verdict(False, f"{passed} of its {len(outcomes)} tests pass. The first that does not:\n"
                   f"  {sentence(test)} ({test.partition('::')[0]})\n  {why(exercise, answer, result)}\n"
                   f"  {exercise.tests[test]}", from_ours_on(result.text))


def from_ours_on(text: str) -> str:
    """A traceback without pytest's own calls, which come first."""
    ours = re.search(r'(?m)^ *File "(?![/\\\\]|\w:)', text)
    return "Traceback (most recent call last):\n" + text[ours.start():] if ours else text


def sentence(test: str) -> str:
    return test.partition("::")[2].removeprefix("test_").replace("_", " ")


def as_in_my(text: str, exercise, answer: Answer, folder: Path) -> str:
    """What Python said, with the file and the line numbers that the learner knows."""
    def renamed(match):
        line = min(int(match[3]), len(answer.numbers))
        return f"{match[1]}my/{exercise.file}{match[2]}{answer.numbers[line - 1] if line else match[3]}"
    file = re.escape(exercise.file)
    text = re.sub(rf'(File ")[^"\n]*{re.escape(folder.name)}[/\\]{file}(", line )(\d+)', renamed, text)
    text = re.sub(rf"(?m)^((?:[|E] +)?){file}(:)(\d+)(?=: )", renamed, text)  # pytest's, of an ImportError
    return re.sub(rf'(File ")[^"\n]*{re.escape(folder.name)}[/\\]', r"\1", text)


def read_report(path: Path, exercise, answer: Answer, folder: Path) -> dict[str, Result]:
    """{test as in the table: how it ended}; a test of several cases passes if all do.

    What broke a file of tests before any could run stands under the file's name.
    """
    results = {}
    for case in ElementTree.parse(path).iter("testcase"):
        name, module = case.get("name", ""), case.get("classname", "").rpartition(".")[2]
        key = f"{module}.py::{name.partition('[')[0]}" if module else f"{name.rpartition('.')[2]}.py"
        bad = [child for child in case if child.tag in ("failure", "error", "skipped")]
        result = Result("passed", "")
        if bad:
            outcome = "skipped" if bad[0].tag == "skipped" else "failed"
            result = Result(outcome, bad[0].get("message", ""),
                            as_in_my(bad[0].text or "", exercise, answer, folder))
        if results.get(key, Result("passed", "")).outcome == "passed":
            results[key] = result
    return results


def without_report(code: int, output: str) -> str:
    """Why pytest could not report; UserError where it is not the answer that kept it from that."""
    if re.search(r"No module named '?pytest", output):
        raise UserError("pytest is not installed, which grades: pip install -r requirements-dev.txt")
    if code < 0:
        name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
        return f"It ended Python with {name}: was memory written where there is none, or a process killed?"
    return f"It ended Python before the tests were through (exit code {code}): is there an os._exit?"


def why(exercise, answer: Answer, result: Result) -> str:
    """In words, why a test did not pass; UserError where a package is missing."""
    if result.outcome == "missing":
        return "it was not run, which is no pass: does the file end Python when it is read, with sys.exit?"
    if result.outcome == "skipped":
        return f"it was skipped, which is no pass: {shorter(result.message)}"
    last = result.text.rpartition("Traceback (most recent call last)")[2]  # of a chain the one that counts
    frames, own = frames_in(last), frames_in(last, exercise)
    message = error_of(result)
    missing = re.match(r"ModuleNotFoundError: No module named '([\w.]+)'", message)
    if missing and not own:
        raise UserError(f"the tests need the package {missing[1]}: pip install -r requirements-dev.txt")
    said = shorter(message.removeprefix("AssertionError: ").removeprefix("Failed: "))
    if message.startswith(("AssertionError", "Failed:", "assert ")) and not (own and own[-1] == frames[-1]):
        return f"the test says: {said}"
    if own and own[-1] == frames[-1]:
        return in_words(own[-1], answer, f"raised {shorter(message)}")
    if own:
        return in_words(own[-1], answer, f"called what raised {shorter(message)}")
    return f"what uses it failed{in_frame(frames)}: {said}"


def in_frame(frames) -> str:
    return f" in {frames[-1][0]}, line {frames[-1][1]}" if frames else ""


def error_of(result: Result) -> str:
    """Name and message of the exception: pytest has it as `message`, but for one at import."""
    lines = [line[1:].strip() for line in result.text.splitlines() if line.startswith("E  ")]
    return lines[-1] if lines and "collection" in result.message else result.message \
        if "collection" not in result.message else (result.text.strip().splitlines() or [""])[-1]


def shorter(message: str) -> str:
    """The words of an error: without pytest's repetition of the assertion, where there are words."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    words = [line for line in itertools.takewhile(lambda line: not line.startswith("assert "), lines)]
    text = "; ".join(words[:4] or lines[:1])
    return text if len(text) <= 400 else text[:400] + " …"


def frames_in(text: str, exercise=None) -> list[tuple[str, int]]:
    """(file, line) of the calls in a traceback, of the product's files alone; of the exercise's, if given."""
    found = re.findall(r'(?m)File "([^"\n]+)", line (\d+)|^(?:[|E] +)?([\w/\\.]+\.py):(\d+): ', text)
    places = [(file or other, int(line or number)) for file, line, other, number in found]
    return [(file.replace("\\", "/"), line) for file, line in places if not Path(file).is_absolute()
            and (exercise is None or file == f"my/{exercise.file}")]


def in_words(place: tuple[str, int], answer: Answer, what: str = "") -> str:
    """A line of the learner's file, and what happened there."""
    line = place[1]
    lines = dict(zip(reversed(answer.numbers), reversed(answer.content.splitlines())))
    text = lines.get(line, b"").decode("utf-8", "replace").strip()
    return f"{place[0]}, line {line}{', ' * bool(what)}{what}\n      {text}"
