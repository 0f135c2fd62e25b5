"""Writes metrics: one line of JSON per step, TensorBoard, and optionally Weights & Biases."""

import contextlib
import functools
import hashlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from saber_jax.runs import buckets, files
from saber_jax.runs.console import DropCounter, warn
from saber_jax.runs.files import json_line

MOST_SAMPLED = 1 << 16
"""Maximum number of entries of a parameter in its histogram."""


class MetricsWriter:
    """Writes metrics from process 0. Resuming at `start` first removes later lines, so that an
    interrupted run leaves the same file as an uninterrupted one.

    What cannot be written to a full or failing disk is dropped and counted, and reported once. In a
    bucket, metrics.jsonl is stored at every checkpoint; until then its lines are on local disk.
    """

    def __init__(self, workdir: str | Path, *, start: int, wandb: str = ""):
        """`wandb` names a Weights & Biases project. Raises ValueError if it is not installed."""
        self._active = jax.process_index() == 0
        if not self._active:
            return
        path = self._path = Path(workdir) / "metrics.jsonl"
        self._local, self._unstored = path, 0
        if buckets.mounted(path):
            self._local = Path(tempfile.mkdtemp(prefix="saber_metrics_")) / path.name
        files.make_folder(path.parent)
        self._dropped = DropCounter(f"lines of {path}")
        if files.exists(path):
            text = files.read_bytes(path).decode(errors="replace")
            kept = [line for line in text.splitlines() if _step(line) < start]
            files.write_text(self._local, "".join(f"{line}\n" for line in kept))
        self._wandb = _wandb_run(wandb, path.parent, self._local.parent) if wandb else None
        # Unbuffered, because Python's buffer would keep data that a full disk refused and fail
        # again on every write.
        self._file = self._local.open("ab", buffering=0)
        # Imported here: it imports torch where that is installed, which takes seconds.
        from saber_jax.train.tensorboard import TensorBoardWriter

        self._tensorboard = TensorBoardWriter(Path(workdir) / "tensorboard", start)

    def write(self, step: int, values: dict[str, float]) -> None:
        if not self._active:
            return
        with self._dropping():
            self._append(json_line({"step": step, **values}).encode())
        for name, value in values.items():
            self._tensorboard.scalar(step, name if "/" in name else f"train/{name}", value)
        if self._wandb:
            self._wandb.log(values, step=step)

    def sync(self) -> None:
        """Flushes metrics.jsonl to its disk, or stores it in its bucket."""
        if not self._active:
            return
        if self._local == self._path:
            with self._dropping():
                os.fsync(self._file.fileno())
            return
        try:
            self._store()
        except OSError as error:
            warn(f"{self._path} is stored at the next checkpoint only: {error}")

    def _store(self) -> None:
        files.write_bytes(self._path, self._local.read_bytes())
        self._unstored = 0

    def text(self, step: int, name: str, text: str) -> None:
        """Writes text to TensorBoard, indented because TensorBoard renders Markdown."""
        if self._active:
            self._tensorboard.text(step, name, "    " + text.replace("\n", "\n    "))

    def histograms(self, step: int, values: Mapping[str, np.ndarray]) -> None:
        if not self._active:
            return
        for name, numbers in values.items():
            if np.size(numbers):
                self._tensorboard.histogram(step, name, np.asarray(numbers, np.float32))

    def weights(self, step: int, params: Mapping[str, jax.Array]) -> None:
        """Histograms of parameters, by name, from at most MOST_SAMPLED entries of each.

        Called by all processes: the entries are gathered from everywhere.
        """
        sampled = jax.device_get(_sampled(dict(params)))
        self.histograms(step, {f"weights/{name}": values for name, values in sampled.items()})

    def close(self) -> None:
        if self._active:
            with self._dropping():
                self._file.close()
            if self._local != self._path:
                self._leave_local_disk()
            self._tensorboard.close()
            self._dropped.close()
            if self._wandb:
                self._wandb.finish()

    def _leave_local_disk(self) -> None:
        try:
            self._store()
        except OSError as error:
            self._dropped.add(self._unstored, str(error))
        shutil.rmtree(self._local.parent, ignore_errors=True)

    def _append(self, line: bytes) -> None:
        """Appends a whole line or nothing."""
        before = os.fstat(self._file.fileno()).st_size
        try:
            while line:
                line = line[self._file.write(line) :]
        except OSError:
            os.ftruncate(self._file.fileno(), before)
            raise
        self._unstored += 1

    @contextlib.contextmanager
    def _dropping(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self._dropped.add(1, str(error))


def _sampled(params: dict[str, jax.Array]) -> dict[str, jax.Array]:
    placed = next(iter(params.values())).sharding
    everywhere = NamedSharding(placed.mesh, P()) if isinstance(placed, NamedSharding) else None
    return _strided(params, everywhere)


@functools.partial(jax.jit, static_argnums=1)
def _strided(params: dict[str, jax.Array], everywhere: Any) -> dict[str, jax.Array]:
    """Evenly spaced entries along every axis."""
    sampled = {}
    for name, leaf in params.items():
        strides, excess = [], leaf.size / MOST_SAMPLED
        # Stride over the last axes first, because neighbours in memory are most alike.
        for size in reversed(leaf.shape):
            stride = min(size, max(1, math.ceil(excess)))
            excess /= stride
            strides.append(slice(None, None, stride))
        picked = leaf[tuple(reversed(strides))].reshape(-1)
        sampled[name] = (
            jax.lax.with_sharding_constraint(picked, everywhere) if everywhere else picked
        )
    return sampled


def _wandb_run(project: str, workdir: Path, local: Path) -> Any:
    """The W&B run of this work directory, resumed if it exists; it keeps its files in `local`."""
    try:
        import wandb  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise ValueError(
            f"config.wandb is {project!r}, but Weights & Biases is not installed. Run pip install "
            "wandb, or leave config.wandb empty."
        ) from None
    identity = hashlib.sha256(str(workdir.absolute()).encode()).hexdigest()[:16]
    config = workdir / "config.json"
    return wandb.init(
        project=project,
        id=identity,
        name=workdir.as_posix(),
        dir=str(local),
        resume="allow",
        config=files.read_json(config) if files.exists(config) else None,
    )


def _step(line: str) -> float:
    """The step of a line; infinity for a truncated line, so that it is removed."""
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError):
        return float("inf")
