"""The types of a batch: arrays of packed rows by modality, on the host and on the device.

Every part is a pytree. A field declares its dimensions after the row axis: numbers, or names of
properties of packing.Budget, the static shape of a row. `pack_rows` makes arrays of these shapes.
The fields are listed only here, so a new one needs a line here and a line where it is filled.
"""

import dataclasses
import enum
from typing import Any, Generic, TypeVar, cast

import jax
import numpy as np
from jaxtyping import Array

ArrayT = TypeVar("ArrayT", Array, np.ndarray, jax.ShapeDtypeStruct)
"""NumPy on the host, jax arrays on the device, shapes where a program is only compiled."""


class Branch(enum.IntEnum):
    """Which of a pair's two responses a slot or a target belongs to; supervised rows are SHARED."""

    SHARED = 0
    CHOSEN = 1
    REJECTED = 2


def _array(*dims: str | int, dtype: Any = np.int32, fill: float = 0) -> Any:
    """A field of shape [rows, *dims]; `fill` is the value of padding."""
    return dataclasses.field(metadata={"dims": dims, "dtype": np.dtype(dtype), "fill": fill})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class TextInputs(Generic[ArrayT]):
    """One entry per slot of the row.

    Segment 0 is padding. `positions` are TMRoPE's, on three axes. `media_index` is the row of the
    slot in concat(vision units, pooled audio), -1 for a token of its own.
    """

    tokens: ArrayT = _array("slots")
    segments: ArrayT = _array("slots")
    branch: ArrayT = _array("slots")
    positions: ArrayT = _array(3, "slots")
    media_index: ArrayT = _array("slots", fill=-1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class VisionInputs(Generic[ArrayT]):
    """One entry per patch, in tower order: whole windows one after another.

    `patches` are raw pixels, `hw` their place in the frame; `window` and `frame` number what a
    patch belongs to, 0 for padding.
    """

    patches: ArrayT = _array("patches", "patch_features", dtype=np.uint8)
    hw: ArrayT = _array("patches", 2)
    window: ArrayT = _array("patches")
    frame: ArrayT = _array("patches")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class AudioInputs(Generic[ArrayT]):
    """One entry per chunk of two seconds; `lengths` is its number of mel frames."""

    mel: ArrayT = _array("chunks", "chunk_frames", "mel_bins", dtype=np.float32)
    lengths: ArrayT = _array("chunks")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Targets(Generic[ArrayT]):
    """One entry per target, a token that the loss is computed on; weight 0 is padding.

    `source` is the slot whose hidden state predicts it, `section` the field of the answer, 1 to 6,
    or 0 for none, `segment` and `branch` as of its slot, `index` its place in its response.
    `reference` is log pi_ref in each of withhold.VIEWS, NaN where nobody computed it; supervised
    rows have no views.
    """

    tokens: ArrayT = _array("targets")
    source: ArrayT = _array("targets")
    section: ArrayT = _array("targets")
    segment: ArrayT = _array("targets")
    branch: ArrayT = _array("targets")
    index: ArrayT = _array("targets")
    weights: ArrayT = _array("targets", dtype=np.float32)
    reference: ArrayT = _array("views", "targets", dtype=np.float32, fill=np.nan)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class PairInputs(Generic[ArrayT]):
    """One entry per segment, which is an example in stage 1 and a preference pair in stage 2.

    `kappa` is how strongly the modalities disagree, `conflict` indexes examples.CONFLICT_TYPES,
    `ignored` examples.IGNORED; `valid` is False for padding.
    """

    kappa: ArrayT = _array("segments", dtype=np.float32)
    conflict: ArrayT = _array("segments")
    ignored: ArrayT = _array("segments")
    valid: ArrayT = _array("segments", dtype=np.bool_)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class NetworkInputs(Generic[ArrayT]):
    """The inputs of the network. `dropout_keys` [rows] exist only in training with dropout."""

    text: TextInputs[ArrayT]
    vision: VisionInputs[ArrayT]
    audio: AudioInputs[ArrayT]
    dropout_keys: Any = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Batch(NetworkInputs[ArrayT]):
    """The input of a train step. `left_out` counts the unusable examples of each row."""

    targets: Targets[ArrayT]
    pairs: PairInputs[ArrayT]
    left_out: ArrayT = _array()


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Prompts(NetworkInputs[ArrayT]):
    """The input of generation: prompts packed into rows, in G groups of equal size.

    `ends` [G, P] is the slot behind each of a group's P prompts, counted from the start of the
    group; `lengths` [G, P] are their tokens.
    """

    ends: ArrayT
    lengths: ArrayT


def empty(rows: int, budget: Any) -> Batch[np.ndarray]:
    """A batch of padding, of the shapes that a packing.Budget gives."""

    def array(field: dataclasses.Field) -> np.ndarray:
        dims, dtype, fill = (field.metadata[key] for key in ("dims", "dtype", "fill"))
        sizes = [dim if isinstance(dim, int) else getattr(budget, dim) for dim in dims]
        return np.full((rows, *sizes), fill, dtype)

    def part(kind: Any) -> Any:
        return kind(**{field.name: array(field) for field in dataclasses.fields(kind)})

    [left_out] = (field for field in dataclasses.fields(Batch) if field.name == "left_out")
    return Batch(
        text=part(TextInputs),
        vision=part(VisionInputs),
        audio=part(AudioInputs),
        targets=part(Targets),
        pairs=part(PairInputs),
        left_out=array(left_out),
    )


def row_of(batch: Batch[np.ndarray], row: int) -> Batch[np.ndarray]:
    """Views of one row's arrays: what is written into them is in the batch."""
    return cast("Batch[np.ndarray]", jax.tree.map(lambda array: array[row], batch))
