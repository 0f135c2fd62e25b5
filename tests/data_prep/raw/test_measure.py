"""Measures of clips whose faults are known, and the thresholds over them."""

import concurrent.futures
import dataclasses
import errno
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("cv2", reason="requirements-prep.txt is not installed")

import itertools

from PIL import Image, ImageFilter

from data_prep.raw import filters, measure, segment, storage
from data_prep.raw.filters import Duplicates, FilterSettings, verdicts
from data_prep.raw.measure import MeasureSettings, longest_track
from data_prep.raw.shards import Dropped, ShardedStage
from saber_jax.data.frame_sampling import MediaError
from tests.media_files import RATE, tone, write_clip

SHAPE = (180, 240, 3)


def noise(count: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (count, *SHAPE), np.uint8)


def pictures(count: int, seed: int) -> np.ndarray:
    """Large moving shapes, different for every seed."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (6, 8, 3), np.uint8))
    large = np.asarray(small.resize((SHAPE[1], SHAPE[0])))
    return np.stack([np.roll(large, 3 * i, axis=1) for i in range(count)])


def sound(seconds: float, seed: int) -> np.ndarray:
    """A tune, different for every seed."""
    rng = np.random.default_rng(seed)
    pitch = np.repeat(rng.uniform(100, 3000, int(seconds * 8)), RATE // 8)
    return (8000 * np.sin(2 * np.pi * np.cumsum(pitch) / RATE)).astype(np.int16)


def clip(path, frames=None, audio=None, **more):
    frames = pictures(24, 0) if frames is None else frames
    audio = tone(2) if audio is None else audio
    return write_clip(path, frames=frames, audio=audio, **more)


def test_a_clip_is_measured_as_it_was_made(tmp_path):
    m = measure.measure(clip(tmp_path / "a.mkv"))
    assert (m["seconds"], m["width"], m["height"], m["fps"]) == (2.0, 240, 180, 12.0)
    # A sine of amplitude 8000: -12.2 dB below full scale, and 3 dB for its root mean square.
    assert m["loudness"] == pytest.approx(-15.3, abs=1.0)
    assert (m["speech"], m["black"], m["frozen"], m["faces"]) == (0.0, 0.0, 0.0, 0.0)
    assert m["kilobits_per_second"] == pytest.approx(
        (tmp_path / "a.mkv").stat().st_size * 8 / 2000, rel=0.01
    )


def test_silence_black_and_standstill_are_seen(tmp_path):
    silent = measure.measure(clip(tmp_path / "s.mkv", audio=np.zeros(2 * RATE, np.int16)))
    assert silent["loudness"] == measure.SILENCE
    frames = pictures(24, 0).copy()
    frames[12:] = 0
    black = measure.measure(clip(tmp_path / "b.mkv", frames=frames))
    assert black["black"] == pytest.approx(0.5, abs=0.1)
    frames = pictures(24, 0).copy()
    frames[6:] = frames[6]
    frozen = measure.measure(clip(tmp_path / "f.mkv", frames=frames))
    assert frozen["frozen"] == pytest.approx(0.75, abs=0.1)


def test_blur_widens_edges(tmp_path):
    stripes = np.zeros((12, *SHAPE), np.uint8)
    stripes[:, :, ::40] = stripes[:, :, 1::40] = 255
    soft = np.stack(
        [np.asarray(Image.fromarray(f).filter(ImageFilter.GaussianBlur(3))) for f in stripes]
    )
    sharp, blurred = (
        measure.measure(clip(tmp_path / f"{i}.mkv", frames=f))["blur"]
        for i, f in enumerate([stripes, soft])
    )
    assert blurred > 1.5 * sharp
    grey = np.full((12, *SHAPE), 128, np.uint8)
    assert measure.measure(clip(tmp_path / "grey.mkv", frames=grey))["blur"] == measure.NO_EDGES


@pytest.mark.parametrize(
    ("name", "make", "reason"),
    [
        ("silent.mkv", lambda p: write_clip(p, frames=noise(4), audio=None), "no_audio"),
        ("blind.mkv", lambda p: write_clip(p, frames=None, audio=tone(1)), "no_video"),
        ("text.mp4", lambda p: p.write_bytes(b"no video" * 99), "unreadable"),
        ("empty.mp4", lambda p: p.write_bytes(b""), "unreadable"),
    ],
)
def test_what_cannot_be_measured_is_named(tmp_path, name, make, reason):
    make(tmp_path / name)
    row = {"clip_id": name, "file": str(tmp_path / name), "provenance": []}
    [outcome] = measure.work([row], MeasureSettings())
    assert isinstance(outcome, Dropped) and outcome.reason == reason


def test_a_track_is_one_face_in_successive_looks():
    here, near, there = (10, 10, 50, 50), (20, 12, 50, 50), (200, 10, 50, 50)
    assert longest_track([[here], [near], [here]]) == 3
    assert longest_track([[here], [there], [here]]) == 1
    assert longest_track([[here, there], [there], [there, here], []]) == 3
    assert longest_track([[], []]) == 0


GOOD = {
    "seconds": 3.0,
    "width": 640,
    "height": 480,
    "kilobits_per_second": 900.0,
    "loudness": -20.0,
    "speech": 2.0,
    "blur": 6.0,
    "black": 0.0,
    "frozen": 0.0,
    "faces": 1.0,
    "face_track": 1.0,
}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"seconds": 0.5}, "too_short"),
        ({"seconds": 90.0}, "too_long"),
        ({"loudness": -60.0}, "mute"),
        ({"speech": 0.1}, "mute"),
        ({"height": 96}, "low_resolution"),
        ({"width": 96}, "low_resolution"),
        ({"kilobits_per_second": 40.0}, "low_bitrate"),
        ({"black": 0.6}, "black"),
        ({"frozen": 0.9}, "frozen"),
        ({"blur": 20.0}, "blurred"),
        ({"faces": 0.2}, "no_face"),
        ({"face_track": 0.2}, "face_lost"),
    ],
)
def test_each_threshold_drops_what_is_beyond_it(change, reason):
    assert not list(verdicts(GOOD, FilterSettings()))
    assert next(verdicts({**GOOD, **change}, FilterSettings()))[0] == reason


def test_copies_are_found_and_likenesses_are_not(tmp_path):
    original = clip(tmp_path / "a.mkv", pictures(24, 1), sound(2, 1))
    variants = {
        "smaller and compressed": (pictures(24, 1)[:, ::2, ::2], sound(2, 1), ("libx264", "aac")),
        "other sound": (pictures(24, 1), sound(2, 2), ("ffv1", "flac")),
        "other picture": (pictures(24, 2), sound(2, 1), ("ffv1", "flac")),
    }
    known = Duplicates(FilterSettings())
    known.add("original", measure.measure(original))
    found = {}
    for name, (frames, audio, codecs) in variants.items():
        path = tmp_path / f"{name}.mkv"
        pixels = "yuv420p" if codecs[0] == "libx264" else "bgr0"
        write_clip(path, frames=frames, audio=audio, codecs=codecs, pixels=pixels)
        found[name] = known.find(measure.measure(path))
    assert found == {
        "smaller and compressed": "original",
        "other sound": None,
        "other picture": None,
    }


def stage(name: str, out) -> ShardedStage:
    return ShardedStage(name=name, out=str(out), shards=2, settings={}, reasons=filters.REASONS)


def test_of_duplicates_the_first_is_kept_also_after_an_interruption(tmp_path):
    hashes = {"hashes": ["0" * 16] * 3, "sound_hash": "f" * 16}
    path = clip(tmp_path / "a.mkv")
    rows = [{"clip_id": name, "file": str(path), "measures": {**GOOD, **hashes}} for name in "abcd"]
    source = stage("measure", tmp_path)
    source.claim("")
    source.write(0, rows[:2], rows[:2])
    source.write(1, rows[2:], rows[2:])
    target = stage("filter", tmp_path)
    assert filters.run(target, source, FilterSettings())["reasons"] == {"duplicate": 3}
    assert [row["clip_id"] for row in target.rows()] == ["a"]
    (tmp_path / "filter/kept-00001-of-00002.jsonl").unlink()
    filters.run(target, source, FilterSettings())
    assert [row["clip_id"] for row in target.rows()] == ["a"]


def test_a_contact_sheet_shows_what_was_dropped_and_what_was_kept(tmp_path):
    path = clip(tmp_path / "a.mkv")
    far = {"hashes": ["0" * 16] * 3, "sound_hash": "0" * 16}
    good = {"clip_id": "good", "file": str(path), "measures": {**GOOD, **far}}
    short = {"clip_id": "bad", "file": str(path), "measures": {**GOOD, **far, "seconds": 0.1}}
    source = stage("measure", tmp_path)
    source.claim("")
    source.write(0, [good, short], [good, short])
    source.write(1, [], [])
    filters.run(stage("filter", tmp_path), source, FilterSettings())
    sheets = {p.name: Image.open(p) for p in (tmp_path / "filter/sheets").iterdir()}
    assert set(sheets) == {"kept.png", "too_short.png"}
    tile = np.asarray(sheets["too_short.png"])[: filters.TILE, : filters.TILE]
    assert tile.std() > 20  # A picture, not an empty page.


SEGMENT = segment.SegmentSettings()


def test_clips_hold_whole_speech_and_never_cross_a_scene():
    speech, changes = [(2.0, 4.0), (4.5, 6.0), (8.0, 11.0)], [9.0]
    assert segment.plan(speech, changes, 12.0, SEGMENT) == [
        (1.75, 6.25),
        (7.75, 9.0),
        (9.0, 11.25),
    ]


def test_speech_without_end_is_divided_at_its_longest_pauses():
    speech = [(0.0, 9.0), (9.2, 15.0), (15.8, 24.0), (24.3, 30.0)]
    assert segment.plan(speech, [], 30.0, SEGMENT) == [(0.0, 15.25), (15.55, 30.0)]
    cut = segment.plan([(0.0, 70.0)], [], 70.0, SEGMENT)
    assert all(end - start <= SEGMENT.longest for start, end in cut)
    assert cut[0][0] == 0.0 and cut[-1][1] == 70.0
    assert all(b[0] == a[1] for a, b in itertools.pairwise(cut))


def test_a_stretch_of_a_video_becomes_a_clip_of_its_own(tmp_path):
    frames = np.repeat(np.arange(60, dtype=np.uint8)[:, None, None, None] * 4, 64, 1)
    frames = np.broadcast_to(frames, (60, 64, 64, 3))
    beep = np.concatenate([np.zeros(2 * RATE, np.int16), tone(1), np.zeros(2 * RATE, np.int16)])
    source = write_clip(tmp_path / "long.mkv", frames=frames, audio=beep)
    segment.write_clip(source, source, tmp_path / "cut.mp4", (2.0, 3.5))
    from saber_jax.data import decode

    cut = decode.decode_clip(tmp_path / "cut.mp4", decode.FrameSampling(fps=12, min_pixels=3136))
    assert cut.info["frames"] == 18
    levels = cut.frames.mean((1, 2, 3))
    assert levels[0] == pytest.approx(24 * 4, abs=6) and levels[-1] == pytest.approx(41 * 4, abs=6)
    loud = np.abs(cut.audio[: 3 * RATE // 2].astype(int)).reshape(15, -1).mean(1) > 1000
    assert loud[1:9].all() and not loud[11:].any()


def test_sound_that_pauses_stays_in_time_when_a_clip_is_cut(tmp_path):
    from saber_jax.data import decode

    beep = np.concatenate([np.zeros(2 * RATE, np.int16), tone(1)])
    source = write_clip(
        tmp_path / "long.mkv", frames=pictures(60, 0), audio=beep, hole=(1.5, 1.0), fps=12
    )
    segment.write_clip(source, source, tmp_path / "cut.mp4", (1.0, 4.5))
    for path, at in ((source, 3.0), (tmp_path / "cut.mp4", 2.0)):
        heard = np.abs(decode.decode_clip(path, decode.FrameSampling()).audio.astype(int))
        assert np.flatnonzero(heard > 4000)[0] / RATE == pytest.approx(at, abs=0.06)


def test_a_clip_that_is_cut_stands_upright_as_its_source_does(tmp_path):
    from saber_jax.data import decode

    frames = np.zeros((60, 56, 112, 3), np.uint8)
    frames[:, :, :56] = 255  # The left half, which a quarter turn brings to the bottom.
    one = 1 << 16
    source = write_clip(
        tmp_path / "long.mp4",
        frames=frames,
        audio=tone(5),
        codecs=("libx264", "aac"),
        pixels="yuv420p",
        matrix=(0, -one, 0, one, 0, 0, 0, 0, 1 << 30),
    )
    segment.write_clip(source, source, tmp_path / "cut.mp4", (1.0, 3.0))
    for path in (source, tmp_path / "cut.mp4"):
        seen = decode.decode_clip(path, decode.FrameSampling()).frames[0].astype(int)
        assert seen.shape[0] > seen.shape[1]
        assert seen[-20:].mean() > 200 and seen[:20].mean() < 50


def test_short_files_stay_as_they_are_and_silent_long_ones_are_named(tmp_path):
    short = clip(tmp_path / "short.mkv")
    row = {"clip_id": "short", "file": str(short), "provenance": []}
    [kept] = segment.work([row], SEGMENT, str(tmp_path / "clips"))
    assert (kept["file"], kept["start"], kept["end"]) == (str(short), 0.0, 2.0)
    brief = dataclasses.replace(SEGMENT, longest=1.0)
    [dropped] = segment.work([row], brief, str(tmp_path / "clips"))
    assert isinstance(dropped, Dropped) and dropped.reason == "no_speech"


def test_sound_in_a_file_of_its_own_is_joined_to_the_picture(tmp_path):
    mute = write_clip(tmp_path / "mute.mkv", frames=pictures(24, 0), audio=None)
    voice = write_clip(tmp_path / "voice.mka", frames=None, audio=tone(2))
    row = {"clip_id": "joined", "file": str(mute), "sound": str(voice), "provenance": []}
    [kept] = segment.work([row], SEGMENT, str(tmp_path / "clips"))
    assert measure.measure(tmp_path / "clips/joined.mp4")["loudness"] > -20
    assert kept["file"].endswith("clips/joined.mp4")


def test_clips_in_a_bucket_are_cut_and_measured_there(tmp_path):
    bucket = f"memory://{tmp_path.name}"
    mute = write_clip(tmp_path / "mute.mkv", frames=pictures(24, 0), audio=None)
    voice = write_clip(tmp_path / "voice.mka", frames=None, audio=tone(2))
    for file in (mute, voice):
        with storage.new_file(f"{bucket}/{file.name}") as copy:
            copy.write_bytes(file.read_bytes())
    row = {"clip_id": "a", "file": f"{bucket}/mute.mkv", "sound": f"{bucket}/voice.mka"}
    [cut] = segment.work([{**row, "provenance": []}], SEGMENT, f"{bucket}/clips")
    assert cut["file"] == f"{bucket}/clips/a.mp4"
    [measured] = measure.work([cut], MeasureSettings())
    assert measured["measures"]["loudness"] > -20


def test_unmeasurable_errors_carry_their_reason():
    assert MediaError("no_audio", "x").reason in measure.REASONS


KILLED = """
import av, os
open = av.open
av.open = lambda file, *rest, **named: os.abort() if "bad" in file else open(file, *rest, **named)
"""


def test_a_file_that_kills_its_decoder_costs_itself_in_every_stage(tmp_path, monkeypatch):
    (tmp_path / "sitecustomize.py").write_text(KILLED)  # Any new Python imports it.
    monkeypatch.syspath_prepend(tmp_path)
    good = clip(tmp_path / "good.mkv")
    shutil.copy(good, tmp_path / "bad.mkv")
    rows = [
        {"clip_id": name, "file": str(tmp_path / f"{name}.mkv"), "provenance": []}
        for name in ("bad", "good")
    ]
    crash = "the file cannot be decoded: the decoder crashed"

    def stages():  # In a thread that has no process yet.
        cut = segment.work(rows, SEGMENT, str(tmp_path / "clips"))
        bad, whole = measure.work(rows, MeasureSettings())
        return *cut, bad, whole, filters.sheet([(rows[0], ""), (rows[1], "")])

    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        uncut, kept, bad, measured, sheet = thread.submit(stages).result()
    assert (uncut.reason, uncut.detail) == ("unreadable", crash)
    assert (bad.reason, bad.detail) == ("unreadable", "the decoder crashed")
    assert kept["end"] == measured["measures"]["seconds"] == 2.0
    tiles = np.asarray(sheet)[: filters.TILE].reshape(filters.TILE, filters.COLUMNS, -1)
    assert (tiles[:, 0] == 255).all() and not (tiles[:, 1] == 255).all()


def test_a_full_disk_stops_the_stage_instead_of_dropping_the_clip(tmp_path, monkeypatch):
    monkeypatch.setattr(segment, "_encode", full_disk)
    with pytest.raises(OSError, match=r"No space left on device: 'cut\.mp4'"):
        segment.write_clip(tmp_path, tmp_path, Path("cut.mp4"), (0.0, 1.0))


def full_disk(path, *_):
    try:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError as error:
        raise MediaError("unreadable", "a.mkv") from error


def test_a_long_video_is_cut_into_what_is_said_in_it(tmp_path):
    from data_prep.corpus import voice as corpus_voice

    speaker, rng = corpus_voice.Speaker(), np.random.default_rng(0)
    style = corpus_voice.prosody("neutral", 0.7, rng)
    said = ("We won the game.", "The door is open.", "My bike is broken.")
    tracks = [corpus_voice.voice_track(speaker, s, "en", "m3", style, rng)[0] for s in said]
    pause = np.zeros(2 * RATE, np.int16)
    audio = np.concatenate([part for track in tracks for part in (pause, track)] + [pause])
    starts, at = [], 0
    for track in tracks:
        starts.append((at + len(pause)) / RATE)
        at += len(pause) + len(track)
    count = int(len(audio) / RATE * 12)
    # The picture changes in the middle of the second pause.
    change = round((starts[1] - 1) * 12)
    frames = np.concatenate([pictures(change, 1), pictures(count - change, 2)])
    path = write_clip(tmp_path / "long.mkv", frames=frames, audio=audio)

    speech, changes = segment.boundaries(path, SEGMENT)
    assert changes == [pytest.approx(change / 12, abs=0.1)]
    assert [start for start, _ in speech] == [pytest.approx(s, abs=0.35) for s in starts]
    short = dataclasses.replace(SEGMENT, longest=4.0, shortest=0.5)
    row = {"clip_id": "film", "file": str(path), "provenance": []}
    rows = list(segment.work([row], short, str(tmp_path / "clips")))
    assert [row["clip_id"] for row in rows] == ["film-0000", "film-0001", "film-0002"]
    for row, start in zip(rows, starts, strict=True):
        assert row["start"] <= start + 0.2 and row["end"] > start + 0.5
        made = measure.measure(tmp_path / f"clips/{row['clip_id']}.mp4")
        assert made["seconds"] == pytest.approx(row["end"] - row["start"], abs=0.2)
        assert made["speech"] > 0.4
