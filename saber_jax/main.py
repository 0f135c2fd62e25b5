"""Trains one stage: `python -m saber_jax.main --config=configs/sft.py:tiny`.

Reads from top to bottom: flags, mesh, data, state, loop. The train step itself is in train/step.py.
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
from saber_jax.data.loader import GlobalBatches
from saber_jax.data.pairs import Pair, read_pairs
from saber_jax.data.quarantine import Entry
from saber_jax.inputs import Inputs, open_inputs
from saber_jax.models import saber
from saber_jax.models.config import SaberConfig
from saber_jax.runs import distributed, lock, manifest
from saber_jax.runs.files import read_json, read_jsonl, write_json, write_jsonl
from saber_jax.runs.identity import MAY_CHANGE, identity
from saber_jax.runs.manifest import fingerprint
from saber_jax.runs.speaking import say
from saber_jax.runs.timeline import Attempt, Timeline, goodput
from saber_jax.runs.watchdog import Watchdog
from saber_jax.train import checkpoint, loop, nonfinite, reference, samples, saved, setup, start
from saber_jax.train.metrics import MetricsWriter
from saber_jax.train.preference import Preference
from saber_jax.train.profile import Profile
from saber_jax.train.progress import Console, Meter


def train(config: ConfigDict) -> None:
    """Everything that `--config` asks for, resuming from what the work directory holds.

    Nothing is written before all of what is asked for is seen to be possible.
    """
    ranges.check(config)
    workdir = Path(config.workdir)
    check_claim(workdir, config)
    watchdog = Watchdog(workdir, least_seconds=config.stall_seconds)
    with watchdog.watching():
        stage = setup.build(config, sharding.make_mesh(**config.mesh))
        pairs = checked_pairs(config) if config.stage == "cadpo" else None
        start.check(config)
        alone = lock.held(workdir) if jax.process_index() == 0 else contextlib.nullcontext()
        with alone:
            inputs = open_inputs(config, workdir, pairs)
            claim(workdir, config)
            while not run_stage(config, stage, inputs, watchdog):
                pass


def run_stage(config: ConfigDict, stage: setup.Setup, inputs: Inputs, watchdog: Watchdog) -> bool:
    """The run itself, in a work directory that is its own; `watchdog` follows its progress.

    Returns False when it has to go on from its last checkpoint, with what was left out since.
    """
    workdir = Path(config.workdir)
    base = start.base_checkpoint(config, stage, workdir)
    describe(config, stage.cfg, workdir, base, inputs)
    meta = {
        "records": inputs.examples.fingerprint,
        "plan": inputs.plan.fingerprint(),
        "batch_rows": config.data.batch_rows,
    }

    checkpoints = checkpoint.Checkpoints(
        workdir,
        every=config.checkpoint_every,
        frozen=base is None,
        strict=config.strict_restore,
    )
    params = None
    if config.stage == "cadpo":
        params = start.params(config, stage, base)
        inputs = with_references(config, params, inputs, stage, watchdog.timeline)
    state = None
    if checkpoints.latest() is not None:
        params = None  # Freed first: both at once may not fit.
        state = checkpoints.restore(start.layout(stage, base), meta)
    if state is None:
        state = stage.begin(start.params(config, stage, base) if params is None else params)
    else:
        inputs = inputs.resumed(checkpoints.meta()["data"])
        say(f"resuming {config.stage} at step {int(state.step)} of {config.steps}")

    if bad := nonfinite.left_out(workdir):
        inputs.quarantine.note(bad)
        examples = inputs.examples.without(inputs.quarantine.indices)
        inputs = dataclasses.replace(inputs, examples=examples)

    step_fn = stage.train_step(skip=config.on_nonfinite == "skip")
    first, began = int(state.step), time.perf_counter()
    rows = inputs.plan.rows(config.steps * config.data.batch_rows)
    batches = inputs.batches(
        config, stage.mesh, rows, first=first, withhold=config.data.withhold, quarantine=True
    )

    def records(step: int) -> list[Entry]:
        batch = rows[step * config.data.batch_rows : (step + 1) * config.data.batch_rows]
        detail = f"in the batch of step {step}"
        return [inputs.examples.entry(i, "nonfinite", detail) for row in batch for i in row]

    trouble = nonfinite.NonFinite(
        workdir=workdir,
        policy=config.on_nonfinite,
        limit=config.nonfinite_limit,
        records=records,
    )
    watch = watched(config, stage, batches, workdir, first, watchdog, trouble)
    some = [inputs.examples[i] for i in inputs.draw.usable[: samples.MOST_EXAMPLES]]
    samples.show(watch.writer, first, some, inputs.usable_sizes, inputs.tokenizer)
    # Also while the last checkpoint is being written: SIGTERM must not interrupt that.
    with distributed.Preemption():
        try:
            state = loop.run(
                state,
                step_fn,
                steps=config.steps,
                checkpoints=checkpoints,
                meta=meta,
                watch=watch,
                probe=stage.probe(),
                probe_every=config.metrics_every,
            )
        except nonfinite.RolledBack as back:
            say(f"WARNING: {back}")
            return False
        finally:
            watchdog.timeline.at("finish")
            checkpoints.close()
            watch.writer.close()
    summary = {
        "stage": config.stage,
        "steps": config.steps,
        **inputs.summary(config.steps, config.data.batch_rows),
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(stage.state.params)),
        "trainable_parameters": sum(leaf.size for leaf in stage.state.trainable.values()),
        "wall_seconds": time.perf_counter() - began,
        **recorded(workdir, watch, config.steps),
    }
    finish(workdir, summary)
    say(f"{config.stage}: {config.steps} steps, checkpoint in {workdir}")
    return True


def recorded(workdir: Path, watch: loop.Watch, steps: int) -> dict:
    """{"time": where the time of all starts went}, on the host that records it."""
    if watch.attempt is None:
        return {}
    watch.attempt.write(steps)
    return {"time": goodput(workdir)}


def watched(
    config: ConfigDict,
    stage: setup.Setup,
    batches: GlobalBatches,
    workdir: Path,
    first: int,
    watchdog: Watchdog,
    trouble: nonfinite.NonFinite,
) -> loop.Watch:
    """Who looks on from step `first`: files, console, meter, profiler."""
    attempt = None
    if jax.process_index() == 0:
        chips = stage.mesh.size
        attempt = Attempt(workdir, watchdog.timeline, first=first, chips=chips)
    return loop.Watch(
        writer=MetricsWriter(workdir, start=first, wandb=config.wandb),
        console=Console(stage=config.stage, steps=config.steps, every=config.log_every),
        meter=Meter(stage),
        profile=Profile(config.profile.steps, workdir, steps=config.steps),
        batches=batches,
        timeline=watchdog.timeline,
        attempt=attempt,
        hosts=watchdog.metrics,
        nonfinite=trouble,
    )


def describe(
    config: ConfigDict, cfg: SaberConfig, workdir: Path, base: Path | None, inputs: Inputs
) -> None:
    """Says what the run reads, and makes its work directory readable on its own."""
    about = {"stage": config.stage, "provenance": inputs.provenance}
    if base is not None:
        about["base"] = checkpoint.describe_base(workdir, base)
    if jax.process_index() == 0:
        checkpoint.write_model_files(workdir, cfg, inputs.tokenizer, **about)
    say(f"{config.stage}: {inputs.describe()}")


def checked_pairs(config: ConfigDict) -> list[Pair]:
    """The pairs, with what the loss options need to know about them.

    Raises ValueError where they do not say it, or where what they say leaves an option no effect.
    """
    if config.data.withhold:
        raise ValueError(
            f"config.data.withhold={config.data.withhold} belongs to stage 1: the reference's "
            "log-probs are of whole clips. Set it to 0; config.loss.conditional_* withholds here."
        )
    pairs, options = read_pairs(config.data.pairs), Preference(**config.loss)
    needs = {
        "withheld": (options.needs_ignored, "conditional_ignored_only, invariance, sensitivity"),
        "kappa": (options.conflict_power > 0, "conflict_power"),
    }
    for key, (needed, who) in needs.items():
        lacking = [pair.clip_id for pair in pairs if getattr(pair, key) in ("", None)]
        if needed and lacking:
            raise ValueError(
                f"config.loss ({who}) needs {key!r} of every pair, but {len(lacking)} of "
                f"{len(pairs)} in {config.data.pairs} lack it, the first for {lacking[0]}. Mine "
                "them with python -m data_prep.preferences, add it, or unset the option."
            )
    idle = {
        f"conditional_{modality}": f"no pair ignored {modality}"
        for modality in options.conditional
        if options.conditional_ignored_only and all(p.withheld != modality for p in pairs)
    }
    if options.conflict_power and all(pair.kappa == 1 for pair in pairs):
        idle["conflict_power"] = "kappa is 1 everywhere"
    for name, why in idle.items():
        raise ValueError(
            f"config.loss.{name} would have no effect on {config.data.pairs}: {why}. Set it to 0."
        )
    return pairs


def with_references(
    config: ConfigDict, params: dict, inputs: Inputs, stage: setup.Setup, timeline: Timeline
) -> Inputs:
    """The pairs with their reference log-probs, computed by the starting weights where
    config.reference does not hold them yet.

    Fresh adapters change nothing, so leaving them off keeps the fingerprint that of the base.
    """
    d, params, usable = config.data, saber.without_lora(params), inputs.draw.usable
    pairs = inputs.examples.pairs
    source = reference.Source(
        weights=reference.weights_digest(params),
        processor=reference.processor_digest([inputs.examples[i] for i in usable[[0, -1]]]),
        tokens=fingerprint(d.path, "tokenizer.*"),
        media=fingerprint(d.path, "**/*.array_record*"),
        dtype=stage.compute.dtype,
    )
    # The reference numbers the pairs that can be used, and nothing else does.
    keys, number = [pairs[i].key for i in usable], {int(i): n for n, i in enumerate(usable)}

    def alive(step: Callable) -> Callable:
        """`step` of these parameters; every call is a sign of life."""

        def call(batch: Any) -> Any:
            timeline.at("start")
            return step(params, batch)

        return call

    caches = []
    for view in Preference(**config.loss).reference_views:
        cache = reference.Cache(Path(config.reference), view, source)
        reference.complete(
            cache,
            keys,
            inputs.usable_sizes[:, -1],
            lambda missing: [
                [number[i] for i in row] for row in inputs.plan.rows_of(usable[missing])
            ],
            lambda rows: inputs.batches(
                config, stage.mesh, [[int(usable[n]) for n in row] for row in rows]
            ),
            alive(stage.reference_step(view)),
            batch_rows=config.data.batch_rows,
        )
        caches.append(cache)
    references = reference.References(caches, [pair.key for pair in pairs])
    return dataclasses.replace(inputs, examples=inputs.examples.with_references(references))


def check_claim(workdir: Path, config: ConfigDict) -> list[str]:
    """What changed of an unfinished run's settings that may change.

    Raises ValueError if the work directory belongs to another config.
    """
    path = workdir / "config.json"
    if not path.exists():
        return []
    there, here = identity(read_json(path)), identity(config)
    may = () if (workdir / "summary.json").exists() else MAY_CHANGE
    manifest.check(
        {name: value for name, value in there.items() if name not in may},
        {name: value for name, value in here.items() if name not in may},
        what=f"{workdir} belongs to a run with another config",
        remedy="Choose another directory with --config.workdir=DIR.",
    )
    return manifest.differences(there, here)


def claim(workdir: Path, config: ConfigDict) -> None:
    """Writes config.json, by which the work directory belongs to this config from now on."""
    path, changed = workdir / "config.json", check_claim(workdir, config)
    distributed.barrier("all have read the config before")
    if jax.process_index() == 0 and (changed or not path.exists()):
        if changed:
            steps = saved.steps(workdir)
            step = int(steps[-1].name) if steps else 0
            say(f"settings changed at step {step}: {'; '.join(changed)}")
            history = workdir / "changes.jsonl"
            before = read_jsonl(history) if history.exists() else []
            write_jsonl(history, [*before, {"step": step, "changed": changed}])
        write_json(path, json.loads(config.to_json()))
    distributed.barrier("claim")
    if not path.exists():
        raise ValueError(
            f"{workdir} of the first host is not here: host {jax.process_index()} sees no "
            f"{path.name} in it. Put config.root on a file system that all hosts share "
            "(docs/performance.md, `Disks`)."
        )
    check_claim(workdir, config)


def finish(workdir: Path, summary: dict) -> None:
    """summary.json, written last: its presence is what says that the stage is done."""
    if jax.process_index() == 0:
        write_json(workdir / "summary.json", summary)


def refuse_hopeless(config: ConfigDict) -> None:
    """A 7B model on a CPU would swap for hours before it failed."""
    if config.model != "tiny" and jax.default_backend() == "cpu":
        raise ValueError(
            f"{config.model} needs TPUs or GPUs and this machine has only a CPU. Run it where they "
            "are (README, `On a pod`), or train the embedded example here: "
            f"launch/tpu_run.sh configs/{config.stage}.py:tiny"
        )


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}; settings look like --config.seed=1")
    logging.set_verbosity(logging.WARNING)  # Orbax tells its whole life at INFO.
    try:
        distributed.initialize(heartbeat_seconds=CONFIG.value.heartbeat_seconds)
        with distributed.failing_together():
            run(CONFIG.value)
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"saber_jax.main: {error}")


def run(config: ConfigDict) -> None:
    """Trains, or exits with a status and a sentence."""
    try:
        refuse_hopeless(config)
        with distributed.ending_early():
            train(config)
    except loop.Preempted as stopped:
        say(f"{config.stage}: {stopped}. The same command goes on from there.")
        sys.exit(distributed.PREEMPTED)
    except (ValueError, OSError, FloatingPointError, checkpoint.SaveError) as error:
        sys.exit(f"saber_jax.main: {error}")


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
