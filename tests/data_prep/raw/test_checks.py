"""Transcripts, captions, consistency, split: what is dropped, what is kept, and why."""

import base64
import collections
import io
import itertools
import json
import subprocess
import sys
import wave
from pathlib import Path

import numpy as np
import pytest
import scipy.signal
from PIL import Image

pytest.importorskip("faster_whisper", reason="requirements-prep.txt is not installed")

from data_prep.corpus import espeak
from data_prep.corpus.plan import EMOTIONS, fused
from data_prep.raw import attach, captions, consistency, recogniser, split, transcripts
from data_prep.raw.answers import EndpointSettings, NoJsonError, extract_json
from data_prep.raw.consistency import ConsistencySettings, Cue, relate
from data_prep.raw.shards import Dropped, ShardedStage
from data_prep.raw.split import SplitSettings
from data_prep.raw.transcripts import TranscriptSettings, compare, verdict, words
from saber_jax.data.conflicts import CONFLICT_TYPES
from saber_jax.endpoint import Endpoint
from tests.loopback import Answer, chat_server
from tests.media_files import gray_frames, tone, write_clip


@pytest.mark.parametrize(
    ("text", "language", "expected"),
    [
        ("Well, <laughs> DON'T go!", "en", ["well", "don't", "go"]),
        ("“It’s” 3 o'clock", "en", ["it's", "3", "o'clock"]),
        ("你好，<笑声>世界！", "zh", list("你好世界")),
        ("ＯＫ，好（笑声）", "zh", list("ok好")),
        ("<door slams>", "en", []),
    ],
)
def test_only_words_are_compared(text, language, expected):
    assert words(text, language) == expected


@pytest.mark.parametrize(
    ("written", "heard", "language", "errors", "rate"),
    [
        ("I lost my keys.", "i lost my keys", "en", 0, 0.0),
        ("I lost my keys.", "I lost keys now", "en", 2, 0.5),
        ("<sighs> I know", "I know", "en", 0, 0.0),
        ("我丢了钥匙。", "我丢了药匙", "zh", 1, 0.2),
        ("", "hello there", "en", 2, 2.0),
        ("hello there", "", "en", 2, 1.0),
        ("", "", "zh", 0, 0.0),
    ],
)
def test_error_rates_count_words_in_english_and_characters_in_chinese(
    written, heard, language, errors, rate
):
    check = compare(written, heard, language)
    assert (check["errors"], check["rate"]) == (errors, rate)
    assert check["measure"] == {"en": "wer", "zh": "cer"}[language]


@pytest.mark.parametrize(
    ("written", "heard", "expected"),
    [
        ("one two three four", "one two three four", None),
        ("one two three", "uno due three", None),  # Two slips of three words may be the ear's.
        ("one two three four", "uno due tre four", "unlike"),
        ("one two three", "", "unsaid"),
        ("", "one two three", "unwritten"),
        ("", "hm", None),
    ],
)
def test_a_clip_is_dropped_for_many_errors_and_not_for_few(written, heard, expected):
    check = compare(written, heard, "en")
    assert verdict(check, "en", TranscriptSettings()) == expected


def row(clip_id: str, **more) -> dict:
    text = "A person speaks."
    annotation = {
        "audio_desc": {"speech_content": "one two three four", "acoustic_feat": text},
        "video_desc": text,
        "facial_exp_desc": text,
        "body_lang_desc": "",
        "sentiment_analysis": text,
    }
    base = {
        "clip_id": clip_id,
        "file": f"{clip_id}.mp4",
        "corpus": "c",
        "video": clip_id,
        "speaker": "",
        "language": "en",
        "split": "",
        "labels": {},
        "annotation": annotation,
        "provenance": [],
        "relation": "consistent",
    }
    return base | more


@pytest.mark.parametrize(
    ("said", "language", "voice"),
    [
        ("We won the game.", "en", "en-us+m3"),
        ("他说他很高兴，可是他的声音听起来非常难过。", "zh", "cmn+m3"),
    ],
)
def test_the_offline_recognisers_hear_what_is_said(said, language, voice):
    request = {"text": said, "voice": voice, "rate": 150, "pitch": 50, "range": 50}
    answer = subprocess.run(
        [sys.executable, "-m", "data_prep.corpus.espeak"],
        input=json.dumps(request).encode() + b"\n",
        capture_output=True,
        check=True,
        cwd=Path(__file__).parents[3],
    ).stdout
    rate, size = espeak.HEADER.unpack_from(answer)
    spoken = np.frombuffer(answer, np.int16, size // 2, espeak.HEADER.size)
    at_16_khz = scipy.signal.resample_poly(spoken / 32768.0, 16_000 // 50, rate // 50)
    sound = (32767 * np.clip(at_16_khz, -1, 1)).astype(np.int16)
    check = compare(said, recogniser.recognise(sound, language), language)
    assert check["rate"] <= 0.25, check


def test_without_a_recogniser_for_its_language_a_clip_passes_and_says_so(tmp_path, capsys):
    [french] = transcripts.offline([row("a", language="fr")], TranscriptSettings())
    why = french["checks"]["transcript"]["skipped"]
    assert why == "not checked: language fr has no offline recogniser"
    [english] = transcripts.offline([row("b")], TranscriptSettings(recogniser="none"))
    assert english["checks"]["transcript"] == {"skipped": 'not checked: recogniser = "none"'}
    stage = checked_stage(tmp_path)
    stage.write(0, [french, english], [french, english])
    transcripts.report(stage)
    assert "2 clips passed unchecked" in capsys.readouterr().out
    text = (tmp_path / "transcripts/disagreements.txt").read_text()
    assert "2 clips were not checked." in text
    assert "a  not checked: language fr has no offline recogniser" in text


def checked_stage(out) -> ShardedStage:
    reasons = transcripts.REASONS
    return ShardedStage(name="transcripts", out=str(out), shards=1, settings={}, reasons=reasons)


def test_disagreements_are_listed_worst_first_and_aligned(tmp_path):
    stage = checked_stage(tmp_path)
    good = row("fine", checks={"transcript": compare("one two", "one two", "en")})
    near = row(
        "near", checks={"transcript": compare("one two three four", "one two tree four", "en")}
    )
    far = row("far", checks={"transcript": compare("one two three four", "uno due tre", "en")})
    stage.write(0, [good, near, far], [good, near, Dropped(row=far, reason="unlike")])
    transcripts.report(stage)
    text = (tmp_path / "transcripts/disagreements.txt").read_text()
    assert text.index("far") < text.index("near") and "fine" not in text
    assert "REF:" in text and "HYP:" in text


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ('{"a": 1}', {"a": 1}),
        ('```json\n{"a": {"b": "}"}}\n```', {"a": {"b": "}"}}),
        ('Sure {nicely} so: {"a": 1} and {"b": 2}', {"a": 1}),
        ('{"a": "line\nbreak"}', {"a": "line\nbreak"}),
    ],
)
def test_json_is_found_in_whatever_surrounds_it(text, value):
    assert extract_json(text) == value


@pytest.mark.parametrize("text", ["", "I cannot help.", '{"a": "cut of', "[1, 2]", "{" * 5000])
def test_no_json_is_an_error(text):
    with pytest.raises(NoJsonError):
        extract_json(text)


def asked(work, rows, settings, script):
    """Outcomes of a stage whose endpoints all answer with `script`."""
    import concurrent.futures

    with chat_server(script) as server, concurrent.futures.ThreadPoolExecutor(2) as pool:
        client = Endpoint(url=server.url, model="m", retries=0)
        clients = collections.defaultdict(lambda: client)
        return list(work(rows, clients, pool, settings=settings)), server.requests


def test_a_clip_is_sent_as_pictures_and_sound_or_as_it_is(tmp_path):
    path = write_clip(tmp_path / "a.mp4", frames=gray_frames(24), audio=tone(2), **H264)
    settings = attach.AttachSettings(fps=2.0, max_frames=16)
    parts = attach.parts(str(path), settings)
    assert [part["type"] for part in parts] == ["image_url"] * 4 + ["input_audio"]
    picture = base64.b64decode(parts[3]["image_url"]["url"].split(",")[1])
    assert np.asarray(Image.open(io.BytesIO(picture))).mean() > 80  # A late, brighter frame.
    with wave.open(io.BytesIO(base64.b64decode(parts[4]["input_audio"]["data"]))) as sound:
        assert (sound.getframerate(), sound.getnchannels()) == (16_000, 1)
        assert sound.getnframes() == pytest.approx(32_000, abs=2_000)
    assert attach.parts(str(path), settings, sound=False) == parts[:4]
    [whole] = attach.parts(str(path), attach.AttachSettings(send="video"))
    assert base64.b64decode(whole["video_url"]["url"].split(",")[1]) == path.read_bytes()


H264 = {"codecs": ("libx264", "aac"), "pixels": "yuv420p"}


@pytest.mark.parametrize(("score", "kept"), [(5, True), (3, True), (2, False), ("5", None)])
def test_a_contradicted_picture_is_dropped(monkeypatch, score, kept):
    monkeypatch.setattr(captions.attach, "parts", lambda *_, **__: [{"type": "text", "text": "x"}])

    def script(request, _):
        import json

        if "silent clip" in request["messages"][0]["content"]:
            found = {"video_desc": 4, "facial_exp_desc": score, "body_lang_desc": 5}
            return Answer(text=json.dumps({**found, "contradiction": "she does not smile"}))
        return Answer(text='{"scene": "a room", "face": "a frown", "body": "still"}')

    settings = captions.CaptionSettings(judge=EndpointSettings(model="j"))
    [outcome], _ = asked(captions.work, [row("a")], settings, script)
    if kept:
        assert outcome["checks"]["caption"]["caption"]["face"] == "a frown"
    else:
        assert outcome.reason == ("contradicted" if kept is False else "bad_answer")
    if kept is False:
        assert "she does not smile" in outcome.detail


@pytest.mark.parametrize("pair", itertools.permutations(EMOTIONS, 2))
def test_a_face_and_a_voice_that_differ_conflict_as_far_as_in_the_embedded_corpus(pair):
    found = relate(Cue(emotion=pair[0]), Cue(emotion=pair[1]), None, ConsistencySettings())
    assert found.relation == "inconsistent"
    assert found.conflict_type in CONFLICT_TYPES[1:-1]
    assert found.kappa == pytest.approx(fused(*pair, pair[1])[2], abs=1e-3)


@pytest.mark.parametrize(
    ("face", "voice", "words", "relation", "kind"),
    [
        (Cue(emotion="fear"), Cue(emotion="sad"), None, "consistent", "none"),
        (Cue(emotion="disgust"), Cue(emotion="angry"), None, "consistent", "none"),
        (Cue(emotion="happy"), Cue(emotion="contempt"), None, "inconsistent", "sarcasm"),
        (Cue(emotion="happy", intensity=0.1), Cue(emotion="neutral"), None, "unclear", "none"),
        (Cue(valence=0.6), Cue(valence=-0.6), None, "inconsistent", "other"),
        (Cue(valence=0.0), Cue(valence=-0.8), None, "inconsistent", "suppression"),
        (Cue(valence=0.1), Cue(valence=-0.1), None, "consistent", "none"),
        (Cue(emotion="angry"), Cue(emotion="angry"), Cue(valence=1.0), "inconsistent", "sarcasm"),
        (Cue(emotion="happy"), Cue(emotion="happy"), Cue(valence=-1.0), "inconsistent", "other"),
        (Cue(emotion="happy"), Cue(emotion="happy"), Cue(valence=0.0), "consistent", "none"),
    ],
)
def test_relations(face, voice, words, relation, kind):
    found = relate(face, voice, words, ConsistencySettings())
    assert (found.relation, found.conflict_type) == (relation, kind)
    assert 0 <= found.kappa <= 1 and (found.kappa > 0 or relation == "consistent")


def test_labels_of_the_corpus_decide_without_asking_and_a_judge_is_asked_blindly():
    def script(request, _):
        voice = '"acoustic_feat"' in request["messages"][1]["content"]
        return Answer(text=f'{{"emotion": "{"angry" if voice else "happy"}", "intensity": 1}}')

    known = row("known", labels={"face": "sad", "voice": "happy", "emotion": "sad"})
    rows = [known, row("asked")]
    outcomes, requests = asked(consistency.work, rows, ConsistencySettings(), script)
    assert outcomes[0]["labels"]["conflict_type"] == "leakage"
    assert outcomes[1]["labels"]["conflict_type"] == "sarcasm"
    assert outcomes[1]["labels"]["face"] == "happy"
    assert len(requests) == 3
    fields = ("video_desc", "acoustic_feat", "speech_content")
    for request in requests:  # One modality a question, and never the conclusion.
        text = request["messages"][1]["content"]
        assert sum(f'"{field}"' in text for field in fields) == 1
        assert "sentiment_analysis" not in text


def placed(rows: list[dict], settings: SplitSettings) -> list:
    """The outcome of the split for every row."""
    place = split.plan([{key: row[key] for key in split.KEYS} for row in rows], settings)
    return [place(row) for row in rows]


def crowd(count: int, people: int, *, films: int = 40, seed: int = 0) -> list[dict]:
    """Clips of some people, some of them two at a time, cut from films."""
    rng = np.random.default_rng(seed)
    rows = []
    for index in range(count):
        cast = rng.choice(people, size=1 + (rng.random() < 0.02), replace=False)
        rows.append(
            row(
                f"clip{index}",
                speaker="+".join(f"p{p}" for p in cast),
                video=f"film{rng.integers(films)}-{cast[0]}",
                language=("en", "zh")[int(cast[0]) % 2],
                relation=str(rng.choice(["consistent", "consistent", "inconsistent", "unclear"])),
            )
        )
    return rows


@pytest.mark.parametrize("seed", range(5))
def test_no_speaker_and_no_video_of_the_test_set_is_in_training(seed):
    rows = crowd(1500, people=120, seed=seed)
    outcomes = placed(rows, SplitSettings(test=80, seed=seed))
    kept = [outcome for outcome in outcomes if not isinstance(outcome, Dropped)]
    assert len(outcomes) == len(rows)
    people = collections.defaultdict(set)
    for clip in kept:
        for name in [*clip["speaker"].split("+"), "film " + clip["video"]]:
            people[name].add(clip["split"] == "test")
    assert all(len(sides) == 1 for sides in people.values())
    assert not split.leaks(kept)
    assert {outcome.reason for outcome in outcomes if isinstance(outcome, Dropped)} == {"reserved"}


def test_the_test_set_is_balanced_and_not_larger_than_wanted():
    kept = [
        outcome
        for outcome in placed(crowd(1500, people=120), SplitSettings(test=80))
        if not isinstance(outcome, Dropped)
    ]
    cells = collections.Counter(
        (clip["language"], clip["relation"]) for clip in kept if clip["split"] == "test"
    )
    assert set(cells) == {(x, y) for x in ("en", "zh") for y in split.BALANCED}
    assert set(cells.values()) == {20}
    mined = [clip for clip in kept if clip["split"] == "preference"]
    assert mined and {clip["relation"] for clip in mined} == {"inconsistent"}


def test_groups_that_gave_no_clip_to_the_test_go_back_to_training():
    rows = [row(f"c{i}", speaker=f"p{i}", relation="inconsistent") for i in range(30)]
    rows.append(row("agreeing", speaker="p", relation="consistent"))
    outcomes = placed(rows, SplitSettings(test=20))
    splits = collections.Counter(outcome["split"] for outcome in outcomes)
    assert splits["test"] == 2 and splits["train"] + splits["preference"] == 29


def test_a_leak_is_found():
    train, test = row("a", speaker="x+y", split="train"), row("b", speaker="y", split="test")
    assert split.leaks([train, test]) == ["speaker y"]
    test = row("b", video="a", split="test")
    assert split.leaks([train | {"speaker": ""}, test]) == ["video c a"]


def test_the_cast_of_a_series_stays_in_training_and_published_tests_stay_out_of_it():
    series = [row(f"s{i}", speaker="joey", video=f"e{i}", split="test") for i in range(50)]
    series += [row(f"t{i}", speaker="joey", video=f"f{i}", split="train") for i in range(50)]
    others = crowd(300, people=60)
    outcomes = placed([*series, *others], SplitSettings(test=20))
    reasons = collections.Counter(o.reason for o in outcomes if isinstance(o, Dropped))
    assert reasons["published_test"] == 50
    joey = [o for o in outcomes if not isinstance(o, Dropped) and o["speaker"] == "joey"]
    assert {clip["split"] for clip in joey} == {"train"} and len(joey) == 50


def test_the_split_depends_on_seed_and_clips_alone_and_not_on_their_order():
    rows = crowd(400, people=60)
    forward = {
        o["clip_id"]: o["split"]
        for o in placed(rows, SplitSettings(test=20))
        if not isinstance(o, Dropped)
    }
    back = {
        o["clip_id"]: o["split"]
        for o in placed(rows[::-1], SplitSettings(test=20))
        if not isinstance(o, Dropped)
    }
    assert forward == back


def test_a_test_set_that_is_smaller_than_asked_for_is_named():
    counts = {"test consistent en": 3, "test inconsistent en": 3, "train consistent en": 90}
    assert split.shortfall(counts, SplitSettings(test=6)) is None
    assert "6 of the 8 clips" in (split.shortfall(counts, SplitSettings(test=8)) or "")
