"""Computes the reference log-probs of a stage 2 run ahead of it.

    python -m saber_jax.reference --config=configs/cadpo.py:7b

Training computes missing log-probs itself. Use this command to compute them earlier or elsewhere:
on other devices, on another mesh, or while pairs are still being added. An interrupted computation
can be resumed.
"""

from configs.command_line import CONFIG, answer_early, parse_flags

if __name__ == "__main__":
    answer_early()  # Before jax is imported, which takes seconds.

import sys
from pathlib import Path

from absl import app, logging
from ml_collections import ConfigDict

from configs import ranges
from saber_jax import sharding
from saber_jax.inputs import open_inputs
from saber_jax.runs import distributed
from saber_jax.runs.console import log
from saber_jax.runs.files import make_folder
from saber_jax.runs.phases import PhaseClock
from saber_jax.train import stage as stages
from saber_jax.train import start
from saber_jax.train.checkpoint import SaveError
from saber_jax.train.references import with_references


def run(config: ConfigDict) -> None:
    """Fills config.reference. Raises ValueError for a stage that has no reference."""
    ranges.check(config)
    stage, workdir = stages.build(config, sharding.make_mesh(**config.mesh)), Path(config.workdir)
    if not stage.reference_views:
        raise ValueError(
            f"{config.stage} has no reference policy. Give configs/cadpo.py:VARIANT instead."
        )
    pairs = stage.read_pairs(config)
    start.check(config, stage)
    make_folder(workdir)
    inputs = open_inputs(config, workdir, pairs)
    base = start.base_checkpoint(config, stage, workdir)
    start.describe(config, stage, base, inputs)
    weights = start.weights_digest(config, stage, base)
    params = start.Weights(config, stage, base)
    inputs = with_references(config, weights, params, inputs, stage, PhaseClock())
    views, count = ", ".join(stage.reference_views), len(inputs.usable)
    log(f"{config.reference} holds log pi_ref of {count} pairs, by view: {views}")


def _main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}; settings look like --config.seed=1")
    logging.set_verbosity(logging.WARNING)
    try:
        distributed.initialize(heartbeat_seconds=CONFIG.value.heartbeat_seconds)
        with distributed.failing_together():
            start.refuse_large_model_on_cpu(CONFIG.value)
            try:
                run(CONFIG.value)
            except distributed.Preempted as stopped:
                log(f"saber_jax.reference: {stopped}. The same command goes on from there.")
                sys.exit(distributed.PREEMPTED)
    except (ValueError, OSError, FloatingPointError, SaveError) as error:
        sys.exit(f"saber_jax.reference: {error}")


if __name__ == "__main__":
    app.run(_main, flags_parser=parse_flags)
