import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from data_prep.records import build, clips, processes
from saber_jax.data import annotations, records, sed
from saber_jax.data.decode import FrameSampling
from saber_jax.data.tokenizer import load_tokenizer
from tests.media_files import gray_frames, tone, write_clip

ROOT = Path(__file__).parents[3]
IN_MEMORY = "runner=DirectRunner,direct_running_mode=in_memory"
PIXELS = ["--fps", "4", "--min_pixels", "7056", "--max_pixels", "7056"]


def annotation(language: str) -> dict:
    text = {"en": "She smiles in a kitchen.", "zh": "她在厨房里微笑。"}[language]
    sections = dict.fromkeys(records.FIELDS, text)
    audio = {name: sections.pop(name) for name in records.AUDIO_FIELDS}
    return {"audio_desc": audio, **sections}


class Corpus:
    """A directory of clips and annotations with its output directory beside it."""

    def __init__(self, directory: Path):
        self.clips, self.annotations = directory / "clips", directory / "annotations"
        self.labels, self.out = directory / "labels.jsonl", directory / "out"
        self.clips.mkdir()
        self.annotations.mkdir()

    def add(self, name: str, language: str = "en", **changes) -> Path:
        settings = {"frames": gray_frames(12, 30, 30), "audio": tone(1), **changes}
        self.annotate(Path(name).stem, annotation(language))
        return write_clip(self.clips / name, **settings)

    def annotate(self, stem: str, content: object):
        file = self.annotations / f"{stem}.json"
        file.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")

    def label(self, *rows: dict):
        self.labels.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def arguments(self, *more: str) -> list[str]:
        inputs = ["--clips", self.clips, "--annotations", self.annotations, "--out", self.out]
        labels = ["--labels", self.labels] if self.labels.exists() else []
        return [*map(str, [*inputs, *labels]), *PIXELS, *more]

    def build(self, *more: str) -> int:
        return build.main(self.arguments(*more))

    def refused(self) -> dict[str, str]:
        lines = (self.out / "refused.jsonl").read_text().splitlines()
        return {row["file"]: row["reason"] for row in map(json.loads, lines)}


@pytest.fixture
def corpus(tmp_path) -> Corpus:
    return Corpus(tmp_path)


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Corpus:
    """Two training clips and a test clip, built once."""
    corpus = Corpus(tmp_path_factory.mktemp("built"))
    corpus.add("one.mkv")
    corpus.add("two.mkv", "zh")
    corpus.add("three.MKV", "zh")
    corpus.label(
        {"clip_id": "one", "emotion": "happy", "kappa": "0.5"},
        {"clip_id": "three", "split": "test", "language": "en", "speaker": "a"},
    )
    assert corpus.build() == 0
    return corpus


def test_a_build_holds_what_was_given(built):
    train = records.RecordSource(built.out, "train")
    record = train[train.index("one")]
    assert len(train) == 2
    assert record.frames.shape == (4, 84, 84, 3)
    assert [int(frame.mean()) for frame in record.frames] == [0, 20, 35, 55]
    assert record.seconds_per_grid == pytest.approx(0.5, abs=1e-3)
    np.testing.assert_array_equal(record.audio, tone(1))
    assert record.annotation == annotations.parse_annotation(annotation("en"))
    assert record.labels == {"emotion": "happy", "kappa": "0.5"}
    assert record.provenance["sampling"]["mode"] == "exact"
    assert record.provenance["file"] == "one.mkv"
    assert len(record.provenance["sha256"]) == 64


def test_split_and_language_come_from_the_labels_else_from_option_and_text(built):
    assert records.RecordSource(built.out, "test")[0].language == "en"  # Labelled, text is Chinese.
    train = records.RecordSource(built.out, "train")
    assert {size[0]: size[1] for size in train.sizes} == {"one": "en", "two": "zh"}


def test_the_vocabulary_is_trained_on_targets_and_prompts(built):
    tokenizer = load_tokenizer(built.out)
    assert tokenizer.vocab_size == 1064
    prompt = sed.prompt_text("en", True, True)
    assert len(tokenizer.encode(prompt)) < len(prompt) / 3


def test_a_second_run_does_nothing(built, capsys, monkeypatch):
    monkeypatch.setattr(clips, "decode_job", lambda _: pytest.fail("decoded again"))
    assert built.build() == 0
    assert "already built" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "named"),
    [(["--fps", "2"], "fps 4.0 -> 2.0"), (["--vocab_size", "800"], "vocab_size 1064 -> 800")],
)
def test_other_settings_for_the_same_output_are_refused(built, capsys, more, named):
    assert built.build(*more) == 2
    assert named in capsys.readouterr().err


def test_changed_inputs_for_the_same_output_are_refused(built, tmp_path, capsys):
    copy = Corpus(tmp_path)
    for old, new in [(built.clips, copy.clips), (built.annotations, copy.annotations)]:
        shutil.copytree(old, new, dirs_exist_ok=True)
    shutil.copytree(built.out, copy.out)
    shutil.copy2(built.labels, copy.labels)
    assert copy.build() == 0  # The same files elsewhere are the same inputs.
    copy.annotate("one", annotation("zh"))
    assert copy.build() == 2
    error = capsys.readouterr().err
    assert "annotations" in error and "labels" not in error


def test_a_foreign_directory_is_not_touched(corpus, capsys):
    corpus.add("one.mkv")
    corpus.out.mkdir()
    (corpus.out / "thesis.txt").write_text("years of work")
    assert corpus.build() == 2
    assert "is not a build" in capsys.readouterr().err
    assert os.listdir(corpus.out) == ["thesis.txt"]


def test_every_refused_clip_is_named_with_its_reason(corpus, capsys):
    corpus.add("good.mkv")
    corpus.add("mute.mkv", audio=None)
    corpus.add("still.mkv", frames=gray_frames(1, 30, 30))
    corpus.add("film.mkv", frames=gray_frames(2, 30, 30), times=[0, 4 * 3600.0])
    corpus.add("good.avi", codecs=("mpeg4", "mp2"), pixels="yuv420p")
    corpus.add("key.mkv")
    wrong = annotation("en")
    wrong["facial_desc"] = wrong.pop("facial_exp_desc")
    corpus.annotate("key", wrong)
    corpus.add("json.mkv")
    (corpus.annotations / "json.json").write_text("{")
    corpus.add("lonely.mkv")
    (corpus.annotations / "lonely.json").unlink()
    for name, content in [("zero.mp4", b""), ("text.mp4", b"no video" * 99)]:
        corpus.annotate(Path(name).stem, annotation("en"))
        (corpus.clips / name).write_bytes(content)
    (corpus.clips / "notes.txt").write_text("not a clip")
    assert corpus.build() == 1
    assert corpus.refused() == {
        "mute.mkv": "no_audio",
        "still.mkv": "too_short",
        "film.mkv": "too_long",
        "good.mkv": "duplicate_id",
        "key.mkv": "bad_annotation",
        "json.mkv": "bad_annotation",
        "lonely.mkv": "no_annotation",
        "zero.mp4": "empty_file",
        "text.mp4": "unreadable",
    }
    out = capsys.readouterr().out
    assert "Kept 1 of 10 clips" in out
    assert 'unknown key "facial_desc"; did you mean "facial_exp_desc"?' in out
    assert records.RecordSource(corpus.out, "train")[0].clip_id == "good"
    assert corpus.build() == 1  # Nothing to do, and still nothing better.


def test_flat_annotations_are_taken_and_the_shape_is_shown_once(corpus, capsys):
    corpus.add("flat.mkv")
    corpus.annotate("flat", dict.fromkeys(records.FIELDS, "Said."))
    for name in ("x.mkv", "y.mkv"):
        corpus.add(name)
        corpus.annotate(Path(name).stem, {"description": "Said."})
    assert corpus.build() == 1
    out = capsys.readouterr().out
    assert out.count(annotations.ANNOTATION_SHAPE) == 1 and "Refused 2, bad_annotation" in out
    [record] = records.RecordSource(corpus.out, "train")
    assert record.annotation == dict.fromkeys(records.FIELDS, "Said.")


def test_what_was_of_no_use_is_counted_and_named(corpus, capsys):
    corpus.add("one.mkv")
    corpus.annotate("lonely", annotation("en"))
    (corpus.clips / "song.xyz").write_text("?")
    assert corpus.build() == 0
    for _ in range(2):  # The second run does nothing, and says it again.
        out = capsys.readouterr().out
        assert "1 files were ignored" in out and "song.xyz" in out
        assert "1 annotations have no clip: lonely.json" in out
        assert corpus.build() == 0
    unused = json.loads((corpus.out / "build.json").read_text())["unused"]
    assert unused["annotations"] == ["lonely.json"]


def test_nothing_usable_is_an_error_and_leaves_no_output(corpus, capsys):
    assert corpus.build() == 2
    assert "No clips" in capsys.readouterr().err
    corpus.add("mute.mkv", audio=None)
    assert corpus.build() == 2
    captured = capsys.readouterr()
    assert "None of the 1 clips" in captured.err
    assert "mute.mkv" in captured.out
    assert not corpus.out.exists()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 1 is not JSON"),
        ("[]", 'must be an object with a "clip_id"'),
        ('{"clip_id": "one", "emotoin": "sad"}', "unknown keys emotoin"),
        ('{"clip_id": "one", "language": "fr"}', "language 'fr'"),
    ],
)
def test_a_wrong_label_stops_the_build(corpus, capsys, line, message):
    corpus.add("one.mkv")
    corpus.labels.write_text(line + "\n")
    assert corpus.build() == 2
    assert message in capsys.readouterr().err


def test_without_training_clips_a_vocabulary_must_be_given(corpus, built, capsys):
    corpus.add("one.mkv")
    assert corpus.build("--split", "test") == 2
    assert "--tokenizer" in capsys.readouterr().err
    given = built.out / "tokenizer.model"
    assert corpus.build("--split", "test", "--tokenizer", str(given)) == 0
    assert (corpus.out / "tokenizer.model").read_bytes() == given.read_bytes()


def test_the_release_mode_is_recorded(corpus):
    corpus.add("one.mkv")
    inputs = corpus.arguments()[: -len(PIXELS)]
    assert build.main([*inputs, "--mode", "saber_release"]) == 0
    record = records.RecordSource(corpus.out, "train")[0]
    assert record.seconds_per_grid == 1.0
    assert record.frames.shape == (4, 336, 336, 3)
    assert record.provenance["sampling"]["max_frames"] == 40


def group_ends(group: int, seconds: float) -> bool:
    """Whether every process of a session is gone before the time is up."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.02)
    return False


def test_a_killed_build_goes_on_where_it_was(corpus, capsys):
    first = corpus.add("clip00.mkv", frames=gray_frames(36, 200, 200))
    for index in range(1, 30):
        shutil.copy(first, corpus.clips / f"clip{index:02d}.mkv")
        corpus.annotate(f"clip{index:02d}", annotation("en"))
    command = [sys.executable, "-m", "data_prep.build", *corpus.arguments()]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    staging = Path(f"{corpus.out}.partial") / "staging"
    deadline = time.monotonic() + 30
    while len(list(staging.glob("*.npz"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert group_ends(process.pid, seconds=10)
    done = len(list(staging.glob("*.npz")))
    assert 3 <= done < 30
    assert not corpus.out.exists()
    assert corpus.build() == 0
    assert f"{done} of 30 clips were decoded by an earlier run" in capsys.readouterr().out
    assert len(records.RecordSource(corpus.out, "train")) == 30
    assert not staging.parent.exists()


def test_a_build_that_ends_while_writing_goes_on_with_what_was_decoded(corpus, monkeypatch, capsys):
    for name in ("one.mkv", "two.mkv", "three.mkv"):
        corpus.add(name)

    def fail_at_two(job: clips.DecodeJob) -> records.Record:
        if job.clip_id == "two":
            raise OSError("no space left")
        return clips.load_staged(job)

    with monkeypatch.context() as patch:
        patch.setattr(build, "clips", SimpleNamespace(**vars(clips)))
        build.clips.load_staged = fail_at_two
        assert corpus.build() == 2
    assert not corpus.out.exists()
    assert corpus.build() == 0
    assert "3 of 3 clips were decoded by an earlier run" in capsys.readouterr().out
    assert len(records.RecordSource(corpus.out, "train")) == 3


def test_beam_builds_what_is_built_without_it(corpus):
    corpus.add("one.mkv")
    corpus.add("two.mkv", "zh")
    corpus.add("mute.mkv", audio=None)
    assert corpus.build() == 1
    by_beam = corpus.arguments("--beam_pipeline_options", IN_MEMORY)
    out = by_beam[by_beam.index("--out") + 1] = f"{corpus.out}_beam"
    assert build.main(by_beam) == 1
    assert (Path(out) / "refused.jsonl").read_text() == (corpus.out / "refused.jsonl").read_text()
    one, other = (records.RecordSource(path, "train") for path in (corpus.out, out))
    assert len(one) == len(other) == 2
    for index in range(2):
        pair = (records.to_example(source[index]) for source in (one, other))
        np.testing.assert_equal(*pair)
    assert not Path(f"{out}.partial").exists()


def lost(job: clips.DecodeJob) -> records.Record:
    raise RuntimeError(f"the disk under {job.clip_id} is gone")


def test_a_build_that_fails_in_beam_does_not_look_like_one_that_refused(
    corpus, capsys, monkeypatch
):
    corpus.add("one.mkv")
    monkeypatch.setattr(clips, "load_staged", lost)
    assert build.main(corpus.arguments("--beam_pipeline_options", IN_MEMORY)) == 3
    assert "the disk under one is gone" in capsys.readouterr().err
    assert not corpus.out.exists()


def test_two_builds_of_one_output_do_not_mix(corpus, capsys):
    corpus.add("one.mkv")
    with build._lock(corpus.out):
        assert corpus.build() == 2
    assert "Another build" in capsys.readouterr().err


def crash_on_bad(job: clips.DecodeJob) -> clips.Refusal | None:
    if Path(job.clip_id).name == "bad":
        os.kill(os.getpid(), signal.SIGKILL)
    return None


def test_a_file_that_crashes_the_decoder_is_refused_alone():
    jobs = [job("good"), job("bad"), *(job(str(index)) for index in range(8))]
    results = {done.clip_id: refusal for done, refusal in processes.run_jobs(jobs, 2, crash_on_bad)}
    assert set(results) == {job.clip_id for job in jobs}
    assert results.pop("bad").detail == "the decoder crashed"
    assert set(results.values()) == {None}


def test_a_beam_worker_survives_a_file_that_crashes_the_decoder(tmp_path):
    options = build._beam_options(IN_MEMORY)
    jobs = [job(str(tmp_path / name)) for name in ("good", "bad")]
    found = {j.path.stem: why for j, why in processes.run_beam(jobs, options, crash_on_bad)}
    assert found["bad"].detail == "the decoder crashed"
    assert found["good"] is None


def job(name: str) -> clips.DecodeJob:
    return clips.DecodeJob(
        clip_id=name,
        file=f"{name}.mp4",
        split="train",
        language="en",
        path=Path(f"{name}.mp4"),
        staged=Path(f"{name}.npz"),
        annotation={},
        labels={},
        sampling=FrameSampling(),
    )
