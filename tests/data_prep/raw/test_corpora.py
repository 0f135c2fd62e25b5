"""Published corpora, read from tiny trees of their real layout."""

import json
from pathlib import Path

import pytest

pytest.importorskip("fsspec")

from data_prep.raw import corpora, corpora_rows, ingest
from data_prep.raw.ingest import Source
from data_prep.raw.shards import ShardedStage
from saber_jax.data import emotions


def touch(root: Path, *names: str) -> None:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")


def write(root: Path, name: str, *lines: str, encoding: str = "utf-8") -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(line + "\n" for line in lines), encoding=encoding)


def rows(corpus: str, root: Path) -> dict[str, dict]:
    return {row["clip_id"]: row for row in corpora.CORPORA[corpus](root)}


def test_crema_d_gives_what_the_crowd_saw_and_what_it_heard(tmp_path):
    touch(tmp_path, "VideoFlash/1001_DFA_ANG_XX.flv", "VideoFlash/1091_WSI_SAD_HI.flv")
    write(
        tmp_path,
        "processedResults/summaryTable.csv",
        '"","FileName","VoiceVote","VoiceLevel","FaceVote","FaceLevel","MultiModalVote","MultiModalLevel"',
        '"1","1001_DFA_ANG_XX","N","69.1","A","92.22","A","64.78"',
        '"2","1091_WSI_SAD_HI","S","69.1","N:S","50:50","F:S","64.78"',
    )
    found = rows("crema_d", tmp_path)
    first, second = found["crema_d-1001_DFA_ANG_XX"], found["crema_d-1091_WSI_SAD_HI"]
    assert first["labels"] == {"emotion": "angry", "face": "angry", "voice": "neutral"}
    assert (first["speaker"], first["language"]) == ("crema_d-1001", "en")
    assert first["transcript"] == "Don't forget a jacket."
    assert second["labels"] == {"emotion": "sad", "voice": "sad"}  # A tie is no label.


def test_ravdess_names_say_everything_and_videos_without_sound_are_left(tmp_path):
    touch(
        tmp_path,
        "Video_Speech_Actor_02/Actor_02/01-01-08-02-01-01-02.mp4",
        "Video_Speech_Actor_02/Actor_02/02-01-08-02-01-01-02.mp4",
        "Video_Song_Actor_01/Actor_01/01-02-02-01-02-01-01.mp4",
    )
    found = rows("ravdess", tmp_path)
    assert set(found) == {"ravdess-01-01-08-02-01-01-02", "ravdess-01-02-02-01-02-01-01"}
    spoken = found["ravdess-01-01-08-02-01-01-02"]
    assert spoken["labels"] == {"emotion": "surprise"}
    assert spoken["transcript"] == "Kids are talking by the door."
    assert spoken["speaker"] == "ravdess-02"
    assert found["ravdess-01-02-02-01-02-01-01"]["labels"] == {"emotion": "neutral"}


def test_mead_joins_the_front_camera_with_its_sound(tmp_path):
    touch(
        tmp_path,
        "M003/video/front/disgusted/level_2/001.mp4",
        "M003/video/left_30/disgusted/level_2/001.mp4",
        "M003/audio/disgusted/level_2/001.m4a",
    )
    [row] = rows("mead", tmp_path).values()
    assert row["sound"] == str(tmp_path / "M003/audio/disgusted/level_2/001.m4a")
    assert (row["speaker"], row["labels"]) == ("mead-M003", {"emotion": "disgust"})


def test_meld_takes_split_speaker_and_words_from_its_tables(tmp_path):
    header = (
        "Sr No.,Utterance,Speaker,Emotion,Sentiment,Dialogue_ID,Utterance_ID,Season,Episode,"
        "StartTime,EndTime"
    )
    line = '1,"Oh, it\x92s you!",Joey,surprise,positive,0,0,4,7,"00:20:57,256","00:21:00,049"'
    write(tmp_path, "train_sent_emo.csv", header, line)
    write(tmp_path, "test_sent_emo.csv", header, line)
    touch(
        tmp_path,
        "train/train_splits/dia0_utt0.mp4",
        "test/output_repeated_splits_test/dia0_utt0.mp4",
    )
    found = rows("meld", tmp_path)
    assert {row["split"] for row in found.values()} == {"train", "test"}
    row = found["meld-test-dia0_utt0"]
    assert row["file"] == str(tmp_path / "test/output_repeated_splits_test/dia0_utt0.mp4")
    assert (row["speaker"], row["video"]) == ("meld-Joey", "s4e7")
    assert row["transcript"] == "Oh, it's you!"


def test_msp_improv_takes_votes_that_agreed(tmp_path):
    touch(
        tmp_path,
        "session1/S01A/P/MSP-IMPROV-S01A-F01-P-FM01.avi",
        "session2/S02H/R/MSP-IMPROV-S02H-M02-R-MF03.avi",
    )
    write(
        tmp_path,
        "Evaluation.txt",
        "UTD-IMPROV-S01A-F01-P-FM01.avi; A; A:2.800000; V:3.000000; D:3.200000 ; N:4.400000;",
        "1; Neutral; Neutral; A:3.0; V:3.0; D:3.0; N:5.0;",
        "UTD-IMPROV-S02H-M02-R-MF03.avi; X; A:2.800000; V:3.000000; D:3.200000 ; N:4.400000;",
    )
    found = rows("msp_improv", tmp_path)
    assert found["msp_improv-S01A-F01-P-FM01"]["labels"] == {"emotion": "angry"}
    assert found["msp_improv-S02H-M02-R-MF03"]["labels"] == {}
    assert found["msp_improv-S01A-F01-P-FM01"]["speaker"] == "msp_improv-F01"
    assert found["msp_improv-S02H-M02-R-MF03"]["video"] == "session2-S02H-R"


def test_ch_sims_gives_valence_per_modality_and_finds_files_despite_lost_zeros(tmp_path):
    touch(tmp_path, "Raw/aqgy3_0001/00000.mp4", "Raw/aqgy3_0001/00012.mp4")
    write(
        tmp_path,
        "meta.csv",
        "video_id,clip_id,text,label,label_T,label_A,label_V,annotation,mode",
        "aqgy3_0001,0,我不想嫁给李茶。,-0.6,0.2,-0.8,0.4,Negative,train",
        "aqgy3_0001,12,好。,0.0,0.0,0.0,0.0,Neutral,valid",
        encoding="utf-8-sig",
    )
    found = rows("ch_sims_v2", tmp_path)
    row = found["ch_sims_v2-aqgy3_0001-0"]
    assert row["file"].endswith("00000.mp4") and row["split"] == "train"
    assert row["valence"] == {"fused": -0.6, "words": 0.2, "voice": -0.8, "face": 0.4}
    assert (row["language"], row["transcript"]) == ("zh", "我不想嫁给李茶。")
    assert found["ch_sims_v2-aqgy3_0001-12"]["file"].endswith("00012.mp4")


def test_mer_joins_its_tables_by_name(tmp_path):
    touch(tmp_path, "video/samplenew3_00000004.mp4", "video/sample_00000007.mp4")
    write(
        tmp_path, "track1_train_disdim.csv", "name,discrete,valence", "sample_00000007,worried,-2.1"
    )
    write(
        tmp_path,
        "subtitle_chieng.csv",
        "name,chinese,english",
        "samplenew3_00000004,我替公子拜谢了。,I thank you.",
    )
    found = rows("mer", tmp_path)
    assert found["mer-sample_00000007"]["labels"] == {"emotion": "worried"}
    assert found["mer-sample_00000007"]["split"] == "train"
    assert found["mer-samplenew3_00000004"]["transcript"] == "我替公子拜谢了。"


def test_memor_labels_a_clip_only_if_all_its_people_feel_alike(tmp_path):
    anno = [
        {"clip": "a", "character": "sheldon", "moment": 1.0, "emotion": "joy"},
        {"clip": "b", "character": "sheldon", "moment": 1.0, "emotion": "joy"},
        {"clip": "b", "character": "penny", "moment": 1.0, "emotion": "anger"},
    ]
    scenes = {"a": {"on_character": ["sheldon"]}, "b": {"on_character": ["sheldon", "penny"]}}
    write(tmp_path, "anno.json", json.dumps({"primary": anno, "fine_grained": []}))
    write(tmp_path, "data.json", json.dumps(scenes))
    write(tmp_path, "train_id.txt", "0")
    write(tmp_path, "test_id.txt", "1", "2")
    touch(tmp_path, "clips/a.mp4", "clips/b.mp4")
    found = rows("memor", tmp_path)
    assert found["memor-a"]["labels"] == {"emotion": "happy"}
    assert (found["memor-a"]["split"], found["memor-b"]["split"]) == ("train", "test")
    assert found["memor-b"]["labels"] == {}
    assert found["memor-b"]["speaker"] == "memor-penny+memor-sheldon"


def test_mer_keeps_the_labels_of_test_sets_out_of_training(tmp_path):
    touch(tmp_path, "video-labeled/sample_1.mp4", "video-unlabeled/sample_2.mp4")
    write(tmp_path, "label-disdim.csv", "name,discrete,valence", "sample_1,happy,2.5")
    write(tmp_path, "semi-label.csv", "name,discrete", "sample_2,sad")
    write(tmp_path, "track1_test_dis.csv", "name,discrete", "sample_3,sad")
    touch(tmp_path, "video-unlabeled/sample_3.mp4", "video-unlabeled/sample_4.mp4")
    splits = {name: row["split"] for name, row in rows("mer", tmp_path).items()}
    assert splits == {
        "mer-sample_1": "train",
        "mer-sample_2": "test",
        "mer-sample_3": "test",
        "mer-sample_4": "",
    }


def test_ch_sims_parts_with_and_without_labels_lie_side_by_side(tmp_path):
    header = "video_id,clip_id,text,label,label_T,label_A,label_V,annotation,mode"
    touch(tmp_path, "CH-SIMS v2(s)/Raw/aqgy3_0001/00000.mp4")
    touch(tmp_path, "CH-SIMS v2(u)/Raw/aqgy1_0001/00000.mp4")
    write(tmp_path, "CH-SIMS v2(s)/meta.csv", header, "aqgy3_0001,0,好。,0.2,0,0,0.4,Positive,test")
    write(tmp_path, "CH-SIMS v2(u)/meta.csv", header, "aqgy1_0001,0,不。,,,,,,")
    labelled, unlabelled = rows("ch_sims_v2", tmp_path).values()
    assert labelled["file"].endswith("CH-SIMS v2(s)/Raw/aqgy3_0001/00000.mp4")
    assert labelled["split"] == "test" and labelled["valence"]["face"] == 0.4
    assert unlabelled["file"].endswith("CH-SIMS v2(u)/Raw/aqgy1_0001/00000.mp4")
    assert (unlabelled["split"], unlabelled["valence"]) == ("", {})


def test_meiju_reads_labels_words_and_the_language_of_each_folder(tmp_path):
    track = tmp_path / "Track1"
    touch(track, "Mandarin/Annotation/Training/ep1_1.mp4", "Mandarin/NoAnnotation/ep3_7.mp4")
    touch(track, "English/Annotation/Training/ep1_1.mp4")
    touch(track, "English/Annotation/Validation/ep2_3.mp4")
    words = ("name,sentence", "ep1_1,你好。")
    write(track, "Mandarin/Annotation/Training_transcription.csv", *words)
    write(track, "Mandarin/Annotation/Training_files.txt", "ep1_1.mp4 happy neutral")
    write(track, "English/Annotation/Training_files.txt", "ep1_1.mp4 anger questioning")
    found = rows("meiju", tmp_path)
    assert set(found) == {
        "meiju-zh-train-ep1_1",
        "meiju-en-train-ep1_1",
        "meiju-en-valid-ep2_3",
        "meiju-zh-unlabelled-ep3_7",
    }
    row = found["meiju-zh-train-ep1_1"]
    assert (row["language"], row["transcript"], row["split"]) == ("zh", "你好。", "train")
    assert row["labels"] == {"emotion": "happy"}
    assert found["meiju-en-train-ep1_1"]["labels"] == {"emotion": "angry"}
    assert found["meiju-en-valid-ep2_3"]["split"] == "valid"
    assert found["meiju-zh-unlabelled-ep3_7"]["labels"] == {}


def test_multidialog_lines_find_their_videos_actors_and_splits_by_name(tmp_path):
    line = {
        "conv_id": "t_0b1",
        "utterance_id": 0,
        "from": "gpt",
        "value": "Hi there.",
        "emotion": "Surprising",
    }
    other = line | {"conv_id": "t_7", "utterance_id": 12, "emotion": "Neutral"}
    lost = line | {"utterance_id": 1}
    write(tmp_path, "metadata.jsonl", *map(json.dumps, (line, other, lost)))
    touch(tmp_path, "train/t_0b1/t_0b1_0k.mp4", "test_rare/t_7/t_7_12c.mp4")
    found = rows("multidialog", tmp_path)
    row = found["multidialog-t_0b1_0"]
    assert row["file"] == str(tmp_path / "train/t_0b1/t_0b1_0k.mp4")
    assert (row["video"], row["speaker"], row["split"]) == ("t_0b1", "multidialog-k", "train")
    assert (row["labels"], row["transcript"]) == ({"emotion": "surprise"}, "Hi there.")
    assert found["multidialog-t_7_12"]["split"] == "test"
    assert found["multidialog-t_0b1_1"]["file"].endswith("t_0b1/t_0b1_1.mp4")  # Not there.


def stage(out: Path) -> ShardedStage:
    return ShardedStage(name="ingest", out=str(out), shards=3, settings={}, reasons=ingest.REASONS)


def test_a_file_that_a_table_lists_and_the_folder_lacks_is_counted(tmp_path):
    header = "video_id,clip_id,text,label,label_T,label_A,label_V,annotation,mode"
    write(tmp_path / "sims", "meta.csv", header, "v,1,x,0,0,0,0,Neutral,train")
    write(tmp_path / "sims", "Raw/readme.txt")
    summary = ingest.ingest(
        stage(tmp_path / "out"), [Source(folder=str(tmp_path / "sims"), corpus="ch_sims_v2")]
    )
    assert summary["reasons"] == {"missing": 1}


def test_a_take_without_its_sound_is_missing_too(tmp_path):
    touch(tmp_path / "mead", "M003/video/front/sad/level_1/001.mp4")
    target = stage(tmp_path / "out")
    summary = ingest.ingest(target, [Source(folder=str(tmp_path / "mead"), corpus="mead")])
    assert (summary["kept"], summary["reasons"]) == (0, {"missing": 1})
    assert target.dropped(next(s for s in range(3) if target.dropped(s)))[0]["detail"].endswith(
        "m4a"
    )


def test_a_folder_takes_labels_and_refuses_a_second_clip_of_one_name(tmp_path):
    touch(tmp_path / "v", "a b.mp4", "a_b.mp4", "deep/c.mkv")
    label = {"clip_id": "c", "speaker": "ann", "language": "zh", "emotion": "sad", "video": "film"}
    write(tmp_path / "v", "labels.jsonl", json.dumps(label))
    target = stage(tmp_path / "out")
    summary = ingest.ingest(target, [Source(folder=str(tmp_path / "v"))])
    assert (summary["kept"], summary["reasons"]) == (2, {"duplicate_id": 1})
    row = next(row for row in target.rows() if row["clip_id"] == "deep_c")
    assert (row["speaker"], row["language"], row["video"]) == ("ann", "zh", "film")
    assert row["labels"] == {"emotion": "sad"}


@pytest.mark.parametrize("corpus", corpora.CORPORA)
def test_a_folder_without_the_layout_is_an_error(tmp_path, corpus):
    write(tmp_path, "readme.txt")
    with pytest.raises(FileNotFoundError, match=corpus):
        list(Source(folder=str(tmp_path), corpus=corpus).rows())


def test_workers_of_a_cluster_are_told_their_own_addresses(tmp_path):
    touch(tmp_path, "M003/video/front/sad/level_1/001.mp4", "M003/audio/sad/level_1/001.m4a")
    source = Source(folder=str(tmp_path), url="gs://bucket/mead", corpus="mead")
    target = stage(tmp_path / "out")
    ingest.ingest(target, [source])
    [row] = target.rows()
    assert row["file"] == "gs://bucket/mead/M003/video/front/sad/level_1/001.mp4"
    assert row["sound"] == "gs://bucket/mead/M003/audio/sad/level_1/001.m4a"


def test_a_wrong_label_names_its_line(tmp_path):
    touch(tmp_path, "a.mp4")
    write(tmp_path, "labels.jsonl", '{"clip_id": "a", "emotoin": "sad"}')
    with pytest.raises(ValueError, match="line 1 has unknown keys emotoin"):
        list(Source(folder=str(tmp_path)).rows())


def test_a_label_is_of_the_clip_at_its_path_and_never_of_another_of_the_same_name(tmp_path, capsys):
    touch(tmp_path, "001.mp4", "B/001.mp4")
    labels = [{"clip_id": "001", "emotion": "sad"}, {"clip_id": "x"}]
    write(tmp_path, "labels.jsonl", *map(json.dumps, labels))
    found = {row["clip_id"]: row["labels"] for row in Source(folder=str(tmp_path)).rows()}
    assert found == {"001": {"emotion": "sad"}, "B_001": {}}
    assert "labels without a video: x." in capsys.readouterr().out
    touch(tmp_path, "A/002.mp4", "B/002.mp4")
    write(tmp_path, "labels.jsonl", json.dumps({"clip_id": "002"}))
    with pytest.raises(ValueError, match=r"'002', which fits A/002 and B/002"):
        list(Source(folder=str(tmp_path)).rows())


def test_an_answer_can_conclude_every_emotion_that_a_corpus_labels():
    assert set(corpora_rows.EMOTIONS.values()) <= set(emotions.EMOTIONS)
