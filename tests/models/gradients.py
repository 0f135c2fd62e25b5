"""The loss that the parity tests differentiate: the mean over all next tokens of a conversation."""

import functools

import jax
import jax.numpy as jnp

from saber_jax.models import saber
from tests.models.batches import CONFIG


@functools.partial(jax.jit, static_argnames="cfg")
def summed_loss_and_gradients(params, batch, cfg=CONFIG):
    """The summed loss, its number of terms, the logits, and the gradients of the sum."""

    def loss(params):
        logits = saber.logits(params, saber.hidden(params, batch, cfg))
        scores = jax.nn.log_softmax(logits[:, :-1])
        targets = batch.text.tokens[:, 1:, None]
        segments = batch.text.segments
        inside = (segments[:, 1:] > 0) & (segments[:, 1:] == segments[:, :-1])
        terms = jnp.take_along_axis(scores, targets, axis=2)[..., 0] * inside
        return -terms.sum(), (inside.sum(), logits)

    (total, (count, logits)), gradients = jax.value_and_grad(loss, has_aux=True)(params)
    return total, count, logits, gradients
