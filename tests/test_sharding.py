import pytest
from jax.sharding import PartitionSpec

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


def test_an_unknown_axis_name_is_refused():
    mesh = sharding.make_mesh(data=2, fsdp=1, tensor=1)
    with pytest.raises(ValueError, match="'emebd' is not in AXIS_RULES"):
        sharding.parameter_spec(("emebd",), (8,), mesh)
