"""What digests add to the time of a save and of a restore."""

import dataclasses
import shutil
import statistics
import time
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

REPEATS = 3
LAYER = "text/blocks/"


def one_layer() -> SaberConfig:
    """The 7B network with one layer of text."""
    cfg = saber_config("7b")
    return dataclasses.replace(cfg, text=dataclasses.replace(cfg.text, layers=1))


def overhead(folder: Path, cfg: SaberConfig) -> dict[str, float]:
    """Saves and restores the text layers of `cfg`, float32 masters and a moment in bfloat16, in
    turns with and without digests. Returns medians of the seconds, and what digests add to the time
    as a share of a save or a restore without them."""
    state = _state(cfg)
    held = jax.tree.leaves((state.trainable, state.opt_state))
    digests.of_arrays({str(number): leaf for number, leaf in enumerate(held)})  # It compiles.
    seconds: dict[str, list[float]] = {}
    for number in range(REPEATS):
        for mode in ("with", "without"):
            for what, taken in _once(folder / f"{mode}{number}", state, mode == "with").items():
                seconds.setdefault(f"{what} {mode}", []).append(taken)
    found = {name: statistics.median(taken) for name, taken in seconds.items()}
    added = {
        what: found[f"{what} with"] / found[f"{what} without"] - 1 for what in ("save", "restore")
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


def _once(run: Path, state: TrainState, digested: bool) -> dict[str, float]:
    """Seconds until a save is complete on the disk, and of a restore."""
    zeros = mock.patch.object(digests, "of_arrays", lambda arrays: dict.fromkeys(arrays, 0))
    if not digested:
        zeros.start()
    try:
        writing = checkpoint.Checkpoints(run, every=1)
        began = time.perf_counter()
        writing.save(state, {"step": 1})
        blocked = time.perf_counter() - began
        writing.close()
        save = time.perf_counter() - began
        reading = checkpoint.Checkpoints(run, every=1)
        began = time.perf_counter()
        restored = reading.restore(state, {})
        jax.block_until_ready(restored)
        restore = time.perf_counter() - began
        reading.close()
    finally:
        if not digested:
            zeros.stop()
        shutil.rmtree(run)
    return {"save": save, "start of a save": blocked, "restore": restore}
