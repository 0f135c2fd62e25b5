"""Several processes of one training step on the cores of a machine without an accelerator.

XLA divides operations as small as the tiny network's badly over cores: a step on two cores is no
faster than on one. It is with two processes that take half of the rows each and give XLA one thread
(docs/performance.md). They join as the hosts of a pod do.
"""

import contextlib
import math
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence

from saber_jax.runs import platforms
from saber_jax.runs.distributed import PREEMPTED

MOST = 4
# What says how a run is distributed. Where one of them is set, it is left as it is.
DECIDED = ("JAX_NUM_PROCESSES", "JAX_NUM_CPU_DEVICES", "PJRT_NPROC")
SETTINGS = (
    *("--config.mesh.data=-1", "--config.mesh.fsdp=1"),
    "--config.heartbeat_seconds=86400",
)
"""Every process has all weights, so that they exchange gradients alone. None of them watches the
others' heartbeats: `run` sees a process that ends, and all of them may be paused for a while."""

LEAVE_SECONDS = 30.0
POLL_SECONDS = 0.1
TAIL_LINES = 30


def count(command: Sequence[str], rows: int, environ: Mapping[str, str]) -> int:
    """How many processes share the `rows` of a training step: as many as there are cores and as
    divide the rows, but not more than MOST. One where there is an accelerator, and where `command`
    or `environ` say how the run is distributed."""
    decided = any(environ.get(name) for name in DECIDED)
    decided = decided or platforms.DEVICE_COUNT in environ.get("XLA_FLAGS", "")
    if decided or any(part.startswith("--config.mesh.") for part in command):
        return 1
    if not platforms.only_cpus(environ):
        return 1
    return max(n for n in range(1, min(MOST, cores()) + 1) if rows % n == 0)


def cores() -> int:
    """The cores that this process may use; 1 where that is not known, as on macOS."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else 1


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def joined(environ: Mapping[str, str], processes: int) -> list[dict[str, str]]:
    """The environment of each of so many processes that find each other on this machine."""
    # Their programs have collectives, which XLA cannot read from its cache on CPUs.
    alike = {name: value for name, value in environ.items() if name != platforms.CACHE}
    alike |= {
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}",
        "JAX_NUM_PROCESSES": str(processes),
        "PJRT_NPROC": "1",
        # With a core for each process nothing is gained by computing in another thread.
        "JAX_CPU_ENABLE_ASYNC_DISPATCH": "0",
    }
    return [alike | {"JAX_PROCESS_ID": str(index)} for index in range(processes)]


def run(command: Sequence[str], environs: Sequence[Mapping[str, str]]) -> int:
    """Runs a command once for each environment, at the same time; returns the exit status, as a
    shell does, of the first one that failed.

    The first process writes to this terminal. What the others write is shown if one of them is the
    first to fail. SIGTERM is forwarded, because it is sent to this process only.
    """
    with contextlib.ExitStack() as files:
        written = [files.enter_context(tempfile.TemporaryFile()) for _ in environs[1:]]
        members = [
            subprocess.Popen(command, env=environ, stdout=out, stderr=out)
            for environ, out in zip(environs, [None, *written], strict=True)
        ]
        before = signal.signal(signal.SIGTERM, lambda *_: [m.terminate() for m in members])
        try:
            index, status = _wait(members)
        except KeyboardInterrupt:
            _wait(members)
            raise
        finally:
            signal.signal(signal.SIGTERM, before)
        if index and status not in (0, PREEMPTED):
            file = written[index - 1]
            file.seek(0)
            lines = file.read().decode(errors="replace").splitlines()[-TAIL_LINES:]
            print(
                f"Process {index + 1} of {len(members)} was the first to fail, with status "
                f"{status}. Its last lines:",
                *(lines or ["(none)"]),
                sep="\n",
                file=sys.stderr,
            )
        return status


def _wait(members: Sequence[subprocess.Popen]) -> tuple[int, int]:
    """Waits for all; returns the index and status of the first that failed, (0, 0) if none did.

    The others notice and end. Those that have not after LEAVE_SECONDS are killed.
    """
    failed, deadline = None, math.inf
    while True:
        ended = [member.poll() for member in members]
        if failed is None and any(ended):
            failed = next((i, s) for i, s in enumerate(ended) if s)
            deadline = time.monotonic() + LEAVE_SECONDS
        if None not in ended:
            break
        if time.monotonic() > deadline:
            for member in members:
                member.kill()
        time.sleep(POLL_SECONDS)
    index, status = failed or (0, 0)
    return index, status if status >= 0 else 128 - status
