"""Handling of steps with non-finite values: stop, skip the step, or roll back.

    stop      ends the run. The same command retries the step.
    skip      keeps weights and optimizer state from before the step, on the device.
    rollback  returns to the last checkpoint and leaves the step's records out from then on. They
              count as quarantined.

Each such step is a line of WORKDIR/nonfinite.jsonl, with the records of its batch:

    {"step": 120, "what": "loss is nan", "done": "skip", "records": [{"index": 7, "clip_id": ...}]}
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax

from saber_jax.data.quarantine import LeftOut
from saber_jax.runs.console import log, warn
from saber_jax.runs.files import exists, read_jsonl, write_jsonl

POLICIES = ("stop", "skip", "rollback")
MUST_BE_FINITE = ("loss", "grad_norm", "update_norm")
"""If these metrics are finite, so are the weights after the step."""
FILE = "nonfinite.jsonl"
NAMED = 5
"""Number of records that a message names; the file lists all."""


def check(policy: str) -> None:
    """Raises ValueError for a policy that does not exist."""
    if policy not in POLICIES:
        raise ValueError(f"config.on_nonfinite must be {', '.join(POLICIES)}, got {policy!r}.")


class RolledBack(Exception):
    """The run has to continue from its last checkpoint, without the records of the step."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class NonFinite:
    """Applies `policy` in the run of `workdir`; at most `limit` steps may be skipped or rolled
    back.

    `records` returns the records of a step's batch.
    """

    workdir: Path
    policy: str
    limit: int
    records: Callable[[int], Iterable[LeftOut]] = lambda step: ()

    def __post_init__(self):
        check(self.policy)

    def handle(self, step: int, values: Mapping[str, float], broken: str) -> None:
        """Has to be called by all processes. Returns if the step was skipped.

        Raises RolledBack, or FloatingPointError with the records and what to do.
        """
        entries = list(self.records(step))
        what = f"{broken} is {values[broken]}"
        # The device skips a step only for a non-finite loss or gradient.
        skipped = self.policy == "skip" and broken != "update_norm"
        lines = {line["step"]: line for line in _lines(self.workdir)}
        passed = sum(line["done"] != "stop" for s, line in lines.items() if s != step) + 1
        done = (
            self.policy
            if passed <= self.limit and (skipped or self.policy == "rollback")
            else "stop"
        )
        found = [dataclasses.asdict(entry) for entry in entries]
        lines[step] = {"step": step, "what": what, "done": done, "records": found}
        if jax.process_index() == 0:
            try:
                write_jsonl(self.workdir / FILE, [lines[s] for s in sorted(lines)])
            except OSError as error:
                warn(f"{self.workdir / FILE} cannot be written: {error}")
        of = f"{what} at step {step}, whose batch holds {_names(entries)}"
        if done == "skip":
            log(f"WARNING: {of}: skipped.")
        elif done == "rollback":
            raise RolledBack(f"{of}: going back to the last checkpoint and on without them.")
        else:
            raise FloatingPointError(f"{of}. {self._advice(passed)}")

    def _advice(self, passed: int) -> str:
        kept = "No checkpoint was made of this; the same command goes on from the last one."
        if self.policy != "stop" and passed > self.limit:
            return (
                f"{passed - 1} steps were passed over already, which is all that "
                f"config.nonfinite_limit={self.limit} allows. {kept} Lower "
                "config.optimizer.peak_lr, or look at those records."
            )
        return (
            f"{kept} Lower config.optimizer.peak_lr, or give --config.on_nonfinite=skip to leave "
            "such steps out, or rollback to leave the records out from the last checkpoint on."
        )


def skipping(step_fn: Callable) -> Callable:
    """Wraps a step so that non-finite loss or gradients change nothing but the step number and the
    schedule's count, so that the learning rate stays that of the step number.

    Jit it with the state donated: the selection is elementwise and in place.
    """

    def step(state, batch):
        after, metrics = step_fn(state, batch)
        sound = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["grad_norm"])

        def keep(new, old):
            return new if _is_schedule(new) else jnp.where(sound, new, old)

        kept = dataclasses.replace(
            after,
            trainable=jax.tree.map(keep, after.trainable, state.trainable),
            opt_state=jax.tree.map(keep, after.opt_state, state.opt_state, is_leaf=_is_schedule),
        )
        return kept, metrics

    return step


def _is_schedule(node: Any) -> bool:
    """Adam's count is in a state of another type: its bias correction counts updates."""
    return isinstance(node, optax.ScaleByScheduleState)


def left_out(workdir: Path) -> list[LeftOut]:
    """Records that were left out of this run by rollbacks."""
    lines = [line for line in _lines(workdir) if line["done"] == "rollback"]
    return [LeftOut(**entry) for line in lines for entry in line["records"]]


def _lines(workdir: Path) -> list[dict[str, Any]]:
    path = workdir / FILE
    return read_jsonl(path) if exists(path) else []


def _names(entries: list[LeftOut]) -> str:
    named = [f"{e.clip_id or e.index} ({e.file})" for e in entries[:NAMED]]
    more = f" and {len(entries) - NAMED} more, see {FILE}" if len(entries) > NAMED else ""
    return ", ".join(named) + more if named else "no record"
