"""Weights cut up the way a CPU reads them fastest while it decodes a few rows.

Such a product takes as long as its matrix takes to be read, and XLA's kernel goes down some of the
columns at a time, from one row of memory to the next. Where every 64 columns lie together they are
read in one go: 512 x 2048 float32, not in the cache, times 8 rows takes 0.26 ms of a core instead
of 0.5.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from saber_jax.models.lora import Adapted
from saber_jax.models.parameters import IN_AXES

COLUMNS = 64


class Tiled(nnx.Module):
    """A weight in tiles; stands where the weight would stand in a module."""

    def __init__(self, w: nnx.Param):
        split = w.get_metadata(IN_AXES)
        self.inputs, self.out = w.shape[:split], w.shape[split:]
        matrix = w[...].reshape(math.prod(self.inputs), -1, COLUMNS)
        self.tiles = nnx.Param(matrix.swapaxes(0, 1))

    def project(self, _: str, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """The product over x's last dimensions, the inputs, whatever letters the einsum has."""
        count, inputs, _ = self.tiles.shape
        rows = x.reshape(-1, inputs)
        # Told that all tiles read the same rows, XLA would put the matrix together again.
        read = jax.lax.optimization_barrier(jnp.broadcast_to(rows[None], (count, *rows.shape)))
        y = jnp.matmul(read, self.tiles[...]).swapaxes(0, 1)
        return y.reshape(*x.shape[: x.ndim - len(self.inputs)], *self.out)


def tile(module: nnx.Module) -> None:
    """Cuts up all weights of linear layers; what is no multiple of a tile stays, and adapters."""
    for _, part in list(nnx.iter_modules(module)):
        if isinstance(part, Adapted):
            continue
        for name, w in list(vars(part).items()):
            if isinstance(w, nnx.Param) and _fits(w):
                setattr(part, name, Tiled(w))


def _fits(w: nnx.Param) -> bool:
    split = w.get_metadata().get(IN_AXES)
    return split is not None and math.prod(w.shape[split:]) % COLUMNS == 0
