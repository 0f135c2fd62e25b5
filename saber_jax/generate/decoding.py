"""The two device programs of saber_jax.generate: prefill of new prompts, and decoding.

C prompts are answered at a time. `admit` prefills a few new ones and puts them in the places of
finished ones. `proceed` adds tokens to all answers until enough of them are finished. All rows
write to the same slot of the kv cache. The slots are a ring of as many slots as an answer may have
tokens, so there is room for a whole answer whenever it begins.

Axis letters: C prompts   B rows, equally many answers to each prompt   D width   V vocabulary
N new tokens   G groups, each on its own devices   c = C / G   n new prompts.
"""

import dataclasses
import functools
from collections.abc import Iterable, Sequence
from typing import NamedTuple, TypedDict, cast

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Key, Shaped, UInt32

from saber_jax.batch import Prompts
from saber_jax.models import saber
from saber_jax.models.config import SaberConfig
from saber_jax.models.kernels import Kernel
from saber_jax.models.text import Block, Cache, LayerCache, last_slots
from saber_jax.sharding import Device

SEEDS = 2**32


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """Sampling settings. Temperature 0 is greedy.

    Otherwise a token is sampled from the smallest set of tokens with at least `top_p` of the
    probability. It depends on `seed` and on the indices of the record, the answer and the token,
    but not on the batch size.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self):
        if self.temperature < 0 or not 0 < self.top_p <= 1:
            raise ValueError(
                "temperature must be at least 0 and top_p in (0, 1], got "
                f"{self.temperature} and {self.top_p}."
            )
        if not 0 <= self.seed < SEEDS:  # A device has 32 bits for it.
            raise ValueError(f"seed must be at least 0 and below {SEEDS}, got {self.seed}.")


GREEDY = Sampling()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
    """Static arguments of the two programs."""

    cfg: SaberConfig
    dtype: jnp.dtype
    greedy: bool
    prompt_slots: int  # The longest prompt.
    max_new_tokens: int
    samples: int  # Answers to every prompt, next to each other among the rows.
    groups: int = 1  # Number of groups of prompts, each on its own devices.
    max_frame_patches: int | None = None  # Maximum patches of a frame pair of new prompts.
    kernel: Kernel = "xla"  # Attention of the prefill, see models/kernels.py.
    # Shardings of rows and of the cache, see sharding.py.
    rows: NamedSharding | None = None
    cache: NamedSharding | None = None


def prefill_kernel(devices: Iterable[Device]) -> Kernel:
    """A kernel is written for one device; what several share is left to XLA, and so are TPUs."""
    platforms = [device.platform for device in devices]
    if platforms == ["gpu"]:
        return "triton"
    return "spans" if platforms == ["cpu"] else "xla"


def separate_layers(
    params: saber.Params, cfg: SaberConfig, dtype: DTypeLike, devices: Iterable[Device]
) -> list[Block] | None:
    """`saber.text_layers` where `devices` decode faster with them, else None."""
    platforms = [device.platform for device in devices]
    if platforms not in (["cpu"], ["gpu"]):
        return None
    return saber.text_layers(params, cfg, dtype, tiled=platforms == ["cpu"])


class State(TypedDict):
    """What is carried from token to token."""

    slot: Int[Array, ""]  # Of the ring, where the newest tokens are read into.
    tokens: Int[Array, "B"]  # The newest ones, which the model has not processed yet.
    positions: Int[Array, "B"]  # Their TMRoPE positions, the same on all three axes.
    answers: UInt32[Array, "B"]  # Indices of the answers, which seed their samples.
    first: Int[Array, "C"]  # Where in its slots of the cache the prompt begins.
    begun: Int[Array, "C"]  # The slot of the answers' first tokens.
    counts: Int[Array, "C"]  # Tokens of the prompt's longest answer, the newest included.
    finished: Bool[Array, "B"]
    out: Int[Array, "B N"]  # Each token in the slot that it is read into.


class TokenChoice(NamedTuple):
    """Arguments of the choice of the next token."""

    seed: UInt32[Array, ""]
    temperature: Float[Array, ""]
    top_p: Float[Array, ""]
    end: Int[Array, ""]  # The token that ends an answer.
    vocabulary: Int[Array, ""]  # Ids from here on are padding of the model's vocabulary.


@functools.partial(jax.jit, static_argnames=("prompts", "program"))
def blank(*, prompts: int, program: Program) -> tuple[State, Cache]:
    """An empty state and cache for `prompts` prompts."""
    rows, text, new = prompts * program.samples, program.cfg.text, program.max_new_tokens

    def zeros(first: int, slots: int) -> tuple[Array, Array]:
        k = jnp.zeros((first, text.kv_heads, text.head_dim, slots), program.dtype)
        return k, k.swapaxes(2, 3)

    cache = []
    for _ in range(text.layers):
        (prompt_k, prompt_v), (k, v) = zeros(prompts, program.prompt_slots), zeros(rows, new)
        cache.append(LayerCache(prompt_k=prompt_k, prompt_v=prompt_v, k=k, v=v))
    state = State(
        slot=jnp.int32(0),
        tokens=jnp.zeros(rows, jnp.int32),
        positions=jnp.zeros(rows, jnp.int32),
        answers=jnp.zeros(rows, jnp.uint32),
        first=jnp.zeros(prompts, jnp.int32),
        begun=jnp.zeros(prompts, jnp.int32),
        counts=jnp.zeros(prompts, jnp.int32),
        finished=jnp.ones(rows, jnp.bool_),
        out=jnp.zeros((rows, new), jnp.int32),
    )
    return _on_devices(state, cache, program)


# Donated, so that prompts are written into the one cache.
@functools.partial(jax.jit, static_argnames="program", donate_argnames=("state", "cache"))
def admit(
    params: saber.Params,
    batch: Prompts,
    source: Int[Array, "G c"],
    answers: UInt32[Array, "m"],
    state: State,
    cache: Cache,
    choice: TokenChoice,
    *,
    program: Program,
) -> tuple[State, Cache]:
    """Prefills n prompts, chooses the first token of each of their answers, and gives them places.

    `source` is, for each place of a group, the index of the group's new prompt that takes it, or -1
    for none. `answers` are the indices of the m = n * samples new answers.
    """
    ends, samples = batch.ends, program.samples
    last, new = saber.prefill(
        params,
        batch,
        program.cfg,
        prompt_slots=program.prompt_slots,
        answer_slots=program.max_new_tokens,
        samples=samples,
        dtype=program.dtype,
        max_frame_patches=program.max_frame_patches,
        kernel=program.kernel,
    )
    # A prompt ends in text, whose three positions are equal.
    positions = last_slots(batch.text.positions[:, 0], ends, 1)[:, 0]
    positions, last = (jnp.repeat(x, samples, axis=0) for x in (positions, last))
    counts = jnp.ones(ends.size, jnp.int32)
    tokens = next_token(params, last, answers, jnp.repeat(counts - 1, samples), choice, program)

    def put(old: Array, new: Array) -> Array:
        return _put(old, new, source)

    cache = [
        LayerCache(
            prompt_k=put(old["prompt_k"], fresh["prompt_k"]),
            prompt_v=put(old["prompt_v"], fresh["prompt_v"]),
            k=old["k"],
            v=old["v"],
        )
        for old, fresh in zip(cache, new, strict=True)
    ]
    finished = (tokens == choice.end) | (program.max_new_tokens == 1)
    out = jax.lax.dynamic_index_in_dim(state["out"], state["slot"], 1, keepdims=False)
    out = put(out, tokens)
    state = State(
        slot=state["slot"],
        tokens=put(state["tokens"], tokens),
        positions=put(state["positions"], positions + 1),
        answers=put(state["answers"], answers),
        first=put(state["first"], program.prompt_slots - batch.lengths.reshape(-1)),
        begun=put(state["begun"], counts * state["slot"]),
        counts=put(state["counts"], counts),
        finished=put(state["finished"], finished),
        out=jax.lax.dynamic_update_index_in_dim(state["out"], out, state["slot"], 1),
    )
    return _on_devices(state, cache, program)


# Donated, so that every step writes into the one cache.
@functools.partial(jax.jit, static_argnames="program", donate_argnames=("state", "cache"))
def proceed(
    params: saber.Params,
    layers: Sequence[Block] | None,
    state: State,
    cache: Cache,
    limit: Int[Array, ""],
    wanted: Int[Array, ""],
    choice: TokenChoice,
    *,
    program: Program,
) -> tuple[State, Cache]:
    """Decodes up to `limit` tokens, until `wanted` prompts of each group are finished.

    `layers` are those of `saber.text_layers`, for devices that read them faster.
    """
    ring = program.max_new_tokens

    def unfinished(carry):
        state, _, steps = carry
        ended = state["finished"].reshape(program.groups, -1, program.samples).all(2)
        return (steps < limit) & (ended.sum(1).min() < wanted)

    def one_token(carry):
        state, cache, steps = carry
        hidden, cache = saber.decode(
            params,
            state["tokens"],
            state["positions"],
            cache,
            state["first"],
            state["slot"],
            state["counts"],
            program.cfg,
            program.dtype,
            layers,
        )
        numbers = jnp.repeat(state["counts"], program.samples)
        ended = state["finished"].reshape(-1, program.samples).all(1)
        tokens = next_token(params, hidden, state["answers"], numbers, choice, program)
        slot = (state["slot"] + 1) % ring
        # A finished answer keeps its tokens until its place is reused.
        old = jax.lax.dynamic_index_in_dim(state["out"], slot, 1, keepdims=False)
        out = jnp.where(state["finished"], old, tokens)
        counts = jnp.where(ended, state["counts"], state["counts"] + 1)
        full = jnp.repeat(counts, program.samples) == ring
        following = State(
            slot=slot,
            tokens=tokens,
            positions=state["positions"] + 1,
            answers=state["answers"],
            first=state["first"],
            begun=state["begun"],
            counts=counts,
            finished=state["finished"] | (tokens == choice.end) | full,
            out=jax.lax.dynamic_update_index_in_dim(state["out"], out, slot, 1),
        )
        return following, cache, steps + 1

    return jax.lax.while_loop(unfinished, one_token, (state, cache, jnp.int32(0)))[:2]


def _put(
    old: Shaped[Array, "a ..."], new: Shaped[Array, "b ..."], source: Int[Array, "G c"]
) -> Shaped[Array, "a ..."]:
    """`old` with what `admit` puts in the places that `source` names: of a place's rows, all.

    It is a scatter along the places of each group, so XLA writes only the new rows if `old` may be
    overwritten, and a mesh that holds each group on its own devices has nothing to send.
    """
    groups, places = source.shape
    rows = len(old) // source.size
    fresh = new.reshape(groups, -1, rows, *new.shape[1:])
    taken = source[:, None] == jnp.arange(fresh.shape[1])[None, :, None]
    # A prompt without a place gets one after the last, where nothing is written.
    place = jnp.where(taken.any(axis=2), taken.argmax(axis=2), places)
    put = jax.vmap(lambda old, new, place: old.at[place].set(new, mode="drop"))
    return put(old.reshape(groups, places, rows, *old.shape[1:]), fresh, place).reshape(old.shape)


def _on_devices(state: State, cache: Cache, program: Program) -> tuple[State, Cache]:
    if program.rows is None or program.cache is None:
        return state, cache
    constrain = jax.lax.with_sharding_constraint
    rows = {name: array for name, array in state.items() if name != "slot"}  # The only scalar.
    placed = cast("State", constrain(rows, program.rows) | {"slot": state["slot"]})
    return placed, constrain(cache, program.cache)


def next_token(
    params: saber.Params,
    hidden: Float[Array, "B D"],
    answers: UInt32[Array, "B"],
    numbers: Int[Array, "B"],
    choice: TokenChoice,
    program: Program,
) -> Int[Array, "B"]:
    """Token number `numbers` of each answer."""
    logits = saber.logits(params, hidden)
    # Released checkpoints pad the vocabulary; tokenizers cannot decode the padding ids.
    real = jnp.arange(logits.shape[-1])[None] < choice.vocabulary
    logits = jnp.where(real, logits, -jnp.inf)
    if program.greedy:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    root = jax.random.key(choice.seed)

    def key(answer: Array, number: Array) -> Array:
        return jax.random.fold_in(jax.random.fold_in(root, answer), number)

    keys = jax.vmap(key)(answers, numbers)
    return sample(logits, keys, choice.temperature, choice.top_p)


def sample(
    logits: Float[Array, "B V"], keys: Key[Array, "B"], temperature: Array, top_p: Array
) -> Int[Array, "B"]:
    """Samples from the most likely tokens with a total probability of at least `top_p`.

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
