"""From hidden states to log-probabilities of targets, a chunk of targets at a time.

The vocabulary projection is the widest product of the network: logits of a whole row in float32 are
larger than everything else that a layer computes. Only the targets' are computed, and those of one
chunk at a time.

Axis letters: B rows   T targets of a row   C targets of a chunk   N chunks   D width
V vocabulary.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

Measure = Callable[[Float[Array, "B C V"], Int[Array, "B C"]], Array]
"""(logits, tokens) -> something of every target."""


def log_probs(
    hidden: Float[Array, "B T D"],
    head: Float[Array, "D V"],
    tokens: Int[Array, "B T"],
    *,
    chunk: int,
    keep: bool = False,
) -> Float[Array, "B T"]:
    """log softmax(hidden @ head)[token], float32.

    The backward pass needs the derivative of every logit. It computes them again, a fourth of the
    projection's work, or with `keep` finds B T V of them in `hidden`'s dtype.
    """
    if keep:
        return _kept(hidden, head, tokens, chunk)
    return over_chunks(log_prob, hidden, head, tokens, chunk=chunk)


def over_chunks(
    measure: Measure,
    hidden: Float[Array, "B T D"],
    head: Float[Array, "D V"],
    tokens: Int[Array, "B T"],
    *,
    chunk: int,
) -> Array:
    """`measure` of every target. Logits live as long as their chunk, in the backward pass too."""

    @jax.checkpoint
    def of_chunk(_, xs):
        return None, measure(_logits(xs[0], head), xs[1])

    _, values = jax.lax.scan(of_chunk, None, (_split(hidden, chunk), _split(tokens, chunk)))
    return _join(values)


def log_prob(logits: Float[Array, "B C V"], tokens: Int[Array, "B C"]) -> Float[Array, "B C"]:
    picked = jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]
    return picked - jax.nn.logsumexp(logits, axis=-1)


def entropy(logits: Float[Array, "B C V"]) -> Float[Array, "B C"]:
    """Of the distribution that each target is drawn from."""
    return jax.nn.logsumexp(logits, axis=-1) - (jax.nn.softmax(logits) * logits).sum(-1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _kept(hidden, head, tokens, chunk):
    return over_chunks(log_prob, hidden, head, tokens, chunk=chunk)


def _kept_forward(hidden, head, tokens, chunk):
    def of_chunk(_, xs):
        hidden, tokens = xs
        logits = _logits(hidden, head)
        # d log_prob / d logits. The difference is taken before rounding, or a sure target's would
        # be lost: 1 - p rounds to 0 from p = 0.998 on.
        slope = jax.nn.one_hot(tokens, head.shape[1]) - jax.nn.softmax(logits)
        return None, (log_prob(logits, tokens), slope.astype(hidden.dtype))

    _, (values, slopes) = jax.lax.scan(
        of_chunk, None, (_split(hidden, chunk), _split(tokens, chunk))
    )
    return _join(values), (hidden, head, slopes)


def _kept_backward(chunk, kept, weights):
    """Two matrix products. Targets' weights scale narrow vectors, never the slopes."""
    hidden, head, slopes = kept
    weights, dtype = weights[..., None], hidden.dtype
    back = jnp.einsum("NBCV,DV->NBCD", slopes, head, preferred_element_type=jnp.float32)
    weighted = _split((hidden * weights).astype(dtype), chunk)
    d_head = jnp.einsum("NBCD,NBCV->DV", weighted, slopes, preferred_element_type=jnp.float32)
    return (_join(back) * weights).astype(dtype), d_head.astype(head.dtype), None


_kept.defvjp(_kept_forward, _kept_backward)


def _logits(hidden: Float[Array, "B C D"], head: Float[Array, "D V"]) -> Float[Array, "B C V"]:
    return jnp.einsum("BCD,DV->BCV", hidden, head, preferred_element_type=jnp.float32)


def _split(x: Array, chunk: int) -> Array:
    """[B, T, ...] -> [N, B, C, ...]"""
    rows, targets = x.shape[:2]
    return jnp.moveaxis(x.reshape(rows, targets // chunk, chunk, *x.shape[2:]), 1, 0)


def _join(x: Array) -> Array:
    """[N, B, C, ...] -> [B, T, ...]"""
    return jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1, *x.shape[3:])
