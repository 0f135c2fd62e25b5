"""The outcomes of a fault, how they are counted, and how a bit is flipped."""

import collections
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

FAILURES = ("unnamed", "silent", "hang", "lost")
Outcomes = collections.Counter[str]


def flip(path: Path, rng: np.random.Generator) -> None:
    """Flips one bit among the nonzero bytes of a file: ArrayRecord pads to 64 KiB with zeros."""
    data = bytearray(path.read_bytes())
    used = np.flatnonzero(np.frombuffer(data, np.uint8))
    data[rng.choice(used)] ^= 1 << rng.integers(8)
    path.write_bytes(data)


def outcome(read: Callable[[], Any], want: Any, path: Path) -> str:
    """The outcome of reading a changed file. An error counts as named if it names the file."""
    try:
        got = read()
    except (ValueError, FileNotFoundError) as error:
        return "named" if path.name in str(error) or path.parent.name in str(error) else "unnamed"
    except Exception:
        return "unnamed"
    return "fine" if got == want else "silent"


def flips(
    path: Path, count: int, rng: np.random.Generator, read: Callable[[], Any], want: Any
) -> Outcomes:
    """Flips a bit of `path`, reads the file and restores it, `count` times."""
    counts, before = Outcomes(), path.read_bytes()
    for _ in range(count):
        flip(path, rng)
        counts[outcome(read, want, path)] += 1
        path.write_bytes(before)
    return counts


def table(rows: dict[str, Outcomes]) -> str:
    """The outcomes as a table in Markdown."""
    columns = ("fine", "named", *FAILURES, "skipped")
    head = f"| {'fault':<28} | " + " | ".join(f"{c:>7}" for c in columns) + " |"
    lines = [head, f"|{'-' * 30}|" + "|".join("-" * 8 + ":" for _ in columns) + "|"]
    for name, counts in rows.items():
        lines.append(f"| {name:<28} | " + " | ".join(f"{counts[c]:>7}" for c in columns) + " |")
    return "\n".join(lines)
