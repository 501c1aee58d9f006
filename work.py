"""Work that many processes share through a folder: done once, kept, and the same whoever does it.

    torchrun --nproc-per-node 8 data.py …        # or any launcher that sets RANK and WORLD_SIZE

A stage is a function of a unit's number, which writes files <stage>.<unit>.… and returns what is to be known
of them. Process r of N does the units r, r + N, r + 2 N, …; once a unit's files are whole, a mark
<stage>.<unit>.json says so. Everyone who needs the stage waits until all its marks are there. That is all: no
connection between the processes but the disk they share, no torch. Started again after a kill, by any number
of processes, units with a mark are passed over. As a unit's result may depend on the unit alone, N leaves no
trace in it.
"""
import hashlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

from tqdm import tqdm

import config
from config import UserError


class Work:
    """The shared folder, and this process's place among those that share it.

    key: stands for what the work depends on (inputs, settings): a mark that another key made does not count.
    """

    def __init__(self, folder: Path, key: str = "", rank: int = 0, world_size: int = 1):
        assert 0 <= rank < world_size
        self.folder, self.key, self.rank, self.world_size = Path(folder), key, rank, world_size
        self.started = time.time()

    def path(self, stage: str, unit: int | None, suffix: str) -> Path:
        return self.folder / (f"{stage}.{suffix}" if unit is None else f"{stage}.{unit:05}.{suffix}")

    def each(self, stage: str, units: int, function: Callable[[int], dict],
             key: Callable[[int], str] | None = None, wait: bool = True) -> list[dict]:
        """Have function(unit) done for all units, by all processes; return what it returned, by unit.

        key: of a unit, where that depends on less than all of the work. wait: for the others' units; else [].
        """
        keys = [key(unit) if key else self.key for unit in range(units)]
        mine = range(self.rank, units, self.world_size)
        for unit in tqdm(mine, stage, unit="shard", leave=False, disable=self.rank > 0 or units == 1 or None):
            if self.result(stage, unit, keys[unit]) is None:
                self.make(stage, unit, keys[unit], lambda: function(unit))
        return [self.wait(stage, unit, keys[unit]) for unit in range(units)] if wait else []

    def once(self, stage: str, function: Callable[[], dict]) -> dict:
        """Have function() done by the first process, and return what it returned."""
        if self.rank == 0 and self.result(stage, None, self.key) is None:
            self.make(stage, None, self.key, function)
        return self.wait(stage, None, self.key)

    def make(self, stage: str, unit: int | None, key: str, function: Callable[[], dict]) -> None:
        try:
            self.path(stage, unit, "json").unlink(missing_ok=True)
            result = function()
        except BaseException as error:
            message = f"{type(error).__name__}: {error}"
            (self.folder / f"failed.{self.rank}").write_text(message, encoding="utf-8")
            raise
        prefix = self.path(stage, unit, "").name
        files = {path.name: path.stat().st_size for path in self.folder.iterdir()
                 if path.name.startswith(prefix) and path.suffix not in (".json", ".tmp")}
        with config.open_whole(self.path(stage, unit, "json"), "w") as file:
            json.dump({"key": key, "files": files, "result": result}, file, ensure_ascii=False)

    def result(self, stage: str, unit: int | None, key: str) -> dict | None:
        """What a finished unit returned; None if it is to be done: no mark, another key, a file not whole."""
        try:
            mark = json.loads(self.path(stage, unit, "json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        if mark["key"] != key:
            return None
        for name, size in mark["files"].items():
            path = self.folder / name
            if not path.is_file() or path.stat().st_size != size:
                print(f"{path} of an earlier run is missing or not whole; it is made anew")
                return None
        return mark["result"]

    def wait(self, stage: str, unit: int | None, key: str) -> dict:
        """What a unit returned, once it is done. Raises UserError where a process has failed meanwhile."""
        pause = 0.01
        while (result := self.result(stage, unit, key)) is None:
            for path in self.folder.glob("failed.*"):
                if path.stat().st_mtime >= self.started - 1:
                    raise UserError(f"process {path.suffix[1:]} failed: {path.read_text(encoding='utf-8')}")
            if not self.folder.is_dir():
                raise UserError(f"{self.folder} is gone: the first process has ended, see its message")
            time.sleep(pause)
            pause = min(1.0, 1.5 * pause)
        return result


def place() -> tuple[int, int]:
    """(rank, world size), as torchrun sets them; (0, 1) without."""
    try:
        rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    except ValueError:
        rank, world_size = 0, 0
    if not 0 <= rank < world_size:
        raise UserError(f"RANK {os.environ.get('RANK')} of WORLD_SIZE {os.environ.get('WORLD_SIZE')}: a "
                        f"launcher sets both, RANK from 0 up to WORLD_SIZE - 1")
    return rank, world_size


def fingerprint(*values) -> str:
    """The same for equal values (what JSON can spell), on every machine."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode("utf-8")).hexdigest()[:16]
