"""AdamW with warm-up and cosine decay, over the trainable parameters only."""

import dataclasses

import jax
import optax
from jax.sharding import Mesh

from saber_jax import sharding


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """`peak_lr` falls by cosine to `final_fraction` of itself over the run's steps."""

    peak_lr: float
    warmup_steps: int
    final_fraction: float
    b1: float
    b2: float
    weight_decay: float
    clip_norm: float


def schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=config.peak_lr,
        warmup_steps=min(config.warmup_steps, max(steps - 1, 1)),
        decay_steps=max(steps, 2),
        end_value=config.peak_lr * config.final_fraction,
    )


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """Weight decay touches matrices alone; names of biases and norms tell, since stacking over
    layers gives even a bias two axes."""

    def decays(params: dict[str, jax.Array]) -> dict[str, bool]:
        vectors = ("bias", "norm", "b_", "ln_")
        return {
            name: leaf.ndim > 1 and not any(v in name.split("/")[-1] for v in vectors)
            for name, leaf in params.items()
        }

    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(
            schedule(config, steps),
            b1=config.b1,
            b2=config.b2,
            weight_decay=config.weight_decay,
            mask=decays,
        ),
    )


def optimizer_shardings(
    tx: optax.GradientTransformation, trainable: dict, shardings: dict, mesh: Mesh
) -> optax.OptState:
    """Moments like their parameters. Left to itself jit(tx.init) replicates them: 8 bytes a
    parameter on every chip."""
    return optax.tree_map_params(
        tx,
        lambda _, sharding_: sharding_,
        jax.eval_shape(tx.init, trainable),
        shardings,
        transform_non_params=lambda _: sharding.replicated(mesh),
    )
