"""Does the method work, and which part of it does what? Arms of the tiny recipe, over seeds.

    python -m benchmarks.ablation [--seeds 5] [--arms sample withhold ...] [--jobs 2] [--quick]
    python -m benchmarks.ablation --transfer DIR     on records of clips from elsewhere, too
    python -m benchmarks.ablation --publish          to docs/ablation.md and the report of a run

Every seed has a folder, ROOT/seed_N, with its own corpus, and is run by the steps of
launch/chain.py: an interrupted call goes on where it was, and one with more seeds or arms adds
them. A folder that `launch/tpu_run.sh configs/cadpo.py:tiny --config.seed=N --config.root=...` left
is used too. OUT/scores.json, OUT/table.md and OUT/ablation.svg hold the results; the last line is
one JSON object. With --jobs, several seeds run side by side, each on its own cores, and what they
print is in ROOT/seed_N/log.txt.

The recipe was chosen on seeds from 1000 on, and on their training, preference and validation clips
alone.
"""

import argparse
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

from benchmarks import result
from benchmarks.ablation import plot, publish, seed
from benchmarks.ablation.arms import ARMS, QUICK_ARMS, chain_of
from benchmarks.ablation.compare import MAIN, compared, table
from benchmarks.ablation.side_by_side import Job, Runner, stopped
from benchmarks.ablation.transfer import Transfer, remarks
from launch import chain
from saber_jax.evaluation.bootstrap import Score
from saber_jax.flags import Parser
from saber_jax.runs.files import write_json, write_text


def main() -> None:
    flags = _flags()
    names = [name for name in ARMS if name in flags.arms]
    seeds = range(flags.first_seed, flags.first_seed + flags.seeds)
    roots = [flags.root / f"seed_{number}" for number in seeds]
    # Commands share what they compile: arms and seeds differ in their data, not their programs.
    compiled = os.environ.get("JAX_COMPILATION_CACHE_DIR", str(flags.root.absolute() / "compiled"))
    with mock.patch.dict(os.environ, JAX_COMPILATION_CACHE_DIR=compiled):
        _run(flags, roots, seeds, names)
    found = {"seeds": list(seeds), **compared(roots, names, flags.transfer)}
    flags.out.mkdir(parents=True, exist_ok=True)
    write_json(flags.out / "scores.json", found)
    write_text(flags.out / "table.md", table(found))
    write_text(flags.out / "ablation.svg", plot.svg(found))
    print(table(found), flush=True)
    if flags.publish:
        publish.publish(publish.data(found, roots), publish.DOCS)
    about = next((claim for claim in found["claims"] if claim["says"] == MAIN.says), None)
    low, high = about["gain"]["interval"] if about else (0.0, 0.0)
    result.finish(
        "ablation",
        value=round(100 * about["gain"]["value"], 1) if about else None,
        unit="points that CA-DPO gains over SED on conflicting clips",
        goal=100 * MAIN.at_least,
        reached=about is not None and about["verdict"] == "shown",
        device=result.device(),
        quick=flags.quick,
        interval=[round(100 * low, 1), round(100 * high, 1)] if about else None,
        seeds=list(seeds),
        arms=_values(found["arms"]),
        claims=_verdicts(found["claims"]),
        transfer=_brief(found["transfer"]) if flags.transfer else None,
    )


def _run(flags: argparse.Namespace, roots: list[Path], seeds: range, names: list[str]) -> None:
    """Trains and evaluates what is missing; exits if that fails."""
    settings = {"quick": flags.quick, "transfer": flags.transfer}
    if flags.jobs > 1:
        Runner(min(flags.jobs, len(seeds))).run(
            [
                Job(
                    name=f"seed {number}",
                    command=seed.command(root, number, names, **settings),
                    log=root / "log.txt",
                )
                for root, number in zip(roots, seeds, strict=True)
            ]
        )
        return
    for root, number in zip(roots, seeds, strict=True):
        print(f"\nseed {number}: {', '.join(names)}", flush=True)
        try:
            chain.run(chain_of(root, number, names, **settings), root)
        except KeyboardInterrupt:
            stopped()


def _brief(found: Mapping[str, Any]) -> dict[str, Any]:
    return {"arms": _values(found["arms"]), "claims": _verdicts(found["claims"])}


def _values(arms: Mapping[str, Mapping[str, Score]]) -> dict[str, dict[str, float | None]]:
    return {
        name: {
            measure: None if score["value"] is None else round(score["value"], 4)
            for measure, score in scores.items()
        }
        for name, scores in arms.items()
    }


def _verdicts(claims: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    return {claim["says"]: claim["verdict"] for claim in claims}


def _flags() -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5, help="how many")
    parser.add_argument("--first_seed", type=int, default=0)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--jobs", type=int, default=1, help="seeds at a time")
    parser.add_argument("--transfer", type=Path, metavar="DIR", help="records from elsewhere")
    parser.add_argument("--transfer_split", default="test", help="of those records")
    parser.add_argument("--root", type=Path, help="default: runs/ablation, or runs/ablation_quick")
    parser.add_argument("--out", type=Path, help="folder of the results; default: ROOT")
    parser.add_argument(
        "--publish",
        action="store_true",
        help="write the results into docs/ablation.md and the page of a run's report",
    )
    parser.add_argument(
        "--quick", action="store_true", help=f"one seed, 60 clips, 4 steps, {', '.join(QUICK_ARMS)}"
    )
    flags = parser.parse_args()
    if flags.seeds < 1 or flags.first_seed < 0 or flags.jobs < 1:
        parser.error(
            "--seeds and --jobs must be at least 1 and --first_seed at least 0, got "
            f"{flags.seeds}, {flags.jobs} and {flags.first_seed}"
        )
    if flags.publish and (flags.quick or flags.seeds < 2):
        parser.error("--publish needs two seeds or more, because one has no spread, and no --quick")
    if flags.quick:
        flags.seeds, flags.arms = 1, QUICK_ARMS
    else:  # What the main claim compares.
        flags.arms = {*flags.arms, *MAIN.before, MAIN.after}
    flags.root = flags.root or Path("runs/ablation_quick" if flags.quick else "runs/ablation")
    flags.out = flags.out or flags.root
    if flags.transfer:
        flags.transfer = _transfer(parser, flags)
    return flags


def _transfer(parser: Parser, flags: argparse.Namespace) -> Transfer:
    """Checked now, because scores are hours away."""
    transfer = Transfer(flags.transfer, flags.transfer_split)
    try:
        about = transfer.about
    except (FileNotFoundError, ValueError) as error:
        parser.error(f"--transfer: {error}")
    total = about["consistent"] + about["conflicting"]
    print(f"{total} clips from elsewhere, {about['conflicting']} of which conflict.", flush=True)
    for sentence in remarks(about):
        print(sentence, flush=True)
    return transfer


if __name__ == "__main__":
    main()
