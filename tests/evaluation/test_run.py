import json

import numpy as np
import pytest

from data_prep.records import dataset
from saber_jax.data import sed
from saber_jax.data.records import FIELDS, Record
from saber_jax.data.withhold import GREY
from saber_jax.evaluation import probes, run
from saber_jax.runs.files import read_json, read_jsonl, write_jsonl
from tests import media_files
from tests.loopback import Answer, chat_server

EMOTIONS = ("neutral", "happy", "sad", "angry")
CLIPS = [
    # face, voice, truth, conflict type
    ("happy", "happy", "happy", "none"),
    ("sad", "sad", "sad", "none"),
    ("happy", "angry", "contempt", "sarcasm"),
    ("angry", "happy", "contempt", "sarcasm"),
    ("happy", "sad", "sorrow", "masking"),
]


def _record(number, face, voice, truth, kind):
    """Records in which a face and a voice are a single number in the pixels and the samples."""
    return Record(
        clip_id=f"clip{number}",
        language="en",
        frames=np.full((2, 28, 28, 3), EMOTIONS.index(face), np.uint8),
        seconds_per_grid=0.5,
        audio=np.full(800 + number, EMOTIONS.index(voice), np.int16),
        annotation=dict.fromkeys(FIELDS, "text") | {"speech_content": "one two three"},
        labels={"emotion": truth, "face": face, "voice": voice, "conflict_type": kind},
        provenance={},
    )


class _Model:
    """A model that follows the voice, or the face without one; it counts its clips."""

    def __init__(self, stop_after=None):
        self.asked, self.stop_after = [], stop_after
        self.questions = []

    def reserve(self, sizes):
        del sizes

    def respond_batches(self, batches):
        for batch in batches:
            if self.stop_after is not None and len(self.asked) >= self.stop_after:
                raise KeyboardInterrupt
            self.asked += [record.clip_id for record in batch]
            self.questions += [record.question for record in batch]
            yield [self._answer(record) for record in batch]

    def _answer(self, record):
        if record.question:
            return "{'emotion': 'joy'}"
        face = int(record.frames[0, 0, 0, 0])
        concluded = EMOTIONS[int(record.audio[0]) or (0 if face == GREY else face)]
        texts = dict.fromkeys(FIELDS, "said") | {"speech_content": "one three"}
        return sed.target_text(texts | {"sentiment_analysis": f"So {concluded}."})


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("records")
    dataset.write(folder, {"test": range(len(CLIPS))}, lambda i: _record(i, *CLIPS[i]))
    return folder


@pytest.fixture
def model(monkeypatch):
    fake = _Model()
    monkeypatch.setattr(run, "load_generator", lambda *args, **kwargs: fake)
    monkeypatch.setattr(run, "model_fingerprint", lambda workdir: "weights")
    monkeypatch.setattr(run.checkpoint, "read_model_file", lambda workdir: {})
    return fake


def _run(out, data, *more, benchmark="saber_test"):
    command = ["--benchmark", benchmark, "--checkpoint", "run", "--data", str(data)]
    return run.main([*command, "--out", str(out), "--batch_size", "2", *more])


def test_a_run_leaves_predictions_and_scores(tmp_path, data, model, capsys):
    assert _run(tmp_path, data) == 0
    rows, scores = read_jsonl(tmp_path / "predictions.jsonl"), read_json(tmp_path / "scores.json")
    said = {row["clip_id"]: row["conclusion"] for row in rows}
    assert [said[f"clip{i}"] for i in range(5)] == ["happy", "sad", "angry", "happy", "sad"]
    assert scores["consistent"]["accuracy"]["value"] == 1.0
    assert scores["inconsistent"]["accuracy"]["value"] == 0.0
    assert scores["inconsistent"]["follows_voice"]["value"] == 1.0
    assert scores["gap"]["accuracy"]["value"] == 1.0
    assert scores["consistent"]["word_error_rate"]["value"] == pytest.approx(1 / 3)
    assert scores["missing"] == ["judge scores of the six sections: need a judge (--judge)"]
    assert "dominance: 1.000" in capsys.readouterr().out


def test_a_model_without_sed_training_is_asked_for_the_sections_by_name(tmp_path, data, model):
    assert _run(tmp_path, data, "--spell_out") == 0
    assert all(sed.heading(field) in q for q in model.questions for field in FIELDS)
    assert _run(tmp_path, data) == 1  # One folder never mixes two ways of asking.


def test_a_killed_run_goes_on_and_ends_the_same(tmp_path, data, model):
    assert _run(tmp_path / "whole", data) == 0
    model.asked.clear()
    model.stop_after = 2
    with pytest.raises(KeyboardInterrupt):
        _run(tmp_path / "killed", data)
    model.stop_after = None
    assert _run(tmp_path / "killed", data) == 0
    assert sorted(model.asked) == [f"clip{i}" for i in range(5)]  # None of them twice.
    for name in ("predictions.jsonl", "scores.json"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_shares_of_several_hosts_join_into_the_run_of_one(tmp_path, data, model, capsys):
    assert _run(tmp_path / "whole", data) == 0
    assert _run(tmp_path / "shared", data, "--share", "2/2") == 0
    assert not (tmp_path / "shared/scores.json").exists()
    assert _run(tmp_path / "shared", data) == 1
    assert "1/2 (0 of 3 answers)" in capsys.readouterr().err
    model.asked.clear()
    assert _run(tmp_path / "shared", data, "--share", "1/2") == 0
    assert len(model.asked) == 3
    assert _run(tmp_path / "shared", data) == 0
    assert len(model.asked) == 3  # Joining asks nothing.
    for name in ("predictions.jsonl", "scores.json"):
        assert (tmp_path / "shared" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_probes_are_shared_like_the_plain_answers(tmp_path, data, model):
    assert _run(tmp_path / "whole", data, "--probes") == 0
    for share in ("1/2", "2/2"):
        assert _run(tmp_path / "shared", data, "--probes", "--share", share) == 0
    model.asked.clear()
    assert _run(tmp_path / "shared", data, "--probes") == 0
    assert not model.asked  # Joining asks nothing.
    for name in ("scores.json", *(f"probes/{p}/predictions.jsonl" for p in probes.PROBES)):
        assert (tmp_path / "shared" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.parametrize("share", ["0/2", "3/2", "1", "a/b"])
def test_impossible_shares_are_refused(share, tmp_path, data, capsys):
    with pytest.raises(SystemExit):
        _run(tmp_path, data, "--share", share)
    assert "1 <= I <= N" in capsys.readouterr().err


def test_a_finished_run_loads_no_model(tmp_path, data, model, monkeypatch):
    assert _run(tmp_path, data) == 0
    monkeypatch.setattr(run, "load_generator", None)
    assert _run(tmp_path, data) == 0


def test_probes_tell_a_model_that_believes_the_voice(tmp_path, data, model):
    assert _run(tmp_path, data, "--probes") == 0
    scores = read_json(tmp_path / "scores.json")["probes"]
    assert list(scores) == [probes.PLAIN, *probes.PROBES]
    # Without a voice the three conflicts are read by their faces; the others stay as they were.
    assert scores["audio_muted"]["moved"]["value"] == 3 / 5
    assert scores["audio_muted"]["dominance"]["value"] == 1.0
    assert scores["frames_blanked"]["moved"]["value"] == 0.0
    assert scores["audio_swapped"]["moved"]["value"] == 1.0
    assert scores["audio_swapped"]["follows_donor"]["value"] == 1.0
    assert len(read_jsonl(tmp_path / "probes/audio_swapped/predictions.jsonl")) == len(CLIPS)


def test_a_foreign_voice_says_something_else_and_is_of_the_same_language():
    rows = [
        {"language": "en", "labels": {"voice": "sad"}},
        {"language": "zh", "labels": {"voice": "happy"}},
        {"language": "en", "labels": {"voice": "sad"}},
        {"language": "en", "labels": {"voice": "angry"}},
    ]
    assert probes.donors(rows) == [3, 2, 3, 0]


def _theirs(folder, data, clips, out="out"):
    """Scores one answer, "contempt", for each of `clips`."""
    said = sed.target_text(dict.fromkeys(FIELDS, "x") | {"sentiment_analysis": "Contempt."})
    lines = [{"clip_id": f"clip{i}", "response": said} for i in clips]
    write_jsonl(folder / "theirs.jsonl", lines)
    command = ["--benchmark", "saber_test", "--predictions", str(folder / "theirs.jsonl")]
    return run.main([*command, "--data", str(data), "--out", str(folder / out)])


def test_predictions_made_elsewhere_are_joined_with_the_records(tmp_path, data, capsys):
    assert _theirs(tmp_path, data, (4, 2, 0, 1, 3)) == 0
    scores = read_json(tmp_path / "out/scores.json")
    assert (scores["n"], scores["unanswered"]) == (5, [])
    assert scores["inconsistent"]["accuracy"]["value"] == pytest.approx(2 / 3)
    assert _theirs(tmp_path, data, (4, 2, 9), "other") == 1
    assert "1 of 3 answers are for clips that are not in" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_clips_that_were_not_answered_elsewhere_count_and_are_named(tmp_path, data, capsys):
    assert _theirs(tmp_path, data, (4, 2)) == 1
    scores = read_json(tmp_path / "out/scores.json")
    assert sorted(scores["unanswered"]) == ["clip0", "clip1", "clip3"]
    err = capsys.readouterr().err
    assert "3 of 5 clips have no answer in" in err
    assert f"count as empty answers: {', '.join(scores['unanswered'])}\n" in err
    assert (scores["n"], scores["unparsable"]) == (5, 3)
    assert scores["inconsistent"]["accuracy"]["value"] == pytest.approx(1 / 3)
    # Its answers may be scored again by themselves, and the gaps are still told.
    written = str(tmp_path / "out/predictions.jsonl")
    again = ["--benchmark", "saber_test", "--predictions", written, "--out", str(tmp_path / "two")]
    assert run.main(again) == 1
    assert (tmp_path / "two/scores.json").read_bytes() == (
        tmp_path / "out/scores.json"
    ).read_bytes()


def test_long_lists_are_printed_by_their_first_lines(capsys):
    run.show({"unanswered": [f"clip{i}" for i in range(25)]})
    printed = capsys.readouterr().out.splitlines()
    assert (len(printed), printed[-1]) == (21, "unanswered: and 5 more")


def test_conclusions_and_labels_are_compared_in_one_form(tmp_path):
    said = ["她笑得很开心。", "She is bored.", "A sense of sadness."]
    lines = [
        {
            "clip_id": str(number),
            "language": "en",
            "response": f"[sentiment_analysis] {text}",
            "annotation": dict.fromkeys(FIELDS, "x"),
            "labels": {"emotion": emotion, "face": emotion, "voice": emotion},
        }
        for number, (text, emotion) in enumerate(zip(said, ("joy", "bored", "sad"), strict=True))
    ]
    path = tmp_path / "made.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    flags = ["--benchmark", "saber_test", "--predictions", str(path), "--out", str(tmp_path / "o")]
    assert run.main(flags) == 0
    scores = json.loads((tmp_path / "o/scores.json").read_text())
    assert scores["accuracy"]["value"] == 1.0


def test_a_judge_is_asked_and_its_scores_stand_by_split(tmp_path, data, model):
    with chat_server(lambda *_: Answer(text=json.dumps(dict.fromkeys(FIELDS, 4)))) as server:
        flags = ("--judge", server.url, "--judge_model", "j")
        assert _run(tmp_path, data, *flags) == 0
        asked = len(server.requests)
        assert _run(tmp_path, data, *flags) == 0
        assert len(server.requests) == asked  # All of it was cached.
    scores = read_json(tmp_path / "scores.json")
    assert scores["inconsistent"]["judge"]["mean"]["value"] == 4.0
    assert scores["judge"]["model"] == "j"
    assert scores["missing"] == []


def test_a_missing_judge_is_an_error_and_the_predictions_stay(tmp_path, data, model, capsys):
    with chat_server(lambda *_: Answer(text="")) as server:
        gone = ("--judge", server.url, "--judge_model", "j", "--judge_retries", "0")
    assert _run(tmp_path, data, *gone) == 1
    assert "no endpoint" in capsys.readouterr().err
    assert len(read_jsonl(tmp_path / "predictions.jsonl")) == len(CLIPS)


def test_emer_clips_are_decoded_and_a_broken_one_is_named(tmp_path, model, capsys):
    data = tmp_path / "emer"
    (data / "video").mkdir(parents=True)
    frames = media_files.gray_frames(12)
    for name in ("a", "b"):
        media_files.write_clip(
            data / f"video/{name}.mkv", frames=frames, audio=media_files.tone(1.0)
        )
    (data / "video/c.mp4").write_bytes(b"not a film")
    (data / "gt-eng.csv").write_text("names,eng_reasons\nc,x\na,She beams.\nb,He weeps.\nd,gone\n")
    (data / "check-openset.csv").write_text('name,openset\na,[happy]\nb,"[sad, low]"\nc,[]\nd,[]\n')
    assert _run(tmp_path / "out", data, benchmark="emer") == 1
    assert "2 of 4 clips could not be read" in capsys.readouterr().err
    rows = {row["clip_id"]: row for row in read_jsonl(tmp_path / "out/predictions.jsonl")}
    assert set(rows) == {"a", "b", "c", "d"}
    assert rows["a"]["response"].startswith("[video_desc]")
    assert "cannot be decoded" in rows["c"]["error"]
    assert "no file" in rows["d"]["error"]
    scores = read_json(tmp_path / "out/scores.json")
    assert [line.split(":")[0] for line in scores["unreadable"]] == ["c", "d"]
    assert scores["empty"] == 2


def test_emobench_m_clips_are_asked_their_own_questions(tmp_path, model):
    data = tmp_path / "emobench"
    (data / "videos").mkdir(parents=True)
    frames = media_files.gray_frames(12)
    items = []
    for number, truth in enumerate(("joy", "anger")):
        path = data / f"videos/dia{number}.mkv"
        media_files.write_clip(path, frames=frames, audio=media_files.tone(1.0 + number))
        items.append({"video": path.name, "expected_value": truth, "text": f"Line {number}."})
    (data / "MELD.json").write_text(json.dumps(items))
    assert _run(tmp_path / "out", data, benchmark="emobench_m") == 0
    # The longest clip comes first.
    assert model.asked == ["MELD/dia1", "MELD/dia0"]
    assert '"Line 1."' in model.questions[0]
    scores = read_json(tmp_path / "out/scores.json")
    assert scores["tasks"]["MELD"]["accuracy"]["value"] == 0.5
    rows = read_jsonl(tmp_path / "out/predictions.jsonl")
    assert [row["predicted_value"] for row in rows] == ["joy", "joy"]


def test_official_result_files_are_scored_without_a_checkpoint(tmp_path):
    rows = [{"video": "a", "expected_value": "joy", "predicted_value": "Joy "}]
    (tmp_path / "MELD.json").write_text(json.dumps(rows))
    command = ["--benchmark", "emobench_m", "--predictions", str(tmp_path / "MELD.json")]
    assert run.main([*command, "--out", str(tmp_path / "out")]) == 0
    assert read_json(tmp_path / "out/scores.json")["tasks"]["MELD"]["accuracy"]["value"] == 1.0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "either --checkpoint or --predictions"),
        (["--checkpoint", "x"], "needs --data"),
        (["--predictions", "x", "--judge", "http://x"], "go together"),
        (["--predictions", "x", "--probes"], "--probes need"),
    ],
)
def test_flags_that_do_not_fit_are_refused(flags, message, capsys):
    with pytest.raises(SystemExit):
        run.main(["--benchmark", "saber_test", "--out", "x", *flags])
    assert message in capsys.readouterr().err
