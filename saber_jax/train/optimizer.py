"""AdamW with warm-up and cosine decay, over the trainable parameters only.

Vocabulary first: a network that starts from nothing spends its first steps on which words are
frequent. That gradient is the same for every example, and Adam's steps make of it one large
constant direction in every matrix it reaches, under which what the towers see of a clip drowns: of
the drawn faces nothing was learnt in 550 steps. If for a while only the embeddings, the final norm
and the output projection learn, they take the frequencies and the fixed phrases upon themselves,
and what is left to explain when the rest joins in is what tells the clips apart.
"""

import dataclasses
from collections.abc import Iterable, Mapping

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from saber_jax import sharding
from saber_jax.models.parameters import Kind, Role


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """`peak_lr` falls by cosine to `final_fraction` of itself over the run's steps.

    For the first `vocabulary_steps` of them only the vocabulary learns, at `peak_lr`: parameters
    whose role says so. Everything else begins its warm-up after that. Adapters learn at
    `adapter_factor` times the rate of the rest; ten is what https://thinkingmachines.ai/blog/lora
    finds, and docs/huggingface.md here.
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


Roles = Mapping[str, Role]
"""By flattened name, the role of every parameter: `saber.roles`, flattened."""


def check_vocabulary(config: OptimizerConfig, trainable: Iterable[str], roles: Roles) -> None:
    """Raises ValueError if nothing would learn for the first `vocabulary_steps`."""
    vocabulary = [name for name, role in roles.items() if role.vocabulary]
    if config.vocabulary_steps and not set(vocabulary) & set(trainable):
        raise ValueError(
            f"config.optimizer.vocabulary_steps={config.vocabulary_steps} would let nothing learn "
            f"for so many steps: none of {', '.join(vocabulary)} trains here. Set it to 0, or name "
            "one of them in config.trainable or, with LoRA, in config.lora.trainable."
        )


def schedules(config: OptimizerConfig, steps: int) -> dict[str, optax.Schedule]:
    """Learning rates of the "vocabulary", of the "adapters" and of the "rest"."""
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
    """Weight decay touches matrices and embeddings alone, see parameters.Kind.decays."""

    def decays(params: dict[str, jax.Array]) -> dict[str, bool]:
        return {name: roles[name].kind.decays for name in params}

    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.scale_by_adam(b1=config.b1, b2=config.b2),
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
    """Moments like their parameters. Left to itself jit(tx.init) replicates them: 8 bytes a
    parameter on every chip."""
    return optax.tree_map_params(
        tx,
        lambda _, sharding_: sharding_,
        jax.eval_shape(tx.init, trainable),
        shardings,
        transform_non_params=lambda _: sharding.replicated(mesh),
    )
