"""Streaming checkpoints one matrix at a time, so that the whole model is never in memory.

Writing: `save` takes parameters that are stored elsewhere as `StreamedParameter`s, and Orbax
writes them through our own type handler; the result is an ordinary checkpoint. With several
processes, each reads and writes its share. Reading: `open_model` returns the parameters as arrays
that read a layer when it is indexed.

Chunks on disk are one layer of one parameter, cut along the axis that FSDP shards, so that a host
reads little more than what its devices hold.
"""

import collections
import dataclasses
import math
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from jax.experimental import multihost_utils
from tqdm import tqdm

from saber_jax.models import lora, saber
from saber_jax.models.config import SaberConfig
from saber_jax.runs import buckets
from saber_jax.train import checkpoint, digests, page_cache, saved
from saber_jax.tree import flatten, merge

CHUNK_BYTES = 8 * 2**20
NARROWEST = 64  # Minimum chunk size of the cut axis; below it, reads are shorter than a page.
FILE_BYTES = 128 * 2**20
IN_FLIGHT_BYTES = 1200 * 2**20  # Counts a piece once, although up to three copies of it exist.
AHEAD_BYTES = 600 * 2**20
CACHE_BYTES = 2**20
THREADS = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Piece:
    """One layer of a parameter, or a whole parameter without layers; `read` returns our layout."""

    layer: int | None
    nbytes: int
    place: tuple[str, int]  # File and offset, so that files are read from front to back.
    read: Callable[[], np.ndarray]


@dataclasses.dataclass(frozen=True, kw_only=True)
class StreamedParameter:
    """A parameter that is not in memory yet; `axes` are its logical axes."""

    shape: tuple[int, ...]
    dtype: np.dtype
    axes: tuple[str, ...]
    pieces: tuple[Piece, ...]

    @property
    def chunks(self) -> tuple[int, ...]:
        """The shape of a chunk on disk."""
        chunk = [
            1 if axis == "layers" else n for n, axis in zip(self.shape, self.axes, strict=True)
        ]
        while "embed" in self.axes and math.prod(chunk) * self.dtype.itemsize > CHUNK_BYTES:
            axis = self.axes.index("embed")
            if chunk[axis] % 2 or chunk[axis] < 2 * NARROWEST:
                break
            chunk[axis] //= 2
        return tuple(chunk)


def save(step: str | Path, leaves: dict[str, Any]) -> None:
    """Writes `StreamedParameter`s, a nested dict, as a step's parameters, and their digests."""
    step = Path(step).absolute()
    writing = _StreamedParameterHandler()
    handlers = ocp.type_handlers.create_type_handler_registry((StreamedParameter, writing))
    handler = ocp.PyTreeCheckpointHandler(type_handler_registry=handlers)
    with ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(step / "params", ocp.args.PyTreeSave(leaves))
    flat = flatten(leaves)
    mine = np.array([writing.sums.get(name, 0) for name in flat], np.uint32)
    sums = np.atleast_2d(multihost_utils.process_allgather(mine)).sum(axis=0, dtype=np.uint32)
    entries = zip(flat.items(), sums.tolist(), strict=True)
    saved.write_digests(step, {f"params/{n}": saved.entry(leaf, d) for (n, leaf), d in entries})


class _StreamedParameterHandler(ocp.type_handlers.NumpyHandler):
    """An Orbax type handler that writes leaves piece by piece.

    Afterwards, `sums` has this process's contributions to their digests, by flattened name.
    """

    def __init__(self):
        super().__init__()
        self.sums: dict[str, int] = {}

    async def serialize(
        self,
        values: Sequence[StreamedParameter],
        infos: Sequence[ocp.type_handlers.ParamInfo],
        args: Sequence[ocp.SaveArgs] | None = None,
    ) -> list:
        for info in infos:
            await info.await_path_creation()
        work = [
            (piece, leaf, info)
            for leaf, info in zip(values, infos, strict=True)
            for piece in leaf.pieces
        ]
        work.sort(key=lambda item: item[0].place)
        mine = _share([piece.nbytes for piece, _, _ in work])
        self.sums = _write(work[mine], page_cache.PageDropper(Path(infos[0].parent_dir)))
        return []


def _share(sizes: Sequence[int]) -> slice:
    """The contiguous pieces of this process; all processes get about the same number of bytes."""
    ends = np.cumsum(sizes)
    cuts = np.arange(jax.process_count() + 1) * (ends[-1] / jax.process_count())
    first, last = np.searchsorted(ends - np.asarray(sizes) / 2, cuts[jax.process_index() :][:2])
    return slice(int(first), int(last))


def _write(
    work: Sequence[tuple[Piece, StreamedParameter, ocp.type_handlers.ParamInfo]],
    pages: page_cache.PageDropper,
) -> dict[str, int]:
    """Writes pieces; returns the sums of their digests by flattened name."""
    in_flight = _ByteLimit(IN_FLIGHT_BYTES)
    stores = {info.name: _create(leaf, info) for _, leaf, info in work}
    total = sum(piece.nbytes for piece, _, _ in work)
    bar = tqdm(total=total, desc="writing", unit="B", unit_scale=True, disable=total < 2**30)

    def copy(piece: Piece, leaf: StreamedParameter, name: str) -> int:
        try:
            digest = _copy(piece, leaf, stores[name])
        finally:
            in_flight.leave(piece.nbytes)
        pages.report(piece.nbytes)
        bar.update(piece.nbytes)
        return digest

    with bar, ThreadPoolExecutor(THREADS) as pool:
        jobs = []
        for piece, leaf, info in work:
            in_flight.enter(piece.nbytes)
            name = info.name.replace(".", "/")
            jobs.append((name, pool.submit(copy, piece, leaf, info.name)))
        sums = collections.Counter()
        for name, job in jobs:
            sums[name] += job.result()
    return {name: total % 2**32 for name, total in sums.items()}


def _copy(piece: Piece, leaf: StreamedParameter, store: ts.TensorStore) -> int:
    """Copies a piece; returns its contribution to the digest of its parameter."""
    target = store if piece.layer is None else store[piece.layer]
    array = piece.read()
    chunk = leaf.chunks if piece.layer is None else leaf.chunks[1:]
    axis = next((i for i, (n, c) in enumerate(zip(array.shape, chunk, strict=True)) if n != c), 0)
    # TensorStore would transpose as well, but a few times slower.
    if axis == 0:  # Then its parts are, too; along other axes each of them is copied anyway.
        array = contiguous(array)
    writes, digest = [], 0
    strides = digests.c_strides(array.shape)
    first = (piece.layer or 0) * array.size
    for start in range(0, array.shape[axis], chunk[axis]):
        here = (slice(None),) * axis + (slice(start, start + chunk[axis]),)
        part = contiguous(array[here])
        writes.append(target[here].write(part, can_reference_source_data_indefinitely=True))
        at = first + start * strides[axis] if strides else first
        digest += digests.of_numpy(part, first=at, strides=strides)
    for write in writes:
        write.result()
    return digest


def _create(leaf: StreamedParameter, info: ocp.type_handlers.ParamInfo) -> ts.TensorStore:
    spec = ocp.type_handlers.get_json_tspec_write(
        info,
        use_ocdbt=True,
        global_shape=leaf.shape,
        local_shape=leaf.shape,
        dtype=leaf.dtype,
        process_index=jax.process_index(),
    )
    # Weights hardly compress, and compression is slower than a disk.
    spec["metadata"] |= {"chunks": leaf.chunks, "compressor": None}
    spec["kvstore"]["target_data_file_size"] = FILE_BYTES
    return ts.open(ts.Spec(spec), create=True, open=True, context=info.ts_context).result()


def contiguous(array: np.ndarray) -> np.ndarray:
    """The array in C order; a transposed one in blocks that stay in the cache, in a fraction
    of np.ascontiguousarray's time."""
    if array.flags.c_contiguous:
        return array
    out = np.empty(array.shape, array.dtype)
    source, target = array, out
    if array.dtype.itemsize == 2:  # NumPy's own 16 bits move faster than those of bfloat16.
        source, target = array.view(np.uint16), out.view(np.uint16)
    axis = int(np.argmax(array.strides))
    step = max(1, CACHE_BYTES * array.shape[axis] // max(array.nbytes, 1))
    for start in range(0, array.shape[axis], step):
        here = (slice(None),) * axis + (slice(start, start + step),)
        target[here] = source[here]
    return out


def in_order(jobs: Iterable[tuple[int, Callable[[], np.ndarray]]]) -> Iterator[np.ndarray]:
    """Results of (bytes of the result, job) in order; a few are computed ahead."""
    ahead: collections.deque[tuple[int, Future[np.ndarray]]] = collections.deque()
    with ThreadPoolExecutor(THREADS) as pool:
        for size, job in jobs:
            while ahead and sum(n for n, _ in ahead) + size > AHEAD_BYTES:
                yield ahead.popleft()[1].result()
            ahead.append((size, pool.submit(job)))
        while ahead:
            yield ahead.popleft()[1].result()


class _ByteLimit:
    """A limit for the bytes in flight; a single piece is always allowed."""

    def __init__(self, limit: int):
        self._limit, self._used = limit, 0
        self._changed = threading.Condition()

    def enter(self, size: int) -> None:
        with self._changed:
            self._changed.wait_for(lambda: not self._used or self._used + size <= self._limit)
            self._used += size

    def leave(self, size: int) -> None:
        with self._changed:
            self._used -= size
            self._changed.notify_all()


class StoredParameter:
    """A parameter on disk, which is read by indexing.

    Raises DamagedError once all of it was read, at once or layer by layer, and its digest differs.
    """

    def __init__(self, store: ts.TensorStore, pages: page_cache.PageDropper, step: Path, name: str):
        self._store, self._passing, self._step, self._name = store, pages, step, name
        self._sums: dict[int, int] = {}  # Of the digest, by layer.
        self.shape, self.dtype = tuple(store.shape), store.dtype.numpy_dtype
        self.chunks = tuple(store.chunk_layout.read_chunk.shape or store.shape)

    def __getitem__(self, index: Any) -> np.ndarray:
        source = self._store[index]
        # NumPy's memory comes in large pages, TensorStore's own in small ones.
        array = np.empty(source.shape, self.dtype)
        with saved.readable(self._step):
            ts.array(array).write(source).result()
            self._check(index, array)
        self._passing.report(array.nbytes)
        return array

    def _check(self, index: Any, array: np.ndarray) -> None:
        if array.shape == self.shape:
            self._sums = {0: digests.of_numpy(array)}
        elif isinstance(index, int):
            self._sums[index] = digests.of_numpy(array, first=index * array.size)
        else:
            return  # The digest of such a part is not known.
        if array.shape == self.shape or len(self._sums) == self.shape[0]:
            saved.check_one(self._step, self._name, self, sum(self._sums.values()) % 2**32)


class MergedParameter:
    """A weight on disk plus its adapter; `a` and `b` are in memory."""

    def __init__(self, weight: StoredParameter, a: np.ndarray, b: np.ndarray, scale: float):
        self._weight, self._a, self._b, self._scale = weight, a, b, scale
        self.shape, self.dtype = weight.shape, weight.dtype

    def __getitem__(self, index: Any) -> np.ndarray:
        stacked = isinstance(index, int)
        a, b = (self._a[index], self._b[index]) if stacked else (self._a, self._b)
        return lora.merged(self._weight[index], a, b, self._scale)


def open_model(workdir: str | Path) -> tuple[dict[str, Any], SaberConfig]:
    """Parameters of a work directory with adapters merged, as objects that read when indexed.

    Each has `shape` and `dtype`. Names and shapes are checked against the model; raises what
    `checkpoint.load_params` raises.
    """
    about = checkpoint.read_model_file(workdir)
    cfg = SaberConfig.from_dict(about["model"])
    leaves: dict[str, Any] = open_leaves(saved.newest(workdir))
    if "base" in about:
        base, _ = open_model(checkpoint.find_base(workdir, about["base"]))
        leaves = flatten(base) | leaves
    saber.check_tree(saber.abstract(cfg), merge(leaves), dtypes=False)
    prefix = f"{lora.ADAPTERS}/"
    params = {name: leaf for name, leaf in leaves.items() if not name.startswith(prefix)}
    if cfg.lora is not None:
        for name in [n for n in params if f"{prefix}{n}/a" in leaves]:
            a, b = (leaves[f"{prefix}{name}/{side}"][...] for side in "ab")
            params[name] = MergedParameter(params[name], a, b, cfg.lora.scale)
    return merge(params), dataclasses.replace(cfg, lora=None)


def open_leaves(step: Path) -> dict[str, StoredParameter]:
    """The parameters that one step holds, by flattened name."""
    item = buckets.native(step / "params")
    place = str(item) if buckets.mounted(step) else f"file://{item}"
    with saved.readable(step), ocp.StandardCheckpointer() as checkpointer:
        names = flatten(checkpointer.metadata(item).item_metadata.tree)
    # Nothing is read twice; and every reading at once takes a chunk's memory, new from the system.
    few = {"limit": THREADS}
    context = ts.Context(
        {
            "cache_pool": {"total_bytes_limit": 0},
            "file_io_concurrency": few,
            "data_copy_concurrency": few,
        }
    )
    pages = page_cache.PageDropper(step / "params")

    def opened(name: str) -> StoredParameter:
        kvstore = {
            "driver": "ocdbt",
            "base": f"{place}/",
            "path": name.replace("/", ".") + "/",
        }
        spec = {"driver": "zarr", "kvstore": kvstore, "fill_missing_data_reads": False}
        store = ts.open(spec, open=True, read=True, context=context).result()
        return StoredParameter(store, pages, step, f"params/{name}")

    with saved.readable(step):
        return {name: opened(name) for name in names}
