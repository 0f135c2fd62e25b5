"""Attention on NVIDIA GPUs: a Pallas kernel, compiled by Triton, forward and backward.

The algorithm is FlashAttention-2 (https://arxiv.org/abs/2307.08691): scores exist one block at a
time, in registers, and the backward pass computes them again from the log-sum-exp of every query.
Blocks in which the mask hides every score are skipped: a table, computed from the segment ids
before the kernel starts, lists for each block of queries the blocks of keys to visit, and the
reverse for the gradients of keys and values. A program therefore costs what its segments need,
whether they are few long examples or thousands of vision windows.

Query heads that share a kv head read the same keys and values; nothing is repeated in memory.

Axis letters: B batch   T positions   N query heads   K kv heads   H head dim.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int

from saber_jax.models import triton_kernels
from saber_jax.models.masks import Mask
from saber_jax.models.remat import ATTENTION


def packed(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    segments: Int[Array, "B T"],
    *,
    response: int,
    interpret: bool = False,
) -> Float[Array, "B T N H"]:
    """masks.packed_text, for rows that end in two regions of `response` slots, none if it is 0.

    Slots of segment 0 come out as zeros.
    """
    return _padded(q, k, v, segments, Mask.packed(q.shape[1], response), interpret)


def same_segment(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    segments: Int[Array, "B T"],
    *,
    reach: int,
    interpret: bool = False,
) -> Float[Array, "B T N H"]:
    """masks.same_segment, for segments of at most `reach` neighbouring positions.

    Slots of segment 0 come out as zeros.
    """
    return _padded(q, k, v, segments, Mask(False, reach=reach), interpret)


def _padded(q, k, v, segments, mask: Mask, interpret: bool) -> Float[Array, "B T N H"]:
    length, tile = q.shape[1], triton_kernels.tile(q.dtype)
    slots = -length % tile.own
    if slots:
        q, k, v = (jnp.pad(x, [(0, 0), (0, slots), (0, 0), (0, 0)]) for x in (q, k, v))
        segments = jnp.pad(segments, [(0, 0), (0, slots)])
    visits = mask.may_meet(tile.own, tile.visit, length + slots).sum()
    # The kernels declare no cost; `aot` reads from here what rows of one segment would visit.
    with jax.named_scope(f"flash_{visits}x{tile.own}x{tile.visit}"):
        out: Array = _flash(q, k, v, segments, mask, interpret)
    return out[:, :length]


def block_table(
    segments: Int[Array, "B T"], mask: Mask, *, rows: int, columns: int, of_keys: bool = False
) -> Int[Array, "B rows visits"]:
    """For every block of `rows` queries how many blocks of `columns` keys to visit, then which.

    With `of_keys` rows are blocks of keys and columns blocks of queries. What follows the first
    1 + count entries of a row is not to be read. Blocks that hold segments 1..2 and 3..3 cannot
    meet; blocks of padding, segment 0, meet nothing.
    """
    queries, keys = (columns, rows) if of_keys else (rows, columns)
    (q_low, q_high), (k_low, k_high) = _range(segments, queries), _range(segments, keys)
    meet = (q_low[:, :, None] <= k_high[:, None]) & (k_low[:, None] <= q_high[:, :, None])
    meet &= mask.may_meet(queries, keys, segments.shape[1])[None]
    if of_keys:
        meet = meet.swapaxes(1, 2)
    order = jnp.argsort(~meet, axis=-1, stable=True)
    return jnp.concatenate([meet.sum(-1, keepdims=True), order], -1).astype(jnp.int32)


def _range(segments, block: int):
    """The least and the greatest segment of every block; an empty range where all is padding."""
    blocks = segments.reshape(segments.shape[0], -1, block)
    least = jnp.where(blocks > 0, blocks, np.iinfo(np.int32).max).min(-1)
    return least, blocks.max(-1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _flash(q, k, v, segments, mask: Mask, interpret: bool):
    return _forward(q, k, v, segments, mask, interpret)[0]


def _flash_fwd(q, k, v, segments, mask, interpret):
    out, lse = _forward(q, k, v, segments, mask, interpret)
    out, lse = checkpoint_name((out, lse), ATTENTION)
    return out, (q, k, v, segments, out, lse)


def _flash_bwd(mask, interpret, kept, d_out):
    q, k, v, segments, out, lse = kept
    delta = jnp.einsum("BTNH,BTNH->BNT", out, d_out, preferred_element_type=jnp.float32)
    dq = _backward_q(q, k, v, segments, d_out, lse, delta, mask, interpret)
    dk, dv = _backward_kv(q, k, v, segments, d_out, lse, delta, mask, interpret)
    return dq, dk, dv, None


_flash.defvjp(_flash_fwd, _flash_bwd)


class _Blocks:
    """Grid and block specs of the kernels: a program per query head, tile of a row, and row.

    Later blocks come first. In a causal row they have the most keys, and long programs that start
    last would leave most of the chip waiting for them.
    """

    def __init__(self, q: Array, k: Array):
        self.batch, self.length, self.heads, self.head_dim = q.shape
        self.dtype = q.dtype
        self.group = self.heads // k.shape[2]
        self.tile = triton_kernels.tile(q.dtype)
        self.programs = self.length // self.tile.own
        self.grid = (self.heads, self.programs, self.batch)
        # Arrays inside of a Triton program have power-of-two sizes. Loads and stores leave out the
        # features beyond head_dim.
        self.width = 1 << (self.head_dim - 1).bit_length()

    def place(self, i):
        """Which tile of a row a program owns."""
        return self.programs - 1 - i

    def visits(self, segments: Array, mask: Mask, *, of_keys: bool = False) -> Array:
        """The block table of all programs."""
        rows, columns = self.tile.own, self.tile.visit
        return block_table(segments, mask, rows=rows, columns=columns, of_keys=of_keys)

    def block(self) -> pl.BlockSpec:
        """A program's own positions of a [B, T, N, H] array."""
        shape = (None, self.tile.own, None, self.width)
        return pl.BlockSpec(shape, lambda n, i, b: (b, self.place(i), n, 0))

    def whole(self, group: int = 1) -> pl.BlockSpec:
        """All positions of a program's head, or with `group` of its kv head."""
        shape = (None, self.length, None, self.width)
        return pl.BlockSpec(shape, lambda n, i, b: (b, 0, jax.lax.div(n, group), 0))

    def own_kv(self) -> pl.BlockSpec:
        """A program's own positions of the kv head that its query head reads."""
        shape = (None, self.tile.own, None, self.width)
        return pl.BlockSpec(
            shape, lambda n, i, b: (b, self.place(i), jax.lax.div(n, self.group), 0)
        )

    def statistic(self, whole: bool) -> pl.BlockSpec:
        """A [B, N, T] array: all positions of a head, or a program's own."""
        if whole:
            return pl.BlockSpec((None, None, self.length), lambda n, i, b: (b, n, 0))
        return pl.BlockSpec((None, None, self.tile.own), lambda n, i, b: (b, n, self.place(i)))

    def segments(self) -> pl.BlockSpec:
        return pl.BlockSpec((None, self.length), lambda n, i, b: (b, 0))

    def table(self) -> pl.BlockSpec:
        shape = (None, None, 1 + self.length // self.tile.visit)
        return pl.BlockSpec(shape, lambda n, i, b: (b, self.place(i), 0))

    def call(self, kernel, mask: Mask, out_shape, in_specs, out_specs, interpret: bool, name: str):
        precision = triton_kernels.precision(self.dtype, interpret)
        kernel = functools.partial(
            kernel,
            tile=self.tile,
            programs=self.programs,
            mask=mask,
            head_dim=self.head_dim,
            scale=self.head_dim**-0.5,
            dot=functools.partial(plgpu.dot, precision=precision),
        )
        return pl.pallas_call(
            kernel,
            grid=self.grid,
            in_specs=in_specs,
            out_specs=out_specs,
            out_shape=out_shape,
            compiler_params=plgpu.CompilerParams(
                num_warps=self.tile.warps, num_stages=self.tile.stages
            ),
            interpret=interpret,
            name=name,
        )


def _forward(q, k, v, segments, mask, interpret):
    """The output, and the base-2 log-sum-exp of every query's scaled scores, float32 [B, N, T]."""
    blocks = _Blocks(q, k)
    lse = jax.ShapeDtypeStruct((blocks.batch, blocks.heads, blocks.length), jnp.float32)
    kv = blocks.whole(blocks.group)
    return blocks.call(
        triton_kernels.forward,
        mask,
        (jax.ShapeDtypeStruct(q.shape, q.dtype), lse),
        [blocks.table(), blocks.segments(), blocks.block(), kv, kv],
        (blocks.block(), blocks.statistic(whole=False)),
        interpret,
        "flash_forward",
    )(blocks.visits(segments, mask), segments, q, k, v)


def _backward_q(q, k, v, segments, d_out, lse, delta, mask, interpret):
    blocks = _Blocks(q, k)
    kv, own = blocks.whole(blocks.group), blocks.statistic(whole=False)
    return blocks.call(
        triton_kernels.backward_q,
        mask,
        jax.ShapeDtypeStruct(q.shape, q.dtype),
        [blocks.table(), blocks.segments(), blocks.block(), kv, kv, blocks.block(), own, own],
        blocks.block(),
        interpret,
        "flash_backward_q",
    )(
        *(blocks.visits(segments, mask), segments),
        *(q, k, v, d_out, lse, delta),
    )


def _backward_kv(q, k, v, segments, d_out, lse, delta, mask, interpret):
    """Every query head adds its share to its kv head's gradient; shares are float32 if several."""
    blocks = _Blocks(q, k)
    whole, every = blocks.whole(), blocks.statistic(whole=True)
    share = jax.ShapeDtypeStruct(q.shape, jnp.float32 if blocks.group > 1 else k.dtype)
    specs = [blocks.table(), blocks.segments(), whole, blocks.own_kv(), blocks.own_kv()]
    shares = blocks.call(
        triton_kernels.backward_kv,
        mask,
        (share, share),
        [*specs, whole, every, every],
        (blocks.block(), blocks.block()),
        interpret,
        "flash_backward_kv",
    )(
        *(blocks.visits(segments, mask, of_keys=True), segments),
        *(q, k, v, d_out, lse, delta),
    )
    by_group = (*k.shape[:3], blocks.group, k.shape[3])
    return tuple(x.reshape(by_group).sum(3).astype(k.dtype) for x in shares)
