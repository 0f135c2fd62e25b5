"""The kernels of models/triton.py: what one Triton program does, forward and backward.

A program owns some positions of one head and visits the blocks of positions that its row of the
block table lists. Refs are Pallas references into GPU memory; arrays are [positions, H] in
registers, with H padded to a power of two.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jax.typing import DTypeLike
from jaxtyping import Array

from saber_jax.models.masks import MASKED, Mask

Dot = Callable[..., Array]


@dataclasses.dataclass(frozen=True)
class Tile:
    """A program owns `own` positions, and visits `visit` at a time while those of its next visits
    are loaded: `stages` visits are in shared memory at once. Rows are padded to a multiple of
    `own`."""

    own: int
    visit: int
    warps: int
    stages: int


def tile(dtype: DTypeLike) -> Tile:
    """What a program has room for with heads of up to 128: on an A100 and an H100, 163 and 227 KiB
    of shared memory, in float32 also the 99 of smaller cards. By XLA's compiler, which splits a
    float32 operand into parts and keeps those of both (tests/aot/test_cards.py)."""
    if dtype == jnp.float32:
        return Tile(own=32, visit=32, warps=4, stages=2)
    return Tile(own=128, visit=64, warps=8, stages=2)


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


def _first(tile: Tile, programs: int):
    """The first position of this program, see `_Blocks.place` in triton.py."""
    return (programs - 1 - pl.program_id(1)) * tile.own


def _slots(start, size: int):
    return start + jnp.arange(size)


def forward(
    *refs: Any, tile: Tile, programs: int, mask: Mask, head_dim: int, scale: float, dot: Dot
) -> None:
    table, segments, q_ref, k_ref, v_ref, out_ref, lse_ref = refs
    start = _first(tile, programs)
    q, q_segments = _load(q_ref, head_dim), segments[pl.ds(start, tile.own)]
    slots = _slots(start, tile.own)

    def visit(turn, carry):
        out, top, total = carry
        first = table[1 + turn] * tile.visit
        here = pl.ds(first, tile.visit)
        k, v = _load(k_ref.at[here, :], head_dim), _load(v_ref.at[here, :], head_dim)
        seen = mask.visible(slots[:, None], _slots(first, tile.visit)[None, :])
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
        jnp.zeros((tile.own, q.shape[1]), jnp.float32),
        jnp.full((tile.own,), MASKED, jnp.float32),
        jnp.zeros((tile.own,), jnp.float32),
    )
    out, top, total = jax.lax.fori_loop(0, table[0], visit, start_with)
    total = jnp.where(total > 0, total, 1.0)
    _store(out_ref, out / total[:, None], head_dim)
    lse_ref[...] = top + jnp.log2(total)


def backward_q(
    *refs: Any, tile: Tile, programs: int, mask: Mask, head_dim: int, scale: float, dot: Dot
) -> None:
    table, segments, q_ref, k_ref, v_ref, d_out_ref, lse_ref, delta_ref, dq_ref = refs
    start = _first(tile, programs)
    q, d_out = _load(q_ref, head_dim), _load(d_out_ref, head_dim)
    q_segments, slots = segments[pl.ds(start, tile.own)], _slots(start, tile.own)
    lse, delta = lse_ref[...], delta_ref[...]

    def visit(turn, dq):
        first = table[1 + turn] * tile.visit
        here = pl.ds(first, tile.visit)
        k, v = _load(k_ref.at[here, :], head_dim), _load(v_ref.at[here, :], head_dim)
        seen = mask.visible(slots[:, None], _slots(first, tile.visit)[None, :])
        seen &= q_segments[:, None] == segments[here][None, :]
        scores = dot(q, k, trans_b=True) * (scale * math.log2(math.e))
        weights = jnp.where(seen, jnp.exp2(scores - lse[:, None]), 0.0)
        d_scores = weights * (dot(d_out, v, trans_b=True) - delta[:, None])
        return dq + dot(d_scores.astype(k.dtype), k)

    dq = jax.lax.fori_loop(0, table[0], visit, jnp.zeros((tile.own, q.shape[1]), jnp.float32))
    _store(dq_ref, dq * scale, head_dim)


def backward_kv(
    *refs: Any, tile: Tile, programs: int, mask: Mask, head_dim: int, scale: float, dot: Dot
) -> None:
    """Scores are [keys, queries] here, so that no product transposes an array in registers."""
    table, segments, q_ref, k_ref, v_ref, d_out_ref, lse_ref, delta_ref, dk_ref, dv_ref = refs
    start = _first(tile, programs)
    k, v = _load(k_ref, head_dim), _load(v_ref, head_dim)
    k_segments, slots = segments[pl.ds(start, tile.own)], _slots(start, tile.own)

    def visit(turn, carry):
        dk, dv = carry
        first = table[1 + turn] * tile.visit
        here = pl.ds(first, tile.visit)
        q, d_out = _load(q_ref.at[here, :], head_dim), _load(d_out_ref.at[here, :], head_dim)
        seen = mask.visible(_slots(first, tile.visit)[None, :], slots[:, None])
        seen &= segments[here][None, :] == k_segments[:, None]
        scores = dot(k, q, trans_b=True) * (scale * math.log2(math.e))
        weights = jnp.where(seen, jnp.exp2(scores - lse_ref[here][None, :]), 0.0)
        dv += dot(weights.astype(d_out.dtype), d_out)
        d_scores = weights * (dot(v, d_out, trans_b=True) - delta_ref[here][None, :])
        return dk + dot(d_scores.astype(q.dtype), q), dv

    zeros = jnp.zeros((tile.own, k.shape[1]), jnp.float32)
    dk, dv = jax.lax.fori_loop(0, table[0], visit, (zeros, zeros))
    _store(dk_ref, dk * scale, head_dim)
    _store(dv_ref, dv, head_dim)
