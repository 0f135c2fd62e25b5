import itertools

import pytest

from data_prep.preferences import sample
from data_prep.preferences.score import Scores
from saber_jax.runs import shares
from saber_jax.runs.files import read_jsonl
from saber_jax.runs.journal import Journal
from tests.data_prep.preferences.clips import Records, answer
from tests.data_prep.preferences.clips import record as clip

CONFLICT = {"emotion": "contempt", "conflict_type": "sarcasm", "kappa": "0.8"}
RECORDS = Records(
    [
        clip("agreeing", labels={"emotion": "sad", "conflict_type": "none", "kappa": "0.0"}),
        *(clip(f"clip{i}", labels=CONFLICT) for i in range(4)),
        clip("unlabelled", labels={}),
    ]
)
DRAWN = ("happy", "contempt", "angry")
WORTH = {"happy": 0.2, "contempt": 0.9, "angry": 0.5, "sad": 0.5}


def _score(record, text):
    worth = next(value for word, value in WORTH.items() if f"So {word}" in text)
    return Scores(consistency=worth, alignment=worth)


class _Draws:
    """Answers that depend on a record's number alone, as the model's do; counts the batches."""

    def __init__(self, stop_after=None):
        self.asked, self._stop_after = [], stop_after

    def __call__(self, batches):
        for first, part in batches:
            if self._stop_after is not None and len(self.asked) == self._stop_after:
                raise KeyboardInterrupt
            self.asked.append([record.clip_id for record in part])
            yield [[answer(f"{word}. {first + row}") for word in DRAWN] for row in range(len(part))]


def _mine(folder, draws, *, share=None, **settings):
    folder = share.folder(folder) if share else folder
    journal = Journal(folder, sample.NAME, {})
    return sample.mine(RECORDS, draws, _score, journal, batch_size=2, share=share, **settings)


def _line(answers, **about):
    scored = [
        {"text": f"{text} {number}", "conclusion": conclusion, "score": score}
        | {"consistency": score, "alignment": score}
        for number, (text, conclusion, score) in enumerate(answers)
    ]
    line = {"clip_id": "c", "language": "en", "conflict_type": "sarcasm", "kappa": 0.8}
    return line | {"emotion": "contempt", "why": None, "answers": scored} | about


def _pairs(line, margin=0.1, most=1, all_clips=False):
    why, pairs = sample.pairs_of(line, margin=margin, most=most, all_clips=all_clips)
    return why, [(pair["chosen"], pair["rejected"]) for pair in pairs]


def test_the_best_answer_is_chosen_over_the_worst():
    line = _line([("a", "sad", 0.5), ("b", "happy", 0.25), ("c", "contempt", 1.0)])
    assert _pairs(line) == ("kept", [("c 2", "b 1")])


def test_several_pairs_of_a_clip_pair_off_from_both_ends_while_the_margin_holds():
    scores = (0.9, 0.1, 0.6, 0.55, 0.3)
    line = _line([("a", "sad", score) for score in scores])
    assert _pairs(line, most=3) == ("kept", [("a 0", "a 1"), ("a 2", "a 4")])
    assert _pairs(line, most=3, margin=0.5) == ("kept", [("a 0", "a 1")])


@pytest.mark.parametrize(
    ("line", "why"),
    [
        (_line([("a", "sad", 0.5), ("b", None, None)]), "unparsable"),
        (_line([("a", "sad", 0.5), ("b", "happy", None)]), "unscored"),
        (_line([("a", "sad", 0.5), ("b", "happy", 0.5)]), "tie"),
        (_line([("a", "sad", 0.55), ("b", "happy", 0.5)]), "below_margin"),
        (
            _line([("a", "sad", 0.9), ("b", "sad", 0.1)], kappa=None, conflict_type=None),
            "no_spread",
        ),
        (_line([], why="no_conflict"), "no_conflict"),
    ],
)
def test_a_clip_without_a_pair_says_why(line, why):
    assert _pairs(line) == (why, [])


def test_a_clip_without_label_counts_as_conflicting_by_the_spread_of_its_conclusions():
    answers = [("a", "sad", 0.9), ("b", "happy", 0.1), ("c", "sad", 0.4), ("d", None, None)]
    line = _line(answers, kappa=None, conflict_type=None)
    _, (pair,) = sample.pairs_of(line, margin=0.1, most=1, all_clips=False)
    assert pair["kappa"] == pytest.approx(1 / 3, abs=1e-4)


def test_clips_whose_modalities_agree_are_not_asked_about_unless_all_are(tmp_path):
    draws = _Draws()
    lines = _mine(tmp_path / "some", draws)
    assert list(itertools.chain(*draws.asked)) == [r.clip_id for r in RECORDS[1:]]
    assert [line["why"] for line in lines] == ["no_conflict"] + [None] * 5
    assert lines == read_jsonl(tmp_path / "some" / sample.NAME)
    everybody = _Draws()
    _mine(tmp_path / "all", everybody, all_clips=True)
    assert sum(map(len, everybody.asked)) == len(RECORDS)


def test_every_answer_is_kept_with_its_scores(tmp_path):
    line = _mine(tmp_path, _Draws())[1]
    assert [a["conclusion"] for a in line["answers"]] == list(DRAWN)
    assert [a["score"] for a in line["answers"]] == [0.2, 0.9, 0.5]
    assert set(line["answers"][0]) == {"text", "conclusion", "consistency", "alignment", "score"}


def test_an_unparsable_answer_is_not_scored(tmp_path):
    def draws(batches):
        for _, part in batches:
            yield [["no sections", answer("happy")] for _ in part]

    line = _mine(tmp_path, draws)[1]
    assert [a["score"] for a in line["answers"]] == [None, 0.2]


def test_a_killed_run_goes_on_and_leaves_the_same_file(tmp_path):
    whole = _mine(tmp_path / "whole", _Draws())
    with pytest.raises(KeyboardInterrupt):
        _mine(tmp_path / "killed", _Draws(stop_after=1))
    resumed = _Draws()
    assert _mine(tmp_path / "killed", resumed) == whole
    assert len(resumed.asked) == 2


@pytest.mark.parametrize("hosts", [2, 4])
def test_several_hosts_leave_the_pairs_of_one(tmp_path, hosts):
    whole = _mine(tmp_path / "one", _Draws())
    for number in range(1, hosts + 1):
        _mine(tmp_path / "several", _Draws(), share=shares.Share(number, hosts))
    nobody = _Draws(stop_after=0)
    assert _mine(tmp_path / "several", nobody) == whole
    files = [(tmp_path / name / sample.NAME).read_bytes() for name in ("one", "several")]
    assert files[0] == files[1]


def test_the_summary_says_whether_length_alone_would_tell_the_pairs_apart():
    lines = [
        _line([("long answer", "contempt", 1.0), ("b", "happy", 0.0)]),
        _line([("a", "contempt", 1.0), ("long answer", "happy", 0.0)], language="zh"),
        _line([("aa", "sad", 1.0), ("bb", "happy", 0.0)], conflict_type="masking"),
    ]
    about, pairs = sample.summarise(lines, margin=0.1, most=1, all_clips=False)
    assert about["pairs"] == len(pairs) == 3
    assert about["about_pairs"]["longer_is_chosen"] == 0.5
    assert about["by_language"]["en"]["longer_is_chosen"] == 0.75
    assert about["by_language"]["zh"]["longer_is_chosen"] == 0.0
    assert about["by_conflict_type"]["masking"]["chosen_characters"] == 4
    assert about["agrees_with_label"] == {"chosen": 0.6667, "rejected": 0.0, "answers": 0.3333}
    assert about["decisions"] == {"kept": 3}


def test_pairs_that_differ_only_in_their_reasoning_are_counted():
    texts = [answer(word) for word in ("contempt", "happy")]
    texts.append(texts[1].replace("[acoustic_feat] said", "[acoustic_feat] heard"))
    couples = [(texts[0], texts[1]), (texts[0], texts[2])]
    lines = []
    for couple in couples:
        line = _line([("", "contempt", 1.0), ("", "happy", 0.0)])
        for one, text in zip(line["answers"], couple, strict=True):
            one["text"] = text
        lines.append(line)
    about, _ = sample.summarise(lines, margin=0.1, most=1, all_clips=False)
    assert about["about_pairs"]["only_reasoning_differs"] == 0.5


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (" \n", "empty"),
        (answer("sad <|im_end|>"), "special_token"),
        (answer("sad").replace("[speech_content]", ""), "sections"),
        (answer("quiet"), "no_emotion"),
        (answer("sad"), None),
    ],
)
def test_an_answer_that_training_would_refuse_is_counted_by_its_reason(tmp_path, text, why):
    def draw(batches):
        for _, part in batches:
            yield [[text, answer("happy")] for _ in part]

    lines = sample.mine(
        RECORDS, draw, _score, Journal(tmp_path, sample.NAME, {}), batch_size=2, all_clips=True
    )
    about, pairs = sample.summarise(lines, margin=0.1, most=1, all_clips=True)
    assert about["answers_unparsable_by_reason"] == ({why: len(RECORDS)} if why else {})
    assert len(pairs) == (0 if why else len(RECORDS))
