"""Building the embedded corpus: same bytes every time, resumable, real H.264 and AAC."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest

from data_prep.corpus import build as corpus
from data_prep.corpus import film, text, voice
from data_prep.corpus.plan import EMOTIONS, Sizes, plan
from data_prep.corpus.voice import MAX_SAMPLES, Speaker
from saber_jax.data import sed
from saber_jax.data.annotations import parse_annotation
from saber_jax.data.records import FIELDS

SIZES = ["--train", "3", "--preference", "1", "--validation", "1", "--test", "2"]
ROOT = Path(__file__).parents[3]


def build(out: Path, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "data_prep.corpus", "--out", str(out), *SIZES, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("corpus") / "mini"
    result = build(out)
    assert result.returncode == 0, result.stderr
    return out


def decoded(path: Path) -> tuple[np.ndarray, np.ndarray]:
    with av.open(str(path)) as container:
        frames = np.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)])
    with av.open(str(path)) as container:
        sound = np.concatenate([f.to_ndarray()[0] for f in container.decode(audio=0)])
    return frames, sound


def digests(out: Path) -> dict[str, str]:
    """Of decoded pixels and samples, and of the bytes of everything that is text."""
    found = {}
    for path in sorted(out.rglob("*.*")):
        data = [path.read_bytes()]
        if path.suffix == ".mp4":
            data = [array.tobytes() for array in decoded(path)]
        found[str(path.relative_to(out))] = hashlib.sha256(b"".join(data)).hexdigest()
    return found


def test_two_builds_in_different_processes_are_identical(built, tmp_path):
    # One worker instead of two: every clip is rendered after other clips than before.
    assert build(tmp_path / "again", "--workers", "1").returncode == 0
    assert digests(tmp_path / "again") == digests(built)


def test_equal_pictures_and_sound_give_equal_files(tmp_path):
    out = tmp_path / "clip.mp4"
    with Speaker() as speaker:
        made = [corpus.render(clip, speaker) for clip in plan(Sizes(), seed=0)[:20]]
    for frames, track in made:
        written = set()
        for _ in range(4):
            film.write_mp4(out, frames, track)
            written.add(out.read_bytes())
        assert len(written) == 1


def test_a_build_that_lost_clips_restores_them(built):
    before = digests(built)
    lost = ["clips/train_00001.mp4", "clips/test_00000.mp4", "annotations/preference_00000.json"]
    for name in lost:
        (built / name).unlink()
    kept = (built / "clips/train_00000.mp4").stat().st_mtime_ns
    result = build(built)
    assert "rendering 3 of 7 clips" in result.stdout
    assert digests(built) == before
    assert (built / "clips/train_00000.mp4").stat().st_mtime_ns == kept


def test_a_finished_build_renders_nothing(built, capsys):
    counts = {"train": 3, "preference": 1, "validation": 1, "test": 2}
    assert corpus.build(built, sizes=Sizes(**counts)) == counts
    assert "already there" in capsys.readouterr().out


def test_other_settings_in_the_same_directory_are_an_error(built, capsys):
    before = digests(built)
    assert corpus.main(["--out", str(built), *SIZES, "--seed", "1"]) == 2
    error = capsys.readouterr().err
    assert "other settings" in error and "Traceback" not in error
    assert digests(built) == before


def test_clips_hold_h264_and_aac_and_fit_one_audio_chunk(built):
    for path in sorted((built / "clips").glob("*.mp4")):
        with av.open(str(path)) as container:
            assert [s.codec_context.name for s in container.streams] == ["h264", "aac"]
            assert container.streams.video[0].average_rate == 10
            assert container.streams.audio[0].codec_context.sample_rate == 16_000
        frames, sound = decoded(path)
        assert frames.shape[1:] == (84, 84, 3)
        assert 12 <= len(frames) <= 20 and len(frames) % 2 == 0
        assert abs(len(sound) / 16_000 - len(frames) / 10) < 0.07
        assert len(sound) <= MAX_SAMPLES <= 32_000
        assert np.abs(sound[:400]).max() > 0, "room tone, not digital silence"


def test_annotations_are_saber_json_that_concludes_the_label(built):
    labels = [json.loads(line) for line in (built / "labels.jsonl").read_text().splitlines()]
    assert len(labels) == 7
    for label in labels:
        path = built / "annotations" / f"{label['clip_id']}.json"
        annotation = parse_annotation(json.loads(path.read_text()))
        assert set(annotation) == set(FIELDS)
        assert sed.conclusion(sed.target_text(annotation)) == label["emotion"]


@pytest.fixture(scope="module")
def annotated():
    return [(c, text.annotation(c)) for c in plan(Sizes(), seed=0)]


def test_every_annotation_ends_with_the_fused_emotion_word(annotated):
    for clip, annotation in annotated:
        word = text.EMOTION_WORDS[clip.language][clip.emotion]
        assert annotation["sentiment_analysis"].endswith(word)
        assert sed.conclusion(sed.target_text(parse_annotation(annotation))) == clip.emotion


def test_the_evidence_fields_determine_face_voice_and_words(annotated):
    found = {"face": {}, "voice": {}, "words": {}}
    for clip, annotation in annotated:
        heard = annotation["audio_desc"]
        stated = {
            "face": annotation["facial_exp_desc"],
            "voice": heard["acoustic_feat"],
            "words": heard["speech_content"],
        }
        for modality, said in stated.items():
            found[modality].setdefault(said, set()).add(getattr(clip, modality))
    for emotions in found.values():
        assert all(len(each) == 1 for each in emotions.values())
        assert set().union(*emotions.values()) == set(EMOTIONS)


def test_speech_does_not_depend_on_what_was_said_before():
    first = {"rate": 150, "pitch": 50, "spread": 50}
    with Speaker() as one, Speaker() as two:
        alone, _ = one.speak("The bus is blue.", "en", "m1", **first)
        two.speak("车是蓝色的。", "zh", "f4", **first)
        after, _ = two.speak("The bus is blue.", "en", "m1", **first)
    np.testing.assert_array_equal(alone, after)


def test_a_voice_that_espeak_does_not_have_is_an_error(monkeypatch):
    monkeypatch.setitem(voice._LANGUAGE, "en", "no-such-voice")
    with Speaker() as speaker, pytest.raises(RuntimeError, match="made no sound"):
        speaker.speak("Hello.", "en", "m1", rate=150, pitch=50, spread=50)
