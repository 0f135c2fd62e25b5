"""TPU generations: their names, shapes, memory and speeds. https://cloud.google.com/tpu/docs"""

import dataclasses
import os
import re

# The compiler needs no TPU, but libtpu queries its environment, at first the cloud's metadata.
for name, value in {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "TPU_MIN_LOG_LEVEL": "3",
}.items():
    os.environ.setdefault(name, value)

from jax.experimental import topologies  # noqa: E402

from saber_jax.aot.xla_flags import FLAGS  # noqa: E402

GIB = 2**30
_FLAT = "2x2 2x4 4x4 4x8 8x8 8x16 16x16"
_CUBES = "2x2x1 2x2x2 2x2x4 2x4x4 4x4x4 4x4x8 4x8x8 8x8x8 8x8x16"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """Figures of one jax device, which on v4 and tpu7x is half a chip.

    `hbm` are the bytes that the compiler lets a program use. `link` is one direction of one ICI
    link and `dcn` one device's share of its host's network, in bytes per second.
    """

    shapes: str
    hbm: float
    flops: float
    hbm_bandwidth: float
    link: float
    dcn: float

    def ring(self, extent: int) -> float:
        """Bytes a second that a device sends along one axis of the torus.

        A ring has two directions. Below a whole side of the torus it is a line, whose last device
        has a neighbour on one side only.
        """
        whole = 16 if "16x16" in self.shapes and "x1" not in self.shapes.split()[0] else 4
        return self.link * (2 if extent % whole == 0 else 1)


CHIPS = {
    "v5e": Chip(
        shapes=_FLAT, hbm=15.75 * GIB, flops=197e12, hbm_bandwidth=0.82e12, link=45e9, dcn=3.1e9
    ),
    "v6e": Chip(
        shapes=_FLAT, hbm=31.24 * GIB, flops=918e12, hbm_bandwidth=1.64e12, link=90e9, dcn=3.1e9
    ),
    "v5p": Chip(
        shapes=_CUBES, hbm=95.73 * GIB, flops=459e12, hbm_bandwidth=2.77e12, link=90e9, dcn=6.2e9
    ),
    "v4": Chip(
        shapes=_CUBES, hbm=15.25 * GIB, flops=137e12, hbm_bandwidth=0.6e12, link=45e9, dcn=3.1e9
    ),
    "tpu7x": Chip(
        shapes=_CUBES, hbm=94.74 * GIB, flops=1153e12, hbm_bandwidth=3.69e12, link=90e9, dcn=3.1e9
    ),
}


@dataclasses.dataclass(frozen=True)
class Slices:
    """`count` slices of one shape: "v5e:16x16", or "2*v5e:16x16" for two."""

    name: str
    family: str
    shape: str
    count: int

    options = FLAGS  # Of the compiler.

    @property
    def chip(self) -> Chip:
        return CHIPS[self.family]

    def devices(self) -> list:
        """Devices that can be compiled for and do not exist.

        Raises RuntimeError when libtpu is not installed.
        """
        try:
            topology = topologies.get_topology_desc(
                topology_name=f"{self.family}:{self.shape}", platform="tpu", num_slices=self.count
            )
        except (ImportError, FileNotFoundError) as error:
            raise RuntimeError(
                f"The TPU compiler cannot be loaded ({error}). Install it with "
                "`pip install -r requirements-tpu.txt`; it needs no TPU."
            ) from error
        return list(topology.devices)


def parse_topology(name: str) -> Slices:
    """Raises ValueError that lists what there is."""
    found = re.fullmatch(r"(?:(\d+)\*)?(\w+):([\dx]+)", name)
    if found is None or found[2] not in CHIPS or found[3] not in CHIPS[found[2]].shapes.split():
        listing = "\n".join(f"  {key}: {chip.shapes}" for key, chip in CHIPS.items())
        raise ValueError(
            f"There is no topology {name!r}. It is FAMILY:SHAPE in chips, like v5e:16x16, or "
            f"2*v5e:16x16 for two slices, from\n{listing}"
        )
    return Slices(name, found[2], found[3], int(found[1] or 1))
