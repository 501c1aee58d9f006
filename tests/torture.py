"""Kill a run at random moments, and damage what it wrote: nothing may be lost, no damage may go unnoticed.

    python tests/torture.py --kills 200 --corruptions 1000

Not a test by itself: tests/test_torture.py does a dozen of each. Kills need a system with SIGKILL.
"""
import hashlib
import json
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import config  # noqa: E402: the path comes first
import data  # noqa: E402
from checkpoint import load_state  # noqa: E402
from config import UserError  # noqa: E402


@dataclass
class Settings:
    kills: int = 200  # kill -9 at random moments of one run, which is started again each time
    corruptions: int = 1000  # flips, cuts and missing files
    seed: int = 0


def main():
    settings = config.parse(Settings)
    with tempfile.TemporaryDirectory() as folder:
        print(kill_often(Path(folder), settings.kills, settings.seed))
        print(corrupt_often(Path(folder), settings.corruptions, settings.seed))


def make_shards(folder: Path) -> Path:
    rng = random.Random(0)
    words = ["def", "class", "return", "self", "value", "import", "for", "in", "range", "print", "if", "else"]
    (folder / "texts").mkdir()
    for number in range(20):
        lines = [" ".join(rng.choices(words, k=8)) for _ in range(20)]
        (folder / "texts" / f"{number}.txt").write_text("\n".join(lines), encoding="utf-8")
    data.prepare(data.Settings(input=(str(folder / "texts"),), out=str(folder / "shards"), vocab_size=280,
                               val_fraction=0.1, workers=1))
    return folder / "shards"


def train_in_process(shards: Path, out: Path, steps: int):
    """train.py's main, in a process of its own that was forked from one which has imported torch already."""
    import torch

    import train
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    sys.stdout = sys.stderr = open(os.devnull, "w", encoding="utf-8")
    sys.argv = ["train.py", "--data", str(shards), "--out", str(out), "--preset", "tiny", "--dim", "32",
                "--seq_len", "32", "--batch_size", "4", "--steps", str(steps), "--save_every", "1",
                "--bigram_steps", "3"]
    config.run(train.main)


def start(context, *arguments):
    process = context.Process(target=train_in_process, args=arguments)
    process.start()
    return process


def kill_often(folder: Path, kills: int, seed: int) -> str:
    """Kill one run that many times, saving after every step; compare its end with an uninterrupted run's."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train"])
    shards, steps, rng = make_shards(folder), 4 * kills + 20, random.Random(seed)
    whole = start(context, shards, folder / "whole", steps)
    whole.join()
    assert whole.exitcode == 0
    run, inside, done = folder / "run", 0, 0
    while done < kills:
        before = newest(run)
        process = start(context, shards, run, steps)
        if rng.random() < 0.8:  # most while it trains, some while it starts
            while process.is_alive() and newest(run) <= before:
                time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.15))
        process.kill()
        process.join()
        assert process.exitcode == -9, (
            f"ended by itself, code {process.exitcode}, step {newest(run)} of {steps}")
        done += 1
        inside += any(run.glob("state/*.tmp"))  # killed while a state was written or removed
        if newest(run) >= 0:
            assert load_state(run / "state", say=fail) is not None
    end = start(context, shards, run, steps)
    end.join()
    assert end.exitcode == 0
    for name in ("model.safetensors", f"state/step_{steps:08d}/optimizer.safetensors"):
        assert digest(run / name) == digest(folder / "whole" / name), f"{name}: not the uninterrupted run's"
    assert lines(run) == lines(folder / "whole")
    return f"{kills} kill -9, {inside} of them inside a save: the run ends byte-identical"


def fail(message: str):
    raise AssertionError(message)


def newest(run: Path) -> int:
    """The step of the newest state, -1 if there is none."""
    return max((int(path.name[5:13]) for path in run.glob("state/step_*") if path.suffix == ""), default=-1)


def lines(run: Path) -> list[dict]:
    """The lines of the log, without what depends on the clock."""
    found = map(json.loads, (run / "log.jsonl").read_text(encoding="utf-8").splitlines())
    return [{name: value for name, value in line.items()
             if not name.endswith(("seconds", "per_second", "gib", "mfu"))} for line in found]


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def corrupt_often(folder: Path, corruptions: int, seed: int) -> str:
    """Damage a file of the newest state, or a shard, that many times; each must be noticed."""
    shards = folder / "shards" if (folder / "shards").exists() else make_shards(folder)
    run = folder / "whole"
    if not run.exists():
        context = multiprocessing.get_context("spawn")
        process = start(context, shards, run, 4)
        process.join()
        assert process.exitcode == 0
    state, rng, counts = max(run.glob("state/step_*")), random.Random(seed), {}
    files = sorted(state.iterdir()) + [shards / "train.bin", shards / "val.bin"]
    step = int(state.name[5:])
    for _ in range(corruptions):
        path = rng.choice(files)
        kept = path.with_name(path.name + ".kept") if path.parent == shards else folder / "kept"
        shutil.copy2(path, kept)
        kind = damage(path, rng)
        try:
            check_noticed(path, state, shards, step)
        except AssertionError as problem:
            raise AssertionError(f"{kind} in {path.name} went unnoticed: {problem}") from None
        os.replace(kept, path) if path.parent == shards else shutil.copy2(kept, path)
        counts[kind] = counts.get(kind, 0) + 1
    assert load_state(state.parent, say=fail)[0] == step, "the files were not put back as they were"
    kinds = ", ".join(f"{number} x {kind}" for kind, number in sorted(counts.items()))
    return f"{corruptions} corruptions ({kinds}): every one noticed"


def damage(path: Path, rng: random.Random) -> str:
    content = bytearray(path.read_bytes())
    kind = rng.choice(["flip", "flip", "cut", "missing"])
    if kind == "missing":
        path.unlink()
        return kind
    if kind == "flip":
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    else:
        del content[rng.randrange(len(content)):]
    path.write_bytes(content)
    return kind


def check_noticed(path: Path, state: Path, shards: Path, step: int):
    if path.parent == shards:
        try:
            data.Batches(shards, path.stem, 1, 32)
        except UserError as error:
            assert path.name in str(error)
            return
        raise AssertionError("the shard was opened")
    said = []
    found = load_state(state.parent, say=said.append)
    assert found[0] == step - 1 and said and "damaged" in said[0], f"step {found[0]}, {said}"


if __name__ == "__main__":
    config.run(main)
