import dataclasses

import pytest

from data_prep.preferences import withhold
from saber_jax.data import sed
from saber_jax.runs.files import read_jsonl
from saber_jax.runs.journal import Journal
from tests.data_prep.preferences.clips import RECORDS, Model, Records, answer
from tests.data_prep.preferences.clips import record as clip

AGREEING = {"emotion": "sad", "face": "sad", "voice": "sad"}
ANGRY = {"emotion": "angry", "face": "angry", "voice": "angry"}


@pytest.mark.parametrize(
    ("withheld", "said", "why"),
    [
        ("audio", answer("happy"), "kept"),
        ("video", answer("angry"), "kept"),
        ("audio", answer("angry"), "other_conclusion"),
        ("video", answer("happy"), "other_conclusion"),
        ("audio", answer("sad"), "other_conclusion"),
        ("video", answer("contempt"), "same_conclusion"),
        ("audio", answer("something"), "no_conclusion"),
        ("audio", "She is happy.", "unparsable"),
        ("audio", answer("happy").replace("[body_lang_desc]", ""), "unparsable"),
    ],
)
def test_an_answer_is_kept_only_if_it_follows_the_modality_that_was_left(withheld, said, why):
    assert withhold.judge(clip(), withheld, said) == why


def test_labels_may_name_an_emotion_in_another_form_or_one_that_is_not_ours():
    labels = {"emotion": "sadness", "face": "joy", "voice": "boredom"}
    judged = [withhold.judge(clip(labels=labels), "audio", answer(w)) for w in ("happy", "sad")]
    assert judged == ["kept", "same_conclusion"]
    assert withhold.judge(clip(labels=labels), "video", answer("boredom")) == "kept"


def test_without_labels_any_other_conclusion_is_kept_and_the_decision_says_so():
    record = clip(labels={})
    assert withhold.judge(record, "audio", answer("sad")) == "kept_without_labels"
    assert withhold.judge(record, "audio", answer("contempt")) == "same_conclusion"


@pytest.mark.parametrize(
    ("record", "why"),
    [
        (clip(), None),
        (clip(samples=0), "nothing_to_withhold"),
        (clip(labels={}, ending="something"), "no_target"),
        (clip(labels={"emotion": "happy", "face": "happy", "voice": "sad"}), "no_conflict"),
        (clip(labels={"emotion": "sad", "face": "happy", "voice": "sad"}), None),
    ],
)
def test_answers_that_could_not_become_a_pair_are_never_asked_for(record, why):
    assert withhold.settled(record, "audio") == why


def test_of_agreeing_clips_an_answer_that_concludes_something_else_is_kept():
    agreeing = clip(labels=AGREEING)
    for withheld in ("audio", "video"):
        assert withhold.judge(agreeing, withheld, answer("contempt")) == "kept_invented"
        assert withhold.judge(agreeing, withheld, answer("sad")) == "same_conclusion"


def _mine(folder, model):
    journal = Journal(folder, "decisions.jsonl", {})
    return withhold.mine(RECORDS, model, journal, batch_size=3)


def test_mining_asks_twice_per_conflict_and_says_what_became_of_everything(tmp_path):
    model = Model()
    decisions = _mine(tmp_path, model)
    assert [len(part) for part in model.asked] == [3, 3, 2]
    assert decisions == read_jsonl(tmp_path / "decisions.jsonl")
    summary = withhold.summarise(decisions)
    assert summary["decisions"] == {"kept": 8, "no_conflict": 2}
    assert summary["pairs_by_withheld"] == {"audio": 4, "video": 4}
    assert summary["pairs_by_conflict_type"] == {"sarcasm": 8}
    last = decisions[-1]
    assert (last["clip_id"], last["withheld"], last["kappa"]) == ("odd", "video", 0.7)
    assert last["chosen"] == sed.target_text(RECORDS[-1].annotation)
    assert last["rejected"] == answer("angry")


def test_agreeing_clips_are_shown_with_the_sound_or_picture_of_a_conflicting_one(tmp_path):
    records = Records([clip("sad", labels=AGREEING, samples=160), clip("angry", labels=ANGRY)])
    records += [clip("sarcasm", samples=320, frames=4)]
    shown = []

    def model(parts):
        for part in parts:
            shown.extend((len(record.audio), len(record.frames)) for record in part)
            yield [answer("unease") for _ in part]

    journal = Journal(tmp_path, "decisions.jsonl", {})
    decisions = withhold.mine(records, model, journal, batch_size=4, all_clips=True)
    assert shown == [(320, 2), (160, 4), (320, 2), (160, 4), (320, 4), (320, 4)]
    invented = [d for d in decisions if d["why"] == "kept_invented"]
    assert [(d["clip_id"], d["withheld"], d["replaced_by"]) for d in invented] == [
        ("sad", "audio", "sarcasm"),
        ("sad", "video", "sarcasm"),
        ("angry", "audio", "sarcasm"),
        ("angry", "video", "sarcasm"),
    ]
    assert invented[0]["chosen"] == sed.target_text(records[0].annotation)
    assert invented[0]["rejected"] == answer("unease")


def test_the_stand_in_is_the_next_conflicting_clip_in_a_circle_with_another_conclusion():
    same = {"emotion": "sad", "face": "happy", "voice": "angry"}
    labels = {"sad": AGREEING, "sarcasm": clip().labels, "same": same}
    order = ["sad", "same", "sarcasm", "sad", "sarcasm", "sad", "sad"]
    records = [clip(f"{i}", labels=labels[name]) for i, name in enumerate(order)]
    stand_ins = withhold.StandIns(records)
    agreeing = [i for i, name in enumerate(order) if name == "sad"]
    found = {i: stand_ins.behind(i, records[i], "audio") for i in agreeing}
    assert found == {0: 2, 3: 4, 5: 2, 6: 2}
    chinese = dataclasses.replace(records[0], language="zh")
    assert stand_ins.behind(0, chinese, "audio") is None


def test_without_a_conflicting_clip_nothing_is_asked_and_the_summary_says_so(tmp_path):
    records = Records([clip("sad", labels=AGREEING), clip("angry", labels=ANGRY)])
    journal = Journal(tmp_path, "decisions.jsonl", {})
    decisions = withhold.mine(records, Model(), journal, batch_size=3, all_clips=True)
    assert withhold.summarise(decisions)["decisions"] == {"no_other_clip": 4}


def test_kappa_is_the_label_or_whether_the_two_unimodal_conclusions_differ():
    def decided(name, modality, emotion, kappa=None):
        record = clip(name, labels={} if kappa is None else {"kappa": str(kappa)})
        return withhold.decision(record, modality, "kept_without_labels", answer(emotion))

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
    kappas = [(pair["clip_id"], pair["kappa"]) for pair in withhold.pairs_of(decisions)]
    want = {"torn": 1.0, "agreeing": 0.0, "labelled": 0.7, "half": None}
    assert kappas == [(clip, want[clip]) for clip in want for _ in range(2)]
    assert withhold.summarise(decisions)["mined_kappa"] == {"0.0": 1, "1.0": 1}


def test_a_killed_run_goes_on_and_leaves_the_same_file(tmp_path):
    whole = _mine(tmp_path / "whole", Model())
    with pytest.raises(KeyboardInterrupt):
        _mine(tmp_path / "killed", Model(stop_after=2))
    resumed = Model()
    assert _mine(tmp_path / "killed", resumed) == whole
    assert len(resumed.asked) == 1
    written = [(tmp_path / name / "decisions.jsonl").read_bytes() for name in ("whole", "killed")]
    assert written[0] == written[1]


def test_a_finished_run_asks_nothing(tmp_path):
    _mine(tmp_path, Model())
    assert _mine(tmp_path, Model(stop_after=0))
