"""Sampled pairs of real runs of the command: the same on any number of hosts, and after a kill."""

import shutil
import zlib

import jax
import pytest

from data_prep.preferences import __main__ as mining
from data_prep.preferences import offline, sample
from data_prep.preferences.score import Scores
from data_prep.records import dataset
from saber_jax.data import sed
from saber_jax.models import saber
from saber_jax.models.config import saber_config
from saber_jax.runs.files import read_jsonl
from saber_jax.runs.journal import Journal
from saber_jax.train import checkpoint
from tests import synthetic

pytestmark = pytest.mark.slow
CLIPS = 4
FILES = (sample.NAME, "pairs.jsonl", "summary.json")


@pytest.fixture
def mine(tmp_path, tokenizer, monkeypatch):
    """The command, on a network that was never trained. What its answers conclude, and what they
    are worth, is made up from their texts."""
    clips = [synthetic.record(i, words=2) for i in range(CLIPS)]
    dataset.write(tmp_path / "records", {"preference": clips}, lambda record: record)
    shutil.copy(tokenizer.path, tmp_path / "records")
    cfg = saber_config("tiny")
    params = jax.jit(lambda: saber.init(cfg, jax.random.key(0, impl="rbg")))()
    checkpoint.write_model_files(tmp_path / "sed", cfg, tokenizer)
    checkpoint.save_params(tmp_path / "sed", params, cfg)
    monkeypatch.setattr(sample, "unparsable", lambda text: None)
    monkeypatch.setattr(sed, "conclusion", lambda text: f"{zlib.crc32(text.encode()) % 3}")
    monkeypatch.setattr(offline, "score", _made_up)
    monkeypatch.setattr(mining, "FEWEST_PAIRS", 1)
    settings = ("--method", "sample", "--samples", "3", "--max_new_tokens", "6", "--all_clips")

    def run(out, *more):
        places = ("--checkpoint", tmp_path / "sed", "--records", tmp_path / "records")
        flags = [*places, "--out", tmp_path / out, "--batch_size", "1", "--margin", "0"]
        return mining.main([str(flag) for flag in (*flags, *settings, *more)])

    return run


def _made_up(record, text):
    worth = zlib.crc32(text.encode()) % 1000 / 1000
    return Scores(consistency=worth, alignment=worth)


def test_pairs_are_equal_on_1_2_and_4_hosts_and_after_a_kill(mine, tmp_path, monkeypatch):
    assert mine("1") == 0
    want = {name: (tmp_path / "1" / name).read_bytes() for name in FILES}
    assert len(read_jsonl(tmp_path / "1" / "pairs.jsonl")) == CLIPS
    for hosts in (2, 4):
        for host in range(1, hosts + 1):
            assert mine(str(hosts), "--share", f"{host}/{hosts}") == 0
        assert mine(str(hosts)) == 0
        assert {name: (tmp_path / str(hosts) / name).read_bytes() for name in FILES} == want

    append, appended = Journal.append, []

    def dying(self, lines):
        if len(appended) == 2:
            raise KeyboardInterrupt
        appended.append(lines)
        append(self, lines)

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "append", dying)
        with pytest.raises(KeyboardInterrupt):
            mine("killed")
    assert not (tmp_path / "killed" / "pairs.jsonl").exists()
    assert mine("killed") == 0
    assert {name: (tmp_path / "killed" / name).read_bytes() for name in FILES} == want
