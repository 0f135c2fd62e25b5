"""AdamW with warm-up and cosine decay, over the trainable parameters only.

Vocabulary first: a network with random weights first learns token frequencies. That gradient is the
same for every example, and Adam turns it into a large constant direction in every matrix, which
dominates the signal from the clips. If at first only the embeddings, the final norm and the output
projection train, they learn the frequencies and fixed phrases, and the remaining loss, when the
other weights start to train, is about the differences between clips.
"""

import dataclasses
from collections.abc import Iterable, Mapping

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from saber_jax import sharding
from saber_jax.models.parameters import Kind, Role

MU_DTYPES = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """The learning rate decays by cosine from `peak_lr` to `final_fraction` of it.

    For the first `vocabulary_steps` steps only the vocabulary parameters (by their role) train, at
    `peak_lr`. The warm-up of all others starts after that. Adapters have `adapter_factor` times the
    learning rate of the others; 10 is the value of https://thinkingmachines.ai/blog/lora and of the
    measurements in docs/huggingface.md. Adam's first moment is kept in `mu_dtype`; an update is
    computed in float32 before its moment is rounded.
    """

    peak_lr: float
    adapter_factor: float
    vocabulary_steps: int
    warmup_steps: int
    final_fraction: float
    b1: float
    b2: float
    weight_decay: float
    clip_norm: float
    mu_dtype: str = "float32"

    def __post_init__(self):
        if self.mu_dtype not in MU_DTYPES:
            raise ValueError(
                "config.optimizer.mu_dtype, the dtype of Adam's first moment, must be one of "
                f"{', '.join(MU_DTYPES)}; got {self.mu_dtype!r}."
            )


Roles = Mapping[str, Role]
"""The role of every parameter by flattened name: `saber.roles`, flattened."""


def check_vocabulary(config: OptimizerConfig, trainable: Iterable[str], roles: Roles) -> None:
    """Raises ValueError if no parameter would train for the first `vocabulary_steps` steps."""
    vocabulary = [name for name, role in roles.items() if role.vocabulary]
    if config.vocabulary_steps and not set(vocabulary) & set(trainable):
        raise ValueError(
            f"config.optimizer.vocabulary_steps={config.vocabulary_steps} would train nothing for "
            f"that many steps: none of {', '.join(vocabulary)} trains here. Set it to 0, or name "
            "one of them in config.trainable or, with LoRA, in config.lora.trainable."
        )


def schedules(config: OptimizerConfig, steps: int) -> dict[str, optax.Schedule]:
    """Learning rate schedules of the groups "vocabulary", "adapters" and "rest"."""
    first = min(config.vocabulary_steps, steps)
    remaining = max(steps - first, 2)
    rest = optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=config.peak_lr,
        warmup_steps=min(config.warmup_steps, remaining - 1),
        decay_steps=remaining,
        end_value=config.peak_lr * config.final_fraction,
    )
    vocabulary = rest
    if first:
        decay = optax.cosine_decay_schedule(config.peak_lr, remaining, config.final_fraction)
        constant = optax.constant_schedule
        vocabulary = optax.join_schedules([constant(config.peak_lr), decay], [first])
        rest = optax.join_schedules([constant(0.0), rest], [first])

    def adapters(count):
        return config.adapter_factor * rest(count)

    return {"vocabulary": vocabulary, "adapters": adapters, "rest": rest}


def _group(role: Role) -> str:
    if role.kind is Kind.ADAPTER:
        return "adapters"
    return "vocabulary" if role.vocabulary else "rest"


def make_optimizer(
    config: OptimizerConfig, steps: int, roles: Roles
) -> optax.GradientTransformation:
    """AdamW. Only matrices and embeddings decay, see parameters.Kind.decays."""

    def decays(params: dict[str, jax.Array]) -> dict[str, bool]:
        return {name: roles[name].kind.decays for name in params}

    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.scale_by_adam(b1=config.b1, b2=config.b2, mu_dtype=config.mu_dtype),
        optax.add_decayed_weights(config.weight_decay, mask=decays),
        _learning_rates(schedules(config, steps), roles),
    )


def _learning_rates(rates: dict[str, optax.Schedule], roles: Roles) -> optax.GradientTransformation:
    def init(params):
        del params
        return optax.ScaleByScheduleState(count=jnp.zeros((), jnp.int32))

    def update(updates, state, params=None):
        del params
        now = {group: jnp.asarray(rate(state.count)) for group, rate in rates.items()}
        scaled = {name: -now[_group(roles[name])] * leaf for name, leaf in updates.items()}
        return scaled, optax.ScaleByScheduleState(optax.safe_increment(state.count))

    return optax.GradientTransformation(init, update)


def optimizer_shardings(
    tx: optax.GradientTransformation, trainable: dict, shardings: dict, mesh: Mesh
) -> optax.OptState:
    """Shardings of moments, equal to those of their parameters. By default jit(tx.init) would
    replicate them: 8 bytes per parameter on every chip."""
    return optax.tree_map_params(
        tx,
        lambda _, sharding_: sharding_,
        jax.eval_shape(tx.init, trainable),
        shardings,
        transform_non_params=lambda _: sharding.replicated(mesh),
    )
