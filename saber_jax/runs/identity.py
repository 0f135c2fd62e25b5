"""The identity of a training run: the settings that affect its results.

Two commands with equal identity can share a work directory, and the second one continues or reuses
what the first one did. Paths, the distribution over machines, rematerialisation, logging and the
frequency of checkpoints are not part of the identity.
"""

import json
from typing import Any

from ml_collections import ConfigDict

from saber_jax.tree import flatten

APART = (
    *("variant", "topology", "mesh", "root", "workdir", "reference", "generation"),
    *(f"compute.{key}" for key in ("microbatches", "remat", "kernel", "head_chunk", "head_keep")),
    *("checkpoint_every", "log_every", "metrics_every", "profile", "wandb"),
    *("heartbeat_seconds", "stall_seconds", "strict_restore", "mining.batch_size", "mining.judge"),
    *("on_nonfinite", "nonfinite_limit", "data.threads", "data.workers"),
    *("validate.every", "loss.warn_displacement"),
)

MAY_CHANGE = (
    *("steps", "epochs"),
    *(f"optimizer.{key}" for key in ("peak_lr", "adapter_factor", "warmup_steps")),
    *(f"optimizer.{key}" for key in ("final_fraction", "weight_decay", "clip_norm")),
)
"""Settings of the identity that may change when an unfinished run is started again, to rescue a run
that goes wrong. The change is logged with the step from which it applies."""

LATER = {"optimizer.mu_dtype": "float32"}
"""Settings that work directories of earlier versions lack, and the values of what these versions
did, so that a run goes on under a version that has a new setting."""


def identity(config: ConfigDict | dict) -> dict[str, Any]:
    """Setting -> value with keys like "data.length"; `config` may also be a dict read from JSON."""
    tree = json.loads(config.to_json()) if isinstance(config, ConfigDict) else config
    return {name: value for name, value in flatten(tree, ".").items() if not _apart(name)}


def _apart(name: str) -> bool:
    return any(name == part or name.startswith(f"{part}.") for part in APART)
