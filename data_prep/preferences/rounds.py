"""Questions asked batch after batch, so that a killed run and several hosts leave the same file."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, TypeVar

from tqdm import tqdm

from saber_jax.data.records import Record
from saber_jax.runs import shares
from saber_jax.runs.files import write_jsonl
from saber_jax.runs.journal import Journal, batches

Line = dict[str, Any]
"""One line of the journal: what was answered to a job, or why nothing was asked."""


class Records(Protocol):
    """Records to mine, as RecordSource has them; an outline is a record without its pixels."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Record: ...

    def outline(self, index: int) -> Record: ...


Job = TypeVar("Job")

Batch = tuple[int, list[Job]]
"""The jobs asked together, and the number of the first of them among all jobs."""


def work_through(
    settled: Sequence[Line],
    jobs: Sequence[Job],
    ask: Callable[[Iterator[Batch[Job]]], Iterator[list[Line]]],
    journal: Journal,
    *,
    batch_size: int,
    unit: str,
    share: shares.Share | None = None,
) -> list[Line]:
    """The lines that were settled without asking, then one for each job, in order.

    Goes on from what `journal` holds. `ask` gives the lines of batch after batch. A `share` does
    its part of the batches and leaves the settled lines out. Without a share, where all shares are
    there, nothing is asked; where one is unfinished, ValueError names it.
    """
    lines = list(settled)
    numbers = list(range(len(jobs)))
    if share:
        lines, numbers = [], share.indices(len(jobs), batch_size)
    elif (
        rows := shares.joined(journal.folder, journal.path.name, len(jobs), batch_size)
    ) is not None:
        write_jsonl(journal.path, lines + rows)
        return lines + rows
    plan = batches(len(numbers), batch_size, first=len(lines))
    done = journal.resume([len(lines), *(stop for _, stop in plan)])
    if len(done) < len(lines):
        journal.append(lines)
        done = lines
    first = len(settled) if not share else 0
    rest = [numbers[start - first : stop - first] for start, stop in plan if start >= len(done)]
    if not rest:
        return done
    asked = ((part[0], [jobs[number] for number in part]) for part in rest)
    with tqdm(total=len(numbers), initial=len(done) - first, desc="answers", unit=unit) as bar:
        for new in ask(asked):
            journal.append(new)
            done += new
            bar.update(len(new))
    return done
