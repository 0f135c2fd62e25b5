"""The command as a whole, over results that are there already."""

import dataclasses
import json
import sys

import pytest

from benchmarks.ablation import __main__ as ablation
from benchmarks.ablation import arms, publish
from benchmarks.ablation.transfer import Transfer
from data_prep.records import dataset
from launch.chain import PREEMPTED
from saber_jax.evaluation import published
from saber_jax.runs.files import read_json
from tests import synthetic
from tests.benchmarks.ablation import answers


@pytest.fixture
def finished(tmp_path, monkeypatch):
    """Two seeds of three arms in tmp_path/runs, evaluated on tmp_path/acted/records too."""
    acted = Transfer(tmp_path / "acted/records")
    labels = {"emotion": "sorrow", "face": "happy", "voice": "sad", "words": "sad"}
    clip = dataclasses.replace(synthetic.record(0), labels=labels)
    dataset.write(acted.records, {"test": range(1)}, lambda _: clip)
    synthetic.tokenizer(acted.records)
    for seed in (1, 2):
        root = tmp_path / "runs" / f"seed_{seed}"
        for name, right in {"sed": 20, "more_sft": 20, "anchored": 34}.items():
            answers.answered(arms.scores_of(root, name), right + seed)
            answers.answered(acted.scores_of(root, name), right - seed, probes=False)
    monkeypatch.setattr(ablation.chain, "run", lambda steps, root: None)
    monkeypatch.setattr(published, "FILE", tmp_path / "ablation.json")
    monkeypatch.setattr(publish, "DOCS", tmp_path)
    (tmp_path / "ablation.md").write_text(f"{publish.BEGIN}\n{publish.END}\n")
    return tmp_path


def test_one_call_leaves_tables_picture_and_data_and_ends_with_one_line(
    finished, monkeypatch, capsys
):
    typed = ["--root", finished / "runs", "--out", finished / "out", "--seeds", "2", "--publish"]
    typed += ["--first_seed", "1"]
    typed += ["--arms", "more_sft", "--transfer", finished / "acted/records"]
    monkeypatch.setattr(sys, "argv", ["ablation", *map(str, typed)])
    with pytest.raises(SystemExit) as ended:
        ablation.main()
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    # The main claim's arms are there without being asked for.
    assert list(last["arms"]) == ["sed", "more_sft", "anchored"] == list(last["transfer"]["arms"])
    assert (last["value"], last["ok"], ended.value.code) == (35.0, True, 0)
    scores = read_json(finished / "out/scores.json")
    assert scores["transfer"]["records"] == "acted/records"
    assert read_json(published.FILE)["transfer"] == scores["transfer"]
    assert "--transfer DIR" in (finished / "ablation.md").read_text()
    written = {path.name for path in (finished / "out").iterdir()}
    assert written == {"scores.json", "table.md", "ablation.svg"}


def test_ctrl_c_ends_one_seed_at_a_time_without_a_traceback(tmp_path, monkeypatch, capsys):
    def interrupted(steps, root):
        raise KeyboardInterrupt

    monkeypatch.setattr(ablation.chain, "run", interrupted)
    monkeypatch.setattr(sys, "argv", ["ablation", "--root", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        ablation.main()
    assert ended.value.code == PREEMPTED
    assert "goes on from here" in capsys.readouterr().err
