"""A teacher whose answers are stored: asked once, then read by as many students as you like.

    python distill.py --top_k 64                 # asks runs/base once about all that the student will see

What is kept of each distribution is its k likeliest tokens and the mass of all others (divergence.TopK).
At 64 that is 258 bytes a token where V = 4,096 numbers would take 16,384. The folder lies beside the data:

    windows.bin   int64      the windows that were asked about, ascending
    counts.bin    int32      how many targets each has
    ids.bin       uint16/32  (N, k), the likeliest first
    logps.bin     float16    (N, k + 1), the last of all other tokens together
    meta.json     what they belong to (data, teacher, temperature, seq_len, k), and the files' checksums

Rounding to float16 changes a probability by less than 1 % where it is above e^-16.
"""
import contextlib
import functools
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from adapters import open_model
from attention import Mask
from batches import IGNORE, Batches
from bpe import Tokenizer
from checkpoint import read_json
from config import UserError, file_checksum, open_whole
from divergence import Live, TopK, log_probabilities
from lora import effective_weight
from model import Transformer
from parallel import Env, inside
from survive import alone
from work import Work, fingerprint

FILES = ("windows.bin", "counts.bin", "ids.bin", "logps.bin")
UNIT = 64  # windows whose answers are written together
AT_ONCE = 4096  # tokens that the teacher reads at once; not the batch's, which depends on the number of
                # processes, as the last bits depend on the shape

# ------------------------------------------------------------------------------------------------------------
# 1. A teacher that is there


def open_teacher(folder: str, tokenizer: Tokenizer | None = None,
                 device="cpu") -> tuple[Transformer, Tokenizer]:
    """The model of any folder of the Llama or Qwen kind, only to be read, and its tokenizer.

    tokenizer: the student's, if it has one. Raises UserError where the two give a token another meaning.
    """
    if not Path(folder).is_dir():
        raise UserError(f"there is no folder {folder} with a teacher; --teacher names one, ours (python "
                        f"train.py makes runs/base) or a downloaded one")
    model, own = open_model(folder, device)
    if own is None:
        raise UserError(f"the teacher {folder} has no tokenizer.json that can be read: what its logits are "
                        f"about cannot be told; distil on its answers (answers.py), or choose another")
    if tokenizer is not None:
        check_same_tokens(own, tokenizer, folder)
    return model.requires_grad_(False).eval(), own


def check_same_tokens(teacher: Tokenizer, student: Tokenizer, folder: str):
    """Raise UserError, with the first difference, unless both tokenizers make the same ids of any text.

    Compared by content: vocabularies of one size may be of other tokens.
    """
    if teacher.fingerprint == student.fingerprint:
        return
    ours, theirs = student.vocab, teacher.vocab
    for id in sorted(ours.keys() | theirs.keys()):
        if ours.get(id) != theirs.get(id):
            what = f"token {id} is {ours.get(id)!r} to the student and {theirs.get(id)!r} to the teacher"
            break
    else:
        what = "their tokens are the same, but not the pattern, the order of merges or what is special"
    raise UserError(f"the teacher {folder} has another tokenizer than the student: {what}; distil on the "
                    f"teacher's answers instead (answers.py)")


@torch.no_grad()
def asked(teacher: Transformer, inputs: Tensor, mask: Mask | None, valid: Tensor) -> Live:
    """What the teacher has to say about the valid (B, T) targets of some windows.

    Where its weights lie in parts they are whole only meanwhile: so the head's is copied.
    """
    def read(model: Transformer) -> Live:
        weight = effective_weight(model.lm_head)
        whole = weight if model.__dict__.get("root") is None else weight.clone()
        return Live(model.model(inputs, mask=mask)[valid], whole)
    return inside(teacher, read)


# ------------------------------------------------------------------------------------------------------------
# 2. Asked once, and written down


def store(teacher: Transformer, batches: Batches, windows: np.ndarray, k: int, temperature: float,
          folder: Path, identity: dict, env: Env, tokens: int | None = None) -> None:
    """Write the folder of a teacher's answers about these windows, shared by all processes.

    windows: ascending. identity: what the answers belong to. tokens: how many the tokenizer knows, where the
    head may have rows to spare, which a student's need not have. Says how many bytes a token takes, and
    refuses where the disk has no room for them. Killed, it goes on.
    """
    V = min(teacher.config.vocab_size, tokens or teacher.config.vocab_size)
    if k >= V:
        raise UserError(f"--top_k {k} is no fewer than the teacher's {V} tokens; pass fewer, or 0: live")
    env.first(lambda: check_room(batches, len(windows), k, V, folder, env))
    env.first(lambda: check_place(folder))
    with contextlib.ExitStack() as stack:
        env.first(lambda: folder.mkdir(parents=True, exist_ok=True))
        env.first(lambda: stack.enter_context(alone(folder)))
        env.first(lambda: (folder / "work").mkdir(exist_ok=True))
        key = fingerprint(identity, windows.tolist())  # a unit's number says nothing of which windows it has
        work = Work(folder / "work", key, env.rank, env.world_size)
        units = [windows[i:i + UNIT] for i in range(0, len(windows), UNIT)]
        unit = functools.partial(ask_about, teacher, batches, units, k, temperature, V, work, env)
        work.each("answers", len(units), unit)
        env.first(lambda: join(folder, work, windows, len(units), id_type(V), identity), patient=True)
        env.first(lambda: shutil.rmtree(folder / "work"))  # apart: by now nobody waits for a mark in there


def id_type(V: int) -> np.dtype:
    return np.dtype("<u2" if V <= 2 ** 16 else "<u4")


def check_room(batches: Batches, windows: int, k: int, V: int, folder: Path, env: Env):
    """Say what the answers about so many windows take; UserError where the disk has no room for that."""
    bytes_a_token = k * id_type(V).itemsize + 2 * (k + 1)
    tokens = round(batches.tokens * windows / batches.windows)
    need, free = 2 * tokens * bytes_a_token, shutil.disk_usage(existing(folder)).free
    env.say(f"to be stored: {bytes_a_token} bytes a token (k = {k}), some {tokens:,} tokens, "
            f"{tokens * bytes_a_token / 1e6:,.0f} MB, in {folder}")
    if need > free:
        raise UserError(f"{need / 1e9:.1f} GB are needed meanwhile in {folder}, and {free / 1e9:.1f} GB are "
                        f"free; pass a smaller --top_k or fewer --steps, or --top_k 0: the teacher live")


def check_place(folder: Path):
    """Raise UserError where anything else lies: `store` would delete it, or write over it."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is no folder; pass another --stored")
    known = {folder: ("meta.json", "work", *FILES), folder / "work": ("answers.", "failed.")}
    for place, names in known.items():
        for path in place.iterdir() if place.is_dir() else ():
            if path.suffix != ".tmp" and not path.name.startswith(names):
                raise UserError(f"{folder} holds {path.relative_to(folder)}, which is none of a teacher's "
                                f"answers; pass another --stored")


def existing(folder: Path) -> Path:
    """The folder, or the nearest above it that is there."""
    return next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())


@torch.no_grad()
def ask_about(teacher: Transformer, batches: Batches, units: list, k: int, temperature: float, V: int,
              work: Work, env: Env, unit: int) -> dict:
    """Write what the teacher says about one unit's windows, as if there were the first V tokens only."""
    counts, ids, logps = [], [], []
    at_once = max(1, AT_ONCE // batches.seq_len)  # windows
    for first in range(0, len(units[unit]), at_once):
        inputs, targets, *documents = env.to_device(batches.stack(units[unit][first:first + at_once]))
        mask = Mask(documents=documents[0]) if documents else None
        valid = targets != IGNORE
        counts += valid.sum(dim=1).tolist()
        with env.autocast():
            hidden = teacher.model(inputs, mask=mask)[valid]
        weight = effective_weight(teacher.lm_head)[:V]
        for rows in hidden.split(512):  # never all tokens' logits
            top = TopK.of(log_probabilities(rows.to(weight.dtype) @ weight.T, temperature), k)
            ids.append(top.ids.cpu().numpy().astype(id_type(V)))
            logps.append(top.logps.cpu().numpy().astype("<f2"))
    arrays = {"counts": np.array(counts, "<i4"), "ids": np.concatenate(ids), "logps": np.concatenate(logps)}
    for name, array in arrays.items():
        with open_whole(work.path("answers", unit, name)) as file:
            file.write(array.tobytes())
    return {"tokens": sum(counts)}


def join(folder: Path, work: Work, windows: np.ndarray, units: int, kind: np.dtype, identity: dict):
    """Make the folder's files of the units'; meta.json, without which they are nothing, comes last."""
    (folder / "meta.json").unlink(missing_ok=True)
    with open_whole(folder / "windows.bin") as file:
        file.write(windows.astype("<i8").tobytes())
    for name in ("counts", "ids", "logps"):
        with open_whole(folder / f"{name}.bin") as file:
            for unit in range(units):
                with open(work.path("answers", unit, name), "rb") as part:
                    shutil.copyfileobj(part, file)
    sums = {name: file_checksum(folder / name) for name in FILES}
    with open_whole(folder / "meta.json", "w") as file:
        meta = {**identity, "dtype": kind.name, "windows": len(windows), "sha256": sums}
        json.dump(meta, file, indent=1)


class Stored:
    """A folder of answers, mapped: `of(windows)` gives what the teacher said about their targets."""

    def __init__(self, folder: Path, identity: dict, windows: np.ndarray, verify: bool = True):
        """Raises UserError where the folder belongs to something else, lacks a window, or is damaged."""
        self.folder = folder
        self.remedy = f"pass another --stored, or delete {folder}, and the same command makes it anew"
        meta = read_json(folder / "meta.json")
        if not meta.keys() >= identity.keys():
            raise UserError(f"{folder / 'meta.json'} is not that of a teacher's answers; pass another "
                            f"--stored")
        for what, wanted in identity.items():
            if meta.get(what) != wanted:
                raise UserError(f"{folder} holds a teacher's answers of another {what} ({meta.get(what)}, "
                                f"not {wanted}); {self.remedy}")
        self.check_files(meta, verify)
        k, kind = identity["k"], np.dtype(meta["dtype"]).newbyteorder("<")
        self.windows = np.fromfile(folder / "windows.bin", "<i8")
        counts = np.fromfile(folder / "counts.bin", "<i4")
        self.first = np.concatenate([[0], counts.cumsum(dtype=np.int64)])
        if (folder / "ids.bin").stat().st_size != self.first[-1] * k * kind.itemsize:
            raise UserError(f"{folder / 'meta.json'} is damaged: ids.bin is not of {kind.name}; "
                            f"{self.remedy}")
        self.ids = np.memmap(folder / "ids.bin", kind, "r").reshape(-1, k)
        self.logps = np.memmap(folder / "logps.bin", "<f2", "r").reshape(-1, k + 1)
        self.places(windows)

    def check_files(self, meta: dict, verify: bool):
        """Raise UserError where meta.json or one of the files is not what was written."""
        sums = meta.get("sha256")
        if meta.get("dtype") not in ("uint16", "uint32") or not isinstance(sums, dict):
            raise UserError(f"{self.folder / 'meta.json'} is damaged; {self.remedy}")
        for name in FILES:
            path = self.folder / name
            if not path.is_file() or verify and file_checksum(path) != sums.get(name):
                raise UserError(f"{path} is missing or damaged: its sha256 is not that in meta.json; "
                                f"{self.remedy}")

    def places(self, windows: Sequence[int]) -> np.ndarray:
        """Where in the files these windows are; UserError where one is not."""
        windows = np.asarray(windows, dtype=np.int64)
        places = np.searchsorted(self.windows, windows)
        missing = windows[self.windows[np.minimum(places, len(self.windows) - 1)] != windows]
        if len(missing):
            raise UserError(f"{self.folder} holds answers about {len(self.windows):,} windows, but not about "
                            f"{len(missing):,} that this run sees, such as {missing[0]} (other --steps or "
                            f"--seed, or a rollback); {self.remedy}")
        return places

    def of(self, windows: Sequence[int]) -> TopK:
        """The answers about all targets of these windows, in their order; their rounding is made good."""
        rows = np.concatenate([np.arange(self.first[place], self.first[place + 1])
                               for place in self.places(windows)])
        logps = torch.from_numpy(self.logps[rows].astype(np.float32))
        return TopK(torch.from_numpy(self.ids[rows].astype(np.int64)), logps.log_softmax(dim=-1))
