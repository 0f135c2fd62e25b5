"""Process groups: a run ends together with all that it started, and with the benchmark."""

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from typing import Any


def lead(work: Callable[[], Any]) -> None:
    """Calls `work` in a process of multiprocessing, which becomes the leader of a group. The group
    is killed when the process that started this one is gone."""
    os.setpgid(0, 0)
    if parent := multiprocessing.parent_process():
        threading.Thread(target=_follow, args=[parent], daemon=True).start()
    work()


def _follow(parent: Any) -> None:
    parent.join()
    os.kill(0, signal.SIGKILL)  # 0 means the group of this process.


def end(leader: BaseProcess) -> None:
    """Kills a leader and its group, running or stopped, and waits for the leader."""
    if leader.pid is not None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(leader.pid, signal.SIGKILL)
    leader.kill()  # It may not have made its group yet.
    leader.join()
