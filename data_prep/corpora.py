"""The corpora that SABER is built on, read by the layout they are published in.

Each reader takes the folder of a corpus and yields a row per clip: file, speaker, source video,
language, split, transcript and labels as the corpus gives them, "" where it doesn't. Nothing is
downloaded; every corpus has a licence to agree to. A file that a table lists and the folder lacks
is yielded all the same, and `ingest` counts it as missing.

    crema_d      VideoFlash/1001_DFA_ANG_XX.flv, processedResults/summaryTable.csv
    ravdess      **/Actor_01/01-01-03-01-01-01-01.mp4
    mead         M003/video/front/angry/level_1/001.mp4, M003/audio/angry/level_1/001.m4a
    meld         train_sent_emo.csv ..., **/dia0_utt0.mp4 below a folder for each split
    msp_improv   Evaluation.txt, session1/S01A/P/MSP-IMPROV-S01A-F01-P-FM01.avi
    ch_sims_v2   meta.csv, Raw/aqgy3_0001/00000.mp4
    mer          video/NAME.mp4, a label table (name, discrete), subtitle_chieng.csv
    memor        anno.json, data.json, *_id.txt, **/CLIP.mp4
    meiju        {Training,Validation}/NAME.mp4 with tables {Training,Validation}_*.csv
    multidialog  *metadata*.jsonl, **/NAME.mp4

Emotions are renamed to one word each (EMOTIONS); what a corpus calls otherwise keeps its name.
"""

import csv
import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

Row = dict[str, Any]

EMOTIONS = {
    **dict.fromkeys(("angry", "anger", "ang", "a", "annoyance"), "angry"),
    **dict.fromkeys(("happy", "happiness", "joy", "hap", "h", "serenity"), "happy"),
    **dict.fromkeys(("sad", "sadness", "s"), "sad"),
    **dict.fromkeys(("neutral", "neu", "n", "calm"), "neutral"),
    **dict.fromkeys(("fear", "fearful", "fea", "f"), "fear"),
    **dict.fromkeys(("disgust", "disgusted", "dis", "d"), "disgust"),
    **dict.fromkeys(("surprise", "surprised", "sur"), "surprise"),
    **dict.fromkeys(("contempt",), "contempt"),
    **dict.fromkeys(("worried", "worry"), "worried"),
}
_VIDEO = (".mp4", ".mkv", ".avi", ".flv", ".webm", ".mov")


def row(
    path: Path,
    *,
    clip_id: str,
    corpus: str,
    video: str,
    speaker: str = "",
    language: str = "",
    split: str = "",
    transcript: str = "",
    labels: Mapping[str, str] | None = None,
    **more: Any,
) -> Row:
    """A row as `ingest` yields it. Several people in a clip are one `speaker` joined by "+"."""
    return {
        "clip_id": clip_id,
        "file": str(path),
        "corpus": corpus,
        "video": video,
        "speaker": speaker,
        "language": language,
        "split": split,
        "transcript": transcript,
        "labels": {key: value for key, value in (labels or {}).items() if value},
        **more,
    }


def emotion(word: str) -> str:
    """The one word for an emotion; "" for nothing."""
    word = word.strip().lower()
    return EMOTIONS.get(word, word)


_CREMA_D = {
    "IEO": "It's eleven o'clock.",
    "TIE": "That is exactly what happened.",
    "IOM": "I'm on my way to the meeting.",
    "IWW": "I wonder what this is about.",
    "TAI": "The airplane is almost full.",
    "MTI": "Maybe tomorrow it will be cold.",
    "IWL": "I would like a new alarm clock.",
    "ITH": "I think I have a doctor's appointment.",
    "DFA": "Don't forget a jacket.",
    "ITS": "I think I've seen this before.",
    "TSI": "The surface is slick.",
    "WSI": "We'll stop in a couple of minutes.",
}


def crema_d(root: Path) -> Iterator[Row]:
    """Face and voice labels are what the crowd saw without sound and heard without picture."""
    votes = {line["FileName"]: line for line in _table(root / "processedResults/summaryTable.csv")}
    for path in _videos(root, "VideoFlash"):
        actor, sentence, intended, _ = path.stem.split("_")
        vote = votes.get(path.stem, {})
        seen = {
            "emotion": _clear(vote.get("MultiModalVote", "")) or emotion(intended),
            "face": _clear(vote.get("FaceVote", "")),
            "voice": _clear(vote.get("VoiceVote", "")),
        }
        yield row(
            path,
            clip_id=f"crema_d-{path.stem}",
            corpus="crema_d",
            video=path.stem,
            speaker=f"crema_d-{actor}",
            language="en",
            transcript=_CREMA_D.get(sentence, ""),
            labels=seen,
        )


def _clear(vote: str) -> str:
    """A vote that one emotion won; ties are written A:D."""
    return "" if ":" in vote else emotion(vote)


_RAVDESS = ("neutral", "neutral", "happy", "sad", "angry", "fear", "disgust", "surprise")
_STATEMENTS = ("Kids are talking by the door.", "Dogs are sitting by the door.")


def ravdess(root: Path) -> Iterator[Row]:
    """Only files with picture and sound (modality 01); of video-only files there is a twin."""
    for path in _videos(root):
        parts = path.stem.split("-")
        if len(parts) != 7 or parts[0] != "01":
            continue
        yield row(
            path,
            clip_id=f"ravdess-{path.stem}",
            corpus="ravdess",
            video=path.stem,
            speaker=f"ravdess-{parts[6]}",
            language="en",
            transcript=_STATEMENTS[int(parts[4]) - 1],
            labels={"emotion": _RAVDESS[int(parts[2]) - 1]},
        )


def mead(root: Path) -> Iterator[Row]:
    """Seven cameras filmed one take; the front one is used. Its sound is a file of its own."""
    for path in sorted(root.glob("*/video/front/*/level_*/*.mp4")):
        speaker, _, _, felt, level, _ = path.relative_to(root).parts
        take = f"{speaker}-{felt}-{level}-{path.stem}"
        yield row(
            path,
            clip_id=f"mead-{take}",
            corpus="mead",
            video=take,
            speaker=f"mead-{speaker}",
            language="en",
            labels={"emotion": emotion(felt)},
            sound=str(root / speaker / "audio" / felt / level / f"{path.stem}.m4a"),
        )


def meld(root: Path) -> Iterator[Row]:
    for split, table, folder in [
        ("train", "train_sent_emo.csv", "train_splits"),
        ("valid", "dev_sent_emo.csv", "dev_splits_complete"),
        ("test", "test_sent_emo.csv", "output_repeated_splits_test"),
    ]:
        # The raw archive nests train/train_splits; others unpack it flat.
        places = sorted(path for path in root.rglob(folder) if path.is_dir())
        for line in _table(_found(root, table)):
            name = f"dia{line['Dialogue_ID']}_utt{line['Utterance_ID']}"
            yield row(
                (places[0] if places else root / folder) / f"{name}.mp4",
                clip_id=f"meld-{split}-{name}",
                corpus="meld",
                video=f"s{line['Season']}e{line['Episode']}",
                speaker=f"meld-{line['Speaker'].strip()}",
                language="en",
                split=split,
                # The tables were written on Windows: quotes and dashes are its own.
                transcript=line["Utterance"].replace("\x92", "'").replace("\x97", " - "),
                labels={"emotion": emotion(line["Emotion"])},
            )


_IMPROV = re.compile(r"UTD-IMPROV-([A-Z0-9-]+)\.avi; ([A-Z]);")
_AGREED = {"A": "angry", "H": "happy", "S": "sad", "N": "neutral"}  # O other, X no agreement.


def msp_improv(root: Path) -> Iterator[Row]:
    """The evaluation file writes UTD-IMPROV where the files are called MSP-IMPROV."""
    found = _found(root, "Evaluation.txt")
    text = found.read_text(encoding="utf-8", errors="replace") if found else ""
    votes = dict(_IMPROV.findall(text))
    for path in _videos(root):
        name = path.stem.removeprefix("MSP-IMPROV-")
        sentence, speaker, kind, turn = name.split("-")
        yield row(
            path,
            clip_id=f"msp_improv-{name}",
            corpus="msp_improv",
            video=f"session{speaker[-1]}-{sentence}-{kind}",
            # Two actors share a session and hear each other's turns.
            speaker=f"msp_improv-{speaker}",
            language="en",
            labels={"emotion": _AGREED.get(votes.get(name, ""), "")},
            turn=turn,
        )


_SIMS_SPLITS = {"train": "train", "valid": "valid", "test": "test"}


def ch_sims_v2(root: Path) -> Iterator[Row]:
    """Sentiment from -1 to 1 for the whole clip and for each modality alone, as `valence`."""
    for line in _table(_found(root, "meta.csv", "label.csv")):
        video, number = line["video_id"], line["clip_id"]
        folder = root / "Raw" / video
        # Some copies of the table lost the zeros in front.
        found = [path for path in _videos(folder) if path.stem.lstrip("0") == number.lstrip("0")]
        parts = {"fused": "label", "words": "label_T", "voice": "label_A", "face": "label_V"}
        yield row(
            found[0] if found else folder / f"{number}.mp4",
            clip_id=f"ch_sims_v2-{video}-{number}",
            corpus="ch_sims_v2",
            video=video,
            language="zh",
            split=_SIMS_SPLITS.get(line.get("mode", ""), ""),
            transcript=line["text"],
            valence={name: float(line[key]) for name, key in parts.items() if line.get(key)},
        )


def mer(root: Path) -> Iterator[Row]:
    """MER2023 to MER2025: one folder of videos, several tables keyed by `name`."""
    labels, words = {}, {}
    for table in sorted(root.glob("*.csv")):
        for line in _table(table):
            if line.get("discrete"):
                labels[line["name"]] = emotion(line["discrete"])
            if said := line.get("chinese") or line.get("sentence"):
                words[line["name"]] = said
    for path in _videos(root, "video"):
        yield row(
            path,
            clip_id=f"mer-{path.stem}",
            corpus="mer",
            video=path.stem.rsplit("_", 1)[0],  # samplenew3_00000004 is cut from samplenew3.
            language="zh",
            split="train" if path.stem in labels else "",
            transcript=words.get(path.stem, ""),
            labels={"emotion": labels.get(path.stem, "")},
        )


def memor(root: Path) -> Iterator[Row]:
    """Several people of a clip may feel differently; then it gets no label."""
    found = _found(root, "anno.json")
    if found is None:
        return
    annotations = json.loads(found.read_text(encoding="utf-8"))["primary"]
    scenes = json.loads((found.parent / "data.json").read_text(encoding="utf-8"))
    splits = {}
    for split in ("train", "val", "test"):
        ids = found.parent / f"{split}_id.txt"
        for number in ids.read_text().split() if ids.exists() else []:
            splits[annotations[int(number)]["clip"]] = "valid" if split == "val" else split
    felt: dict[str, set[str]] = {}
    for annotation in annotations:
        felt.setdefault(annotation["clip"], set()).add(emotion(annotation["emotion"]))
    videos = {path.stem: path for path in _videos(root)}
    for clip, emotions in sorted(felt.items()):
        people = sorted(set(scenes.get(clip, {}).get("on_character", [])))
        yield row(
            videos.get(clip, root / "clips" / f"{clip}.mp4"),
            clip_id=f"memor-{clip}",
            corpus="memor",
            video=clip,
            speaker="+".join(f"memor-{name}" for name in people),
            language="en",
            split=splits.get(clip, ""),
            labels={"emotion": emotions.pop() if len(emotions) == 1 else ""},
        )


def meiju(root: Path) -> Iterator[Row]:
    """Folders Training and Validation; tables of the same beginning hold sentence and emotion."""
    for split, name in [("train", "Training"), ("valid", "Validation")]:
        known: dict[str, dict[str, str]] = {}
        for table in sorted(root.rglob(f"{name}_*.csv")):
            for line in _table(table):
                known.setdefault(line.get("name") or line.get("filename", ""), {}).update(line)
        mandarin = "mandarin" in str(root).lower()
        for path in sorted(p for folder in root.rglob(name) for p in _videos(folder)):
            line = known.get(path.stem, {})
            yield row(
                path,
                clip_id=f"meiju-{split}-{path.stem}",
                corpus="meiju",
                video=path.stem.rsplit("_", 1)[0],
                language="zh" if mandarin else "en",
                split=split,
                transcript=line.get("sentence", ""),
                labels={"emotion": emotion(line.get("emotion") or line.get("emo", ""))},
            )


def multidialog(root: Path) -> Iterator[Row]:
    """One line of metadata an utterance; a dialogue's two speakers stay together by its id."""
    videos = {path.stem: path for path in _videos(root)}
    for table in sorted(root.rglob("*metadata*.jsonl")):
        split = next((name for name in ("train", "valid", "test") if name in str(table)), "")
        for text in table.read_text(encoding="utf-8").splitlines():
            line = json.loads(text)
            name = Path(line.get("file_name") or line["audpath"]).stem
            yield row(
                videos.get(name, root / f"{name}.mp4"),
                clip_id=f"multidialog-{name}",
                corpus="multidialog",
                video=str(line["conv_id"]),
                speaker=f"multidialog-{line['speaker_id']}" if line.get("speaker_id") else "",
                language="en",
                split=split,
                transcript=line.get("value", ""),
                labels={"emotion": emotion(line.get("emotion", ""))},
            )


CORPORA: dict[str, Callable[[Path], Iterator[Row]]] = {
    reader.__name__: reader
    for reader in (
        crema_d,
        ravdess,
        mead,
        meld,
        msp_improv,
        ch_sims_v2,
        mer,
        memor,
        meiju,
        multidialog,
    )
}


def _videos(root: Path, folder: str = "") -> list[Path]:
    below = root / folder
    found = below.rglob("*") if below.is_dir() else root.rglob("*")
    return sorted(path for path in found if path.suffix.lower() in _VIDEO)


def _found(root: Path, *names: str) -> Path | None:
    """The first file of one of the names, at any depth."""
    for name in names:
        if found := sorted(root.rglob(name)):
            return found[0]
    return None


def _table(path: Path | None) -> list[dict[str, str]]:
    """A CSV with a header line; no file, no lines."""
    if path is None or not path.exists():
        return []
    # utf-8-sig: several of these tables begin with a byte order mark.
    with path.open(encoding="utf-8-sig", errors="replace", newline="") as file:
        return [{k: v or "" for k, v in line.items() if k} for line in csv.DictReader(file)]
