"""Budgets -> static batches: how the examples of a row are laid out; planning.py chooses them.

A row of a supervised batch, three examples long (p prompt, r response, . padding):

    tokens    p p p r r r p p r r p p p r . .
    segments  1 1 1 1 1 1 2 2 2 2 3 3 3 3 0 0

A row of preference pairs has three static regions, and every region packs several pairs. What the
two responses begin with in common stands once, in the shared region:

              |-- length -----------|-- response --|-- response --|
    tokens     p p p s p p . . . . .  c c c c c . .  r r r r . . .
    segments   1 1 1 1 2 2 0 0 0 0 0  1 1 1 2 2 0 0  1 1 2 2 0 0 0
    branch     0 0 0 0 0 0 0 0 0 0 0  1 1 1 1 1 0 0  2 2 2 2 0 0 0

Both responses take their positions from the end of their own prefix, and a query sees an earlier
slot of its segment when that slot is shared or of its own branch.
"""

import dataclasses

import numpy as np
from jaxtyping import Int

from saber_jax.data import media
from saber_jax.data.examples import Example, Size, common_prefix, size_of
from saber_jax.data.withhold import VIEWS

_SIZE_FIELDS = tuple(field.name for field in dataclasses.fields(Size))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Budget:
    """The static shape of one row. `response` is 0 for supervised rows; drawn at the top.

    `frame_patches` is a promise, not a size: no frame pair of the row has more patches, so that
    attention inside frames may be local. None promises nothing.
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
    def limits(self) -> Int[np.ndarray, " D"]:
        """The most that the examples of a row may ask for together, in the order of `Size`."""
        response = (self.response, self.response)
        return np.array([self.length, *response, self.patches, self.chunks, self.targets])


def pack_rows(rows: list[list[Example]], budget: Budget) -> dict[str, np.ndarray]:
    """Lays examples out as one batch; shapes depend on `budget` and `len(rows)` alone.

    Keys: tokens, segments, branch, media_index [B, L]; positions [B, 3, L]; patches uint8
    [B, N_v, 1176], patch_hw [B, N_v, 2], patch_window, patch_frame [B, N_v]; mel [B, N_a, 200,
    128], mel_lengths [B, N_a]; target_{tokens,source,section,segment,branch,index,weights}
    [B, T]; target_reference [B, views, T]; kappa, conflict, ignored, pair_valid [B, P];
    left_out [B], the examples of a row that could not be used.

    `media_index` is the row of the slot in concat(vision units, pooled audio), -1 for text;
    `target_source` is the slot whose hidden state predicts the target, `target_index` the target's
    place in its response. `target_reference` is log pi_ref of the target in each of VIEWS, NaN
    where nobody computed it; supervised rows have no views.
    """
    batch = _empty(len(rows), budget)
    for b, examples in enumerate(rows):
        row = {key: value[b] for key, value in batch.items()}
        cursor = Size(**dict.fromkeys(_SIZE_FIELDS, 0))
        for segment, example in enumerate(examples, start=1):
            _place_media(row, cursor, example)
            _place_text(row, cursor, example, segment, budget)
            row["kappa"][segment - 1] = example.kappa
            row["conflict"][segment - 1] = example.conflict
            row["ignored"][segment - 1] = example.ignored
            row["pair_valid"][segment - 1] = True
            cursor = _advance(cursor, size_of(example))
    return batch


def _advance(cursor: Size, size: Size) -> Size:
    total = np.add(dataclasses.astuple(cursor), dataclasses.astuple(size)).tolist()
    return Size(**dict(zip(_SIZE_FIELDS, total, strict=True)))


def _empty(rows: int, budget: Budget) -> dict[str, np.ndarray]:
    ints = {
        "slots": ("tokens", "segments", "branch", "media_index"),
        "patches": ("patch_window", "patch_frame"),
        "chunks": ("mel_lengths",),
        "targets": (
            "target_tokens",
            "target_source",
            "target_section",
            "target_segment",
            "target_branch",
            "target_index",
        ),
        "segments": ("conflict", "ignored"),
    }
    batch: dict[str, np.ndarray] = {
        key: np.zeros((rows, getattr(budget, size)), np.int32)
        for size, keys in ints.items()
        for key in keys
    }
    batch["media_index"] -= 1
    batch["positions"] = np.zeros((rows, 3, budget.slots), np.int32)
    batch["patches"] = np.zeros((rows, budget.patches, media.PATCH_FEATURES), np.uint8)
    batch["patch_hw"] = np.zeros((rows, budget.patches, 2), np.int32)
    batch["mel"] = np.zeros((rows, budget.chunks, 200, 128), np.float32)
    batch["target_weights"] = np.zeros((rows, budget.targets), np.float32)
    views = len(VIEWS) if budget.response else 0
    batch["target_reference"] = np.full((rows, views, budget.targets), np.nan, np.float32)
    batch["kappa"] = np.zeros((rows, budget.segments), np.float32)
    batch["pair_valid"] = np.zeros((rows, budget.segments), bool)
    batch["left_out"] = np.zeros(rows, np.int32)
    return batch


def _place_media(row: dict[str, np.ndarray], cursor: Size, example: Example) -> None:
    start = cursor.patches
    if example.layout is not None:
        stop = start + len(example.patches)
        row["patches"][start:stop] = example.patches
        row["patch_hw"][start:stop] = example.layout.hw
        # Ids only have to differ between neighbours in the row: offset by what came before.
        for key, ids in (("window", example.layout.window), ("frame", example.layout.frame)):
            row[f"patch_{key}"][start:stop] = ids + row[f"patch_{key}"].max()
    chunks = slice(cursor.chunks, cursor.chunks + len(example.mel_lengths))
    row["mel"][chunks] = example.mel
    row["mel_lengths"][chunks] = example.mel_lengths


def _place_text(
    row: dict[str, np.ndarray], cursor: Size, example: Example, segment: int, budget: Budget
) -> None:
    prompt, start = example.prompt, cursor.text
    stop = start + len(prompt.tokens)
    row["tokens"][start:stop] = prompt.tokens
    row["segments"][start:stop] = segment
    row["positions"][:, start:stop] = prompt.positions
    units = row["patch_window"].shape[0] // 4
    offsets = np.array([0, cursor.patches // 4, units + cursor.chunks * media.CHUNK_TOKENS])
    index = prompt.media_slot + offsets[prompt.media_kind]
    row["media_index"][start:stop] = np.where(prompt.media_kind > 0, index, -1)

    if len(example.responses) == 2:
        chosen, rejected = example.responses
        shared = common_prefix(chosen.tokens, rejected.tokens)
        branches = [
            (0, stop, stop - 1, chosen, 0, shared),
            (1, budget.length + cursor.chosen, stop + shared - 1, chosen, shared, None),
            (
                2,
                budget.length + budget.response + cursor.rejected,
                stop + shared - 1,
                rejected,
                shared,
                None,
            ),
        ]
    else:
        branches = [(0, stop, stop - 1, response, 0, None) for response in example.responses]
    target = cursor.targets
    for branch, slot, source, response, first, last in branches:
        tokens, sections = response.tokens[first:last], response.sections[first:last]
        slots, n = slice(slot, slot + len(tokens)), len(tokens)
        row["tokens"][slots] = tokens
        row["segments"][slots] = segment
        row["branch"][slots] = branch
        row["positions"][:, slots] = prompt.next_position + np.arange(first, first + n)
        targets = slice(target, target + n)
        row["target_tokens"][targets] = tokens
        # The first token of a branch is predicted by the last slot before the branching.
        row["target_source"][targets] = [source, *range(slot, slot + n - 1)] if n else []
        row["target_section"][targets] = sections
        row["target_segment"][targets] = segment
        row["target_branch"][targets] = branch
        row["target_index"][targets] = np.arange(first, first + n)
        row["target_weights"][targets] = 1.0
        target += n
    if example.reference is not None:
        row["target_reference"][:, cursor.targets : target] = example.reference
