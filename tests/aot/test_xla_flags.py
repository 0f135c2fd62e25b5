"""The pinned libtpu knows the flags that training sets on a TPU."""

import os
import subprocess
import sys

import pytest

from saber_jax.aot import xla_flags

COMPILE = """
import sys
import jax, numpy as np
from jax.experimental import topologies
topology = topologies.get_topology_desc(topology_name=sys.argv[1], platform="tpu")
mesh = jax.sharding.Mesh(np.array(topology.devices), ("x",))
place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
x = jax.ShapeDtypeStruct((256, 256), np.float32, sharding=place)
flags = dict(pair.split("=") for pair in sys.argv[2:])
jax.jit(lambda x: x @ x.T).lower(x).compile(compiler_options=flags)
"""


def compile_with(kind: str, flags: dict[str, str]) -> subprocess.CompletedProcess:
    pytest.importorskip("libtpu")
    environ = {"TPU_SKIP_MDS_QUERY": "1", "JAX_PLATFORMS": "cpu", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    pairs = [f"{name}={value}" for name, value in flags.items()]
    return subprocess.run(
        [sys.executable, "-c", COMPILE, kind, *pairs],
        env=os.environ | environ,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["v5e:4x4", "v5p:2x2x2", "v6e:4x4"])
def test_libtpu_accepts_every_flag(kind):
    done = compile_with(kind, xla_flags.FLAGS)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_an_unknown_flag_is_refused():
    done = compile_with("v5e:4x4", {"xla_tpu_not_a_flag": "true"})
    assert "No such compile option" in done.stderr


def test_flags_are_handed_to_libtpu_as_it_takes_them():
    done = subprocess.run(
        [sys.executable, "-m", "saber_jax.aot.xla_flags"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == [f"--{name}={value}" for name, value in xla_flags.FLAGS.items()]
