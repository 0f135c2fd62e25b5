import json

import pytest

from data_prep.preferences import __main__ as mining
from data_prep.preferences import offline, sample, withhold
from saber_jax.data import sed
from saber_jax.data.pairs import read_pairs
from saber_jax.data.records import FIELDS
from tests.data_prep.preferences.clips import RECORDS, Model


class _Generator:
    """Stands in for the trained model behind the command line."""

    reserve = staticmethod(lambda sizes: None)
    respond_batches = staticmethod(Model())


@pytest.fixture
def command(tmp_path, monkeypatch):
    fingerprints = {"sed": "1"}
    monkeypatch.setattr(mining, "RecordSource", lambda path, split: RECORDS)
    monkeypatch.setattr(mining, "load_generator", lambda *_, **__: _Generator)
    monkeypatch.setattr(mining, "model_fingerprint", lambda path: fingerprints[path.name])
    monkeypatch.setattr(mining, "fingerprint", lambda *_: "records")

    def run(*more, checkpoint="sed"):
        fingerprints.setdefault(checkpoint, "2")
        flags = ["--checkpoint", checkpoint, "--records", "r", "--out", str(tmp_path / "out")]
        return mining.main([*flags, *more])

    return run


def test_the_command_leaves_pairs_that_training_reads_and_then_does_nothing(
    command, tmp_path, monkeypatch, capsys
):
    assert command() == 0
    pairs = read_pairs(tmp_path / "out")
    assert len(pairs) == 8
    assert pairs[0].chosen == sed.target_text(RECORDS[0].annotation)
    lines = (tmp_path / "out" / "pairs.jsonl").read_text().splitlines()
    assert set(json.loads(lines[0])) == set(withhold.PAIR_KEYS)
    monkeypatch.setattr(mining, "load_generator", None)
    assert command() == 0
    said = capsys.readouterr().out
    assert said.count("8 pairs from 8 answers") == 2
    assert said.count("of the pairs: the longer answer is the chosen one") == 2


def test_another_checkpoint_in_the_same_folder_is_refused(command, capsys):
    command()
    assert command(checkpoint="other") == 1
    assert "checkpoint: 1 there, 2 here" in capsys.readouterr().err


def test_shares_of_several_hosts_join_into_the_run_of_one(tmp_path, command, monkeypatch, capsys):
    settings, out = ("--batch_size", "3"), tmp_path / "out"
    assert command(*settings) == 0
    whole = {name: (out / name).read_bytes() for name in ("decisions.jsonl", "pairs.jsonl")}
    out.rename(tmp_path / "whole")
    # Two hosts began, and were started again as three.
    assert command(*settings, "--share", "1/2") == 0
    for share in ("3/3", "1/3"):
        assert command(*settings, "--share", share) == 0
    assert not (out / "pairs.jsonl").exists()
    assert command(*settings) == 1
    assert "2/2 (0 of 3 answers), 2/3 (0 of 3 answers)" in capsys.readouterr().err
    assert command(*settings, "--share", "2/3") == 0
    monkeypatch.setattr(mining, "load_generator", lambda *_, **__: pytest.fail("asked again"))
    assert command(*settings) == 0
    assert {name: (out / name).read_bytes() for name in whole} == whole


def test_too_few_pairs_fail_with_advice(command, capsys):
    assert command("--limit", "2") == 1
    assert "4 pairs are too few" in capsys.readouterr().err


class _Drawing:
    """Stands in for the trained model: four answers, of which one follows from its evidence."""

    reserve = staticmethod(lambda sizes: None)

    @staticmethod
    def sample_batches(batches, samples, *, sampling):
        assert (samples, sampling.temperature, sampling.seed) == (4, 0.8, 0)
        for _, part in batches:
            yield [[_said(word) for word in ("happy", "sad", "angry", "sorrow")] for _ in part]


def _said(word):
    cues = {"facial_exp_desc": "He cries.", "acoustic_feat": "He sobs."}
    texts = dict.fromkeys(FIELDS, "text") | cues
    return sed.target_text(texts | {"sentiment_analysis": f"Face and voice agree: {word}."})


def test_sampled_pairs_are_what_training_reads_and_another_margin_asks_for_nothing(
    command, tmp_path, monkeypatch
):
    monkeypatch.setattr(mining, "load_generator", lambda *_, **__: _Drawing)
    settings = ("--method", "sample", "--samples", "4", "--all_clips")
    assert command(*settings) == 1  # One pair of each of five clips is too few.
    pairs = read_pairs(tmp_path / "out")
    assert [(p.chosen, p.rejected) for p in pairs] == [(_said("sad"), _said("happy"))] * 5
    monkeypatch.setattr(mining, "load_generator", lambda *_, **__: pytest.fail("asked again"))
    assert command(*settings, "--margin", "0.2", "--pairs_per_clip", "2") == 0
    assert len(read_pairs(tmp_path / "out")) == 10
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert (summary["method"], summary["scorer"]) == ("sample", offline.VERSION)
    assert summary["decisions"] == {sample.KEPT: 5}


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (("--method", "sample", "--samples", "1"), "--samples of at least 2"),
        (
            ("--method", "sample", "--seed", str(2**32)),
            "seed must be at least 0 and below",
        ),
        (("--method", "sample", "--top_p", "0"), "top_p in"),
        (("--method", "sample", "--temperature", "0"), "a --temperature above 0"),
        (("--scorer", "judge"), "needs --judge URL and --judge_model NAME"),
        (("--judge", "http://localhost"), "are for --scorer judge"),
        (("--margin", "-1"), "--margin must be at least 0"),
    ],
)
def test_settings_that_could_not_make_a_pair_are_refused(command, capsys, typed, said):
    with pytest.raises(SystemExit):
        command(*typed)
    assert said in capsys.readouterr().err
