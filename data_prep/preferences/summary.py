"""Statistics of mined pairs, to look at before training.

If the chosen answer can be told from length alone, the model will learn to prefer length. So every
group has the mean lengths and how often the longer answer is the chosen one.
"""

import collections
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from data_prep.preferences.score import EVIDENCE
from saber_jax.data import sed

PairLine = Mapping[str, Any]
"""A line of pairs.jsonl."""

MEANINGS = {
    "chosen_characters": "{:6.0f}  characters has a chosen answer on average",
    "rejected_characters": "{:6.0f}  characters has a rejected answer on average",
    "longer_is_chosen": "{:6.0%}  of the pairs: the longer answer is the chosen one",
    "only_reasoning_differs": "{:6.0%}  of the pairs: both answers give the same evidence",
}
"""How the console shows each figure of `about_pairs`."""


def of_pairs(pairs: Sequence[PairLine]) -> dict[str, Any]:
    """Counts and shares of all pairs, by type of conflict and by language."""
    return {
        "pairs": len(pairs),
        "about_pairs": _about(pairs),
        "by_conflict_type": _grouped(pairs, "conflict_type"),
        "by_language": _grouped(pairs, "language"),
        "pairs_by_conflict_type": _counted(pairs, "conflict_type"),
        "pairs_by_language": _counted(pairs, "language"),
    }


def _counted(pairs: Sequence[PairLine], key: str) -> dict[str, int]:
    return dict(sorted(collections.Counter(pair[key] or "unlabelled" for pair in pairs).items()))


def _grouped(pairs: Sequence[PairLine], key: str) -> dict[str, Any]:
    groups: dict[str, list[PairLine]] = collections.defaultdict(list)
    for pair in pairs:
        groups[pair[key] or "unlabelled"].append(pair)
    return {name: {"pairs": len(of), **_about(of)} for name, of in sorted(groups.items())}


def _about(pairs: Sequence[PairLine]) -> dict[str, float | None]:
    """Means over the pairs; None without pairs, or without labels.

    Lengths are in characters. A pair with equal lengths counts as half won by the longer answer.
    """
    longer = [0.5 + 0.5 * _sign(len(pair["chosen"]) - len(pair["rejected"])) for pair in pairs]
    return {
        "chosen_characters": _mean(len(pair["chosen"]) for pair in pairs),
        "rejected_characters": _mean(len(pair["rejected"]) for pair in pairs),
        "longer_is_chosen": _mean(longer),
        "only_reasoning_differs": _mean(float(_same_evidence(pair)) for pair in pairs),
    }


def _same_evidence(pair: PairLine) -> bool:
    one, other = (sed.parse_response(pair[side]) for side in ("chosen", "rejected"))
    return all(one[field].split() == other[field].split() for field in EVIDENCE)


def _sign(number: int) -> int:
    return (number > 0) - (number < 0)


def _mean(values: Iterable[float]) -> float | None:
    values = list(values)
    return round(sum(values) / len(values), 4) if values else None


def ordered(counts: Mapping[str, int], names: Iterable[str]) -> dict[str, int]:
    """The counts that are not zero, in the order of `names`."""
    return {name: counts[name] for name in names if counts.get(name)}
