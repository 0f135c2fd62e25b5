"""Where metrics go: one line of JSON a step, TensorBoard, and one tidy line on the console."""

import json
import os
from pathlib import Path

import jax
from tensorboardX import SummaryWriter


class MetricsWriter:
    """Writes from process 0 only. Resuming at `start` first forgets what came after it, so that a
    killed run leaves the same file as an uninterrupted one."""

    def __init__(self, workdir: str | Path, *, start: int):
        self._active = jax.process_index() == 0
        if not self._active:
            return
        path = Path(workdir) / "metrics.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            kept = [line for line in path.read_text().splitlines() if _step(line) < start]
            temporary = path.with_name(f"{path.name}.{os.getpid()}")
            temporary.write_text("".join(f"{line}\n" for line in kept))
            os.replace(temporary, path)
        self._file = path.open("a", encoding="utf-8")
        self._board = SummaryWriter(str(Path(workdir) / "tensorboard"), purge_step=start)

    def write(self, step: int, values: dict[str, float]) -> None:
        if not self._active:
            return
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        for name, value in values.items():
            self._board.add_scalar(name if "/" in name else f"train/{name}", value, step)

    def close(self) -> None:
        if self._active:
            self._file.close()
            self._board.close()


def _step(line: str) -> float:
    """A line that a kill cut in half counts as coming after everything."""
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError):
        return float("inf")
