"""Safetensors files: what their headers promise, checked against the file, and their tensors.

The format: https://huggingface.co/docs/safetensors/index#format. Read by hand, because a header is
the only thing in a checkpoint that has to be believed before it is checked, and because NumPy alone
knows no bfloat16.
"""

import dataclasses
import json
import math
from pathlib import Path

import ml_dtypes
import numpy as np

DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tensor:
    """One tensor in a file; `offset` counts bytes from the start of the file."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int

    def read(self) -> np.ndarray:
        """A memory-mapped view. Raises ValueError for a dtype that holds no weights."""
        if self.dtype not in DTYPES:
            raise ValueError(f"{self.path} holds {self.dtype}; weights are {', '.join(DTYPES)}.")
        count = math.prod(self.shape)
        data = np.memmap(self.path, np.uint8, "r", self.offset, count * self.itemsize)
        return data.view(DTYPES[self.dtype]).reshape(self.shape)

    @property
    def itemsize(self) -> int:
        return np.dtype(DTYPES[self.dtype]).itemsize


def find(directory: Path) -> tuple[dict[str, Tensor], list[str]]:
    """Every tensor of a checkpoint directory by name, and every problem with its files."""
    index = directory / INDEX
    if index.is_file():
        return _from_index(index)
    if (directory / SINGLE).is_file():
        return _read(directory / SINGLE)
    pickles = sorted(p.name for p in directory.glob("pytorch_model*.bin"))
    if pickles:
        return {}, [
            f"{pickles} are pickles, which can run any code when read; convert them with "
            "save_pretrained(..., safe_serialization=True) where you trust them"
        ]
    return {}, [f"no {SINGLE} or {INDEX} in {directory}"]


def _from_index(index: Path) -> tuple[dict[str, Tensor], list[str]]:
    try:
        places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = sorted(set(places.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return {}, [f"{index.name} is not an index: {error!r}"]
    found: dict[str, Tensor] = {}
    problems, unread = [], set()
    for file in files:
        tensors, wrong = _shard(index.parent, str(file))
        problems += wrong
        if wrong:
            unread.add(file)
        found |= tensors
    # What an unreadable shard should have held is one problem, not hundreds.
    absent = [n for n, f in places.items() if f not in unread and n not in found]
    problems += [f"{name} is not in {places[name]}, where the index puts it" for name in absent]
    return {name: tensor for name, tensor in found.items() if name in places}, problems


def _shard(directory: Path, file: str) -> tuple[dict[str, Tensor], list[str]]:
    # By name, not by resolving: the download cache links its files to elsewhere on purpose.
    if Path(file).name != file or file in ("", ".", ".."):
        return {}, [f"the index points outside the directory: {file!r}"]
    if not file.endswith(".safetensors"):
        return {}, [f"the index points at {file!r}; only .safetensors is read, never pickles"]
    if not (directory / file).is_file():
        return {}, [f"shard {file} does not exist"]
    return _read(directory / file)


def _read(path: Path) -> tuple[dict[str, Tensor], list[str]]:
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            return {}, [f"{path.name} is truncated: {size} bytes do not even hold its header"]
        try:
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            tensors = {name: _tensor(path, 8 + length, info) for name, info in header.items()}
            end = max((info["data_offsets"][1] for info in header.values()), default=0)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            return {}, [f"{path.name} has a damaged header: {error!r}"]
    if 8 + length + end != size:
        return {}, [f"{path.name} is truncated or damaged: {8 + length + end} bytes, got {size}"]
    return tensors, []


def _tensor(path: Path, start: int, info: dict) -> Tensor:
    first, last = info["data_offsets"]
    shape = tuple(info["shape"])
    tensor = Tensor(path=path, dtype=info["dtype"], shape=shape, offset=start + first)
    sound = 0 <= first <= last and all(isinstance(n, int) and n >= 0 for n in shape)
    if not sound or (tensor.dtype in DTYPES and last - first != math.prod(shape) * tensor.itemsize):
        raise ValueError(f"{info} does not add up")
    return tensor
