"""The objectives of both stages, as sums that can be added up over microbatches.

An objective maps (parameters, batch) to a loss sum, the weight to divide it by, and the weighted
sums of metrics.

Axis letters: B rows, L slots, T targets of a row, P pairs of a row.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float

from saber_jax import sharding
from saber_jax.batch import Batch, Branch
from saber_jax.data.conflicts import CONFLICT_TYPES
from saber_jax.data.records import FIELDS
from saber_jax.data.withhold import GREY, MODALITIES, SILENT_MEL, VIEWS, Modality, View
from saber_jax.models import saber, sequence
from saber_jax.models.config import SaberConfig
from saber_jax.models.kernels import Kernel
from saber_jax.models.remat import Remat
from saber_jax.train import head, losses
from saber_jax.train.losses import WeightedSums, masked_sum, of_pair
from saber_jax.train.microbatches import scored
from saber_jax.train.preference import ChosenRejected, PairData, Preference, cadpo_loss

EVIDENCE = {
    "visual": ("video_desc", "facial_exp_desc", "body_lang_desc"),
    "acoustic": ("acoustic_feat", "speech_content"),
    "reasoning": ("sentiment_analysis",),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compute:
    """How a forward pass is computed, independent of the loss.

    A step accumulates the gradients of `microbatches` equal parts of the batch. The vocabulary
    projection takes at most `head_chunk` targets at a time, and with `head_keep` their derivatives
    are kept for the backward pass, see head.py. `frame_patches` is an upper bound of the patches of
    a frame pair, which allows local attention in the vision tower. `response` is that of the
    budget. With a `mesh`, rows and weights are sharded explicitly, see models/shards.py; without
    one, XLA partitions everything. With `one_vector`, for a mesh whose devices have all weights,
    gradients are summed over devices as one vector: CPUs sum one array after the other.
    """

    dtype: str
    remat: Remat
    head_chunk: int
    frame_patches: int
    head_keep: bool = False
    kernel: Kernel = "xla"
    response: int = 0
    microbatches: int = 1
    mesh: Mesh | None = None
    one_vector: bool = False

    def chunk_of(self, targets: int) -> int:
        """The largest size, of at most `head_chunk`, of which a whole number makes `targets`."""
        sizes = range(min(self.head_chunk, targets), 0, -1)
        return next(size for size in sizes if targets % size == 0)


# From a batch to the log-probs of its targets, in order of computation: hidden states of every
# slot, those that predict targets, the vocabulary projection, log-probs. `_log_probs` and similar
# functions are written for the rows of one device, or for its share of them along the mesh's
# sequence axis; `_on_each_device` maps them over the mesh.
OF_TARGETS = PartitionSpec(sharding.BATCH_AXES, sharding.BATCH_RULES["targets"])
OF_DEVICES = PartitionSpec((*sharding.BATCH_AXES, sharding.SEQUENCE))


def target_log_probs(
    params: dict, batch: Batch, cfg: SaberConfig, compute: Compute
) -> Float[Array, "B T"]:
    """log pi(target | everything its slot attends to), float32; 0 for padding targets."""
    return _on_each_device(_log_probs, params, batch, cfg, compute)


def target_nll(
    params: dict, batch: Batch, cfg: SaberConfig, compute: Compute
) -> tuple[Float[Array, ""], Float[Array, "B T"]]:
    """(weighted sum of the targets' -log pi, `target_log_probs` without a gradient)."""
    if compute.head_keep:
        values = target_log_probs(params, batch, cfg, compute)
        return -(values * batch.targets.weights).sum(), values
    totals, values = _on_each_device(
        _weighted_nll, params, batch, cfg, compute, out_specs=(OF_DEVICES, OF_TARGETS)
    )
    return totals.sum(), values


def target_entropies(
    params: dict, batch: Batch, cfg: SaberConfig, compute: Compute
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """`target_log_probs`, and the entropy of the predicted distribution at each target."""
    values = _on_each_device(_log_probs_and_entropies, params, batch, cfg, compute)
    return values[..., 0], values[..., 1]


def _on_each_device(
    function: Callable,
    params: dict,
    batch: Batch,
    cfg: SaberConfig,
    compute: Compute,
    out_specs: Any = OF_TARGETS,
) -> Any:
    """`function(params, rows, cfg, compute)` for all rows.

    With a mesh, every device runs it on its part of the batch and its shards of the parameters
    (shard_map), and `out_specs` say how the results are put together.
    """
    if compute.mesh is None:
        return function(params, batch, cfg, compute)
    given, restore, specs = params, lambda x: x, saber.specs(params, cfg, compute.mesh)
    if compute.one_vector:
        # Of a copy for each device, the gradient is each device's part of the sum.
        vector, unravel = ravel_pytree(params)
        given = jnp.broadcast_to(vector, (compute.mesh.size, vector.size))
        restore, specs = lambda mine: unravel(mine[0]), PartitionSpec(sharding.BATCH_AXES)
    return jax.shard_map(
        lambda given, rows: function(restore(given), rows, cfg, compute),
        mesh=compute.mesh,
        in_specs=(specs, sharding.batch_specs(batch)),
        out_specs=out_specs,
        check_vma=False,
    )(given, batch)


def _log_probs(
    params: dict, rows: Batch, cfg: SaberConfig, compute: Compute
) -> Float[Array, "B T"]:
    states, targets = _target_states(params, rows, cfg, compute), rows.targets
    with jax.named_scope("head"):
        values = head.log_probs(
            states,
            _projection(params, cfg, compute),
            targets.tokens,
            vocab=cfg.text.vocab,
            chunk=compute.chunk_of(targets.tokens.shape[1]),
            keep=compute.head_keep,
        )
        return jnp.where(targets.weights > 0, values, 0.0)


def _weighted_nll(
    params: dict, rows: Batch, cfg: SaberConfig, compute: Compute
) -> tuple[Float[Array, " 1"], Float[Array, "B T"]]:
    states, targets = _target_states(params, rows, cfg, compute), rows.targets
    with jax.named_scope("head"):
        total, values = head.weighted_nll(
            states,
            _projection(params, cfg, compute),
            targets.tokens,
            targets.weights,
            vocab=cfg.text.vocab,
            chunk=compute.chunk_of(targets.tokens.shape[1]),
        )
        return total, jnp.where(targets.weights > 0, values, 0.0)


def _log_probs_and_entropies(
    params: dict, rows: Batch, cfg: SaberConfig, compute: Compute
) -> Float[Array, "B T 2"]:
    states, targets = _target_states(params, rows, cfg, compute), rows.targets
    with jax.named_scope("head"):
        values = head.over_chunks(
            head.log_prob_and_entropy,
            states,
            _projection(params, cfg, compute),
            targets.tokens,
            vocab=cfg.text.vocab,
            chunk=compute.chunk_of(targets.tokens.shape[1]),
        )
        return jnp.where(targets.weights[..., None] > 0, values, 0.0)


def _target_states(
    params: dict, rows: Batch, cfg: SaberConfig, compute: Compute
) -> Float[Array, "B T D"]:
    """The hidden state that predicts each target."""
    hidden = saber.hidden(
        params,
        rows,
        cfg,
        dtype=jnp.dtype(compute.dtype),
        remat=compute.remat,
        max_frame_patches=compute.frame_patches,
        kernel=compute.kernel,
        response=compute.response,
        mesh=compute.mesh,
    )
    return sequence.at_sources(hidden, rows.targets.source, sharding.sequence_axis(compute.mesh))


def _projection(params: dict, cfg: SaberConfig, compute: Compute) -> Float[Array, "D W"]:
    return saber.head(params, cfg, dtype=jnp.dtype(compute.dtype), mesh=compute.mesh)


def sft_objective(
    params: dict, batch: Batch, cfg: SaberConfig, compute: Compute
) -> tuple[Array, Array, WeightedSums]:
    """Stage 1, SED: negative log-likelihood of the six sections, per target token.

    The sum is divided by the weight of the whole batch, not by row, so the loss does not depend on
    packing or on the number of microbatches.
    """
    loss, log_probs = target_nll(params, batch, cfg, compute)
    weights = batch.targets.weights
    nll, counts = losses.section_nll(log_probs, weights, batch.targets.section, len(FIELDS))
    sections = {f"nll/{field}": (nll[i], counts[i]) for i, field in enumerate(FIELDS)}
    return loss, weights.sum(), sections


def withheld(batch: Batch, view: View) -> Batch:
    """The batch with silence for its sound, mid-grey for its frames, or both, like data/withhold.py
    does for records. Lengths and sizes, and therefore all positions, are unchanged."""
    audio, vision = batch.audio, batch.vision
    if view in ("audio", "both"):
        audio = dataclasses.replace(audio, mel=jnp.full_like(audio.mel, SILENT_MEL))
    if view in ("video", "both"):
        vision = dataclasses.replace(vision, patches=jnp.full_like(vision.patches, GREY))
    return dataclasses.replace(batch, audio=audio, vision=vision)


def reference_log_probs(
    params: dict, batch: Batch, cfg: SaberConfig, compute: Compute, view: View
) -> Float[Array, "B T"]:
    """The contents of the reference cache: `target_log_probs` with `view` withheld."""
    return batch_log_probs(params, withheld(batch, view), cfg, compute)


def batch_log_probs(
    params: dict, batch: Batch, cfg: SaberConfig, compute: Compute
) -> Float[Array, "B T"]:
    """`target_log_probs` without a gradient, microbatch by microbatch."""
    return scored(
        lambda part: target_log_probs(params, part, cfg, compute), batch, compute.microbatches
    )


def without_rejected(batch: Batch, compute: Compute) -> tuple[Batch, Compute]:
    """The batch without the region and the targets of rejected responses, to score only the chosen
    ones. Its rows are plain causal ones."""
    kept = slice(0, -compute.response)
    text = jax.tree.map(lambda of_slots: of_slots[..., kept], batch.text)
    weights = jnp.where(batch.targets.branch == Branch.REJECTED, 0.0, batch.targets.weights)
    targets = dataclasses.replace(batch.targets, weights=weights)
    batch = dataclasses.replace(batch, text=text, targets=targets)
    return batch, dataclasses.replace(compute, response=0)


def cadpo_objective(
    params: dict, batch: Batch, cfg: SaberConfig, compute: Compute, options: Preference
) -> tuple[Array, Array, WeightedSums]:
    """Stage 2, CA-DPO, summed over pairs, with the reference log-probs from the batch."""
    log_probs = target_log_probs(params, batch, cfg, compute)
    score = functools.partial(pair_scores, batch, length_alpha=options.length_alpha)
    policy: dict[View, ChosenRejected] = {"whole": score(log_probs)}
    for modality in options.policy_views:
        policy[modality] = score(_without(modality, params, batch, cfg, compute, options))
    reference: dict[View, ChosenRejected] = {
        view: score(batch.targets.reference[:, VIEWS.index(view)])
        for view in options.reference_views
    }
    pairs = PairData(
        kappa=batch.pairs.kappa,
        ignored=batch.pairs.ignored,
        lengths=response_lengths(batch),
        chosen_nll=-pair_scores(batch, log_probs).chosen,
    )
    loss, terms = cadpo_loss(policy, reference, pairs, options)
    valid = batch.pairs.valid
    total, count = masked_sum(loss, valid)
    sums = {f"loss/{name}": masked_sum(term, valid) for name, term in terms.items()}
    sums |= reward_metrics(policy["whole"], reference["whole"], batch, options.beta)
    sums |= section_margins(log_probs, batch, options)
    return total, count, sums


def _without(
    modality: Modality,
    params: dict,
    batch: Batch,
    cfg: SaberConfig,
    compute: Compute,
    options: Preference,
) -> Float[Array, "B T"]:
    """log pi of the targets that the terms of `modality` use, with gradients only where needed."""
    batch = withheld(batch, modality)
    if not options.decoupled:
        batch, compute = without_rejected(batch, compute)
    if modality not in options.conditional:
        params = jax.lax.stop_gradient(params)
    return target_log_probs(params, batch, cfg, compute)


def response_lengths(batch: Batch) -> ChosenRejected:
    """Tokens of each response, the end token included."""
    return pair_scores(batch, batch.targets.weights)


def pair_scores(
    batch: Batch, values: Float[Array, "B T"], *, length_alpha: float = 1.0
) -> ChosenRejected:
    """Sums of the targets' log-probabilities over each response, weighted by LD-DPO's alpha."""
    segments, branch = batch.targets.segment, batch.targets.branch
    values = jnp.where(batch.targets.weights > 0, values, 0.0)
    if length_alpha != 1:
        lengths = response_lengths(batch)
        common = jnp.minimum(lengths.chosen, lengths.rejected)
        values *= losses.length_weights(
            batch.targets.index, of_pair(common, segments), alpha=length_alpha
        )
    pairs = batch.pairs.valid.shape[1]
    chosen, rejected = losses.response_sums(values, segments, branch, pairs)
    return ChosenRejected(chosen=chosen, rejected=rejected)


def reward_metrics(
    policy: ChosenRejected, reference: ChosenRejected, batch: Batch, beta: float
) -> WeightedSums:
    """Metrics of rewards, which are beta rho. Margins and accuracies are also given by conflict
    type; `consistent` is the type "none"."""
    rho = policy - reference
    margin = beta * rho.difference
    right = (margin > 0).astype(margin.dtype)
    valid, conflict = batch.pairs.valid, batch.pairs.conflict
    values = {
        "rewards/chosen": beta * rho.chosen,
        "rewards/rejected": beta * rho.rejected,
        "rewards/margins": margin,
        "rewards/accuracies": right,
        "logps/chosen": policy.chosen,
        "logps/rejected": policy.rejected,
    }
    sums = {name: masked_sum(value, valid) for name, value in values.items()}
    for i, name in enumerate(CONFLICT_TYPES):
        sums[f"margins/{name}"] = masked_sum(margin, valid & (conflict == i))
    for name, group in (("consistent", conflict == 0), ("inconsistent", conflict > 0)):
        sums[f"margins/{name}"] = masked_sum(margin, valid & group)
        sums[f"accuracies/{name}"] = masked_sum(right, valid & group)
    return sums


def section_margins(
    log_probs: Float[Array, "B T"], batch: Batch, options: Preference
) -> WeightedSums:
    """The contribution of each kind of evidence to the margin, and the distance from the reference
    over the tokens of each response, see `losses.ratio_kl`.

    The contributions add up to `rewards/margins` of pairs whose answers have headings; an answer
    without any is in no section and contributes to none.
    """
    valid, branch = batch.pairs.valid, batch.targets.branch
    reference = batch.targets.reference[:, VIEWS.index("whole")]
    sums: WeightedSums = {}
    for name, fields in EVIDENCE.items():
        inside = functools.reduce(
            jnp.logical_or, (batch.targets.section == FIELDS.index(f) + 1 for f in fields)
        )
        rho = jnp.where(inside, log_probs - reference, 0.0)
        part = pair_scores(batch, rho, length_alpha=options.length_alpha)
        sums[f"margins/{name}"] = masked_sum(options.beta * part.difference, valid)
    real = batch.targets.weights > 0
    for name, other in (("chosen", Branch.REJECTED), ("rejected", Branch.CHOSEN)):
        sums[f"kl/{name}"] = losses.ratio_kl(log_probs, reference, real & (branch != other))
    return sums


def cadpo_probe(params: dict, batch: Batch, cfg: SaberConfig, compute: Compute) -> dict[str, Array]:
    """Metrics that cost three forward passes, computed every `config.metrics_every` steps.

    `entropy`, nats per target token; `sensitivity/MODALITY`, log pi(y_w|c) - log pi(y_w|c~m) in
    nats per chosen response: how much less likely the right answer is without that modality. Near
    zero means that the model does not use it.
    """
    log_probs, entropy = scored(
        lambda part: target_entropies(params, part, cfg, compute), batch, compute.microbatches
    )
    valid = batch.pairs.valid
    chosen = pair_scores(batch, log_probs).chosen
    sums: WeightedSums = {"entropy": masked_sum(entropy, batch.targets.weights > 0)}
    for modality in MODALITIES:
        rows, chosen_only = without_rejected(withheld(batch, modality), compute)
        blind = batch_log_probs(params, rows, cfg, chosen_only)
        drop = chosen - pair_scores(batch, blind).chosen
        sums[f"sensitivity/{modality}"] = masked_sum(drop, valid)
    return losses.means(sums)
