"""Memory of the input pipeline: what a host holds at most under a recipe, and in a small run.

    python -m benchmarks.loader_memory     the bound of some recipes; benchmarks.input_pipeline
                                           prints it too, beside a measured figure

The bound counts rows (`loader.most_rows`). A row has the size of its budgets, whatever it holds.
"""

import dataclasses
import time
from pathlib import Path

import jax

from configs import cadpo, sft
from launch import topology
from saber_jax import batch
from saber_jax.data import loader
from saber_jax.data.encoded import Examples
from saber_jax.data.packing import Budget

RECIPES = ("7b-v5e-256", "3b-v5e-32", "7b-lora-v6e-8")
STAGES = {"sft": sft.get_config, "cadpo": cadpo.get_config}
THREADS, LOCAL, STEPS, STEP_SECONDS = 2, 4, 6, 1.5


@dataclasses.dataclass(frozen=True)
class Bound:
    """A host's rows of a batch, the rows that it holds at most, and the bytes of a row."""

    local: int
    rows: int
    row_bytes: int

    @property
    def bytes(self) -> int:
        return self.rows * self.row_bytes


def row_bytes(budget: Budget) -> int:
    return sum(array.nbytes for array in jax.tree.leaves(batch.empty(1, budget)))


def hosts_of(slices: topology.Slices) -> int:
    """Machines of a pod; a 2x4 slice is a single one with all eight chips."""
    shape, _ = topology.WIDE_HOST
    return slices.count * (1 if slices.topology == shape else slices.hosts)


def bound(variant: str, stage: str = "sft") -> Bound:
    """The most that a host holds while it trains `stage` on the pod of the recipe `variant`."""
    config = STAGES[stage](variant)
    names = [field.name for field in dataclasses.fields(Budget)]
    budget = Budget(**{name: config.data[name] for name in names})
    slices = topology.parse(config.topology)
    chips = slices.count * slices.chips
    total = -(-config.data.batch_rows // chips) * chips  # Every chip has equally many rows.
    local = total // hosts_of(slices)
    rows = loader.most_rows(local, threads=config.data.threads, workers=config.data.workers)
    return Bound(local, rows, row_bytes(budget))


def table() -> list[str]:
    """One line a recipe and stage."""
    lines = ["recipe            stage  rows a batch  rows held  MB a row  GB a host at most"]
    for variant in RECIPES:
        for stage in STAGES:
            b = bound(variant, stage)
            lines.append(
                f"{variant:17s} {stage:6s} {b.local:12d} {b.rows:10d} {b.row_bytes / 1e6:9.1f} "
                f"{b.bytes / 1e9:18.1f}"
            )
    return lines


def held(examples: Examples, rows: list[list[int]], budget: Budget, *, workers: int) -> int:
    """The most bytes that this process and its loaders occupy while a slow training loop takes
    batches of LOCAL rows. Because it is slow, all queues fill up."""
    planned = [rows[i % len(rows)] for i in range(STEPS * LOCAL)]
    most, source = 0, loader.HostRows(planned, LOCAL)
    for _ in loader.stream(source, examples, budget, threads=THREADS, workers=workers):
        time.sleep(STEP_SECONDS)
        most = max(most, occupied())
    return most


def occupied() -> int:
    """Bytes in memory of this process and its descendants; shared memory counts once."""
    return sum(map(_proportional, _below("self")))


def _below(process: str) -> list[str]:
    found = [process]
    for file in Path(f"/proc/{process}/task").glob("*/children"):
        try:
            children = file.read_text().split()
        except OSError:
            continue
        for child in children:
            found += _below(child)
    return found


def _proportional(process: str) -> int:
    try:
        lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    except OSError:  # It has ended.
        return 0
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("Pss:"))


def measured(
    examples: Examples, rows: list[list[int]], budget: Budget, *, workers: int
) -> tuple[float, int]:
    """(rows held, rows that the bound allows): the memory of full rows beyond that of rows without
    any budget, in rows."""
    nothing = Budget(length=1, patches=0, chunks=0, targets=1, segments=1)
    base = held(examples, [[]], nothing, workers=workers)
    full = held(examples, rows, budget, workers=workers)
    allowed = loader.most_rows(LOCAL, threads=THREADS, workers=workers)
    return (full - base) / row_bytes(budget), allowed


if __name__ == "__main__":
    print("\n".join(table()))
