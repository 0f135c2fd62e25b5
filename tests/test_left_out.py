"""Records that turn out unreadable during a run: it goes on without them and names them."""

import numpy as np
import pytest

from configs import cadpo, sft
from saber_jax import main
from saber_jax.data.records import RecordSource, write_outlines
from saber_jax.inputs import open_inputs
from saber_jax.runs.files import read_jsonl, write_jsonl
from tests.test_main import build_records, compiled_once, config_for, metrics_of, train_until_killed
from tests.torn import tear

__all__ = ["compiled_once"]  # Imported for pytest, which applies it to every test here.


def config_of(module, records, root):
    config = config_for(module, records, root)
    config.data.max_bad_fraction = 0.5
    return config


@pytest.fixture(scope="module")
def bad(tmp_path_factory, tokenizer):
    """Eight records, the last of which cannot even be measured. Two are torn that were measured:
    the first, which TensorBoard would show, and one of the first step. With those two numbers."""
    out = build_records(tmp_path_factory.mktemp("bad"), tokenizer, 8)
    for split in ("train", "preference"):
        tear(out, split, 7)
        write_outlines(RecordSource(out, split))
    planned = open_inputs(config_of(sft, out, out), tmp_path_factory.mktemp("plan"), None).plan
    indices = [0, planned.row(0)[0] % 8]
    for split in ("train", "preference"):
        tear(out, split, *indices)
    assert indices[1]
    return out, indices


def clips(records, split):
    """The clips that could be measured."""
    return [RecordSource(records, split).outline(i).clip_id for i in range(7)]


def named(root, stage):
    return [entry["clip_id"] for entry in read_jsonl(root / stage / "quarantine.jsonl")]


@pytest.fixture(scope="module")
def whole(bad, tmp_path_factory):
    root = tmp_path_factory.mktemp("whole")
    main.train(config_of(sft, bad[0], root))
    return root


def test_a_run_trains_without_torn_records_and_names_them(bad, whole):
    records, torn = bad
    assert metrics_of(whole, "sft")[0]["left_out"] == 1
    assert named(whole, "sft") == [*(clips(records, "train")[i] for i in torn), ""]


def test_a_killed_run_still_knows_their_names(bad, whole, tmp_path, monkeypatch):
    config = config_of(sft, bad[0], tmp_path)
    train_until_killed(config, monkeypatch)
    main.train(config)
    assert metrics_of(tmp_path, "sft") == metrics_of(whole, "sft")
    lists = [read_jsonl(root / "sft/quarantine.jsonl") for root in (tmp_path, whole)]
    assert lists[0] == lists[1]


def test_stage_2_asks_the_reference_about_the_pairs_that_can_be_read(bad, whole):
    records, torn = bad
    clip_ids = clips(records, "preference")
    pair = {"chosen": "[video_desc] calm red room", "rejected": "[video_desc] quiet person"}
    write_jsonl(whole / "pairs.jsonl", [{"clip_id": clip_id, **pair} for clip_id in clip_ids])
    config = config_of(cadpo, records, whole)
    config.data.pairs, config.data.response = str(whole / "pairs.jsonl"), 64
    config.loss.sft = config.loss.anchor = 0.0
    main.train(config)
    first, *_ = lines = metrics_of(whole, "cadpo")
    assert first["loss"] == pytest.approx(np.log(2), abs=1e-4) and len(lines) == 4
    assert named(whole, "cadpo") == [clip_ids[i] for i in torn]
