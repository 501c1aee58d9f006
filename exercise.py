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
tests/exercises.py, the grader in grading.py. `pip install -r requirements-dev.txt` installs what tests need.

Your answer runs as a program of your own, with all that it may do: grade nobody else's without a sandbox, and
take no pass for a proof, as an answer can call the original.
"""
import difflib
import hashlib
import importlib.util
import json
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from config import UserError, open_whole, parse, require, run
from grading import Verdict, blank, find, is_blank, judge, prepare, run_tests, text_of, with_functions

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
# 1. The folder my/, and what was done there


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
# 2. The commands but for grading


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
# 3. The command that grades; grading.py finds the verdict


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


if __name__ == "__main__":
    run(main)
