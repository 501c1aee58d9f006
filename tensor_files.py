"""Tensors in files: the safetensors format (https://huggingface.co/docs/safetensors), by hand.

    8 bytes: the length n of the header | n bytes: JSON {name: {"dtype", "shape", "data_offsets"}} | raw bytes

Little-endian, row after row, without gaps. A pickle runs whatever code it carries when it is opened; here is
nothing to run, and the header is checked before memory is taken.

    >>> write_tensors("x.safetensors", {"a": torch.ones(2, 3)})
    >>> read_tensors("x.safetensors")["a"].sum()
    tensor(6.)
"""
import json
import math
import os
import sys
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from config import UserError, open_whole
from tokenizer_files import without_twins

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz, "F8_E5M2FNUZ": torch.float8_e5m2fnuz, "C64": torch.complex64,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "BOOL": torch.bool,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
MAX_HEADER = 100_000_000  # bytes; the format's own limit

assert sys.byteorder == "little", "tensors are written as they lie in memory, and the format is little-endian"


class Entry(NamedTuple):
    """Where a tensor lies: bytes start to end of the file."""
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int


def write_tensors(path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None):
    """Write a safetensors file, whole or not at all, with one tensor in (CPU) memory at a time.

    Before a tensor's turn comes, in `write_order`, only its .shape and .dtype are asked for: its values may
    live anywhere, and where it has a method .whole(), that one fetches them.
    Tensors that share memory are written once each: leave out what is tied.
    """
    names = write_order(tensors)
    header, position = {"__metadata__": dict(metadata)} if metadata else {}, 0
    for name in names:
        dtype, shape = tensors[name].dtype, list(tensors[name].shape)
        end = position + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": shape, "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)
    with open_whole(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            file.write(raw_bytes(tensors[name]))  # held by no name here, so gone before the next is fetched


def write_order(tensors: Mapping[str, Tensor]) -> list[str]:
    """The names in the order in which they lie in a file: each tensor at a multiple of its width."""
    return sorted(tensors, key=lambda name: -tensors[name].dtype.itemsize)


def raw_bytes(tensor: Tensor) -> np.ndarray:
    """The tensor's values as they lie in memory, row after row: (bytes,) uint8."""
    tensor = tensor.whole() if hasattr(tensor, "whole") else tensor
    tensor = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
    return tensor.reshape(-1).view(torch.uint8).numpy()


def read_header(path) -> tuple[dict[str, Entry], dict[str, str]]:
    """({name: Entry}, metadata) of a safetensors file; what they promise is there, without gap or overlap.

    Raises UserError, naming the file and what is wrong with it.
    """
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, MAX_HEADER):
            raise UserError(f"{path} is no safetensors file, or cut short: "
                            f"a header of {length} bytes in a file of {size}")
        text = file.read(length)
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=without_twins)
        if not isinstance(header, dict):
            raise ValueError("its header is not a JSON object")
        metadata = header.pop("__metadata__", {})
        entries = {name: checked_entry(name, info, 8 + length) for name, info in header.items()}
        position = 8 + length
        for name, entry in sorted(entries.items(), key=lambda item: item[1][2:]):  # by start, then end
            if entry.start != position:
                raise ValueError(f"tensor {name} begins at byte {entry.start}, where byte {position} is next")
            position = entry.end
        if position != size:
            raise ValueError(f"its header speaks of {position} bytes, the file has {size}")
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged: {error}") from None
    return entries, metadata


def checked_entry(name: str, info, data_start: int) -> Entry:
    match info:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [int(start), int(end)]}:
            pass
        case _:
            raise ValueError(f"the header's entry for tensor {name} is {str(info):.100}")
    if dtype not in DTYPES:
        raise ValueError(f"tensor {name} is of type {dtype:.20}, which is none of {' '.join(DTYPES)}")
    sizes = len(shape) <= 64 and all(type(n) is int and 0 <= n < 2**63 for n in shape)
    if not sizes or math.prod(n or 1 for n in shape) >= 2**63:  # torch's limits
        raise ValueError(f"tensor {name} cannot have the shape {str(shape):.100}")
    if start < 0 or end - start != math.prod(shape) * DTYPES[dtype].itemsize:
        raise ValueError(f"tensor {name}, {dtype} {shape}, cannot take bytes {start} to {end}")
    return Entry(DTYPES[dtype], tuple(shape), data_start + start, data_start + end)


def mapped_tensor(path, entry: Entry) -> Tensor:
    """A tensor of a safetensors file, mapped: a page is read where one looks, and goes with the tensor.

    What is written into it stays in memory.
    """
    if entry.start == entry.end:  # nothing cannot be mapped
        return torch.empty(entry.shape, dtype=entry.dtype)
    data = np.memmap(path, np.uint8, mode="c", offset=entry.start, shape=entry.end - entry.start)
    return torch.from_numpy(data).view(entry.dtype).reshape(entry.shape)  # c: torch knows no read-only memory


def mapped_tensors(path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, by name, as mapped_tensor gives them, but in one map."""
    entries, _ = read_header(path)
    data = np.memmap(path, np.uint8, mode="c")
    return {name: torch.from_numpy(data[entry.start:entry.end]).view(entry.dtype).reshape(entry.shape)
            for name, entry in entries.items()}


def read_tensors(path, device="cpu") -> dict[str, Tensor]:
    """All tensors of a safetensors file, by name. Raises UserError, naming the file and what is wrong."""
    return {name: mapped_tensor(path, entry).to(device, copy=True)
            for name, entry in read_header(path)[0].items()}
