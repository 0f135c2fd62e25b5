"""All attention masks of the network.

A mask is stored as labels per position, never as a [queries, keys] array: XLA fuses the comparison
into the softmax, and blockwise kernels take the labels.

Axis letters: B batch   T queries   S keys.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

MASKED = -1e30
"""What hides a score. Finite, because minus infinity minus itself is NaN."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Visibility:
    """Query i sees key j iff all of these hold.

    - `query_segments[i] == key_segments[j]`, and they are not 0, the label of padding;
    - with `causal`, j <= i, where queries are the last of the keys;
    - with branches, `key_branch[j]` is 0 (shared by all branches) or equals `query_branch[i]`.

    For a query that sees nothing (padding), the output of `attend` is finite but meaningless.
    """

    query_segments: Int[Array, "B T"]
    key_segments: Int[Array, "B S"]
    query_branch: Int[Array, "B T"] | None = None
    key_branch: Int[Array, "B S"] | None = None
    causal: bool = False
    response: int = 0  # Branches 1 and 2 are the last two regions of this many slots.
    longest: int | None = None  # Upper bound of the slots of a segment, if known.

    def dense(self) -> Bool[Array, "B T S"]:
        """The mask as an array."""
        query, key = self.query_segments[:, :, None], self.key_segments[:, None, :]
        mask = (query == key) & (key != 0)
        if self.causal:
            # The last query is at the position of the last key.
            first = key.shape[2] - query.shape[1]
            slots = first + jnp.arange(query.shape[1])[:, None] >= jnp.arange(key.shape[2])[None, :]
            mask &= slots[None]
        if self.query_branch is not None and self.key_branch is not None:
            shared = self.key_branch[:, None, :]
            mask &= (shared == 0) | (shared == self.query_branch[:, :, None])
        return mask


def packed_text(
    segments: Int[Array, "B L"],
    branch: Int[Array, "B L"],
    *,
    response: int = 0,
    longest: int | None = None,
) -> Visibility:
    """Causal attention over packed examples whose responses share one prefix.

    TPU kernels need `response` to know the regions of branches; XLA uses `branch`. If no segment is
    longer than `longest`, XLA skips slots that are further apart.

    A preference pair (prefix `a b`, chosen `c d`, rejected `e f`), then another example, padding:

        slot      a b c d e f g h .
        segment   1 1 1 1 1 1 2 2 0
        branch    0 0 1 1 2 2 0 1 0

        sees    a b c d e f g h .
        a       x
        b       x x
        c       x x x
        d       x x x x
        e       x x     x
        f       x x     x x
        g                   x
        h                   x x
        .
    """
    return Visibility(
        query_segments=segments,
        key_segments=segments,
        query_branch=branch,
        key_branch=branch,
        causal=True,
        response=response,
        longest=longest,
    )


def cached_text(
    first: Int[Array, " C"],
    counts: Int[Array, " C"],
    slot: Int[Array, ""],
    *,
    prompt_slots: int,
    answer_slots: int,
) -> Visibility:
    """A new token sees its prompt and the tokens of its answer, including itself.

    One row per prompt, in a cache of `prompt_slots`, then `answer_slots`. The new tokens of all
    rows are in `slot` of the latter, which are a ring: the slot after the last one is the first.
    Three prompts begin in slots 2, 0 and 1 and end in slot 2; their answers have 1, 2 and 3 tokens,
    the newest in slot 1 of 4:

        cache       0 1 2   0 1 2 3
        prompt 0        x     x
        prompt 1    x x x   x x
        prompt 2      x x   x x   x
    """
    prompt = jnp.arange(prompt_slots)[None, :] >= first[:, None]
    ages = (slot - jnp.arange(answer_slots)) % answer_slots
    said = ages[None, :] < counts[:, None]
    seen = jnp.concatenate([prompt, said], axis=1)
    return Visibility(
        query_segments=jnp.ones((len(first), 1), jnp.int32), key_segments=seen.astype(jnp.int32)
    )


def audio_chunk(steps: Int[Array, " C"], length: int) -> Visibility:
    """Each row is one audio chunk: its valid steps see each other, in both directions.

    A chunk of 4 steps with 3 valid ones:

        sees    0 1 2 .
        0       x x x
        1       x x x
        2       x x x
        .
    """
    valid = (jnp.arange(length)[None, :] < steps[:, None]).astype(jnp.int32)
    return Visibility(query_segments=valid, key_segments=valid)


def same_segment(segments: Int[Array, "B P"]) -> Visibility:
    """Patches of one window (or of one frame) see each other; 0 is padding.

    segment   1 1 2 2 2 .
    1         x x
    1         x x
    2             x x x
    2             x x x
    2             x x x
    .
    """
    return Visibility(query_segments=segments, key_segments=segments)


def nearby_segment(segments: Int[Array, "B P"], block: int) -> Visibility:
    """`same_segment` for queries cut into blocks, with the keys of three blocks each.

    Every row of the result is one block, whose keys are those of the block before, its own and the
    block after. That is all of `same_segment` as long as no segment is longer than `block`. Blocks
    of 2 over the segments `1 2 2 3`; `-` marks a neighbour that does not exist:

        keys        - - 1 2 2 3          keys        1 2 2 3 - -
        block 0, 1      x                block 1, 2    x x
        block 0, 2        x x            block 1, 3        x

    P must be a multiple of `block`.
    """
    batch, length = segments.shape
    blocks = segments.reshape(batch, length // block, block)
    return Visibility(
        query_segments=blocks.reshape(-1, block),
        key_segments=with_neighbours(blocks).reshape(-1, 3 * block),
    )


def with_neighbours(blocks: Array) -> Array:
    """[B, blocks, block, ...] to [B, blocks, 3 * block, ...]: the block before, itself, after.

    Blocks that do not exist are zeros.
    """
    edge = jnp.zeros_like(blocks[:, :1])
    before = jnp.concatenate([edge, blocks[:, :-1]], axis=1)
    after = jnp.concatenate([blocks[:, 1:], edge], axis=1)
    return jnp.concatenate([before, blocks, after], axis=2)


@dataclasses.dataclass(frozen=True)
class Mask:
    """What kernels see by position alone; they compare segment ids in addition to it.

    With `causal`, a query sees no later key. Positions from `rejected` on do not see those in
    [chosen, rejected). With `reach`, no segment is longer than that, so that blocks further apart
    cannot meet. Drawn for a causal row of 6 with chosen=2 and rejected=4:

        sees    0 1 2 3 4 5
        0       x
        1       x x
        2       x x x
        3       x x x x
        4       x x     x
        5       x x     x x
    """

    causal: bool
    chosen: int = 0
    rejected: int = 0
    reach: int = 0

    @classmethod
    def packed(cls, length: int, response: int) -> "Mask":
        """Of `packed_text`, for rows that end in two regions of `response` slots (0: none)."""
        return cls(True, length - 2 * response, length - response) if response else cls(True)

    def visible(self, query: Any, key: Any) -> Any:
        """Whether `query` sees `key`: two arrays of positions that broadcast."""
        seen = query >= key if self.causal else (query >= 0) & (key >= 0)
        if self.rejected:
            seen &= (query < self.rejected) | (key < self.chosen) | (key >= self.rejected)
        return seen

    def may_meet(self, queries: int, keys: int, length: int) -> np.ndarray:
        """bool [length / queries, length / keys]: blocks with at least one visible pair."""
        query, key = np.arange(0, length, queries)[:, None], np.arange(0, length, keys)[None, :]
        meet = query + queries > key if self.causal else np.ones((query.size, key.size), bool)
        if self.rejected:
            in_chosen = (key >= self.chosen) & (key + keys <= self.rejected)
            meet = meet & ~((query >= self.rejected) & in_chosen)
        if self.reach:
            meet = meet & (query - (key + keys - 1) < self.reach)
            meet = meet & (key - (query + queries - 1) < self.reach)
        return meet
