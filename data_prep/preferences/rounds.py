"""Requests in batches, so that interrupted runs and several hosts produce the same file."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, TypeVar

from tqdm import tqdm

from saber_jax.data.records import Record
from saber_jax.runs import shares
from saber_jax.runs.files import write_jsonl
from saber_jax.runs.journal import Journal, batches

Line = dict[str, Any]
"""One line of the journal: the answers to a job, or the reason why none was generated."""


class Records(Protocol):
    """Records to mine, as RecordSource has them; an outline is a record without its pixels."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Record: ...

    def outline(self, index: int) -> Record: ...


Job = TypeVar("Job")

JobBatch = tuple[int, list[Job]]
"""(index of the first job among all jobs, jobs of the batch)."""


def work_through(
    settled: Sequence[Line],
    jobs: Sequence[Job],
    ask: Callable[[Iterator[JobBatch[Job]]], Iterator[list[Line]]],
    journal: Journal,
    *,
    batch_size: int,
    unit: str,
    share: shares.Share | None = None,
) -> list[Line]:
    """The lines that need no answer, then one line for each job, in order.

    Continues after the lines that `journal` has. `ask` yields the lines of each batch. With a
    `share`, only its part of the batches is asked, and the lines that need no answer are left out.
    Without one, if shares exist, they are joined and nothing is asked; ValueError names unfinished
    shares.
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
