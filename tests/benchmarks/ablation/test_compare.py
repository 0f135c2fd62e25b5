"""What is said about the arms' scores."""

from pathlib import Path
from typing import Any

import pytest

from benchmarks.ablation import compare
from benchmarks.ablation.arms import ARMS, scores_of
from saber_jax.runs.files import read_jsonl, write_jsonl
from tests.benchmarks.ablation import answers
from tests.benchmarks.ablation.answers import CLIPS


def answered(root: Path, name: str, right: int) -> None:
    answers.answered(scores_of(root, name), right)


def claims(found: dict[str, Any]) -> dict[tuple[str, str, str], dict[str, Any]]:
    return {("/".join(c["before"]), c["after"], c["measure"]): c for c in found["claims"]}


def test_claims_are_about_arms_and_measures_that_there_are():
    for claim in compare.CLAIMS:
        assert {*claim.before, claim.after} <= ARMS.keys() and claim.measure in compare.MEASURES


def test_arms_are_scored_and_claims_judged_over_both_seeds(tmp_path):
    roots = [tmp_path / "seed_1", tmp_path / "seed_2"]
    for root in roots:
        answered(root, "sed", 10)
        answered(root, "anchored", CLIPS)
        answered(root, "more_sft", 12)
        answered(root, "more_sft_fast", 38)
    found = compare.compared(roots, ["sed", "more_sft", "more_sft_fast", "anchored"])
    sed = found["arms"]["sed"]
    assert sed["conflicting"]["value"] == sed["consistent"]["value"] == 0.25
    assert sed["dominance"]["value"] == 0.75
    assert sed["moved_muted"]["value"] == 0.25
    assert sed["word_error_rate"]["value"] == pytest.approx(0.375)
    assert found["by_seed"]["anchored"]["conflicting"] == [1.0, 1.0]
    judged = claims(found)
    assert judged["sed", "anchored", "conflicting"]["verdict"] == "shown"
    assert judged["sed", "anchored", "dominance"]["verdict"] == "shown"
    # Shown against one of the two, and not against the stronger.
    more = judged["more_sft/more_sft_fast", "anchored", "conflicting"]
    assert (more["strongest"], more["verdict"]) == ("more_sft_fast", "open")
    assert more["gain"]["value"] == pytest.approx(0.05)
    text = compare.table(found)
    assert "| 25.0 (" in text and "| shown |" in text and "random" not in text


def two_seeds(folder: Path, **right: int) -> dict[str, Any]:
    """What is found where every arm is right about the first `right` clips of both seeds."""
    roots = [folder / "seed_1", folder / "seed_2"]
    for root in roots:
        for name, count in right.items():
            answered(root, name, count)
    return compare.compared(roots, list(right))


def test_a_claim_whose_whole_interval_lies_below_is_refuted(tmp_path):
    judged = claims(two_seeds(tmp_path, sed=CLIPS, anchored=4))
    assert {claim["verdict"] for claim in judged.values()} == {"refuted"}


def test_equal_arms_show_nothing(tmp_path):
    found = claims(two_seeds(tmp_path, withhold=20, anchored=20))
    assert len(found) == 2
    assert {(claim["gain"]["value"], claim["verdict"]) for claim in found.values()} == {(0, "open")}


def test_a_gain_of_just_what_is_claimed_is_open():
    score = {"value": 0.1, "interval": [0.3 - 0.2, 0.2]}
    assert compare.MAIN.verdict(score, seeds=2) == "open"
    assert compare.MAIN.verdict(score | {"interval": [0.0, 0.3 - 0.2]}, seeds=2) == "open"


def test_a_claim_about_several_arms_is_shown_only_against_all_of_them():
    claim = compare.Claim(says="", measure="", before=("a", "b"), after="c")
    ahead, even, behind = ({"value": v, "interval": [v - 0.1, v + 0.1]} for v in (0.2, 0.0, -0.2))
    for gains, verdict in (
        ((ahead, ahead), "shown"),
        ((ahead, even), "open"),
        ((ahead, behind), "refuted"),
    ):
        judged = claim.judged(dict(zip("ab", gains, strict=True)), seeds=2)
        assert (judged["verdict"], judged["gain"]) == (verdict, gains[1])


def test_one_seed_settles_nothing(tmp_path):
    answered(tmp_path, "sed", 4)
    answered(tmp_path, "anchored", CLIPS)
    found = compare.compared([tmp_path], ["sed", "anchored"])
    assert {claim["verdict"] for claim in found["claims"]} == {"one seed"}


def test_arms_that_answered_other_clips_are_refused(tmp_path):
    answered(tmp_path, "sed", 4)
    answered(tmp_path, "anchored", 4)
    path = scores_of(tmp_path, "anchored") / "predictions.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(ValueError, match="other clips"):
        compare.compared([tmp_path], ["sed", "anchored"])


def test_accuracy_is_split_by_type_of_conflict_where_there_are_several(tmp_path):
    answered(tmp_path, "sed", 20)
    found = compare.compared([tmp_path], ["sed"])
    assert found["by_conflict"]["sed"]["masking"] == found["arms"]["sed"]["conflicting"]
    assert "type of conflict" not in compare.table(found)
    path = scores_of(tmp_path, "sed") / "predictions.jsonl"
    rows = read_jsonl(path)
    for row in rows[1:10:2]:  # The first five conflicts, all right.
        row["labels"]["conflict_type"] = "sarcasm"
    write_jsonl(path, rows)
    found = compare.compared([tmp_path], ["sed"])
    by_type = {kind: score["value"] for kind, score in found["by_conflict"]["sed"].items()}
    assert by_type == {"masking": pytest.approx(1 / 3), "sarcasm": 1.0}
    assert "| arm | masking | sarcasm |" in compare.table(found)
