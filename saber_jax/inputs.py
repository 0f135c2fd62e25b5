"""The inputs of a run: records, pairs, the examples that are used, their plan and batches."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Int
from ml_collections import ConfigDict

from saber_jax import sharding
from saber_jax.data import encoded, loader, sizing
from saber_jax.data.held_out import split as held_out_of
from saber_jax.data.pairs import Pair
from saber_jax.data.planning import Plan, PlannedRows, Position
from saber_jax.data.quarantine import Quarantine
from saber_jax.data.sources import Draw, Sources, WeightedSource
from saber_jax.data.steps import StepSize
from saber_jax.data.tasks import Mixture
from saber_jax.data.tokenizer import Tokenizer, load_beside
from saber_jax.runs.console import log
from saber_jax.train import saved
from saber_jax.train.stage import budget


@dataclasses.dataclass(frozen=True)
class RunInputs:
    """What `open_inputs` found. `examples` without the pairs that cannot be used; `fill` as
    `Plan.fill` measures it; `steps` are those of the run."""

    tokenizer: Tokenizer
    provenance: dict[str, Any]
    examples: encoded.Examples
    plan: Plan
    fill: dict[str, float]
    draw: Draw
    held_out: Int[np.ndarray, " H"]
    quarantine: Quarantine
    measured: sizing.Measurements
    thinned: int
    steps: int

    def describe(self) -> str:
        """A console line: number of examples, their sources, and how full rows are."""
        fill = ", ".join(f"{name} {share:.0%}" for name, share in self.fill.items())
        parts = [f"{len(self.draw.usable)} examples an epoch; budgets filled: {fill}"]
        if len(self.draw.names) > 1:
            counts = self.draw.counts(0)
            parts.append("from " + ", ".join(f"{n} of {name}" for name, n in counts.items()))
        if len(self.held_out):
            parts.append(f"{len(self.held_out)} examples are held out for validation")
        if self.thinned:
            parts.append(f"{self.thinned} clips keep fewer frames, so that a row holds them")
        if self.quarantine:
            parts.append(f"{len(self.quarantine)} examples are left out, see quarantine.jsonl")
        return "; ".join(parts)

    def summary(self, steps: int, batch_rows: int) -> dict[str, Any]:
        """The part of summary.json about the data, after `steps` steps."""
        epochs = self.plan.position(steps * batch_rows).epoch
        begun = self.plan.begun(steps * batch_rows) % len(self.examples)
        drawn = np.bincount(self.examples.source_of()[begun], minlength=len(self.draw.names))
        drawn += self.draw.taken(epochs)
        return {
            "examples": len(self.examples),
            "examples_thinned": self.thinned,
            "examples_left_out": len(self.quarantine),
            "examples_held_out": len(self.held_out),
            "epochs_finished": epochs,
            "drawn": dict(zip(self.draw.names, drawn.tolist(), strict=True)),
            "fill": self.fill,
            "unigram_entropy": sizing.unigram_entropy(self.measured.token_counts),
        }

    @property
    def usable(self) -> Int[np.ndarray, " M"]:
        """Examples to train on and held out ones, in order, without those that turned out bad."""
        planned = np.concatenate([self.draw.usable, self.held_out])
        return np.setdiff1d(planned, self.quarantine.indices)

    @property
    def usable_sizes(self) -> Int[np.ndarray, "M D"]:
        """Of every usable example, under the first request."""
        return self.plan.sizes[self.usable]

    def resumed(self, state: dict[str, Any]) -> "RunInputs":
        """Resumes from `GlobalBatches.state`: the same rows, and the same records left out."""
        self.quarantine.recall(state["quarantined"])
        return dataclasses.replace(
            self,
            examples=self.examples.without(self.quarantine.indices),
            plan=self.plan.entered(Position(**state["position"])),
        )

    def batches(
        self,
        config: ConfigDict,
        mesh: Mesh,
        rows: PlannedRows | list[list[int]],
        *,
        first: int = 0,
        withhold: float = 0.0,
    ) -> loader.GlobalBatches:
        """`rows` from step `first` on. Records that turn out bad leave empty segments."""
        place = sharding.batch_sharding(mesh)
        total = sharding.batch_rows(config.data.batch_rows, mesh)
        local = loader.local_rows(total, place)
        stream = loader.stream(
            loader.HostRows(rows, config.data.batch_rows, first, local=local),
            self.examples,
            self.plan.budget,
            threads=config.data.threads,
            workers=config.data.workers,
            withhold=withhold,
            seed=config.seed,
        )
        return loader.GlobalBatches(stream, self.quarantine, place, total)


def open_inputs(config: ConfigDict, workdir: Path, pairs: list[Pair] | None) -> RunInputs:
    """The records that `config` names, or `pairs` of answers to them.

    Prints a warning if config.data.batch_examples is more than there are in an epoch.
    Raises TooManyBadError when more of them cannot be used than config.data.max_bad_fraction, and
    ValueError when a step has no room for config.data.batch_examples of them.
    """
    d, row = config.data, budget(config)
    parts = [WeightedSource.parse(text) for text in d.mixture] or [
        WeightedSource(d.path, d.split, 1.0)
    ]
    sources = Sources.open(parts)
    tokenizer = load_beside(parts[0].path)
    if pairs is None:
        mixture = Mixture(
            d.tasks.to_dict(),
            first_weights=d.first_tasks.to_dict(),
            first_epochs=d.first_epochs,
            wordings=d.wordings,
            alone=d.alone,
            seed=config.seed,
        )
        examples = encoded.Examples(sources, tokenizer, requests=mixture.requests)
    else:
        mixture, examples = None, encoded.Examples(sources, tokenizer, pairs)
    measured = loader.measure(examples, workdir / "sizes.npz", workers=d.workers)
    selection = sizing.select(measured, row)
    quarantine = Quarantine(
        workdir / "quarantine.jsonl",
        total=len(examples),
        limit=d.max_bad_fraction,
        writes=jax.process_index() == 0,
        resumes=bool(saved.steps(workdir)),
    )
    quarantine.add(selection.left_out(row, examples))
    record_of = np.array([examples.record_of(int(i)) for i in selection.usable])
    usable, held_out = held_out_of(
        selection.usable, record_of, config.validate.examples, config.seed
    )
    draw = Draw(usable, examples.source_of()[usable], sources.names, sources.shares, config.seed)
    step = None
    if d.batch_examples:
        step = StepSize(examples=d.batch_examples, rows=d.batch_rows)
        if d.batch_examples > len(usable):
            log(
                f"WARNING: config.data.batch_examples={d.batch_examples} is more than the "
                f"{len(usable)} examples of an epoch: every step takes a whole epoch. Set it to "
                f"{len(usable)} or less, or train on more data."
            )
    steps = steps_of(config, draw, step)
    plan = Plan(selection.sizes, row, config.seed, mixture, draw=draw, step=step)
    # Is there room in every step? A run that has a checkpoint has been asked before.
    if step is not None and not saved.steps(workdir):
        plan.rows(steps * d.batch_rows).plan()
    return RunInputs(
        tokenizer=tokenizer,
        provenance=examples.provenance(usable),
        examples=examples.with_frame_pairs(selection.frame_pairs),
        plan=plan,
        fill=plan.fill(),
        draw=draw,
        held_out=held_out,
        quarantine=quarantine,
        measured=measured,
        thinned=len(selection.thinned),
        steps=steps,
    )


def steps_of(config: ConfigDict, draw: Draw, step: StepSize | None) -> int:
    """config.steps, or those that config.epochs take.

    Raises ValueError where neither says it, or a step is not counted in examples.
    """
    if config.steps is not None:
        return config.steps
    if step is None or not config.epochs:
        raise ValueError(
            f"config.epochs={config.epochs} and config.data.batch_examples="
            f"{config.data.batch_examples} do not say how many steps to train for, because a row "
            "holds as many examples as fit. Set both above 0, or config.steps."
        )
    return sum(step.steps(sum(draw.counts(e).values())) for e in range(config.epochs))
