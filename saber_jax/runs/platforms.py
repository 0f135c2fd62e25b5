"""What has to be settled about this machine before jax is imported, from environment variables.

libtpu is installed on laptops as well, where `python -m saber_jax.aot` compiles with it. There jax
would look for TPUs at every start, and libtpu would print five lines about those it does not find.
"""

import importlib.util
import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path

CACHE = "JAX_COMPILATION_CACHE_DIR"
DEVICE_COUNT = "--xla_force_host_platform_device_count"
GOOGLE = "0x1ae0"
NETWORK_CLASS = "0x02"  # Many Google machines without a TPU have a network card of Google's.
DEVICES = ("accel0", "vfio/0", "nvidia0", "nvidiactl", "kfd", "dxg")
ASKS_FOR_TPUS = ("JAX_FORCE_TPU_INIT", "TPU_NAME", "TPU_WORKER_ID")
# Not arena_max=1, although a thread's arena cannot keep a buffer of more than 64 MiB: in a single
# arena the small objects of the loader's threads come between the buffers, and the search for room
# takes an eighth of the time.
KEEP_BUFFERS = ":".join(
    f"glibc.malloc.{name}={value}"
    for name, value in {
        "mmap_threshold": 4 * 2**30,
        "trim_threshold": 16 * 2**30,
        "hugetlb": 1,
    }.items()
)


def keep_libtpu_quiet() -> None:
    """Sets JAX_PLATFORMS=cpu where libtpu is installed and nothing hints at an accelerator.

    Leaves the variable alone where it is set.
    """
    if "JAX_PLATFORMS" in os.environ or importlib.util.find_spec("libtpu") is None:
        return
    if not may_have_accelerator(Path("/sys"), Path("/dev")):
        os.environ["JAX_PLATFORMS"] = "cpu"


def keep_collectives_out_of_the_cache() -> None:
    """Unsets CACHE where a program runs on several CPU devices, and says so.

    XLA's CPU backend runs the collectives of a program in the order in which it compiled them. A
    program that it reads from the persistent compilation cache has lost that order, so that devices
    may wait for each other in different all-gathers, or take the result of one for another's.
    """
    cache = os.environ.get(CACHE)
    if not cache or _cpu_devices() == 1 or not only_cpus(os.environ):
        return
    del os.environ[CACHE]
    if os.environ.get("JAX_PROCESS_ID", "0") == "0":
        print(
            f"compilation cache: {cache} is not used, because XLA mixes up the collectives of "
            "programs for several CPU devices that it reads from one",
            file=sys.stderr,
        )


def with_kept_buffers(environ: Mapping[str, str]) -> dict[str, str]:
    """`environ` for a new program, in which glibc keeps the buffers of a step for the next one.

    Otherwise it returns them to the kernel and maps them again in small pages, which is a quarter
    of the time of the tiny network's steps on CPU. Unchanged where GLIBC_TUNABLES is set and where
    steps are not computed on CPU.
    """
    kept = {"GLIBC_TUNABLES": KEEP_BUFFERS} if only_cpus(environ) else {}
    return kept | dict(environ)


def only_cpus(environ: Mapping[str, str]) -> bool:
    """Whether a program with this environment computes on CPUs; in doubt not."""
    if platforms := environ.get("JAX_PLATFORMS"):
        return platforms == "cpu"
    return not may_have_accelerator(Path("/sys"), Path("/dev"))


def _cpu_devices() -> int:
    """How many CPU devices all processes of this run have, as far as 1 and more matter."""
    forced = re.findall(rf"{DEVICE_COUNT}=(\d+)", os.environ.get("XLA_FLAGS", ""))
    local = os.environ.get("JAX_NUM_CPU_DEVICES") or (forced[-1] if forced else "1")
    return int(local) * int(os.environ.get("JAX_NUM_PROCESSES") or "1")


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
