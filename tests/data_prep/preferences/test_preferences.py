import json

import numpy as np
import pytest

from data_prep.preferences import __main__ as preferences
from saber_jax.data import sed
from saber_jax.data.pairs import read_pairs
from saber_jax.data.records import FIELDS, Record
from saber_jax.runs.files import read_jsonl
from saber_jax.runs.journal import Journal

SARCASM = {"emotion": "contempt", "face": "happy", "voice": "angry", "conflict_type": "sarcasm"}


def _record(clip_id="clip", labels=SARCASM, ending="contempt", samples=160, frames=2):
    return Record(
        clip_id=clip_id,
        language="en",
        frames=np.zeros((frames, 28, 28, 3), np.uint8),
        seconds_per_grid=0.5,
        audio=np.ones(samples, np.int16),
        annotation=dict.fromkeys(FIELDS, "text") | {"sentiment_analysis": f"So {ending}."},
        labels=labels,
        provenance={},
    )


def _answer(emotion):
    texts = dict.fromkeys(FIELDS, "said") | {"sentiment_analysis": f"So {emotion}."}
    return sed.target_text(texts)


@pytest.mark.parametrize(
    ("withheld", "answer", "why"),
    [
        ("audio", _answer("happy"), "kept"),
        ("video", _answer("angry"), "kept"),
        ("audio", _answer("angry"), "other_conclusion"),
        ("video", _answer("happy"), "other_conclusion"),
        ("audio", _answer("sad"), "other_conclusion"),
        ("video", _answer("contempt"), "same_conclusion"),
        ("audio", _answer("something"), "no_conclusion"),
        ("audio", "She is happy.", "unparsable"),
        ("audio", _answer("happy").replace("[body_lang_desc]", ""), "unparsable"),
    ],
)
def test_an_answer_is_kept_only_if_it_follows_the_modality_that_was_left(withheld, answer, why):
    assert preferences.judge(_record(), withheld, answer) == why


def test_without_labels_any_other_conclusion_is_kept_and_the_decision_says_so():
    record = _record(labels={})
    assert preferences.judge(record, "audio", _answer("sad")) == "kept_without_labels"
    assert preferences.judge(record, "audio", _answer("contempt")) == "same_conclusion"


@pytest.mark.parametrize(
    ("record", "why"),
    [
        (_record(), None),
        (_record(samples=0), "nothing_to_withhold"),
        (_record(labels={}, ending="something"), "no_target"),
        (_record(labels={"emotion": "happy", "face": "happy", "voice": "sad"}), "no_conflict"),
        (_record(labels={"emotion": "sad", "face": "happy", "voice": "sad"}), None),
    ],
)
def test_answers_that_could_not_become_a_pair_are_never_asked_for(record, why):
    assert preferences.settled(record, "audio") == why


class _Model:
    """Says what the modality it is left with suggests; counts what it was asked."""

    def __init__(self, stop_after=None):
        self.asked, self._stop_after = [], stop_after

    def __call__(self, parts):
        for part in parts:
            if self._stop_after is not None and len(self.asked) == self._stop_after:
                raise KeyboardInterrupt
            self.asked.append([record.clip_id for record in part])
            heard = [record.audio.any() for record in part]
            yield [
                _answer(record.labels["voice" if sound else "face"])
                for record, sound in zip(part, heard, strict=True)
            ]


RECORDS = [_record(f"clip{i}") for i in range(3)] + [
    _record("same", labels={"emotion": "sad", "face": "sad", "voice": "sad"}),
    _record("odd", labels=SARCASM | {"kappa": "0.7"}),
]


def _mine(folder, model):
    journal = Journal(folder, "decisions.jsonl", {})
    return preferences.mine(RECORDS, model, journal, batch_size=3)


def test_mining_asks_twice_per_conflict_and_says_what_became_of_everything(tmp_path):
    model = _Model()
    decisions = _mine(tmp_path, model)
    assert [len(part) for part in model.asked] == [3, 3, 2]
    assert decisions == read_jsonl(tmp_path / "decisions.jsonl")
    summary = preferences.summarise(decisions)
    assert summary["decisions"] == {"kept": 8, "no_conflict": 2}
    assert summary["pairs_by_withheld"] == {"audio": 4, "video": 4}
    assert summary["pairs_by_conflict_type"] == {"sarcasm": 8}
    last = decisions[-1]
    assert (last["clip_id"], last["withheld"], last["kappa"]) == ("odd", "video", 0.7)
    assert last["chosen"] == sed.target_text(RECORDS[-1].annotation)
    assert last["rejected"] == _answer("angry")


def test_kappa_is_the_label_or_whether_the_two_unimodal_conclusions_differ():
    def decided(clip, modality, emotion, kappa=None):
        record = _record(clip, labels={} if kappa is None else {"kappa": str(kappa)})
        return preferences.decision(record, modality, "kept_without_labels", _answer(emotion))

    decisions = [
        decided("torn", "audio", "happy"),
        decided("torn", "video", "angry"),
        decided("agreeing", "audio", "sad"),
        decided("agreeing", "video", "sad"),
        decided("labelled", "audio", "happy", 0.7),
        decided("labelled", "video", "angry", 0.7),
        decided("half", "audio", "happy"),
        decided("half", "video", "nothing"),
    ]
    kappas = [(pair["clip_id"], pair["kappa"]) for pair in preferences.pairs_of(decisions)]
    want = {"torn": 1.0, "agreeing": 0.0, "labelled": 0.7, "half": None}
    assert kappas == [(clip, want[clip]) for clip in want for _ in range(2)]
    assert preferences.summarise(decisions)["mined_kappa"] == {"0.0": 1, "1.0": 1}


def test_a_killed_run_goes_on_and_leaves_the_same_file(tmp_path):
    whole = _mine(tmp_path / "whole", _Model())
    with pytest.raises(KeyboardInterrupt):
        _mine(tmp_path / "killed", _Model(stop_after=2))
    resumed = _Model()
    assert _mine(tmp_path / "killed", resumed) == whole
    assert len(resumed.asked) == 1
    written = [(tmp_path / name / "decisions.jsonl").read_bytes() for name in ("whole", "killed")]
    assert written[0] == written[1]


def test_a_finished_run_asks_nothing(tmp_path):
    _mine(tmp_path, _Model())
    assert _mine(tmp_path, _Model(stop_after=0))


class _Generator:
    """Stands in for the trained model behind the command line."""

    reserve = staticmethod(lambda sizes: None)
    respond_batches = staticmethod(_Model())


@pytest.fixture
def command(tmp_path, monkeypatch):
    class Source(list):
        sizes = property(lambda self: [None] * len(self))

    fingerprints = {"sed": "1"}
    monkeypatch.setattr(preferences, "RecordSource", lambda path, split: Source(RECORDS))
    monkeypatch.setattr(preferences, "load_generator", lambda *_, **__: _Generator)
    monkeypatch.setattr(preferences, "model_fingerprint", lambda path: fingerprints[path.name])
    monkeypatch.setattr(preferences, "fingerprint", lambda *_: "records")

    def run(*more, checkpoint="sed"):
        fingerprints.setdefault(checkpoint, "2")
        flags = ["--checkpoint", checkpoint, "--records", "r", "--out", str(tmp_path / "out")]
        return preferences.main([*flags, *more])

    return run


def test_the_command_leaves_pairs_that_training_reads_and_then_does_nothing(
    command, tmp_path, monkeypatch, capsys
):
    assert command() == 0
    pairs = read_pairs(tmp_path / "out")
    assert len(pairs) == 8
    assert pairs[0].chosen == sed.target_text(RECORDS[0].annotation)
    lines = (tmp_path / "out" / "pairs.jsonl").read_text().splitlines()
    assert set(json.loads(lines[0])) == set(preferences.PAIR_KEYS)
    monkeypatch.setattr(preferences, "load_generator", None)
    assert command() == 0
    assert capsys.readouterr().out.count("8 pairs from 8 answers") == 2


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
    monkeypatch.setattr(preferences, "load_generator", lambda *_, **__: pytest.fail("asked again"))
    assert command(*settings) == 0
    assert {name: (out / name).read_bytes() for name in whole} == whole


def test_too_few_pairs_fail_with_advice(command, capsys):
    assert command("--limit", "2") == 1
    assert "4 pairs are too few" in capsys.readouterr().err
