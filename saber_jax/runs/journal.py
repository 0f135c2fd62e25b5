"""Resumable result files, which are appended batch by batch and resumed at a batch boundary.

The folder of a journal also has `manifest.json` with the inputs of the results.

    manifest.json       {"checkpoint": "5f0c...", "split": "test", ...}
    predictions.jsonl   one line per finished item, in a fixed order
"""

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from saber_jax.runs import manifest
from saber_jax.runs.files import append, exists, json_line, read_bytes, truncate


class Journal:
    """The lines of `folder/name` and the inputs that they depend on (`inputs`, JSON values)."""

    def __init__(self, folder: str | os.PathLike, name: str, inputs: dict[str, Any]):
        """Creates or opens the folder. Raises ValueError if it was made from other inputs."""
        self.folder = Path(folder)
        self.path = self.folder / name
        described = self.folder / "manifest.json"
        if exists(self.path) and not exists(described):
            raise ValueError(
                f"{self.path} has no manifest.json next to it, so its inputs are not known. Move "
                "it away or choose another --out."
            )
        manifest.claim(
            described,
            inputs,
            what=f"{self.folder} was made from other inputs, and the two may not be mixed",
            remedy="Choose another --out, or delete that folder to start again.",
        )

    def resume(self, boundaries: Iterable[int]) -> list[dict[str, Any]]:
        """Truncates the file to the last of `boundaries` (line counts); returns the lines kept.

        Batches therefore have the same items as in an uninterrupted run, and results are equal. An
        incomplete last line is dropped.
        """
        if not exists(self.path):
            return []
        raw = read_bytes(self.path)
        lines = raw.splitlines(keepends=True)
        whole = [line for line in lines if line.endswith(b"\n")]
        keep = max((b for b in boundaries if b <= len(whole)), default=0)
        size = sum(map(len, whole[:keep]))
        if size < len(raw):
            truncate(self.path, size)
        return [json.loads(line) for line in whole[:keep]]

    def append(self, items: Sequence[dict[str, Any]]) -> None:
        """Writes one batch and flushes it to the disk."""
        append(self.path, "".join(map(json_line, items)).encode())


def batches(total: int, size: int, *, first: int = 0) -> list[tuple[int, int]]:
    """(start, stop) of every batch: batches(5, 2, first=1) -> [(1, 3), (3, 5), (5, 6)].

    `first` lines come before the first batch; `total` counts what comes after them.
    """
    stop = first + total
    return [(start, min(start + size, stop)) for start in range(first, stop, size)]
