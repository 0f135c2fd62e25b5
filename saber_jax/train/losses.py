"""Losses: arrays in, scalars out. Nothing here knows a model or a config.

Axis letters: B rows, T targets of a row, P pairs of a row.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def sft_loss(
    log_probs: Float[Array, "B T"], weights: Float[Array, "B T"]
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """Mean negative log-likelihood over target tokens, nats per token.

    The mean is over the weights of the whole batch, never a mean of rows' means, so the loss does
    not depend on how examples were packed.
    """
    total = jnp.maximum(weights.sum(), 1.0)
    loss = -(log_probs * weights).sum() / total
    return loss, {"loss": loss, "target_tokens": weights.sum()}


def section_nll(
    log_probs: Float[Array, "B T"],
    weights: Float[Array, "B T"],
    sections: Int[Array, "B T"],
    count: int,
) -> Float[Array, "count"]:
    """Mean negative log-likelihood of each section 1..count; 0 where a section has no token."""
    one_hot = jax.nn.one_hot(sections - 1, count) * weights[..., None]
    return -jnp.einsum("BT,BTS->S", log_probs, one_hot) / jnp.maximum(one_hot.sum((0, 1)), 1.0)


def response_log_probs(
    log_probs: Float[Array, "B T"],
    segments: Int[Array, "B T"],
    branch: Int[Array, "B T"],
    pairs: int,
) -> tuple[Float[Array, "B P"], Float[Array, "B P"]]:
    """Sums over the tokens of the chosen and of the rejected response, end token included.

    Targets of branch 0 are the tokens with which both responses begin; they count for both and so
    cancel in every difference of the two.
    """
    member = jax.nn.one_hot(segments - 1, pairs, dtype=log_probs.dtype)
    chosen = jnp.einsum("BT,BTP->BP", jnp.where(branch != 2, log_probs, 0.0), member)
    rejected = jnp.einsum("BT,BTP->BP", jnp.where(branch != 1, log_probs, 0.0), member)
    return chosen, rejected


def cadpo_loss(
    chosen: Float[Array, "B P"],
    rejected: Float[Array, "B P"],
    reference_chosen: Float[Array, "B P"],
    reference_rejected: Float[Array, "B P"],
    valid: Bool[Array, "B P"],
    *,
    beta: float,
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """CA-DPO in the paper's form, over pairs whose modalities conflict (arXiv 2601.18321).

        rho = log pi_theta(y|c) - log pi_ref(y|c),   L = -log sigmoid(beta (rho_w - rho_l))

    which is eq. 7 of DPO (arXiv 2305.18290) on the distribution D_conf. Inputs are sums over
    response tokens in nats; the mean is over valid pairs.
    """
    reward_chosen = beta * (chosen - reference_chosen)
    reward_rejected = beta * (rejected - reference_rejected)
    margin = reward_chosen - reward_rejected
    count = jnp.maximum(valid.sum(), 1)

    def mean(x: Float[Array, "B P"]) -> Float[Array, ""]:
        return jnp.where(valid, x, 0.0).sum() / count

    loss = mean(-jax.nn.log_sigmoid(margin))
    return loss, {
        "loss": loss,
        "rewards/chosen": mean(reward_chosen),
        "rewards/rejected": mean(reward_rejected),
        "rewards/margins": mean(margin),
        "rewards/accuracies": mean((margin > 0).astype(margin.dtype)),
        "logps/chosen": mean(chosen),
        "logps/rejected": mean(rejected),
        "pairs": valid.sum(),
    }
