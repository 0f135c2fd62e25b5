"""Console output that never ends a long job.

With a full disk, a closed pipe or a closed terminal, lines are dropped and counted, and a warning
is printed once.
"""

import contextlib
import logging
import os
import sys
from collections.abc import Callable
from typing import Any

import jax


class DropCounter:
    """Counts dropped items of kind `what`; warns at the first one and at the end."""

    def __init__(self, what: str):
        self._what, self.count = what, 0

    def add(self, count: int, why: str) -> None:
        if not self.count:
            warn(f"{self._what} are dropped, for {why}; the run goes on.")
        self.count += count

    def close(self) -> None:
        if self.count:
            warn(f"{self._what}: {self.count} were dropped.")


def log(text: str) -> None:
    """Prints a line on standard output, from the first process only."""
    if jax.process_index() == 0:
        _print(text, "stdout")


def warn(text: str) -> None:
    """Prints a line on standard error, from every process that calls it."""
    _print(f"WARNING: {text}", "stderr")


def _print(text: str, name: str) -> None:
    try:
        print(text, file=getattr(sys, name), flush=True)
    except (OSError, ValueError):  # ValueError: somebody closed it.
        # The stream keeps what was refused, would fail again when Python exits, and change the exit
        # status. A new one on the same file goes on when there is room again.
        with contextlib.suppress(OSError, ValueError):
            again = open(os.dup(getattr(sys, name).fileno()), "w", encoding="utf-8")  # noqa: SIM115
            setattr(sys, name, again)


def quiet_orbax() -> None:
    """Silences what Orbax logs in addition to raising errors. May be called repeatedly.

    It logs the traceback of every thread and task that an error passes through, and warns of items
    without a metadata file of their own, which those of a CheckpointManager never have. After a
    failed write it closes its event loop, which TensorStore then reports for each write left.
    """
    if not isinstance(sys.unraisablehook, _ExceptClosedLoop):
        sys.unraisablehook = _ExceptClosedLoop(sys.unraisablehook)
    logging.getLogger("absl").addFilter(_is_worth_logging)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)


def _is_worth_logging(record: logging.LogRecord) -> bool:
    of_orbax = "orbax" in record.pathname and record.levelno >= logging.ERROR
    return not (of_orbax or record.getMessage().startswith("Metadata file does not exist"))


class _ExceptClosedLoop:
    """A hook for exceptions that nobody can catch: `shown` gets all but those of a closed loop."""

    def __init__(self, shown: Callable[["sys.UnraisableHookArgs"], Any]):
        self._shown = shown

    def __call__(self, unraisable: "sys.UnraisableHookArgs") -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            self._shown(unraisable)
