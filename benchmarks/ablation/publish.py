"""Publishes an ablation: one file of data, and what docs and reports show of it.

Tables and picture of docs/ablation.md are made from the data that saber_jax carries, so they cannot
differ from it. What the results mean is written by hand, outside the two marked lines.
"""

import datetime
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import result
from benchmarks.ablation import plot
from benchmarks.ablation.arms import ARMS, CADPO, SFT, chain_of
from benchmarks.ablation.compare import table
from saber_jax.evaluation import published
from saber_jax.runs.files import read_json, write_json, write_text

DOCS = Path(__file__).parents[2] / "docs"
BEGIN = "<!-- Written by python -m benchmarks.ablation --publish. -->"
END = "<!-- From here on written by hand. -->"


def data(found: Mapping[str, Any], roots: Sequence[Path]) -> dict[str, Any]:
    """`compare.compared` with what it was measured by: date, device, command, hours, settings."""
    names, seeds = list(found["arms"]), found["seeds"]
    return {
        "date": datetime.date.today().isoformat(),
        "device": result.device(),
        "command": _command(names, seeds, "transfer" in found),
        "hours": round(sum(map(_hours, roots, seeds, [names] * len(roots))), 1),
        "settings": {"sft": published.recipe(SFT), "cadpo": published.recipe(CADPO)},
        **found,
    }


def publish(results: Mapping[str, Any], docs: Path) -> None:
    """Writes the data, docs/ablation.svg and the results in docs/ablation.md.

    Raises ValueError if the lines that mark their place are not there.
    """
    path = docs / "ablation.md"
    text = path.read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(
            f"{path} has to have the lines `{BEGIN}` and `{END}` once each, in this order: the "
            "results are written between them."
        )
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    write_json(published.FILE, results)
    write_text(docs / "ablation.svg", plot.svg(results))
    write_text(path, f"{before}{BEGIN}\n{section(results)}{END}{after}")


def section(results: Mapping[str, Any]) -> str:
    """The part of docs/ablation.md that is made from the data."""
    seeds = ", ".join(map(str, results["seeds"]))
    return (
        f"\n`{results['command']}` on {results['date']}, {results['device']}, seeds {seeds}; all "
        f"steps together took {results['hours']} hours. Percent with 95% intervals:\n\n"
        "![Accuracy of every arm where modalities agree and conflict](ablation.svg)\n\n"
        f"{table(results)}\n"
    )


def _command(names: Sequence[str], seeds: Sequence[int], transfer: bool) -> str:
    """Without the folders, which are of one machine."""
    parts = ["python -m benchmarks.ablation", f"--seeds {len(seeds)}"]
    if seeds[0] != 0:
        parts.append(f"--first_seed {seeds[0]}")
    if names != list(ARMS):
        parts.append(f"--arms {' '.join(names)}")
    return " ".join([*parts, *(("--transfer DIR",) if transfer else ())])


def _hours(root: Path, seed: int, names: Sequence[str]) -> float:
    """Of the steps of one seed, added up."""
    stamps = [root / "done" / f"{step.name}.json" for step in chain_of(root, seed, names)]
    return sum(read_json(stamp)["seconds"] for stamp in stamps if stamp.exists()) / 3600
