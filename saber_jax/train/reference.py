"""log pi_ref of every preference pair, computed once before training and kept beside the run.

The reference never sits in memory next to the policy: its two numbers a pair travel with the batch.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Array, Float
from tqdm import tqdm

from saber_jax.train.step import Batch, flatten


def weights_digest(params: dict) -> str:
    """Sixteen hex digits that change with any change worth noticing in any parameter."""

    @jax.jit
    def sums(flat: dict[str, Array]) -> dict[str, Float[Array, "2"]]:
        return {
            name: jnp.stack([jnp.abs(leaf).sum(), jnp.square(leaf).sum()])
            for name, leaf in flat.items()
        }

    values = jax.device_get(sums(flatten(params)))
    text = json.dumps({name: [float(x) for x in value] for name, value in sorted(values.items())})
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def reference_log_probs(
    log_probs: Callable[[Batch], tuple[Float[Array, "B P"], Float[Array, "B P"]]],
    batches: Iterator[Batch],
    rows: list[list[int]],
    *,
    batch_rows: int,
    pairs: int,
    cache: Path,
    fingerprint: str,
) -> Float[np.ndarray, "N 2"]:
    """(chosen, rejected) sums in nats for each of `pairs` pairs, from `cache` where it has them.

    `rows[r]` lists the pairs of global row r; `batches` holds those rows in order. A cache made
    from other weights, pairs or records is refused by name, never quietly used.
    """
    if cache.exists():
        stored = np.load(cache)
        if str(stored["fingerprint"]) != fingerprint:
            raise ValueError(
                f"{cache} holds reference log-probs of {stored['fingerprint']}, but this run's "
                f"weights, pairs and records are {fingerprint}. Delete the file to compute them "
                "again, or use a --workdir of its own."
            )
        return stored["log_probs"]
    result = np.full((pairs, 2), np.nan, np.float32)
    total = -(-len(rows) // batch_rows)
    for number, batch in enumerate(
        tqdm(batches, total=total, desc="reference log-probs", unit="batch")
    ):
        values = np.stack(
            [multihost_utils.process_allgather(x, tiled=True) for x in log_probs(batch)], -1
        )
        for row, indices in zip(values, rows[number * batch_rows :], strict=False):
            result[indices] = row[: len(indices)]
    if np.isnan(result).any():
        raise RuntimeError(f"{int(np.isnan(result).any(1).sum())} pairs got no reference log-prob.")
    if jax.process_index() == 0:
        temporary = cache.with_name(f"{cache.stem}.{os.getpid()}.npz")
        np.savez(temporary, log_probs=result, fingerprint=fingerprint)
        os.replace(temporary, cache)
    return result
