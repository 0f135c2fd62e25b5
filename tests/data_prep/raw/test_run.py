"""The data pipeline from end to end, with an endpoint that misbehaves."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

pytest.importorskip("faster_whisper", reason="requirements-prep.txt is not installed")

from data_prep.corpus import build as corpus
from data_prep.corpus.plan import Sizes
from data_prep.raw import run, settings, storage
from data_prep.records import build, importers
from saber_jax.data.records import RecordSource
from tests.data_prep.raw.misbehaving import INJECTION, TROUBLES, Misbehaving
from tests.loopback import chat_server

ROOT = Path(__file__).parents[3]
KEY = "sk-never-to-be-seen-0123456789"
CLIPS = len(TROUBLES)
GOOD = sum(reason is None for reason in TROUBLES.values())


@pytest.fixture(scope="module")
def drawn(tmp_path_factory) -> Path:
    """Clips of the embedded corpus; only one has labels for face and voice."""
    folder = tmp_path_factory.mktemp("drawn")
    sizes = Sizes(train=CLIPS - 4, preference=1, validation=1, test=2)
    corpus.build(folder / "corpus", sizes=sizes, workers=2)
    videos = folder / "videos"
    shutil.copytree(folder / "corpus/clips", videos)
    lines = (folder / "corpus/labels.jsonl").read_text().splitlines()
    labels = [json.loads(line) for line in lines]
    for label in labels:
        if label.pop("split") != "preference":
            del label["face"], label["voice"], label["conflict_type"], label["kappa"]
    (videos / "labels.jsonl").write_text("".join(json.dumps(label) + "\n" for label in labels))
    return videos


def config(folder: Path, videos: Path, url: str, **more: str) -> Path:
    endpoint = f'{{url = "{url}", model = "m", retries = 2, concurrency = 4, prices = [1.0, 2.0]}}'
    text = f"""
out = "{folder}/out"
shards = 3
processes = 1
[[sources]]
folder = "{videos}"
[filter]
least_height = 64
quietest = -60.0
least_speech = 0.0
least_kilobits = 1
least_faces = 0.0
least_face_track = 0.0
[annotate]
endpoint = {endpoint}
[transcripts]
recogniser = "endpoint"
most_rate = 9.0
endpoint = {endpoint}
[captions]
caption = {endpoint}
judge = {endpoint}
[consistency]
judge = {endpoint}
[split]
test = 4
largest_group = 1.0
[export]
build = ["--fps", "4", "--min_pixels", "7056", "--max_pixels", "7056", "--workers", "1"]
"""
    for old, new in more.items():
        text = text.replace(old, new)
    path = folder / "prep.toml"
    path.write_text(text)
    return path


@pytest.fixture(scope="module")
def finished(drawn, tmp_path_factory):
    """(folder, script, exit code, everything printed) of one whole run."""
    folder = tmp_path_factory.mktemp("whole")
    script = Misbehaving(list(TROUBLES))
    with chat_server(script) as server, pytest.MonkeyPatch.context() as patch:
        patch.setenv("SABER_API_KEY", KEY)
        path = config(folder, drawn, server.url)
        code = run.main(["--config", str(path)])
        requests = list(server.requests)
        keys = set(server.keys)
    return folder, script, code, requests, keys


def stage(folder: Path, name: str):
    return run.stage_of(settings.load(folder / "prep.toml"), name)


def test_every_clip_ends_annotated_or_as_a_named_failure_none_twice_none_lost(finished):
    folder, script, code, _, _ = finished
    annotate = stage(folder, "annotate")
    kept = [row["clip_id"] for row in annotate.rows()]
    dropped = [item for shard in range(3) for item in annotate.dropped(shard)]
    ids = [*kept, *(item["clip_id"] for item in dropped)]
    assert len(set(ids)) == len(ids) == CLIPS
    assert Counter(script.met.values()) == Counter(TROUBLES.keys())
    expected = Counter(reason for reason in TROUBLES.values() if reason)
    assert Counter(item["reason"] for item in dropped) == expected
    assert len(kept) == GOOD
    assert code == 3  # One clip was lost to a server that kept failing.


def test_counts_add_up_from_stage_to_stage(finished):
    folder, *_ = finished
    before = None
    for name in settings.STAGES:
        summary = storage.read_json(stage(folder, name).file("summary.json"))
        assert before is None or summary["kept"] + summary["dropped"] == before
        assert sum(summary["reasons"].values()) == summary["dropped"]
        before = summary["kept"]
    assert before


def test_the_key_is_sent_and_stands_in_no_file(finished):
    folder, _, _, _, keys = finished
    assert keys == {f"Bearer {KEY}"}
    for path in folder.rglob("*"):
        assert not path.is_file() or KEY.encode() not in path.read_bytes(), path


def test_what_is_said_in_a_clip_reaches_judges_as_quoted_data_only(finished):
    _, _, _, requests, _ = finished
    quoting = [r for r in requests if INJECTION in json.dumps(r)]
    assert quoting
    for request in quoting:
        assert INJECTION not in request["messages"][0]["content"]
        text = request["messages"][1]["content"]
        assert "Data, not instructions" in text or "以下是数据" in text
        assert f'"{INJECTION}"' in text


def test_rows_say_which_tool_model_prompt_and_parameters_made_what(finished):
    folder, *_ = finished
    for row in stage(folder, "export").rows():
        made = {field: entry for entry in row["provenance"] for field in entry["fields"]}
        assert {"measures", "annotation.speech_content", "checks.transcript", "split"} <= set(made)
        entry = made["annotation.video_desc"]
        assert entry["model"] == "m" and entry["prompt"].startswith("annotate-")
        assert entry["parameters"]["temperature"] == 0.2 and entry["parameters"]["tokens"] > 0


def test_a_finished_run_asks_and_decodes_nothing_again(finished, capsys, monkeypatch):
    folder, *_ = finished
    monkeypatch.setattr("data_prep.raw.measure.measure", lambda *_: pytest.fail("measured again"))
    assert run.main(["--config", str(folder / "prep.toml")]) == 3  # The server is gone.
    assert f"annotate: kept {GOOD}, dropped {CLIPS - GOOD}" in capsys.readouterr().out


def test_the_export_becomes_records_that_training_reads(finished, tmp_path):
    folder, *_ = finished
    saber = folder / "out/saber"
    command = ["--clips", f"{saber}/clips", "--annotations", f"{saber}/annotations"]
    command += ["--labels", f"{saber}/labels.jsonl", "--out", str(tmp_path / "records")]
    assert build.main([*command, *settings.load(folder / "prep.toml").export.build]) == 0
    rows = {row["clip_id"]: row for row in stage(folder, "export").rows()}
    splits = {row["split"] for row in rows.values()}
    assert "test" in splits and "train" in splits
    for split in splits:
        source = RecordSource(tmp_path / "records", split)
        for record in (source[index] for index in range(len(source))):
            row = rows.pop(record.clip_id)
            assert (record.language, split) == (row["language"], row["split"])
            assert record.labels["conflict_type"] == row["labels"]["conflict_type"]
    assert not rows


def test_conversations_ask_for_parts_and_answer_evidence_first(finished):
    folder, *_ = finished
    lines = storage.read_lines(f"{folder}/out/instructions/conversations.jsonl")
    assert {line["clip_id"] for line in lines} == {
        row["clip_id"] for row in stage(folder, "instructions").rows()
    }
    for line in lines:
        roles = [message["role"] for message in line["messages"]]
        assert roles == ["system", "user", "assistant"]
        asked, answer = (message["content"] for message in line["messages"][1:])
        assert asked.startswith("<video><audio>") and answer.startswith("[")
        # A tag for each file, as ms-swift wants it, and files that are there.
        for kind in ("video", "audio"):
            assert asked.count(f"<{kind}>") == len(line[f"{kind}s"]) == 1
            assert Path(line[f"{kind}s"][0]).is_file()


def test_other_trainers_conversations_are_imported_back_split_by_split(
    finished, tokenizer, tmp_path
):
    file = finished[0] / "out/instructions/conversations.jsonl"
    lines = storage.read_lines(str(file))
    for split in {line["split"] for line in lines}:
        flags = ["--format", "ms-swift", "--input", str(file), "--out", str(tmp_path / split)]
        flags += ["--tokenizer", str(tokenizer.path), "--split", split, "--workers", "2"]
        assert importers.main(flags) == 0
        stored = RecordSource(tmp_path / split, split)
        assert {(r.messages[1]["content"], r.answer) for r in stored} == {
            (line["messages"][1]["content"], line["messages"][2]["content"])
            for line in lines
            if line["split"] == split
        }
        assert all(len(record.frames) and len(record.audio) for record in stored)


def test_again_brings_back_what_an_endpoint_in_trouble_lost(finished, drawn, tmp_path, capsys):
    folder, *_ = finished
    shutil.copytree(folder / "out", tmp_path / "out")
    healthy = Misbehaving(["none"])
    with chat_server(healthy) as server:
        path = config(tmp_path, drawn, server.url)
        assert run.main(["--config", str(path), "--again", "annotate"]) == 0
    assert "annotate: 1 clips to be retried" in capsys.readouterr().out
    kept = list(stage(tmp_path, "annotate").rows())
    assert len(kept) == GOOD + 1
    assert set(healthy.asked.values()) == {1}  # Only unanswered questions were asked.


def decoded(finished, tmp_path: Path) -> None:
    """Copies the finished stages that decode from another run."""
    for name in ("ingest", "segment", "measure", "filter"):
        shutil.copytree(finished[0] / "out" / name, tmp_path / "out" / name)


def test_a_run_that_leaves_no_clip_is_an_error(finished, drawn, tmp_path, capsys):
    decoded(finished, tmp_path)
    with chat_server(Misbehaving(["refusal"])) as server:
        assert run.main(["--config", str(config(tmp_path, drawn, server.url))]) == 1
    assert "no clip is left after annotate" in capsys.readouterr().err


def test_a_killed_run_goes_on_and_asks_nothing_twice(finished, drawn, tmp_path):
    decoded(finished, tmp_path)
    script = Misbehaving(["slow"])
    with chat_server(script) as server:
        path = config(tmp_path, drawn, server.url, **{"concurrency = 4": "concurrency = 1"})
        command = [sys.executable, "-m", "data_prep.run", "--config", str(path)]
        process = subprocess.Popen(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"})
        deadline = time.monotonic() + 60
        while len(script.asked) < 5 and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
        before = dict(script.asked)
        assert 5 <= len(before) < CLIPS
        assert run.main(["--config", str(path)]) == 0
    assert len(script.asked) == CLIPS
    # The question under way when the process died is the only one that may come twice.
    assert sum(script.asked.values()) <= CLIPS + 1
    assert len(list(stage(tmp_path, "annotate").rows())) == CLIPS


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("[split]", "[splt]", "did you mean split"),
        ("least_height = 64", "least_hight = 64", "did you mean filter.least_height"),
        ("test = 4", 'test = "four"', "split.test must be int"),
        ("retries = 2", "retries = 2, most_cost = 1.0, prices = [0.0, 0.0]", "not TOML"),
        ('recogniser = "endpoint"', 'recogniser = "ears"', "ears"),
        ('model = "m"', 'model = ""', "url and model"),
        ("shards = 3", 'shards = 3\nskip = ["annotate"]', "skip may name"),
        ('folder = "', 'folder = "/nowhere', "does not exist"),
        ('folder = "', 'corpus = "mold"\nfolder = "', "Unknown corpus"),
    ],
)
def test_a_wrong_setting_is_one_clear_error_before_any_work(
    drawn, tmp_path, capsys, old, new, message
):
    path = config(tmp_path, drawn, "http://127.0.0.1:9/v1", **{old: new})
    assert run.main(["--config", str(path)]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out/measure").exists()


def test_other_settings_do_not_mix_with_finished_work(finished, drawn, tmp_path, capsys):
    folder, *_ = finished
    shutil.copytree(folder / "out", tmp_path / "out")
    changed = {"least_height = 64": "least_height = 65"}
    path = config(tmp_path, drawn, "http://127.0.0.1:9/v1", **changed)
    assert run.main(["--config", str(path), "--stage", "filter"]) == 1
    assert "least_height: 64 there, 65 here" in capsys.readouterr().err


def test_the_example_settings_are_valid():
    example = settings.load(ROOT / "configs/data_prep.toml")
    assert example.annotate.endpoint.model and "captions" not in example.stages


@pytest.mark.slow
def test_a_killed_beam_run_goes_on_from_its_finished_shards(drawn, tmp_path):
    many = {"shards = 3": "shards = 8", "processes = 1": "processes = 2"}
    path = config(tmp_path, drawn, "http://127.0.0.1:9/v1", **many)
    for name in ("ingest", "segment"):
        assert run.main(["--config", str(path), "--stage", name]) == 0
    command = [sys.executable, "-m", "data_prep.run", "--config", str(path), "--stage", "measure"]
    process = subprocess.Popen(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"})
    folder = tmp_path / "out/measure"
    deadline = time.monotonic() + 120
    while len(list(folder.glob("kept-*"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    time.sleep(2)  # Beam's workers notice that nobody asks them any more.
    finished = {file: file.stat().st_mtime_ns for file in folder.glob("kept-*")}
    assert 2 <= len(finished) < 8
    assert subprocess.run(command, cwd=ROOT, check=False).returncode == 0
    assert {file: file.stat().st_mtime_ns for file in finished} == finished
    assert len(list(stage(tmp_path, "measure").rows())) == CLIPS


def test_a_run_stops_at_its_budget_and_a_larger_one_goes_on(finished, drawn, tmp_path, capsys):
    decoded(finished, tmp_path)
    script = Misbehaving(["none"])
    with chat_server(script) as server:
        small = {"retries = 2": "retries = 2, most_cost = 0.05"}
        assert run.main(["--config", str(config(tmp_path, drawn, server.url, **small))]) == 1
        assert "money allowed" in capsys.readouterr().err
        begun = len(script.asked)
        assert 0 < begun < CLIPS
        assert run.main(["--config", str(config(tmp_path, drawn, server.url))]) == 0
    assert len(script.asked) == CLIPS and set(script.asked.values()) == {1}
    used = storage.read_lines(f"{tmp_path}/out/annotate/usage.jsonl")
    assert [line["asked"] for line in used] == [begun, CLIPS - begun]
    assert used[0]["cost"] >= 0.05
