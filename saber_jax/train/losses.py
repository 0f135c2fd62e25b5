"""Supervised loss, sums over responses, and means as (sum, weight). All functions take arrays.

Axis letters: B rows, T targets of a row, P pairs of a row.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from saber_jax.batch import Branch

WeightedSums = dict[str, tuple[Array, Array]]
"""name -> (sum, weight). Sums and weights of microbatches add up; means of means would not."""


def means(sums: WeightedSums) -> dict[str, Array]:
    """sum / weight of every entry; NaN if the weight is 0."""
    return {
        name: jnp.where(weight > 0, total / jnp.where(weight > 0, weight, 1), jnp.nan)
        for name, (total, weight) in sums.items()
    }


def masked_sum(values: Array, where: Array) -> tuple[Array, Array]:
    """(sum, count) of `values` where `where` is true."""
    return jnp.where(where, values, 0.0).sum(), where.sum().astype(values.dtype)


def section_nll(
    log_probs: Float[Array, "B T"],
    weights: Float[Array, "B T"],
    sections: Int[Array, "B T"],
    count: int,
) -> tuple[Float[Array, "count"], Float[Array, "count"]]:
    """(sum, weight) of the negative log-likelihood of each section 1..count."""
    one_hot = jax.nn.one_hot(sections - 1, count) * weights[..., None]
    return -jnp.einsum("BT,BTS->S", log_probs, one_hot), one_hot.sum((0, 1))


def response_sums(
    values: Float[Array, "B T"],
    segments: Int[Array, "B T"],
    branch: Int[Array, "B T"],
    pairs: int,
) -> tuple[Float[Array, "B P"], Float[Array, "B P"]]:
    """Sums over the tokens of the chosen and of the rejected response, end token included.

    Targets of Branch.SHARED are the tokens with which both responses begin; they count for both
    and so cancel in every difference of the two.
    """
    member = jax.nn.one_hot(segments - 1, pairs, dtype=values.dtype)
    chosen = jnp.einsum("BT,BTP->BP", jnp.where(branch != Branch.REJECTED, values, 0.0), member)
    rejected = jnp.einsum("BT,BTP->BP", jnp.where(branch != Branch.CHOSEN, values, 0.0), member)
    return chosen, rejected


def of_pair(values: Float[Array, "B P"], segments: Int[Array, "B T"]) -> Float[Array, "B T"]:
    """Each target's value of its own pair; padding targets get that of pair 1."""
    return jnp.take_along_axis(values, jnp.maximum(segments - 1, 0), axis=1)


def length_weights(
    index: Int[Array, "B T"], common: Float[Array, "B T"], *, alpha: float
) -> Float[Array, "B T"]:
    """LD-DPO's weight of the target at `index` of its response (https://arxiv.org/abs/2409.06411):
    1 up to `common`, the length that both responses of the pair have, and `alpha` beyond.

    Tokens beyond the shorter length count less, so that the model does not learn to prefer length.
    """
    return jnp.where(index < common, 1.0, alpha)


def ratio_kl(
    policy: Float[Array, "B T"], reference: Float[Array, "B T"], where: Bool[Array, "B T"]
) -> tuple[Array, Array]:
    """(sum, count) of r - 1 - log r with r = pi_theta / pi_ref at the targets, nats per token.

    Its mean over tokens sampled from the reference is a non-negative, unbiased estimate of
    KL(pi_ref || pi_theta) (http://joschu.net/blog/kl-approx.html). The chosen answers were not
    sampled from it, so there it is only a measure of the distance from the reference.
    """
    log_ratio = jnp.where(where, policy - reference, 0.0)
    return masked_sum(jnp.expm1(log_ratio) - log_ratio, where)
