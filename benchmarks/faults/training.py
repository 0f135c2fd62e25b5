"""Short runs of the tiny network by saber_jax.main, in processes that can be killed.

Processes are forked by a server that has imported everything, so that most of a run's seconds are
its own: looking at data, compiling, restoring, steps and saves.
"""

import dataclasses
import functools
import multiprocessing
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from benchmarks.faults import groups
from configs import sft
from data_prep.records import dataset
from saber_jax import main, sharding
from saber_jax.data import sed
from saber_jax.data.records import FIELDS, Record
from saber_jax.data.tokenizer import train_sentencepiece
from saber_jax.runs import distributed
from saber_jax.train import checkpoint, saved, start
from saber_jax.train import stage as stages
from saber_jax.train.step import TrainState

STEPS = 6
PATIENCE = 300
"""Seconds within which the first run, which compiles, has to end."""
UNOPTIMISED = "--xla_backend_optimization_level=0"
WORDS = ("calm", "person", "speaks", "loudly", "in", "the", "quiet", "red", "room", "slowly")


def record(seed: int) -> Record:
    """Random pixels, noise and text."""
    rng = np.random.default_rng(seed)
    return Record(
        clip_id=f"clip{seed}",
        language="en",
        frames=rng.integers(0, 256, (4, 84, 84, 3), np.uint8),
        seconds_per_grid=0.5,
        audio=rng.integers(-9000, 9000, 20_000, np.int16),
        annotation={field: " ".join(rng.choice(WORDS, 2)) for field in FIELDS},
        labels={},
        provenance={},
    )


def write_records(folder: Path, count: int = 8) -> Path:
    """Built records of made-up clips, and a vocabulary for them."""
    folder.mkdir(parents=True, exist_ok=True)
    dataset.write(folder, {"train": [record(i) for i in range(count)]}, lambda made: made)
    texts = [sed.target_text(record(i).annotation) for i in range(40)]
    texts += [sed.prompt_text(language, True, True) for language in ("en", "zh")]
    symbols = [sed.heading(field) for field in FIELDS]
    train_sentencepiece(texts, folder / "tokenizer.model", vocab_size=768, symbols=symbols)
    return folder


def config(records: Path, root: Path, **changes: Any) -> ConfigDict:
    """The config of a short run of the tiny network that saves every step, in root/sft."""
    c = sft.get_config("tiny")
    c.root, c.data.path = str(root), str(records)
    c.steps, c.checkpoint_every, c.log_every = STEPS, 1, 1
    c.data.batch_rows = 1
    c.data.length, c.data.patches, c.data.chunks = 256, 72, 1
    c.data.segments, c.data.targets, c.compute.head_chunk = 1, 128, 128
    c.update_from_flattened_dict(changes)
    return c


def serve(compiled: Path, *, optimise: bool = True) -> None:
    """Starts the server that forks runs. Their compilation cache is the folder `compiled`. Without
    `optimise` compiling takes less time, and a step more."""
    if not optimise:
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {UNOPTIMISED}".strip()
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(compiled)
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    # The second is what a run imports when it begins, which takes seconds if torch is installed.
    multiprocessing.set_forkserver_preload([__name__, "saber_jax.train.tensorboard"])


_running: "set[Run]" = set()
_ending = threading.Event()
_starting = threading.RLock()  # Reentrant, because a signal may arrive while a run is started.


@dataclasses.dataclass(eq=False)
class Run:
    """One process of a run, started at once. What it prints is in `log`.

    Raises RuntimeError once `end_all` was called.
    """

    records: Path
    root: Path
    changes: dict[str, Any] = dataclasses.field(default_factory=dict)
    env: dict[str, str] = dataclasses.field(default_factory=dict)
    largest_file: int | None = None
    log: Path = Path()

    def __post_init__(self):
        self.root.parent.mkdir(parents=True, exist_ok=True)
        self.log = self.root.with_name(f"{self.root.name}{self.env.get('JAX_PROCESS_ID', '')}.log")
        server = multiprocessing.get_context("forkserver")
        self.process = server.Process(target=groups.lead, args=[self._train])
        with _starting:
            if _ending.is_set():
                raise RuntimeError("The benchmark was told to stop.")
            self.process.start()
            _running.add(self)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "process"}

    def _train(self) -> None:
        signal.signal(signal.SIGTERM, lambda *_: os._exit(distributed.PREEMPTED))
        said = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for stream in (1, 2):
            os.dup2(said, stream)
        os.environ.update(self.env)
        if self.largest_file is not None:
            import resource

            resource.setrlimit(resource.RLIMIT_FSIZE, (self.largest_file, -1))
        settings = config(self.records, self.root, **self.changes)
        try:
            distributed.initialize(heartbeat_seconds=settings.heartbeat_seconds)
            with distributed.failing_together():
                main.run(settings)
        except (ValueError, OSError) as error:
            sys.exit(f"saber_jax.main: {error}")

    def ended(self, seconds: float) -> int | None:
        """Waits for its status, negative for a signal; None if it took longer and was killed."""
        self.process.join(seconds)
        status = self.process.exitcode
        self.end()
        return status

    def end(self) -> None:
        """Kills it, if it is still running, and all that it started."""
        groups.end(self.process)
        _running.discard(self)

    def send(self, how: signal.Signals) -> None:
        if self.process.is_alive() and self.process.pid is not None:
            os.kill(self.process.pid, how)

    @property
    def said(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""


def end_all() -> None:
    """Ends all runs; no other can be started."""
    with _starting:
        _ending.set()
        left = list(_running)
    for run in left:
        run.end()


def end_those_of(root: Path) -> None:
    """Ends the runs in `root` that are still running."""
    for run in [run for run in _running if run.root == root]:
        run.end()


@functools.cache
def layout(records: Path) -> TrainState:
    """Shapes and shardings of the state of such a run."""
    settings = config(records, Path("unused"))
    stage = stages.build(settings, sharding.make_mesh(**settings.mesh))
    return start.layout(stage, None)


def state(records: Path, step: int) -> TrainState:
    """A state of that layout whose numbers depend on `step`."""

    def made(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        values = np.random.default_rng(step).standard_normal(leaf.shape).astype(leaf.dtype)
        return jax.device_put(values, leaf.sharding)

    tree = jax.tree.map(made, layout(records))
    return dataclasses.replace(tree, step=jax.device_put(np.int32(step), tree.step.sharding))


def numbers(held: TrainState) -> bytes:
    leaves = jax.tree.leaves((held.trainable, held.opt_state))
    return b"".join(np.asarray(leaf).tobytes() for leaf in leaves)


def whole(root: Path) -> int:
    """The newest complete step of a run, 0 if there is none."""
    found = [s for s in saved.steps(root / "sft") if not saved.problem(s, checkpoint.ITEMS)]
    return int(found[-1].name) if found else 0


def final(records: Path, root: Path) -> bytes | None:
    """All numbers of a finished run, None if it is not finished."""
    if whole(root) != STEPS:
        return None
    reading = checkpoint.Checkpoints(root / "sft", every=1, strict=True)
    try:
        restored = reading.restore(layout(records), {})
    finally:
        reading.close()
    return None if restored is None else numbers(restored)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Undisturbed:
    """The result of a run without faults, its duration, and what it leaves on the disk: bytes, and
    the number of files and folders."""

    numbers: bytes
    seconds: float
    size: int
    files: int

    @property
    def patience(self) -> float:
        """Seconds after which a run with a fault counts as hanging."""
        return 60 + 4 * self.seconds


def undisturbed(records: Path, root: Path) -> Undisturbed:
    """Runs twice, because the first run compiles. Raises RuntimeError if a run fails."""
    began, wanted = 0.0, None
    for attempt in ("first", "second"):
        began = time.perf_counter()
        run = Run(records, root / attempt)
        if run.ended(PATIENCE) != 0:
            raise RuntimeError(f"A run without any fault failed: {run.said}")
        wanted = final(records, root / attempt)
    assert wanted is not None, "it has ended well"
    seconds = time.perf_counter() - began
    left = list((root / "first").rglob("*"))
    size = sum(path.stat().st_size for path in left if path.is_file())
    return Undisturbed(numbers=wanted, seconds=seconds, size=size, files=len(left))
