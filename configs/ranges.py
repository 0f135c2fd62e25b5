"""Valid ranges of all numeric settings, which are checked before anything is written."""

import dataclasses
import math
from typing import Any

from ml_collections import ConfigDict


@dataclasses.dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`, both allowed unless `above` excludes `low`."""

    low: float
    high: float = math.inf
    above: bool = False

    def __contains__(self, value: float) -> bool:
        enough = value > self.low if self.above else value >= self.low
        return math.isfinite(value) and enough and value <= self.high

    def __str__(self) -> str:
        start = f"above {self.low:g}" if self.above else f"at least {self.low:g}"
        return start if math.isinf(self.high) else f"{start} and at most {self.high:g}"


COUNT, POSITIVE, NOT_NEGATIVE = Range(1), Range(0, above=True), Range(0)
SHARE, BELOW_ONE = Range(0, 1), Range(0, 1 - 2**-24)

RANGES = {
    "seed": Range(0, 2**32 - 1),
    "steps": COUNT,
    "epochs": NOT_NEGATIVE,
    "data.batch_examples": NOT_NEGATIVE,
    "lora.rank": NOT_NEGATIVE,
    "lora.alpha": POSITIVE,
    "lora.dropout": BELOW_ONE,
    "data.max_bad_fraction": SHARE,
    **dict.fromkeys((f"data.{n}" for n in ("batch_rows", "length", "targets", "segments")), COUNT),
    **dict.fromkeys((f"data.{n}" for n in ("response", "patches", "chunks")), NOT_NEGATIVE),
    "data.frame_patches": COUNT,
    "data.withhold": SHARE,
    "data.tasks.*": NOT_NEGATIVE,
    "data.first_tasks.*": NOT_NEGATIVE,
    "data.first_epochs": NOT_NEGATIVE,
    "data.wordings": Range(1, 4),
    "data.threads": COUNT,
    "data.workers": NOT_NEGATIVE,
    "mesh.*": Range(-1),
    "compute.microbatches": COUNT,
    "compute.head_chunk": COUNT,
    "optimizer.peak_lr": POSITIVE,
    "optimizer.adapter_factor": POSITIVE,
    "optimizer.vocabulary_steps": NOT_NEGATIVE,
    "optimizer.warmup_steps": NOT_NEGATIVE,
    "optimizer.final_fraction": SHARE,
    "optimizer.b1": BELOW_ONE,
    "optimizer.b2": BELOW_ONE,
    "optimizer.weight_decay": NOT_NEGATIVE,
    "optimizer.clip_norm": POSITIVE,
    "checkpoint_every": COUNT,
    "metrics_every": COUNT,
    "validate.examples": NOT_NEGATIVE,
    "validate.every": COUNT,
    "validate.patience": NOT_NEGATIVE,
    "log_every": NOT_NEGATIVE,
    "nonfinite_limit": NOT_NEGATIVE,
    "heartbeat_seconds": COUNT,
    "stall_seconds": NOT_NEGATIVE,
    "generation.*": COUNT,
    "mining.batch_size": COUNT,
    "mining.samples": Range(2),
    "mining.temperature": POSITIVE,
    "mining.margin": NOT_NEGATIVE,
    "mining.pairs_per_clip": COUNT,
    "loss.beta": POSITIVE,
    "loss.label_smoothing": Range(0, 0.5 - 2**-24),
    "loss.length_alpha": SHARE,
    "loss.*": NOT_NEGATIVE,
}
"""By the setting's name, or by its group's with `*`."""


def check(config: ConfigDict) -> None:
    """Raises ValueError that lists every setting outside its range, with its value."""
    wrong = [
        f"config.{name} must be {'' if math.isfinite(value) else 'finite and '}{RANGES[pattern]}, "
        f"got {value}"
        for name, value in numbers(config.to_dict())
        if (pattern := named(name)) is not None and value not in RANGES[pattern]
    ]
    if wrong:
        raise ValueError("; ".join(wrong) + ". configs/*.py says what they do.")


def numbers(tree: dict[str, Any], prefix: str = "") -> list[tuple[str, float]]:
    """[("data.length", 352), ...]"""
    found = []
    for key, value in tree.items():
        if isinstance(value, dict):
            found += numbers(value, f"{prefix}{key}.")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found.append((prefix + key, value))
    return found


def named(name: str) -> str | None:
    """Which entry of RANGES speaks of a setting."""
    group = f"{name.rpartition('.')[0]}.*"
    return next((pattern for pattern in (name, group) if pattern in RANGES), None)
