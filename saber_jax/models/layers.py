"""Layers that the towers share: projections, norms, the scan over layers. D is their width."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from saber_jax.models.lora import Adapted
from saber_jax.models.remat import INPUT, Remat, rematerialised
from saber_jax.models.shards import all_gather_weight
from saber_jax.models.tiles import Tiled


def project(
    equation: str, x: Array, w: nnx.Param | Adapted | Tiled, b: nnx.Param | None = None
) -> Array:
    """An einsum of activations and a weight, plus a bias over the trailing dimensions."""
    y = (
        jnp.einsum(equation, x, all_gather_weight(w))
        if isinstance(w, nnx.Param)
        else w.project(equation, x)
    )
    return y if b is None else y + jnp.broadcast_to(b[...], y.shape)


def rms_norm(x: Float[Array, "... D"], scale: nnx.Param, eps: float) -> Float[Array, "... D"]:
    """RMSNorm, https://arxiv.org/abs/1910.07467; normalised in float32, scaled in x's dtype."""
    x32 = x.astype(jnp.float32)
    normed = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    return normed.astype(x.dtype) * jnp.broadcast_to(scale[...], x.shape)


def layer_norm(
    x: Float[Array, "... D"], scale: nnx.Param, bias: nnx.Param, eps: float
) -> Float[Array, "... D"]:
    """LayerNorm, https://arxiv.org/abs/1607.06450, with statistics in float32."""
    x32 = x.astype(jnp.float32)
    centred = x32 - jnp.mean(x32, axis=-1, keepdims=True)
    normed = centred * jax.lax.rsqrt(jnp.mean(centred * centred, axis=-1, keepdims=True) + eps)
    y = normed * jnp.broadcast_to(scale[...], x.shape) + jnp.broadcast_to(bias[...], x.shape)
    return y.astype(x.dtype)


def gelu(x: Array) -> Array:
    """The exact GELU; jax.nn.gelu's default approximation is off by 5e-4."""
    return jax.nn.gelu(x, approximate=False)


MOST_UNROLLED = 4


def scan_layers(layer: Callable, carry: Any, xs: Any, *, remat: Remat) -> tuple[Any, Any]:
    """`jax.lax.scan` over stacked layers, which keep for the backward pass what `remat` says.

    A few layers are unrolled: then the loop's copies of what the backward pass needs would cost
    more (a third of the tiny network's step on CPU) than compiling one layer several times.
    """

    def body(carry, x):
        return layer(checkpoint_name(carry, INPUT), x)

    layers = jax.tree.leaves(xs)[0].shape[0]
    return jax.lax.scan(rematerialised(body, remat), carry, xs, unroll=layers <= MOST_UNROLLED)
