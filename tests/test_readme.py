"""What README tells a newcomer to type is what the commands take, and works as it stands."""

import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from configs import sft
from data_prep.corpus import build as corpus
from data_prep.corpus.plan import Sizes
from tests import loopback

ROOT = Path(__file__).parent.parent
HEADING = "### Thirty clips on a laptop"


def block() -> str:
    """The commands under HEADING."""
    return (ROOT / "README.md").read_text("utf-8").split(HEADING)[1].split("```")[1].strip()


def commands() -> list[list[str]]:
    """[module, argument, ...] of every `python -m` of the block, nested ones too."""
    lines = block().replace("\\\n", " ").replace("$(", "\n").replace(")", " ")
    words = [shlex.split(line) for line in lines.splitlines()]
    return [line[2:] for line in words if line[:2] == ["python", "-m"]]


def test_the_block_goes_from_annotations_to_a_report():
    assert [module for module, *_ in commands()] == [
        *("data_prep.annotate", "data_prep.build", "saber_jax.main", "saber_jax.data.budgets"),
        *("saber_jax.generate", "saber_jax.evaluation.run", "saber_jax.evaluation.report"),
    ]


@pytest.mark.parametrize("line", commands(), ids=lambda line: line[0])
def test_every_flag_of_the_block_exists(line, capsys):
    module, *arguments = line
    flags = [argument.partition("=")[0] for argument in arguments if argument.startswith("--")]
    if module == "saber_jax.main":
        config = sft.get_config("tiny")
        for flag in flags[1:]:
            node = config
            for key in flag.removeprefix("--config.").split("."):
                node = node[key]
        return
    package = importlib.import_module(module)
    entry = getattr(package, "main", None) or importlib.import_module(f"{module}.__main__").main
    with pytest.raises(SystemExit) as end:
        entry(["--help"])
    assert end.value.code == 0
    listed = re.findall(r"--\w+", capsys.readouterr().out)
    assert set(flags) <= set(listed)


def test_the_annotation_and_the_labels_that_readme_shows_are_taken(tmp_path):
    from data_prep.records import clips
    from saber_jax.data.annotations import parse_annotation

    annotation, labels = re.findall(r"```json\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert parse_annotation(json.loads(annotation))["speech_content"] == "That went really well."
    path = tmp_path / "labels.jsonl"
    path.write_text(labels)
    assert clips.read_labels(path)["001"]["conflict_type"] == "masking"


@pytest.mark.slow
def test_the_block_works_as_it_stands(tmp_path):
    for name in ("configs", "data_prep", "saber_jax", "launch"):
        (tmp_path / name).symlink_to(ROOT / name)
    mine = tmp_path / "mine"
    corpus.build(mine, sizes=Sizes(train=20, preference=2, validation=2, test=6), seed=3)
    lines = (mine / "labels.jsonl").read_text().splitlines()
    english = [row for row in map(json.loads, lines) if row["language"] == "en"]
    names = {row["clip_id"] for row in english}
    drafts = [(mine / f"annotations/{name}.json").read_text() for name in sorted(names)]
    shutil.rmtree(mine / "annotations")
    for path in (mine / "clips").iterdir():
        if path.stem not in names:
            path.unlink()
    (mine / "labels.jsonl").write_text("".join(json.dumps(row) + "\n" for row in english))
    shutil.copy(min((mine / "clips").iterdir()), mine / "clips/001.mp4")
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "python").symlink_to(sys.executable)
    with loopback.chat_server(
        lambda _, number: loopback.Answer(text=drafts[number % len(drafts)])
    ) as server:
        environ = os.environ | {
            "URL": server.url,
            "MODEL": "m",
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "JAX_PLATFORMS": "cpu",
        }
        done = subprocess.run(
            ["bash", "-ec", block()], cwd=tmp_path, env=environ, capture_output=True, text=True
        )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "[sentiment_analysis]" in done.stdout
    assert (mine / "report.html").stat().st_size > 100_000
