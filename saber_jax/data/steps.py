"""Optimizer steps of equally many examples, whatever packing makes of them.

A step has `examples` examples (in stage 2, preference pairs), however many of them share a row. Its
shape is static all the same: it has room for `rows` rows, and those that it does not need are
empty. A row that would make a step too large is divided between that step and the next:

    rows of a window         [a b] [c] [d e] [f] [g h]
    steps of 4, rows 3       [a b] [c] [d]    [e] [f] [g h]

An epoch ends with its last example, so its last step may have fewer.
"""

import dataclasses
from collections.abc import Sequence

Rows = list[list[int]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepSize:
    """Examples of a step, and the rows that it has room for."""

    examples: int
    rows: int

    def steps(self, examples: int) -> int:
        """Steps of an epoch of so many examples."""
        return -(-examples // self.examples)

    def lay_out(self, rows: Rows, *, last: bool) -> tuple[Rows, list[int]]:
        """Whole steps, `self.rows` rows each, and the examples that are left over.

        With `last` nothing is left over: the last step has fewer examples. Raises ValueError when a
        step needs more rows than there is room for.
        """
        parts = self._divided(_balanced(rows))
        over = []
        if parts and not last and sum(map(len, parts[-1])) < self.examples:
            over = [example for row in parts.pop() for example in row]
        if (most := max(map(len, parts), default=0)) > self.rows:
            raise ValueError(
                f"A step of config.data.batch_examples={self.examples} needs up to {most} rows of "
                f"these data, and config.data.batch_rows={self.rows} is all that it has room for. "
                f"Set batch_rows to {most} or a little more, or batch_examples to less."
            )
        empty: Rows = [[]]
        return [row for part in parts for row in part + empty * (self.rows - len(part))], over

    def _divided(self, rows: Rows) -> list[Rows]:
        """The rows of every step."""
        steps: list[Rows] = []
        room = 0
        for row in rows:
            while row:
                if not room:
                    steps.append([])
                    room = self.examples
                steps[-1].append(row[:room])
                row, room = row[room:], room - len(steps[-1][-1])
        return steps


def _balanced(rows: Sequence[list[int]]) -> Rows:
    """The same rows, those with many and with few examples mixed so that every stretch of them has
    about the mean: then no step needs many more rows than another."""
    mean = sum(map(len, rows)) / max(len(rows), 1)
    many = [row for row in reversed(rows) if len(row) > mean]
    few = [row for row in reversed(rows) if len(row) <= mean]
    ordered: Rows = []
    ahead = 0.0  # Examples beyond the mean, so far.
    while many or few:
        row = (many if many and (ahead <= 0 or not few) else few).pop()
        ahead += len(row) - mean
        ordered.append(row)
    return ordered
