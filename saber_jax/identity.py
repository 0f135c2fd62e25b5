"""What makes a training run the run it is: the settings that decide what is computed.

Two calls with equal identity may share a work directory, and what the first one finished the second
one need not repeat. Where a run lies, how it is spread over machines, what it logs and how often it
saves are not part of it.
"""

import json
from typing import Any

from ml_collections import ConfigDict

APART = (
    *("root", "workdir", "mesh", "checkpoint_every", "generation", "reference"),
    *("log_every", "metrics_every", "profile", "heartbeat_seconds", "wandb"),
)


def identity(config: ConfigDict | dict) -> dict[str, Any]:
    """Setting -> value, keys like "data.length"; `config` or what json made of one."""
    tree = json.loads(config.to_json()) if isinstance(config, ConfigDict) else config
    return _flat({key: value for key, value in tree.items() if key not in APART})


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"data": {"path": x}} -> {"data.path": x}"""
    flat = {}
    for key, value in tree.items():
        flat |= (
            _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
        )
    return flat
