"""What becomes of a run whose machine fails it: kills, flipped bits, full disks, bad inputs.

    python -m benchmarks.faults [--quick] [--share X] [--only REGEX] [--seed N]

Every fault is made for real: SIGKILL and SIGTERM to processes that train the tiny network, single
bits flipped in what a run, a build or an export left, a tmpfs that fills up, input files mutated by
hypothesis, settings out of range. Each outcome is one of:

    fine        the result is bit for bit the one without the fault
    named       one sentence names the file or the setting; nothing was lost but what it says
    unnamed     an error that does not say where
    silent      another result without a word
    hang        no end within the time that a fault may take
    lost        a restart that did not go on

The last four count as failures, and the goal is none of them. A table is printed, then one JSON
line; docs/reliability.md holds the promises and measured tables. Needs what launch/setup.sh --test
installs.
"""

import argparse
import concurrent.futures
import functools
import os
import re
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from benchmarks import result
from benchmarks.faults import cost, flips, inputs, machines, outcomes, training
from benchmarks.faults.outcomes import FAILURES, Outcomes
from benchmarks.faults.training import Undisturbed

DIGESTS = "cost of digests"
"""What --only has to match for their cost to be measured, which --quick leaves out."""
APART = ("full disks", "SIGTERM", "SIGKILL")
"""Kinds that --quick makes one after another in a thread, beside all others: they train in
processes of their own."""
HOSTS = ("one of 2 hosts", "one of 4 hosts")
"""Kinds that --quick leaves out: hosts that compile take minutes on two cores."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="one or a few of most")
    parser.add_argument("--only", default="", help="faults whose name matches")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--share", type=float, default=1.0, help="of the full number of faults")
    flags = parser.parse_args()
    flags.share = 0.01 if flags.quick else flags.share
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    for how in (signal.SIGINT, signal.SIGTERM):
        signal.signal(how, stop)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        training.serve(folder / "compiled", optimise=not flags.quick)
        kinds = faults(flags, folder).items()
        chosen = {fault: run for fault, run in kinds if re.search(flags.only, fault)}
        rows = all_kinds(chosen, quick=flags.quick)
        measured = not flags.quick and re.search(flags.only, DIGESTS)
        costs = cost.overhead(folder / "cost", cost.one_layer()) if measured else {}
    print(outcomes.table(rows))
    failed = sum(counts[kind] for counts in rows.values() for kind in FAILURES)
    result.finish(
        "faults",
        value=failed,
        unit="faults that were silent, unnamed, endless or lost something",
        goal=0,
        reached=failed == 0,
        correct=failed == 0,
        device=result.device(),
        quick=flags.quick,
        faults=sum(counts.total() - counts["skipped"] for counts in rows.values()),
        digests={name: round(value, 3) for name, value in costs.items()},
        outcomes={name: dict(counts) for name, counts in rows.items()},
    )


def stop(how: int, _: object) -> None:
    """Handles signals: runs end, small disks are unmounted, and temporary files are removed."""
    training.end_all()
    sys.exit(128 + how)


def timed(fault: str, run: Callable[[], Outcomes]) -> Outcomes:
    """Runs one kind of fault and prints its outcomes at once, because all kinds take a while."""
    began = time.perf_counter()
    counts = run()
    print(f"{fault}: {dict(counts)} in {time.perf_counter() - began:.0f} s", flush=True)
    return counts


def all_kinds(kinds: dict[str, Callable[[], Outcomes]], *, quick: bool) -> dict[str, Outcomes]:
    """The outcomes of every kind. With `quick`, kinds that wait for runs of their own do so while
    the others are made in this process."""

    def in_turn(names: Iterable[str]) -> dict[str, Outcomes]:
        return {name: timed(name, kinds[name]) for name in names}

    apart = [name for name in APART if quick and name in kinds]
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(in_turn, apart)
        rows = in_turn(name for name in kinds if name not in apart)
        rows |= waiting.result()
    return {name: rows[name] for name in kinds}


def faults(flags: argparse.Namespace, folder: Path) -> dict[str, Callable[[], Outcomes]]:
    """Every kind of fault by its name."""

    def some(all_of_them: int) -> int:
        return max(1, round(flags.share * all_of_them))

    bits = some(100)
    draw = np.random.default_rng(flags.seed)
    records = training.write_records(folder / "records")

    @functools.cache
    def wanted() -> Undisturbed:
        return training.undisturbed(records, folder / "undisturbed")

    # A generator of its own for every kind: some of them run at the same time.
    def flipped(make: Callable[..., Outcomes], *where: Path) -> Callable[[], Outcomes]:
        return functools.partial(make, *where, bits, *draw.spawn(1))

    def disks(rng: np.random.Generator) -> Outcomes:
        return machines.full_disks(records, folder / "full", some(40), rng, wanted())

    def kills(count: int, how: signal.Signals) -> Callable[[], Outcomes]:
        [rng] = draw.spawn(1)
        return lambda: machines.kills(records, folder / how.name, count, rng, how, wanted())

    def hosts(members: int) -> Callable[[], Outcomes]:
        [rng] = draw.spawn(1)
        place = folder / f"hosts{members}"
        return lambda: machines.hosts(members, records, place, some(4), rng)

    kinds = {
        "bits, checkpoints": flipped(flips.checkpoints, records, folder / "saved"),
        "bits, records": flipped(flips.stored_records, records, folder / "read"),
        "bits, outlines": flipped(flips.outlines, records, folder / "outlined"),
        "bits, exports": flipped(flips.exports, folder / "exported"),
        "bits, adapters": flipped(flips.adapters, folder / "adapted"),
        "bits, reference": flipped(flips.reference, folder / "reference"),
        "bits, pairs": flipped(flips.pairs, folder / "pairs"),
        "bits, tokenizer": flipped(flips.tokenizer, records, folder / "words"),
        "bits, model.json": flipped(flips.model_file, folder / "model"),
        "mutated inputs": lambda: inputs.mutated(records, folder / "in", some(1000), flags.seed),
        "absurd settings": inputs.absurd_settings,
        "full disks": functools.partial(disks, *draw.spawn(1)),
        "SIGTERM": kills(some(20), signal.SIGTERM),
        "SIGKILL": kills(some(100), signal.SIGKILL),
        "one of 2 hosts": hosts(2),
        "one of 4 hosts": hosts(4),
    }
    return {name: kind for name, kind in kinds.items() if not (flags.quick and name in HOSTS)}


if __name__ == "__main__":
    main()
