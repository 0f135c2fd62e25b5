"""Axis names, one rules table, the mesh, and the shardings that follow from them.

The strategy lives in the mesh's shape, not in the rules: (data=8, fsdp=1) is plain data parallelism
and (data=1, fsdp=8) is ZeRO-3, both under the tables below. With sequence=4, four devices share the
slots of a row, see models/sequence.py.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from saber_jax.batch import NetworkInputs

Device: TypeAlias = Any
"""jax.Device, which type checkers do not accept as a type."""

# FSDP has one mesh axis per axis of the torus that the chips form. A gradient scattered along one
# ring at a time is a reduce-scatter; along all of them at once it is a full all-reduce.
_TORUS = ("fsdp_z", "fsdp_y", "fsdp_x")
# The devices that share a row lie next to each other on the innermost ring. They share the weights
# too, so the memory of a device does not depend on how many of them there are.
SEQUENCE = "sequence"
FSDP = (*_TORUS, SEQUENCE)
BATCH_AXES = ("data", *_TORUS)
MESH_AXES = (*BATCH_AXES, SEQUENCE, "tensor")
BATCH_SPEC = PartitionSpec(BATCH_AXES)

# Logical axis of a parameter -> mesh axis. A missing axis is an error and does not mean replicated.
AXIS_RULES: dict[str | None, str | tuple[str, ...] | None] = {
    "embed": FSDP,
    "mlp": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "vocab": "tensor",
    "head_dim": None,
    "layers": None,
    # Small or oddly shaped: not worth a collective.
    "norm": None,
    "patch": None,
    "taps": None,
    "mel": None,
    "marker": None,
    "rank": None,
    None: None,
}

# Dimension of a batch's array (batch.py) -> mesh axis. Dimensions that are not named stay whole.
BATCH_RULES = dict.fromkeys(("slots", "patches", "chunks", "targets"), SEQUENCE)


def make_mesh(
    *,
    data: int,
    fsdp: int,
    tensor: int,
    sequence: int = 1,
    devices: Sequence[Device] | None = None,
) -> Mesh:
    """A mesh over `devices`, by default all; one size may be -1 and takes the remaining devices.

    `fsdp` is mapped to the axes of the TPU's torus, of which `sequence` takes a part of the
    innermost. All axes are Auto: explicit collectives are inside `jax.shard_map`, and XLA
    partitions the rest.
    """
    devices = jax.devices() if devices is None else devices
    sizes = {"data": data, "fsdp": fsdp, "sequence": sequence, "tensor": tensor}
    given, count = ", ".join(f"{name}={size}" for name, size in sizes.items()), len(devices)
    open_axes = [name for name, size in sizes.items() if size == -1]
    if len(open_axes) > 1:
        raise ValueError(f"At most one mesh axis can be -1, got {given}.")
    if open_axes:
        known = -math.prod(sizes.values())
        sizes[open_axes[0]] = count // known if count % known == 0 else 0
    if math.prod(sizes.values()) != count:
        raise ValueError(
            f"config.mesh is {given}, which does not fill {count} devices. Make the product "
            f"{count}, or set one axis to -1."
        )
    ordered = sorted(devices, key=_place)
    inner = sizes["sequence"] * sizes["tensor"]
    rings = _along_torus(sizes["fsdp"], _torus(ordered), inner)
    shape = (sizes["data"], *rings, sizes["sequence"], sizes["tensor"])
    types = (AxisType.Auto,) * len(MESH_AXES)
    return Mesh(np.array(ordered).reshape(shape), MESH_AXES, axis_types=types)


def check_topology(topology: str, devices: Sequence[Device] | None = None) -> None:
    """Raises ValueError where a recipe is made for other TPUs than those that are attached.

    `topology` is config.topology: "v5e:16x16", or "2*v5e:8x16" for two slices. Without it, and on
    devices that are no TPUs, anything goes. A recipe's memory was computed for its own topology, so
    on another one it fails late, while it compiles.
    """
    devices = jax.devices() if devices is None else devices
    if not topology or not hasattr(devices[0], "core_on_chip"):
        return
    many, _, shape = topology.rpartition("*")
    wanted = sorted(int(n) for n in shape.partition(":")[2].split("x") if n != "1")
    places = np.array([device.coords for device in devices])
    attached = [int(n) for n in np.ptp(places, axis=0) + 1]
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if (sorted(n for n in attached if n != 1), slices) != (wanted, int(many or 1)):
        there = f"{slices}*" * (slices > 1) + "x".join(map(str, attached))
        raise ValueError(
            f"This recipe is made for {topology}, but the TPUs attached here are {there}. Choose "
            "the recipe for these (configs/pods.py), or set --config.topology= (empty) to try."
        )


def generation_mesh(kv_heads: int, devices: Sequence[Device] | None = None) -> Mesh:
    """The mesh for generation.

    A group of as many devices as there are kv heads shares the weights and the kv cache of a
    prompt, so that decoding moves activations between them but no weights. Groups take different
    prompts.
    """
    devices = jax.devices() if devices is None else devices
    shared = math.gcd(len(devices), kv_heads)
    return make_mesh(data=-1, fsdp=1, tensor=shared, devices=devices)


def _place(device: Device) -> tuple[int, ...]:
    """Slices one after another, each in the order of its torus; other devices as they are numbered.

    So the leading mesh axis is the one that leaves a slice.
    """
    coords = tuple(reversed(getattr(device, "coords", ())))
    return (getattr(device, "slice_index", 0), *coords, device.id)


def _torus(devices: Sequence[Device]) -> tuple[int, int, int]:
    """Extent of one slice along z, y and x.

    Of devices without a torus, as many lie along x as the largest power of two that divides their
    number. Widths are multiples of powers of two, so these share all weights whatever the rest is.
    """
    # GPUs have coordinates too, but no torus.
    if not hasattr(devices[0], "core_on_chip"):
        along_x = len(devices) & -len(devices)
        return len(devices) // along_x, 1, along_x
    x, y, z = np.max([device.coords for device in devices], axis=0) + 1
    cores = len({device.core_on_chip for device in devices})
    return int(z), int(y), int(x) * cores


def _along_torus(fsdp: int, torus: tuple[int, int, int], inner: int) -> tuple[int, int, int]:
    """(z, y, x) with product `fsdp`: each axis takes what it can of one axis of the torus.

    Axes inside of it, of this many devices, come first along x.

    >>> _along_torus(256, (1, 16, 16), 1), _along_torus(8, (1, 16, 16), 1)
    ((1, 16, 16), (1, 1, 8))
    """
    z, y, x = torus
    parts = []
    for extent in (x // math.gcd(x, inner), y, z):
        parts.append(math.gcd(fsdp, extent))
        fsdp //= parts[-1]
    parts[-1] *= fsdp
    return parts[2], parts[1], parts[0]


def parameter_spec(
    axes: tuple[str | None, ...], shape: tuple[int, ...], mesh: Mesh | AbstractMesh
) -> PartitionSpec:
    """The rules for one parameter.

    A size that its mesh axes do not divide is sharded over the inner ones that do: on 2 x 16 x 16
    chips a width of 1280 over 256, and the two halves of the mesh hold the same. Without any such
    axis it stays whole.
    """
    spec: list[str | tuple[str, ...] | None] = []
    taken: set[str | tuple[str, ...]] = set()
    for axis, size in zip(axes, shape, strict=True):
        if axis not in AXIS_RULES:
            raise ValueError(
                f"Logical axis {axis!r} is not in AXIS_RULES: {sorted(map(str, AXIS_RULES))}."
            )
        name = AXIS_RULES[axis]
        found = None if name is None or name in taken else _dividing(name, size, mesh)
        spec.append(found)
        if found and name:
            taken.add(name)
    return PartitionSpec(*spec)


def _dividing(
    axes: str | tuple[str, ...], size: int, mesh: Mesh | AbstractMesh
) -> str | tuple[str, ...] | None:
    """`axes`, without as many of the outermost as it takes until they divide `size`."""
    if size % shards(axes, mesh) == 0:
        return axes
    inner = axes[1:] if isinstance(axes, tuple) else ()
    return _dividing(inner, size, mesh) if inner and shards(inner, mesh) > 1 else None


def shards(axes: str | tuple[str, ...], mesh: Mesh | AbstractMesh) -> int:
    """The number of shards of a dimension over these mesh axes."""
    return math.prod(mesh.shape[axis] for axis in ((axes,) if isinstance(axes, str) else axes))


def parameter_shardings(axes: dict, abstract: dict, mesh: Mesh | AbstractMesh) -> dict:
    """Same tree as `abstract`, of NamedSharding. `axes` holds a tuple of logical names per leaf."""
    return jax.tree.map(
        lambda leaf, names: NamedSharding(mesh, parameter_spec(names, leaf.shape, mesh)),
        abstract,
        axes,
    )


def shared_by_fewer(
    params: Mapping[str, Any], widths: Mapping[str, int], mesh: Mesh | AbstractMesh
) -> list[str]:
    """What to say about each tower whose weights fewer devices share than FSDP has.

    `params` are arrays, or shapes, with their shardings by tower; `widths` are the towers'.
    """
    wanted, found = shards(FSDP, mesh), []
    for tower, width in widths.items():
        axes = _dividing(FSDP, width, mesh)
        ways = shards(axes, mesh) if axes else 1
        if ways == wanted:
            continue
        held = sum(
            math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
            for leaf in jax.tree.leaves(params[tower])
        )
        found.append(
            f"The weights of the {tower} tower are cut {ways} ways, not {wanted} "
            f"(config.mesh.fsdp), and take {held / 2**30:.2g} GiB of each device, because {wanted} "
            f"does not divide its width of {width}. Powers of two up to {width & -width} do."
        )
    return found


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over both data-parallel axes."""
    return NamedSharding(mesh, BATCH_SPEC)


def batch_specs(batch: NetworkInputs) -> Any:
    """The tree of `batch`, with a PartitionSpec per array: rows as in `batch_sharding`, and the
    other dimensions by BATCH_RULES."""

    def spec(field: dataclasses.Field, part: Any) -> Any:
        if part is None:
            return None
        if dataclasses.is_dataclass(part):
            return specs(part)
        axes = [BATCH_RULES.get(dim) for dim in field.metadata.get("dims", ())]
        while axes and axes[-1] is None:
            axes.pop()
        return PartitionSpec(BATCH_AXES, *axes)

    def specs(part: Any) -> Any:
        fields = dataclasses.fields(part)
        return dataclasses.replace(
            part, **{field.name: spec(field, getattr(part, field.name)) for field in fields}
        )

    return specs(batch)


def batch_shardings(batch: NetworkInputs, mesh: Mesh | AbstractMesh) -> Any:
    """The tree of `batch`, with a NamedSharding per array."""
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), batch_specs(batch))


def sequence_axis(mesh: Mesh | None) -> str | None:
    """The axis along which devices share rows; None if every device has whole rows."""
    return SEQUENCE if mesh is not None and mesh.shape[SEQUENCE] > 1 else None


def cache_sharding(kv_heads: int, mesh: Mesh) -> NamedSharding:
    """Keys and values of generation, [rows, kv heads, ...]: rows like the batch, heads like the
    weights that make them. Heads that the tensor axis does not divide stay whole."""
    heads = "tensor" if kv_heads % mesh.shape["tensor"] == 0 else None
    return NamedSharding(mesh, PartitionSpec(*BATCH_SPEC, heads))


def batch_rows(rows: int, mesh: Mesh) -> int:
    """`rows`, rounded up so that every device has equally many; the additional rows are empty."""
    shares = shards(BATCH_AXES, mesh)
    return -(-rows // shares) * shares


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())
