"""Packs prompts for one prefill: short ones share a row, which saves padding.

One prefill reads as many of the prompts that follow as its rows hold (`Packer.choose`). Four
prompts in rows of eight (. padding), and the slot behind the end of each:

    tokens     p p p p p p . .      ends     6 11 14 16
               q q q r r r s s      lengths  6  3  3  2

On a mesh every data shard has separate rows for its own prompts (a group), and `ends` counts slots
from the start of the group. All groups get equally many prompts, but for the last prompts of all.
"""

import dataclasses
import itertools
import threading
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from saber_jax.batch import Prompts
from saber_jax.data import media, packing, sed
from saber_jax.data.examples import Example, size_of
from saber_jax.data.planning import SIZE_NAMES, plan_rows
from saber_jax.data.records import ClipSize
from saber_jax.data.tokenizer import Tokenizer

# Prompts are padded to a multiple of this, so that calls with similar clips share one compilation.
LENGTH_STEP = 32

# Rows of one to so many times the longest prompt are tried, in steps of a fraction of it. Of those
# with few more slots than the fewest, the longest is taken: it needs fewer prefills, and they give
# more places at a time. A long row costs nothing by itself, because attention skips keys of other
# prompts or, where it masks them, is a small part of a large model's time.
LONGEST_ROW, STEPS = 4, 16
FEW_MORE = 1.05
TRIED_PROMPTS = 64  # Of all that are reserved, to choose a length by.

MOST_MEL_FRAMES = media.MAX_AUDIO_SECONDS * media.SAMPLE_RATE // media.HOP

Need = tuple[int, int, int]
"""Text slots, patches and audio chunks of one prompt."""

RowsByGroup = list[list[list[int]]]
"""Numbers of the prompts of each row of each group."""


PREFILL = 8  # The most prompts that are read at a time.

ROW_SLOTS = 2048
"""Slots of the rows that one prefill reads, if the longest prompt is not longer. More would take
more memory and be no faster, because reading so many tokens is bound by arithmetic. Adding a token
is bound by reading the weights, for 60 answers as for one."""


def rows_of(length: int) -> int:
    """Rows of this length that one prefill reads for a group."""
    return max(1, ROW_SLOTS // length)


def most_prompts(places: int, groups: int, prefill: int = PREFILL) -> int:
    """The most prompts of a group that one prefill reads, if so many places answer `prefill` at a
    time: at most half of a group's places, so that half of them never wait empty."""
    return min(-(-prefill // groups), max(1, places // groups // 2))


@dataclasses.dataclass(frozen=True, kw_only=True)
class PackedShape:
    """The static shape of a packed batch: `rows` a group, and what each row holds."""

    rows: int = 1
    length: int = 0
    prompt: int = 0  # Slots of the longest prompt.
    patches: int = 0
    chunks: int = 0
    frame_patches: int = 0  # Most patches of one frame pair.

    def joined(self, other: "PackedShape") -> "PackedShape":
        """The smallest shape that is large enough for both."""
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        names = (field.name for field in dataclasses.fields(self))
        return PackedShape(**dict(zip(names, map(max, pairs), strict=True)))


class Packer:
    """Packs up to `groups` x `prompts` prompts for one prefill. Its shape only grows."""

    def __init__(self, tokenizer: Tokenizer, *, groups: int, prompts: int):
        self._tokenizer, self._groups, self._prompts = tokenizer, groups, prompts
        self._shape = PackedShape()
        self._lock = threading.Lock()

    @property
    def batch_size(self) -> int:
        return self._groups * self._prompts

    @property
    def lookahead(self) -> int:
        """Prompts that `choose` should see, if there are so many. Several groups have no choice."""
        return self.batch_size * (2 if self._groups == 1 else 1)

    def share_of(self, count: int) -> int:
        """Of so many prompts, those of each group; the last groups may have fewer."""
        return -(-count // self._groups)

    @property
    def shape(self) -> PackedShape:
        return self._shape

    def reserve(self, sizes: Iterable[ClipSize]) -> None:
        """Makes room for clips of these sizes, in this order. See RecordSource.sizes."""
        words: dict[tuple[str, bool, bool], int] = {}
        needs: list[Need] = []
        largest = 0
        for _, language, frames, height, width, samples, _ in sizes:
            mel = min(-(-samples // media.HOP), MOST_MEL_FRAMES)
            heard = media.audio_tokens(mel)
            kind = (language, frames > 0, heard > 0)
            if kind not in words:
                words[kind] = len(self._tokenizer.encode(sed.prompt_text(*kind))) - sum(kind[1:])
            frame_patches = height * width // media.PATCH**2
            patches = -(-frames // media.TEMPORAL_PATCH) * frame_patches
            largest = max(largest, frame_patches)
            chunks = -(-mel // media.CHUNK_FRAMES)
            needs.append((words[kind] + patches // 4 + heard, patches, chunks))
        if needs:
            self._lengthen(needs)
        for batch in self._batches(needs, self._shape.length):
            self._plan(batch, largest)

    def choose(self, examples: Sequence[Example]) -> list[int]:
        """Which of these prompts the next prefill reads. The first is always one of them."""
        needs = [_need(example) for example in examples]
        self._lengthen(needs)
        return self._chosen(needs, self._shape.length)

    def pack(self, examples: Sequence[Example]) -> tuple[Prompts[np.ndarray], PackedShape]:
        """What decoding.admit takes, and the shape that it has. Missing prompts are padding.

        Of n prompts, each group gets `share_of(n)` successive ones.
        """
        needs, largest = [_need(example) for example in examples], 0
        for example in examples:
            if example.layout is not None:
                largest = max(largest, int(np.bincount(example.layout.frame).max()))
        self._lengthen(needs)
        plan, shape = self._plan(needs, largest)
        share = self.share_of(len(needs))
        rows = [row for group in plan for row in group]
        batch = packing.pack_rows([[examples[i] for i in row] for row in rows], self._budget(shape))
        # A prompt that does not exist is read from the first slot of its group, and never answered.
        ends = np.ones((self._groups, self._prompts), np.int32)
        lengths = np.ones_like(ends)
        for number, row in enumerate(rows):
            texts = [needs[i][0] for i in row]
            at = [i // share * self._prompts + i % share for i in row]
            lengths.flat[at] = texts
            ends.flat[at] = number % shape.rows * shape.length + np.cumsum(texts, dtype=np.int32)
        prompts = Prompts(
            text=batch.text, vision=batch.vision, audio=batch.audio, ends=ends, lengths=lengths
        )
        return prompts, shape

    def _lengthen(self, needs: Sequence[Need]) -> None:
        """Makes rows as long as suits these prompts, unless they hold every prompt already."""
        with self._lock:
            longest = max(text for text, _, _ in needs)
            if longest <= self._shape.prompt:
                return
            tried = needs[:: -(-len(needs) // TRIED_PROMPTS)]
            steps = range(STEPS, LONGEST_ROW * STEPS + 1)
            lengths = sorted({-(-longest * n // STEPS // LENGTH_STEP) * LENGTH_STEP for n in steps})

            def slots(length: int) -> int:
                plans = [self._groups_of(x, length) for x in self._batches(tried, length)]
                return len(plans) * max(len(group) for plan in plans for group in plan) * length

            by_length = {n: slots(n) for n in lengths if n <= max(ROW_SLOTS, lengths[0])}
            fewest = min(by_length.values())
            length = max(n for n in by_length if by_length[n] <= FEW_MORE * fewest)
            self._shape = self._shape.joined(PackedShape(length=length, prompt=lengths[0]))

    def _batches(self, needs: Sequence[Need], length: int) -> Iterator[Sequence[Need]]:
        """The prompts of one prefill after another."""
        following, ahead = iter(needs), []
        while True:
            ahead += itertools.islice(following, self.lookahead - len(ahead))
            if not ahead:
                return
            chosen = self._chosen(ahead, length)
            yield [ahead[i] for i in chosen]
            ahead = [need for i, need in enumerate(ahead) if i not in chosen]

    def _chosen(self, needs: Sequence[Need], length: int) -> list[int]:
        # Groups get equally many prompts and rows are planned for all of them, so only a single
        # row has a choice that is simple.
        if self._groups == rows_of(length) == 1:
            return fullest([text for text, _, _ in needs], length, self._prompts)
        return list(range(self._fitting(needs[: self.batch_size], length)))

    def _fitting(self, needs: Sequence[Need], length: int) -> int:
        """How many prompts, in this order, fit."""
        for prompts in range(self._prompts, 1, -1):
            count = min(prompts * self._groups, len(needs))
            share = self.share_of(count)
            if all(self._fits(needs[i : i + share], length) for i in range(0, count, share)):
                return count
        return min(self._groups, len(needs))

    def _fits(self, needs: Sequence[Need], length: int) -> bool:
        """Whether these prompts fit into the rows of one group."""
        rows, slots = rows_of(length), sum(text for text, _, _ in needs)
        if rows == 1 or slots > rows * length:
            return slots <= rows * length
        return len(self._group(needs, 0, length)) <= rows

    def _plan(self, needs: Sequence[Need], frame_patches: int) -> tuple[RowsByGroup, PackedShape]:
        """Which prompts share each row of each group, after making room for them."""
        with self._lock:
            plan = self._groups_of(needs, self._shape.length)
            row_needs = [np.sum([needs[i] for i in row], axis=0) for rows in plan for row in rows]
            _, patches, chunks = np.max(row_needs, axis=0).tolist()
            self._shape = shape = self._shape.joined(
                PackedShape(
                    rows=max(map(len, plan)),
                    patches=patches,
                    chunks=chunks,
                    frame_patches=frame_patches,
                )
            )
        return [rows + [[]] * (shape.rows - len(rows)) for rows in plan], shape

    def _groups_of(self, needs: Sequence[Need], length: int) -> RowsByGroup:
        share = self.share_of(len(needs))
        firsts = (group * share for group in range(self._groups))
        return [self._group(needs[first : first + share], first, length) for first in firsts]

    def _group(self, needs: Sequence[Need], first: int, length: int) -> list[list[int]]:
        """The rows of a group with these prompts, of which the first is number `first`."""
        sizes = np.zeros((len(needs), len(SIZE_NAMES)), np.int64)
        sizes[:, SIZE_NAMES.index("text")] = [text for text, _, _ in needs]
        # Budgets of zero are not looked at: media takes the room that the text's rows leave it.
        rows = plan_rows(sizes, np.arange(len(sizes)), self._budget(PackedShape(length=length)))
        return [[first + i for i in row] for row in rows]

    def _budget(self, shape: PackedShape) -> packing.Budget:
        return packing.Budget(
            length=shape.length,
            patches=shape.patches,
            chunks=shape.chunks,
            targets=0,
            segments=self._prompts,
        )


def fullest(sizes: Sequence[int], capacity: int, most: int) -> list[int]:
    """Indices of up to `most` sizes, 0 among them, with the largest sum that `capacity` allows.

    Of several such choices, one of few and early sizes.
    """
    # Bit s of sums[i][n]: n of the first i + 1 sizes, the first among them, can have the sum s.
    start = [0] * (most + 1)
    start[1] = 1 << sizes[0]
    sums, within = [start], (2 << capacity) - 1
    for size in sizes[1:]:
        less = sums[-1]
        sums.append([0, *(less[n] | less[n - 1] << size & within for n in range(1, most + 1))])
    total, count = max((bits.bit_length() - 1, -n) for n, bits in enumerate(sums[-1]))
    count, chosen = -count, []
    for i in range(len(sizes) - 1, 0, -1):
        if not sums[i - 1][count] >> total & 1:
            chosen.append(i)
            total, count = total - sizes[i], count - 1
    return [0, *reversed(chosen)]


def _need(example: Example) -> Need:
    size = size_of(example)
    return size.text, size.patches, size.chunks
