"""What digests add to the time of a save and of a restore."""

import collections
import contextlib
import dataclasses
import shutil
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from saber_jax import sharding
from saber_jax.models import saber
from saber_jax.models.config import SaberConfig, saber_config
from saber_jax.train import checkpoint, digests
from saber_jax.train.step import TrainState
from saber_jax.tree import flatten

REPEATS = 6
"""Even, so that each of the two is first in a turn as often as the other."""
LAYER = "text/blocks/"


def one_layer() -> SaberConfig:
    """The 7B network with one layer of text."""
    cfg = saber_config("7b")
    return dataclasses.replace(cfg, text=dataclasses.replace(cfg.text, layers=1))


def overhead(folder: Path, cfg: SaberConfig) -> dict[str, float]:
    """Saves and restores the text layers of `cfg`, float32 masters and a moment in bfloat16, in
    turns with and without digests. Returns medians of the seconds and of the seconds of processor
    time ("cpu"), which other programs disturb less: of saves, of restores, and of the digests
    alone, which either needs once. "added" is the share by which digests made a save or a restore
    longer."""
    state = _state(cfg)
    held = jax.tree.leaves((state.trainable, state.opt_state))
    arrays = {str(number): leaf for number, leaf in enumerate(held)}
    # The first ones compile, make threads and fill caches.
    digests.of_arrays(arrays)
    _once(folder / "first", state, collections.defaultdict(list), "with")
    seconds: dict[str, list[float]] = collections.defaultdict(list)
    # Zeros equal zeros when they are compared.
    zeros = mock.patch.object(digests, "of_arrays", lambda held: dict.fromkeys(held, 0))
    modes: dict[str, contextlib.AbstractContextManager] = {
        "with": contextlib.nullcontext(),
        "without": zeros,
    }
    for number in range(REPEATS):
        with _timed(seconds, "digests"):
            digests.of_arrays(arrays)
        for mode in sorted(modes, reverse=bool(number % 2)):
            with modes[mode]:
                _once(folder / f"{mode}{number}", state, seconds, mode)
    found = {name: statistics.median(taken) for name, taken in seconds.items()}
    added = {
        f"{what} added": found[f"{what} with"] / found[f"{what} without"] - 1
        for what in ("save", "restore")
    }
    return {"gigabytes": sum(leaf.nbytes for leaf in held) / 1e9} | found | added


def _state(cfg: SaberConfig) -> TrainState:
    everywhere = sharding.replicated(sharding.make_mesh(data=1, fsdp=-1, tensor=1))
    shapes = {n: s for n, s in flatten(saber.abstract(cfg)).items() if n.startswith(LAYER)}
    rng = np.random.default_rng(0)
    weights = {n: rng.standard_normal(s.shape, np.float32) for n, s in shapes.items()}
    moment = {name: weight.astype(jnp.bfloat16) for name, weight in weights.items()}
    state = TrainState(jnp.int32(1), weights, {}, {"mu": moment})
    return jax.block_until_ready(jax.device_put(state, everywhere))


def _once(run: Path, state: TrainState, seconds: dict[str, list[float]], mode: str) -> None:
    """One save, until it is complete on the disk, and one restore."""
    writing = checkpoint.Checkpoints(run, every=1)
    with _timed(seconds, f"save {mode}"):
        writing.save(state, {"step": 1})
        writing.close()
    reading = checkpoint.Checkpoints(run, every=1)
    with _timed(seconds, f"restore {mode}"):
        jax.block_until_ready(reading.restore(state, {}))
    reading.close()
    shutil.rmtree(run)


@contextlib.contextmanager
def _timed(seconds: dict[str, list[float]], what: str) -> Iterator[None]:
    began, worked = time.perf_counter(), time.process_time()
    yield
    seconds[what].append(time.perf_counter() - began)
    seconds[f"{what}, cpu"].append(time.process_time() - worked)
