"""Chip-hours of the steps of a chain, including failed attempts.

ROOT/hours.json is a list with an entry for each time that a step ran; the first host writes it:

    {"step": "sft", "seconds": 5210.4, "chips": 256, "done": true}

All chips of the pod count, whether a step uses them or waits.
"""

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

from saber_jax.runs.files import exists, read_json, write_json


@contextlib.contextmanager
def counted(root: Path, step: str, chips: int) -> Iterator[None]:
    """Records the duration of the block, also if it fails. If the disk fails, only the record is
    lost, not the step."""
    began, done = time.monotonic(), False
    try:
        yield
        done = True
    finally:
        seconds = round(time.monotonic() - began, 1)
        with contextlib.suppress(OSError):
            entry = {"step": step, "seconds": seconds, "chips": chips, "done": done}
            write_json(root / "hours.json", [*entries(root), entry])


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
