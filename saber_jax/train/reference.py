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
from jaxtyping import Array, Float, UInt32
from tqdm import tqdm

from saber_jax.train.step import Batch, flatten


def weights_digest(params: dict) -> str:
    """Sixteen hex digits that change with any change of any parameter, however they are sharded.

    Sums of bits modulo 2**32, each weighted by where it stands: unlike floating-point sums they do
    not depend on the order, so on another mesh the digest is the same.
    """

    @jax.jit
    def sums(flat: dict[str, Array]) -> UInt32[Array, " N"]:
        return jnp.stack([_bit_sum(leaf) for _, leaf in sorted(flat.items())])

    flat = flatten(params)
    values = np.asarray(jax.device_get(sums(flat)))
    text = json.dumps(dict(zip(sorted(flat), values.tolist(), strict=True)))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _bit_sum(leaf: Float[Array, "..."]) -> UInt32[Array, ""]:
    bits = jax.lax.bitcast_convert_type(leaf.astype(jnp.float32), jnp.uint32)
    place = jnp.zeros((), jnp.uint32)
    for axis, size in enumerate(leaf.shape):
        place = place * size + jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis)
    # An odd weight has an inverse modulo 2**32, so that no change of one number goes unseen.
    return (bits * (2 * place + 1)).sum(dtype=jnp.uint32)


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
    # The first process decides: on disks of their own the others may or may not have the file.
    if multihost_utils.broadcast_one_to_all(np.int32(cache.exists())):
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
    quiet = jax.process_index() != 0
    bar = tqdm(batches, total=total, desc="reference log-probs", unit="batch", disable=quiet)
    for number, batch in enumerate(bar):
        values = np.stack(
            [multihost_utils.process_allgather(x, tiled=True) for x in log_probs(batch)], -1
        )
        mine = rows[number * batch_rows : (number + 1) * batch_rows]
        for row, indices in zip(values, mine, strict=False):
            result[indices] = row[: len(indices)]
    if np.isnan(result).any():
        raise RuntimeError(f"{int(np.isnan(result).any(1).sum())} pairs got no reference log-prob.")
    if jax.process_index() == 0:
        temporary = cache.with_name(f"{cache.stem}.{os.getpid()}.npz")
        np.savez(temporary, log_probs=result, fingerprint=fingerprint)
        os.replace(temporary, cache)
    return result
