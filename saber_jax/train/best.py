"""The best weights of a run by a validation metric, kept beside its checkpoints, and when to stop.

    WORKDIR/best/       a checkpoint like any other: its weights are those of the best measurement

Which measurement was best so far is saved with every checkpoint, so a resumed run decides as an
uninterrupted one does. The folder does not go back with the checkpoint: where it holds the weights
of a later step, the best before them are gone, and the next measurement is kept.
"""

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from saber_jax.data.tokenizer import Tokenizer
from saber_jax.models.config import SaberConfig
from saber_jax.runs import distributed, files
from saber_jax.runs.console import log
from saber_jax.train import checkpoint, saved
from saber_jax.train.step import TrainState
from saber_jax.train.validate import PREFIX
from saber_jax.tree import merge

FOLDER = "best"
LOWER = ("nll", "loss")
"""Metrics that begin with these are better when lower; all others when higher."""


def check(config: ConfigDict, metrics: Sequence[str]) -> None:
    """Raises ValueError for settings that would have no effect, and for config.validate.keep_best
    that is none of the stage's `metrics`."""
    v = config.validate
    if v.keep_best and v.keep_best not in metrics:
        raise ValueError(
            f"config.validate.keep_best must be one of {', '.join(metrics)} in the stage "
            f"{config.stage}, or empty to keep none; got {v.keep_best!r}."
        )
    if v.keep_best and not v.examples:
        raise ValueError(
            f"config.validate.keep_best={v.keep_best!r} needs a held-out part. Set "
            "config.validate.examples above 0."
        )
    if v.patience and not v.keep_best:
        raise ValueError(
            f"config.validate.patience={v.patience} needs to know what should improve. Set "
            "config.validate.keep_best to a validation metric, such as nll."
        )


@dataclasses.dataclass(kw_only=True)
class Best:
    """The best measurement so far. `keep` saves the weights of a step.

    `metric` is a name without "validate/"; after `patience` measurements in a row that are no
    better than the best one the run ends, or never for 0.
    """

    metric: str
    patience: int
    keep: Callable[[TrainState, int], None]
    value: float | None = None
    step: int = 0
    since: int = 0

    def seen(self, values: dict[str, float], state: TrainState, step: int) -> bool:
        """Keeps the weights if they are the best yet. Returns whether the run should end.

        Raises ValueError if these held-out examples have no such metric, such as the loss of a
        section that none of them has.
        """
        if PREFIX + self.metric not in values:
            names = ", ".join(name.removeprefix(PREFIX) for name in values)
            raise ValueError(
                f"config.validate.keep_best={self.metric!r} is not measured. There are: {names}."
            )
        value = values[PREFIX + self.metric]
        sign = -1 if self.metric.startswith(LOWER) else 1
        if self.value is None or sign * value > sign * self.value:
            self.value, self.step, self.since = value, step, 0
            self.keep(state, step)
            return False
        self.since += 1
        if not self.patience or self.since < self.patience:
            return False
        log(
            f"{self.metric} was best at step {self.step} ({self.value:.4g}) and has not improved "
            f"in {self.since} measurements: the run ends at step {step}"
        )
        return True

    def state(self) -> dict[str, Any]:
        """JSON that `recall` takes."""
        return {"value": self.value, "step": self.step, "since": self.since}

    def recall(self, state: dict[str, Any], held: int | None) -> None:
        """Continues from the state that a checkpoint holds, if the weights of its best measurement
        are `held`: the step in WORKDIR/best."""
        if state["step"] == held:
            self.value, self.step, self.since = state["value"], state["step"], state["since"]
        elif state["value"] is not None:
            log(
                f"{self.metric} was best at step {state['step']}, whose weights are gone: {FOLDER} "
                f"holds {'none' if held is None else f'those of step {held}'}. The next "
                "measurement is kept."
            )


def held(workdir: Path) -> int | None:
    """The step whose weights WORKDIR/best holds. Every process must call it, and gets the answer of
    the first: if they disagreed on the best, some would wait for the others to save."""
    steps = saved.steps(workdir / FOLDER) if jax.process_index() == 0 else []
    mine = json.dumps(int(steps[-1].name) if steps else None)
    return json.loads(distributed.from_first(mine.encode()))


def keeping(
    workdir: Path, cfg: SaberConfig, tokenizer: Tokenizer, base: Path | None, **about: Any
) -> Callable[[TrainState, int], None]:
    """A function that saves weights to WORKDIR/best and removes those saved before."""

    def keep(state: TrainState, step: int) -> None:
        folder = workdir / FOLDER
        place = folder / "checkpoints" / str(step)
        first = jax.process_index() == 0
        if first:
            files.remove_folder(place, ignore_errors=True)  # A killed run may have left a part.
        distributed.barrier("the best weights have room")
        more = dict(about)
        if base is not None:
            more["base"] = checkpoint.describe_base(folder, base)
        params = state.params if base is None else merge(state.trainable)
        if first:
            checkpoint.write_model_files(folder, cfg, tokenizer, **more)
        checkpoint.save_params(folder, params, cfg, step=step, **more)
        for older in saved.steps(folder) if first else ():
            if older.name != place.name:
                files.remove_folder(older)

    return keep
