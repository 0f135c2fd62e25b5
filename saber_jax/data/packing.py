"""Lays out the examples of a row in arrays of static shape; planning.py chooses the examples.

A row of a supervised batch, three examples long (p prompt, r response, . padding):

    tokens    p p p r r r p p r r p p p r . .
    segments  1 1 1 1 1 1 2 2 2 2 3 3 3 3 0 0

A row of preference pairs has three static regions, and every region packs several pairs. The tokens
that both responses begin with (s) are stored once, in the shared region:

              |-- length -----------|-- response --|-- response --|
    tokens     p p p s p p . . . . .  c c c c c . .  r r r r . . .
    segments   1 1 1 1 2 2 0 0 0 0 0  1 1 1 2 2 0 0  1 1 2 2 0 0 0
    branch     0 0 0 0 0 0 0 0 0 0 0  1 1 1 1 1 0 0  2 2 2 2 0 0 0

The positions of both responses continue from the end of their own prefix. A query attends to an
earlier slot of its segment if that slot is shared or in its own branch.
"""

import dataclasses

import numpy as np
from jaxtyping import Int

from saber_jax import batch
from saber_jax.batch import Batch, Branch
from saber_jax.data import media
from saber_jax.data.examples import Example, Response, Size, common_prefix, size_of
from saber_jax.data.withhold import VIEWS

_SIZE_FIELDS = tuple(field.name for field in dataclasses.fields(Size))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Budget:
    """The static shape of one row. `response` is 0 for supervised rows; drawn at the top.

    `frame_patches` is an upper bound of the patches of a frame pair, which allows local attention
    inside frames. None means no bound.
    """

    length: int
    patches: int
    chunks: int
    targets: int
    segments: int
    response: int = 0
    frame_patches: int | None = None

    @property
    def slots(self) -> int:
        return self.length + 2 * self.response

    @property
    def views(self) -> int:
        """Number of views of the reference log-probs; 0 for supervised rows."""
        return len(VIEWS) if self.response else 0

    patch_features = media.PATCH_FEATURES
    chunk_frames = media.CHUNK_FRAMES
    mel_bins = media.MELS

    @property
    def limits(self) -> Int[np.ndarray, " D"]:
        """The limits for the sum of the sizes of a row's examples, in the order of `Size`."""
        response = (self.response, self.response)
        return np.array([self.length, *response, self.patches, self.chunks, self.targets])


def pack_rows(rows: list[list[Example]], budget: Budget) -> Batch[np.ndarray]:
    """Lays examples out as one batch; shapes depend on `budget` and `len(rows)` alone."""
    packed = batch.empty(len(rows), budget)
    for number, examples in enumerate(rows):
        row = batch.row_of(packed, number)
        cursor = Size(**dict.fromkeys(_SIZE_FIELDS, 0))
        for segment, example in enumerate(examples, start=1):
            _place_vision(row.vision, cursor, example)
            _place_audio(row.audio, cursor, example)
            _place_text(row, cursor, example, segment, budget)
            row.pairs.kappa[segment - 1] = example.kappa
            row.pairs.conflict[segment - 1] = example.conflict
            row.pairs.ignored[segment - 1] = example.ignored
            row.pairs.valid[segment - 1] = True
            cursor = _advance(cursor, size_of(example))
    return packed


def _advance(cursor: Size, size: Size) -> Size:
    total = np.add(dataclasses.astuple(cursor), dataclasses.astuple(size)).tolist()
    return Size(**dict(zip(_SIZE_FIELDS, total, strict=True)))


def _place_vision(row: batch.VisionInputs[np.ndarray], cursor: Size, example: Example) -> None:
    if example.layout is None:
        return
    patches = slice(cursor.patches, cursor.patches + len(example.patches))
    row.patches[patches] = example.patches
    row.hw[patches] = example.layout.hw
    # Ids of different clips in the row must differ, so they are offset by the largest one so far.
    row.window[patches] = example.layout.window + row.window.max()
    row.frame[patches] = example.layout.frame + row.frame.max()


def _place_audio(row: batch.AudioInputs[np.ndarray], cursor: Size, example: Example) -> None:
    chunks = slice(cursor.chunks, cursor.chunks + len(example.mel_lengths))
    row.mel[chunks] = example.mel
    row.lengths[chunks] = example.mel_lengths


def _place_text(
    row: Batch[np.ndarray], cursor: Size, example: Example, segment: int, budget: Budget
) -> None:
    text, targets = row.text, row.targets
    prompt, start = example.prompt, cursor.text
    stop = start + len(prompt.tokens)
    text.tokens[start:stop] = prompt.tokens
    text.segments[start:stop] = segment
    text.positions[:, start:stop] = prompt.positions
    first_chunk = budget.patches // 4 + cursor.chunks * media.CHUNK_TOKENS
    offsets = np.array([0, cursor.patches // 4, first_chunk])
    index = prompt.media_slot + offsets[prompt.media_kind]
    text.media_index[start:stop] = np.where(prompt.media_kind > 0, index, -1)

    target = cursor.targets
    for run in _runs(example, cursor, budget, stop):
        tokens = run.response.tokens[run.first : run.last]
        n = len(tokens)
        slots, places = slice(run.slot, run.slot + n), np.arange(run.first, run.first + n)
        text.tokens[slots] = tokens
        text.segments[slots] = segment
        text.branch[slots] = run.branch
        text.positions[:, slots] = prompt.next_position + places
        here = slice(target, target + n)
        targets.tokens[here] = tokens
        # The first token of a branch is predicted from the last slot before the branches.
        targets.source[here] = [run.source, *range(run.slot, run.slot + n - 1)] if n else []
        targets.section[here] = run.response.sections[run.first : run.last]
        targets.segment[here] = segment
        targets.branch[here] = run.branch
        targets.index[here] = places
        targets.weights[here] = 1.0
        target += n
    if example.reference is not None:
        targets.reference[:, cursor.targets : target] = example.reference


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Run:
    """Tokens `first` to `last` of a response, in slots from `slot` on; `source` predicts the first
    of them."""

    branch: Branch
    slot: int
    source: int
    response: Response
    first: int = 0
    last: int | None = None


def _runs(example: Example, cursor: Size, budget: Budget, stop: int) -> list[_Run]:
    """The slots of the responses of an example whose prompt ends before slot `stop`."""
    if len(example.responses) < 2:
        return [
            _Run(branch=Branch.SHARED, slot=stop, source=stop - 1, response=response)
            for response in example.responses
        ]
    chosen, rejected = example.responses
    shared = common_prefix(chosen.tokens, rejected.tokens)
    regions = (
        (Branch.CHOSEN, chosen, budget.length + cursor.chosen),
        (Branch.REJECTED, rejected, budget.length + budget.response + cursor.rejected),
    )
    begin = _Run(branch=Branch.SHARED, slot=stop, source=stop - 1, response=chosen, last=shared)
    return [begin] + [
        _Run(branch=branch, slot=slot, source=stop + shared - 1, response=response, first=shared)
        for branch, response, slot in regions
    ]
