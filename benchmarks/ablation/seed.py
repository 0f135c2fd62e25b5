"""Trains and evaluates arms of one seed, which `python -m benchmarks.ablation` does for several.

    python -m benchmarks.ablation.seed --root runs/ablation/seed_1 --seed 1 --arms sed anchored

The same command goes on where an interrupted one was.
"""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from benchmarks.ablation.arms import ARMS, chain_of
from benchmarks.ablation.transfer import Transfer
from launch import chain
from saber_jax.flags import Parser


def command(
    root: Path, seed: int, names: Sequence[str], *, quick: bool, transfer: Transfer | None
) -> tuple[str, ...]:
    """The command line of this module for these arms of a seed."""
    parts = ["python", "-m", "benchmarks.ablation.seed", "--root", str(root), "--seed", str(seed)]
    parts += ["--arms", *names]
    if quick:
        parts.append("--quick")
    if transfer:
        parts += ["--transfer", str(transfer.records), "--transfer_split", transfer.split]
    return tuple(parts)


def main() -> None:
    flags = _flags()
    if flags.cores and hasattr(os, "sched_setaffinity"):  # Linux. Its commands inherit it.
        os.sched_setaffinity(0, flags.cores)
    transfer = Transfer(flags.transfer, flags.transfer_split) if flags.transfer else None
    steps = chain_of(flags.root, flags.seed, flags.arms, quick=flags.quick, transfer=transfer)
    chain.run(steps, flags.root)


def _flags() -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument("--root", type=Path, required=True, help="of this seed")
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--arms", nargs="+", choices=ARMS, required=True)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--transfer", type=Path, help="records of clips from elsewhere")
    parser.add_argument("--transfer_split", default="test")
    parser.add_argument("--cores", type=int, nargs="+", help="the only ones to use")
    return parser.parse_args()


if __name__ == "__main__":
    main()
