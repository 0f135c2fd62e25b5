"""The two device programs behind saber_jax.generate: read the prompts, then go on token by token.

Axis letters: C prompts   B rows, equally many answers to each prompt   D width   V vocabulary
N new tokens.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple, TypedDict

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jaxtyping import Array, Bool, Float, Int, Key

from saber_jax.batch import Prompts
from saber_jax.models import saber
from saber_jax.models.config import SaberConfig
from saber_jax.models.text import Block, Cache, last_slots


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is picked: temperature 0 takes the likeliest one.

    Otherwise one is drawn from the smallest set of tokens that holds `top_p` of the probability. A
    draw depends on `seed`, on the numbers of the record, of the answer to it and of the token, and
    not on the batch size.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self):
        if self.temperature < 0 or not 0 < self.top_p <= 1 or self.seed < 0:
            raise ValueError(
                "temperature and seed must be at least 0 and top_p in (0, 1], got "
                f"{self.temperature}, {self.seed} and {self.top_p}."
            )


GREEDY = Sampling()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
    """What the two programs are compiled for, besides their shapes."""

    cfg: SaberConfig
    dtype: jnp.dtype
    greedy: bool
    prompt_slots: int  # The longest prompt.
    max_new_tokens: int
    samples: int  # Answers to every prompt, next to each other among the rows.
    max_frame_patches: int | None  # Most patches of one frame pair.
    cache: NamedSharding | None = None  # How the cache lies on the devices, see sharding.py.


class State(TypedDict):
    """What one batch carries from token to token."""

    step: Int[Array, ""]  # New tokens so far.
    tokens: Int[Array, "B"]  # The newest one, not read by the model yet.
    positions: Int[Array, "B"]  # Its TMRoPE position, the same on all three axes.
    first: Int[Array, "C"]  # Where in its slots of the cache the prompt begins.
    finished: Bool[Array, "B"]
    out: Int[Array, "B N"]


class Pick(NamedTuple):
    """What decides the next token besides the model."""

    seed: Int[Array, ""]
    rows: Int[Array, "B"]  # Number of each row's answer: different rows draw differently.
    temperature: Float[Array, ""]
    top_p: Float[Array, ""]
    end: Int[Array, ""]  # The token that ends an answer.
    vocabulary: Int[Array, ""]  # Ids from here on are padding of the model's vocabulary.


@functools.partial(jax.jit, static_argnames="program")
def start(
    params: saber.Params,
    batch: Prompts,
    finished: Bool[Array, "B"],
    pick: Pick,
    *,
    program: Program,
) -> tuple[State, Cache]:
    """Reads every prompt once and picks each row's first token. `finished` rows stay silent."""
    ends = batch.ends
    last, cache = saber.prefill(
        params,
        batch,
        program.cfg,
        prompt_slots=program.prompt_slots,
        answer_slots=program.max_new_tokens,
        samples=program.samples,
        dtype=program.dtype,
        max_frame_patches=program.max_frame_patches,
    )
    if program.cache is not None:
        cache = jax.lax.with_sharding_constraint(cache, program.cache)
    # A prompt ends in text, whose three positions are equal and the largest so far.
    positions = last_slots(batch.text.positions[:, 0], ends, 1)[:, 0]
    positions, last = (jnp.repeat(x, program.samples, axis=0) for x in (positions, last))
    tokens = _next_token(params, last, jnp.int32(0), pick, program)
    out = jnp.full((tokens.size, program.max_new_tokens), pick.end, jnp.int32)
    state = State(
        step=jnp.int32(1),
        tokens=tokens,
        positions=positions + 1,
        first=program.prompt_slots - batch.lengths.reshape(-1),
        finished=finished | (tokens == pick.end),
        out=out.at[:, 0].set(tokens),
    )
    return state, cache


# Donated, so that every step writes into the one cache.
@functools.partial(jax.jit, static_argnames="program", donate_argnames=("state", "cache"))
def proceed(
    params: saber.Params,
    layers: Sequence[Block] | None,
    state: State,
    cache: Cache,
    limit: Int[Array, ""],
    pick: Pick,
    *,
    program: Program,
) -> tuple[State, Cache]:
    """Goes on until every row has ended or `limit` tokens stand.

    `layers` are those of `saber.text_layers`, if the device is one that reads them faster.
    """

    def unfinished(carry):
        state, _ = carry
        return (state["step"] < limit) & ~state["finished"].all()

    def one_token(carry):
        state, cache = carry
        hidden, cache = saber.decode(
            params,
            state["tokens"],
            state["positions"],
            cache,
            state["first"],
            state["step"] - 1,
            program.cfg,
            program.dtype,
            layers,
        )
        tokens = _next_token(params, hidden, state["step"], pick, program)
        tokens = jnp.where(state["finished"], pick.end, tokens)
        following = State(
            step=state["step"] + 1,
            tokens=tokens,
            positions=state["positions"] + 1,
            first=state["first"],
            finished=state["finished"] | (tokens == pick.end),
            out=state["out"].at[:, state["step"]].set(tokens),
        )
        return following, cache

    return jax.lax.while_loop(unfinished, one_token, (state, cache))


def _next_token(
    params: saber.Params,
    hidden: Float[Array, "B D"],
    step: Int[Array, ""],
    pick: Pick,
    program: Program,
) -> Int[Array, "B"]:
    logits = saber.logits(params, hidden)
    # Released checkpoints pad the vocabulary; no tokenizer can read those ids.
    real = jnp.arange(logits.shape[-1])[None] < pick.vocabulary
    logits = jnp.where(real, logits, -jnp.inf)
    if program.greedy:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    root = jax.random.key(pick.seed)
    keys = jax.vmap(lambda row: jax.random.fold_in(jax.random.fold_in(root, row), step))(pick.rows)
    return sample(logits, keys, pick.temperature, pick.top_p)


def sample(
    logits: Float[Array, "B V"], keys: Key[Array, "B"], temperature: Array, top_p: Array
) -> Int[Array, "B"]:
    """Draws from the likeliest tokens that together hold at least `top_p`.

    Nucleus sampling, https://arxiv.org/abs/1904.09751.
    """
    logits = logits / temperature
    # Sorting a vocabulary takes longer than a small model takes to make the logits.
    kept = jax.lax.cond(top_p < 1, nucleus, lambda logits, _: logits, logits, top_p)
    return jax.vmap(jax.random.categorical)(keys, kept).astype(jnp.int32)


def nucleus(logits: Float[Array, "B V"], top_p: Float[Array, ""]) -> Float[Array, "B V"]:
    """-inf in place of the logits of tokens that `sample` does not draw."""
    ordered = jnp.sort(logits, axis=-1)[:, ::-1]
    probabilities = jax.nn.softmax(ordered, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    threshold = jnp.where(before < top_p, ordered, jnp.inf).min(axis=-1, keepdims=True)
    return jnp.where(logits >= threshold, logits, -jnp.inf)
