"""The whole life of a language model in one command: the stages below, one after the other.

    ./speedrun.sh                  # sets up .venv and runs this; on Windows, or where torch is there already:
    python speedrun.py             # 19 minutes on two cores, 40 on slow ones, without a network or a GPU
    python speedrun.py --quick     # each stage for a few steps, below runs/quick: 5 minutes
    python speedrun.py --list      # the commands and their minutes, to be typed one by one

Python's own standard library becomes text, tokens, a model; this learns to answer, prefers the better of its
answers, is rewarded, learns sums, and teaches a smaller one. Each stage is a command that a reader could
type, printed before it runs. What it says stands in runs/speedrun/, what it took in runs/speedrun/done.json.
Stopped in whatever way, the same command goes on where it was: within a stage, as the stages themselves do.
In the end report.py makes one page of it all, runs/report.html.
"""
import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from config import UserError, open_whole, parse, run
from workers import cores

# ------------------------------------------------------------------------------------------------------------
# 1. The stages


@dataclass(frozen=True)
class Stage:
    name: str
    what: str  # it is for, in a few words
    words: str  # the command, without python or torchrun
    minutes: float  # on two cores
    quick: str = ""  # what --quick adds to it
    kept: str = ""  # a file that is there once the stage is done: then it is not run again
    out: str = ""  # the folder that it makes, where its command does not say --out
    trains: bool = True  # in as many processes as there are GPUs
    samples: bool = False  # what takes its time is sampling, which processes share on a CPU too

    @property
    def makes(self) -> str:
        """The folder without which it is not done, whatever was noted; "" where there is none."""
        words = shlex.split(self.words)
        return words[words.index("--out") + 1] if "--out" in words else self.out


TRY = "--questions 20 --eval_every 0"  # --quick: so few questions are answered before and after
STAGES = (
    Stage("data", "text, cleaned; a tokenizer; token shards", "data.py", 0.1, kept="runs/data/meta.json",
          trains=False),
    Stage("tokenizer", "what its tokens are worth", "bpe.py compare runs/data --text runs/data/val.jsonl",
          0.1, trains=False),
    Stage("pretrain", "a model that goes on with text", "train.py", 3, "--steps 60 --eval_stride 128",
          out="runs/base"),
    Stage("sft", "it answers questions", "sft.py", 2.5, f"--steps 30 {TRY}", out="runs/sft"),
    Stage("lora", "the same with 4 % of the weights", "sft.py --lora_rank 8 --lora_alpha 16 --steps 60 "
          "--out runs/lora", 1, f"--batch_size 8 {TRY}"),
    Stage("pairs", "it answers each prompt several times; a rule tells best from worst",
          "dpo.py --make_pairs", 2.5, "--prompts 100 --samples 2 --chosen author",
          out="runs/pairs", samples=True),
    Stage("dpo", "it prefers the better of its answers", "dpo.py", 1,
          f"--steps 10 --samples_of_questions 1 {TRY}", out="runs/dpo"),
    Stage("reward", "a model of which answer is better", "ppo.py --train_reward_model", 1, "--steps 10",
          out="runs/reward"),
    Stage("ppo", "it is rewarded by that model", "ppo.py", 2, f"--steps 3 {TRY}", out="runs/ppo"),
    Stage("sums", "problems with an exact answer, and a model for them", "arithmetic.py --overwrite", 0.1,
          "--learn 1000 --problems 1000 --val 100", kept="runs/arithmetic/sft/val.jsonl", trains=False),
    Stage("sums-sft", "it learns their form", "sft.py --init_from runs/arithmetic/start "
          "--data runs/arithmetic/sft --replay none --seq_len 160 --batch_size 4 --steps 530 --questions 0 "
          "--out runs/arithmetic-sft", 0.5, "--steps 60"),
    Stage("sums-grpo", "right answers are rewarded", "ppo.py --algorithm grpo "
          "--init_from runs/arithmetic-sft --prompts_data runs/arithmetic/problems "
          "--rewards exact=1 format=0 --batch_size 512 --minibatch_size 256 --update_epochs 1 --lr 5e-4 "
          "--adam_lr 5e-4 "
          "--seq_len 160 --max_new_tokens 48 --questions 200 --steps 60 --out runs/arithmetic-grpo", 2.5,
          f"--batch_size 64 --minibatch_size 64 --steps 3 {TRY}"),
    Stage("distil", "a model of a quarter of the size learns from it", "distill.py", 2, "--steps 30",
          out="runs/student"),
    Stage("alone", "the same small model, without a teacher", "distill.py --kd_weight 0 --out runs/alone", 1,
          "--steps 30"),
    Stage("distil-chat", "the small model learns to answer, from the one that prefers",
          "distill.py --teacher runs/dpo --init_from runs/student --data runs/chat --out runs/student-chat",
          1.5, f"--steps 20 --samples_of_questions 1 {TRY}"),
    Stage("report", "one page of all that", "report.py", 0.1, trains=False),
)


def command(stage: Stage, quick: bool, processes: int, folder: Path = Path(__file__).parent) -> list[str]:
    """What is typed in `folder` to run a stage. Of a flag that stands twice, --quick's, the last counts."""
    script, *words = shlex.split(stage.words)
    here = Path(__file__).resolve().parent
    launcher = ["torchrun", "--standalone", "--nproc-per-node", str(processes)]
    return [*(launcher if processes > 1 else ["python"]),
            script if folder.resolve() == here else str(here / script),
            *words, *(shlex.split(stage.quick) if quick else ())]


def processes_for(stage: Stage, gpus: int) -> int:
    """How many processes share a stage: one for each GPU; without any, sampling is shared by the cores."""
    if sys.platform == "win32":
        return 1  # torchrun fails there: it wants a libuv that PyPI's torch is built without
    if stage.trains and gpus > 1:
        return gpus
    return min(4, cores()) if stage.samples and not gpus else 1


# ------------------------------------------------------------------------------------------------------------
# 2. Running them


class Done:
    """What is done, in runs/speedrun/done.json: {stage: its command, seconds, and whether it has ended}."""

    def __init__(self, folder: Path):
        self.path, self.stages = folder / "done.json", {}
        if self.path.exists():
            try:
                self.stages = json.loads(self.path.read_text(encoding="utf-8"))
                if not all(0 <= stage["seconds"] < 1e12 for stage in self.stages.values()):  # nan, too
                    raise ValueError
            except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
                raise UserError(f"{self.path} is damaged; delete it: the stages know themselves what is done"
                                ) from None

    def seconds(self, stage: Stage) -> float:
        return self.stages.get(stage.name, {}).get("seconds", 0.0)

    def has(self, stage: Stage, words: Sequence[str]) -> bool:
        found = self.stages.get(stage.name, {})
        return bool(found.get("ended")) and found.get("command") == shlex.join(words)

    def add(self, stage: Stage, words: Sequence[str], seconds: float, ended: bool):
        self.stages[stage.name] = {"command": shlex.join(words), "ended": ended,
                                   "seconds": round(self.seconds(stage) + seconds, 1)}
        with open_whole(self.path, "w") as file:
            json.dump(self.stages, file, indent=1)


def run_stage(words: Sequence[str], folder: Path, log: Path) -> int:
    """Run a command in a folder; what it says is shown, and added to its log. Returns its exit code.

    Ctrl-C and SIGTERM are handed on: stages write a state and end by themselves.
    """
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8"}
    here = {"python": [sys.executable], "torchrun": [sys.executable, "-m", "torch.distributed.run"]}
    with open(log, "ab") as file:
        process = subprocess.Popen([*here[words[0]], *words[1:]], cwd=folder, env=environment,
                                   stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        with passed_on(process):
            while said := os.read(process.stdout.fileno(), 65536):
                file.write(said)
                file.flush()
                show(said)
            return process.wait()


@contextlib.contextmanager
def passed_on(process: subprocess.Popen) -> Iterator[None]:
    """Signals to stop go to the process, which is then waited for, as long as that takes."""
    def stop(number, frame):
        stopped.append(number)
        if number == signal.SIGTERM:  # of Ctrl-C the terminal tells both of us
            process.terminate()
    stopped, numbers = [], (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, stop) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if stopped:
        raise KeyboardInterrupt


def show(said: bytes):
    """Print what a stage says as it is, whatever the terminal can show."""
    if hasattr(sys.stdout, "buffer"):
        sys.stdout.buffer.write(said)
        sys.stdout.buffer.flush()
    else:
        print(said.decode("utf-8", errors="replace"), end="")


# ------------------------------------------------------------------------------------------------------------
# 3. The command


@dataclass
class Settings:
    quick: bool = False  # each stage for a few steps, in a folder of its own
    folder: str | None = None  # where `runs` is made; none: here, or with --quick runs/quick
    list: bool = False  # only print the commands and the minutes they take

    def __post_init__(self):
        self.folder = self.folder or ("runs/quick" if self.quick else ".")


def main():
    settings = parse(Settings)
    gpus = count_gpus()
    if settings.list:
        return print_list(settings, gpus)
    from survive import alone  # as below: it needs torch
    folder = Path(settings.folder, "runs", "speedrun")
    folder.mkdir(parents=True, exist_ok=True)
    with alone(folder):
        run_all(settings, gpus)


def count_gpus() -> int:
    import torch  # here, so that --help need not wait for it
    return torch.cuda.device_count()


def print_list(settings: Settings, gpus: int):
    folder = Path(settings.folder)
    if folder != Path("."):
        if sys.platform == "win32":  # PowerShell 5 has no &&
            print(f"{as_typed(['mkdir', str(folder)])}\n{as_typed(['cd', str(folder)])}")
        else:
            print(f"{as_typed(['mkdir', '-p', str(folder)])} && {as_typed(['cd', str(folder)])}")
    for stage in STAGES:
        minutes = f"{stage.minutes:g} min on two cores" if not settings.quick else ""
        print(f"# {stage.name}: {stage.what}; {minutes}".removesuffix("; "))
        print(as_typed(command(stage, settings.quick, processes_for(stage, gpus), folder)))


def as_typed(words: Sequence[str]) -> str:
    """A command with the quotes that this system's shell wants."""
    return subprocess.list2cmdline(words) if sys.platform == "win32" else shlex.join(words)


def run_all(settings: Settings, gpus: int):
    """Run what is not yet done, in order; say what each stage took."""
    folder, own = Path(settings.folder), Path(settings.folder, "runs", "speedrun")
    done, as_before = Done(own), True  # as_before: all up to here was done already
    print(f"{len(STAGES)} stages in {folder.resolve()}, on {gpus or 'no'} GPUs and {cores()} cores; "
          + (f"about {sum(stage.minutes for stage in STAGES):.0f} min on two cores"
             if not settings.quick else "a few steps of each"))
    for number, stage in enumerate(STAGES, 1):
        words = command(stage, settings.quick, processes_for(stage, gpus), folder)
        there = stage.kept and (folder / stage.kept).exists()
        noted = done.has(stage, words) and (folder / stage.makes).exists() and stage is not STAGES[-1]
        if there or as_before and noted:
            print(f"[{number}/{len(STAGES)}] {stage.name} is there already")
            continue
        as_before = False
        left = sum(other.minutes for other in STAGES[number - 1:])
        print(f"{'=' * 100}\n[{number}/{len(STAGES)}] {stage.name}: {stage.what}"
              + f"; about {stage.minutes:g} min of the {left:.0f} that are left" * (not settings.quick)
              + f"\n$ {as_typed(words)}", flush=True)
        run_or_stop(stage, words, folder, own / f"{number:02}-{stage.name}.log", done)
    print_minutes(done, folder)


def run_or_stop(stage: Stage, words: Sequence[str], folder: Path, log: Path, done: Done):
    """Run a stage and note what it took; where it fails, say how to repeat it, and end with its code."""
    started, code = time.perf_counter(), None
    try:
        code = run_stage(words, folder, log)
    except KeyboardInterrupt:
        print(f"\nstopped in {stage.name}; the same command goes on there", file=sys.stderr)
        raise SystemExit(130) from None
    finally:
        done.add(stage, words, time.perf_counter() - started, code == 0)
    if code:
        place = ""
        if folder != Path("."):  # PowerShell 5 has no &&
            place = f"in {folder}: " if sys.platform == "win32" else f"{as_typed(['cd', str(folder)])} && "
        print(f"error: stage {stage.name} ended with exit code {code}; what it said: {log}; "
              f"alone it is run by: {place}{as_typed(words)}; mended, python speedrun.py goes on there",
              file=sys.stderr)
        raise SystemExit(code if 0 < code < 256 else 1)


def print_minutes(done: Done, folder: Path):
    print("=" * 100)
    for stage in STAGES:
        if stage.name in done.stages:
            print(f"{stage.name:<14}{done.seconds(stage) / 60:>6.1f} min  {stage.what}")
    print(f"{'in all':<14}{sum(map(done.seconds, STAGES)) / 60:>6.1f} min\n"
          f"the report: {folder / 'runs' / 'report.html'}; talk with it: python sample.py --chat "
          f"{folder / 'runs' / 'dpo'}")


if __name__ == "__main__":
    run(main)
