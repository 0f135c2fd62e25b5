"""The kernels of models/triton.py: what one Triton program does, forward and backward.

A program owns OUTER positions of one head and visits the blocks of INNER positions that its row of
the block table lists. Refs are Pallas references into GPU memory; arrays are [positions, H] in
registers, with H padded to a power of two.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jax.typing import DTypeLike
from jaxtyping import Array

from saber_jax.models.masks import Mask

# Positions that a program owns, and positions that it visits at a time. Rows are padded to a
# multiple of OUTER.
OUTER, INNER = 128, 64
MASKED = -1e30  # Finite, because minus infinity minus itself is NaN.

Dot = Callable[..., Array]


def _load(ref, head_dim: int):
    """[positions, H], with zeros for the features that pad H to a power of two."""
    real = (jnp.arange(ref.shape[-1]) < head_dim)[None, :]
    return plgpu.load(ref, mask=real, other=0.0)


def _store(ref, value, head_dim: int) -> None:
    real = (jnp.arange(ref.shape[-1]) < head_dim)[None, :]
    plgpu.store(ref, value.astype(ref.dtype), mask=real)


def precision(dtype: DTypeLike, interpret: bool) -> Any:
    """The precision of matrix products. Products of float32 take three passes of the tensor cores,
    which is as exact as a CPU; a single pass would round operands to 10 bits."""
    if dtype != jnp.float32:
        return None
    exact = jax.lax.DotAlgorithmPreset.TF32_TF32_F32_X3
    return jax.lax.Precision.HIGHEST if interpret else exact


def _own(outer: int):
    """The first position of this program, see `_Blocks.place` in triton.py."""
    return (outer - 1 - pl.program_id(1)) * OUTER


def _slots(start, size: int):
    return start + jnp.arange(size)


def forward(*refs: Any, mask: Mask, head_dim: int, outer: int, scale: float, dot: Dot) -> None:
    table, segments, q_ref, k_ref, v_ref, out_ref, lse_ref = refs
    start = _own(outer)
    q, q_segments = _load(q_ref, head_dim), segments[pl.ds(start, OUTER)]
    slots = _slots(start, OUTER)

    def visit(turn, carry):
        out, top, total = carry
        first = table[1 + turn] * INNER
        here = pl.ds(first, INNER)
        k, v = _load(k_ref.at[here, :], head_dim), _load(v_ref.at[here, :], head_dim)
        seen = mask.visible(slots[:, None], _slots(first, INNER)[None, :])
        seen &= q_segments[:, None] == segments[here][None, :]
        scores = dot(q, k, trans_b=True) * (scale * math.log2(math.e))
        scores = jnp.where(seen, scores, MASKED)
        higher = jnp.maximum(top, scores.max(-1))
        # A query that has not seen any key yet has top = MASKED, and its weights would be 1.
        weights = jnp.where(seen, jnp.exp2(scores - higher[:, None]), 0.0)
        shrink = jnp.exp2(top - higher)
        out = out * shrink[:, None] + dot(weights.astype(v.dtype), v)
        return out, higher, total * shrink + weights.sum(-1)

    start_with = (
        jnp.zeros((OUTER, q.shape[1]), jnp.float32),
        jnp.full((OUTER,), MASKED, jnp.float32),
        jnp.zeros((OUTER,), jnp.float32),
    )
    out, top, total = jax.lax.fori_loop(0, table[0], visit, start_with)
    total = jnp.where(total > 0, total, 1.0)
    _store(out_ref, out / total[:, None], head_dim)
    lse_ref[...] = top + jnp.log2(total)


def backward_q(*refs: Any, mask: Mask, head_dim: int, outer: int, scale: float, dot: Dot) -> None:
    table, segments, q_ref, k_ref, v_ref, d_out_ref, lse_ref, delta_ref, dq_ref = refs
    start = _own(outer)
    q, d_out = _load(q_ref, head_dim), _load(d_out_ref, head_dim)
    q_segments, slots = segments[pl.ds(start, OUTER)], _slots(start, OUTER)
    lse, delta = lse_ref[...], delta_ref[...]

    def visit(turn, dq):
        first = table[1 + turn] * INNER
        here = pl.ds(first, INNER)
        k, v = _load(k_ref.at[here, :], head_dim), _load(v_ref.at[here, :], head_dim)
        seen = mask.visible(slots[:, None], _slots(first, INNER)[None, :])
        seen &= q_segments[:, None] == segments[here][None, :]
        scores = dot(q, k, trans_b=True) * (scale * math.log2(math.e))
        weights = jnp.where(seen, jnp.exp2(scores - lse[:, None]), 0.0)
        d_scores = weights * (dot(d_out, v, trans_b=True) - delta[:, None])
        return dq + dot(d_scores.astype(k.dtype), k)

    dq = jax.lax.fori_loop(0, table[0], visit, jnp.zeros((OUTER, q.shape[1]), jnp.float32))
    _store(dq_ref, dq * scale, head_dim)


def backward_kv(*refs: Any, mask: Mask, head_dim: int, outer: int, scale: float, dot: Dot) -> None:
    """Scores are [keys, queries] here, so that no product transposes an array in registers."""
    table, segments, q_ref, k_ref, v_ref, d_out_ref, lse_ref, delta_ref, dk_ref, dv_ref = refs
    start = _own(outer)
    k, v = _load(k_ref, head_dim), _load(v_ref, head_dim)
    k_segments, slots = segments[pl.ds(start, OUTER)], _slots(start, OUTER)

    def visit(turn, carry):
        dk, dv = carry
        first = table[1 + turn] * INNER
        here = pl.ds(first, INNER)
        q, d_out = _load(q_ref.at[here, :], head_dim), _load(d_out_ref.at[here, :], head_dim)
        seen = mask.visible(_slots(first, INNER)[None, :], slots[:, None])
        seen &= segments[here][None, :] == k_segments[:, None]
        scores = dot(k, q, trans_b=True) * (scale * math.log2(math.e))
        weights = jnp.where(seen, jnp.exp2(scores - lse_ref[here][None, :]), 0.0)
        dv += dot(weights.astype(d_out.dtype), d_out)
        d_scores = weights * (dot(v, d_out, trans_b=True) - delta_ref[here][None, :])
        return dk + dot(d_scores.astype(q.dtype), q), dv

    zeros = jnp.zeros((OUTER, k.shape[1]), jnp.float32)
    dk, dv = jax.lax.fori_loop(0, table[0], visit, (zeros, zeros))
    _store(dk_ref, dk * scale, head_dim)
    _store(dv_ref, dv, head_dim)
