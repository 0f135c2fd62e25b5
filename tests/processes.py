"""Several processes on this computer that find each other as the hosts of a pod do."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
FLAGS = "--xla_force_host_platform_device_count={} --xla_backend_optimization_level=0"


class Processes:
    """`count` processes of the same command, with `devices` virtual devices in sum.

    The last one's command also has what is `odd`. With `sessions` each leads a session of its own,
    as on a host of its own.
    """

    def __init__(
        self,
        command: list[str],
        logs: Path,
        *,
        count: int,
        devices: int = 8,
        odd: tuple[str, ...] = (),
        sessions: bool = False,
        **env: str,
    ):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        logs.mkdir(parents=True, exist_ok=True)
        self.logs = [logs / f"process{index}.log" for index in range(count)]
        self.members = []
        for index, log in enumerate(self.logs):
            joining = {
                "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
                "JAX_NUM_PROCESSES": str(count),
                "JAX_PROCESS_ID": str(index),
            }
            settings = {
                "JAX_PLATFORMS": "cpu",
                "OMP_NUM_THREADS": "1",
                "PYTHONUNBUFFERED": "1",
                "XLA_FLAGS": FLAGS.format(devices // count),
                "PJRT_NPROC": str(4 * devices // count),  # See conftest.py.
                **(joining if count > 1 else {}),
            }
            with log.open("w") as out:
                self.members.append(
                    subprocess.Popen(
                        [sys.executable, *command, *(odd if index == count - 1 else ())],
                        cwd=ROOT,
                        env=os.environ | settings | env,
                        stdout=out,
                        stderr=subprocess.STDOUT,
                        start_new_session=sessions,
                    )
                )

    def wait(self, seconds: float) -> list[int]:
        """Exit statuses. Raises TimeoutExpired when one is still running after `seconds`."""
        deadline = time.monotonic() + seconds
        return [m.wait(max(0.1, deadline - time.monotonic())) for m in self.members]

    def wait_until(self, condition: Callable[[], bool], seconds: float) -> None:
        """Raises AssertionError with the logs when it does not, or a process ends first."""
        deadline = time.monotonic() + seconds
        while not condition():
            ended = [m.poll() for m in self.members]
            assert ended == [None] * len(ended) and time.monotonic() < deadline, self.text()
            time.sleep(0.05)

    def text(self) -> str:
        return "\n".join(f"--- {log.name}\n{log.read_text()[-4000:]}" for log in self.logs)

    def end(self) -> None:
        for member in self.members:
            with contextlib.suppress(ProcessLookupError):
                member.send_signal(signal.SIGCONT)
                member.kill()
            member.wait()


@contextlib.contextmanager
def running(*args, **options) -> Iterator[Processes]:
    """`Processes` that do not outlive the test."""
    processes = Processes(*args, **options)
    try:
        yield processes
    finally:
        processes.end()
