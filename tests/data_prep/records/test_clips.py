"""Which file belongs to which: names, folders, and everything that is of no use."""

import json
import os
import shutil
import unicodedata
from pathlib import Path

import pytest

from data_prep.records import clips, containers
from saber_jax.data.decode import FrameSampling
from tests.media_files import gray_frames, tone, write_clip

NFC, NFD = (unicodedata.normalize(form, "é") for form in ("NFC", "NFD"))


def annotation(text: str) -> str:
    audio = {"speech_content": "", "acoustic_feat": ""}
    names = ("video_desc", "facial_exp_desc", "body_lang_desc", "sentiment_analysis")
    return json.dumps({"audio_desc": audio, **dict.fromkeys(names, text)})


class Folders:
    """Writes files under clips/ and annotations/, and plans them."""

    def __init__(self, root: Path):
        self._root = root
        self.clips, self.annotations = root / "clips", root / "annotations"
        self.labels = root / "labels.jsonl"

    def add(self, *names: str, text: str = "said"):
        for name in names:
            path = self._root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(annotation(text) if name.endswith(".json") else "x")

    def inputs(self) -> clips.ClipInputs:
        labels = self.labels if self.labels.exists() else None
        return clips.find_inputs(self.clips, self.annotations, labels)

    def plan(self):
        settings = {"split": "train", "staging": self._root, "sampling": FrameSampling()}
        return clips.plan(self.inputs(), **settings)


@pytest.fixture
def folders(tmp_path):
    return Folders(tmp_path)


def test_a_clip_takes_the_annotation_of_its_own_folder(folders):
    folders.add("clips/A/001.mp4", "clips/B/001.mp4")
    folders.add("annotations/A/001.json", text="of A")
    folders.add("annotations/B/001.json", text="of B")
    jobs, refusals = folders.plan()
    assert not refusals
    assert {job.clip_id: job.annotation["video_desc"] for job in jobs} == {
        "A/001": "of A",
        "B/001": "of B",
    }
    assert len({job.staged for job in jobs}) == 2
    assert {job.file for job in jobs} == {"A/001.mp4", "B/001.mp4"}


@pytest.mark.parametrize(
    "content,why",
    [
        (b"```json\n{}\n```", "a.json: it is not JSON: "),
        (annotation("caf\xe9").encode("utf-16"), "a.json: it is not UTF-8 text "),
        (b'{"video_desc": "", "video_desc": ""}', "it has 'video_desc' twice"),
        (b"[]", "must be a JSON object"),
    ],
)
def test_an_annotation_that_cannot_be_read_says_what_is_wrong_with_it(folders, content, why):
    folders.add("clips/a.mp4", "annotations/a.json")
    (folders.annotations / "a.json").write_bytes(content)
    _, [refusal] = folders.plan()
    assert refusal.reason == "bad_annotation" and why in refusal.detail


def test_an_annotation_of_another_folder_is_not_taken_but_named(folders):
    folders.add("clips/B/001.mp4", "annotations/A/001.json")
    jobs, [refusal] = folders.plan()
    assert not jobs and (refusal.file, refusal.reason) == ("B/001.mp4", "no_annotation")
    assert "B/001.json" in refusal.detail and "A/001.json" in refusal.detail
    assert folders.inputs().unused()["annotations"] == ["A/001.json"]


@pytest.mark.parametrize(("clip", "text"), [(NFC, NFD), (NFD, NFC)])
def test_one_name_may_be_spelt_in_two_ways(folders, clip, text):
    folders.add(f"clips/{clip}/{clip}.mp4", f"annotations/{text}/{text}.json")
    folders.labels.write_text(json.dumps({"clip_id": f"{text}/{text}", "emotion": "sad"}) + "\n")
    [job], refusals = folders.plan()
    assert job.clip_id == f"{NFC}/{NFC}" and job.labels == {"emotion": "sad"} and not refusals


def test_a_name_that_is_no_text_is_refused(folders):
    folders.add("annotations/a.json")
    folders.clips.mkdir()
    (folders.clips / os.fsdecode(b"caf\xe9.mp4")).write_text("x")
    jobs, [refusal] = folders.plan()
    assert not jobs and refusal.reason == "bad_name"
    json.dumps([refusal.file, refusal.detail]).encode("utf-8")


def test_everything_in_the_folders_is_used_or_named(folders):
    taken = [f"clips/{i}{suffix}" for i, suffix in enumerate(containers.EXTENSIONS)]
    folders.add(*taken, "clips/A.MP4", "clips/notes.txt", "clips/._0.mp4", "clips/song.xyz")
    folders.add("annotations/A.json", "annotations/lonely.json", "annotations/read.me")
    folders.labels.write_text('{"clip_id": "A"}\n{"clip_id": "gone"}\n')
    inputs = folders.inputs()
    assert len(inputs.clips) == len(taken) + 1
    unused = inputs.unused()
    assert [os.path.basename(name) for name in unused["files"]] == [
        "read.me",
        "._0.mp4",
        "notes.txt",
        "song.xyz",
    ]
    assert unused["annotations"] == ["lonely.json"] and unused["labels"] == ["gone"]
    assert unused["unlabelled"] == sorted(str(i) for i in range(len(taken)))


# Muxer and codecs of each; FFmpeg cannot write the others that it reads.
WRITTEN = {
    **dict.fromkeys((".mp4", ".mov", ".3gp", ".f4v", ".ismv", ".m2t", ".mts"), ("libx264", "aac")),
    **dict.fromkeys((".flv", ".swf"), ("flv", "mp3")),
    **dict.fromkeys((".mpg", ".vob", ".wtv"), ("mpeg2video", "mp2")),
    ".avi": ("mpeg4", "mp3"),
    ".asf": ("msmpeg4", "mp3"),
    ".wmv": ("wmv2", "mp3"),
    ".rm": ("rv20", "ac3"),
    ".webm": ("libvpx", "libopus"),
    ".ogv": ("libvpx", "libopus"),
    ".mxf": ("mpeg2video", "pcm_s16le"),
    ".m2ts": ("libx264", "ac3"),
}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A clip in every container of WRITTEN."""
    folder = tmp_path_factory.mktemp("written")
    for suffix, codecs in WRITTEN.items():
        rate = 48_000 if codecs[1] in ("libopus", "pcm_s16le") else 44_100
        write_clip(
            folder / f"clip{suffix}",
            frames=gray_frames(12, 96, 176),
            audio=tone(0.6),
            fps=25,
            codecs=codecs,
            pixels="yuv420p",
            rate=rate,
        )
    return folder


@pytest.mark.parametrize("suffix", WRITTEN)
def test_a_video_is_taken_by_its_content_under_any_name_and_decoded(folders, written, suffix):
    folders.add("annotations/a.json", "clips/notes.txt")
    shutil.copy(written / f"clip{suffix}", folders.clips / "a.xyz")
    [job], refusals = folders.plan()
    assert not refusals and folders.inputs().unused()["files"] == [str(folders.clips / "notes.txt")]
    assert clips.decode_job(job) is None
    assert len(clips.load_staged(job).audio) > 5000


@pytest.mark.parametrize(
    ("suffix", "codec"), [(".m4a", "aac"), (".mka", "flac"), (".ogg", "libopus"), (".xyz", "flac")]
)
def test_sound_and_text_alone_are_named_as_not_used(folders, suffix, codec):
    folders.add("annotations/a.json", "clips/a.mp4")
    path = folders.clips / f"b{suffix}"
    if suffix == ".xyz":
        path.write_text("Good morning. Good morning. " * 99)
    else:
        write_clip(path, frames=None, audio=tone(1), codecs=("", codec), rate=48_000)
    assert folders.inputs().unused()["files"] == [str(path)]


def test_one_folder_may_hold_clips_and_annotations(folders):
    folders.add("clips/a.mp4", "clips/a.json")
    inputs = clips.find_inputs(folders.clips, folders.clips, None)
    assert not any(inputs.unused().values())


def test_links_to_folders_are_followed_and_circles_end(folders, tmp_path):
    folders.add("elsewhere/a.mp4", "annotations/x/a.json")
    folders.clips.mkdir()
    (folders.clips / "x").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "round").symlink_to(folders.clips)
    assert set(folders.inputs().clips.values()) == {"x/a"}


def test_a_folder_without_clips_says_what_it_holds(folders):
    folders.add("clips/a.xyz", "annotations/a.json")
    with pytest.raises(FileNotFoundError, match=r"It holds a\.xyz"):
        folders.inputs()


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ('{"clip_id": 7}', "clip_id"),
        ('{"clip_id": "a", "emotion": ["sad"]}', "must be text"),
        ('{"clip_id": "a", "emotion": {"x": 1}}', "must be text"),
        ('{"clip_id": "a", "kappa": 2}', "from 0 to 1"),
        ('{"clip_id": "a", "kappa": "much"}', "from 0 to 1"),
        ('{"clip_id": "a", "kappa": NaN}', "from 0 to 1"),
        ('{"clip_id": "a", "split": "a/b"}', "split"),
        ('{"clip_id": "a", "words": "\\ud83d"}', "half of a character"),
        ('{"clip_id": "a", "words": "<|im_end|>"}', "<|im_end|>"),
        ('{"clip_id": "b"}', "second of b"),
        ('{"clip_id": "a", "face": "sad", "face": "happy"}', "'face' twice"),
        ('{"clip_id": "a", "mood": "sad"}', "allowed are"),
    ],
)
def test_a_label_of_the_wrong_kind_is_named_by_its_line(tmp_path, line, why):
    path = tmp_path / "labels.jsonl"
    path.write_text('{"clip_id": "b", "words": "x\u2028y"}\n' + line + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"labels\.jsonl, line 2 ") as error:
        clips.read_labels(path)
    assert why in str(error.value)


@pytest.mark.parametrize("written", ["B/001.mp4", "./B/001", "B\\001", "{clips}/B/001.mp4"])
def test_labels_that_name_files_instead_of_clips_are_refused(folders, written):
    folders.add("clips/B/001.mp4", "annotations/B/001.json")
    ids = ("elsewhere", written.format(clips=folders.clips))
    folders.labels.write_text("".join(json.dumps({"clip_id": name}) + "\n" for name in ids))
    with pytest.raises(ValueError, match="without the suffix; write 'B/001'"):
        folders.inputs()


def test_numbers_and_nulls_of_labels_are_understood(tmp_path):
    path = tmp_path / "labels.jsonl"
    path.write_text('{"clip_id": "a", "kappa": 0.5, "emotion": null}\n')
    assert clips.read_labels(path) == {"a": {"clip_id": "a", "kappa": "0.5"}}


@pytest.mark.parametrize(
    ("text", "language"),
    [("She smiles.", "en"), ("她微笑。", "zh"), ("她说 OK 然后微笑。", "zh"), ("", "en")],
)
def test_the_language_is_seen_in_the_descriptions(text, language):
    sections = {"video_desc": text, "speech_content": "你好你好你好你好"}
    assert clips.detect_language(sections) == language
