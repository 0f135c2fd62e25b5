"""Keeps an installed libtpu from being asked for TPUs on a machine that has none.

libtpu is installed on laptops as well, where `python -m saber_jax.aot` compiles with it. There jax
would look for TPUs at every start, and libtpu would print five lines about those it does not find.
"""

import importlib.util
import os
from pathlib import Path

GOOGLE = "0x1ae0"
NETWORK_CLASS = "0x02"  # Many Google machines without a TPU have a network card of Google's.
DEVICES = ("accel0", "vfio/0", "nvidia0", "nvidiactl", "kfd", "dxg")
ASKS_FOR_TPUS = ("JAX_FORCE_TPU_INIT", "TPU_NAME", "TPU_WORKER_ID")


def keep_libtpu_quiet() -> None:
    """Sets JAX_PLATFORMS=cpu where libtpu is installed and nothing hints at an accelerator.

    Leaves the variable alone where it is set.
    """
    if "JAX_PLATFORMS" in os.environ or importlib.util.find_spec("libtpu") is None:
        return
    if not may_have_accelerator(Path("/sys"), Path("/dev")):
        os.environ["JAX_PLATFORMS"] = "cpu"


def may_have_accelerator(sysfs: Path, dev: Path) -> bool:
    """Whether a TPU, a GPU or a setting that asks for TPUs is here; in doubt yes."""
    if any((dev / name).exists() for name in DEVICES):
        return True
    if any(name in os.environ for name in ASKS_FOR_TPUS):
        return True
    return any(_is_chip(device) for device in (sysfs / "bus/pci/devices").glob("*"))


def _is_chip(device: Path) -> bool:
    """Whether a PCI device is Google's and no network card."""
    try:
        vendor, kind = ((device / name).read_text().strip() for name in ("vendor", "class"))
    except OSError:
        return True
    return vendor == GOOGLE and not kind.startswith(NETWORK_CLASS)
