"""A batch in parts that go through the devices one after another (config.compute.microbatches)."""

import functools
from collections.abc import Callable
from typing import TypeVar

import jax
from jaxtyping import Array

from saber_jax.batch import Batch

Rows = TypeVar("Rows")


def split(batch: Batch, count: int) -> Batch:
    """Every array [R, ...] of the batch as [count, R / count, ...]. A part takes every `count`-th
    row, so that rows stay on their device.

    Raises ValueError where rows do not divide.
    """
    return jax.tree.map(functools.partial(_split, count=count), batch)


def scored(score: Callable[[Batch], Rows], batch: Batch, count: int) -> Rows:
    """`score(batch)`, a tree of arrays with one entry per row, computed part by part.

    For what has no gradient: a whole batch at once would take more memory than a training step.
    """
    if count == 1:
        return score(batch)
    return jax.tree.map(_joined, jax.lax.map(score, split(batch, count)))


def _split(rows: Array, *, count: int) -> Array:
    if len(rows) % count:
        raise ValueError(
            f"config.data.batch_rows={len(rows)} must be a multiple of "
            f"config.compute.microbatches={count}."
        )
    return rows.reshape(len(rows) // count, count, *rows.shape[1:]).swapaxes(0, 1)


def _joined(parts: Array) -> Array:
    """The inverse of `_split`."""
    return parts.swapaxes(0, 1).reshape(-1, *parts.shape[2:])
