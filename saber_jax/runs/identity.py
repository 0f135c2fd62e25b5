"""What makes a training run the run it is: the settings that decide what is computed.

Two calls with equal identity may share a work directory, and what the first one finished the second
one need not repeat. Where a run lies, how it is spread over machines, what it keeps and what it
computes twice, what it logs and how often it saves are not part of it.
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
    *("validate.every", "validate.warn_displacement"),
)

MAY_CHANGE = (
    *("steps", "epochs"),
    *(f"optimizer.{key}" for key in ("peak_lr", "adapter_factor", "warmup_steps")),
    *(f"optimizer.{key}" for key in ("final_fraction", "weight_decay", "clip_norm")),
)
"""Part of the identity, and yet allowed to change when an unfinished run is started again: what one
turns when a run goes wrong. The change is logged with the step from which it holds."""


def identity(config: ConfigDict | dict) -> dict[str, Any]:
    """Setting -> value, keys like "data.length"; `config` or what json made of one."""
    tree = json.loads(config.to_json()) if isinstance(config, ConfigDict) else config
    return {name: value for name, value in flatten(tree, ".").items() if not _apart(name)}


def _apart(name: str) -> bool:
    return any(name == part or name.startswith(f"{part}.") for part in APART)
