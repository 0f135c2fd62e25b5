"""Axis names, one rules table, the mesh, and the shardings that follow from them.

The strategy lives in the mesh's shape, not in the rules: (data=8, fsdp=1, tensor=1) is plain data
parallelism and (data=1, fsdp=8, tensor=1) is ZeRO-3, both under the one table below.
"""

from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

MESH_AXES = ("data", "fsdp", "tensor")
BATCH_SPEC = PartitionSpec(("data", "fsdp"))

# Logical axis of a parameter -> mesh axis. What is not named here is a mistake, not "replicated".
AXIS_RULES: dict[str | None, str | None] = {
    "embed": "fsdp",
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


def make_mesh(
    *, data: int, fsdp: int, tensor: int, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """A mesh over `devices`, by default all there are; one size may be -1 and takes what is left.

    Auto axes: under Explicit ones every FSDP all-gather would have to be written out by hand.
    """
    devices = jax.devices() if devices is None else devices
    sizes, count = [data, fsdp, tensor], len(devices)
    if sizes.count(-1) > 1:
        raise ValueError(
            f"At most one mesh axis can be -1, got {dict(zip(MESH_AXES, sizes, strict=True))}."
        )
    if -1 in sizes:
        known = -int(np.prod(sizes))
        sizes[sizes.index(-1)] = count // known if count % known == 0 else 0
    if int(np.prod(sizes)) != count:
        raise ValueError(
            f"config.mesh is data={data}, fsdp={fsdp}, tensor={tensor}, which does not fill "
            f"{count} devices. Make the product {count}, or set one axis to -1."
        )
    return jax.make_mesh(tuple(sizes), MESH_AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def parameter_spec(
    axes: tuple[str | None, ...], shape: tuple[int, ...], mesh: Mesh
) -> PartitionSpec:
    """The rules for one parameter. A size that its mesh axis does not divide stays whole."""
    spec: list[str | None] = []
    for axis, size in zip(axes, shape, strict=True):
        if axis not in AXIS_RULES:
            raise ValueError(
                f"Logical axis {axis!r} is not in AXIS_RULES: {sorted(map(str, AXIS_RULES))}."
            )
        name = AXIS_RULES[axis]
        usable = name is not None and name not in spec and size % mesh.shape[name] == 0
        spec.append(name if usable else None)
    return PartitionSpec(*spec)


def parameter_shardings(axes: dict, abstract: dict, mesh: Mesh) -> dict:
    """Same tree as `abstract`, of NamedSharding. `axes` holds a tuple of logical names per leaf."""
    return jax.tree.map(
        lambda leaf, names: NamedSharding(mesh, parameter_spec(names, leaf.shape, mesh)),
        abstract,
        axes,
    )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over both data-parallel axes."""
    return NamedSharding(mesh, BATCH_SPEC)


def batch_rows(rows: int, mesh: Mesh) -> int:
    """`rows`, rounded up to what gives every device equally many; the surplus stays empty."""
    shares = mesh.shape["data"] * mesh.shape["fsdp"]
    return -(-rows // shares) * shares


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())
