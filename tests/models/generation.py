"""Greedy answers to conversations, straight from the two device programs."""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from saber_jax.generate import decoding
from saber_jax.models import saber
from tests.models.batches import CONFIG, Conversation, pack, prompts
from tests.models.cases import NEW_TOKENS


def greedy(params: saber.Params, talks: Sequence[Conversation]) -> np.ndarray:
    """Int [conversations, NEW_TOKENS]; the prompts share one packed row."""
    lengths = np.array([len(talk.tokens) for talk in talks])
    batch = pack([list(talks)], length=224, patches=160, chunks=5)
    batch = prompts(batch, np.cumsum(lengths)[None], lengths[None])
    count = len(talks)
    program = decoding.Program(
        cfg=CONFIG,
        dtype=jnp.float32,
        greedy=True,
        prompt_slots=int(lengths.max()),
        max_new_tokens=NEW_TOKENS,
        samples=1,
        max_frame_patches=None,
    )
    choice = decoding.TokenChoice(
        seed=np.uint32(0),
        temperature=np.float32(0),
        top_p=np.float32(1),
        end=np.int32(-1),  # Never: every answer has all its tokens.
        vocabulary=np.int32(CONFIG.text.vocab),
    )
    state, cache = decoding.blank(prompts=count, program=program)
    numbers = np.arange(count, dtype=np.int32)
    answers = numbers.astype(np.uint32)
    state, cache = decoding.admit(
        params, batch, numbers[None], answers, state, cache, choice, program=program
    )
    limit, wanted = np.int32(NEW_TOKENS), np.int32(count)
    state, _ = decoding.proceed(params, None, state, cache, limit, wanted, choice, program=program)
    return np.asarray(state["out"])
