"""Vision tower: raw patches to one vector per 2 x 2 patches, as in Qwen2.5-Omni.

Patches come in tower order, whole windows one after another, and leave in it: the batch's
`media_index` addresses that order, so nothing is permuted on the device.

Axis letters: B batch   P patches   U units of 2 x 2 patches   X pixels of a patch   D width
F mlp width   N heads   H head dim   C merged width   O width of the text tower.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, UInt8

from saber_jax.models.attention import attend, attend_nearby
from saber_jax.models.config import VisionConfig
from saber_jax.models.kernels import TRITON, Kernel
from saber_jax.models.layers import (
    gelu,
    project,
    rms_norm,
    scan_layers,
)
from saber_jax.models.masks import same_segment
from saber_jax.models.parameters import Positions, bias, in_order, scale, stack, weight
from saber_jax.models.positions import Rotary, rotate, vision_rotary
from saber_jax.models.remat import GATE, MLP_INPUT, UP, Remat

# Red, green, blue of the CLIP training images, which the released tower was trained with.
PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)
PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)


class Attention(nnx.Module):
    """Bidirectional attention inside windows or frames, with a bias on every projection."""

    def __init__(self, cfg: VisionConfig, *, rngs: nnx.Rngs):
        d, n, h = cfg.width, cfg.heads, cfg.head_dim
        self.w_q = weight(rngs, (d, n, h), ("embed", "heads", "head_dim"), inputs=d)
        self.w_k = weight(rngs, (d, n, h), ("embed", "heads", "head_dim"), inputs=d)
        self.w_v = weight(rngs, (d, n, h), ("embed", "heads", "head_dim"), inputs=d)
        self.w_o = weight(rngs, (n, h, d), ("heads", "head_dim", "embed"), inputs=d)
        self.b_q = bias((n, h), ("heads", "head_dim"))
        self.b_k = bias((n, h), ("heads", "head_dim"))
        self.b_v = bias((n, h), ("heads", "head_dim"))
        self.b_o = bias((d,), ("norm",))

    def __call__(
        self,
        x: Float[Array, "B P D"],
        rotary: Rotary,
        attention_fn: Callable[[Array, Array, Array], Array],
    ) -> Float[Array, "B P D"]:
        q = rotate(project("BPD,DNH->BPNH", x, self.w_q, self.b_q), rotary)
        k = rotate(project("BPD,DNH->BPNH", x, self.w_k, self.b_k), rotary)
        v = project("BPD,DNH->BPNH", x, self.w_v, self.b_v)
        return project("BPNH,NHD->BPD", attention_fn(q, k, v), self.w_o, self.b_o)


class Mlp(nnx.Module):
    """SwiGLU with biases."""

    def __init__(self, cfg: VisionConfig, *, rngs: nnx.Rngs):
        d, f = cfg.width, cfg.mlp_dim
        self.w_gate = weight(rngs, (d, f), ("embed", "mlp"), inputs=d)
        self.w_up = weight(rngs, (d, f), ("embed", "mlp"), inputs=d)
        self.w_down = weight(rngs, (f, d), ("mlp", "embed"), inputs=f)
        self.b_gate = bias((f,), ("mlp",))
        self.b_up = bias((f,), ("mlp",))
        self.b_down = bias((d,), ("norm",))

    def __call__(self, x: Float[Array, "B P D"]) -> Float[Array, "B P D"]:
        gate = checkpoint_name(project("BPD,DF->BPF", x, self.w_gate, self.b_gate), GATE)
        up = checkpoint_name(project("BPD,DF->BPF", x, self.w_up, self.b_up), UP)
        return project("BPF,FD->BPD", jax.nn.silu(gate) * up, self.w_down, self.b_down)


class Block(nnx.Module):
    """One pre-norm transformer layer."""

    def __init__(self, cfg: VisionConfig, *, rngs: nnx.Rngs):
        self.eps = cfg.norm_eps
        self.attn_norm = scale(cfg.width)
        self.attn = Attention(cfg, rngs=rngs)
        self.mlp_norm = scale(cfg.width)
        self.mlp = Mlp(cfg, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "B P D"],
        rotary: Rotary,
        attention_fn: Callable[[Array, Array, Array], Array],
    ) -> Float[Array, "B P D"]:
        x = checkpoint_name(
            x + self.attn(rms_norm(x, self.attn_norm, self.eps), rotary, attention_fn), MLP_INPUT
        )
        return x + self.mlp(rms_norm(x, self.mlp_norm, self.eps))


class Merger(nnx.Module):
    """Joins the four patches of a unit and maps them to the width of the text tower."""

    def __init__(self, cfg: VisionConfig, *, rngs: nnx.Rngs):
        c = cfg.width * cfg.merge**2
        self.eps = cfg.norm_eps
        self.norm = scale(cfg.width)
        self.w_in = weight(rngs, (c, c), ("embed", "mlp"), inputs=c)
        self.b_in = bias((c,), ("mlp",))
        self.w_out = weight(rngs, (c, cfg.out_width), ("mlp", "embed"), inputs=c)
        self.b_out = bias((cfg.out_width,), ("norm",))

    def __call__(self, x: Float[Array, "B P D"]) -> Float[Array, "B U O"]:
        x = rms_norm(x, self.norm, self.eps).reshape(x.shape[0], -1, self.b_in.shape[0])
        x = gelu(project("BUC,CF->BUF", x, self.w_in, self.b_in))
        return project("BUF,FO->BUO", x, self.w_out, self.b_out)


class VisionTower(nnx.Module):
    """The tower."""

    def __init__(self, cfg: VisionConfig, *, rngs: nnx.Rngs):
        self.cfg = cfg
        self.w_patch = weight(
            rngs, (cfg.patch_values, cfg.width), ("patch", "embed"), inputs=cfg.patch_values
        )
        self.blocks = stack(lambda r: Block(cfg, rngs=r), cfg.depth, rngs)
        self.merger = Merger(cfg, rngs=rngs)
        in_order(
            (Positions.PATCHES, self.w_patch),
            (Positions.PATCHES, self.blocks),
            (Positions.UNITS, self.merger),
        )

    def __call__(
        self,
        patches: UInt8[Array, "B P X"],
        patch_hw: Int[Array, "B P 2"],
        window: Int[Array, "B P"],
        frame: Int[Array, "B P"],
        *,
        dtype: DTypeLike,
        remat: Remat = "none",
        max_frame_patches: int | None = None,
        kernel: Kernel = "xla",
    ) -> Float[Array, "B U O"]:
        """Units in tower order; rows of padding (`frame` 0) are zeros.

        `max_frame_patches` is an upper bound of the patches of a frame, which allows local
        attention; a larger frame would lose far keys.
        """
        cfg = self.cfg
        attention_fn = functools.partial(
            _attend, window=window, frame=frame, cfg=cfg, reach=max_frame_patches, kernel=kernel
        )
        rotary = vision_rotary(patch_hw, head_dim=cfg.head_dim)
        with jax.named_scope("patches"):
            x = project("BPX,XD->BPD", normalize(patches).astype(dtype), self.w_patch)

        def layer(x, inputs):
            block, full = inputs
            return block(x, rotary, functools.partial(attention_fn, full=full)), None

        with jax.named_scope("blocks"):
            x, _ = scan_layers(layer, x, (self.blocks, full_attention(cfg)), remat=remat)
        with jax.named_scope("merger"):
            units = self.merger(x)
        real = frame[:, :: cfg.merge**2, None] > 0
        return jnp.where(real, units, jnp.zeros_like(units))


def _attend(
    q: Float[Array, "B P N H"],
    k: Float[Array, "B P N H"],
    v: Float[Array, "B P N H"],
    *,
    full: Bool[Array, ""],
    window: Int[Array, "B P"],
    frame: Int[Array, "B P"],
    cfg: VisionConfig,
    reach: int | None,
    kernel: Kernel,
) -> Float[Array, "B P N H"]:
    """Attention inside frames where `full`, else inside windows."""
    length = q.shape[1]
    segments = jnp.where(full, frame, window)
    if kernel in TRITON:  # It finds out by itself how far segments reach.
        return attend_nearby(q, k, v, segments, reach or length, kernel)
    reach = min(reach or length, length)
    # Three blocks of keys that cover everything are no cheaper than everything.
    if kernel == "xla" and 3 * reach >= length:
        return attend(q, k, v, same_segment(segments))
    near = functools.partial(attend_nearby, q, k, v, kernel=kernel)
    window_reach = min(cfg.window_patches, reach)
    if window_reach == reach:
        return near(segments, reach)

    def in_frames():
        with jax.named_scope("frame_attention"):
            return near(frame, reach)

    def in_windows():
        with jax.named_scope("window_attention"):
            return near(window, window_reach)

    return jax.lax.cond(full, in_frames, in_windows)


def full_attention(cfg: VisionConfig) -> Bool[np.ndarray, " layers"]:
    """Which layers attend over a whole frame instead of a window."""
    return np.isin(np.arange(cfg.depth), cfg.full_attention_layers)


def normalize(patches: UInt8[Array, "B P X"]) -> Float[Array, "B P X"]:
    """Pixels 0..255 to float32 (x - 255 mean) / (255 std); columns are channel-major."""
    per_channel = patches.shape[-1] // 3
    mean = np.repeat(np.float32(255) * np.asarray(PIXEL_MEAN, np.float32), per_channel)
    std = np.repeat(np.float32(255) * np.asarray(PIXEL_STD, np.float32), per_channel)
    return (patches.astype(jnp.float32) - mean[None, None, :]) / std[None, None, :]
