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
import functools
import os
import re
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from benchmarks import result
from benchmarks.faults import cost, flips, inputs, machines, outcomes, training
from benchmarks.faults.outcomes import FAILURES, Outcomes
from benchmarks.faults.training import Undisturbed


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a few of each, in about a minute")
    parser.add_argument("--only", default="", help="faults whose name matches")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--share", type=float, default=1.0, help="of the full number of faults")
    flags = parser.parse_args()
    flags.share = 0.02 if flags.quick else flags.share
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        training.serve(folder / "compiled", optimise=not flags.quick)
        rows = {
            fault: timed(fault, run)
            for fault, run in faults(flags, folder).items()
            if re.search(flags.only, fault)
        }
        costs = {} if flags.only else cost.overhead(folder / "cost", 32 if flags.quick else 512)
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
        digest_overhead={name: round(value, 3) for name, value in costs.items()},
        outcomes={name: dict(counts) for name, counts in rows.items()},
    )


def timed(fault: str, run: Callable[[], Outcomes]) -> Outcomes:
    """Runs one kind of fault and prints its outcomes at once, because all kinds take a while."""
    began = time.perf_counter()
    counts = run()
    print(f"{fault}: {dict(counts)} in {time.perf_counter() - began:.0f} s", flush=True)
    return counts


def faults(flags: argparse.Namespace, folder: Path) -> dict[str, Callable[[], Outcomes]]:
    """Every kind of fault by its name."""

    def some(all_of_them: int) -> int:
        return max(1, round(flags.share * all_of_them))

    bits = some(100)
    rng = np.random.default_rng(flags.seed)
    records = training.write_records(folder / "records")

    @functools.cache
    def wanted() -> Undisturbed:
        return training.undisturbed(records, folder / "undisturbed")

    def disks() -> Outcomes:
        return machines.full_disks(records, folder / "full", some(40), rng, wanted())

    def kills(count: int, how: signal.Signals) -> Callable[[], Outcomes]:
        return lambda: machines.kills(records, folder / how.name, count, rng, how, wanted())

    return {
        "bits, checkpoints": lambda: flips.checkpoints(records, folder / "saved", bits, rng),
        "bits, records": lambda: flips.stored_records(records, folder / "read", bits, rng),
        "bits, outlines": lambda: flips.outlines(records, folder / "outlined", bits, rng),
        "bits, exports": lambda: flips.exports(folder / "exported", bits, rng),
        "bits, adapters": lambda: flips.adapters(folder / "adapted", bits, rng),
        "bits, reference": lambda: flips.reference(folder / "reference", bits, rng),
        "bits, pairs": lambda: flips.pairs(folder / "pairs", bits, rng),
        "bits, tokenizer": lambda: flips.tokenizer(records, folder / "words", bits, rng),
        "bits, model.json": lambda: flips.model_file(folder / "model", bits, rng),
        "mutated inputs": lambda: inputs.mutated(records, folder / "in", some(1000), flags.seed),
        "absurd settings": inputs.absurd_settings,
        "full disks": disks,
        "SIGTERM": kills(some(20), signal.SIGTERM),
        "SIGKILL": kills(some(100), signal.SIGKILL),
        "several hosts": lambda: machines.hosts(records, folder / "hosts", some(6), rng),
    }


if __name__ == "__main__":
    main()
