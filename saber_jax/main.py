"""Trains one stage: `python -m saber_jax.main --config=configs/sft.py:tiny`.

Reads from top to bottom: flags, mesh, data, state, loop. The train step itself is in train/step.py.
"""

import functools
import json
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
from absl import app, logging
from jax.sharding import Mesh
from ml_collections import ConfigDict

from configs.command_line import CONFIG, parse_flags
from saber_jax import sharding
from saber_jax.data import pipeline
from saber_jax.data.journal import write_json
from saber_jax.data.packing import Budget
from saber_jax.data.pairs import read_pairs
from saber_jax.data.records import RecordSource
from saber_jax.data.tokenizer import load_tokenizer
from saber_jax.models import saber
from saber_jax.models.config import SaberConfig, saber_config
from saber_jax.train import checkpoint, loop
from saber_jax.train import optimizer as optimizer_lib
from saber_jax.train.metrics import MetricsWriter
from saber_jax.train.reference import reference_log_probs, weights_digest
from saber_jax.train.step import (
    Compute,
    TrainState,
    cadpo_step,
    pair_log_probs,
    partition,
    sft_step,
)

# A run's fingerprint leaves these out: they change where or how often, not what is computed.
NOT_PART_OF_THE_RUN = ("root", "workdir", "mesh", "checkpoint_every", "generation")


def train(config: ConfigDict) -> None:
    """Everything that `--config` asks for, resuming from what the work directory holds."""
    workdir = Path(config.workdir)
    claim(workdir, config)
    mesh = sharding.make_mesh(**config.mesh)

    cfg, abstract, shardings = network(config, mesh)
    examples, plan, counts = data(config, workdir)
    tx = optimizer_lib.make_optimizer(
        optimizer_lib.OptimizerConfig(**config.optimizer), config.steps
    )
    compute = Compute(**config.compute)
    meta = {"plan": plan.fingerprint(), "batch_rows": config.data.batch_rows}

    checkpoints = checkpoint.Checkpoints(workdir, every=config.checkpoint_every)
    params = initial_params(config, cfg, shardings)
    if config.stage == "cadpo":
        examples = with_references(config, params, examples, plan, cfg, compute, mesh, workdir)
        step = functools.partial(cadpo_step, beta=config.loss.beta)
    else:
        step = sft_step
    state, state_shardings = new_state(config, params, tx, shardings, mesh)
    if checkpoints.latest() is not None:
        layout = jax.tree.map(
            lambda leaf, s: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=s),
            state,
            state_shardings,
        )
        state = checkpoints.restore(layout, meta)
        print(f"resuming {config.stage} at step {int(state.step)} of {config.steps}")

    step_fn = jax.jit(
        functools.partial(step, cfg=cfg, compute=compute, tx=tx),
        donate_argnums=0,
        out_shardings=(state_shardings, sharding.replicated(mesh)),
    )
    start, began = int(state.step), time.perf_counter()
    rows = [plan.row(i) for i in range(config.steps * config.data.batch_rows)]
    batches = global_batches(config, examples, rows, plan.budget, mesh, start, config.data.withhold)
    writer = MetricsWriter(workdir, start=start)
    state = loop.run(
        state,
        step_fn,
        batches,
        stage=config.stage,
        steps=config.steps,
        checkpoints=checkpoints,
        meta=meta,
        writer=writer,
    )
    checkpoints.close()
    writer.close()
    summary = {
        "stage": config.stage,
        "steps": config.steps,
        "examples": len(examples),
        "rows_per_epoch": plan.rows_per_epoch,
        "fill": plan.fill(),
        "unigram_entropy": pipeline.unigram_entropy(counts),
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(abstract)),
        "wall_seconds": time.perf_counter() - began,
    }
    finish(workdir, summary)
    print(f"{config.stage}: {config.steps} steps, checkpoint in {workdir}")


def network(config: ConfigDict, mesh: Mesh) -> tuple[SaberConfig, dict, dict]:
    """The model's shape, its abstract parameters and their shardings."""
    cfg = saber_config(config.model)
    abstract = saber.abstract(cfg)
    return cfg, abstract, sharding.parameter_shardings(saber.axes(cfg), abstract, mesh)


def data(
    config: ConfigDict, workdir: Path
) -> tuple[pipeline.Examples, pipeline.Plan, dict[int, int]]:
    """Encoded examples, the plan that packs them, and the target tokens' counts."""
    d = config.data
    tokenizer = load_tokenizer(d.path)
    source = RecordSource(d.path, d.split)
    pairs = read_pairs(d.pairs) if config.stage == "cadpo" else None
    examples = pipeline.Examples(source, tokenizer, pairs)
    cfg = saber_config(config.model)
    checkpoint.write_model_files(
        workdir, cfg, tokenizer, stage=config.stage, provenance=dict(source[0].provenance)
    )
    sizes, counts = pipeline.measure(examples, workdir / "sizes.npz")
    budget = Budget(
        length=d.length,
        response=d.response,
        patches=d.patches,
        chunks=d.chunks,
        targets=d.targets,
        segments=d.segments,
    )
    plan = pipeline.Plan(sizes, budget, config.seed)
    fill = ", ".join(f"{name} {share:.0%}" for name, share in plan.fill().items())
    print(
        f"{config.stage}: {len(examples)} examples in {plan.rows_per_epoch} rows an epoch; "
        f"budgets filled: {fill}"
    )
    return examples, plan, counts


def initial_params(config: ConfigDict, cfg: SaberConfig, shardings: dict) -> dict:
    """From config.init.checkpoint, or random."""
    if config.init.checkpoint:
        return checkpoint.load_params(config.init.checkpoint, cfg, shardings)
    init = jax.jit(functools.partial(saber.init, cfg), out_shardings=shardings)
    # rbg: the default generator takes half a minute to compile for the tiny model alone.
    return init(jax.random.key(config.seed, impl="rbg"))


def new_state(config: ConfigDict, params: dict, tx, shardings: dict, mesh: Mesh):
    """A state at step 0 and its shardings, the optimizer's moments sharded like the weights."""
    patterns = tuple(config.trainable)
    trainable, frozen = partition(params, patterns)
    trainable_shardings, frozen_shardings = partition(shardings, patterns)
    opt_shardings = optimizer_lib.optimizer_shardings(tx, trainable, trainable_shardings, mesh)
    opt_state = jax.jit(tx.init, out_shardings=opt_shardings)(trainable)
    step = jax.device_put(jnp.zeros((), jnp.int32), sharding.replicated(mesh))
    return TrainState(step, trainable, frozen, opt_state), TrainState(
        sharding.replicated(mesh), trainable_shardings, frozen_shardings, opt_shardings
    )


def with_references(
    config: ConfigDict,
    params: dict,
    examples: pipeline.Examples,
    plan: pipeline.Plan,
    cfg: SaberConfig,
    compute: Compute,
    mesh: Mesh,
    workdir: Path,
) -> pipeline.Examples:
    """The pairs with their reference log-probs, computed by the starting weights."""
    rows = [plan.row(i) for i in range(plan.rows_per_epoch)]
    log_probs = jax.jit(
        functools.partial(pair_log_probs, cfg=cfg, compute=compute),
        out_shardings=sharding.batch_sharding(mesh),
    )
    references = reference_log_probs(
        functools.partial(log_probs, params),
        global_batches(config, examples, rows, plan.budget, mesh, 0, withhold=0.0),
        rows,
        batch_rows=config.data.batch_rows,
        pairs=len(examples),
        cache=workdir / "reference.npz",
        fingerprint=f"{weights_digest(params)}-{plan.fingerprint()}-{compute.dtype}",
    )
    return examples.with_references(references)


def global_batches(
    config: ConfigDict, examples, rows, budget: Budget, mesh: Mesh, start: int, withhold: float
):
    host = pipeline.HostBatches(
        examples,
        rows,
        budget,
        config.data.batch_rows,
        start,
        withhold=withhold,
        seed=config.seed,
    )
    stream = pipeline.stream(host, threads=config.data.threads, workers=config.data.workers)
    place = sharding.batch_sharding(mesh)
    return (pipeline.to_global(batch, place) for batch in stream)


def claim(workdir: Path, config: ConfigDict) -> None:
    """Writes config.json, or says that the directory belongs to another config."""
    ours = json.loads(config.to_json())
    path = workdir / "config.json"
    if path.exists():
        ours, theirs = _flat(ours), _flat(json.loads(path.read_text()))
        changed = [
            f"{key}: {theirs.get(key)} there, {ours.get(key)} here"
            for key in sorted(theirs | ours)
            if key.split(".")[0] not in NOT_PART_OF_THE_RUN and theirs.get(key) != ours.get(key)
        ]
        if changed:
            raise ValueError(
                f"{workdir} belongs to a run with another config ({'; '.join(changed)}). Choose "
                "another directory with --config.workdir=DIR, or delete it to start again."
            )
        return
    workdir.mkdir(parents=True, exist_ok=True)
    write_json(path, ours)


def _flat(tree: dict, prefix: str = "") -> dict:
    """{"data": {"path": x}} -> {"data.path": x}"""
    flat = {}
    for key, value in tree.items():
        flat |= (
            _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
        )
    return flat


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
        refuse_hopeless(CONFIG.value)
        train(CONFIG.value)
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"saber_jax.main: {error}")


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
