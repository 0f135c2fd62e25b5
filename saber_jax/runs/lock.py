"""A lock file that allows one run per work directory and names its holder.

    {"id": "9f0c...", "host": "node3", "machine": "5c1e...", "pid": 4711, "since": "8123",
     "beat": "00000042"}

The holder increments `beat` every few seconds. Another run that finds the lock checks on the same
machine whether the process exists, and on another machine whether `beat` changes, which does not
need synchronised clocks. A lock whose holder is gone is taken over.
"""

import contextlib
import json
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from saber_jax.runs import buckets, files

LOCK_FILE = "lock"
BEAT_SECONDS = 5
STALE_SECONDS = 20
"""Longer than a beat takes to reach others through a shared file system."""


class BusyError(ValueError):
    """Another run uses this directory."""


@contextlib.contextmanager
def held(
    folder: str | os.PathLike, *, beat: float = BEAT_SECONDS, stale: float = STALE_SECONDS
) -> Iterator[None]:
    """Holds the lock of `folder`, which is created if necessary and removed if it stays empty.

    Raises BusyError naming the other run. Watching a lock from another machine takes up to `stale`
    seconds.
    """
    folder = Path(folder)
    path, ours, ended = folder / LOCK_FILE, _ourselves(), threading.Event()
    made = not files.exists(folder)
    files.make_folder(folder)
    while not _create(path, ours):
        found = _wait_until_stale(path, folder, stale)
        _remove_stale(path, folder, found)
    keeper = threading.Thread(
        target=_keep, args=(path, ours, beat, ended), name="lock", daemon=True
    )
    keeper.start()
    try:
        yield
    finally:
        ended.set()
        keeper.join()
        if _same(_read(path), ours):
            files.remove(path, missing_ok=True)
        with contextlib.suppress(OSError):  # It holds something, as it should.
            if made:
                folder.rmdir()


def _wait_until_stale(path: Path, folder: Path, stale: float) -> dict[str, Any] | None:
    """Returns what the lock holds when nobody holds it. Raises BusyError when somebody does."""
    found = _read(path)
    if found is not None and found.get("machine") == _machine():
        if _since(found["pid"]) == found["since"]:
            raise BusyError(_busy(folder, found))
    else:
        until = time.monotonic() + stale
        while time.monotonic() < until:
            time.sleep(min(0.5, stale / 10))
            if not files.exists(path):
                return found
            if _read(path) != found:
                raise BusyError(_busy(folder, _read(path) or found or {}))
    who = f"process {found['pid']} on {found['host']}" if found else "a run that was killed"
    print(f"{folder}: taking over the lock of {who}, which is gone.", file=sys.stderr, flush=True)
    return found


def _busy(folder: Path, holder: dict[str, Any]) -> str:
    who = f"process {holder.get('pid')} on {holder.get('host')}"
    return (
        f"{folder} is in use by {who}. Two runs would spoil each other's checkpoints: wait for it, "
        "stop it, or give this one another --config.workdir."
    )


def _create(path: Path, ours: dict[str, Any]) -> bool:
    try:
        files.create(path, _line(ours, 0))
    except FileExistsError:
        # The answer of a bucket may get lost; the request is repeated and finds our own lock.
        return _same(_read(path), ours)
    return True


def _remove_stale(path: Path, folder: Path, stale: dict[str, Any] | None) -> None:
    """Removes the lock that holds `stale`. Raises BusyError if it holds something else by now."""
    # Several runs may find the same stale lock. On a disk, only one of them can move it, and one
    # that moves the new lock of another puts it back. In a bucket, one may remove the new lock of
    # another, which then ends: see `_keep`.
    with contextlib.suppress(FileNotFoundError):
        if buckets.mounted(path):
            files.remove(path)
            return
        gone = path.with_name(f"{LOCK_FILE}.{uuid.uuid4().hex[:12]}.stale")
        os.replace(path, gone)
        moved = _read(gone)
        if moved != stale:
            _put_back(gone, path)
            raise BusyError(_busy(folder, moved or {}))
        gone.unlink()


def _put_back(gone: Path, path: Path) -> None:
    """Moves `gone` back unless there is a third lock by now, whose holder then goes on."""
    try:
        os.link(gone, path)
    except FileExistsError:
        pass
    except OSError:  # Not every file system has hard links.
        os.replace(gone, path)
        return
    gone.unlink()


def _keep(path: Path, ours: dict[str, Any], beat: float, ended: threading.Event) -> None:
    count = 0
    while not ended.wait(beat):
        count += 1
        # A full or hanging disk should not end the run.
        with contextlib.suppress(OSError):
            found = _read(path)
            if found is not None and not _same(found, ours):
                print(
                    f"saber_jax: {path} was taken over by process {found.get('pid')} on "
                    f"{found.get('host')} while this one did not answer; it ends here.",
                    file=sys.stderr,
                    flush=True,
                )
                os._exit(1)
            if buckets.mounted(path):
                files.write_text(path, _line(ours, count))
                continue
            with path.open("r+", encoding="utf-8") as file:
                file.write(_line(ours, count))  # As long as before, so it needs no new space.


def _line(ours: dict[str, Any], count: int) -> str:
    return json.dumps(ours)[:-1] + f', "beat": "{count:08d}"}}\n'


def _read(path: Path) -> dict[str, Any] | None:
    """None for a lock that is being written, or that a kill cut short, or that is not there."""
    try:
        found = json.loads(files.read_text(path))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and {"host", "pid", "since"} <= found.keys() else None


def _same(found: dict[str, Any] | None, ours: dict[str, Any]) -> bool:
    return found is not None and all(found.get(key) == value for key, value in ours.items())


def _ourselves() -> dict[str, Any]:
    pid = os.getpid()
    return {
        "id": uuid.uuid4().hex,  # One process may try to hold a lock twice.
        "host": socket.gethostname(),
        "machine": _machine(),
        "pid": pid,
        "since": _since(pid),
    }


def _machine() -> str:
    """An id that differs between machines, boots of a machine, and (by hostname) containers."""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
        return f"{boot} {socket.gethostname()}"
    return socket.gethostname()


def _since(pid: int) -> str:
    """The start time of a process, which distinguishes it from an earlier one with the same id;
    empty if it does not exist."""
    with contextlib.suppress(OSError, IndexError):
        status = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        return "" if status[0] in "ZX" else status[19]
    return ""
