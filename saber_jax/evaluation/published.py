"""The published ablation of the tiny recipe, which a run's report shows beside its own result.

`python -m benchmarks.ablation --publish` writes ablation.json. One run is one seed, and says little
about another one; the ablation says how far seeds differ.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from saber_jax.evaluation.bootstrap import Score
from saber_jax.runs.files import read_json
from saber_jax.runs.identity import identity
from saber_jax.runs.manifest import digest

FILE = Path(__file__).with_name("ablation.json")
ARMS = {"sft": "sed", "cadpo": "anchored"}
"""The arm of the ablation that a stage of the tiny chain is."""
OF_A_RUN = ("seed", "init.checkpoint", "data.path", "data.pairs")
NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Beside:
    """What the page shows: the seeds in words, and for each kind of clip a title, CA-DPO's score
    and its gain over SED, in this run and over those seeds."""

    seeds: str
    other_settings: bool
    date: str
    lines: Sequence[Mapping[str, Any]]


def recipe(config: ConfigDict | Mapping[str, Any]) -> str:
    """A digest of the settings that are not of one run; `config` may be read from JSON."""
    plain = config if isinstance(config, ConfigDict) else dict(config)
    return digest({k: v for k, v in identity(plain).items() if k not in OF_A_RUN})


def beside(
    cards: Sequence[Mapping[str, Any]], configs: Mapping[str, Mapping[str, Any]]
) -> Beside | None:
    """The published ablation beside a run; None if there is none.

    `cards` are those of report_tables, the first two of which are accuracies, from SED to CA-DPO;
    `configs` are the settings of the run's stages.
    """
    if not FILE.exists():
        return None
    found = read_json(FILE)
    seeds = [config["seed"] for config in configs.values() if "seed" in config]
    lines = []
    for card, measure in zip(cards, ("consistent", "conflicting"), strict=False):
        lines.append(
            {
                "name": card["name"],
                "own": card["values"][-1],
                "own_gain": card["gain"],
                "others": found["arms"][ARMS["cadpo"]][measure],
                "others_gain": _gain(found, measure),
            }
        )
    return Beside(
        seeds=_in_words(found["seeds"], seeds),
        other_settings=any(recipe(configs[stage]) != found["settings"][stage] for stage in configs),
        date=found["date"],
        lines=lines,
    )


def _gain(found: Mapping[str, Any], measure: str) -> Score | None:
    """CA-DPO's over SED, as one of the claims has it."""
    for claim in found["claims"]:
        arms = (tuple(claim["before"]), claim["after"])
        if arms == ((ARMS["sft"],), ARMS["cadpo"]) and claim["measure"] == measure:
            return claim["gain"]
    return None


def _in_words(seeds: Sequence[int], own: Sequence[int]) -> str:
    count = NUMBERS[len(seeds)] if len(seeds) < len(NUMBERS) else str(len(seeds))
    return (
        f"{count} seeds, this one among them" if set(own) & set(seeds) else f"{count} other seeds"
    )
