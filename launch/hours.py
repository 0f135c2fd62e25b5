"""Chip-hours of the steps of a chain, including failed and killed attempts.

ROOT/hours.json is a list with an entry for each time that a step ran; the first host writes it when
the step begins, every minute, and at the end:

    {"step": "sft", "began": 1790000000.0, "seconds": 5210.4, "chips": 256, "done": true}

All chips of the pod count, whether a step uses them or waits.
"""

import contextlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from saber_jax.runs.files import exists, read_json, write_json

UPDATE_SECONDS = 60.0


@contextlib.contextmanager
def counted(root: Path, step: str, chips: int) -> Iterator[None]:
    """Records the duration of the block, also if it fails or is killed. If the disk fails, only the
    record is lost, not the step."""
    began, ended = time.monotonic(), threading.Event()
    entry: dict[str, Any] = {
        "step": step,
        "began": time.time(),
        "seconds": 0.0,
        "chips": chips,
        "done": False,
    }

    def record() -> None:
        entry["seconds"] = round(time.monotonic() - began, 1)
        _record(root, entry)

    def keep() -> None:
        while not ended.wait(UPDATE_SECONDS):
            record()

    record()
    keeper = threading.Thread(target=keep, name="hours", daemon=True)
    keeper.start()
    try:
        yield
        entry["done"] = True
    finally:
        ended.set()
        keeper.join()
        record()


def _record(root: Path, entry: dict[str, Any]) -> None:
    """Adds the entry, or replaces what an earlier call wrote of it."""
    # ValueError: the file is damaged.
    with contextlib.suppress(OSError, ValueError):
        mine = (entry["step"], entry["began"])
        others = [e for e in entries(root) if (e["step"], e.get("began")) != mine]
        write_json(root / "hours.json", [*others, entry])


def entries(root: Path) -> list[dict]:
    path = root / "hours.json"
    return read_json(path) if exists(path) else []


def text(root: Path) -> str:
    """`chip-hours: 41.2 (sft 20.1, pairs 3.0, ...)`; empty where no chip was used."""
    by_step: dict[str, float] = {}
    noted = entries(root)
    for entry in noted:
        hours = entry["seconds"] * entry["chips"] / 3600
        by_step[entry["step"]] = by_step.get(entry["step"], 0.0) + hours
    total = sum(by_step.values())
    parts = ", ".join(f"{name} {spent:.1f}" for name, spent in by_step.items())
    return f"chip-hours: {total:.1f} ({parts})" if any(e["chips"] for e in noted) else ""
