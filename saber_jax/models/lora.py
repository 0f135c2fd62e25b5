"""LoRA, https://arxiv.org/abs/2106.09685: low-rank adapters of frozen weights W.

    x W + (alpha / rank) (x A) B        W [in, out]   A [in, rank]   B [rank, out]

The adapters are a subtree of the parameters: for `text/blocks/attn/w_q` there are
`lora/text/blocks/attn/w_q/a` and `.../b`. B starts at zero, so the first forward pass is that of
the base model. Parameters without the subtree are the base model at any time: `saber.without_lora`
gives the reference policy of a preference loss, which shares the policy's arrays.

In training, dropout is applied to the input of adapters only, as in
https://github.com/huggingface/peft: see `keyed` and `dropped`.

Axis letters as in the equation of the projection; r is the rank, B the rows of a batch.
"""

import dataclasses
import fnmatch
import math
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, Key

from saber_jax.batch import NetworkInputs
from saber_jax.models.config import LoraConfig
from saber_jax.models.parameters import AXES, IN_AXES, ROLE, Kind, Role
from saber_jax.models.shards import SHARDS, all_gather_weight, shards_of

ADAPTERS = "lora"

Rows = TypeVar("Rows", bound=NetworkInputs)


class Adapted(nnx.Module):
    """A weight with its adapter, which replaces the weight in a module.

    With `keys`, one per row, dropout is applied to the adapter's input.
    """

    def __init__(
        self, w: nnx.Param, a: nnx.Param, b: nnx.Param, cfg: LoraConfig, keys: nnx.Variable | None
    ):
        self.w, self.a, self.b, self.cfg, self.keys = w, a, b, cfg, keys

    @property
    def shape(self) -> tuple[int, ...]:
        return self.w.shape

    def project(self, equation: str, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """The einsum of x and W + scale A B, without forming A B."""
        given, weight, out = equation.replace("->", ",").split(",")
        split = self.a.ndim - 1
        kept = "".join(letter for letter in given if letter not in weight[:split])
        read = x if self.keys is None else dropped(x, self.keys[...], self.cfg.dropout)
        thin = jnp.einsum(f"{given},{weight[:split]}r->{kept}r", read, all_gather_weight(self.a))
        thin *= self.cfg.scale  # Scaling the output instead would take a pass over it.
        delta = jnp.einsum(f"{kept}r,r{weight[split:]}->{out}", thin, all_gather_weight(self.b))
        return jnp.einsum(equation, x, all_gather_weight(self.w)) + delta


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraMatrix:
    """One of the two matrices; stacked over layers like the weight it belongs to."""

    shape: tuple[int, ...]
    axes: tuple[str, ...]
    inputs: int  # Width of the weight's input.
    role: Role
    zero: bool


def plan(weights: Mapping[str, nnx.Param], cfg: LoraConfig) -> dict[str, dict[str, LoraMatrix]]:
    """Name of a weight -> its `a` and `b`, for every weight that matches `cfg.targets`.

    Raises ValueError naming a pattern that matches no weight of a linear layer.
    """
    linear = {n: w for n, w in weights.items() if w.get_metadata(ROLE).kind is Kind.MATRIX}
    chosen = []
    for pattern in cfg.targets:
        matches = fnmatch.filter(linear, pattern)
        if not matches:
            raise ValueError(
                f"config.lora.targets pattern {pattern!r} matches no linear layer. Their names "
                f"look like {next(reversed(linear))!r}; embeddings and lm_head take no adapter."
            )
        chosen += matches
    return {name: _leaves(linear[name], cfg.rank) for name in linear if name in chosen}


def _leaves(w: nnx.Param, rank: int) -> dict[str, LoraMatrix]:
    axes, split = w.get_metadata(AXES), w.get_metadata(IN_AXES)
    role = dataclasses.replace(w.get_metadata(ROLE), kind=Kind.ADAPTER)
    layers = w.ndim - len(axes)
    stacked, stack = w.shape[:layers], ("layers",) * layers
    into, out = w.shape[layers : layers + split], w.shape[layers + split :]
    inputs = math.prod(into)
    a = (*stack, *axes[:split], "rank")
    b = (*stack, "rank", *axes[split:])
    return {
        "a": LoraMatrix(
            shape=(*stacked, *into, rank), axes=a, inputs=inputs, role=role, zero=False
        ),
        "b": LoraMatrix(shape=(*stacked, rank, *out), axes=b, inputs=inputs, role=role, zero=True),
    }


def tree(
    planned: Mapping[str, Mapping[str, LoraMatrix]], make: Callable[[LoraMatrix], Any]
) -> dict[str, Any]:
    """The nested subtree with `make(leaf)` at every leaf."""
    root: dict[str, Any] = {}
    for name, leaves in planned.items():
        node = root
        for key in name.split("/"):
            node = node.setdefault(key, {})
        node.update({side: make(leaf) for side, leaf in leaves.items()})
    return root


def init(planned: Mapping[str, Mapping[str, LoraMatrix]], key: Key[Array, ""]) -> dict[str, Any]:
    """B of zeros; A uniform within inputs**-0.5, as in the authors' https://github.com/microsoft/LoRA."""
    number = iter(range(2 * len(planned)))

    def draw(leaf: LoraMatrix) -> Array:
        own = jax.random.fold_in(key, next(number))
        if leaf.zero:
            return jnp.zeros(leaf.shape, jnp.float32)
        bound = 1 / math.sqrt(leaf.inputs)
        return jax.random.uniform(own, leaf.shape, jnp.float32, -bound, bound)

    return tree(planned, draw)


def attach(
    model: nnx.Module,
    name: str,
    adapter: Mapping[str, Array],
    leaves: Mapping[str, LoraMatrix],
    cfg: LoraConfig,
    mesh: Mesh | None,
    keys: Key[Array, "*layers B"] | None,
) -> None:
    """Replaces the weight `name`, such as "text/blocks/attn/w_q", of `model` by an Adapted.

    With `mesh`, its matrices are shards, see models/shards.py. With `keys`, dropout is applied.
    """
    *parents, last = name.split("/")
    module = model
    for parent in parents:
        module = getattr(module, parent)
    a, b = (nnx.Param(adapter[side]) for side in "ab")
    for matrix, side in ((a, "a"), (b, "b")):
        leaf = leaves[side]
        matrix.set_metadata(SHARDS, shards_of(leaf.axes, leaf.shape, mesh))
    held = None if keys is None else nnx.Variable(keys)
    setattr(module, last, Adapted(getattr(module, last), a, b, cfg, held))


def keyed(batch: Rows, cfg: LoraConfig | None, seed: int, step: Int[Array, ""]) -> Rows:
    """The batch of a training step, with a key for every row if `cfg` has dropout.

    Rows without keys (evaluation, the reference, generation) have no dropout. Keys are part of
    their rows, so the mask depends on the seed, the step and the row's index in the batch, but not
    on microbatches, and on the mesh only through its sequence axis (`keys_here`). All forward
    passes of a row in a step use the same key: a clip and the same clip with a withheld modality
    then differ only in their inputs, and both answers of a pair have the same mask on their common
    prefix.
    """
    if cfg is None or not cfg.dropout:
        return batch
    # Threefry, because rbg under vmap would generate all rows from the first key.
    key = jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), step)
    return dataclasses.replace(batch, dropout_keys=jax.random.split(key, len(batch.text.tokens)))


def keys_here(rows: Key[Array, " B"] | None, axis: str | None) -> Key[Array, " B"] | None:
    """The rows' keys for the slots of one device, where those along the mesh `axis` share a row.

    Without keys of their own, all of them would have the mask of the first slots.
    """
    if rows is None or axis is None:
        return rows
    place = jax.lax.axis_index(axis)
    return jax.vmap(lambda row: jax.random.fold_in(row, place))(rows)


def keys_of(
    planned: Mapping[str, Mapping[str, LoraMatrix]], rows: Key[Array, " B"]
) -> dict[str, Key[Array, "*layers B"]]:
    """Separate keys for every adapter (by the name of its weight), layer and row."""

    def draw(number: int, leaf: LoraMatrix) -> Key[Array, "*layers B"]:
        layers = leaf.shape[: leaf.axes.count("layers")]

        def one(row):
            return jax.random.split(jax.random.fold_in(row, number), layers)

        return jax.vmap(one, out_axes=-1)(rows)

    return {name: draw(i, leaves["a"]) for i, (name, leaves) in enumerate(planned.items())}


def dropped(
    x: Float[Array, "C ... D"], keys: Key[Array, " B"], rate: float
) -> Float[Array, "C ... D"]:
    """Dropout: x with a share `rate` of its numbers zeroed and the others scaled by 1 / (1 - rate).

    There is one key per row. A row may be several entries of x, such as the chunks of its sound, so
    C is a multiple of B. The mask of a slot does not depend on the row's length.
    """
    entries = x.shape[0] // len(keys)
    words = jax.vmap(lambda key: _bits((entries, *x.shape[1:]), *jax.random.key_data(key)))(keys)
    cut = round(rate * 2**32)
    kept = words.reshape(x.shape) >= np.uint32(cut)
    return x * (2**32 / (2**32 - cut)) * kept.astype(x.dtype)


def _bits(shape: tuple[int, ...], first: Array, second: Array) -> Array:
    """Random uint32: a hash of each element's index and the two words of a key.

    Thirteen operations an element, which the compiler computes where they are read. Threefry takes
    fifty, and its words are written to memory and read again. The steps are those of the mixer
    lowbias32 (https://github.com/skeeto/hash-prospector), with a word of the key before each half;
    threefry made the keys, so that they differ in all of their bits.
    """
    strides = np.cumprod((1, *shape[:0:-1]))[::-1]

    def hashed(carried):
        turn, x = carried
        for axis, stride in enumerate(strides):
            x += jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * np.uint32(stride)
        x = (x ^ (x >> 16)) * np.uint32(0x7FEB352D)
        x = (x ^ (x >> 15)) + second
        x = (x ^ (x >> 15)) * np.uint32(0x846CA68B)
        return turn + 1, x ^ (x >> 16)

    # A loop of one turn, which XLA removes. Without it jax would compute the indices once, ahead of
    # the loop over layers, and have every layer read them from memory.
    start = (0, jnp.broadcast_to(first, shape))
    return jax.lax.while_loop(lambda carried: carried[0] < 1, hashed, start)[1]


Weight = TypeVar("Weight", Array, np.ndarray)


def merged(w: Weight, a: Weight, b: Weight, scale: float) -> Weight:
    """W + scale A B, computed in float32 and rounded once to W's dtype; NumPy arrays stay NumPy."""
    layers = a.ndim + b.ndim - w.ndim - 2
    stacked, rank = w.shape[:layers], a.shape[-1]
    delta = a.reshape(*stacked, -1, rank) @ b.reshape(*stacked, rank, -1)
    return (w.astype(jnp.float32) + scale * delta.reshape(w.shape)).astype(w.dtype)
