"""Attention on a CPU that skips at run time what the mask would discard. It has no gradient.

Every segment is a run of neighbouring positions, so the keys that a block of queries can see are
one span. Spans of a few sizes are compiled, and each block of queries takes the smallest that holds
its own. Causal, in blocks of 2; `x` is computed, and `.` would have to be as well if only the
length of the longest segment were known:

    keys            1 1 2 2 2 2 3 3
    queries 1, 1    x x
            2, 2    . . x x
            2, 2    . . x x x x
            3, 3        . . . . x x

A running softmax over blocks of keys would compute as little, but XLA does not spread its steps
over the cores.

Axis letters: B batch   L positions   N heads   K kv heads   G query heads per kv head   H head dim
Q queries of a block   S keys of a span   n blocks of a row.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from saber_jax.models.masks import MASKED

BLOCK = 128
MOST_BLOCK = 256  # The scores of a longer one would not stay in a core's caches.


def packed(
    q: Float[Array, "B L N H"],
    k: Float[Array, "B L K H"],
    v: Float[Array, "B L K H"],
    segments: Int[Array, "B L"],
    *,
    longest: int | None = None,
) -> Float[Array, "B L N H"]:
    """masks.packed_text without branches, for segments of at most `longest` positions."""
    reach = min(longest or q.shape[1], q.shape[1])
    return _attend(q, k, v, segments, block=BLOCK, most=reach - 1 + BLOCK, causal=True)


def same_segment(
    q: Float[Array, "B L N H"],
    k: Float[Array, "B L N H"],
    v: Float[Array, "B L N H"],
    segments: Int[Array, "B L"],
    *,
    reach: int,
) -> Float[Array, "B L N H"]:
    """masks.same_segment, for segments of at most `reach` positions; fastest if most have as many,
    because then each block can be one segment or an equal part of one."""
    block = -(-reach // -(-reach // MOST_BLOCK))
    return _attend(q, k, v, segments, block=block, most=2 * (reach - 1) + block, causal=False)


def _attend(q, k, v, segments, *, block: int, most: int, causal: bool) -> Float[Array, "B L N H"]:
    """In blocks of `block` queries, each of which sees a span of at most `most` keys."""
    batch, length, heads, head_dim = q.shape
    kv_heads, group, blocks = k.shape[2], heads // k.shape[2], -(-length // block)
    fill = [(0, 0), (0, blocks * block - length)]
    segments = jnp.pad(segments, fill)
    q, k, v = (jnp.pad(x, [*fill, (0, 0), (0, 0)]) for x in (q * head_dim**-0.5, k, v))
    # Heads first, so that both products are plain batched ones; see attention.attend.
    queries = q.reshape(batch, -1, kv_heads, group, head_dim).transpose(0, 2, 3, 1, 4)
    keys, values = k.transpose(0, 2, 3, 1), v.transpose(0, 2, 1, 3)
    begins, ends = _spans(segments, block, causal=causal)
    sizes = block * np.array(_sizes(min(-(-most // block), blocks)))

    def of_block(index: Int[Array, ""]) -> Float[Array, "K G Q H"]:
        row, number = index // blocks, index % blocks
        first, begin, end = number * block, begins[row, number], ends[row, number]
        own = _cut(queries[row], first, block, axis=2).reshape(kv_heads, group * block, head_dim)

        def over(size: int) -> Float[Array, "K G Q H"]:
            start = jnp.minimum(begin, blocks * block - size)
            seen = _seen(segments[row], first, block, start, size, causal=causal)
            scores = jnp.matmul(
                own, _cut(keys[row], start, size, axis=2), preferred_element_type=jnp.float32
            )
            scores = scores.reshape(kv_heads, group, block, size) + seen
            weights = jnp.exp(scores - scores.max(-1, keepdims=True))
            total = weights.sum(-1).reshape(kv_heads, group * block, 1)
            weights = weights.reshape(kv_heads, group * block, size).astype(v.dtype)
            read = _cut(values[row], start, size, axis=1)
            out = jnp.matmul(weights, read, preferred_element_type=jnp.float32) / total
            return out.astype(v.dtype).reshape(kv_heads, group, block, head_dim)

        branches: list[Callable[[], Array]] = [functools.partial(over, int(n)) for n in sizes]
        return jax.lax.switch((end - begin > sizes).sum(), branches)

    out = jax.lax.map(of_block, jnp.arange(batch * blocks))
    out = out.reshape(batch, blocks, kv_heads, group, block, head_dim).transpose(0, 1, 4, 2, 3, 5)
    return out.reshape(batch, blocks * block, heads, head_dim)[:, :length]


def _cut(x: Array, start: Int[Array, ""], size: int, axis: int) -> Array:
    return jax.lax.dynamic_slice_in_dim(x, start, size, axis)


def _seen(segments, first, block: int, start, size: int, *, causal: bool) -> Float[Array, "Q S"]:
    """0 where a query of the block at `first` sees a key of the span at `start`, else MASKED."""
    query, key = _cut(segments, first, block, 0)[:, None], _cut(segments, start, size, 0)
    seen = (query == key) & (key != 0)
    if causal:
        seen &= first + jnp.arange(block)[:, None] >= start + jnp.arange(size)
    # With the barrier, XLA leaves the rest of the softmax in one kernel that uses all cores.
    return jax.lax.optimization_barrier(jnp.where(seen, 0.0, MASKED))


def _spans(
    segments: Int[Array, "B L"], block: int, *, causal: bool
) -> tuple[Int[Array, "B n"], Int[Array, "B n"]]:
    """Where the keys begin that each block of queries sees, and where they end."""
    first = jnp.arange(0, segments.shape[1], block)
    last = first + block - 1

    def same(positions):
        return segments[:, positions, None] == segments[:, None, :]

    # Padding sees nothing, so it does not matter where else there is some.
    begins = jnp.where(segments[:, first] > 0, jnp.argmax(same(first), -1), first)
    if causal:
        return begins, jnp.broadcast_to(last + 1, begins.shape)
    ends = segments.shape[1] - jnp.argmax(same(last)[:, :, ::-1], -1)
    return begins, jnp.where(segments[:, last] > 0, ends, last + 1)


def _sizes(most: int) -> list[int]:
    """1, 2, 3, 4, 6, 8, 12, 16, 24 and so on, up to `most`: a span is at most half again as long as
    needed, and few have to be compiled."""
    steps = [n for n in range(1, most) if n % max(1, (1 << n.bit_length()) >> 2) == 0]
    return [*steps, most]
