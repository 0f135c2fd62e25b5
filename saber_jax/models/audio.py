"""Audio tower: chunks of 2 s of log-mel frames to 25 vectors a second, as in Qwen2.5-Omni.

Chunks are independent: convolutions, positions and attention start again in each of them.

Axis letters: B batch   A chunks of a row   C chunks   T steps   W taps   M mel bins   D width
F mlp width   N heads   H head dim   S steps that a stride leaves
O width of the text tower   R = 50 A rows of output.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from saber_jax.models.attention import attend
from saber_jax.models.config import AudioConfig
from saber_jax.models.layers import (
    gelu,
    layer_norm,
    project,
    scan_layers,
)
from saber_jax.models.masks import Visibility, audio_chunk
from saber_jax.models.parameters import (
    Kind,
    Positions,
    bias,
    in_order,
    scale,
    stack,
    table,
    weight,
)
from saber_jax.models.positions import sinusoids
from saber_jax.models.remat import Remat

TAPS = 3


class Norm(nnx.Module):
    """Scale and bias of a LayerNorm."""

    def __init__(self, width: int, *, eps: float):
        self.eps = eps
        self.scale = scale(width)
        self.bias = bias((width,), ("norm",))

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        return layer_norm(x, self.scale, self.bias, self.eps)


class Attention(nnx.Module):
    """Bidirectional attention inside a chunk; keys alone have no bias."""

    def __init__(self, cfg: AudioConfig, *, rngs: nnx.Rngs):
        d, n, h = cfg.width, cfg.heads, cfg.head_dim
        self.w_q = weight(rngs, (d, n, h), ("embed", "heads", "head_dim"), inputs=d)
        self.w_k = weight(rngs, (d, n, h), ("embed", "heads", "head_dim"), inputs=d)
        self.w_v = weight(rngs, (d, n, h), ("embed", "heads", "head_dim"), inputs=d)
        self.w_o = weight(rngs, (n, h, d), ("heads", "head_dim", "embed"), inputs=d)
        self.b_q = bias((n, h), ("heads", "head_dim"))
        self.b_v = bias((n, h), ("heads", "head_dim"))
        self.b_o = bias((d,), ("norm",))

    def __call__(self, x: Float[Array, "C T D"], visible: Visibility) -> Float[Array, "C T D"]:
        q = project("CTD,DNH->CTNH", x, self.w_q, self.b_q)
        k = project("CTD,DNH->CTNH", x, self.w_k)
        v = project("CTD,DNH->CTNH", x, self.w_v, self.b_v)
        return project("CTNH,NHD->CTD", attend(q, k, v, visible), self.w_o, self.b_o)


class Block(nnx.Module):
    """One pre-norm transformer layer with a GELU feed-forward block."""

    def __init__(self, cfg: AudioConfig, *, rngs: nnx.Rngs):
        d, f = cfg.width, cfg.mlp_dim
        self.attn_norm = Norm(d, eps=cfg.norm_eps)
        self.attn = Attention(cfg, rngs=rngs)
        self.mlp_norm = Norm(d, eps=cfg.norm_eps)
        self.w_up = weight(rngs, (d, f), ("embed", "mlp"), inputs=d)
        self.b_up = bias((f,), ("mlp",))
        self.w_down = weight(rngs, (f, d), ("mlp", "embed"), inputs=f)
        self.b_down = bias((d,), ("norm",))

    def __call__(self, x: Float[Array, "C T D"], visible: Visibility) -> Float[Array, "C T D"]:
        x = x + self.attn(self.attn_norm(x), visible)
        up = gelu(project("CTD,DF->CTF", self.mlp_norm(x), self.w_up, self.b_up))
        return x + project("CTF,FD->CTD", up, self.w_down, self.b_down)


class Conv(nnx.Module):
    """A convolution over time with three taps and one step of zero padding at both ends."""

    def __init__(self, inputs: int, width: int, *, rngs: nnx.Rngs):
        shape, axes = (TAPS, inputs, width), ("taps", "mel", "embed")
        self.w = weight(rngs, shape, axes, inputs=TAPS * inputs)
        self.b = bias((width,), ("norm",))

    def __call__(self, x: Float[Array, "C T M"], *, stride: int) -> Float[Array, "C S D"]:
        length = x.shape[1]
        padded = jnp.pad(x, ((0, 0), (1, 1), (0, 0)))
        # As one matrix product; XLA's small convolutions are slow on CPU.
        taps = [padded[:, tap : tap + length : stride] for tap in range(TAPS)]
        return project("CTWM,WMD->CTD", jnp.stack(taps, axis=2), self.w, self.b)


class AudioTower(nnx.Module):
    """The tower."""

    def __init__(self, cfg: AudioConfig, *, rngs: nnx.Rngs):
        self.cfg = cfg
        self.conv1 = Conv(cfg.mel_bins, cfg.width, rngs=rngs)
        self.conv2 = Conv(cfg.width, cfg.width, rngs=rngs)
        self.blocks = stack(lambda r: Block(cfg, rngs=r), cfg.layers, rngs)
        self.norm = Norm(cfg.width, eps=cfg.norm_eps)
        self.w_out = weight(rngs, (cfg.width, cfg.out_width), ("mlp", "embed"), inputs=cfg.width)
        self.b_out = bias((cfg.out_width,), ("norm",))
        # Part of every released checkpoint, but not used by any forward pass.
        self.bos_eos = table(
            rngs,
            (2, cfg.out_width),
            ("marker", "embed"),
            width=cfg.out_width,
            kind=Kind.UNREAD,
        )
        in_order(
            (Positions.MEL_FRAMES, self.conv1),
            (Positions.AUDIO_STEPS, self.conv2),
            (Positions.AUDIO_STEPS, self.blocks),
            (Positions.AUDIO_TOKENS, self.norm),
            (Positions.AUDIO_TOKENS, self.w_out),
            (Positions.AUDIO_TOKENS, self.b_out),
        )

    def __call__(
        self,
        mel: Float[Array, "B A 200 M"],
        mel_lengths: Int[Array, "B A"],
        *,
        dtype: DTypeLike,
        remat: Remat = "none",
    ) -> Float[Array, "B R O"]:
        """Row `chunk * 50 + i` holds token i of a chunk; rows without sound are zeros.

        A chunk with n valid frames has ((n + 1) // 2) // 2 tokens.
        """
        cfg = self.cfg
        batch, chunks, frames, bins = mel.shape
        lengths = mel_lengths.reshape(-1)
        steps = (lengths + 1) // 2
        x = mel.reshape(-1, frames, bins).astype(dtype)
        valid = (jnp.arange(frames)[None, :] < lengths[:, None])[:, :, None]
        with jax.named_scope("conv"):
            x = gelu(self.conv1(jnp.where(valid, x, 0), stride=1))
            # conv1 writes its bias past the end, where the input of conv2 has to be zero.
            x = gelu(self.conv2(jnp.where(valid, x, 0), stride=2))
            x = x + jnp.asarray(sinusoids(cfg.n_window, cfg.width), dtype)[None]

        visible = audio_chunk(steps, cfg.n_window)

        def layer(x, block):
            return block(x, visible), None

        with jax.named_scope("blocks"):
            x, _ = scan_layers(layer, x, self.blocks, remat=remat)
        with jax.named_scope("pool"):
            x = (x[:, 0::2] + x[:, 1::2]) / 2
            out = project("CTD,DO->CTO", self.norm(x), self.w_out, self.b_out)
        heard = (jnp.arange(cfg.chunk_tokens)[None, :] < (steps // 2)[:, None])[:, :, None]
        return jnp.where(heard, out, 0).reshape(batch, chunks * cfg.chunk_tokens, cfg.out_width)
