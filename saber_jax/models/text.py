"""Text tower: the decoder that reads words, patches and sound as one sequence.

Axis letters: B batch   R packed rows, in G groups of prompts   L length   C prompts
P slots of a prompt   A slots of an answer   D width   F mlp width   N query heads   K kv heads
H head dim   V vocabulary.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, TypedDict

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Shaped

from saber_jax.models.attention import attend, attend_cached
from saber_jax.models.config import TextConfig
from saber_jax.models.kernels import Kernel
from saber_jax.models.layers import (
    project,
    rms_norm,
    scan_layers,
)
from saber_jax.models.masks import Visibility, cached_text
from saber_jax.models.parameters import (
    Kind,
    Positions,
    bias,
    in_order,
    learns_first,
    scale,
    stack,
    table,
    weight,
)
from saber_jax.models.positions import Rotary, rotate, text_rotary
from saber_jax.models.remat import GATE, MLP_INPUT, UP, Remat
from saber_jax.models.sequence import Axis, attend_row


class LayerCache(TypedDict):
    """The kv cache of one layer: keys and values of the tokens so far, one slot each.

    A prompt is kept once, however many rows answer it: of n = B / C rows
    a prompt, n i up to n (i + 1) answer prompt i.
    Every prompt ends in the last of its slots, and what comes before a short one is meaningless: so
    all rows write each new token into one and the same slot, a plain slice of the array.

    The layout is that of the two matrix products of a decoding step; with slots before heads, XLA
    on CPUs would transpose the whole cache for every token.
    """

    prompt_k: Float[Array, "C K H P"]
    prompt_v: Float[Array, "C K P H"]
    k: Float[Array, "B K H A"]
    v: Float[Array, "B K A H"]


Cache = list[LayerCache]
"""One LayerCache per layer, in separate arrays that new tokens are written into."""


@dataclasses.dataclass(frozen=True)
class PromptSlots:
    """Where C prompts lie in packed rows, G groups of c; see `last_slots` for `ends`."""

    ends: Int[Array, "G c"]
    lengths: Int[Array, "G c"]
    slots: int  # Of each prompt in a cache, as many as the longest has.

    def cut(self, x: Shaped[Array, "R L ..."]) -> Shaped[Array, "C P ..."]:
        """The slots of each prompt, which ends in the last one."""
        return last_slots(x, self.ends, self.slots)

    def visible(self) -> Visibility:
        """What the last slot of a prompt sees of the prompt's: all that are not before it."""
        begins = self.slots - self.lengths.reshape(-1, 1)
        own = jnp.arange(self.slots)[None, :] >= begins
        return Visibility(
            query_segments=jnp.ones((len(own), 1), jnp.int32), key_segments=own.astype(jnp.int32)
        )


class Attention(nnx.Module):
    """Grouped-query attention; queries, keys and values are biased, the output is not."""

    def __init__(self, cfg: TextConfig, *, rngs: nnx.Rngs):
        d, n, k, h = cfg.width, cfg.heads, cfg.kv_heads, cfg.head_dim
        self.w_q = weight(rngs, (d, n, h), ("embed", "heads", "head_dim"), inputs=d)
        self.w_k = weight(rngs, (d, k, h), ("embed", "kv_heads", "head_dim"), inputs=d)
        self.w_v = weight(rngs, (d, k, h), ("embed", "kv_heads", "head_dim"), inputs=d)
        self.w_o = weight(rngs, (n, h, d), ("heads", "head_dim", "embed"), inputs=n * h)
        self.b_q = bias((n, h), ("heads", "head_dim"))
        self.b_k = bias((k, h), ("kv_heads", "head_dim"))
        self.b_v = bias((k, h), ("kv_heads", "head_dim"))

    def qkv(self, x: Float[Array, "B L D"], rotary: Rotary) -> tuple[Array, Array, Array]:
        """Rotated queries and keys, and values."""
        return self.queries(x, rotary), *self.keys_and_values(x, rotary)

    def queries(self, x: Float[Array, "B L D"], rotary: Rotary) -> Float[Array, "B L N H"]:
        return rotate(project("BLD,DNH->BLNH", x, self.w_q, self.b_q), rotary)

    def keys_and_values(self, x: Float[Array, "B L D"], rotary: Rotary) -> tuple[Array, Array]:
        k = rotate(project("BLD,DKH->BLKH", x, self.w_k, self.b_k), rotary)
        return k, project("BLD,DKH->BLKH", x, self.w_v, self.b_v)

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
        gate = checkpoint_name(project("BLD,DF->BLF", x, self.w_gate), GATE)
        up = checkpoint_name(project("BLD,DF->BLF", x, self.w_up), UP)
        return project("BLF,FD->BLD", jax.nn.silu(gate) * up, self.w_down)


class Block(nnx.Module):
    """One pre-norm decoder layer."""

    def __init__(self, cfg: TextConfig, *, rngs: nnx.Rngs):
        self.eps = cfg.norm_eps
        self.attn_norm = scale(cfg.width)
        self.attn = Attention(cfg, rngs=rngs)
        self.mlp_norm = scale(cfg.width)
        self.mlp = GatedMlp(cfg, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "B L D"],
        visible: Visibility,
        rotary: Rotary,
        *,
        kernel: Kernel = "xla",
        axis: Axis = None,
    ) -> tuple[Float[Array, "B L D"], tuple[Array, Array]]:
        """The layer's output, and its keys and values for a cache; `axis` as in `TextTower`."""
        with jax.named_scope("attention"):
            q, k, v = self.attn.qkv(rms_norm(x, self.attn_norm, self.eps), rotary)
            x = x + self.attn.out(attend_row(q, k, v, visible, kernel, axis))
        x = checkpoint_name(x, MLP_INPUT)
        with jax.named_scope("mlp"):
            x = x + self.mlp(rms_norm(x, self.mlp_norm, self.eps))
        return x, (k, v)

    def last_of_prompts(
        self, x: Float[Array, "R L D"], rotary: Rotary, prompts: PromptSlots
    ) -> tuple[Float[Array, "C 1 D"], tuple[Array, Array]]:
        """The output at each prompt's last slot alone, and keys and values of all slots."""
        normed = rms_norm(x, self.attn_norm, self.eps)
        k, v = (prompts.cut(kept) for kept in self.attn.keys_and_values(normed, rotary))
        x, normed, cos, sin = (last_slots(part, prompts.ends, 1) for part in (x, normed, *rotary))
        q = self.attn.queries(normed, (cos, sin))
        x = x + self.attn.out(attend(q, k, v, prompts.visible()))
        return x + self.mlp(rms_norm(x, self.mlp_norm, self.eps)), (k, v)

    def decode(
        self,
        x: Float[Array, "B 1 D"],
        cache: LayerCache,
        slot: Int[Array, ""],
        visible: Visibility,
        rotary: Rotary,
    ) -> tuple[Float[Array, "B 1 D"], LayerCache]:
        """Reads one token per row and writes its key and value into `slot` of the answer's."""
        q, k, v = self.attn.qkv(rms_norm(x, self.attn_norm, self.eps), rotary)
        k, v = k.transpose(0, 2, 3, 1), v.transpose(0, 2, 1, 3)
        k = jax.lax.dynamic_update_slice(cache["k"], k, (0, 0, 0, slot))
        v = jax.lax.dynamic_update_slice(cache["v"], v, (0, 0, slot, 0))
        prompt = cache["prompt_k"], cache["prompt_v"]
        x = x + self.attn.out(attend_cached(q, prompt, (k, v), visible))
        x = x + self.mlp(rms_norm(x, self.mlp_norm, self.eps))
        return x, LayerCache(prompt_k=prompt[0], prompt_v=prompt[1], k=k, v=v)


class TextTower(nnx.Module):
    """The tower."""

    def __init__(self, cfg: TextConfig, *, rngs: nnx.Rngs):
        d, v = cfg.width, cfg.vocab
        self.cfg = cfg
        self.embed = table(rngs, (v, d), ("vocab", "embed"), width=d, kind=Kind.EMBEDDING)
        self.blocks = stack(lambda r: Block(cfg, rngs=r), cfg.layers, rngs)
        self.norm = scale(d)
        self.lm_head = table(rngs, (d, v), ("embed", "vocab"), width=d, kind=Kind.OUTPUT)
        in_order(
            (Positions.TOKENS, self.embed),
            (Positions.TOKENS, self.blocks),
            (Positions.TOKENS, self.norm),
            (Positions.TARGETS, self.lm_head),
        )
        learns_first(self.embed, self.norm, self.lm_head)

    def __call__(
        self,
        x: Float[Array, "B L D"],
        positions: Int[Array, "B 3 L"],
        visible: Visibility,
        *,
        remat: Remat = "none",
        kernel: Kernel = "xla",
        axis: Axis = None,
    ) -> Float[Array, "B L D"]:
        """Hidden states after the final norm.

        With a mesh `axis`, L are the slots of one device and `visible` is that of whole rows, see
        sequence.py.
        """
        rotary = self._rotary(positions, x.dtype)

        def layer(x, block):
            return block(x, visible, rotary, kernel=kernel, axis=axis)[0], None

        with jax.named_scope("blocks"):
            x, _ = scan_layers(layer, x, self.blocks, remat=remat)
        return rms_norm(x, self.norm, self.cfg.norm_eps)

    def prefill(
        self,
        x: Float[Array, "R L D"],
        positions: Int[Array, "R 3 L"],
        visible: Visibility,
        *,
        prompts: PromptSlots,
        answer_slots: int,
        samples: int = 1,
        kernel: Kernel = "xla",
    ) -> tuple[Float[Array, "C D"], Cache]:
        """Each prompt's last hidden state after the final norm, and a cache with room to go on.

        Each prompt ends in the last of its slots and gets room for `samples` answers of
        `answer_slots`.
        """
        rotary = self._rotary(positions, x.dtype)

        def cached(k, v):
            return k.transpose(0, 2, 3, 1), v.transpose(0, 2, 1, 3)

        def layer(x, index):
            x, kept = of_layer(self.blocks, index)(x, visible, rotary, kernel=kernel)
            # Cut layer by layer, so that keys and values of all packed rows are never in memory.
            return x, cached(*map(prompts.cut, kept))

        # Of the last layer nothing is read but its output at the end of each prompt. The others
        # are sliced by number: a copy of all weights but the last layer's would not fit.
        last = self.cfg.layers - 1
        x, stacked = jax.lax.scan(layer, x, jnp.arange(last))
        x, kept = of_layer(self.blocks, last).last_of_prompts(x, rotary, prompts)
        by_layer = [*(of_layer(stacked, index) for index in range(last)), cached(*kept)]
        rows, heads = prompts.ends.size * samples, (self.cfg.kv_heads, self.cfg.head_dim)
        cache = []
        for prompt_k, prompt_v in by_layer:
            k = jnp.zeros((rows, *heads, answer_slots), x.dtype)
            cache.append(LayerCache(prompt_k=prompt_k, prompt_v=prompt_v, k=k, v=k.swapaxes(2, 3)))
        return rms_norm(x[:, 0], self.norm, self.cfg.norm_eps), cache

    def decode(
        self,
        x: Float[Array, "B D"],
        positions: Int[Array, " B"],
        cache: Cache,
        first: Int[Array, " C"],
        slot: Int[Array, ""],
        counts: Int[Array, " C"],
        *,
        layers: Sequence[Block] | None = None,
    ) -> tuple[Float[Array, "B D"], Cache]:
        """One token per row; a generated token has the same position on all three axes.

        Unrolled over layers, because a scan would slice and copy each layer's cache for every
        token.
        """
        axes = jnp.broadcast_to(positions[:, None, None], (len(positions), 3, 1))
        rotary = self._rotary(axes, x.dtype)
        prompt_slots, answer_slots = cache[0]["prompt_v"].shape[2], cache[0]["v"].shape[2]
        visible = cached_text(
            first, counts, slot, prompt_slots=prompt_slots, answer_slots=answer_slots
        )

        x, cache = x[:, None], list(cache)
        for index, layer in enumerate(cache):
            block = layers[index] if layers else of_layer(self.blocks, index)
            x, cache[index] = block.decode(x, layer, slot, visible, rotary)
        return rms_norm(x[:, 0], self.norm, self.cfg.norm_eps), cache

    def _rotary(self, positions: Int[Array, "B 3 L"], dtype: DTypeLike) -> Rotary:
        # Rotated in the activation dtype, unlike the vision tower, as the released model was
        # trained.
        cos, sin = text_rotary(
            positions,
            head_dim=self.cfg.head_dim,
            theta=self.cfg.rope_theta,
            sections=self.cfg.mrope_section,
        )
        return cos.astype(dtype), sin.astype(dtype)


def of_layer(stacked: Any, index: int | Int[Array, ""]) -> Any:
    """Layer `index` of a tree that is stacked over layers."""
    return jax.tree.map(lambda leaf: leaf[index], stacked)


def last_slots(x: Shaped[Array, "R L ..."], ends: Int[Array, "G c"], length: int) -> Array:
    """The last `length` slots of every prompt of packed rows: [C, length, ...], C = G c.

    The rows are G groups of equally many, and `ends` counts slots from the start of a group. Only
    a group's own rows are looked into, so that a mesh that holds each group on its own devices has
    nothing to send. Before a prompt shorter than `length` stands what precedes it in the row, or
    the row's first slot. Two groups of one row each, with prompts `a b c`, `d e` and `f`, `g h`:

        x     a b c d e      ends  3 5      length 2   b c   d e
              f g h . .            1 3                 f f   g h
    """
    groups = x.reshape(len(ends), -1, *x.shape[2:])
    slots = jnp.maximum(ends[:, :, None] - length + jnp.arange(length)[None, None], 0)
    index = slots.reshape(len(ends), -1, *(1 for _ in x.shape[2:]))
    return jnp.take_along_axis(groups, index, axis=1).reshape(-1, length, *x.shape[2:])
