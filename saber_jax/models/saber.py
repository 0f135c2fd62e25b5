"""The network as pure functions over a nested dict of arrays; nothing outside sees a module.

Axis letters: B batch   L length   D width   V vocabulary   S cache slots.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Key

from saber_jax.models.audio import Audio
from saber_jax.models.config import SaberConfig
from saber_jax.models.layers import Remat
from saber_jax.models.masks import packed_text
from saber_jax.models.text import Cache, Text
from saber_jax.models.vision import Vision

Params = dict[str, Any]
"""{"vision": ..., "audio": ..., "text": ...}; repeated layers are stacked on a leading axis."""

Batch = Mapping[str, Any]
"""Arrays of a packed batch, or of the part of it that describes the inputs."""


class Saber(nnx.Module):
    """The three towers."""

    def __init__(self, cfg: SaberConfig, *, rngs: nnx.Rngs):
        self.vision = Vision(cfg.vision, rngs=rngs)
        self.audio = Audio(cfg.audio, rngs=rngs)
        self.text = Text(cfg.text, rngs=rngs)


def init(cfg: SaberConfig, key: Key[Array, ""]) -> Params:
    """Random float32 parameters. Works under jit, so that each device draws its own part."""
    return _params(Saber(cfg, rngs=nnx.Rngs(params=key)))


def abstract(cfg: SaberConfig) -> Params:
    """The tree of `init`, with jax.ShapeDtypeStruct leaves and no memory behind them."""
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), _params(_blank(cfg))
    )


def axes(cfg: SaberConfig) -> Params:
    """The tree of `init`, with a tuple of logical axis names per parameter.

    Names: layers, embed, mlp, heads, kv_heads, head_dim, vocab, and the never-sharded norm, patch,
    taps, mel, marker.
    """

    def named(variable: nnx.Param) -> tuple[str, ...]:
        names = variable.get_metadata("axes")
        return ("layers",) * (variable.ndim - len(names)) + names

    state = nnx.state(_blank(cfg), nnx.Param)
    return nnx.to_pure_dict(
        jax.tree.map(named, state, is_leaf=lambda leaf: isinstance(leaf, nnx.Param))
    )


def hidden(
    params: Params,
    batch: Batch,
    cfg: SaberConfig,
    *,
    dtype: DTypeLike = jnp.float32,
    remat: Remat = "none",
    max_frame_patches: int | None = None,
) -> Float[Array, "B L D"]:
    """Hidden states after the final norm, in `dtype`.

    `max_frame_patches` is the most patches that any one frame of the batch has; given it, the
    vision tower's attention costs time linear in the patch budget instead of quadratic.
    """
    model = _bind(params, cfg, dtype)
    x = _embed(model, batch, cfg, dtype, remat, max_frame_patches)
    with jax.named_scope("text"):
        visible = packed_text(batch["segments"], batch["branch"])
        return model.text(x, batch["positions"], visible, cfg.text, remat=remat)


def logits(params: Params, hidden: Float[Array, "... D"]) -> Float[Array, "... V"]:
    """Next-token scores in float32; the matrix product takes `hidden`'s dtype."""
    head = params["text"]["lm_head"].astype(hidden.dtype)
    return jnp.einsum("...D,DV->...V", hidden, head, preferred_element_type=jnp.float32)


def prefill(
    params: Params,
    batch: Batch,
    cfg: SaberConfig,
    *,
    cache_length: int,
    dtype: DTypeLike = jnp.float32,
    max_frame_patches: int | None = None,
) -> tuple[Float[Array, "B L D"], Cache]:
    """Reads one prompt per row (from slot 0, padding behind) and fills a cache with it.

    Raises ValueError if the cache is shorter than the rows.
    """
    length = batch["tokens"].shape[1]
    if cache_length < length:
        raise ValueError(
            f"cache_length must hold the prompt and what is generated, got {cache_length} for rows "
            f"of {length} tokens."
        )
    model = _bind(params, cfg, dtype)
    x = _embed(model, batch, cfg, dtype, "none", max_frame_patches)
    visible = packed_text(batch["segments"], batch["branch"])
    return model.text.prefill(x, batch["positions"], visible, cfg.text, cache_length=cache_length)


def decode(
    params: Params,
    tokens: Int[Array, " B"],
    positions: Int[Array, " B"],
    cache: Cache,
    slots: Int[Array, " B"],
    cfg: SaberConfig,
    dtype: DTypeLike = jnp.float32,
) -> tuple[Float[Array, "B D"], Cache]:
    """Reads one token per row and returns its hidden state and the new cache.

    A row's key and value go to slot `slots[row]`, and the row sees the slots up to that one, so
    the first generated token belongs right behind the prompt, over the prompt's padding.
    """
    model = _bind(params, cfg, dtype)
    return model.text.decode(model.text.embed[tokens], positions, cache, slots, cfg.text)


def check_tree(expected: Params, got: Params) -> None:
    """Raises one ValueError that lists every missing, unexpected, mis-shaped or wrong-dtype leaf.

    nnx.merge fills leaves by sorted position, so without this a renamed leaf would silently put
    one parameter into another.
    """
    problems = _differences(expected, got, dtypes=True)
    if problems:
        raise ValueError(_report(problems))


def _differences(expected: Params, got: Params, *, dtypes: bool) -> list[str]:
    want, have = _flat(expected), _flat(got)
    problems = [
        f"missing {name} {tuple(want[name].shape)}" for name in sorted(want.keys() - have.keys())
    ]
    problems += [f"unexpected {name}" for name in sorted(have.keys() - want.keys())]
    for name in sorted(want.keys() & have.keys()):
        a, b = want[name], have[name]
        if tuple(a.shape) != tuple(b.shape):
            problems.append(f"{name}: expected shape {tuple(a.shape)}, got {tuple(b.shape)}")
        elif dtypes and a.dtype != b.dtype:
            problems.append(f"{name}: expected {a.dtype}, got {b.dtype}")
    return problems


def _flat(tree: Params) -> dict[str, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {"/".join(str(getattr(key, "key", key)) for key in path): leaf for path, leaf in leaves}


def _report(problems: list[str]) -> str:
    listing = "\n  ".join(problems)
    return f"The parameters do not fit the model in {len(problems)} places:\n  {listing}"


def _params(model: Saber) -> Params:
    return nnx.to_pure_dict(nnx.state(model, nnx.Param))


@functools.lru_cache(maxsize=8)
def _blank(cfg: SaberConfig) -> Saber:
    """The network without values."""
    return nnx.eval_shape(lambda: Saber(cfg, rngs=nnx.Rngs(0)))


def _bind(params: Params, cfg: SaberConfig, dtype: DTypeLike) -> Saber:
    """The network with these values, cast to `dtype`.

    Cast as a whole rather than layer by layer: sharded parameters are then gathered in `dtype`,
    half the traffic of float32 for bfloat16.
    """
    if problems := _differences(abstract(cfg), params, dtypes=False):
        raise ValueError(_report(problems))
    cast = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), params)
    return nnx.merge(nnx.split(_blank(cfg))[0], cast)


def _embed(
    model: Saber,
    batch: Batch,
    cfg: SaberConfig,
    dtype: DTypeLike,
    remat: Remat,
    max_frame_patches: int | None,
) -> Float[Array, "B L D"]:
    """One vector per slot: the token's own, or the row of the media that it stands for."""
    with jax.named_scope("embed"):
        words = model.text.embed[batch["tokens"]]
    media = []
    if batch["patches"].shape[1]:
        with jax.named_scope("vision"):
            media.append(
                model.vision(
                    batch["patches"],
                    batch["patch_hw"],
                    batch["patch_window"],
                    batch["patch_frame"],
                    cfg.vision,
                    dtype=dtype,
                    remat=remat,
                    max_frame_patches=max_frame_patches,
                )
            )
    if batch["mel"].shape[1]:
        with jax.named_scope("audio"):
            media.append(
                model.audio(batch["mel"], batch["mel_lengths"], cfg.audio, dtype=dtype, remat=remat)
            )
    if not media:
        return words
    with jax.named_scope("merge"):
        index = batch["media_index"][:, :, None]
        rows = jnp.concatenate(media, axis=1)
        return jnp.where(
            index >= 0, jnp.take_along_axis(rows, jnp.maximum(index, 0), axis=1), words
        )
