"""What a long job says about itself: never worth stopping it for.

A full disk, a closed pipe or a terminal that is gone lets a line be lost, which is counted and said
once where somebody may still read it.
"""

import contextlib
import logging
import os
import sys

import jax


class Losses:
    """Counts what was dropped of `what`, and says so at the first and at the end."""

    def __init__(self, what: str):
        self._what, self.count = what, 0

    def add(self, count: int, why: str) -> None:
        if not self.count:
            warn(f"{self._what} are dropped, for {why}; the run goes on.")
        self.count += count

    def close(self) -> None:
        if self.count:
            warn(f"{self._what}: {self.count} were dropped.")


def say(text: str) -> None:
    """A line on standard output, once, however many processes run."""
    if jax.process_index() == 0:
        _print(text, "stdout")


def warn(text: str) -> None:
    """A line on standard error, from the process that calls."""
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


def keep_orbax_brief() -> None:
    """Drops what Orbax logs beside the errors that it raises. May be called any number of times.

    It logs the traceback of every thread and task that an error passes through, and warns of items
    without a metadata file of their own, which those of a CheckpointManager never have.
    """
    logging.getLogger("absl").addFilter(_worth_saying)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)


def _worth_saying(record: logging.LogRecord) -> bool:
    of_orbax = "orbax" in record.pathname and record.levelno >= logging.ERROR
    return not (of_orbax or record.getMessage().startswith("Metadata file does not exist"))
