"""What the arms score, and which of the method's claims that shows."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.ablation import intervals
from benchmarks.ablation.arms import ARMS, MORE_SFT, scores_of
from benchmarks.ablation.intervals import Counts
from benchmarks.ablation.transfer import Transfer, remarks
from saber_jax.data import sed, speech
from saber_jax.evaluation import saber_test
from saber_jax.evaluation.bootstrap import Score
from saber_jax.runs.files import read_jsonl

Row = dict[str, Any]


class Answers:
    """An arm's answers to the test clips of one seed, as they are, without and with another sound.

    `scores` is a folder that saber_jax.evaluation.run wrote, with --probes where the sound matters.
    All three list the same clips in the same order.
    """

    def __init__(self, scores: Path):
        self._scores = scores

    @functools.cached_property
    def plain(self) -> list[Row]:
        return read_jsonl(self._scores / "predictions.jsonl")

    @functools.cached_property
    def muted(self) -> list[Row]:
        return read_jsonl(self._scores / "probes" / "audio_muted" / "predictions.jsonl")

    @functools.cached_property
    def swapped(self) -> list[Row]:
        return read_jsonl(self._scores / "probes" / "audio_swapped" / "predictions.jsonl")


def _those(rows: Sequence[Row], agree: bool) -> list[Row]:
    return [row for row in rows if saber_test.is_consistent(row["labels"]) == agree]


def _rate(values: np.ndarray) -> Counts:
    return np.stack([values.astype(float), np.ones(len(values))], axis=1)


def _moved(answers: Answers, changed: Sequence[Row]) -> Counts:
    pairs = zip(answers.plain, changed, strict=True)
    return _rate(np.array([a["conclusion"] != b["conclusion"] for a, b in pairs]))


def _word_errors(answers: Answers) -> Counts:
    counts = []
    for row in answers.plain:
        if row["language"] == "en":
            said = sed.parse_response(row["response"])["speech_content"]
            counts.append(speech.errors(row["annotation"]["speech_content"], said, "en"))
    return np.array(counts, float).reshape(-1, 2)


MEASURES: dict[str, Callable[[Answers], Counts]] = {
    "consistent": lambda a: _rate(saber_test.correct(_those(a.plain, True))),
    "conflicting": lambda a: _rate(saber_test.correct(_those(a.plain, False))),
    "dominance": lambda a: _rate(
        saber_test.follows(_those(a.plain, False), *saber_test.MODALITIES)
    ),
    "moved_muted": lambda a: _moved(a, a.muted),
    "moved_swapped": lambda a: _moved(a, a.swapped),
    "word_error_rate": _word_errors,
}
"""Accuracy on clips whose modalities agree, and conflict; how often one modality alone decides a
conflicting clip wrongly; how often the conclusion changes when the sound is silenced, or is another
clip's; and the word error rate of English speech."""

PROBED = ("moved_muted", "moved_swapped")
"""Measures that need probes, which clips from elsewhere are not evaluated with."""
ACCURACIES = ("consistent", "conflicting")
"""Of these, the value of every seed is kept too."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Claim:
    """`after` lies more than `at_least` above `share` times every arm of `before`, or below it with
    `falls`."""

    says: str
    measure: str
    before: tuple[str, ...]
    after: str
    at_least: float = 0.0
    share: float = 1.0
    falls: bool = False

    def verdict(self, gained: Score, seeds: int) -> str:
        """ "shown" or "refuted" if the whole interval says so, else "open"; of one seed "one seed",
        because its interval does not know how far seeds differ."""
        if seeds < 2:
            return "one seed"
        # Rounded: a share of clips such as 12 of 120 is not exactly the 0.1 that it stands for.
        low, high = (round(bound, 9) for bound in gained["interval"])
        if self.falls:
            low, high = -high, -low
        if low > self.at_least:
            return "shown"
        return "refuted" if high < self.at_least else "open"

    def judged(self, gains: Mapping[str, Score], seeds: int) -> dict[str, Any]:
        """The claim with its "gain" and "verdict", given the gain over each arm of `before`.

        It is shown if it is shown against every one of them, and refuted if it is against any. The
        gain is the one over the strongest.
        """
        verdicts = {self.verdict(gain, seeds) for gain in gains.values()}
        verdict = next(v for v in ("one seed", "refuted", "open", "shown") if v in verdicts)
        sign = -1 if self.falls else 1
        strongest = min(gains, key=lambda name: sign * gains[name]["value"])
        return dataclasses.asdict(self) | {
            "before": list(self.before),
            "strongest": strongest,
            "gain": gains[strongest],
            "verdict": verdict,
        }


MAIN = Claim(
    says="CA-DPO gains at least 10 points over SED where modalities conflict",
    measure="conflicting",
    before=("sed",),
    after="anchored",
    at_least=0.10,
)
CLAIMS = (
    Claim(
        says="evidence before the conclusion beats the label alone",
        measure="conflicting",
        before=("label_only",),
        after="sed",
    ),
    Claim(
        says="evidence before the reasoning beats evidence after it",
        measure="conflicting",
        before=("reason_first",),
        after="sed",
    ),
    MAIN,
    Claim(
        says="CA-DPO loses at most 1 point where modalities agree",
        measure="consistent",
        before=("sed",),
        after="anchored",
        at_least=-0.01,
    ),
    Claim(
        says="without the SFT term and the anchor it loses more there",
        measure="consistent",
        before=("withhold",),
        after="anchored",
    ),
    Claim(
        says="CA-DPO at least halves the answers that one modality dominates",
        measure="dominance",
        before=("sed",),
        after="anchored",
        share=0.5,
        falls=True,
    ),
    Claim(
        says="CA-DPO takes more from the sound",
        measure="moved_swapped",
        before=("sed",),
        after="anchored",
    ),
    Claim(
        says="CA-DPO beats as many more SFT steps, at either learning rate",
        measure="conflicting",
        before=MORE_SFT,
        after="anchored",
    ),
    *(
        Claim(says=says, measure="conflicting", before=(before,), after=after)
        for says, before, after in (
            ("mined pairs beat random negatives under the same loss", "random", "withhold"),
            ("sampled pairs beat SED under the paper's loss", "sed", "sample"),
            ("pairs by withholding beat SED under the paper's loss", "sed", "withhold"),
            ("pairs by withholding beat sampled pairs", "sample", "withhold"),
            ("the SFT term and the anchor help", "withhold", "anchored"),
            ("the conditional terms help", "anchored", "conditional"),
        )
    ),
)


def compared(
    roots: Sequence[Path], names: Sequence[str], transfer: Transfer | None = None
) -> dict[str, Any]:
    """{"arms": {name: {measure: score}}, "by_seed": {name: {measure: values}}, "by_conflict":
    {name: {type: accuracy}}, "claims": [...]} over the seeds that lie in `roots`; the same of clips
    from elsewhere as "transfer".

    Raises ValueError if two arms of one seed were not asked about the same clips.
    """
    found = _compared({name: [scores_of(root, name) for root in roots] for name in names})
    if transfer:
        folders = {name: [transfer.scores_of(root, name) for root in roots] for name in names}
        found["transfer"] = {**transfer.about, **_compared(folders, elsewhere=True)}
    return found


def _compared(folders: Mapping[str, Sequence[Path]], *, elsewhere: bool = False) -> dict[str, Any]:
    """`folders` are those of every seed, by arm."""
    answers = {name: list(map(Answers, own)) for name, own in folders.items()}
    _refuse_other_clips(folders, answers)
    measures = {name: of for name, of in MEASURES.items() if not (elsewhere and name in PROBED)}
    counts = {
        name: {measure: [of(one) for one in own] for measure, of in measures.items()}
        for name, own in answers.items()
    }
    return {
        "arms": {
            name: {
                measure: intervals.estimate(seeds, shared=elsewhere)
                for measure, seeds in own.items()
            }
            for name, own in counts.items()
        },
        "by_seed": {
            name: {measure: list(map(intervals.value, own[measure])) for measure in ACCURACIES}
            for name, own in counts.items()
        },
        "by_conflict": {name: _by_conflict(own, shared=elsewhere) for name, own in answers.items()},
        "claims": [
            _claimed(claim, counts, shared=elsewhere) for claim in CLAIMS if _known(claim, counts)
        ],
    }


def _by_conflict(answers: Sequence[Answers], *, shared: bool) -> dict[str, Score]:
    """Accuracy on the conflicting clips of each type."""
    seeds = [_those(each.plain, False) for each in answers]
    kinds = sorted({saber_test.conflict_type(row) for rows in seeds for row in rows})
    found = {}
    for kind in kinds:
        chosen = [[r for r in rows if saber_test.conflict_type(r) == kind] for rows in seeds]
        found[kind] = intervals.estimate(
            [_rate(saber_test.correct(rows)) for rows in chosen], shared=shared
        )
    return found


def _refuse_other_clips(
    folders: Mapping[str, Sequence[Path]], answers: Mapping[str, Sequence[Answers]]
) -> None:
    first = next(iter(answers))
    for name, own in answers.items():
        for seed, pair in enumerate(zip(answers[first], own, strict=True)):
            one, other = ([row["clip_id"] for row in each.plain] for each in pair)
            if one != other:
                raise ValueError(
                    f"{folders[name][seed]} and {folders[first][seed]} hold answers to other "
                    "clips. Delete the older of the two and run the ablation again."
                )


def _known(claim: Claim, counts: Mapping[str, Mapping[str, list[Counts]]]) -> bool:
    """Whether all of its arms are there, and clips that it can be judged by."""
    for arm in (*claim.before, claim.after):
        seeds = counts.get(arm, {}).get(claim.measure)
        if not seeds or not all(map(len, seeds)):
            return False
    return True


def _claimed(
    claim: Claim, counts: Mapping[str, Mapping[str, list[Counts]]], *, shared: bool
) -> dict[str, Any]:
    after = counts[claim.after][claim.measure]
    gains = {
        name: intervals.gain(counts[name][claim.measure], after, share=claim.share, shared=shared)
        for name in claim.before
    }
    return claim.judged(gains, seeds=len(after))


def table(found: Mapping[str, Any]) -> str:
    """Tables in Markdown: what every arm scores, also by type of conflict, and what became of every
    claim; then the same of clips from elsewhere, if there are any."""
    lines = _tables(found)
    if about := found.get("transfer"):
        lines += [
            "",
            f"Clips from elsewhere, of `{about['records']}`, split {about['split']}: "
            f"{about['consistent']} agree and {about['conflicting']} conflict. "
            + " ".join(remarks(about)),
            "",
            *_tables(about),
        ]
    return "\n".join(line.rstrip() for line in lines) + "\n"


def _tables(found: Mapping[str, Any]) -> list[str]:
    lines = [*_scores_table(found["arms"], explained=True), ""]
    types = next(iter(found["by_conflict"].values()))
    if len(types) > 1:
        lines += ["Accuracy by type of conflict:", "", *_scores_table(found["by_conflict"]), ""]
    return lines + _claims_table(found["claims"])


def _scores_table(arms: Mapping[str, Mapping[str, Score]], *, explained: bool = False) -> list[str]:
    heads = ("arm", *(name.replace("_", " ") for name in next(iter(arms.values()))))
    lines = [_row(heads), _row(["---"] * len(heads))]
    for name, scores in arms.items():
        arm = f"`{name}`: {ARMS[name].says}" if explained else f"`{name}`"
        lines.append(_row((arm, *map(_percent, scores.values()))))
    return lines


def _claims_table(claims: Sequence[Mapping[str, Any]]) -> list[str]:
    heads = ("claim", "arms", "measure", "difference, points", "")
    lines = [_row(heads), _row(["---"] * len(heads))]
    for claim in claims:
        half = "half of " if claim["share"] == 0.5 else ""
        arms = f"`{claim['after']}` - {half}`{claim['strongest']}`"
        measure = claim["measure"].replace("_", " ")
        difference = _percent(claim["gain"], sign="+")
        lines.append(_row((claim["says"], arms, measure, difference, claim["verdict"])))
    return lines


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _percent(score: Score, sign: str = "") -> str:
    if score["value"] is None:
        return "\N{EN DASH}"
    low, high = (100 * bound for bound in score["interval"])
    return f"{100 * score['value']:{sign}.1f} ({low:.1f} to {high:.1f})"
