"""The train steps: `sft_step` and `cadpo_step` are what runs, whole.

Pure functions of a state and a batch; the caller jits them, donating the state.
"""

import dataclasses
import fnmatch
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from saber_jax import sharding
from saber_jax.data.records import FIELDS
from saber_jax.models import saber
from saber_jax.models.config import SaberConfig
from saber_jax.models.kernels import Kernel
from saber_jax.models.remat import Remat
from saber_jax.train import losses

Batch = dict[str, Array]
Metrics = dict[str, Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Parameters are split by `partition`: only `trainable` has gradients and optimizer state."""

    step: Int[Array, ""]
    trainable: dict[str, Array]  # "text/blocks/attn/w_q" -> float32 master
    frozen: dict[str, Array]
    opt_state: optax.OptState

    @property
    def params(self) -> dict:
        return merge(self.trainable, self.frozen)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compute:
    """How a forward pass is computed, whatever the loss.

    `head_chunk` targets at a time go through the vocabulary projection, so that logits of a whole
    row never exist; `frame_patches` bounds the patches of one frame pair, which is what lets the
    vision tower's attention stay local; `response` is the budget's. With a `mesh`, rows and weights
    are spread over it by hand, see models/shards.py; without one XLA partitions everything.
    """

    dtype: str
    remat: Remat
    head_chunk: int
    frame_patches: int
    kernel: Kernel = "xla"
    response: int = 0
    mesh: Mesh | None = None


def flatten(params: dict) -> dict[str, Array]:
    """{"text": {"norm": x}} -> {"text/norm": x}"""
    leaves, _ = jax.tree_util.tree_flatten_with_path(params)
    return {"/".join(key.key for key in path): leaf for path, leaf in leaves}


def merge(*parts: dict[str, Array]) -> dict:
    """Inverse of `flatten`, over the union of `parts`."""
    tree: dict = {}
    for name, leaf in (item for part in parts for item in part.items()):
        *parents, last = name.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return tree


def partition(params: dict, patterns: tuple[str, ...]) -> tuple[dict[str, Array], dict[str, Array]]:
    """Splits by shell patterns over the flattened names: ("text/*", "vision/merger/*").

    Raises ValueError naming a pattern that matches nothing: a typo would freeze a tower silently.
    """
    flat = flatten(params)
    for pattern in patterns:
        if not fnmatch.filter(flat, pattern):
            towers = sorted({name.split("/")[0] for name in flat})
            raise ValueError(
                f"config.trainable pattern {pattern!r} matches no parameter. Names look like "
                f"{next(iter(flat))!r}; the towers are {towers}."
            )
    chosen = {name for pattern in patterns for name in fnmatch.filter(flat, pattern)}
    trainable = {name: leaf for name, leaf in flat.items() if name in chosen}
    return trainable, {name: leaf for name, leaf in flat.items() if name not in chosen}


def target_log_probs(
    params: dict, batch: Batch, cfg: SaberConfig, compute: Compute
) -> Float[Array, "B T"]:
    """log pi(target | everything its slot sees), float32; 0 for padding targets."""
    rows = functools.partial(_rows_log_probs, cfg=cfg, compute=compute)
    if compute.mesh is None:
        return rows(params, batch)
    return jax.shard_map(
        rows,
        mesh=compute.mesh,
        in_specs=(saber.specs(params, cfg, compute.mesh), sharding.BATCH_SPEC),
        out_specs=sharding.BATCH_SPEC,
        check_vma=False,
    )(params, batch)


def _rows_log_probs(
    params: dict, batch: Batch, cfg: SaberConfig, compute: Compute
) -> Float[Array, "B T"]:
    dtype = jnp.dtype(compute.dtype)
    hidden = saber.hidden(
        params,
        batch,
        cfg,
        dtype=dtype,
        remat=compute.remat,
        max_frame_patches=compute.frame_patches,
        kernel=compute.kernel,
        response=compute.response,
        mesh=compute.mesh,
    )
    hidden = jnp.take_along_axis(hidden, batch["target_source"][..., None], axis=1)
    rows, targets = batch["target_tokens"].shape
    chunk = compute.head_chunk
    if targets % chunk:
        raise ValueError(f"config.data.targets={targets} must be a multiple of head_chunk={chunk}.")

    @jax.checkpoint
    def chunk_log_probs(_, xs):
        hidden, tokens = xs
        logits = jnp.einsum("BCD,DV->BCV", hidden, head, preferred_element_type=jnp.float32)
        picked = jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]
        return None, picked - jax.nn.logsumexp(logits, axis=-1)

    def split(x):
        return jnp.moveaxis(x.reshape(rows, targets // chunk, chunk, *x.shape[2:]), 1, 0)

    with jax.named_scope("head"):
        head = saber.head(params, cfg, dtype=dtype, mesh=compute.mesh)
        xs = (split(hidden), split(batch["target_tokens"]))
        _, log_probs = jax.lax.scan(chunk_log_probs, None, xs)
        log_probs = jnp.moveaxis(log_probs, 0, 1).reshape(rows, targets)
    return jnp.where(batch["target_weights"] > 0, log_probs, 0.0)


def sft_objective(params: dict, batch: Batch, cfg: SaberConfig, compute: Compute):
    """Stage 1, SED: negative log-likelihood of the six sections."""
    log_probs = target_log_probs(params, batch, cfg, compute)
    loss, metrics = losses.sft_loss(log_probs, batch["target_weights"])
    sections = losses.section_nll(
        log_probs, batch["target_weights"], batch["target_section"], len(FIELDS)
    )
    return loss, metrics | {f"nll/{field}": sections[i] for i, field in enumerate(FIELDS)}


def pair_log_probs(
    params: dict, batch: Batch, cfg: SaberConfig, compute: Compute
) -> tuple[Float[Array, "B P"], Float[Array, "B P"]]:
    """log pi(chosen), log pi(rejected) of every pair: also what the reference cache holds."""
    log_probs = target_log_probs(params, batch, cfg, compute)
    pairs = batch["pair_valid"].shape[1]
    return losses.response_log_probs(
        log_probs, batch["target_segment"], batch["target_branch"], pairs
    )


def cadpo_objective(params: dict, batch: Batch, cfg: SaberConfig, compute: Compute, *, beta: float):
    """Stage 2, CA-DPO, against reference log-probs that travel with the batch."""
    chosen, rejected = pair_log_probs(params, batch, cfg, compute)
    return losses.cadpo_loss(
        chosen,
        rejected,
        batch["reference_chosen"],
        batch["reference_rejected"],
        batch["pair_valid"],
        beta=beta,
    )


def sft_step(
    state: TrainState,
    batch: Batch,
    *,
    cfg: SaberConfig,
    compute: Compute,
    tx: optax.GradientTransformation,
) -> tuple[TrainState, Metrics]:
    """One optimizer step of stage 1."""
    return _update(state, lambda params: sft_objective(params, batch, cfg, compute), tx)


def cadpo_step(
    state: TrainState,
    batch: Batch,
    *,
    cfg: SaberConfig,
    compute: Compute,
    tx: optax.GradientTransformation,
    beta: float,
) -> tuple[TrainState, Metrics]:
    """One optimizer step of stage 2."""
    return _update(
        state, lambda params: cadpo_objective(params, batch, cfg, compute, beta=beta), tx
    )


def _update(
    state: TrainState, objective: Callable, tx: optax.GradientTransformation
) -> tuple[TrainState, Metrics]:
    def loss_fn(trainable):
        return objective(merge(trainable, state.frozen))

    (_, metrics), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.trainable)
    with jax.named_scope("optimizer"):
        updates, opt_state = tx.update(grads, state.opt_state, state.trainable)
        trainable = optax.apply_updates(state.trainable, updates)
    metrics |= {"grad_norm": optax.global_norm(grads), "update_norm": optax.global_norm(updates)}
    return TrainState(state.step + 1, trainable, state.frozen, opt_state), metrics
