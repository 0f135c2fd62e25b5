"""From hidden states to log-probabilities of targets, a chunk of targets at a time.

The vocabulary projection has the widest output of the network: float32 logits of a whole row are
larger than all other activations of a layer. Only the logits of targets are computed, one chunk of
targets at a time.

Axis letters: B rows   T targets of a row   C targets of a chunk   N chunks   D width
V vocabulary   W columns of the projection: V, or more, where it is padded.
"""

import functools
from collections.abc import Callable
from typing import cast

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from saber_jax.models.masks import MASKED

Measure = Callable[[Float[Array, "B C W"], Int[Array, "B C"], int], Array]
"""(logits, tokens, V) -> a value of every target."""


def log_probs(
    hidden: Float[Array, "B T D"],
    head: Float[Array, "D W"],
    tokens: Int[Array, "B T"],
    *,
    vocab: int,
    chunk: int,
    keep: bool = False,
) -> Float[Array, "B T"]:
    """log softmax(hidden @ head)[token] over the first `vocab` columns, float32.

    The backward pass needs the derivative with respect to every logit. It recomputes them, which
    adds a third to the projection's FLOPs, or with `keep` uses B T W stored ones in `hidden`'s
    dtype.
    """
    if keep:
        return _kept(hidden, head, tokens, vocab, chunk)
    return over_chunks(log_prob, hidden, head, tokens, vocab=vocab, chunk=chunk)


def weighted_nll(
    hidden: Float[Array, "B T D"],
    head: Float[Array, "D W"],
    tokens: Int[Array, "B T"],
    weights: Float[Array, "B T"],
    *,
    vocab: int,
    chunk: int,
) -> tuple[Float[Array, " 1"], Float[Array, "B T"]]:
    """The sum of -weights * log_probs, and `log_probs` without a gradient.

    Because the weights are known in advance, a chunk's gradients are computed together with its
    logits, which are neither recomputed nor kept. In return, the whole gradient of the projection
    is read and written for every chunk.
    """
    weights = jax.lax.stop_gradient(weights)
    total, values = cast(
        "tuple[Array, Array]", _weighted(hidden, head, tokens, weights, vocab, chunk)
    )
    return total, jax.lax.stop_gradient(values)


def over_chunks(
    measure: Measure,
    hidden: Float[Array, "B T D"],
    head: Float[Array, "D W"],
    tokens: Int[Array, "B T"],
    *,
    vocab: int,
    chunk: int,
) -> Array:
    """`measure` of every target. Only one chunk's logits exist at a time, also in the backward."""

    @jax.checkpoint
    def of_chunk(_, xs):
        return None, measure(_logits(xs[0], head), xs[1], vocab)

    _, values = jax.lax.scan(of_chunk, None, (_split(hidden, chunk), _split(tokens, chunk)))
    return _join(values)


def log_prob(
    logits: Float[Array, "B C W"], tokens: Int[Array, "B C"], vocab: int
) -> Float[Array, "B C"]:
    picked = jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]
    return picked - jax.nn.logsumexp(_masked(logits, vocab), axis=-1)


def entropy(logits: Float[Array, "B C W"], vocab: int) -> Float[Array, "B C"]:
    """Entropy of the predicted distribution at each target."""
    logits = _masked(logits, vocab)
    return jax.nn.logsumexp(logits, axis=-1) - (jax.nn.softmax(logits) * logits).sum(-1)


def log_prob_and_entropy(
    logits: Float[Array, "B C W"], tokens: Int[Array, "B C"], vocab: int
) -> Float[Array, "B C 2"]:
    return jnp.stack([log_prob(logits, tokens, vocab), entropy(logits, vocab)], axis=-1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _kept(hidden, head, tokens, vocab, chunk):
    return over_chunks(log_prob, hidden, head, tokens, vocab=vocab, chunk=chunk)


def _kept_forward(hidden, head, tokens, vocab, chunk):
    def of_chunk(_, xs):
        logits = _logits(xs[0], head)
        return None, (log_prob(logits, xs[1], vocab), _slopes(logits, xs[1], vocab, hidden.dtype))

    _, (values, slopes) = jax.lax.scan(
        of_chunk, None, (_split(hidden, chunk), _split(tokens, chunk))
    )
    return _join(values), (hidden, head, slopes)


def _kept_backward(vocab, chunk, kept, weights):
    """Two matrix products. Cotangents scale vectors of width D, not the stored derivatives."""
    hidden, head, slopes = kept
    weights, dtype = weights[..., None], hidden.dtype
    back = jnp.einsum("NBCW,DW->NBCD", slopes, head, preferred_element_type=jnp.float32)
    weighted = _split((hidden * weights).astype(dtype), chunk)
    d_head = jnp.einsum("NBCD,NBCW->DW", weighted, slopes, preferred_element_type=jnp.float32)
    return (_join(back) * weights).astype(dtype), d_head.astype(head.dtype), None


_kept.defvjp(_kept_forward, _kept_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _weighted(hidden, head, tokens, weights, vocab, chunk):
    values = over_chunks(log_prob, hidden, head, tokens, vocab=vocab, chunk=chunk)
    return -(weights * values).sum()[None], values


def _weighted_forward(hidden, head, tokens, weights, vocab, chunk):
    dtype = hidden.dtype

    def of_chunk(d_head, xs):
        hidden, tokens, weights = xs
        logits = _logits(hidden, head)
        slopes, weights = _slopes(logits, tokens, vocab, dtype), -weights[..., None]
        back = jnp.einsum("BCW,DW->BCD", slopes, head, preferred_element_type=jnp.float32)
        d_head += jnp.einsum(
            "BCD,BCW->DW",
            (hidden * weights).astype(dtype),
            slopes,
            preferred_element_type=jnp.float32,
        ).astype(head.dtype)
        return d_head, (log_prob(logits, tokens, vocab), (back * weights).astype(dtype))

    parts = tuple(_split(x, chunk) for x in (hidden, tokens, weights))
    d_head, (values, back) = jax.lax.scan(of_chunk, jnp.zeros_like(head), parts)
    values = _join(values)
    return (-(weights * values).sum()[None], values), (_join(back), d_head)


def _weighted_backward(vocab, chunk, gradients, cotangents):
    back, d_head = gradients
    scale = cotangents[0]
    return (back * scale).astype(back.dtype), (d_head * scale).astype(d_head.dtype), None, None


_weighted.defvjp(_weighted_forward, _weighted_backward)


def _slopes(
    logits: Float[Array, "B C W"], tokens: Int[Array, "B C"], vocab: int, dtype: DTypeLike
) -> Float[Array, "B C W"]:
    """d log_prob / d logits. The difference is computed before rounding to `dtype`, because 1 - p
    of a confident target would round to 0 from p = 0.998 on."""
    chances = jax.nn.softmax(_masked(logits, vocab))
    return (jax.nn.one_hot(tokens, logits.shape[-1]) - chances).astype(dtype)


def _logits(hidden: Float[Array, "B C D"], head: Float[Array, "D W"]) -> Float[Array, "B C W"]:
    return jnp.einsum("BCD,DW->BCW", hidden, head, preferred_element_type=jnp.float32)


def _masked(logits: Float[Array, "B C W"], vocab: int) -> Float[Array, "B C W"]:
    """Logits with padding columns masked, so that they do not contribute to a sum.

    Not used before a target's own logit is gathered: XLA would write a second copy of the logits.
    """
    columns = logits.shape[-1]
    return logits if columns == vocab else jnp.where(jnp.arange(columns) < vocab, logits, MASKED)


def _split(x: Array, chunk: int) -> Array:
    """[B, T, ...] -> [N, B, C, ...]"""
    rows, targets = x.shape[:2]
    return jnp.moveaxis(x.reshape(rows, targets // chunk, chunk, *x.shape[2:]), 1, 0)


def _join(x: Array) -> Array:
    """[N, B, C, ...] -> [B, T, ...]"""
    return jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1, *x.shape[3:])
