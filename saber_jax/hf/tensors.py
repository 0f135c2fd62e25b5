"""Reading and writing safetensors files, with checks of their headers.

The format: https://huggingface.co/docs/safetensors/index#format. Files are read by our own code to
check headers against the file, and because NumPy has no bfloat16; they are written by our own code
because the library needs a whole file in memory.
"""

import dataclasses
import itertools
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from saber_jax.hf import digests
from saber_jax.runs.files import parse_json
from saber_jax.train import page_cache

DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
ADAPTERS = "adapter_model.safetensors"

# The format allows no longer header; a file that claims one is no such file.
LONGEST_HEADER = 100 * 10**6

POINTER = (
    "is a pointer of Git LFS in the place of the file. Fetch the file: `git lfs pull` in its "
    "directory, or `hf download`."
)


class DamagedError(ValueError):
    """Bytes of a tensor are not what was exported. The message names the file."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tensor:
    """One tensor in a file; `offset` counts bytes from the start of the file.

    `digest` is what an export wrote about its bytes, which reading compares.
    """

    path: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    digest: int | None = None

    def read(self) -> np.ndarray:
        """Raises ValueError for a dtype that holds no weights, DamagedError for damaged bytes."""
        if self.dtype not in DTYPES:
            raise ValueError(f"{self.path} holds {self.dtype}; weights are {', '.join(DTYPES)}.")
        return self.read_bytes().view(DTYPES[self.dtype]).reshape(self.shape)

    def read_bytes(self) -> np.ndarray:
        data = page_cache.read(self.path, self.nbytes, self.offset)
        if self.digest not in (None, digests.crc(data)):
            raise DamagedError(
                f"{self.path} is damaged: its tensor at byte {self.offset}, {self.shape}, is not "
                "what was exported. Export or copy it again."
            )
        return data


def find(directory: Path, single: str = SINGLE) -> tuple[dict[str, Tensor], list[str]]:
    """Every tensor of a checkpoint directory by name, and every problem with its files. `single` is
    the file's name where there are no shards."""
    found, problems = _find(directory, single)
    sums, wrong = digests.read(directory)
    for file, listed in sums.items():
        held = sorted((t.offset, name) for name, t in found.items() if t.path.name == file)
        if len(held) != len(listed) and any(t.path.name == file for t in found.values()):
            lists = f"{digests.FILE} lists {len(listed)}"
            wrong.append(f"{file} holds {len(held)} tensors, {lists}")
        for (_, name), digest in zip(held, listed, strict=False):
            found[name] = dataclasses.replace(found[name], digest=digest)
    return found, problems + wrong


def _find(directory: Path, single: str) -> tuple[dict[str, Tensor], list[str]]:
    index = directory / INDEX
    if index.is_file():
        return _from_index(index)
    if (directory / single).is_file():
        return _read(directory / single)
    pickles = sorted(p.name for p in directory.glob("pytorch_model*.bin"))
    if pickles:
        return {}, [
            f"{pickles} are pickles, which can run any code when read; convert them with "
            "save_pretrained(..., safe_serialization=True) where you trust them"
        ]
    absent = f"no {single} or {INDEX} in {directory}"
    if (directory / ADAPTERS).is_file():
        return {}, [f"{absent}: {ADAPTERS} holds adapters of peft, which need their model"]
    if others := sorted(p.name for p in directory.glob("*.safetensors")):
        return {}, [f"{absent}, and what {', '.join(others[:3])} hold is not known without it"]
    return {}, [absent]


def is_pointer(path: Path) -> bool:
    """Whether a clone without Git LFS left a note of three lines where the file should be."""
    with path.open("rb") as file:
        return file.read(40).startswith(b"version https://git-lfs.github.com/spec")


def _from_index(index: Path) -> tuple[dict[str, Tensor], list[str]]:
    if is_pointer(index):
        return {}, [f"{index.name} {POINTER}"]
    try:
        places = parse_json(index.read_text(encoding="utf-8"))["weight_map"]
        files = sorted(set(places.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return {}, [f"{index.name} is not an index: {error!r}"]
    found: dict[str, Tensor] = {}
    problems, unread, twice = [], set(), []
    for file in files:
        tensors, wrong = _shard(index.parent, str(file))
        problems += wrong
        if wrong:
            unread.add(file)
        twice += [f"{n} in {found[n].path.name} and {file}" for n in tensors.keys() & found.keys()]
        found |= tensors
    if twice:
        problems.append(
            f"files have tensors in common ({len(twice)}, such as {min(twice)}), so it is not "
            "clear which are meant. Delete the older files and their index"
        )
    if SINGLE not in files and (index.parent / SINGLE).exists():
        problems.append(
            f"it holds two models: {SINGLE}, which transformers reads, and the files of "
            f"{index.name}. Delete the one that is not meant"
        )
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
    if is_pointer(path):
        return {}, [f"{path.name} {POINTER}"]
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            return {}, [f"{path.name} is truncated: {size} bytes do not even hold its header"]
        if length > LONGEST_HEADER:
            return {}, [f"{path.name} has a damaged header: it claims to have {length} bytes"]
        try:
            header = parse_json(file.read(length))
            header.pop("__metadata__", None)
            tensors = {name: _tensor(path, 8 + length, info) for name, info in header.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            return {}, [f"{path.name} has a damaged header: {error!r}"]
    end = 8 + length
    for tensor in sorted(tensors.values(), key=lambda tensor: (tensor.offset, tensor.nbytes)):
        if tensor.offset != end:
            return {}, [f"{path.name} has a damaged header: its tensors overlap or leave gaps"]
        end += tensor.nbytes
    if end != size:
        return {}, [f"{path.name} is truncated or damaged: {end} bytes, got {size}"]
    return tensors, []


def _tensor(path: Path, start: int, info: dict) -> Tensor:
    first, last = info["data_offsets"]
    shape, dtype = tuple(info["shape"]), info["dtype"]
    sound = all(type(n) is int and n >= 0 for n in (first, last, *shape)) and first <= last
    size = math.prod(shape) * np.dtype(DTYPES[dtype]).itemsize if dtype in DTYPES else last - first
    if not sound or last - first != size:
        raise ValueError(f"{info} does not add up")
    return Tensor(path=path, dtype=dtype, shape=shape, offset=start + first, nbytes=size)


def header(tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> bytes:
    """The start of a file that holds tensors of these dtypes and shapes one after another."""
    # Without this tag transformers refuses to guess the framework.
    content: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape) in tensors.items():
        first, end = end, end + math.prod(shape) * np.dtype(DTYPES[dtype]).itemsize
        content[name] = {"dtype": dtype, "shape": shape, "data_offsets": [first, end]}
    text = json.dumps(content, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def read_header(path: Path) -> bytes:
    """The start of a file, up to its first tensor."""
    with path.open("rb") as file:
        length = file.read(8)
        return length + file.read(int.from_bytes(length, "little"))


def write(path: Path, start: bytes, arrays: Iterable[np.ndarray]) -> list[int]:
    """A file of `start` and the bytes of `arrays`, which are taken one at a time. Returns their
    digests."""
    sums: list[int] = []
    page_cache.write(path, itertools.chain([start], digests.noted(arrays, sums)))
    return sums
