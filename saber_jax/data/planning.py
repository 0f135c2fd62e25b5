"""Plans which examples share a row, so that all budgets of a row are well filled.

Examples are planned in windows of the shuffled order. In a window, the example that is hardest to
place opens a row, and the row is completed with the waiting examples that leave least of it unused.
Examples that are left over move to the next window. A plan is a pure function of (sizes, budget,
seed). It can be resumed at any window if the left-over examples are known: see `Plan.position`.
"""

import dataclasses
import functools
import hashlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, overload

import numpy as np
from jaxtyping import Bool, Float, Int

from saber_jax.data.examples import Size
from saber_jax.data.packing import Budget
from saber_jax.data.steps import StepSize
from saber_jax.data.tasks import Mixture

SIZE_NAMES = tuple(field.name for field in dataclasses.fields(Size))
"""Columns of every `sizes` array below."""

WINDOW = 4096
"""Examples that are planned together."""

CARRIED = 1024
"""The last CARRIED examples of a window move to the next window of the epoch. Rows made of these
alone, with few to choose from, would be a fifth emptier than the others."""

CANDIDATES = 128
"""Number of waiting examples that are tried in pairs as the last two of a row."""

ENOUGH = 0.01
"""The search for a better row stops if a row wastes no more than this."""

SWITCHES = (2.2, 1.5)
"""Examples are added to a row one at a time while it has room for more average examples than this;
then the best two are added together. Each value is tried, from left to right."""

TEXT_WORTH = 8.0
"""Weight of the text budget relative to a media budget: a text slot costs the most to compute."""


def plan_rows(
    sizes: Int[np.ndarray, "N D"], order: Int[np.ndarray, " M"], budget: Budget
) -> list[list[int]]:
    """Rows that hold each example of `order` once, window by window.

    Raises ValueError when an example is larger than a row: media is never truncated.
    """
    _refuse_too_large(sizes, order, budget)
    rows, carried = [], order[:0]
    windows = _windows(order)
    for left, window in zip(reversed(range(len(windows))), windows, strict=True):
        ids = np.concatenate([carried, window])
        more, carried = _plan_window(sizes, ids, budget, last=not left)
        rows += more
    return rows


def _refuse_too_large(
    sizes: Int[np.ndarray, "N D"], order: Int[np.ndarray, " M"], budget: Budget
) -> None:
    too_large = order[~fits(sizes[order], budget)]
    if len(too_large):
        worst = too_large[0]
        raise ValueError(
            f"{len(too_large)} examples are larger than a row, the first at index {worst}: "
            f"{SIZE_NAMES} = {sizes[worst].tolist()} > {budget.limits.tolist()}. Leave them out, "
            "or raise the budgets in config.data."
        )


def fits(sizes: Int[np.ndarray, "N D"], budget: Budget) -> Bool[np.ndarray, " N"]:
    """Whether each example fits into an empty row."""
    return np.all(sizes <= budget.limits, axis=1)


def _windows(order: Int[np.ndarray, " M"]) -> list[Int[np.ndarray, " m"]]:
    """Windows of nearly equal length, so that none has few examples and badly filled rows."""
    return np.array_split(order, max(1, round(len(order) / WINDOW)))


def _plan_window(
    sizes: Int[np.ndarray, "N D"], ids: Int[np.ndarray, " n"], budget: Budget, *, last: bool
) -> tuple[list[list[int]], Int[np.ndarray, " c"]]:
    """Rows of `ids`, each of which fits into a row, and the examples that are carried over."""
    waiting = _Waiting(sizes[ids], budget)
    waits, rows = np.ones(len(ids), bool), []
    while waits.sum() > (0 if last else CARRIED) and (row := waiting.best_row()) is not None:
        waits[row] = False
        rows.append(ids[row].tolist())
    return rows, ids[waits]


class _Waiting:
    """A window's examples, hardest first, and which of them have no row yet.

    Every array has one contiguous row per budget and is compared as a whole, because picking out
    the waiting examples first takes longer than comparing them all.
    """

    def __init__(self, sizes: Int[np.ndarray, "n D"], budget: Budget):
        used = budget.limits > 0
        limits = budget.limits[used]
        share = sizes[:, used] / limits
        self._rank = np.argsort(-share.max(1, initial=0.0), kind="stable")
        self._sizes = np.ascontiguousarray(sizes[self._rank][:, used].T.astype(np.int32))
        self._share = np.ascontiguousarray(share[self._rank].T.astype(np.float32))
        self._limits, self._segments = limits.astype(np.int32), budget.segments
        self._mean = np.maximum(self._share.sum(1) / max(len(sizes), 1), 1e-9)
        worth = _worth(budget)[used]
        self._worth = worth.astype(np.float32) @ self._share
        self._whole = float(worth.sum())
        self._waits = np.ones(len(sizes), bool)

    def best_row(self) -> list[int] | None:
        """A row that starts with the hardest waiting example; None if none is waiting."""
        if not self._waits.any():
            return None
        best, best_worth = [], -1.0
        for switch in SWITCHES:
            row, same = self._row(switch)
            worth = float(self._worth[row].sum())
            if worth > best_worth:
                best, best_worth = row, worth
            if same or best_worth >= self._whole * (1 - ENOUGH):
                break
        self._waits[best] = False
        found = self._rank[best].tolist()
        if self._waits.sum() < len(self._waits) // 2:
            self._forget_placed()
        return found

    def _forget_placed(self) -> None:
        self._rank, self._worth = self._rank[self._waits], self._worth[self._waits]
        self._sizes = np.ascontiguousarray(self._sizes[:, self._waits])
        self._share = np.ascontiguousarray(self._share[:, self._waits])
        self._waits = np.ones(len(self._rank), bool)

    def _row(self, switch: float) -> tuple[list[int], bool]:
        """A row, and whether every other switch would give the same row."""
        first = int(self._waits.argmax())
        row, same = [first], True
        free = self._limits - self._sizes[:, first]
        waits = self._waits.copy()
        waits[first] = False
        while len(row) < self._segments:
            waits &= (self._sizes <= free[:, None]).all(0)
            if not waits.any():
                break
            room = (free / self._limits).astype(np.float32)
            expected = float((room / self._mean).min())
            same &= not min(SWITCHES) < expected <= max(SWITCHES)
            if expected > switch:
                chosen = [self._leaving_average(waits, room, round(expected) - 1)]
            else:
                chosen = self._best_last(waits, free, self._segments - len(row))
            row += chosen
            waits[chosen] = False
            free = free - self._sizes[:, chosen].sum(1)
        return row, same

    def _leaving_average(
        self, waits: Bool[np.ndarray, " n"], room: Float[np.ndarray, " D"], others: int
    ) -> int:
        """The example that leaves room closest to what `others` average examples need."""
        want = (room - others * self._mean).astype(np.float32)
        distance = np.square(self._share - want[:, None]).sum(0)
        return int(np.where(waits, distance, np.inf).argmin())

    def _best_last(
        self, waits: Bool[np.ndarray, " n"], free: Int[np.ndarray, " D"], most: int
    ) -> list[int]:
        """One example, or two that fit together, worth the most."""
        single = int(np.where(waits, self._worth, -1.0).argmax())
        candidates = np.flatnonzero(waits)
        if len(candidates) < 2 or most < 2:
            return [single]
        if len(candidates) > CANDIDATES:  # Candidates are sorted by size; take some of every size.
            candidates = candidates[_spread(len(candidates))]
        worth = self._worth[candidates]
        both = np.add.outer(worth, worth)
        for size, room in zip(self._sizes[:, candidates], free, strict=True):
            both[np.add.outer(size, size) > room] = -1.0
        np.fill_diagonal(both, -1.0)
        i, j = divmod(int(both.argmax()), len(candidates))
        if both[i, j] <= self._worth[single]:
            return [single]
        return [int(candidates[i]), int(candidates[j])]


@functools.cache
def _spread(count: int) -> Int[np.ndarray, " c"]:
    """CANDIDATES of `count` indices, evenly spaced."""
    return np.linspace(0, count - 1, CANDIDATES).astype(int)


def _worth(budget: Budget) -> Float[np.ndarray, " D"]:
    """The weight of each full budget. Targets have none, because they follow the text."""
    text = TEXT_WORTH / budget.slots
    of = {"text": text * budget.length, "patches": 1.0, "chunks": 1.0, "targets": 0.0}
    of |= dict.fromkeys(("chosen", "rejected"), text * budget.response)
    return np.array([of[name] for name in SIZE_NAMES])


@dataclasses.dataclass(frozen=True)
class Position:
    """A point where a plan can be resumed: the first row of a window, and the examples that were
    carried over to it."""

    row: int = 0
    epoch: int = 0
    window: int = 0
    carried: Sequence[int] = ()


class Plan:
    """The examples of each row of an endless stream of rows; every epoch is shuffled again.

    Every epoch visits the records that `draw` selects, each with a request that `mixture` draws;
    without a mixture it is the first. Rows are planned lazily, one window at a time.
    """

    def __init__(
        self,
        sizes: Int[np.ndarray, "K N D"],
        budget: Budget,
        seed: int,
        mixture: Mixture | None = None,
        *,
        draw: Callable[[int], Int[np.ndarray, " M"]] | None = None,
        step: StepSize | None = None,
    ):
        """`draw` selects the records that an epoch visits, by default all.

        With a `step` every `step.rows` rows hold `step.examples` examples; some may be empty.
        """
        self.budget = budget
        self._step = step
        self._draw = draw
        self.sizes = sizes.reshape(-1, sizes.shape[-1])
        self._requests, self._records = sizes.shape[:2]
        self._seed, self._mixture = seed, mixture
        self._next = Position()
        self._planned: list[tuple[Position, list[list[int]]]] = []
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ = state | {"_lock": threading.Lock()}

    def row(self, index: int) -> list[int]:
        """Examples of row `index`, numbered as in `encoded.Examples`."""
        position, rows = self._window_of(index)
        return rows[index - position.row]

    def rows(self, count: int) -> "PlannedRows":
        """The first `count` rows, planned lazily."""
        return PlannedRows(self, count)

    def position(self, index: int) -> Position:
        """The position at which a plan with the same arguments can be `entered` to get row `index`
        without planning earlier windows."""
        return self._window_of(index)[0]

    def begun(self, row: int) -> Int[np.ndarray, " n"]:
        """The examples in earlier rows of the epoch of `row`."""
        at, rows = self._window_of(row)
        seen = [*self._windows(at.epoch)[: at.window], *rows[: row - at.row]]
        counts = sum(self._counted(ids) for ids in seen) - self._counted(at.carried)
        return np.repeat(np.arange(len(self.sizes)), counts)

    def entered(self, position: Position) -> "Plan":
        """The same plan from `position` on; earlier rows are not available."""
        other = Plan.__new__(Plan)
        other.__setstate__(self.__getstate__() | {"_planned": [], "_next": position})
        return other

    def rows_of(self, indices: Sequence[int] | np.ndarray) -> list[list[int]]:
        """Rows that hold each of these examples once."""
        return plan_rows(self.sizes, np.asarray(indices, np.int64), self.budget)

    def fill(self) -> dict[str, float]:
        """Share of each budget that is used, over the first window of the run."""
        _, rows = self._window_of(0)
        return fill(self.sizes, rows, self.budget)

    def fingerprint(self) -> str:
        """Changes with anything that affects which examples share a row."""
        settings = (self.budget, self._seed, WINDOW, CARRIED)
        if self._step is not None:
            settings = (*settings, self._step)
        digest = hashlib.sha256(repr(settings).encode())
        for array in (self.sizes, self._drawn(0), self._drawn(1)):
            digest.update(np.ascontiguousarray(array, np.int64).tobytes())
        return digest.hexdigest()[:16]

    def _window_of(self, index: int) -> tuple[Position, list[list[int]]]:
        with self._lock:
            while index >= self._next.row:
                self._plan_next()
            for position, rows in reversed(self._planned):
                if position.row <= index:
                    return position, rows
        start = self._planned[0][0].row
        raise IndexError(f"Row {index} lies before row {start}, where this plan starts.")

    def _plan_next(self) -> None:
        at = self._next
        windows = self._windows(at.epoch)
        last = at.window + 1 == len(windows)
        ids = np.concatenate([np.asarray(at.carried, np.int64), windows[at.window]])
        _refuse_too_large(self.sizes, ids, self.budget)
        rows, carried = _plan_window(self.sizes, ids, self.budget, last=last)
        # Rows are planned hardest first; without a shuffle, a batch would have only long clips.
        shuffle = np.random.default_rng([self._seed, at.epoch, at.window]).permutation(len(rows))
        rows = [rows[i] for i in shuffle]
        if self._step is not None:
            rows, over = self._step.lay_out(rows, last=last)
            carried = np.concatenate([np.asarray(over, np.int64), carried])
        self._planned.append((at, rows))
        self._next = Position(
            row=at.row + len(rows),
            epoch=at.epoch + last,
            window=0 if last else at.window + 1,
            carried=carried.tolist(),
        )

    def _counted(self, ids: Sequence[int] | np.ndarray) -> Int[np.ndarray, " N"]:
        return np.bincount(np.asarray(ids, np.int64), minlength=len(self.sizes))

    def _windows(self, epoch: int) -> list[Int[np.ndarray, " m"]]:
        rng = np.random.default_rng([self._seed, epoch])
        return _windows(rng.permutation(self._drawn(epoch)))

    def _drawn(self, epoch: int) -> Int[np.ndarray, " N"]:
        """The example of every record in this epoch, numbered as `Examples` does."""
        records = np.arange(self._records) if self._draw is None else self._draw(epoch)
        asked = 0 if self._mixture is None else self._mixture.draw(epoch, len(records))
        return records + self._records * asked


class PlannedRows(Sequence[list[int]]):
    """The first `count` rows of a plan, as a sequence."""

    def __init__(self, plan: Plan, count: int):
        self._plan, self._count = plan, count

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> list[int]: ...

    @overload
    def __getitem__(self, index: slice) -> list[list[int]]: ...

    def __getitem__(self, index: int | slice) -> list[int] | list[list[int]]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(self._count))]
        if not 0 <= index < self._count:
            raise IndexError(f"Row {index} of {self._count}.")
        return self._plan.row(index)

    def plan(self) -> None:
        """Plans all of them now. Raises ValueError as that does."""
        if self._count:
            self._plan.row(self._count - 1)

    def position(self, index: int) -> Position:
        """See `Plan.position`; `index` may be beyond the last row."""
        return self._plan.position(index)

    def __iter__(self) -> Iterator[list[int]]:
        return (self._plan.row(i) for i in range(self._count))


def fill(
    sizes: Int[np.ndarray, "N D"], rows: Sequence[Sequence[int]], budget: Budget
) -> dict[str, float]:
    """Share of each budget that is used: 1.0 is a batch without padding."""
    ids = np.concatenate([np.asarray(row, np.int64) for row in rows])
    total = dict(zip(SIZE_NAMES, sizes[ids].sum(0) / len(rows), strict=True))
    slots = total["text"] + total["chosen"] + total["rejected"]
    limits = {"text": (slots, budget.slots)} | {
        name: (total[name], getattr(budget, name)) for name in ("patches", "chunks", "targets")
    }
    return {name: float(have / limit) if limit else 1.0 for name, (have, limit) in limits.items()}
