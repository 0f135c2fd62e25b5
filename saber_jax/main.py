"""Trains one stage: `python -m saber_jax.main --config=configs/sft.py:tiny`.

Reads from top to bottom: flags, work directory, stage, data, state, loop. What distinguishes the
stages is in train/stage.py, and the train steps themselves are in train/step.py.
"""

from configs.command_line import CONFIG, answer_early, parse_flags

if __name__ == "__main__":
    answer_early()  # Before jax is imported, which takes seconds.

import contextlib
import dataclasses
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from absl import app, logging
from ml_collections import ConfigDict

from configs import ranges
from saber_jax import sharding
from saber_jax.aot.xla_flags import FLAGS
from saber_jax.batch import Batch
from saber_jax.data.quarantine import LeftOut
from saber_jax.inputs import RunInputs, open_inputs
from saber_jax.runs import buckets, distributed, executables, lock, manifest
from saber_jax.runs.console import log
from saber_jax.runs.files import exists, read_json, read_jsonl, write_json, write_jsonl
from saber_jax.runs.identity import LATER, MAY_CHANGE, identity
from saber_jax.runs.phases import Attempt, goodput
from saber_jax.runs.watchdog import Watchdog
from saber_jax.train import best, checkpoint, copies, loop, nonfinite, samples, saved, start
from saber_jax.train import stage as stages
from saber_jax.train.metrics import MetricsWriter
from saber_jax.train.optimizer import OptimizerConfig
from saber_jax.train.profile import Profile
from saber_jax.train.progress import Console, Meter, StepSchedule
from saber_jax.train.references import with_references
from saber_jax.train.stage import Stage
from saber_jax.train.step import Metrics, TrainState
from saber_jax.train.validate import Validation

EXECUTABLES = "executables"


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}; settings look like --config.seed=1")
    logging.set_verbosity(logging.WARNING)  # Orbax logs a lot at INFO.
    try:
        distributed.initialize(heartbeat_seconds=CONFIG.value.heartbeat_seconds)
        with distributed.failing_together():
            run(CONFIG.value)
    except (ValueError, OSError) as error:
        sys.exit(f"saber_jax.main: {error}")


def run(config: ConfigDict) -> None:
    """Trains, or exits with a status and a sentence."""
    try:
        start.refuse_large_model_on_cpu(config)
        with distributed.ending_early():
            train(config)
    except distributed.Preempted as stopped:
        log(f"{config.stage}: {stopped}. The same command goes on from there.")
        sys.exit(distributed.PREEMPTED)
    except (ValueError, OSError, FloatingPointError, checkpoint.SaveError) as error:
        sys.exit(f"saber_jax.main: {error}")


def train(config: ConfigDict) -> None:
    """Trains the stage of `config`, resuming from its work directory.

    Settings, data and checkpoints are checked before anything is written.
    """
    ranges.check(config)
    workdir = Path(config.workdir)
    check_hosts(config)
    check_claim(workdir, config)
    watchdog = Watchdog(workdir, least_seconds=config.stall_seconds)
    with watchdog.watching():
        sharding.check_topology(config.topology)
        stage = stages.build(config, sharding.make_mesh(**config.mesh))
        pairs = stage.read_pairs(config)
        start.check(config, stage)
        alone = lock.held(workdir) if jax.process_index() == 0 else contextlib.nullcontext()
        with alone:
            inputs = open_inputs(config, workdir, pairs)
            claim(workdir, config)
            if config.steps is None:  # The length of an epoch is known now.
                config = config.copy_and_resolve_references()
                config.steps = inputs.steps
                stage = stages.build(config, stage.mesh)
            while not run_stage(config, stage, inputs, watchdog):
                pass


def check_hosts(config: ConfigDict) -> None:
    """Raises ValueError on a host that was started with another config than the first one."""
    ours = identity(config)
    theirs = distributed.from_first(json.dumps(ours).encode())
    manifest.check(
        json.loads(theirs),
        ours,
        what=f"host {jax.process_index()} was started with another config than the first host",
        remedy="Give the same command on all of them.",
    )


def check_claim(workdir: Path, config: ConfigDict) -> list[str]:
    """The differences to an unfinished run's settings, as far as these may change.

    Raises ValueError if the work directory belongs to another config.
    """
    path = workdir / "config.json"
    if not exists(path):
        return []
    there, here = LATER | identity(read_json(path)), identity(config)
    may = () if exists(workdir / "summary.json") else MAY_CHANGE
    manifest.check(
        {name: value for name, value in there.items() if name not in may},
        {name: value for name, value in here.items() if name not in may},
        what=f"{workdir} belongs to a run with another config",
        remedy="Choose another directory with --config.workdir=DIR.",
    )
    return manifest.differences(there, here)


def claim(workdir: Path, config: ConfigDict) -> None:
    """Writes config.json, which reserves the work directory for this config."""
    path, changed = workdir / "config.json", check_claim(workdir, config)
    distributed.barrier("all have read the config before")
    if jax.process_index() == 0 and (changed or not exists(path)):
        if changed:
            steps = saved.steps(workdir)
            step = int(steps[-1].name) if steps else 0
            log(f"settings changed at step {step}: {'; '.join(changed)}")
            history = workdir / "changes.jsonl"
            before = read_jsonl(history) if exists(history) else []
            write_jsonl(history, [*before, {"step": step, "changed": changed}])
        write_json(path, json.loads(config.to_json()))
    distributed.barrier("claim")
    if not exists(path):
        raise ValueError(
            f"{workdir} of the first host is not here: host {jax.process_index()} sees no "
            f"{path.name} in it. Put config.root on a file system that all hosts share "
            "(docs/performance.md, `Disks`)."
        )
    check_claim(workdir, config)


def run_stage(config: ConfigDict, stage: Stage, inputs: RunInputs, watchdog: Watchdog) -> bool:
    """Runs the stage in a claimed work directory; `watchdog` follows its progress.

    Returns False if it has to be called again after a rollback to the last checkpoint.
    """
    workdir = Path(config.workdir)
    base = start.base_checkpoint(config, stage, workdir)
    start.describe(config, stage, base, inputs)
    checkpoints = checkpoint.Checkpoints(
        workdir,
        every=config.checkpoint_every,
        frozen=base is None,
        strict=config.strict_restore,
    )
    meta = {
        "records": inputs.examples.fingerprint,
        "plan": inputs.plan.fingerprint(),
        "batch_rows": config.data.batch_rows,
    }
    state, inputs = first_state(config, stage, base, inputs, checkpoints, meta, watchdog)
    inputs = without_rolled_back(workdir, inputs)
    first, began = int(state.step), time.perf_counter()
    observers = observers_of(config, stage, base, inputs, first, watchdog)
    if observers.best is not None and first and (before := checkpoints.meta().get("best")):
        observers.best.recall(before, best.held(workdir))
    observers.console.begin()
    some = inputs.examples.readable(inputs.draw.usable, samples.MOST_EXAMPLES)
    samples.show(observers.writer, first, some, inputs.usable_sizes, inputs.tokenizer)
    # Also while the last checkpoint is being written: SIGTERM must not interrupt that.
    with distributed.Preemption():
        try:
            state = loop.run(
                state,
                step_of(config, stage),
                steps=config.steps,
                checkpoints=checkpoints,
                meta=meta,
                observers=observers,
                probe=stage.probe(),
                probe_every=config.metrics_every,
                validation=validated(config, stage, inputs),
            )
        except nonfinite.RolledBack as back:
            log(f"WARNING: {back}")
            return False
        finally:
            watchdog.clock.enter("finish")
            checkpoints.close()
            observers.writer.close()
    last = int(state.step)
    if base is None and stage.compute.dtype == "bfloat16":  # Adapters are small.
        copies.write(workdir, state.params, stage.cfg)
    summary = {
        "stage": config.stage,
        "steps": last,
        **inputs.summary(last, config.data.batch_rows),
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(stage.state.params)),
        "trainable_parameters": sum(leaf.size for leaf in stage.state.trainable.values()),
        "wall_seconds": time.perf_counter() - began,
        **recorded(workdir, observers, last),
    }
    finish(workdir, summary)
    log(f"{config.stage}: {last} steps, checkpoint in {workdir}")
    return True


def step_of(
    config: ConfigDict, stage: Stage
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """The jitted train step, or the one that `saber_jax.aot --save` left in ROOT/executables."""
    step = stage.train_step(skip=config.on_nonfinite == "skip")
    folder = buckets.native(Path(config.root) / EXECUTABLES)
    if not folder.exists():
        return step
    lowered = step.lower(stage.state, stage.batch)
    return executables.load(lowered, folder, FLAGS, stage.mesh.devices.flatten().tolist()) or step


def first_state(
    config: ConfigDict,
    stage: Stage,
    base: Path | None,
    inputs: RunInputs,
    checkpoints: checkpoint.Checkpoints,
    meta: dict[str, Any],
    watchdog: Watchdog,
) -> tuple[TrainState, RunInputs]:
    """The state to train from and the inputs from there on: of the last checkpoint, else new.

    Where the loss compares with a reference model, the inputs gain its log-probs.
    """
    params = start.Weights(config, stage, base)
    if stage.reference_views:
        weights = start.weights_digest(config, stage, base)
        inputs = with_references(config, weights, params, inputs, stage, watchdog.clock)
    state = None
    if checkpoints.latest() is not None:
        params.forget()  # Both at once may not fit.
        state = checkpoints.restore(start.layout(stage, base), meta)
    if state is None:
        inputs.quarantine.recall([])  # No checkpoint is left that has left anything out.
        state = stage.begin(params())
    else:
        inputs = inputs.resumed(checkpoints.meta()["data"])
        log(f"resuming {config.stage} at step {int(state.step)} of {config.steps}")
    params.forget()  # The step takes their memory over.
    return state, inputs


def without_rolled_back(workdir: Path, inputs: RunInputs) -> RunInputs:
    """`inputs` without the records whose steps were not finite and were rolled back."""
    bad = nonfinite.left_out(workdir)
    if not bad:
        return inputs
    inputs.quarantine.note(bad)
    examples = inputs.examples.without(inputs.quarantine.indices)
    return dataclasses.replace(inputs, examples=examples)


def observers_of(
    config: ConfigDict,
    stage: Stage,
    base: Path | None,
    inputs: RunInputs,
    first: int,
    watchdog: Watchdog,
) -> loop.Observers:
    """What the loop reads and tells from step `first` on: batches, files, console, profiler."""
    workdir, rows_a_step = Path(config.workdir), config.data.batch_rows
    rows = inputs.plan.rows(config.steps * rows_a_step)

    def records(step: int) -> list[LeftOut]:
        batch = rows[step * rows_a_step : (step + 1) * rows_a_step]
        detail = f"in the batch of step {step}"
        return [inputs.examples.entry(i, "nonfinite", detail) for row in batch for i in row]

    attempt = None
    if jax.process_index() == 0:
        attempt = Attempt(workdir, watchdog.clock, first=first, chips=stage.mesh.size)
    return loop.Observers(
        writer=MetricsWriter(workdir, start=first, wandb=config.wandb),
        console=Console(
            stage=config.stage, items=stage.items, steps=config.steps, every=config.log_every
        ),
        meter=Meter(stage),
        profile=Profile(config.profile.steps, workdir, steps=config.steps),
        batches=inputs.batches(
            config, stage.mesh, rows, first=first, withhold=config.data.withhold
        ),
        clock=watchdog.clock,
        attempt=attempt,
        hosts=watchdog.metrics,
        nonfinite=nonfinite.NonFinite(
            workdir=workdir,
            policy=config.on_nonfinite,
            limit=config.nonfinite_limit,
            records=records,
        ),
        schedule=schedule(config, inputs, first),
        best=best_of(config, stage, base, inputs),
    )


def schedule(config: ConfigDict, inputs: RunInputs, first: int) -> StepSchedule:
    """Learning rate and epoch of the steps from `first` on."""
    row = first * config.data.batch_rows
    finished = inputs.draw.taken(inputs.plan.position(row).epoch)
    return StepSchedule(
        OptimizerConfig(**config.optimizer),
        config.steps,
        adapters=bool(config.lora.rank),
        passed=int(finished.sum()) + len(inputs.plan.begun(row)),
        epochs=inputs.draw.epochs,
    )


def validated(config: ConfigDict, stage: Stage, inputs: RunInputs) -> Validation | None:
    """The validation, if config.validate.examples is above 0."""
    if not len(inputs.held_out):
        return None
    rows = inputs.plan.rows_of(inputs.held_out)
    return Validation(
        batches=lambda: inputs.batches(config, stage.mesh, rows),
        measure=stage.measurement(),
        every=config.validate.every,
        steps=config.steps,
        beta=stage.beta,
        warn_displacement=stage.warn_displacement,
    )


def best_of(
    config: ConfigDict, stage: Stage, base: Path | None, inputs: RunInputs
) -> best.Best | None:
    """Who keeps the best weights, if config.validate.keep_best names a metric."""
    if not config.validate.keep_best:
        return None
    keep = best.keeping(
        Path(config.workdir),
        stage.cfg,
        inputs.tokenizer,
        base,
        stage=config.stage,
        provenance=inputs.provenance,
    )
    return best.Best(metric=config.validate.keep_best, patience=config.validate.patience, keep=keep)


def recorded(workdir: Path, observers: loop.Observers, steps: int) -> dict:
    """{"time": where the time of all starts went}, on the host that records it."""
    if observers.attempt is None:
        return {}
    observers.attempt.write(steps)
    return {"time": goodput(workdir)}


def finish(workdir: Path, summary: dict) -> None:
    """Writes summary.json, whose presence marks the stage as done."""
    if jax.process_index() == 0:
        write_json(workdir / "summary.json", summary)


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
