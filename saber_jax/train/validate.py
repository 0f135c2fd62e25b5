"""Validation on held-out examples, which are in no training row.

Stage 1 measures the loss of every section. Stage 2 measures the loss of the chosen answers, and how
often the chosen answer is preferred, compared with the rule "the longer answer is the chosen one".
A model that is no better than this rule may have learnt only lengths.

Sums and one line of numbers per pair are fetched, so the metrics do not depend on the number of
hosts and devices, up to the order of floating-point sums.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from saber_jax.batch import Batch, Branch
from saber_jax.data.loader import GlobalBatches
from saber_jax.data.records import FIELDS
from saber_jax.data.withhold import VIEWS
from saber_jax.models.config import SaberConfig
from saber_jax.runs.console import log
from saber_jax.train import losses
from saber_jax.train.objectives import (
    Compute,
    batch_log_probs,
    pair_scores,
    response_lengths,
)

PREFIX = "validate/"
SECTION_METRICS = ("nll", *(f"nll/{field}" for field in FIELDS))
PAIR_METRICS = ("accuracy", "length_balanced_accuracy", "margin", "loss", "displacement")
"""What training can improve: without `pairs` and `longer_wins`, which are facts about the data."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchSums:
    """Sums of one batch: -log pi and number of targets of each section, the number of examples that
    could not be read, and for stage 2 the table of pairs for `pair_metrics`."""

    nll: Float[Array, " F"]
    tokens: Float[Array, " F"]
    left_out: Int[Array, ""]
    pairs: "PairTable | None" = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class PairTable:
    """Columns with one number per pair: log pi and number of tokens of each answer; `valid` is 0
    for padding."""

    chosen: Float[Array, "B P"]
    rejected: Float[Array, "B P"]
    reference_chosen: Float[Array, "B P"]
    reference_rejected: Float[Array, "B P"]
    chosen_tokens: Float[Array, "B P"]
    rejected_tokens: Float[Array, "B P"]
    valid: Float[Array, "B P"]


def measure_sections(params: dict, batch: Batch, cfg: SaberConfig, compute: Compute) -> BatchSums:
    """Stage 1: the loss of each section."""
    log_probs = batch_log_probs(params, batch, cfg, compute)
    return _sections(log_probs, batch.targets.weights, batch)


def measure_pairs(params: dict, batch: Batch, cfg: SaberConfig, compute: Compute) -> BatchSums:
    """Stage 2: the loss of each section of the chosen answers, and both answers of every pair."""
    log_probs = batch_log_probs(params, batch, cfg, compute)
    policy = pair_scores(batch, log_probs)
    reference = pair_scores(batch, batch.targets.reference[:, VIEWS.index("whole")])
    lengths = response_lengths(batch)
    table = PairTable(
        chosen=policy.chosen,
        rejected=policy.rejected,
        reference_chosen=reference.chosen,
        reference_rejected=reference.rejected,
        chosen_tokens=lengths.chosen,
        rejected_tokens=lengths.rejected,
        valid=batch.pairs.valid.astype(jnp.float32),
    )
    weights = jnp.where(batch.targets.branch == Branch.REJECTED, 0.0, batch.targets.weights)
    return dataclasses.replace(_sections(log_probs, weights, batch), pairs=table)


def _sections(
    log_probs: Float[Array, "B T"], weights: Float[Array, "B T"], batch: Batch
) -> BatchSums:
    nll, tokens = losses.section_nll(log_probs, weights, batch.targets.section, len(FIELDS))
    return BatchSums(nll=nll, tokens=tokens, left_out=batch.left_out.sum())


def metrics(found: Sequence[BatchSums], beta: float) -> dict[str, float]:
    """Metrics of all batches; `found` has NumPy arrays. Means over no elements are left out."""
    nll, tokens = (
        np.stack([getattr(m, name) for m in found]).astype(np.float64).sum(0)
        for name in ("nll", "tokens")
    )
    values = {f"nll/{field}": nll[i] / tokens[i] for i, field in enumerate(FIELDS) if tokens[i]}
    if tokens.sum():
        values["nll"] = nll.sum() / tokens.sum()
    if left_out := sum(int(m.left_out) for m in found):
        values["left_out"] = left_out
    tables = [m.pairs for m in found if m.pairs is not None]
    if tables:
        values |= pair_metrics(_joined(tables), beta)
    return {PREFIX + name: float(value) for name, value in values.items()}


def _joined(tables: Sequence[PairTable]) -> dict[str, Float[np.ndarray, " N"]]:
    """The columns of all valid pairs."""
    names = [field.name for field in dataclasses.fields(PairTable)]
    columns = {
        name: np.concatenate([np.ravel(np.asarray(getattr(t, name), np.float64)) for t in tables])
        for name in names
    }
    real = columns.pop("valid") > 0
    return {name: column[real] for name, column in columns.items()}


def pair_metrics(pairs: dict[str, Float[np.ndarray, " N"]], beta: float) -> dict[str, float]:
    """Metrics of stage 2 from the columns of PairTable.

    `length_balanced_accuracy` is the mean of the accuracies over pairs whose chosen answer is
    longer and over pairs whose chosen answer is shorter, so that length alone gives 0.5; it is left
    out if there are none of one kind. `longer_wins` is the accuracy of the rule "the longer answer
    is the chosen one", with ties counted as half. `displacement` is the change of log pi of the
    chosen answers, in nats per token.
    """
    if not len(pairs["chosen"]):
        return {}
    change = pairs["chosen"] - pairs["reference_chosen"]
    margin = beta * (change - (pairs["rejected"] - pairs["reference_rejected"]))
    right = np.where(margin == 0, 0.5, margin > 0)  # The reference itself prefers neither.
    longer = np.sign(pairs["chosen_tokens"] - pairs["rejected_tokens"])
    values = {
        "pairs": float(len(margin)),
        "accuracy": right.mean(),
        "margin": margin.mean(),
        "loss": np.logaddexp(0, -margin).mean(),
        "longer_wins": (0.5 + 0.5 * longer).mean(),
        "displacement": (change / pairs["chosen_tokens"]).mean(),
    }
    if (longer > 0).any() and (longer < 0).any():
        by_length = [right[longer > 0].mean(), right[longer < 0].mean()]
        values["length_balanced_accuracy"] = sum(by_length) / 2
    return {name: float(value) for name, value in values.items()}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Validation:
    """Runs validation every `every` steps, before the first and after the last.

    `batches` returns a new iterator over its batches, `measure` is a jitted Stage method.
    `warn_displacement` is in nats per token, 0 for no warning.
    """

    batches: Callable[[], GlobalBatches]
    measure: Callable[[Any, Batch], BatchSums]
    every: int
    steps: int
    beta: float = 0.0
    warn_displacement: float = 0.0

    def due(self, step: int) -> bool:
        """Whether to run after `step` steps."""
        return step % self.every == 0 or step == self.steps

    def run(self, state: Any, step: int, stop: Callable[[], bool]) -> dict[str, float] | None:
        """The metrics of these weights; warnings about them are printed. None if `stop` says so
        after a batch.

        Examples that could not be read are listed. Raises TooManyBadError if there are too many.
        """
        batches, found = self.batches(), []
        for batch in batches:
            found.append(jax.device_get(self.measure(state, batch)))
            if stop():
                return None
        values = metrics(found, self.beta)
        if PREFIX + "left_out" in values:  # In every process, because the sums are over all.
            batches.agree()
        log(f"validation at step {step}: {_line(values)}")
        for warning in self.warnings(values, step):
            log(f"warning: {warning}")
        return values

    def warnings(self, values: dict[str, float], step: int) -> list[str]:
        """Warnings about pair metrics; none before training."""
        if not step or PREFIX + "accuracy" not in values:
            return []
        found = []
        accuracy, longer = values[PREFIX + "accuracy"], values[PREFIX + "longer_wins"]
        if accuracy <= longer:
            found.append(
                f"on {values[PREFIX + 'pairs']:.0f} held-out pairs the model prefers the chosen "
                f"answer in {accuracy:.1%}, and the rule `the longer answer is chosen` in "
                f"{longer:.1%}: it has not learnt more than lengths. Train longer, mine pairs of "
                "balanced lengths, or lower config.loss.length_alpha."
            )
        fall = -values[PREFIX + "displacement"]
        if self.warn_displacement and fall > self.warn_displacement:
            found.append(
                f"log pi of the chosen answers fell by {fall:.2f} nats a token, more than "
                f"config.loss.warn_displacement={self.warn_displacement:g}: the model makes "
                "both answers less likely. config.loss.sft and config.loss.anchor hold the chosen "
                "one up; a lower config.optimizer.peak_lr or a higher config.loss.beta slow it."
            )
        return found


def _line(values: dict[str, float]) -> str:
    shown = ("nll", "accuracy", "length_balanced_accuracy", "longer_wins", "margin")
    parts = [f"{n} {values[PREFIX + n]:.3f}" for n in shown if PREFIX + n in values]
    if left_out := values.get(PREFIX + "left_out"):
        parts.append(f"{left_out:.0f} left_out")
    return "  ".join(part.replace("_", " ") for part in parts) or "nothing to measure"
