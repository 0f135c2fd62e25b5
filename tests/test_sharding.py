import dataclasses
import itertools
import re
from typing import cast

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

from saber_jax import sharding


def test_minus_one_takes_the_devices_that_are_left():
    mesh = sharding.make_mesh(data=1, fsdp=-1, tensor=1)
    assert sharding.shards(sharding.FSDP, mesh) == 2
    assert mesh.shape["data"] == mesh.shape["tensor"] == 1


@pytest.mark.parametrize("sizes", [(3, -1, 1), (1, 1, 1), (4, 1, 1)])
def test_a_mesh_that_does_not_fill_the_devices_is_refused(sizes):
    data, fsdp, tensor = sizes
    with pytest.raises(ValueError, match="does not fill 2 devices"):
        sharding.make_mesh(data=data, fsdp=fsdp, tensor=tensor)


def test_a_size_that_does_not_divide_stays_whole():
    mesh = sharding.make_mesh(data=1, fsdp=2, tensor=1)
    spec = sharding.parameter_spec(("layers", "embed", "embed"), (3, 128, 7), mesh)
    assert spec == PartitionSpec(None, sharding.FSDP, None)


@pytest.mark.parametrize(
    ("torus", "width", "axes"),
    [
        ((1, 16, 16), 1280, sharding.FSDP),
        ((2, 16, 16), 3584, sharding.FSDP),
        ((2, 16, 16), 1280, sharding.FSDP[1:]),
        ((1, 32, 32), 1280, sharding.FSDP[2:]),
        ((1, 1, 12), 1280, None),
    ],
)
def test_a_size_is_sharded_over_the_inner_axes_that_divide_it(torus, width, axes):
    mesh = _abstract_mesh(torus)
    spec = sharding.parameter_spec(("layers", "embed", "head_dim"), (3, width, 80), mesh)
    assert spec == PartitionSpec(None, axes, None)


def _abstract_mesh(torus):
    sizes = dict.fromkeys(sharding.MESH_AXES, 1) | dict(zip(sharding.FSDP, torus, strict=False))
    return AbstractMesh(tuple(sizes.values()), tuple(sizes))


def test_a_tower_that_fewer_devices_share_is_named_with_what_a_device_holds():
    mesh, widths = _abstract_mesh((2, 16, 16)), {"text": 3584, "vision": 1280}
    params = {
        tower: jax.ShapeDtypeStruct(
            (width, 2**20),
            np.float32,
            sharding=NamedSharding(
                mesh, sharding.parameter_spec(("embed", None), (width, 8), mesh)
            ),
        )
        for tower, width in widths.items()
    }
    [said] = sharding.shared_by_fewer(params, widths, mesh)
    assert "vision tower are cut 256 ways, not 512" in said
    assert "0.02 GiB of each device" in said and "Powers of two up to 256 do" in said


def test_an_unknown_axis_name_is_refused():
    mesh = sharding.make_mesh(data=2, fsdp=1, tensor=1)
    with pytest.raises(ValueError, match="'emebd' is not in AXIS_RULES"):
        sharding.parameter_spec(("emebd",), (8,), mesh)


@dataclasses.dataclass(frozen=True)
class Chip:
    """A TPU of some slice, as jax describes it."""

    coords: tuple[int, int, int]
    core_on_chip: int = 0
    slice_index: int = 0


def chips(x, y, z=1, slices=1):
    places = itertools.product(range(slices), range(x), range(y), range(z))
    return [Chip(coords=(i, j, k), slice_index=s) for s, i, j, k in places]


@pytest.mark.parametrize(
    ("topology", "attached"),
    [
        ("v5e:16x16", chips(16, 16)),
        ("v5e:8x16", chips(16, 8)),
        ("2*v5e:4x8", chips(4, 8, slices=2)),
        ("v5p:4x4x4", chips(4, 4, 4)),
        ("", chips(2, 2)),
    ],
)
def test_a_recipe_takes_the_tpus_that_it_is_made_for(topology, attached):
    sharding.check_topology(topology, attached)


@pytest.mark.parametrize(
    ("topology", "attached", "there"),
    [
        ("v5e:16x16", chips(8, 16), "8x16x1"),
        ("v5e:8x16", chips(8, 16, slices=2), "2*8x16x1"),
        ("v5p:4x4x4", chips(2, 4, 8), "2x4x8"),
    ],
)
def test_other_tpus_are_refused_before_anything_is_compiled(topology, attached, there):
    with pytest.raises(ValueError, match=re.escape(f"made for {topology}, but")) as error:
        sharding.check_topology(topology, attached)
    assert there in str(error.value)


def test_a_cpu_may_try_any_recipe():
    sharding.check_topology("v5e:16x16")


@dataclasses.dataclass(frozen=True)
class Gpu:
    """As jax describes one: with coordinates, and without cores."""

    id: int
    coords: tuple[int, int, int] = (0, 0, 0)


def test_gpus_have_coordinates_and_no_torus():
    gpus = cast("list[jax.Device]", [Gpu(0), Gpu(1)])
    assert sharding._torus(gpus) == (1, 1, 2)
    assert sharding._torus([Gpu(i) for i in range(24)]) == (3, 1, 8)
    sharding.check_topology("v5e:16x16", gpus)
