"""Safetensors files read and written a block at a time with plain file I/O.

The safetensors library maps a file whole (mapped pages count as resident memory) and writes only tensors that are in
memory at once. Here a tensor may be larger than memory: it is read and written by rows. The bytes are the standard's,
so the library reads these files and these functions read the library's.
"""

import ctypes
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self, TypedDict

import torch
from torch import Tensor

from scale_sae.errors import UserError

BLOCK_BYTES = 64 * 2**20
LARGEST_HEADER = 100_000_000  # bytes; the library's limit

DTYPES = {
    "F64": torch.float64,
    "I64": torch.int64,
    "F32": torch.float32,
    "I32": torch.int32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I16": torch.int16,
    "U8": torch.uint8,
    "I8": torch.int8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Digest(TypedDict):
    """Size in bytes and BLAKE2b-256 of a file, as hex."""

    size: int
    blake2b: str


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies: ``offset`` counts bytes from the start of the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def row_bytes(self) -> int:
        return nbytes(self.dtype, self.shape[1:])

    @property
    def nbytes(self) -> int:
        return nbytes(self.dtype, self.shape)


def nbytes(dtype: torch.dtype, shape: Sequence[int]) -> int:
    """Bytes of a tensor of this dtype and shape."""
    return dtype.itemsize * torch.Size(shape).numel()


def blocks(start: int, stop: int, row_bytes: int) -> Iterator[tuple[int, int]]:
    """Cuts ``start..stop`` into ranges of rows of at most ``BLOCK_BYTES`` each (but at least one row)."""
    step = max(1, BLOCK_BYTES // max(1, row_bytes))
    for first in range(start, stop, step):
        yield first, min(stop, first + step)


def memory(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, shared with it."""
    assert tensor.is_contiguous() and tensor.device.type == "cpu"
    array = (ctypes.c_ubyte * tensor.nbytes).from_address(tensor.data_ptr())
    array.owner = tensor  # type: ignore[attr-defined]  # the memory lives as long as the view does
    return memoryview(array).cast("B")


def layout(tensors: Mapping[str, tuple[torch.dtype, Sequence[int]]]) -> tuple[bytes, dict[str, Entry]]:
    """The head of a file that is to hold ``tensors`` (name → dtype, shape), and the place of each in file order."""
    # The library's order: widest elements first, so that every tensor is aligned.
    order = sorted(tensors, key=lambda name: (-tensors[name][0].itemsize, name))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position, starts = 0, {}
    for name in order:
        dtype, shape = tensors[name]
        end = position + nbytes(dtype, shape)
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [position, end]}
        starts[name], position = position, end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    head = len(text).to_bytes(8, "little") + text
    return head, {name: Entry(tensors[name][0], tuple(tensors[name][1]), len(head) + starts[name]) for name in order}


def save(path: Path, tensors: Mapping[str, Tensor]) -> Digest:
    """Writes ``tensors`` (any device) to ``path`` and to the disk, hashing on the way; at most a block is copied."""
    head, entries = layout({name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()})
    digest, size = hashlib.blake2b(digest_size=32), 0
    with path.open("wb") as file:
        for part in _parts(head, entries, tensors):
            file.write(part)
            digest.update(part)
            size += len(part)
        file.flush()
        os.fsync(file.fileno())
    return {"size": size, "blake2b": digest.hexdigest()}


def _parts(head: bytes, entries: Mapping[str, Entry], tensors: Mapping[str, Tensor]) -> Iterator[bytes | memoryview]:
    yield head
    for name, entry in entries.items():
        rows = tensors[name].detach().reshape(entry.shape or (1,))
        for first, last in blocks(0, len(rows), entry.row_bytes):
            block = rows[first:last].cpu().contiguous()
            if block.nbytes:
                yield memory(block)


def file_digest(path: Path) -> Digest:
    """Size and hash of a file, read in blocks."""
    digest, size = hashlib.blake2b(digest_size=32), 0
    buffer = memoryview(bytearray(2**20))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
            size += count
    return {"size": size, "blake2b": digest.hexdigest()}


class Reader:
    """An open safetensors file: ``entries`` tells what it holds; rows and columns come as new CPU tensors."""

    def __init__(self, path: Path):
        self.path = path
        self._file = path.open("rb")
        try:
            self.entries = _entries(self._file.read(8), self._file.read)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            self._file.close()
            raise UserError(f"{path}: is not a whole safetensors file ({error!r}); get the file again") from None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()

    def tensor(self, name: str) -> Tensor:
        """The whole tensor."""
        out = torch.empty(self.entries[name].shape, dtype=self.entries[name].dtype)
        self._fill(memory(out), self.entries[name].offset)
        return out

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows ``start..stop`` of dimension 0."""
        entry = self.entries[name]
        out = torch.empty((stop - start, *entry.shape[1:]), dtype=entry.dtype)
        self._fill(memory(out), entry.offset + start * entry.row_bytes)
        return out

    def columns(self, name: str, start: int, stop: int) -> Tensor:
        """Columns ``start..stop`` of a matrix, ``[rows, stop - start]``."""
        entry = self.entries[name]
        height, width = entry.shape
        out = torch.empty((height, stop - start), dtype=entry.dtype)
        view, size = memory(out), (stop - start) * entry.dtype.itemsize
        for row in range(height):
            self._fill(view[row * size : (row + 1) * size], entry.offset + (row * width + start) * entry.dtype.itemsize)
        return out

    def _fill(self, view: memoryview, offset: int) -> None:
        while view:
            count = os.preadv(self._file.fileno(), [view], offset)
            if not count:
                raise UserError(f"{self.path}: the file ends at byte {offset}, its header promises more (truncated)")
            view, offset = view[count:], offset + count


def _entries(length: bytes, read: Callable[[int], bytes]) -> dict[str, Entry]:
    """What a file's header says; ValueError and the like where it says nothing of use."""
    size = int.from_bytes(length, "little")
    if size > LARGEST_HEADER:
        raise ValueError(f"a header of {size} bytes")
    header = json.loads(read(size))
    header.pop("__metadata__", None)
    return {
        name: Entry(DTYPES[item["dtype"]], tuple(item["shape"]), 8 + size + item["data_offsets"][0])
        for name, item in header.items()
    }


class Writer:
    """A safetensors file of known layout (name → dtype, shape), filled in any order; on the disk when it is closed."""

    def __init__(self, path: Path, tensors: Mapping[str, tuple[torch.dtype, Sequence[int]]]):
        head, self.entries = layout(tensors)
        self._file = path.open("wb", buffering=0)
        self._put(memoryview(head), 0)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()

    def tensor(self, name: str, value: Tensor) -> None:
        """Writes a whole tensor."""
        self._put(memory(value.contiguous()), self.entries[name].offset)

    def rows(self, name: str, start: int, value: Tensor) -> None:
        """Writes rows from ``start`` on."""
        self._put(memory(value.contiguous()), self.entries[name].offset + start * self.entries[name].row_bytes)

    def columns(self, name: str, start: int, value: Tensor) -> None:
        """Writes columns from ``start`` on; ``value`` is ``[rows, columns]``, all rows of the matrix."""
        entry = self.entries[name]
        height, width = entry.shape
        assert len(value) == height
        view, size = memory(value.contiguous()), value.shape[1] * value.itemsize
        for row in range(height):
            self._put(view[row * size : (row + 1) * size], entry.offset + (row * width + start) * value.itemsize)

    def _put(self, data: memoryview, offset: int) -> None:
        while data:
            count = os.pwrite(self._file.fileno(), data, offset)
            data, offset = data[count:], offset + count
