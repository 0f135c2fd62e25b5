"""Text tower: the decoder that reads words, patches and sound as one sequence.

Axis letters: B batch   L length   S cache slots   Y layers   D width   F mlp width   N query heads
K kv heads   H head dim   V vocabulary.
"""

from typing import TypedDict

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from saber_jax.models.config import TextConfig
from saber_jax.models.kernels import Kernel
from saber_jax.models.layers import (
    attend,
    attend_cached,
    constant,
    project,
    rms_norm,
    scan_layers,
    stack,
    table,
    weight,
)
from saber_jax.models.masks import Visibility, cached_text
from saber_jax.models.positions import Rotary, rotate, text_rotary
from saber_jax.models.remat import MLP, Remat, named


class Cache(TypedDict):
    """Keys and values of the tokens read so far, one slot each.

    Laid out as the two matrix products of one decoding step read them; with slots before heads,
    XLA on CPUs would transpose the whole cache for every token.
    """

    k: Float[Array, "Y B K H S"]
    v: Float[Array, "Y B K S H"]


class Attention(nnx.Module):
    """Grouped-query attention; queries, keys and values are biased, the output is not."""

    def __init__(self, cfg: TextConfig, *, rngs: nnx.Rngs):
        d, n, k, h = cfg.width, cfg.heads, cfg.kv_heads, cfg.head_dim
        self.w_q = weight(rngs, (d, n, h), ("embed", "heads", "head_dim"), inputs=d)
        self.w_k = weight(rngs, (d, k, h), ("embed", "kv_heads", "head_dim"), inputs=d)
        self.w_v = weight(rngs, (d, k, h), ("embed", "kv_heads", "head_dim"), inputs=d)
        self.w_o = weight(rngs, (n, h, d), ("heads", "head_dim", "embed"), inputs=n * h)
        self.b_q = constant(0.0, (n, h), ("heads", "head_dim"))
        self.b_k = constant(0.0, (k, h), ("kv_heads", "head_dim"))
        self.b_v = constant(0.0, (k, h), ("kv_heads", "head_dim"))

    def qkv(self, x: Float[Array, "B L D"], rotary: Rotary) -> tuple[Array, Array, Array]:
        """Rotated queries and keys, and values."""
        q = rotate(project("BLD,DNH->BLNH", x, self.w_q, self.b_q), rotary)
        k = rotate(project("BLD,DKH->BLKH", x, self.w_k, self.b_k), rotary)
        return q, k, project("BLD,DKH->BLKH", x, self.w_v, self.b_v)

    def out(self, x: Float[Array, "B L N H"]) -> Float[Array, "B L D"]:
        return project("BLNH,NHD->BLD", x, self.w_o)


class GatedMlp(nnx.Module):
    """SwiGLU feed-forward block, section 2 of https://arxiv.org/abs/2002.05202."""

    def __init__(self, cfg: TextConfig, *, rngs: nnx.Rngs):
        d, f = cfg.width, cfg.mlp_dim
        self.w_gate = weight(rngs, (d, f), ("embed", "mlp"), inputs=d)
        self.w_up = weight(rngs, (d, f), ("embed", "mlp"), inputs=d)
        self.w_down = weight(rngs, (f, d), ("mlp", "embed"), inputs=f)

    def __call__(self, x: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
        gate = named(project("BLD,DF->BLF", x, self.w_gate), MLP)
        up = named(project("BLD,DF->BLF", x, self.w_up), MLP)
        return project("BLF,FD->BLD", jax.nn.silu(gate) * up, self.w_down)


class Block(nnx.Module):
    """One pre-norm decoder layer."""

    def __init__(self, cfg: TextConfig, *, rngs: nnx.Rngs):
        self.attn_norm = constant(1.0, (cfg.width,), ("norm",))
        self.attn = Attention(cfg, rngs=rngs)
        self.mlp_norm = constant(1.0, (cfg.width,), ("norm",))
        self.mlp = GatedMlp(cfg, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "B L D"],
        visible: Visibility,
        rotary: Rotary,
        *,
        eps: float,
        kernel: Kernel = "xla",
    ) -> tuple[Float[Array, "B L D"], tuple[Array, Array]]:
        """The layer's output, and its keys and values for a cache."""
        with jax.named_scope("attention"):
            q, k, v = self.attn.qkv(rms_norm(x, self.attn_norm, eps), rotary)
            x = x + self.attn.out(attend(q, k, v, visible, kernel))
        with jax.named_scope("mlp"):
            x = x + self.mlp(rms_norm(x, self.mlp_norm, eps))
        return x, (k, v)

    def decode(
        self,
        x: Float[Array, "B 1 D"],
        cache: Cache,
        layer: Int[Array, ""],
        slots: Int[Array, " B"],
        rotary: Rotary,
        *,
        eps: float,
    ) -> tuple[Float[Array, "B 1 D"], Cache]:
        """Reads one token per row and writes its key and value into `slots` of layer `layer`."""
        q, k, v = self.attn.qkv(rms_norm(x, self.attn_norm, eps), rotary)
        rows = jnp.arange(len(slots))
        cache = {
            "k": cache["k"].at[layer, rows, :, :, slots].set(k[:, 0]),
            "v": cache["v"].at[layer, rows, :, slots].set(v[:, 0]),
        }
        visible = cached_text(slots, cache["v"].shape[3])
        x = x + self.attn.out(attend_cached(q, cache["k"][layer], cache["v"][layer], visible))
        return x + self.mlp(rms_norm(x, self.mlp_norm, eps)), cache


class Text(nnx.Module):
    """The tower."""

    def __init__(self, cfg: TextConfig, *, rngs: nnx.Rngs):
        d, v = cfg.width, cfg.vocab
        self.embed = table(rngs, (v, d), ("vocab", "embed"), inputs=d)
        self.blocks = stack(lambda r: Block(cfg, rngs=r), cfg.layers, rngs)
        self.norm = constant(1.0, (d,), ("norm",))
        self.lm_head = table(rngs, (d, v), ("embed", "vocab"), inputs=d)

    def __call__(
        self,
        x: Float[Array, "B L D"],
        positions: Int[Array, "B 3 L"],
        visible: Visibility,
        cfg: TextConfig,
        *,
        remat: Remat = "none",
        kernel: Kernel = "xla",
    ) -> Float[Array, "B L D"]:
        """Hidden states after the final norm."""
        rotary = self._rotary(positions, cfg, x.dtype)

        def layer(x, block):
            return block(x, visible, rotary, eps=cfg.norm_eps, kernel=kernel)[0], None

        with jax.named_scope("blocks"):
            x, _ = scan_layers(layer, x, self.blocks, remat=remat)
        return rms_norm(x, self.norm, cfg.norm_eps)

    def prefill(
        self,
        x: Float[Array, "B L D"],
        positions: Int[Array, "B 3 L"],
        visible: Visibility,
        cfg: TextConfig,
        *,
        cache_length: int,
    ) -> tuple[Float[Array, "B L D"], Cache]:
        """Hidden states after the final norm, and a cache whose first L slots are filled."""
        rotary = self._rotary(positions, cfg, x.dtype)

        def layer(x, block):
            return block(x, visible, rotary, eps=cfg.norm_eps)

        x, (k, v) = jax.lax.scan(layer, x, self.blocks)
        room = (0, cache_length - x.shape[1])
        none = (0, 0)
        cache: Cache = {
            "k": jnp.pad(k.transpose(0, 1, 3, 4, 2), [none, none, none, none, room]),
            "v": jnp.pad(v.transpose(0, 1, 3, 2, 4), [none, none, none, room, none]),
        }
        return rms_norm(x, self.norm, cfg.norm_eps), cache

    def decode(
        self,
        x: Float[Array, "B D"],
        positions: Int[Array, " B"],
        cache: Cache,
        slots: Int[Array, " B"],
        cfg: TextConfig,
    ) -> tuple[Float[Array, "B D"], Cache]:
        """One token per row; a generated token has the same position on all three axes."""
        axes = jnp.broadcast_to(positions[:, None, None], (len(positions), 3, 1))
        rotary = self._rotary(axes, cfg, x.dtype)

        # The cache is carried, not scanned over: a scan would copy all of it for every token.
        def layer(carry, inputs):
            x, cache = carry
            index, block = inputs
            return block.decode(x, cache, index, slots, rotary, eps=cfg.norm_eps), None

        layers = (jnp.arange(cfg.layers), self.blocks)
        (x, cache), _ = jax.lax.scan(layer, (x[:, None], cache), layers)
        return rms_norm(x[:, 0], self.norm, cfg.norm_eps), cache

    def _rotary(self, positions: Int[Array, "B 3 L"], cfg: TextConfig, dtype: DTypeLike) -> Rotary:
        # Rotated in the activation dtype, unlike the vision tower: that is how it was trained.
        cos, sin = text_rotary(
            positions,
            head_dim=cfg.head_dim,
            theta=cfg.rope_theta,
            sections=cfg.mrope_section,
        )
        return cos.astype(dtype), sin.astype(dtype)
