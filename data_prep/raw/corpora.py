"""Readers of the corpora that SABER is built on, in their published layouts.

Each reader takes the folder of a corpus and yields a row per clip: file, speaker, source video,
language, split, transcript and labels as the corpus gives them, or "". Nothing is downloaded,
because every corpus has a license to agree to. A file that a table lists but the folder lacks is
yielded too, and `ingest` counts it as missing.

    crema_d      VideoFlash/1001_DFA_ANG_XX.flv, processedResults/summaryTable.csv
    ravdess      **/Actor_01/01-01-03-01-01-01-01.mp4
    mead         M003/video/front/angry/level_1/001.mp4, M003/audio/angry/level_1/001.m4a
    meld         train_sent_emo.csv ..., **/dia0_utt0.mp4 below a folder for each split
    msp_improv   Evaluation.txt, session1/S01A/P/MSP-IMPROV-S01A-F01-P-FM01.avi
    ch_sims_v2   meta.csv, Raw/aqgy3_0001/00000.mp4
    mer          NAME.mp4 below any folder, label tables (name, discrete), subtitle_chieng.csv
    memor        anno.json, data.json, *_id.txt, **/CLIP.mp4
    meiju        Training/NAME.mp4, Training_files.txt, Training_transcription.csv; Validation*
    multidialog  metadata.jsonl, train/CONV/CONV_0k.mp4, test_freq/...

Each reader's docstring names the public code against which it was checked.

Emotions are renamed to our words (corpora_rows.EMOTIONS); unknown ones keep their name.
"""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from data_prep.raw.corpora_rows import Row, emotion, find, read_table, row, videos_in
from saber_jax.data import texts

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
    """Face and voice labels are those of raters without sound and without picture.

    The layout is that of github.com/CheyneyComputerScience/CREMA-D.
    """
    votes = {
        line["FileName"]: line for line in read_table(root / "processedResults/summaryTable.csv")
    }
    for path in videos_in(root, "VideoFlash"):
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
    """Only files with picture and sound (modality 01); each video-only file has such a twin.

    The seven numbers of a name are explained at zenodo.org/records/1188976.
    """
    for path in videos_in(root):
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
    """Seven cameras filmed each take; the front one is used. The sound is in a separate file.

    The layout is the one that github.com/radekd91/inferno reads; some takes have no sound there.
    """
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
    """Tables and folders are those of github.com/declare-lab/MELD and its raw archive."""
    for split, table, folder in [
        ("train", "train_sent_emo.csv", "train_splits"),
        ("valid", "dev_sent_emo.csv", "dev_splits_complete"),
        ("test", "test_sent_emo.csv", "output_repeated_splits_test"),
    ]:
        # The raw archive nests train/train_splits; others unpack it flat.
        places = sorted(path for path in root.rglob(folder) if path.is_dir())
        for line in read_table(find(root, table)):
            name = f"dia{line['Dialogue_ID']}_utt{line['Utterance_ID']}"
            yield row(
                (places[0] if places else root / folder) / f"{name}.mp4",
                clip_id=f"meld-{split}-{name}",
                corpus="meld",
                video=f"s{line['Season']}e{line['Episode']}",
                speaker=f"meld-{line['Speaker'].strip()}",
                language="en",
                split=split,
                # The tables use the quotes and dashes of a Windows code page.
                transcript=line["Utterance"].replace("\x92", "'").replace("\x97", " - "),
                labels={"emotion": emotion(line["Emotion"])},
            )


_IMPROV = re.compile(r"UTD-IMPROV-([A-Z0-9-]+)\.avi; ([A-Z]);")
_AGREED = {"A": "angry", "H": "happy", "S": "sad", "N": "neutral"}  # O other, X no agreement.


def msp_improv(root: Path) -> Iterator[Row]:
    """The evaluation file writes UTD-IMPROV where the files are called MSP-IMPROV.

    Its lines are those that github.com/Strong-AI-Lab/emotion parses.
    """
    found = find(root, "Evaluation.txt")
    text = found.read_text(encoding="utf-8", errors="replace") if found else ""
    votes = dict(_IMPROV.findall(text))
    for path in videos_in(root):
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
    """Sentiment from -1 to 1 for the whole clip and for each modality alone, as `valence`.

    Its parts (s) and (u), with labels and without, have a table each. The folders are those that
    github.com/thuiar/MMSA reads; columns as its users describe them.
    """
    tables = sorted(root.rglob("meta.csv")) or sorted(root.rglob("label.csv"))
    for folder, line in (
        (path.parent / "Raw", line) for path in tables for line in read_table(path)
    ):
        video, number = line["video_id"], line["clip_id"]
        # Some copies of the table lost leading zeros.
        files = videos_in(folder / video)
        found = [path for path in files if path.stem.lstrip("0") == number.lstrip("0")]
        parts = {"fused": "label", "words": "label_T", "voice": "label_A", "face": "label_V"}
        yield row(
            found[0] if found else folder / video / f"{number}.mp4",
            clip_id=f"ch_sims_v2-{video}-{number}",
            corpus="ch_sims_v2",
            video=video,
            language="zh",
            split=_SIMS_SPLITS.get(line.get("mode", ""), ""),
            transcript=line["text"],
            valence={name: float(line[key]) for name, key in parts.items() if line.get(key)},
        )


_MER_TEST = ("test", "semi")
"""Prefixes or suffixes of the names of tables with labels of published test sets."""


def mer(root: Path) -> Iterator[Row]:
    """MER2023 to MER2025: several tables keyed by `name`, videos in one folder or in several.

    The tables are those that github.com/zeroQiaoba/MERTools reads: label-disdim.csv and
    semi-label.csv (2024), track1_train_disdim.csv and track1_test_dis.csv (2025), ...
    """
    labels, words, splits = {}, {}, {}
    for table in sorted(root.glob("*.csv")):
        for line in read_table(table):
            if line.get("discrete"):
                labels[line["name"]] = emotion(line["discrete"])
                test = any(part in table.stem for part in _MER_TEST)
                splits[line["name"]] = "test" if test else splits.get(line["name"], "train")
            if said := line.get("chinese") or line.get("sentence"):
                words[line["name"]] = said
    for path in videos_in(root, "video"):
        yield row(
            path,
            clip_id=f"mer-{path.stem}",
            corpus="mer",
            video=path.stem.rsplit("_", 1)[0],  # samplenew3_00000004 is cut from samplenew3.
            language="zh",
            split=splits.get(path.stem, ""),
            transcript=words.get(path.stem, ""),
            labels={"emotion": labels.get(path.stem, "")},
        )


def memor(root: Path) -> Iterator[Row]:
    """A clip whose people have different emotions gets no label.

    The files are those of the authors' baseline (its MEmoRDataset): ids are line numbers of anno.
    """
    found = find(root, "anno.json")
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
    videos = {path.stem: path for path in videos_in(root)}
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
    """Lines of Training_files.txt are "NAME.mp4 EMOTION INTENT"; NoAnnotation has no labels.

    Both are read like this by github.com/AI-S2-Lab/MEIJU2025-baseline. Languages are folders.
    """
    for split, name in [("train", "Training"), ("valid", "Validation"), ("", "NoAnnotation")]:
        felt, words = {}, {}
        for table in sorted(root.rglob(f"{name}_files.txt")):
            for line in table.read_text(encoding="utf-8").splitlines():
                file, label, _intent = line.split()
                felt[table.parent, Path(file).stem] = emotion(label)
        for table in sorted(root.rglob(f"{name}_transcription.csv")):
            words |= {(table.parent, line["name"]): line["sentence"] for line in read_table(table)}
        folders = sorted(path for path in root.rglob(name) if path.is_dir())
        for path in (video for folder in folders for video in videos_in(folder)):
            key = (path.parent.parent, path.stem)
            mandarin = any("mandarin" in part.lower() for part in path.parts)
            language = "zh" if mandarin else "en"
            yield row(
                path,
                clip_id=f"meiju-{language}-{split or 'unlabelled'}-{path.stem}",
                corpus="meiju",
                video=path.stem.rsplit("_", 1)[0],
                language=language,
                split=split,
                transcript=words.get(key, ""),
                labels={"emotion": felt.get(key, "")},
            )


_ACTOR = re.compile(r"(.+_\d+)([a-z])")
"""CONV_UTTERANCE and the letter of who speaks."""


def multidialog(root: Path) -> Iterator[Row]:
    """One line of metadata per utterance: conv_id, utterance_id, from, value, emotion.

    Files are CONV/CONV_3c.mp4 for utterance 3, said by actor c, below a folder for each split:
    names and metadata as in huggingface.co/datasets/IVLLab/MultiDialog, which has the sound.
    """
    videos = {}
    for path in videos_in(root):
        if match := _ACTOR.fullmatch(path.stem):
            videos[match[1]] = (path, match[2])
    for table in sorted(root.rglob("*metadata*.jsonl")):
        for _, text in texts.lines(table.read_text(encoding="utf-8")):
            line = json.loads(text)
            name = f"{line['conv_id']}_{line['utterance_id']}"
            path, actor = videos.get(name, (root / line["conv_id"] / f"{name}.mp4", ""))
            where = "/".join((*table.relative_to(root).parts, *path.relative_to(root).parts))
            split = re.search(r"train|valid|test", where)
            yield row(
                path,
                clip_id=f"multidialog-{name}",
                corpus="multidialog",
                video=line["conv_id"],
                speaker=f"multidialog-{actor}" if actor else "",
                language="en",
                split=split[0] if split else "",
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
