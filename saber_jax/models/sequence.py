"""Sequence parallelism: the devices along one mesh axis share the slots of a row.

A clip of minutes has more tokens than one device can hold. Inside `jax.shard_map` every device then
has its share of a row's slots, patches, chunks and targets, in order. Almost all of the network
works on each of them by itself. What does not is here:

- attention of the text tower: all-to-all gives every device some heads of all slots, and then its
  own slots of all heads back (DeepSpeed-Ulysses, https://arxiv.org/abs/2309.14509). Every device
  has the same work, whatever the mask, and kernels and masks are those of whole rows;
- attention of the vision tower: it stays inside frames, so a device computes the frames at the
  edges of its share whole (`with_neighbours`);
- slots that stand for media: the outputs of both towers are gathered once (`gather`);
- hidden states that predict targets: each is sent to the device of its target (`at_sources`).

Functions take the name of the mesh axis, or None where a device has whole rows.

Axis letters: B batch   L slots of a row   S slots of one device   N heads   K kv heads   H head dim
D width   T targets of a row   U targets of one device.
"""

import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from saber_jax.models.attention import attend
from saber_jax.models.config import TextConfig
from saber_jax.models.kernels import Kernel
from saber_jax.models.masks import Visibility

Axis = str | None

UNIT = 4  # Patches that become one slot.


def check(mesh: Mapping[str, int], text: TextConfig, row: Mapping[str, int]) -> None:
    """Raises ValueError that lists everything that the devices of a row cannot share evenly.

    `mesh` are the sizes of mesh axes, `row` those of config.data.
    """
    devices = mesh["sequence"]
    if devices == 1:
        return
    wrong = []
    if mesh["tensor"] > 1:
        wrong.append(f"config.mesh.tensor={mesh['tensor']}, which has to be 1 then")
    if text.heads % devices or math.gcd(text.kv_heads, devices) != min(text.kv_heads, devices):
        fitting = [n for n in range(2, text.heads + 1) if not text.heads % n]
        fitting = [n for n in fitting if not text.kv_heads % n or not n % text.kv_heads]
        wrong.append(
            f"{text.heads} heads over {text.kv_heads} kv heads of the text tower, which "
            f"{', '.join(map(str, fitting))} devices can share"
        )
    for name in ("length", "response", "targets", "chunks", "patches"):
        step = devices * (UNIT if name == "patches" else 1)
        if row[name] % step:
            wrong.append(f"config.data.{name}={row[name]}, which has to be a multiple of {step}")
    if row["patches"] and row["patches"] // devices < row["frame_patches"]:
        wrong.append(
            f"config.data.patches={row['patches']}, less than a frame of "
            f"config.data.frame_patches={row['frame_patches']} for each"
        )
    if wrong:
        raise ValueError(
            f"config.mesh.sequence={devices} devices cannot share a row evenly: "
            f"{'; '.join(wrong)}. Change these, or config.mesh.sequence."
        )


def gather(x: Shaped[Array, "B S ..."], axis: Axis) -> Shaped[Array, "B L ..."]:
    """All devices' shares of the second dimension."""
    return x if axis is None else jax.lax.all_gather(x, axis, axis=1, tiled=True)


def attend_row(
    q: Float[Array, "B S N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    visible: Visibility,
    kernel: Kernel,
    axis: Axis,
) -> Float[Array, "B S N H"]:
    """`attend` over whole rows; `visible` is that of all L slots.

    The number of devices divides N, and it divides K or is a multiple of it.
    """
    if axis is None:
        return attend(q, k, v, visible, kernel)
    # Where devices are more than kv heads, several read the same one.
    copies = max(1, jax.lax.axis_size(axis) // k.shape[2])
    k, v = (jnp.repeat(x, copies, axis=2) if copies > 1 else x for x in (k, v))
    q, k, v = (
        jax.lax.all_to_all(x, axis, split_axis=2, concat_axis=1, tiled=True) for x in (q, k, v)
    )
    out = attend(q, k, v, visible, kernel)
    return jax.lax.all_to_all(out, axis, split_axis=1, concat_axis=2, tiled=True)


def with_neighbours(x: Shaped[Array, "B S ..."], reach: int, axis: str) -> Array:
    """[B, reach + S + reach, ...]: a device's share between the edges of its neighbours' shares.

    At the ends of a row they are zeros. Three devices with shares of three and a reach of one:

        . a b c d    c d e f g    f g h i .
    """
    devices = jax.lax.axis_size(axis)
    up = [(i, i + 1) for i in range(devices - 1)]
    down = [(i + 1, i) for i in range(devices - 1)]
    before = jax.lax.ppermute(x[:, x.shape[1] - reach :], axis, up)
    after = jax.lax.ppermute(x[:, :reach], axis, down)
    return jnp.concatenate([before, x, after], axis=1)


def at_sources(
    hidden: Float[Array, "B S D"], source: Int[Array, "B U"], axis: Axis
) -> Float[Array, "B U D"]:
    """The hidden states at `source`, which counts the slots of the whole row."""
    if axis is None:
        return _taken(hidden, source)
    slots = hidden.shape[1]
    place = gather(source, axis) - jax.lax.axis_index(axis) * slots
    here = (place >= 0) & (place < slots)
    # Of every target only one device has a state and the others have zeros, so this sum is exact.
    states = jnp.where(here[..., None], _taken(hidden, place), 0)
    return jax.lax.psum_scatter(states, axis, scatter_dimension=1, tiled=True)


def _taken(hidden: Float[Array, "B S D"], place: Int[Array, "B T"]) -> Float[Array, "B T D"]:
    return jnp.take_along_axis(hidden, place[..., None], axis=1, mode="clip")
