"""Attention kernels with our masks: the choice of a kernel, and the Pallas splash kernel of TPUs.

Scores stay in the chip's vector memory, and blocks of keys that no query of a block can see are
skipped. A kernel is written for one device, so it is used inside `jax.shard_map`.

Axis letters: B batch   T positions   N heads   K kv heads   H head dim.
"""

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash_mask
from jaxtyping import Array, Float, Int

from saber_jax.models import spans, triton
from saber_jax.models.masks import Mask
from saber_jax.models.remat import ATTENTION

Kernel = Literal[
    "xla",
    "splash",
    "splash_interpret",
    "splash_fused",
    "splash_fused_interpret",
    "triton",
    "triton_interpret",
    "spans",
]
"""Forms of attention: XLA's own on any device, splash on TPUs, Triton on NVIDIA GPUs. With
`splash_fused` one kernel computes the gradients of queries, keys and values: 7 matrix products
instead of 9, but every block of keys writes its part of the queries' gradients to HBM, so it is for
short rows. Kernels can be interpreted on a CPU, slowly, which is how they are tested. `spans` is
for the prefill of one CPU, because it has no gradient."""

WITHOUT_GRADIENT: tuple[Kernel, ...] = ("spans",)
TRITON: tuple[Kernel, ...] = ("triton", "triton_interpret")
PLATFORM: dict[str, str] = {"splash": "tpu", "splash_fused": "tpu", "triton": "gpu"}
FUSED_ON = ("TPU v6 lite",)  # Kinds of devices on which the fused kernel saves more than it costs.

LANES = 128  # Width of a TPU's vector registers: head dims and blocks come in multiples of it.
LONGEST_BLOCK, LONG_BLOCK = 512, 384  # docs/aot_table.md, `Blocks of attention`, has the reasons.
MOST_FUSED = 16  # Blocks of keys, whose gradients of all queries are in memory at a time.


class PackedMask(splash_mask._ComputableMask):
    """`masks.Mask.packed` in blocks of `block`; the kernel compares segments itself.

    The kernel evaluates `mask_function` for every score of the blocks that it visits, and on a v6e
    that is what takes longest. If blocks divide the regions of responses, regions show or hide a
    block as a whole. Hidden ones are not visited, so only causality is left to test.
    """

    def __init__(self, length: int, response: int, block: int):
        self.key = (length, response, block)
        self._mask = Mask.packed(length, response)
        whole_blocks = length % block == 0 and response % block == 0
        inside = Mask(causal=True) if whole_blocks else self._mask
        super().__init__(shape=(length, length), mask_function=inside.visible)

    def __getitem__(self, at: tuple[slice, slice]) -> np.ndarray:
        """The whole mask, by which blocks are chosen."""
        query, key = (np.arange(size)[part] for size, part in zip(self.shape, at, strict=True))
        return self._mask.visible(query[:, None], key[None, :])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PackedMask) and self.key == other.key

    def __hash__(self) -> int:
        return hash((type(self), self.key))


class NearbyMask(splash_mask._ComputableMask):
    """Positions less than `reach` apart: all that a segment of at most `reach` can hold.

    Length 5, reach 2:

        sees    0 1 2 3 4
        0       x x
        1       x x x
        2         x x x
        3           x x x
        4             x x
    """

    def __init__(self, length: int, reach: int):
        self.key = (length, reach)

        def visible(q, k):
            return (q - k < reach) & (k - q < reach)

        super().__init__(shape=(length, length), mask_function=visible)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, NearbyMask) and self.key == other.key

    def __hash__(self) -> int:
        return hash((type(self), self.key))


def of_device(platform: str, kind: str) -> Kernel:
    """The kernel that `auto` stands for, by jax.Device's `platform` and `device_kind`."""
    if platform == "tpu":
        return "splash_fused" if kind in FUSED_ON else "splash"
    return "triton" if platform == "gpu" else "xla"


def packed(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    segments: Int[Array, "B T"],
    *,
    response: int,
    longest: int | None = None,
    kernel: Kernel,
) -> Float[Array, "B T N H"]:
    """masks.packed_text, for rows that end in two regions of `response` slots (0: there are none)
    and segments of at most `longest`, which other kernels than `spans` find out.

    Slots of segment 0 come out finite and meaningless.
    """
    if kernel == "spans":
        assert not response, "prompts have no responses"
        return spans.packed(q, k, v, segments, longest=longest)
    if kernel in TRITON:
        interpret = kernel == "triton_interpret"
        return triton.packed(q, k, v, segments, response=response, interpret=interpret)
    length = q.shape[1] + -q.shape[1] % LANES
    if response and length != q.shape[1]:
        raise ValueError(
            f"Rows of preference pairs must be a multiple of {LANES} slots for the TPU kernel, got "
            f"{q.shape[1]}. Change config.data.length or config.data.response."
        )
    block = _block(length, response)
    return _attend(q, k, v, segments, PackedMask(length, response, block), block, kernel)


def nearby(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T N H"],
    v: Float[Array, "B T N H"],
    segments: Int[Array, "B T"],
    *,
    reach: int,
    kernel: Kernel,
) -> Float[Array, "B T N H"]:
    """masks.same_segment, for segments of at most `reach` neighbouring positions."""
    if kernel == "spans":
        return spans.same_segment(q, k, v, segments, reach=reach)
    if kernel in TRITON:
        interpret = kernel == "triton_interpret"
        return triton.same_segment(q, k, v, segments, reach=reach, interpret=interpret)
    # Padding rows costs less than using shorter blocks, because few blocks meet a segment.
    block = min(LONGEST_BLOCK, max(LANES, 1 << (reach - 1).bit_length()))
    length = q.shape[1] + -q.shape[1] % block
    return _attend(q, k, v, segments, NearbyMask(length, reach), block, kernel)


def _block(length: int, response: int) -> int:
    """The block of queries and keys for rows of `length`, a multiple of LANES.

    The longest that divides the row, and its regions as well where that leaves blocks of at least
    LONG_BLOCK. Shorter ones would cost more than testing every score for regions.
    """
    dividing = [b for b in range(LANES, LONGEST_BLOCK + 1, LANES) if length % b == 0]
    of_regions = [b for b in dividing if response % b == 0 and b >= LONG_BLOCK]
    return max(of_regions or dividing)


def _attend(q, k, v, segments, mask, block: int, kernel: Kernel) -> Float[Array, "B T N H"]:
    length, head_dim = q.shape[1], q.shape[3]
    # Zeros add nothing to a score, and what they add to the output is cut off.
    features = -head_dim % LANES
    slots = mask.shape[0] - length

    def heads_first(x):
        return jnp.pad(x, [(0, 0), (0, slots), (0, 0), (0, features)]).swapaxes(1, 2)

    ids = jnp.pad(segments, [(0, 0), (0, slots)])
    fused = "fused" in kernel and mask.shape[1] <= MOST_FUSED * block
    run = splash_kernel(mask, q.shape[2], block, fused=fused, interpret="interpret" in kernel)
    visited = np.count_nonzero(run.fwd_mask_info.block_mask[0])
    # The kernels declare no cost; `aot` reads it from here.
    with jax.named_scope(f"splash_{visited}x{block}" + "_fused" * fused):
        out = jax.vmap(lambda q, k, v, s: run(q, k, v, segment_ids=splash.SegmentIds(q=s, kv=s)))(
            heads_first(q * head_dim**-0.5), heads_first(k), heads_first(v), ids
        )
    return out.swapaxes(1, 2)[:, :length, :, :head_dim]


@functools.lru_cache(maxsize=32)
def splash_kernel(
    mask: PackedMask | NearbyMask, heads: int, block: int, *, fused: bool, interpret: bool = False
) -> Any:
    """A splash.SplashAttentionKernel, whose own annotation says that it also gives residuals."""
    sizes = splash.BlockSizes(
        block_q=block,
        block_kv=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_q_dq=None if fused else block,
        block_kv_dq=None if fused else block,
        use_fused_bwd_kernel=fused,
    )
    # Made outside of any trace: what it holds is constant, and it is kept from call to call.
    with jax.ensure_compile_time_eval():
        made = splash.make_splash_mha_single_device(
            splash_mask.MultiHeadMask([mask] * heads),
            block_sizes=sizes,
            residual_checkpoint_name=ATTENTION,
            interpret=interpret,
        )
    return jax.tree.map(np.asarray, made)
