"""Does the method work, and which part of it does what? Arms of the tiny recipe, over seeds.

    python -m benchmarks.ablation [--seeds 5] [--arms sample withhold ...] [--quick]

Every seed has a folder, ROOT/seed_N, with its own corpus, and is run by the steps of
launch/chain.py: an interrupted call goes on where it was, and one with more seeds or arms adds
them. A folder that `launch/tpu_run.sh configs/cadpo.py:tiny --config.seed=N --config.root=...` left
is used too. OUT/scores.json and OUT/table.md hold the results; the last line is one JSON object.

Seeds begin at 1, because the recipe was chosen on seed 0. On two quiet cores a seed of all
arms is estimated to take an hour, half of it for the three that train a stage 1 of their own.
"""

import argparse
from pathlib import Path

from benchmarks import result
from benchmarks.ablation.arms import ARMS, QUICK_ARMS, chain_of
from benchmarks.ablation.compare import MAIN, compared, table
from launch import chain
from saber_jax.flags import Parser
from saber_jax.runs.files import write_json, write_text


def main() -> None:
    flags = _flags()
    names = [name for name in ARMS if name in flags.arms]
    seeds = range(flags.first_seed, flags.first_seed + flags.seeds)
    roots = [flags.root / f"seed_{seed}" for seed in seeds]
    for root, seed in zip(roots, seeds, strict=True):
        print(f"\nseed {seed}: {', '.join(names)}", flush=True)
        chain.run(chain_of(root, seed, names, quick=flags.quick), root)
    found = compared(roots, names)
    flags.out.mkdir(parents=True, exist_ok=True)
    write_json(flags.out / "scores.json", {"seeds": list(seeds), **found})
    write_text(flags.out / "table.md", table(found))
    print(table(found), flush=True)
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
        arms={
            name: {measure: round(score["value"], 4) for measure, score in scores.items()}
            for name, scores in found["arms"].items()
        },
        claims={claim["says"]: claim["verdict"] for claim in found["claims"]},
    )


def _flags() -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5, help="how many")
    parser.add_argument("--first_seed", type=int, default=1)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--root", type=Path, help="default: runs/ablation, or runs/ablation_quick")
    parser.add_argument("--out", type=Path, help="folder of the results; default: ROOT")
    parser.add_argument(
        "--quick", action="store_true", help="one seed, 60 clips, 4 steps, the arms of stage 1"
    )
    flags = parser.parse_args()
    if flags.seeds < 1 or flags.first_seed < 0:
        parser.error(
            f"--seeds must be at least 1 and --first_seed at least 0, got {flags.seeds} and "
            f"{flags.first_seed}"
        )
    if flags.quick:
        flags.seeds, flags.arms = 1, QUICK_ARMS
    else:  # What the main claim compares.
        flags.arms = {*flags.arms, MAIN.before, MAIN.after}
    flags.root = flags.root or Path("runs/ablation_quick" if flags.quick else "runs/ablation")
    flags.out = flags.out or flags.root
    return flags


if __name__ == "__main__":
    main()
