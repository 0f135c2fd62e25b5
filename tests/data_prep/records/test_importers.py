"""Other trainers' files become records and pairs, with real media."""

import gc
import json
import weakref

import numpy as np
import pytest
from PIL import Image

from data_prep.raw import instructions
from data_prep.records import importers
from saber_jax.data import chat, sed
from saber_jax.data.examples import encode_record
from saber_jax.data.pairs import read_pairs
from saber_jax.data.records import RecordSource, to_example
from tests import media_files

ASK = {"role": "user", "content": "<video><audio>What is felt?"}
SAY = {"role": "assistant", "content": "calm"}
PICTURE = [{"role": "user", "content": "<image><audio>What is felt?"}, SAY]
MEDIA = {"videos": ["a.mkv"], "audios": ["a.wav"]}

FILES = {
    "ms-swift sft": ("ms-swift", {"messages": [ASK, SAY], **MEDIA}, None),
    "ms-swift response": (
        "ms-swift",
        {"messages": [ASK, SAY], "rejected_response": "loud", **MEDIA},
        "loud",
    ),
    "ms-swift messages": (
        "ms-swift",
        {
            "messages": [ASK, SAY],
            "rejected_messages": [ASK, {"role": "assistant", "content": "loud"}],
            **MEDIA,
            "rejected_videos": ["a.mkv"],
            "rejected_audios": ["a.wav"],
        },
        "loud",
    ),
    "ms-swift without tags": (
        "ms-swift",
        {"messages": [{**ASK, "content": "What is felt?"}, SAY], **MEDIA},
        None,
    ),
    "trl": (
        "trl",
        {
            "prompt": [
                {
                    "role": "user",
                    "content": [
                        {"type": "video"},
                        {"type": "audio"},
                        {"type": "text", "text": "What is felt?"},
                    ],
                }
            ],
            "chosen": [SAY],
            "rejected": [{"role": "assistant", "content": "loud"}],
            **MEDIA,
        },
        "loud",
    ),
    "trl implicit prompt": (
        "trl",
        {
            "chosen": [ASK, SAY],
            "rejected": [ASK, {"role": "assistant", "content": "loud"}],
            **MEDIA,
        },
        "loud",
    ),
    "llama-factory": (
        "llama-factory",
        {
            "conversations": [{"from": "human", "value": ASK["content"]}],
            "chosen": {"from": "gpt", "value": "calm"},
            "rejected": {"from": "gpt", "value": "loud"},
            **MEDIA,
        },
        "loud",
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A video whose sound is not asked for, and a separate file with sound."""
    folder = tmp_path_factory.mktemp("media")
    frames = media_files.gray_frames(24)
    media_files.write_clip(folder / "a.mkv", frames=frames, audio=media_files.tone(2.0))
    media_files.write_clip(
        folder / "a.wav", frames=None, audio=media_files.tone(1.5), codecs=("", "pcm_s16le")
    )
    media_files.write_clip(
        folder / "short.wav", frames=None, audio=media_files.tone(0.01), codecs=("", "pcm_s16le")
    )
    Image.new("RGB", (1000, 3)).save(folder / "thin.png")
    return folder


def imported(folder, tokenizer, out, kind, rows, *more):
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--format", kind, "--input", str(file), "--out", str(out), *more]
    return importers.main([*flags, "--tokenizer", str(tokenizer.path)])


HERE = ("--workers", "0")
"""Decodes in this process, where tests can look."""


@pytest.mark.parametrize("name", FILES)
def test_a_row_round_trips_with_its_media(folder, tokenizer, tmp_path, name):
    kind, row, rejected = FILES[name]
    out = tmp_path / "out"
    assert imported(folder, tokenizer, out, kind, [row]) == 0
    [record] = RecordSource(out, "train")
    assert [dict(m) for m in record.messages] == [ASK] and record.answer == "calm"
    assert len(record.frames) == 4 and abs(len(record.audio) - 24_000) < 200
    example = encode_record(record, tokenizer)
    kinds = example.prompt.media_kind
    assert (kinds == chat.VISION).sum() == 4 * 84 * 84 // 2 // 28 // 28 or kinds.any()
    said = tokenizer.decode(example.prompt.tokens[kinds == chat.TEXT])
    assert "What is felt?" in said and chat.DEFAULT_SYSTEM in said
    assert tokenizer.decode(example.responses[0].tokens[:-1]) == "calm"
    assert not example.responses[0].sections.any()  # No section of the six.
    if rejected is None:
        assert not (out / "pairs.jsonl").exists()
    else:
        [pair] = read_pairs(out)
        assert (pair.clip_id, pair.chosen, pair.rejected) == (record.clip_id, "calm", rejected)


def test_a_json_list_reads_as_lines_do(folder, tokenizer, tmp_path):
    kind, row, _ = FILES["llama-factory"]
    (folder / "list.json").write_text(json.dumps([row, {**row, "videos": []}]))
    flags = ["--format", kind, "--input", str(folder / "list.json"), "--out", str(tmp_path / "o")]
    assert importers.main([*flags, "--tokenizer", str(tokenizer.path)]) == 1  # <video> without one.
    assert len(RecordSource(tmp_path / "o", "train")) == 1


@pytest.mark.parametrize("text", ["[1, {}", "[1 2]", "[1,,2]", "[x]"])
def test_a_broken_list_is_an_error_and_leaves_nothing(folder, tokenizer, tmp_path, text):
    (folder / "list.json").write_text(text)
    flags = ["--format", "trl", "--input", str(folder / "list.json"), "--out", str(tmp_path / "o")]
    assert importers.main([*flags, "--tokenizer", str(tokenizer.path)]) == 2
    assert not list(tmp_path.iterdir())


def test_conversations_of_our_own_instructions_stage_round_trip(folder, tokenizer, tmp_path):
    annotation = {
        "video_desc": "calm person",
        "facial_exp_desc": "quiet",
        "body_lang_desc": "slowly",
        "audio_desc": {"speech_content": "in the room", "acoustic_feat": "loudly"},
        "sentiment_analysis": "calm",
    }
    rows = [
        {
            "clip_id": f"clip{i}",
            "split": "test" if i == 3 else "train",
            "language": "en",
            "file": str(folder / "a.mkv"),
            "annotation": annotation,
        }
        for i in range(4)
    ]
    settings = instructions.InstructionSettings(tasks={"visual": 1.0}, wordings=4)
    lines = list(map(instructions.conversation, map(instructions.plan(rows, settings), rows)))
    asked = {line["messages"][1]["content"] for line in lines[:3]}
    assert imported(folder, tokenizer, tmp_path / "o", "ms-swift", lines) == 0
    stored = list(RecordSource(tmp_path / "o", "train"))
    assert {record.messages[1]["content"] for record in stored} == asked and len(asked) > 1
    for record in stored:
        system, _ = sed.prompt("en")
        assert record.messages[0] == {"role": "system", "content": system}
        assert record.answer == lines[0]["messages"][2]["content"]
        example = encode_record(record, tokenizer)
        assert {1, 2, 3} <= set(example.responses[0].sections.tolist())
        assert len(example.mel_lengths) == 1 and len(example.patches)
    # The fourth is of the test split.
    assert imported(folder, tokenizer, tmp_path / "t", "ms-swift", lines, "--split", "test") == 0
    assert len(RecordSource(tmp_path / "t", "test")) == 1


def questions(count: int) -> list[dict]:
    """Rows with the same sound, each of which gives a record."""
    return [
        {
            "messages": [{**ASK, "content": f"<audio>Number {i}?"}, {**SAY, "content": f"{i}"}],
            "audios": ["a.wav"],
        }
        for i in range(count)
    ]


def test_several_processes_import_what_one_does(folder, tokenizer, tmp_path):
    rows = [*questions(5), {**questions(1)[0], "audios": ["nowhere.wav"]}, *questions(2)]
    for out, workers in (("one", "1"), ("two", "2")):
        assert imported(folder, tokenizer, tmp_path / out, "ms-swift", rows, "--workers", workers)
    one, two = (RecordSource(tmp_path / out, "train") for out in ("one", "two"))
    assert len(one) == 5
    assert list(map(str, map(to_example, one))) == list(map(str, map(to_example, two)))
    refused = [(tmp_path / out / "refused.jsonl").read_text() for out in ("one", "two")]
    assert refused[0] == refused[1] and "rows.jsonl:6" in refused[0]


def test_few_records_are_in_memory_however_long_the_file(folder, tokenizer, tmp_path, monkeypatch):
    alive, most = weakref.WeakSet(), []
    decoded = importers.to_record

    def watched(*arguments):
        gc.collect(0)
        most.append(len(alive))
        record = decoded(*arguments)
        alive.add(record)
        return record

    monkeypatch.setattr(importers, "to_record", watched)
    assert imported(folder, tokenizer, tmp_path / "o", "ms-swift", questions(30), *HERE) == 0
    assert len(most) == len(RecordSource(tmp_path / "o", "train")) == 30 and max(most) <= 3


def test_rows_that_ask_the_same_share_a_record(folder, tokenizer, tmp_path):
    kind, row, _ = FILES["ms-swift response"]
    rows = [row, {**row, "rejected_response": "shouting"}]
    assert imported(folder, tokenizer, tmp_path / "o", kind, rows) == 0
    assert len(RecordSource(tmp_path / "o", "train")) == 1 and len(read_pairs(tmp_path / "o")) == 2


@pytest.mark.parametrize(
    "change,why",
    [
        ({"rejected_response": "calm"}, "same text"),
        ({"videos": ["a.mkv", "a.mkv"]}, "a record has one each"),
        ({"videos": ["nowhere.mkv"]}, "nowhere.mkv"),
        ({"messages": [ASK]}, "does not end with an answer"),
        ({"messages": "hello"}, "must be a list"),
        ({"rejected_messages": [ASK, SAY], "rejected_videos": ["b.mkv"]}, "other files"),
        ({"rejected_response": "angry", "rejected_videos": ["b.mkv"]}, "other files"),
        ({"messages": [{**ASK, "role": "\ud83d"}, SAY]}, "unknown roles"),
        ({"videos": ["a\0.mkv"]}, "null"),
        ({"audios": ["short.wav"]}, "too short to be heard"),
        ({"videos": [], "images": ["thin.png"], "messages": PICTURE}, "thin.png"),
        ({"videos": [], "images": ["a.mkv"], "messages": PICTURE}, "a.mkv"),
        ({"videos": ["thin.png"]}, "thin.png"),
    ],
)
def test_what_cannot_be_used_is_refused_by_line_and_reason(
    folder, tokenizer, tmp_path, change, why
):
    good = FILES["ms-swift sft"][1]
    rows = [good, {**good, **change}]
    assert imported(folder, tokenizer, tmp_path / "o", "ms-swift", rows) == 1
    [entry] = (tmp_path / "o" / "refused.jsonl").read_text().splitlines()
    assert json.loads(entry)["file"] == "rows.jsonl:2" and why in json.loads(entry)["detail"]


def test_one_bad_row_costs_one_row(folder, tokenizer, tmp_path):
    good = FILES["ms-swift sft"][1]
    file = folder / "mixed.jsonl"
    bad = [b"{", b"[]", b"7", b'{"messages": "\xff"}', b'{"messages": ' + b"[" * 9999, b"null"]
    file.write_bytes(b"\n".join([json.dumps(good).encode(), *bad, json.dumps(good).encode()]))
    flags = ["--format", "ms-swift", "--input", str(file), "--out", str(tmp_path / "o")]
    assert importers.main([*flags, "--tokenizer", str(tokenizer.path)]) == 1
    refused = (tmp_path / "o" / "refused.jsonl").read_text().splitlines()
    assert [json.loads(line)["file"] for line in refused] == [
        f"mixed.jsonl:{number}" for number in range(2, 8)
    ]
    [record] = RecordSource(tmp_path / "o", "train")
    assert record.provenance["source"]["sampled_by"] == "time"


def test_nothing_usable_is_one_clear_error(folder, tokenizer, tmp_path, capsys):
    assert imported(folder, tokenizer, tmp_path / "o", "trl", [{"chosen": 1}]) == 2
    assert "None of the 1 rows" in capsys.readouterr().err
    assert not np.any(list(tmp_path.glob("o/*")))


def test_a_fault_of_the_program_does_not_look_like_a_refusal(
    folder, tokenizer, tmp_path, monkeypatch, capsys
):
    def faulty(*_):
        raise RuntimeError("a fault")

    monkeypatch.setattr(importers, "to_record", faulty)
    assert imported(folder, tokenizer, tmp_path / "o", "ms-swift", questions(1), *HERE) == 3
    assert "a fault" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
