"""Exercises: a function of plainLLM loses its body, you write it again, and the product's own tests grade it.

    python exercise.py                      # all exercises, in the order of the lesson, and what to do first
    python exercise.py start merge          # my/bpe.py is a copy of bpe.py in which merge() has no body
    python exercise.py grade merge          # runs that function's tests; says in words what is wrong
    python exercise.py hint merge           # the next hint, from vague to nearly the answer
    python exercise.py solution merge       # your function beside the original, as a diff
    python exercise.py reset merge          # the original again; yours is kept beside it
    python exercise.py progress             # passed, started and all, by file

You work in the folder my/, a copy of the product with its tests, so nothing of the original can be lost. What
is graded is your whole file among the product's other files: helper functions and imports of your own are
welcome, as long as the function keeps its name and its parameters. The tests and their hints stand in
tests/exercises.py. The tests need what `pip install -r requirements-dev.txt` installs.

Your answer runs as a program of your own, with all that it may do: grade nobody else's without a sandbox, and
take no pass for a proof, as an answer can call the original.
"""
import ast
import difflib
import hashlib
import importlib.util
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

from config import UserError, open_whole, parse, require, run

HERE = Path(__file__).resolve().parent
STATE = ".exercise.json"
ROOT = HERE.parent if (HERE / STATE).is_file() else HERE  # also where the copy in my/ is asked
MY = ROOT / "my"


@dataclass
class Start:
    overwrite: bool = False  # begin anew where work would be lost; it is kept beside the file


@dataclass
class Grade:
    seconds: float = 60  # after so many, an answer that does not end is stopped
    traceback: bool = False  # show Python's own words for the first test that fails

    def __post_init__(self):
        require(self, seconds=(1, 3600))


def main():
    command, *words = sys.argv[1:] or ["list"]
    if command in ("-h", "--help", "help"):
        return print(__doc__)
    exercises = read_table()
    alone = {"list": show_list, "progress": show_progress}
    named = {"start": (start, Start), "grade": (grade, Grade), "hint": (hint, None),
             "solution": (solution, None), "reset": (reset, None)}
    if command not in alone | named:
        raise UserError(f"there is no command {command!r}; {nearest(command, [*alone, *named])}")
    if command in named and (not words or words[0].startswith("-")):
        raise UserError(f"which exercise? python exercise.py {command} NAME; python exercise.py list has the "
                        f"names")
    rest = words[command in named:]
    if rest and (command in alone or named[command][1] is None):
        raise UserError(f"unexpected word {rest[0]!r} after python exercise.py {command}")
    if command in alone:
        return alone[command](exercises)
    function, Settings = named[command]
    exercise = find_exercise(words[0], exercises)
    function(exercise, exercises, *([parse(Settings, rest)] if Settings else []))


def read_table() -> dict:
    """{name: Exercise} of tests/exercises.py, in its order, which is the lesson's."""
    path = ROOT / "tests" / "exercises.py"
    if not path.is_file():
        raise UserError(f"there is no {path}; exercise.py needs the folder tests/ beside it")
    spec = importlib.util.spec_from_file_location("exercises", path)
    sys.modules["exercises"] = module = importlib.util.module_from_spec(spec)  # dataclass looks there
    sys.path.insert(0, str(path.parent))
    spec.loader.exec_module(module)
    sys.path.remove(str(path.parent))
    return {exercise.name: exercise for exercise in module.EXERCISES}


def find_exercise(name: str, exercises: dict):
    if name not in exercises:
        raise UserError(f"there is no exercise {name!r}; {nearest(name, exercises)}")
    return exercises[name]


def nearest(name: str, names) -> str:
    close = difflib.get_close_matches(name.lower(), names, n=3, cutoff=0.4)
    return f"did you mean {' or '.join(close)}?" if close else "python exercise.py list has the names"


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
# 2. The folder my/, and what was done there


def product_files() -> list[str]:
    """The names of all that my/ is a copy of."""
    tests = [path for path in (ROOT / "tests").rglob("*")
             if path.is_file() and "__pycache__" not in path.parts and path.suffix != ".pyc"]
    settings = [path for path in [ROOT / "pytest.ini"] if path.is_file()]
    return [path.relative_to(ROOT).as_posix() for path in sorted([*ROOT.glob("*.py"), *settings, *tests])]


def copy_product(folder: Path) -> dict[str, str]:
    """{name: checksum} of the product's files, which are copied into the folder."""
    sums = {}
    for name in product_files():
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        content = (ROOT / name).read_bytes()
        target.write_bytes(content)
        sums[name] = checksum(content)
    return sums


def checksum(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def open_my() -> dict:
    """What is recorded of my/; the folder is made if missing, what was not touched there is renewed."""
    if not MY.exists():
        whole = MY.with_name("my.tmp")
        shutil.rmtree(whole, ignore_errors=True)  # a copy that was stopped in the middle
        state = {"files": copy_product(whole), "exercises": {}}
        whole.rename(MY)
        write_state(state)
        return state
    if not (MY / "config.py").is_file():
        raise UserError(f"{MY} is there, and is no copy of the product; move it away")
    state = read_state()
    for name in product_files():
        content, mine = (ROOT / name).read_bytes(), MY / name
        now = checksum(mine.read_bytes()) if mine.is_file() else None
        if now in (None, state["files"].get(name)) and now != checksum(content):
            mine.parent.mkdir(parents=True, exist_ok=True)
            with open_whole(mine) as file:
                file.write(content)
            now = checksum(content)
        if now == checksum(content):
            state["files"][name] = now
    write_state(state)
    return state


def read_state() -> dict:
    """{"files": {name: checksum when copied}, "exercises": {name: started, passed, minutes, hints}}."""
    path = MY / STATE
    if not path.is_file():
        return {"files": {}, "exercises": {}}
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        numbers = [value for entry in state["exercises"].values() for value in entry.values()]
        in_bounds = all(type(value) in (int, float) and 0 <= value < 1e12 for value in numbers)  # not nan
        if not in_bounds or not isinstance(state["files"], dict):
            raise ValueError
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise UserError(f"{path} is damaged; delete it: your files stay, what was passed is to be graded "
                        f"again") from None
    return state


def write_state(state: dict):
    with open_whole(MY / STATE, "w") as file:
        json.dump(state, file, indent=1)


def record(exercise, **values) -> dict:
    """What is recorded of an exercise, after these values were written into it; None takes one out."""
    state = read_state()
    entry = state["exercises"].setdefault(exercise.name, {})
    entry |= values
    state["exercises"][exercise.name] = {name: value for name, value in entry.items() if value is not None}
    write_state(state)
    return state["exercises"][exercise.name]


def read_mine(exercise) -> tuple[bytes, bytes]:
    """(the learner's file, the original); UserError where the exercise was not started."""
    mine, original = MY / exercise.file, (ROOT / exercise.file).read_bytes()
    if not mine.is_file():
        raise UserError(f"{exercise.name} is not started: python exercise.py start {exercise.name}")
    return mine.read_bytes(), original


def keep(path: Path) -> str:
    """The name of a copy of the file, made beside it."""
    number = 1
    while (backup := path.with_name(f"{path.name}.backup-{number}")).exists():
        number += 1
    shutil.copyfile(path, backup)
    return shown(backup)


def shown(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


# ------------------------------------------------------------------------------------------------------------
# 3. The commands but for grading


def start(exercise, exercises: dict, settings: Start):
    """Take the body out of the function in my/, and say where to write it."""
    state, path = open_my(), MY / exercise.file
    source, original = read_mine(exercise)
    try:
        place = find(source, exercise.function)
        problem = None if place else f"{shown(path)} has no {exercise.function}"
    except SyntaxError as error:
        place, problem = None, f"{shown(path)} is no Python in line {error.lineno or 1} ({error.msg})"
    if place and not is_blank(place.node, exercise.name) and \
            text_of(source, exercise.function) != text_of(original, exercise.function):
        problem = f"{exercise.function} in {shown(path)} is work of yours already"
    if problem and not settings.overwrite:
        raise UserError(f"{problem}; go on there, or begin anew with: python exercise.py start "
                        f"{exercise.name} --overwrite")
    if problem:
        print(f"kept as it was: {keep(path)}")
        source = with_functions(source, original, [exercise.function])[0] if place else original
        place = find(source, exercise.function)
    if not is_blank(place.node, exercise.name):
        with open_whole(path) as file:
            file.write(blank(source, exercise.function, exercise.name))
        record(exercise, started=time.time())
    elif "started" not in state["exercises"].get(exercise.name, {}):
        record(exercise, started=time.time())
    line = find(path.read_bytes(), exercise.function).node
    print(f"{exercise.name} ({exercise.level}, some {exercise.minutes} minutes): {exercise.learns}\n"
          f"write     {exercise.function} in {shown(path)}, line {line.body[-1].lineno}; its docstring says "
          f"what it returns\n"
          f"read      the lines around it, and the tests: {', '.join(test_files(exercise))}\n"
          f"then      python exercise.py grade {exercise.name}\n"
          f"or        python exercise.py hint {exercise.name}")


def test_files(exercise) -> list[str]:
    return sorted({f"tests/{test.partition('::')[0]}" for test in exercise.tests})


def hint(exercise, exercises: dict):
    read_mine(exercise)
    told = read_state()["exercises"].get(exercise.name, {}).get("hints", 0)
    number = min(int(told), len(exercise.hints) - 1)
    print(f"hint {number + 1} of {len(exercise.hints)}: {exercise.hints[number]}")
    if number == len(exercise.hints) - 1:
        print(f"that is the last; python exercise.py solution {exercise.name} shows the original")
    record(exercise, hints=number + 1)


def solution(exercise, exercises: dict):
    source, original = read_mine(exercise)
    try:
        mine = text_of(source, exercise.function)
    except SyntaxError:
        mine = []  # the original is shown as a whole
    theirs = text_of(original, exercise.function)
    if mine == theirs:
        return print(f"{exercise.function} in my/{exercise.file} is the original")
    print("\n".join(difflib.unified_diff(mine, theirs, f"my/{exercise.file}", exercise.file, lineterm="")))


def reset(exercise, exercises: dict):
    """Put the original back: of the function, or of the file where the function cannot be found."""
    source, original = read_mine(exercise)
    path = MY / exercise.file
    try:
        there = find(source, exercise.function)
    except SyntaxError:
        there = None
    if there and text_of(source, exercise.function) == text_of(original, exercise.function):
        print(f"{exercise.function} in {shown(path)} is the original already")
    else:
        if there is None or not is_blank(there.node, exercise.name):
            print(f"kept as it was: {keep(path)}")
        with open_whole(path) as file:
            file.write(with_functions(source, original, [exercise.function])[0] if there else original)
        print(f"{exercise.function if there else 'all'} in {shown(path)} is the original again")
    record(exercise, started=None, hints=None)


def status(exercise, done: dict) -> str:
    entry = done.get(exercise.name, {})
    return "passed" if "passed" in entry else "started" if "started" in entry else ""


def show_list(exercises: dict):
    done, last = read_state()["exercises"], None
    for exercise in exercises.values():
        if exercise.file != last:
            print(f"\n{exercise.file}" if last else exercise.file)
        last = exercise.file
        print(f"  {exercise.name:<20} {status(exercise, done):<8}{exercise.level:<7}{exercise.minutes:>3} min"
              f"  {exercise.learns}")
    following = first_open(exercises, done)
    if following:
        print(f"\n{'go on with' if done else 'begin with'}: python exercise.py start {following.name}")


def first_open(exercises: dict, done: dict, after: str | None = None):
    """The next exercise that is not passed, after this one if there is any; None where all are."""
    names = list(exercises)
    begin = names.index(after) + 1 if after else 0
    return next((exercises[name] for name in names[begin:] + names[:begin]
                 if status(exercises[name], done) != "passed"), None)


def show_progress(exercises: dict):
    done = read_state()["exercises"]
    files = dict.fromkeys(exercise.file for exercise in exercises.values())
    rows = [(file, [status(one, done) for one in exercises.values() if one.file == file]) for file in files]
    rows.append(("all", [status(one, done) for one in exercises.values()]))
    for file, marks in rows:
        passed, started, count = marks.count("passed"), marks.count("started"), len(marks)
        width = 30 if file == "all" else count
        bar = ("#" * (width * passed // count)).ljust(width * (passed + started) // count, "-")
        bar = bar.ljust(width, ".")
        print(f"{file:<20} {passed:>3} of {count:<3} passed, {started} started  [{bar}]")
    minutes = sum(entry.get("minutes", 0) for entry in done.values())
    print(f"{minutes:.0f} minutes from start to pass, all in all" if minutes else
          "python exercise.py says what to begin with")


# ------------------------------------------------------------------------------------------------------------
# 4. Grading: the answer among the product's other files, that exercise's tests, a verdict in words


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


def grade(exercise, exercises: dict, settings: Grade):
    source, original = read_mine(exercise)
    answer = prepare(exercise, exercises, source, original)
    if answer.problem is None and text_of(source, exercise.function) == text_of(original, exercise.function) \
            and not read_state()["exercises"].get(exercise.name, {}).get("started"):
        raise UserError(f"{exercise.name} is not started: python exercise.py start {exercise.name}")
    if answer.problem:
        verdict = Verdict(False, answer.problem)
    else:
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as place:
            folder = Path(place).resolve()
            copy_product(folder)
            (folder / exercise.file).write_bytes(answer.content)
            code = run_tests(exercise, folder, settings.seconds)
            verdict = judge(exercise, answer, folder, code, settings.seconds)
    print(f"{exercise.name}: {'passed' if verdict.passed else 'not yet'}. {verdict.words}")
    if verdict.passed:
        return congratulate(exercise, exercises)
    if settings.traceback:
        print(verdict.traceback or "(there is no traceback)")
    print(f"python exercise.py hint {exercise.name}: how to write it" +
          "; --traceback: Python's own words" * bool(verdict.traceback and not settings.traceback))
    if read_state()["files"].get(exercise.file) not in (None, checksum(original)):
        print(f"({exercise.file} of the product has changed since your copy; reset {exercise.name} and begin "
              f"anew if that is in the way)")
    sys.stdout.flush()
    raise SystemExit(1)


def congratulate(exercise, exercises: dict):
    now, entry = time.time(), read_state()["exercises"].get(exercise.name, {})
    if "passed" not in entry:
        minutes = round((now - entry["started"]) / 60, 1) if "started" in entry else None
        entry = record(exercise, passed=now, minutes=minutes)
        print(f"{minutes:.0f} minutes since you began" if minutes is not None else "well done")
    following = first_open(exercises, read_state()["exercises"], exercise.name)
    print(f"next: python exercise.py start {following.name}" if following else "that was the last")


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


if __name__ == "__main__":
    run(main)
