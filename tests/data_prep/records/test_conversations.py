"""Rows of other trainers: used whole or refused, never used in part."""

import itertools
import json

import pytest

from data_prep.records.conversations import FORMATS, RowError, parse_row, read_rows


def user(content, **more):
    return {"role": "user", "content": content, **more}


def assistant(content, **more):
    return {"role": "assistant", "content": content, **more}


SWIFT = {"messages": [user("<video>q"), assistant("fine")], "videos": ["a.mp4"]}
TRL = {"prompt": [user("q")], "chosen": [assistant("good")], "rejected": [assistant("bad")]}
LLAMA = {
    "conversations": [{"from": "human", "value": "<video>q"}, {"from": "gpt", "value": "a"}],
    "videos": ["a.mp4"],
}
GOOD = {"ms-swift": SWIFT, "trl": TRL, "llama-factory": LLAMA}


def parts(*content):
    return TRL | {"prompt": [user(list(content))]}


REFUSED = {
    "an empty answer": (
        "ms-swift",
        SWIFT | {"messages": [user("q"), assistant(" ")]},
        "answer is empty",
    ),
    "an empty rejected answer": ("ms-swift", SWIFT | {"rejected_response": ""}, "rejected answer"),
    "a special token": (
        "ms-swift",
        SWIFT | {"messages": [user("<video>q"), assistant("a <|im_start|>user")]},
        "<|im_start|>",
    ),
    "a special token in the question": (
        "ms-swift",
        SWIFT | {"messages": [user("<video><|AUDIO|>"), assistant("a")]},
        "<|AUDIO|>",
    ),
    "half a character": (
        "ms-swift",
        SWIFT | {"messages": [user("<video>q"), assistant("a \ud83d b")]},
        "\\ud83d",
    ),
    "a tag in the answer": (
        "ms-swift",
        SWIFT | {"messages": [user("q"), assistant("<video>")]},
        "answer holds <video>",
    ),
    "two lists of one kind": ("ms-swift", SWIFT | {"video": "b.mp4"}, "'video' and 'videos'"),
    "unknown media": ("ms-swift", SWIFT | {"video_frames": ["a"]}, "video_frames"),
    "tools": ("ms-swift", SWIFT | {"tools": [{"name": "x"}]}, "tools"),
    "a label": ("ms-swift", SWIFT | {"label": True}, "label"),
    "an older form": ("ms-swift", {"query": "q", "response": "a"}, "query"),
    "weights of turns": (
        "ms-swift",
        SWIFT | {"messages": [user("<video>q"), assistant("a", loss=0.5)]},
        "loss",
    ),
    "media that is a number": ("trl", TRL | {"videos": 5}, "videos must be paths"),
    "media that is an object": ("trl", TRL | {"images": [{"bytes": "x"}]}, "paths"),
    "a part of unknown type": (
        "trl",
        parts({"type": "image_url", "image_url": {"url": "p.jpg"}}, {"type": "text", "text": "q"}),
        "image_url",
    ),
    "sound in the message": ("trl", parts({"type": "input_audio", "input_audio": {}}), "audio"),
    "a text as part": ("trl", parts("look", "q"), "part of prompt"),
    "a part with settings": (
        "trl",
        parts({"type": "video", "video": "a.mp4", "fps": 2}),
        "'fps'",
    ),
    "text that is a number": ("trl", parts({"type": "text", "text": 5}), "must have text"),
    "a system list": ("llama-factory", LLAMA | {"system": ["x"]}, "system must be text"),
    "two systems": (
        "ms-swift",
        SWIFT
        | {"system": "s", "messages": [{"role": "system", "content": "t"}, *SWIFT["messages"]]},
        "system",
    ),
    "one answer of two": (
        "llama-factory",
        LLAMA | {"chosen": {"from": "gpt", "value": "a"}},
        "rejected",
    ),
    "calls of tools": (
        "llama-factory",
        LLAMA | {"conversations": [*LLAMA["conversations"], {"from": "observation", "value": "x"}]},
        "answer",
    ),
    "other media of the two answers": (
        "trl",
        {
            "chosen": [user([{"type": "image", "image": "a.png"}]), assistant("a")],
            "rejected": [user([{"type": "image", "image": "b.png"}]), assistant("b")],
        },
        "different media",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_understood_is_refused_by_name(name):
    kind, row, why = REFUSED[name]
    FORMATS[kind](GOOD[kind])
    with pytest.raises(RowError) as error:
        FORMATS[kind](row)
    assert why in str(error.value)


def test_paths_inside_parts_are_media():
    row = parts(
        {"type": "video", "video": "a.mp4", "text": None},
        {"type": "audio", "audio": "b.wav"},
        {"type": "text", "text": "q", "video": None},
    )
    got = FORMATS["trl"](row)
    assert got.media == {"images": [], "videos": ["a.mp4"], "audios": ["b.wav"]}
    assert got.messages == [user("<video><audio>q")]


def test_null_means_nothing():
    row = parts({"type": "video", "text": None}, {"type": "text", "text": None})
    row |= {"videos": ["a.mp4"], "images": None, "tools": None, "label": None}
    assert FORMATS["trl"](row).messages == [user("<video>")]
    assert FORMATS["llama-factory"](LLAMA | {"chosen": None, "rejected": None}).rejected is None


@pytest.mark.parametrize("key", ["video", "videos"])
def test_singular_keys_are_read_as_the_plural_ones(key):
    row = {"messages": [user("q"), assistant("a")], key: "a.mp4", "id": 7, "source": "web"}
    got = FORMATS["ms-swift"](row)
    assert got.media["videos"] == ["a.mp4"] and got.messages == [user("<video>q")]


@pytest.mark.parametrize("kind", GOOD)
def test_a_system_text_is_the_first_turn(kind):
    if kind == "trl":
        with pytest.raises(RowError, match="system"):
            FORMATS[kind](TRL | {"system": "Be brief."})
        return
    got = FORMATS[kind](GOOD[kind] | {"system": "Be brief."})
    assert got.messages[0] == {"role": "system", "content": "Be brief."}


VALUES = (None, True, 0, 1.5, "", "x", [], [None], [[]], [1], {}, {"a": 1}, [{}], [user(None)])
VALUES += ([user([None])], [user([{"type": []}])], [user({"a": 1})], [{"role": [], "content": "x"}])


def test_any_json_value_anywhere_is_a_row_or_a_refusal():
    """A bad row is left out alone, whatever is wrong with it."""
    tried = 0
    for kind, row in GOOD.items():
        keys = {*row, "system", "chosen", "rejected", "rejected_response", "rejected_messages"}
        keys |= {"videos", "video", "rejected_videos", "images", "audios", "split"}
        for key, value in itertools.product(sorted(keys), VALUES):
            tried += 1
            try:
                FORMATS[kind](row | {key: value})
            except RowError as error:
                assert str(error)
    assert tried > 500


def test_a_broken_line_is_its_own_error(tmp_path):
    deep = b"[" * 100_000
    good = json.dumps({"a": "b\u2028c"}, ensure_ascii=False).encode()
    path = tmp_path / "rows.jsonl"
    path.write_bytes(
        b"\xef\xbb\xbf" + b"\n".join([good, b"{", b'{"a": "\xff"}', b'{"a": ' + deep, good])
    )
    found = list(read_rows(path))
    assert [number for number, _ in found] == [1, 2, 3, 4, 5]
    assert found[0][1] == found[4][1] == {"a": "b\u2028c"}
    assert all(isinstance(value, Exception) for _, value in found[1:4])


def test_one_invalid_item_of_a_list_costs_one_row(tmp_path):
    path = tmp_path / "rows.json"
    long = "1" * 5000  # More digits than Python converts.
    path.write_text('[{"a": 1}, {"a": 1, "a": 2}, {"a": ' + long + '}, {"a": "]"}]\n')
    found = [value for _, value in read_rows(path)]
    assert found[0] == {"a": 1} and found[3] == {"a": "]"}
    assert "'a' twice" in str(found[1]) and "digits" in str(found[2])


@pytest.mark.parametrize(
    "content",
    [b'[{"a": 1},]', b'[{"a": 1}]\n[{"a": 2}]', b"[" * 9999, "[平静]".encode("gbk"), b'[{"a": 1}'],
)
def test_a_list_that_is_none_is_named_and_nothing_after_it_is_lost(tmp_path, content):
    path = tmp_path / "rows.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"rows\.json begins like a JSON list but is none"):
        list(read_rows(path))


@pytest.mark.parametrize(
    ("more", "why"),
    [({"split": 5}, "split must be"), ({"language": []}, "language"), ({"language": "fr"}, "'fr'")],
)
def test_a_split_or_language_of_the_wrong_kind_is_refused(more, why):
    with pytest.raises(RowError, match=why):
        parse_row(GOOD["trl"] | more, "trl", "train")


def test_a_row_says_its_split_and_language():
    row = GOOD["trl"] | {"split": "test", "language": "zh"}
    assert parse_row(row, "trl", "train") == "test"
    found = parse_row(row, "trl", "test")
    assert not isinstance(found, str) and found.language == "zh"
