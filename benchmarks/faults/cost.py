"""What digests add to the time of a save and of a restore."""

import shutil
import statistics
import time
from pathlib import Path

import jax
import jax.numpy as jnp

from saber_jax import sharding
from saber_jax.train import checkpoint, saved
from saber_jax.train.step import TrainState

REPEATS = 3


def overhead(folder: Path, megabytes: int) -> dict[str, float]:
    """Saves and restores a state of `megabytes` in 16 arrays. Returns medians: the time that
    digests take as a share of the rest of a save and of a restore, and digested GB per second."""
    everywhere = sharding.replicated(sharding.make_mesh(data=1, fsdp=-1, tensor=1))
    size = megabytes * 2**20 // 4 // 16
    arrays = {f"text/w{i}": jnp.sin(jnp.arange(size, dtype=jnp.float32) + i) for i in range(16)}
    weights, moments = (dict(list(arrays.items())[half::2]) for half in range(2))
    state = jax.device_put(TrainState(jnp.int32(1), weights, {}, moments), everywhere)
    jax.block_until_ready(state.trainable)
    held = saved.named(state.params, "params") | saved.named(state.opt_state, "opt_state")
    saved.described(held)  # Compiles, on an accelerator.
    digest, save, restore = [], [], []
    for number in range(REPEATS):
        run = folder / str(number)
        began = time.perf_counter()
        saved.described(held)
        digest.append(time.perf_counter() - began)
        writing = checkpoint.Checkpoints(run, every=1)
        began = time.perf_counter()
        writing.save(state, {"step": 1})
        writing.close()
        save.append(time.perf_counter() - began)
        reading = checkpoint.Checkpoints(run, every=1)
        began = time.perf_counter()
        reading.restore(state, {})
        restore.append(time.perf_counter() - began)
        reading.close()
        shutil.rmtree(run)
    digests = statistics.median(digest)
    return {
        "save": digests / (statistics.median(save) - digests),
        "restore": digests / (statistics.median(restore) - digests),
        "GB_per_second": megabytes / 1024 / digests,
    }
