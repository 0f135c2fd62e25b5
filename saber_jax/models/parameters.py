"""Constructors of parameters, and their metadata.

The metadata of a parameter are its logical axes (sharding.py maps them to the mesh) and its role.
Weight decay, adapters, FLOPs and the vocabulary group of the optimizer depend on the role, never on
the parameter's name.
"""

import dataclasses
import enum
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

AXES, IN_AXES = "axes", "in_axes"
ROLE = "role"  # The metadata key of a Role.


class Kind(enum.Enum):
    """What a parameter does to the activations."""

    MATRIX = "matrix"  # Maps activations to others. May have an adapter.
    EMBEDDING = "embedding"  # One vector a token, looked up.
    OUTPUT = "output"  # One vector a token, compared with hidden states.
    ADAPTER = "adapter"  # One of the two thin matrices beside a MATRIX, see lora.py.
    SCALE = "scale"  # Of a norm.
    BIAS = "bias"
    UNREAD = "unread"  # Part of the released checkpoints, but not used by any forward pass.

    @property
    def decays(self) -> bool:
        """Whether weight decay applies: to matrices, adapters and embeddings that are used."""
        return self in (Kind.MATRIX, Kind.EMBEDDING, Kind.OUTPUT, Kind.ADAPTER)

    @property
    def multiplies(self) -> bool:
        """Whether activations are multiplied with it in a matrix product."""
        return self in (Kind.MATRIX, Kind.OUTPUT, Kind.ADAPTER)


class Positions(enum.Enum):
    """The positions to which a parameter is applied; train/flops.py counts them in a batch."""

    PATCHES = "patches"
    UNITS = "units"  # 2 x 2 patches.
    MEL_FRAMES = "mel_frames"
    AUDIO_STEPS = "audio_steps"
    AUDIO_TOKENS = "audio_tokens"
    TOKENS = "tokens"
    TARGETS = "targets"


@dataclasses.dataclass(frozen=True)
class Part:
    """A part of a tower, with number `index` from its input to its output.

    `layers` is true for the repeated layers of the tower, which contain attention.
    """

    index: int
    positions: Positions
    layers: bool


@dataclasses.dataclass(frozen=True)
class Role:
    """The role of a parameter. `part` is its place in its tower, None if it is not used.

    `vocabulary` marks the parameters that train alone during optimizer.vocabulary_steps.
    """

    kind: Kind
    part: Part | None = None
    vocabulary: bool = False


def weight(
    rngs: nnx.Rngs, shape: tuple[int, ...], axes: tuple[str, ...], *, inputs: int
) -> nnx.Param:
    """A random matrix that maps `inputs` numbers to others; `axes` names its dimensions.

    The leading axes are the inputs. Standard deviation inputs**-0.5: near the released 0.02 at the
    released widths, and it still lets a signal through at tiny ones.
    """
    in_axes = next(i for i in range(len(shape)) if math.prod(shape[:i]) == inputs)
    metadata = {AXES: axes, IN_AXES: in_axes, ROLE: Role(Kind.MATRIX)}
    return nnx.Param(_normal(rngs, shape, inputs), **metadata)


def table(
    rngs: nnx.Rngs, shape: tuple[int, ...], axes: tuple[str, ...], *, width: int, kind: Kind
) -> nnx.Param:
    """Random vectors of `width` numbers, one a token."""
    return nnx.Param(_normal(rngs, shape, width), **{AXES: axes, ROLE: Role(kind)})


def scale(width: int) -> nnx.Param:
    """The scale of a norm."""
    return nnx.Param(jnp.ones(width, jnp.float32), **{AXES: ("norm",), ROLE: Role(Kind.SCALE)})


def bias(shape: tuple[int, ...], axes: tuple[str, ...]) -> nnx.Param:
    return nnx.Param(jnp.zeros(shape, jnp.float32), **{AXES: axes, ROLE: Role(Kind.BIAS)})


def _normal(rngs: nnx.Rngs, shape: tuple[int, ...], inputs: int) -> Array:
    return nnx.initializers.normal(stddev=1 / math.sqrt(inputs))(rngs.params(), shape, jnp.float32)


def stack(make: Callable[[nnx.Rngs], nnx.Module], layers: int, rngs: nnx.Rngs) -> Any:
    """One module whose every parameter has a leading axis of `layers` independent draws."""
    return nnx.vmap(lambda key: make(nnx.Rngs(key)))(jax.random.split(rngs.params(), layers))


def in_order(*parts: tuple[Positions, nnx.Module | nnx.Param]) -> None:
    """Stores in the parameters of a tower their place in it, from input to output."""
    for index, (positions, members) in enumerate(parts):
        params = _params(members)
        part = Part(
            index, positions, layers=any(p.ndim > len(p.get_metadata(AXES)) for p in params)
        )
        for param in params:
            param.set_metadata(ROLE, dataclasses.replace(param.get_metadata(ROLE), part=part))


def learns_first(*params: nnx.Param) -> None:
    """Puts parameters into the vocabulary group, see train/optimizer.py."""
    for param in params:
        param.set_metadata(ROLE, dataclasses.replace(param.get_metadata(ROLE), vocabulary=True))


def _params(members: nnx.Module | nnx.Param) -> list[nnx.Param]:
    if isinstance(members, nnx.Param):
        return [members]
    return [node for _, node in nnx.iter_graph(members) if isinstance(node, nnx.Param)]


def logical_axes(param: nnx.Param) -> tuple[str, ...]:
    """The names of all its dimensions; those before the ones it was made with are layers."""
    names = param.get_metadata(AXES)
    return ("layers",) * (param.ndim - len(names)) + names
