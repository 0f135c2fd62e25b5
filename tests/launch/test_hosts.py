"""The chain on two hosts: real processes that share nothing but a work directory."""

import json

import pytest

from saber_jax.data.records import RecordSource
from saber_jax.runs.files import write_jsonl
from tests.processes import running

pytestmark = pytest.mark.slow

PATIENCE = 600
SHORT = ("--config.steps=4", "--config.checkpoint_every=2", "--config.data.batch_rows=8")


def run(logs, config, root, *settings):
    """The output of both hosts, each with its own four devices."""
    command = ["-m", "launch.chain", f"--config={config}", f"--config.root={root}", *SHORT]
    with running([*command, *settings], logs, count=2) as hosts:
        assert hosts.wait(PATIENCE) == [0, 0], hosts.text()
        return [log.read_text() for log in hosts.logs]


@pytest.fixture(scope="module")
def stage_1(tmp_path_factory):
    root = tmp_path_factory.mktemp("root")
    return root, run(root / "logs", "configs/sft.py:tiny", root)


def commands(said):
    lines = said.splitlines()
    return [line.split()[3] for line in lines if line.startswith("  $ python -m ")]


def test_the_first_host_makes_corpus_and_records_and_both_train_on_them(stage_1):
    root, (first, second) = stage_1
    assert commands(first) == ["data_prep.corpus", "data_prep.build", "saber_jax.main"]
    assert commands(second) == ["saber_jax.main"]
    assert "records: waiting for host 0" in second
    assert len((root / "sft/metrics.jsonl").read_text().splitlines()) == 4
    assert (root / "sft/checkpoints/4").exists()
    # One voice for both, and it counts the devices of both.
    assert "sft 1/4" in first and "sft 1/4" not in second


def test_stage_2_goes_on_from_there_to_the_exported_model_and_the_report(stage_1, tmp_path):
    root, _ = stage_1
    pair = {"chosen": "[video_desc] calm red room", "rejected": "[video_desc] quiet person"}
    source = RecordSource(root / "records", "preference")
    clips = [source[i].clip_id for i in range(16)]
    write_jsonl(tmp_path / "pairs.jsonl", [{"clip_id": clip, **pair} for clip in clips])
    settings = (
        f"--config.data.path={root}/records",
        f"--config.init.checkpoint={root}/sft",
        f"--config.data.pairs={tmp_path}/pairs.jsonl",
        "--config.generation.max_new_tokens=2",
    )
    config, made = "configs/cadpo.py:tiny", tmp_path / "run"
    first, second = run(tmp_path / "logs", config, made, *settings)
    assert commands(second) == ["saber_jax.main", *2 * ["saber_jax.evaluation.run"]]
    assert "--share 2/2" in second and "--share 1/2" in first
    assert "--probes" in second and "--brief" not in second
    steps = ["cadpo", "evaluate_sft", "evaluate_cadpo", "export", "report"]
    shares = [f"{step}.share{n}of2" for step in steps[1:3] for n in (1, 2)]
    assert sorted(p.stem for p in (made / "done").glob("*.json")) == sorted(steps + shares)
    assert json.loads((made / "cadpo/summary.json").read_text())["steps"] == 4
    assert (made / "hf/config.json").exists() and list((made / "hf").glob("*.safetensors"))
    assert (made / "report.html").stat().st_size > 0

    for said in run(tmp_path / "again", config, made, *settings):
        assert "All 5 steps are done (nothing left to do)" in said and not commands(said)
