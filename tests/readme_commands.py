"""The commands of README.md: listed, checked, run.

    python tests/readme_commands.py --list                     # all of them, and why some are not run
    python tests/readme_commands.py                            # at reduced size, in a temporary folder: minutes
    python tests/readme_commands.py --only data.py train.py    # of these scripts alone
    python tests/readme_commands.py --full --folder try        # as they stand, in a copy of the files: an hour

They run in the README's order, each from what those before it left. At reduced size (REDUCED: flags by
script, put behind those of the README, as the last one counts) the text is a few modules of the standard
library, and what stands for the reader's own files (my_texts/, my_chats.jsonl) is made from it. What is not run
needs a network, several machines, a GPU, or a file that we cannot make; each is printed with its reason.
"""
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from config import UserError, open_whole, parse, run  # noqa: E402

REDUCED = {  # flags by script; where a script does several things, by its first words
    "data.py": "--input corpus --workers 1 --vocab_size 1000",
    "bpe.py": "--input corpus/ast.py --vocab_size 400",
    "train.py": "--preset tiny --steps 3 --bigram_steps 2 --eval_stride 128",
    "extend.py": "--steps 1 --seeds 1 --passages 1 --batch_size 1",
    "sample.py": "--max_new_tokens 20",
    "sft.py": "--steps 3 --questions 2 --batch_size 2",
    "dpo.py": "--steps 2 --batch_size 2 --questions 2 --prompts 16 --samples 4 --margin 0.001 --max_new_tokens 60",
    "rejection.py": "--questions 2 --samples_of_questions 1 --max_new_tokens 8",
    "ppo.py --train_reward_model": "--steps 2 --batch_size 2",
    "ppo.py": "--steps 2 --batch_size 8 --minibatch_size 8 --questions 2 --max_new_tokens 8",
    "arithmetic.py": "--learn 60 --problems 16 --val 8 --layers 1 --samples 1 --max_new_tokens 8",
    "distill.py": "--steps 2 --bigram_steps 2 --eval_stride 128 --questions 2",
    "answers.py": "--prompts 8 --samples 2 --at_least 0 --max_new_tokens 40",
    "bench.py": "--only dedup --rounds 1 --threads 1",
}
MODULES = ("ast", "argparse", "textwrap", "json/decoder", "string", "shlex", "csv", "calendar", "random",
           "statistics", "fractions", "tarfile", "zipfile/__init__", "zipfile", "inspect", "difflib",
           "heapq", "bisect", "optparse", "configparser", "logging/__init__", "unittest/case", "typing")
LARGE = ("124m", "1b", "7b")  # presets that no machine without a GPU trains


@dataclass(frozen=True)
class Command:
    text: str  # as it stands, on one line, without its comment
    launcher: tuple[str, ...]  # python, or torchrun and its flags
    script: str  # "data.py"; empty where the line is no Python program
    words: tuple[str, ...]  # what follows the script

    def runs(self, made: bool) -> set[str]:
        """The paths below runs/ among its words: those that it says it makes, by --out, or those it reads."""
        pairs = zip(("", *self.words), self.words)  # each word with the one before it
        return {word for before, word in pairs if word.startswith("runs/") and (before == "--out") == made}

    def why_not(self, folder: Path) -> str | None:
        """The reason for which it is not run; None where it is."""
        if not self.script:
            return "sets up an environment of its own, from a network"
        if "--nnodes" in self.launcher:
            return "needs several machines"
        if any(size in self.words for size in LARGE) and not {"--dry_run", "--devices"} & set(self.words):
            return "needs a GPU"
        if any(word.startswith("path/to/") for word in self.words):
            return "needs a downloaded model"
        lacking = [word for word in self.words if word.startswith("my_") and not (folder / word).exists()]
        if lacking:
            return f"{lacking[0]} stands for a file of the reader's"
        if not (folder / self.script).exists():
            return f"{self.script} is not there"
        return None


def commands(text: str) -> list[Command]:
    """The commands in the blocks of a Markdown text that are marked as sh, in order."""
    found = []
    for block in re.findall(r"^```sh\n(.*?)^```", text, re.M | re.S):
        for line in block.replace("\\\n", " ").splitlines():
            for words in split(shlex.split(line, comments=True)):
                found.append(command(words))
    return found


def in_readme() -> list[Command]:
    return commands((ROOT / "README.md").read_text(encoding="utf-8"))


def split(words: list[str]) -> list[list[str]]:
    """The commands of a line whose commands end in ";"."""
    lines = [[]]
    for word in words:
        lines[-1].append(word.removesuffix(";"))
        if word.endswith(";"):
            lines.append([])
    return [line for line in lines if line]


def command(words: list[str]) -> Command:
    place = next((i for i, word in enumerate(words) if word.endswith(".py")), None)
    if words[0] not in ("python", "torchrun") or place is None:
        return Command(" ".join(words), (), "", ())
    return Command(shlex.join(words), tuple(words[:place]), words[place], tuple(words[place + 1:]))


def reduced(one: Command) -> Command:
    """The same at a size that takes seconds."""
    if "--dry_run" in one.words:
        return one
    key = f"{one.script} {one.words[0]}" if one.words else one.script
    flags = REDUCED.get(key, REDUCED.get(one.script, "")).split()
    if one.script == "data.py" and "--input" in one.words:
        flags = flags[2:]
    if one.script == "dpo.py" and "--make_pairs" not in one.words:
        flags = flags[:6]  # as the pairs were made by other flags, they would be made anew
    return Command(one.text, one.launcher, one.script, (*one.words, *flags))


# ------------------------------------------------------------------------------------------------------------
# Running them


def prepare(folder: Path, small: bool):
    """A copy of the files, to run in; and if small, the texts that the reduced commands learn from."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in (*ROOT.glob("*.py"), ROOT / "pytest.ini"):
        shutil.copy(path, folder)
    shutil.copytree(ROOT / "tests", folder / "tests", dirs_exist_ok=True,
                    ignore=shutil.ignore_patterns("__pycache__"))
    if not small:
        return
    library = Path(sysconfig.get_path("stdlib"))
    for name in ("corpus", "my_texts"):
        (folder / name).mkdir(exist_ok=True)
        for module in MODULES:
            path = (library / module).with_suffix(".py")
            if path.exists():
                shutil.copy(path, folder / name / f"{module.replace('/', '_')}.py")
    with open_whole(folder / "my_chats.jsonl", "w") as file:
        for number in range(40):
            messages = [{"role": "user", "content": f"{number} + 1?"},
                        {"role": "assistant", "content": str(number + 1)}]
            file.write(json.dumps({"messages": messages}) + "\n")


def execute(one: Command, folder: Path, timeout: float) -> tuple[int, str]:
    """(exit code, the end of what it printed). A chat is asked one question."""
    launcher = [sys.executable]
    if one.launcher[0] == "torchrun":
        launcher += ["-m", "torch.distributed.run", "--standalone", *one.launcher[1:]]
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8"}
    try:
        done = subprocess.run([*launcher, one.script, *one.words], cwd=folder, env=environment,
                              input="What does this do?\n", capture_output=True, encoding="utf-8",
                              errors="replace", timeout=timeout)
    except subprocess.TimeoutExpired:
        return 124, f"it took more than {timeout:g} s"
    return done.returncode, (done.stdout[-500:] + done.stderr[-1500:]).strip()


def run_all(folder: Path, small: bool, only=(), timeout: float = 7200, say=print) -> list[str]:
    """Run them one after the other; what was said of those that failed."""
    prepare(folder, small)
    failed, lacking = [], set()  # folders that commands which are not run would have left
    for one in in_readme():
        why = one.why_not(folder)
        if only and one.script not in only:
            continue
        if only and not why:  # then what others would have left may be missing
            lacking = {name for name in one.runs(made=False) if not (folder / name).exists()}
        if not why and lacking & set(one.words):
            why = f"needs {min(lacking & set(one.words))}, which a command above would have left"
        if why:
            lacking |= one.runs(made=True)
            say(f"not run   {one.text}: {why}")
            continue
        began = time.perf_counter()
        code, output = execute(reduced(one) if small else one, folder, timeout)
        good = code == (one.script == "exercise.py" and "grade" in one.words)  # 1: nobody has written it
        say(f"{'ok' if good else f'FAILED {code}':9} {time.perf_counter() - began:6.1f} s  {one.text}")
        if not good:
            failed.append(f"{one.text}\n{output}")
    return failed


@dataclass
class Settings:
    list: bool = False  # only print them
    full: bool = False  # run them as they stand, not at reduced size
    folder: str | None = None  # to run in, kept afterwards; none: a temporary one
    only: tuple[str, ...] = ()  # scripts to run: data.py train.py …; none: all
    timeout: float = 7200.0  # seconds a command may take

    def __post_init__(self):
        if self.folder and Path(self.folder).resolve() == ROOT:
            raise UserError(f"--folder {self.folder} holds the originals; choose another")
        if self.folder and not self.only and Path(self.folder, "runs").exists():
            raise UserError(f"--folder {self.folder} holds runs/ of another time; choose a new one, or say "
                            f"--only which scripts")
        unknown = set(self.only) - {one.script for one in in_readme()}
        if unknown:
            raise UserError(f"--only {min(unknown)} is in no command of README.md; --list shows them")


def main():
    settings = parse(Settings)
    if settings.list:
        for one in in_readme():
            why = one.why_not(ROOT)
            print(one.text + (f"    # not run: {why}" if why else ""))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(settings.folder or temporary)
        failed = run_all(folder, not settings.full, settings.only, settings.timeout)
    if failed:
        raise UserError(f"{len(failed)} failed:\n\n" + "\n\n".join(failed))


if __name__ == "__main__":
    run(main)
