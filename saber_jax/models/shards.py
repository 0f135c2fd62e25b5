"""Explicit FSDP inside `jax.shard_map`: weights are sharded and gathered where they are used.

Inside `shard_map` the network is written for the rows of one device, and a weight is that device's
shard. XLA's partitioner would all-reduce whole gradients and slice them afterwards. Here weights
are gathered over one ring of the torus at a time, and the transpose is a reduce-scatter over that
ring, with half the traffic.

Axis letters: V vocabulary   W vocabulary, padded   D width   B rows of one device   L length.
"""

from typing import TypeAlias

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from saber_jax import sharding
from saber_jax.models.parameters import logical_axes

SHARDS = "shards"  # Metadata of a parameter: (dimension from the end, rings), or nothing.
# The compiler uses a reduce-scatter for a gradient as wide as the vocabulary only if its width is a
# multiple of this. For others it uses an all-reduce, which has twice the traffic.
RING_LANES = 512
LONG_RING = 16  # A whole side of a v5e or v6e pod.

Ring: TypeAlias = tuple[str, ...]
"""The mesh axes that lie on one ring of the torus, outermost first."""


def mark(module: nnx.Module, mesh: Mesh) -> None:
    """Stores in every parameter how `mesh` shards it; its shape is still the global one."""
    for _, variable in nnx.iter_graph(module):
        if isinstance(variable, nnx.Param):
            variable.set_metadata(SHARDS, shards_of(logical_axes(variable), variable.shape, mesh))


def shards_of(
    names: tuple[str, ...], shape: tuple[int, ...], mesh: Mesh | None
) -> tuple[tuple[int, tuple[Ring, ...]], ...]:
    """The value of SHARDS for a parameter of this whole shape, with these logical axis names."""
    if mesh is None:
        return ()
    spec = sharding.parameter_spec(names, shape, mesh)
    return tuple(
        (dimension - len(shape), _rings(axes, mesh))
        for dimension, axes in enumerate(spec)
        if isinstance(axes, tuple) and sharding.shards(axes, mesh) > 1
    )


def _rings(axes: tuple[str, ...], mesh: Mesh) -> tuple[Ring, ...]:
    """The rings of these FSDP axes, outermost first. The sequence axis and the FSDP axis before it
    lie on the same ring, and one collective over both is faster than two over parts of it."""
    *outer, beside = sharding.FSDP[:-1]
    rings = (*((axis,) for axis in outer), (beside, sharding.SEQUENCE))
    used = (tuple(axis for axis in ring if axis in axes and mesh.shape[axis] > 1) for ring in rings)
    return tuple(ring for ring in used if ring)


def all_gather_weight(weight: nnx.Param) -> Array:
    """The weight, gathered from the devices that share it."""
    return _gathered(weight[...], weight.get_metadata(SHARDS, ()))


def all_gather_table(weight: nnx.Param) -> Float[Array, "D W"]:
    """A [D, V] table, gathered from devices that each have some of its rows.

    It is gathered and returned with zero columns up to W, the next multiple of RING_LANES.
    """
    value, kept = weight[...], weight.get_metadata(SHARDS, ())
    padding = -value.shape[1] % RING_LANES if kept else 0
    return _gathered(jnp.pad(value, [(0, 0), (0, padding)]), kept)


def _gathered(value: Array, kept: tuple[tuple[int, tuple[Ring, ...]], ...]) -> Array:
    """The value, gathered along one ring after the other, the innermost first.

    On rings shorter than LONG_RING it is gathered along the leading axis: XLA turns the transpose
    into a reduce-scatter there and into an all-reduce otherwise. On long rings it is the other way
    around for an axis that was moved to the front.
    """
    for dimension, rings in kept:
        short = all(jax.lax.axis_size(ring) < LONG_RING for ring in rings)
        at = 0 if short else value.ndim + dimension
        value = jnp.moveaxis(value, dimension, at)
        for ring in reversed(rings):
            value = jax.lax.all_gather(value, ring, axis=at, tiled=True)
        value = jnp.moveaxis(value, at, dimension)
    return value


def lookup(table: nnx.Param, ids: Int[Array, "B L"]) -> Float[Array, "B L D"]:
    """Rows of a [V, D] table, of which each device has some columns.

    Along the outermost ring the table is not gathered. Instead the ids are, each device looks up
    its columns for all of them, and the vectors return by all-to-all: one vector per token is sent
    instead of the table.
    """
    value, kept = table[...], table.get_metadata(SHARDS, ())
    if not kept:
        return value[ids]
    ((dimension, (ring, *inner)),) = kept
    for axes in reversed(inner):
        value = jax.lax.all_gather(value, axes, axis=value.ndim + dimension, tiled=True)
    everybodys = jax.lax.all_gather(ids, ring, axis=0, tiled=True)
    return jax.lax.all_to_all(value[everybodys], ring, split_axis=0, concat_axis=2, tiled=True)
