"""What a finished chain says last."""

import json

from configs import cadpo
from launch import chain, outcome


def score(value: float) -> dict:
    return {"value": value, "interval": [value - 0.1, value + 0.1], "n": 120}


def finished(tmp_path):
    """The steps of a chain, with the files that its final output describes."""
    config = cadpo.get_config("tiny")
    config.root = str(tmp_path)
    for model, right in (("sft", 0.5), ("cadpo", 0.75)):
        folder = tmp_path / "eval" / model
        folder.mkdir(parents=True)
        parts = {"consistent": {"accuracy": score(0.9)}}
        parts["inconsistent"] = {"accuracy": score(right), "dominance": score(0.2)}
        (folder / "scores.json").write_text(json.dumps(parts))
        (folder / "predictions.jsonl").write_text(json.dumps({"clip_id": "test_7"}) + "\n")
    clip = tmp_path / "corpus/clips/test_7.mp4"
    clip.parent.mkdir(parents=True)
    clip.touch()
    return chain.steps(config, "configs/cadpo.py:tiny", ())


def test_the_results_of_both_stages_stand_side_by_side(tmp_path):
    lines = outcome.text(finished(tmp_path)).splitlines()
    assert ["held-out", "clips", "SED", "CA-DPO"] in [line.split() for line in lines]
    (conflict,) = [line for line in lines if line.startswith("right where they conflict")]
    assert "50% (40% to 60%)" in conflict and "75% (65% to 85%)" in conflict


def test_everything_left_is_named_and_three_commands_are_ready_to_type(tmp_path):
    links = finished(tmp_path)
    said = outcome.text(links)
    assert all(link.leaves in said for link in links)
    commands = said.partition("Try next:\n")[2].splitlines()
    assert len(commands) == 3
    assert f"--video {tmp_path}/corpus/clips/test_7.mp4" in commands[0]


def test_a_chain_without_evaluation_still_says_where_everything_is(tmp_path):
    links = [link for link in finished(tmp_path) if link.name in ("corpus", "records", "sft")]
    said = outcome.text(links)
    assert "held-out clips" not in said and f"{tmp_path}/sft" in said
