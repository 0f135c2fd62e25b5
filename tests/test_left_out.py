"""Records that turn out unreadable during a run: it goes on without them and names them."""

import pytest

from configs import sft
from saber_jax import main
from saber_jax.data.records import RecordSource
from saber_jax.runs.files import read_jsonl
from tests.test_main import build_records, compiled_once, config_for, metrics_of
from tests.torn import tear

__all__ = ["compiled_once"]  # Imported for pytest, which applies it to every test here.

TORN = 0
"""The first record, which is also one of those that TensorBoard shows."""


@pytest.fixture(scope="module")
def torn(tmp_path_factory, tokenizer):
    out = build_records(tmp_path_factory.mktemp("torn"), tokenizer, 8)
    for split in ("train", "preference"):
        tear(out, split, TORN)
    return out


def config_of(module, records, root):
    config = config_for(module, records, root)
    config.data.max_bad_fraction = 0.25
    return config


def named(root, stage):
    """The clips of quarantine.jsonl by their index."""
    entries = read_jsonl(root / stage / "quarantine.jsonl")
    return {entry["index"]: entry["clip_id"] for entry in entries}


@pytest.fixture(scope="module")
def whole(torn, tmp_path_factory):
    root = tmp_path_factory.mktemp("whole")
    main.train(config_of(sft, torn, root))
    return root


def test_a_run_trains_without_a_torn_record_although_it_is_the_first(torn, whole):
    assert sum(line["left_out"] for line in metrics_of(whole, "sft")) == 1
    assert named(whole, "sft") == {TORN: RecordSource(torn, "train").outline(TORN).clip_id}
