"""Attention of all towers under their masks (masks.py), in the form that suits the device.

XLA's form is here. The other forms are behind the same functions, see kernels.py.

Axis letters: B batch   T queries   S keys   L slots of a row   N heads   K kv heads
G query heads per kv head   H head dim   P patches.
"""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from saber_jax.models import kernels
from saber_jax.models.kernels import Kernel
from saber_jax.models.masks import MASKED, Visibility, nearby_segment, with_neighbours
from saber_jax.models.remat import ATTENTION, QKV

# Longer causal rows are computed in blocks of this many queries: few scores are masked, and those
# of a block are small enough for a CPU's caches and allocator (2 times faster than 512 there).
QUERY_BLOCK = 128


def attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    visible: Visibility,
    kernel: Kernel = "xla",
) -> Float[Array, "B T N H"]:
    """Softmax attention in float32; query head n reads kv head n // (N / K).

    Any other `kernel` than "xla" takes masks.packed_text only, see models/kernels.py. In XLA's form
    the heads that share a kv head are laid side by side, so that both products are plain batched
    matrix products, and the sum divides the output instead of the [T, S] weights.
    """
    q, k, v = checkpoint_name((q, k, v), QKV)
    if kernel != "xla":
        return kernels.packed(
            *(q, k, v, visible.query_segments),
            response=visible.response,
            longest=visible.longest,
            kernel=kernel,
        )
    long = visible.causal and q.shape[1] == k.shape[1] and q.shape[1] > QUERY_BLOCK
    return checkpoint_name((_blocks if long else _dense)(q, k, v, visible), ATTENTION)


def _dense(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    visible: Visibility,
) -> Float[Array, "B T N H"]:
    batch, length, heads, head_dim = q.shape
    kv_heads = k.shape[2]
    group = heads // kv_heads
    queries = (q * head_dim**-0.5).reshape(batch, length, kv_heads, group, head_dim)
    queries = queries.transpose(0, 2, 3, 1, 4).reshape(batch, kv_heads, group * length, head_dim)
    keys, values = k.transpose(0, 2, 3, 1), v.transpose(0, 2, 1, 3)
    scores = jnp.matmul(queries, keys, preferred_element_type=jnp.float32)
    bias = jnp.where(visible.dense(), 0.0, MASKED)[:, None, None]
    scores = scores.reshape(batch, kv_heads, group, length, -1) + bias
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(-1, keepdims=True)))
    total = weights.sum(-1).reshape(batch, kv_heads, group * length, 1)
    weights = weights.reshape(batch, kv_heads, group * length, -1).astype(v.dtype)
    out = jnp.matmul(weights, values, preferred_element_type=jnp.float32) / total
    out = out.astype(v.dtype).reshape(batch, kv_heads, group, length, head_dim)
    return out.transpose(0, 3, 1, 2, 4).reshape(q.shape)


def _blocks(
    q: Float[Array, "B L N H"],
    k: Float[Array, "B L K H"],
    v: Float[Array, "B L K H"],
    visible: Visibility,
) -> Float[Array, "B L N H"]:
    """masks.packed_text for one block of queries at a time, over the keys that the block can see.

    Skipped are keys after the block, keys further before it than the longest segment, and, for the
    two response regions at the end of a row, keys of the other region. Blocks of 2 over a shared
    region of 4 and responses of 2:

        keys      0 1 2 3 4 5 6 7
        0, 1      x x
        2, 3      x x x x
        4, 5      x x x x x x
        6, 7      x x x x     x x
    """
    length, response = q.shape[1], visible.response
    shared = length - 2 * response
    # If the response regions are unknown, only `branch` separates the responses.
    segments, branch = visible.query_segments, visible.query_branch
    regions = [(0, shared), (shared, length - response), (length - response, length)]
    # A branch may be far from its shared prefix, so rows with branches start at the first key.
    reach = length if response or visible.longest is None else visible.longest
    out = []
    for start, stop in regions if response else [(0, length)]:
        for first in range(start, stop, QUERY_BLOCK):
            last, oldest = min(first + QUERY_BLOCK, stop), max(0, first - reach + 1)

            def seen(x, start=start, last=last, oldest=oldest):
                if start in (0, shared):
                    return x[:, oldest:last]
                return jnp.concatenate([x[:, :shared], x[:, start:last]], axis=1)

            block = Visibility(
                query_segments=segments[:, first:last],
                key_segments=seen(segments),
                query_branch=None if branch is None else branch[:, first:last],
                key_branch=None if branch is None else seen(branch),
                causal=True,
            )
            out.append(_dense(q[:, first:last], seen(k), seen(v), block))
    return jnp.concatenate(out, axis=1)


def attend_cached(
    q: Float[Array, "B 1 N H"],
    prompt: tuple[Float[Array, "C K H P"], Float[Array, "C K P H"]],
    answer: tuple[Float[Array, "B K H A"], Float[Array, "B K A H"]],
    visible: Visibility,
) -> Float[Array, "B 1 N H"]:
    """`attend` of one query per row over cached keys and values: its prompt's, then its own.

    Every B / C rows in a row answer one prompt, whose keys are read once for all of them. `visible`
    is what a prompt's rows see of its P slots and of their A.
    """
    rows, _, heads, head_dim = q.shape
    (prompt_k, prompt_v), (k, v) = prompt, answer
    prompts, kv_heads, _, slots = prompt_k.shape
    group, samples = heads // kv_heads, rows // prompts
    by_row = (rows, kv_heads, group)
    apart, together = (prompts, samples, kv_heads, group), (prompts, kv_heads, samples * group)

    def of_prompts(x):
        """[rows, K, G, ...] as [prompts, K, every query of a prompt, ...]."""
        return x.reshape(*apart, x.shape[-1]).swapaxes(1, 2).reshape(*together, x.shape[-1])

    def of_rows(x):
        x = x.reshape(prompts, kv_heads, samples, group, x.shape[-1])
        return x.swapaxes(1, 2).reshape(*by_row, x.shape[-1])

    queries = (q * head_dim**-0.5).reshape(*by_row, head_dim)
    seen = visible.dense()[:, None]
    early = jnp.matmul(of_prompts(queries), prompt_k, preferred_element_type=jnp.float32)
    early = jnp.where(seen[..., :slots], early, MASKED)
    late = of_prompts(jnp.matmul(queries, k, preferred_element_type=jnp.float32))
    late = jnp.where(seen[..., slots:], late, MASKED)
    # One softmax over both parts without concatenating them: the output is divided by the sum.
    top = jnp.maximum(early.max(-1, keepdims=True), late.max(-1, keepdims=True))
    early, late = jnp.exp(early - top), jnp.exp(late - top)
    total = early.sum(-1, keepdims=True) + late.sum(-1, keepdims=True)
    early, late = early.astype(v.dtype), of_rows(late).astype(v.dtype)
    out = jnp.matmul(early, prompt_v, preferred_element_type=jnp.float32)
    out += of_prompts(jnp.matmul(late, v, preferred_element_type=jnp.float32))
    return of_rows(out / total).astype(q.dtype).reshape(q.shape)


def attend_nearby(
    q: Float[Array, "B P N H"],
    k: Float[Array, "B P K H"],
    v: Float[Array, "B P K H"],
    segments: Int[Array, "B P"],
    block: int,
    kernel: Kernel = "xla",
) -> Float[Array, "B P N H"]:
    """Attention inside segments of at most `block` positions, in time linear in P.

    In XLA's form queries are cut into blocks, each compared with three blocks of keys.
    """
    if kernel != "xla":
        q, k, v = checkpoint_name((q, k, v), QKV)
        return kernels.nearby(q, k, v, segments, reach=block, kernel=kernel)
    batch, length = segments.shape
    pad = -length % block

    def blocked(x):
        x = jnp.pad(x, [(0, 0), (0, pad)] + [(0, 0)] * (x.ndim - 2))
        return x.reshape(batch, (length + pad) // block, block, *x.shape[2:])

    def rows(x):
        return x.reshape(-1, *x.shape[2:])

    out = attend(
        rows(blocked(q)),
        rows(with_neighbours(blocked(k))),
        rows(with_neighbours(blocked(v))),
        nearby_segment(jnp.pad(segments, [(0, 0), (0, pad)]), block),
    )
    return out.reshape(batch, length + pad, *q.shape[2:])[:, :length]
