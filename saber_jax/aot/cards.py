"""NVIDIA GPUs as targets of the compiler, on a machine that needs none.

XLA's compiler for GPUs asks a description of the card instead. What it cannot do without the card
is to time its alternatives: it takes cuBLAS for every matrix product, and its default algorithm.
"""

import dataclasses
import importlib
import os
import sys
from pathlib import Path
from typing import Any

from jax.experimental import topologies

from saber_jax.aot.chips import GIB, Chip
from saber_jax.train.flops import PEAK_FLOPS

USABLE = 0.92  # Of the memory, see launch/tpu_run.sh: the rest is for CUDA and its libraries.
COMPILER = Path(sys.prefix) / "cuda"  # Where launch/setup.sh --aot-gpu puts it.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Card:
    """`kind` is its jax.Device.device_kind. Shared memory is in bytes, of a multiprocessor and the
    most of one program. A `chip` has no links to others."""

    name: str
    kind: str
    capability: str
    multiprocessors: int
    shared_memory: int
    shared_memory_of_program: int
    l2_cache: int
    chip: Chip
    count: int = 1

    @property
    def options(self) -> dict[str, str | bool]:
        """Of the compiler. Products by Triton need tile sizes that only timing finds."""
        return {"xla_gpu_enable_triton_gemm": False}

    @property
    def family(self) -> str:
        return self.name

    def devices(self) -> list:
        """One device that can be compiled for and does not exist.

        Raises RuntimeError when the compiler is not installed.
        """
        # The plug-in checks the versions of CUDA only where a GPU is to be used.
        os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"
        try:
            return self._devices()
        except NotImplementedError:
            _load_compiler()
        return self._devices()

    def _devices(self) -> list:
        description = self._description()
        return list(
            topologies.get_topology_desc(
                platform="cuda", target_config=description, topology="1x1x1"
            ).devices
        )

    def _description(self) -> str:
        """A GpuTargetConfigProto of XLA, as text."""
        major, minor = self.capability.split(".")
        return f"""
        gpu_device_info {{
          cuda_compute_capability {{ major: {major} minor: {minor} }}
          core_count: {self.multiprocessors}
          fpus_per_core: {64 if self.capability == "8.0" else 128}
          threads_per_warp: 32
          threads_per_block_limit: 1024
          threads_per_core_limit: 2048
          block_dim_limit_x: 2147483647
          block_dim_limit_y: 65535
          block_dim_limit_z: 65535
          registers_per_block_limit: 65536
          registers_per_core_limit: 65536
          shared_memory_per_block: 49152
          shared_memory_per_block_optin: {self.shared_memory_of_program}
          shared_memory_per_core: {self.shared_memory}
          l2_cache_size: {self.l2_cache}
          clock_rate_ghz: 1.5
          device_memory_size: {self.chip.hbm:.0f}
          memory_bandwidth: {self.chip.hbm_bandwidth:.0f}
        }}
        platform_name: "CUDA"
        dnn_version_info {{ major: 9 minor: 10 }}
        runtime_version {{ major: 13 minor: 0 }}
        device_description_str: "{self.kind}"
        """


def _chip(memory: float, bandwidth: float, kind: str) -> Chip:
    """`memory` is in GiB by nvidia-smi, `bandwidth` in bytes a second by the data sheet."""
    usable, flops = USABLE * memory * GIB, PEAK_FLOPS[kind]
    return Chip(shapes="", hbm=usable, flops=flops, hbm_bandwidth=bandwidth, link=0.0, dcn=0.0)


_A100, _H100, _H200 = "NVIDIA A100-SXM4-80GB", "NVIDIA H100 80GB HBM3", "NVIDIA H200"
_HOPPER: dict[str, Any] = {
    "capability": "9.0",
    "multiprocessors": 132,
    "shared_memory": 228 * 1024,
    "shared_memory_of_program": 227 * 1024,
    "l2_cache": 50 * 2**20,
}
CARDS = {
    "a100": Card(
        name="a100",
        kind=_A100,
        capability="8.0",
        multiprocessors=108,
        shared_memory=164 * 1024,
        shared_memory_of_program=163 * 1024,
        l2_cache=40 * 2**20,
        chip=_chip(80.0, 2.04e12, _A100),
    ),
    "h100": Card(name="h100", kind=_H100, chip=_chip(79.6, 3.35e12, _H100), **_HOPPER),
    "h200": Card(name="h200", kind=_H200, chip=_chip(140.4, 4.8e12, _H200), **_HOPPER),
}


def _load_compiler() -> None:
    """Gives jax the plug-in. It lies in a folder of its own, because in every other program jax
    would complain that there is no GPU.

    Raises RuntimeError when it is not installed.
    """
    sys.path.append(str(COMPILER))
    try:
        plugin = importlib.import_module("jax_plugins.xla_cuda13")
    except ImportError as error:
        sys.path.remove(str(COMPILER))
        raise RuntimeError(
            f"The GPU compiler cannot be loaded ({error}). Install it with "
            "`launch/setup.sh --aot-gpu`; it needs no GPU."
        ) from error
    plugin.initialize()
