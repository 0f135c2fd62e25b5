"""The network as pure functions over a nested dict of arrays; modules are only used inside.

Axis letters: B batch   L length   C prompts   D width   V vocabulary.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Key

from saber_jax import sharding
from saber_jax.batch import NetworkInputs, Prompts
from saber_jax.models import lora, sequence
from saber_jax.models.audio import AudioTower
from saber_jax.models.config import SaberConfig
from saber_jax.models.kernels import Kernel
from saber_jax.models.masks import packed_text
from saber_jax.models.parameters import ROLE, logical_axes
from saber_jax.models.remat import Remat
from saber_jax.models.shards import all_gather_table, lookup, mark
from saber_jax.models.text import Block, Cache, PromptSlots, TextTower, of_layer
from saber_jax.models.tiles import tile
from saber_jax.models.vision import VisionTower
from saber_jax.tree import flatten

Params = dict[str, Any]
"""{"vision": ..., "audio": ..., "text": ...}; repeated layers are stacked on a leading axis.

With `cfg.lora` there is also "lora" (models/lora.py). Every function here takes parameters without
that subtree as well and then computes the base model: see `without_lora`."""


class Saber(nnx.Module):
    """The three towers."""

    def __init__(self, cfg: SaberConfig, *, rngs: nnx.Rngs):
        self.vision = VisionTower(cfg.vision, rngs=rngs)
        self.audio = AudioTower(cfg.audio, rngs=rngs)
        self.text = TextTower(cfg.text, rngs=rngs)


def init(cfg: SaberConfig, key: Key[Array, ""]) -> Params:
    """Random float32 parameters. Works under jit, so that each device draws its own part."""
    params = _params(Saber(cfg, rngs=nnx.Rngs(params=key)))
    return params if cfg.lora is None else params | {lora.ADAPTERS: init_lora(cfg, key)}


def init_lora(cfg: SaberConfig, key: Key[Array, ""]) -> Params:
    """New adapters for `params | {"lora": ...}`; they have no effect until they are trained."""
    return lora.init(_plan(cfg), key)


def without_lora(params: Params) -> Params:
    """The base model's parameters: the same arrays, so it costs no memory.

    `hidden(without_lora(params), batch, cfg)` with the policy's `cfg` is the reference of a
    preference loss, as long as only adapters train.
    """
    return {tower: tree for tower, tree in params.items() if tower != lora.ADAPTERS}


def merge_lora(params: Params, cfg: SaberConfig) -> Params:
    """The base model with its adapters merged, which is equal up to rounding.

    Takes and returns JAX or NumPy arrays. Parameters without adapters are returned unchanged.
    """
    adapters = params.get(lora.ADAPTERS)
    out = jax.tree.map(lambda leaf: leaf, without_lora(params))
    if adapters is None or cfg.lora is None:
        return out
    for name in _plan(cfg):
        *parents, last = name.split("/")
        adapter, node = _at(adapters, name), _at(out, "/".join(parents))
        node[last] = lora.merged(node[last], adapter["a"], adapter["b"], cfg.lora.scale)
    return out


def abstract(cfg: SaberConfig) -> Params:
    """The tree of `init` with jax.ShapeDtypeStruct leaves."""
    params = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), _params(_blank(cfg, None))
    )
    if cfg.lora is None:
        return params
    adapters = lora.tree(_plan(cfg), lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.float32))
    return params | {lora.ADAPTERS: adapters}


def shardings(cfg: SaberConfig, mesh: Mesh | AbstractMesh) -> Params:
    """The tree of `init`, with a NamedSharding per parameter."""
    return sharding.parameter_shardings(axes(cfg), abstract(cfg), mesh)


def axes(cfg: SaberConfig) -> Params:
    """The tree of `init`, with a tuple of logical axis names per parameter.

    Names: layers, embed, mlp, heads, kv_heads, head_dim, vocab, and the never-sharded norm, patch,
    taps, mel, marker, rank.
    """

    return _described(cfg, logical_axes, lambda leaf: leaf.axes)


def roles(cfg: SaberConfig) -> Params:
    """The tree of `init`, with a parameters.Role per parameter."""
    return _described(cfg, lambda param: param.get_metadata(ROLE), lambda leaf: leaf.role)


def _described(
    cfg: SaberConfig,
    of_param: Callable[[nnx.Param], Any],
    of_adapter: Callable[[lora.LoraMatrix], Any],
) -> Params:
    state = nnx.state(_blank(cfg, None), nnx.Param)
    tree = nnx.to_pure_dict(jax.tree.map(of_param, state, is_leaf=_is_param))
    if cfg.lora is None:
        return tree
    return tree | {lora.ADAPTERS: lora.tree(_plan(cfg), of_adapter)}


def specs(params: Params, cfg: SaberConfig, mesh: Mesh) -> Params:
    """The tree of `params`, with or without adapters, with a PartitionSpec per parameter."""
    places = shardings(_adapters_of(params, cfg), mesh)
    return jax.tree.map(lambda place: place.spec, places)


def hidden(
    params: Params,
    batch: NetworkInputs,
    cfg: SaberConfig,
    *,
    dtype: DTypeLike = jnp.float32,
    remat: Remat = "none",
    max_frame_patches: int | None = None,
    kernel: Kernel = "xla",
    response: int = 0,
    mesh: Mesh | None = None,
) -> Float[Array, "B L D"]:
    """Hidden states after the final norm, in `dtype`.

    With `mesh`, this is the part of one device inside `jax.shard_map` over it: its rows, or along
    the sequence axis its share of their slots (L), and its shards of the parameters.
    `max_frame_patches` is the most patches that any
    one frame of the batch has; given it, the vision tower's attention costs time linear in the
    patch budget instead of quadratic. Other kernels than XLA's need `response`, the length of each
    of the two response regions of a row.
    """
    axis, text = sharding.sequence_axis(mesh), batch.text
    model = _bind(params, cfg, dtype, mesh, lora.keys_here(batch.dropout_keys, axis))
    x = _embed(model, batch, dtype, remat, max_frame_patches, kernel, axis)
    with jax.named_scope("text"):
        segments, branch = (sequence.gather(x, axis) for x in (text.segments, text.branch))
        visible = packed_text(segments, branch, response=response)
        return model.text(x, text.positions, visible, remat=remat, kernel=kernel, axis=axis)


def head(
    params: Params, cfg: SaberConfig, *, dtype: DTypeLike, mesh: Mesh | None = None
) -> Float[Array, "D W"]:
    """The vocabulary projection, whole; `mesh` as in `hidden`, and with it columns beyond the
    vocabulary may follow, see shards.all_gather_table."""
    return all_gather_table(_bind(params, cfg, dtype, mesh).text.lm_head)


def logits(params: Params, hidden: Float[Array, "... D"]) -> Float[Array, "... V"]:
    """Next-token scores in float32; the matrix product takes `hidden`'s dtype."""
    head = params["text"]["lm_head"].astype(hidden.dtype)
    return jnp.einsum("...D,DV->...V", hidden, head, preferred_element_type=jnp.float32)


def prefill(
    params: Params,
    batch: Prompts,
    cfg: SaberConfig,
    *,
    prompt_slots: int,
    answer_slots: int,
    samples: int = 1,
    dtype: DTypeLike = jnp.float32,
    max_frame_patches: int | None = None,
    kernel: Kernel = "xla",
) -> tuple[Float[Array, "C D"], Cache]:
    """Prefills packed prompts: the last hidden state of each, and a kv cache for its answers.

    C prompts of `batch.ends` [G, c], C = G c. No prompt is longer than `prompt_slots`. The cache
    keeps each prompt once, for `samples` answers of up to `answer_slots` tokens. Raises ValueError
    if it would have no room for an answer.
    """
    if answer_slots < 1 or samples < 1:
        raise ValueError(
            "The cache must have room for at least one answer of one token, got "
            f"{samples} answers of {answer_slots}."
        )
    model = _bind(params, cfg, dtype)
    x = _embed(model, batch, dtype, "none", max_frame_patches, kernel)
    return model.text.prefill(
        x,
        batch.text.positions,
        packed_text(batch.text.segments, batch.text.branch, longest=prompt_slots),
        prompts=PromptSlots(batch.ends, batch.lengths, prompt_slots),
        answer_slots=answer_slots,
        samples=samples,
        kernel=kernel,
    )


@functools.partial(jax.jit, static_argnames=("cfg", "dtype", "tiled"))
def text_layers(
    params: Params, cfg: SaberConfig, dtype: DTypeLike = jnp.float32, *, tiled: bool
) -> list[Block]:
    """A copy of the text tower's layers as separate weights, `tiled` for CPUs, for fast decoding on
    one device: XLA would copy each layer's weights out of the stack for every token."""
    text = _bind(params, cfg, dtype).text
    layers = [of_layer(text.blocks, index) for index in range(text.cfg.layers)]
    for layer in layers if tiled else ():
        tile(layer)
    return layers


def decode(
    params: Params,
    tokens: Int[Array, " B"],
    positions: Int[Array, " B"],
    cache: Cache,
    first: Int[Array, " C"],
    slot: Int[Array, ""],
    counts: Int[Array, " C"],
    cfg: SaberConfig,
    dtype: DTypeLike = jnp.float32,
    layers: Sequence[Block] | None = None,
) -> tuple[Float[Array, "B D"], Cache]:
    """Decodes one token per row; returns its hidden state and the new cache.

    Keys and values go to `slot` of the answers' slots, the same in all rows; after the last slot
    comes the first again. A row sees its prompt from slot `first[prompt]` on, where that begins,
    and the last `counts[prompt]` tokens of its answer, this one included.
    `layers` are those of `text_layers`, to be read instead of `params`'.
    """
    text = _bind(params, cfg, dtype).text
    x = text.embed[tokens]
    return text.decode(x, positions, cache, first, slot, counts, layers=layers)


def check_tree(expected: Params, got: Params, *, dtypes: bool = True) -> None:
    """Raises one ValueError that lists every missing, unexpected, mis-shaped or wrong-dtype leaf.

    Without `dtypes` any floating-point dtype is accepted.

    nnx.merge fills leaves by sorted position, so without this a renamed leaf would silently put
    one parameter into another.
    """
    problems = _differences(expected, got, dtypes=dtypes)
    if problems:
        raise ValueError(_report(problems))


def _differences(expected: Params, got: Params, *, dtypes: bool) -> list[str]:
    want, have = flatten(expected), flatten(got)
    problems = [
        f"missing {name} {tuple(want[name].shape)}" for name in sorted(want.keys() - have.keys())
    ]
    problems += [f"unexpected {name}" for name in sorted(have.keys() - want.keys())]
    for name in sorted(want.keys() & have.keys()):
        a, b = want[name], have[name]
        if tuple(a.shape) != tuple(b.shape):
            problems.append(f"{name}: expected shape {tuple(a.shape)}, got {tuple(b.shape)}")
        elif (dtypes and a.dtype != b.dtype) or not jnp.issubdtype(b.dtype, jnp.floating):
            problems.append(f"{name}: expected {a.dtype}, got {b.dtype}")
    return problems


def _report(problems: list[str]) -> str:
    listing = "\n  ".join(problems)
    return f"The parameters do not fit the model in {len(problems)} places:\n  {listing}"


def _params(model: Saber) -> Params:
    return nnx.to_pure_dict(nnx.state(model, nnx.Param))


@functools.lru_cache(maxsize=8)
def _blank(cfg: SaberConfig, mesh: Mesh | None) -> Saber:
    """The network without values and adapters; its parameters know how `mesh` shards them."""
    model = nnx.eval_shape(lambda: Saber(cfg, rngs=nnx.Rngs(0)))
    if mesh is not None:
        mark(model, mesh)
    return model


@functools.lru_cache(maxsize=8)
def _plan(cfg: SaberConfig) -> dict[str, dict[str, lora.LoraMatrix]]:
    """Every adapter of `cfg.lora`, by the name of its weight."""
    if cfg.lora is None:
        raise ValueError("This model has no adapters: its config has lora=None.")
    state = nnx.state(_blank(dataclasses.replace(cfg, lora=None), None), nnx.Param)
    leaves = jax.tree_util.tree_leaves_with_path(state, is_leaf=_is_param)
    return lora.plan({"/".join(str(k.key) for k in path): leaf for path, leaf in leaves}, cfg.lora)


def _is_param(leaf: Any) -> bool:
    return isinstance(leaf, nnx.Param)


def _at(tree: Params, name: str) -> Any:
    for key in name.split("/"):
        tree = tree[key]
    return tree


def _bind(
    params: Params,
    cfg: SaberConfig,
    dtype: DTypeLike,
    mesh: Mesh | None = None,
    row_keys: Key[Array, " B"] | None = None,
) -> Saber:
    """The network with these values, cast to `dtype`; with `row_keys`, adapters have dropout.

    Cast as a whole rather than layer by layer: sharded parameters are then gathered in `dtype`,
    half the traffic of float32 for bfloat16.
    """
    cfg = _adapters_of(params, cfg)
    expected = abstract(cfg)
    if mesh is not None:
        expected = jax.tree.map(_local, expected, shardings(cfg, mesh))
    if problems := _differences(expected, params, dtypes=False):
        raise ValueError(_report(problems))
    cast = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), params)
    model = nnx.merge(nnx.split(_blank(cfg, mesh))[0], without_lora(cast))
    if cfg.lora is not None:
        keys = {} if row_keys is None else lora.keys_of(_plan(cfg), row_keys)
        for name, leaves in _plan(cfg).items():
            adapter = _at(cast[lora.ADAPTERS], name)
            lora.attach(model, name, adapter, leaves, cfg.lora, mesh, keys.get(name))
    return model


def _adapters_of(params: Params, cfg: SaberConfig) -> SaberConfig:
    """`cfg`, with adapters only if `params` has some."""
    return cfg if lora.ADAPTERS in params else dataclasses.replace(cfg, lora=None)


def _local(leaf: jax.ShapeDtypeStruct, place: NamedSharding) -> jax.ShapeDtypeStruct:
    """One device's shard of a parameter."""
    return jax.ShapeDtypeStruct(place.shard_shape(leaf.shape), leaf.dtype)


def _embed(
    model: Saber,
    batch: NetworkInputs,
    dtype: DTypeLike,
    remat: Remat,
    max_frame_patches: int | None,
    kernel: Kernel = "xla",
    axis: sequence.Axis = None,
) -> Float[Array, "B L D"]:
    """One vector per slot: the token's embedding, or the media output that it stands for."""
    with jax.named_scope("embed"):
        words = lookup(model.text.embed, batch.text.tokens)
    media = []
    if batch.vision.patches.shape[1]:
        with jax.named_scope("vision"):
            vision, unit, edge = batch.vision, model.vision.cfg.merge**2, 0
            if axis is not None:
                assert max_frame_patches is not None, "the frames at the edges need a bound"
                edge = -(-max_frame_patches // unit) * unit
                vision = jax.tree.map(lambda x: sequence.with_neighbours(x, edge, axis), vision)
            units = model.vision(
                vision.patches,
                vision.hw,
                vision.window,
                vision.frame,
                dtype=dtype,
                remat=remat,
                max_frame_patches=max_frame_patches,
                kernel=kernel,
            )
            media.append(units[:, edge // unit : units.shape[1] - edge // unit])
    if batch.audio.mel.shape[1]:
        with jax.named_scope("audio"):
            media.append(
                model.audio(batch.audio.mel, batch.audio.lengths, dtype=dtype, remat=remat)
            )
    if not media:
        return words
    with jax.named_scope("merge"):
        index = batch.text.media_index[:, :, None]
        rows = jnp.concatenate([sequence.gather(outputs, axis) for outputs in media], axis=1)
        return jnp.where(
            index >= 0, jnp.take_along_axis(rows, jnp.maximum(index, 0), axis=1), words
        )
