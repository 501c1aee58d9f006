"""Token shards -> batches: windows of tokens as a pure function of (seed, step), whatever the processes.

    batches = Batches("runs/data", "train", batch_size=16, seq_len=128, seed=0)
    inputs, targets = batches.at(step)      # int64 (B, T) each

All windows of a corpus lie in an endless row: one permutation of them after the other, an epoch each. A step
takes the next ones, a rank its part of these. So nothing need be saved but the step, no window comes twice in
an epoch, and ranks never share one. `Mixture` (mixture.py) makes one such row of several.
"""
import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from config import UserError

# torch is imported by Batches alone: where worker processes import this file too, they should start at once.

SPLITS = ("train", "val")
IGNORE = -100  # a target without loss, as in torch's cross_entropy


class Batches:
    """Windows of T = seq_len tokens of one split, by step; B = batch_size is sequences a rank and step.

    Window w holds the inputs tokens[w*T : w*T + T]; its targets are the tokens one further on. So in an epoch
    every token but the first is a target exactly once. The last window is filled up with end-of-text, its
    targets with -100. The file is mapped, not read: it may be larger than memory.

    stride: how far apart windows begin, default T. With less they overlap, and what an earlier window has had
    as a target is -100 in the next: every token is still a target once, but after at least T - stride others.

    Attributes: windows, tokens, text_bytes (UTF-8 of the split's documents), folder, meta, and steps: how
    many calls of in_order cover the split. Raises UserError if the shard is missing, too short, or not what
    meta.json says; verify=False leaves out the checksum, which reads the whole file.
    """

    def __init__(self, folder: str | Path, split: str, batch_size: int, seq_len: int, seed: int = 0,
                 rank: int = 0, world_size: int = 1, verify: bool = True, stride: int | None = None):
        from torch import from_numpy  # here, not above: worker processes that import this file need no torch
        self.stride = seq_len if stride is None else stride
        assert split in SPLITS and 0 <= rank < world_size and batch_size >= 1 and 1 <= self.stride <= seq_len
        self._from_numpy = from_numpy
        self.folder = Path(folder)
        self.meta, self.data = open_shard(self.folder, split, verify)
        self.batch_size, self.seq_len, self.seed = batch_size, seq_len, seed
        self.rank, self.world_size = rank, world_size
        self.tokens, self.text_bytes = len(self.data), self.meta[split]["text_bytes"]
        needed = seq_len + 1 if split == "train" else 2
        if self.tokens < needed:
            raise UserError(f"{folder}/{split}.bin has {self.tokens:,} tokens, --seq_len {seq_len} needs "
                            f"{needed:,}; give data.py more text, or pass a smaller --seq_len")
        self.windows = 1 + max(0, -(-(self.tokens - 1 - seq_len) // self.stride))  # rounded up
        self.steps = -(-self.windows // (batch_size * world_size))
        self._epoch, self._order = None, None

    def at(self, step: int):
        """Return this rank's (inputs, targets) for training step `step`, counted from 0: int64 (B, T) each.

        A pure function of (seed, step): the rows of `numbers(step)`, so one rank with B = 8 sees at each step
        what two ranks with B = 4 see together.
        """
        return self.rows(self.numbers(step))

    def in_order(self, step: int):
        """Return (inputs, targets) `step` in the order of the file; past its end all targets are -100."""
        return self.stack(self.numbers(step))

    def numbers(self, step: int) -> range:
        """The places of this rank's B sequences of a step in the endless row that all ranks share."""
        first = (step * self.world_size + self.rank) * self.batch_size
        return range(first, first + self.batch_size)

    def rows(self, numbers: Iterable[int]):
        """Return (inputs, targets) at these places of the endless row."""
        return self.stack(self.at_places(numbers))

    def at_places(self, numbers: Iterable[int]) -> list[int]:
        """The windows at these places of an endless row of epochs: each permutes all windows."""
        places = (divmod(number, self.windows) for number in numbers)
        return [int(self.order(epoch)[place]) for epoch, place in places]

    def order(self, epoch: int) -> np.ndarray:
        """All windows' numbers, shuffled: each epoch its own way, which follows from (seed, epoch) alone."""
        if epoch != self._epoch:  # that of one epoch is kept, 8 bytes a window
            generator = np.random.Generator(np.random.PCG64([self.seed, epoch]))
            self._epoch, self._order = epoch, generator.permutation(self.windows)
        return self._order

    def stack(self, windows: Sequence[int]):
        """Return (inputs, targets) of these windows; past the last one there are no targets."""
        inputs = np.full((len(windows), self.seq_len), self.meta["end_of_text"], dtype=np.int64)  # (B, T)
        targets = np.full_like(inputs, IGNORE)                                                    # (B, T)
        for row, window in enumerate(windows):
            start = int(window) * self.stride
            tokens = self.data[start:start + self.seq_len + 1]  # the window and one more, if there is one
            length = max(len(tokens) - 1, 0)
            inputs[row, :length] = tokens[:length]
            targets[row, :length] = tokens[1:]
            if window > 0:
                targets[row, :self.seq_len - self.stride] = IGNORE
        return self._from_numpy(inputs), self._from_numpy(targets)


class Wrapped:
    """Batches made from other batches: what is not said anew (windows, tokens, meta, numbers …) is theirs."""

    def __init__(self, batches):
        self.batches = batches

    def __getattr__(self, name):  # asked only for what is not found here
        if name == "batches":  # not there yet: while a copy is being made
            raise AttributeError(name)
        return getattr(self.batches, name)


def open_shard(folder: Path, split: str, verify: bool) -> tuple[dict, np.ndarray]:
    """Return (meta, tokens) of one split. Raises UserError unless the file is what meta.json says."""
    path, meta_path, remedy = folder / f"{split}.bin", folder / "meta.json", f"python data.py --out {folder}"
    if not meta_path.is_file():
        raise UserError(f"{folder} holds no token shards (there is no {meta_path}); make them with: {remedy}")
    remedy = f"make it anew with: {remedy} --overwrite"
    try:
        meta = json.loads(meta_path.read_text(encoding="utf-8"))
        dtype = np.dtype({"uint16": "<u2", "uint32": "<u4"}[meta["dtype"]])
        tokens, size, checksum = (meta[split][key] for key in ("tokens", "bytes", "sha256"))
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{meta_path} is damaged ({type(error).__name__}: {error}); {remedy}") from None
    if not path.is_file():
        raise UserError(f"{path} is missing; {remedy}")
    if not path.stat().st_size == size == tokens * dtype.itemsize:
        raise UserError(f"{path} has {path.stat().st_size:,} bytes, but meta.json says {size:,} bytes and "
                        f"{tokens:,} tokens of {meta['dtype']}; {remedy}")
    if verify and file_checksum(path) != checksum:
        raise UserError(f"{path} is damaged: its sha256 is not the one in meta.json; {remedy}")
    return meta, np.memmap(path, dtype, mode="r") if tokens else np.empty(0, dtype)


def file_checksum(path: Path) -> str:
    checksum = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            checksum.update(block)
    return checksum.hexdigest()
