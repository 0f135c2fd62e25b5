"""Both layouts of an export open in transformers 4 and 5, and say the same in both."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from saber_jax.data.tokenizer import train_sentencepiece
from saber_jax.hf.export import export
from saber_jax.models.config import saber_config
from tests.hf import vllm_environment
from tests.models import weights

pytest.importorskip("torch")
pytestmark = pytest.mark.slow

OLDER = {"transformers": "4.57.6", "huggingface_hub": "0.36.2", "tokenizers": "0.22.2"}
TORCHVISION = "0.28.0"  # The processors need it, in both.


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """(torchvision, the older transformers): folders to put before this environment's packages."""
    place = tmp_path_factory.mktemp("packages")
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target"]
    wanted = {"vision": {"torchvision": TORCHVISION}, "older": OLDER}
    for name, packages in wanted.items():
        pins = [f"{package}=={version}" for package, version in packages.items()]
        done = subprocess.run([*install, place / name, *pins], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"cannot be installed here: {done.stderr.strip()[-300:]}")
    # A sitecustomize is run by every interpreter that finds it.
    (place / "vision/sitecustomize.py").write_text(vllm_environment.DECLARE)
    return place / "vision", place / "older"


@pytest.fixture(scope="module")
def said(folders, tmp_path_factory):
    """The answers of both versions for both layouts."""
    place = tmp_path_factory.mktemp("exports")
    texts = ["A woman smiles, but her voice trembles.", "声音里有悲伤。"] * 20
    tokenizer = train_sentencepiece(texts, place / "tokenizer.model", vocab_size=330, symbols=())
    cfg = saber_config("tiny")
    layouts = [place / "thinker", place / "omni"]
    for layout in layouts:
        export(weights.tree(cfg), cfg, layout, tokenizer, layout=layout.name)
    vision, older = map(str, folders)
    return [_ask(layouts, os.pathsep.join(path)) for path in ([vision], [older, vision])]


def _ask(layouts: list[Path], path: str) -> dict:
    command = [sys.executable, str(Path(__file__).with_name("opened.py")), *map(str, layouts)]
    environ = os.environ | vllm_environment.QUIET | {"PYTHONPATH": path}
    done = subprocess.run(command, capture_output=True, text=True, env=environ)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_transformers_4_and_5_open_the_processor_and_say_the_same(said):
    newer, older = said
    assert older["version"] == OLDER["transformers"] and newer["version"].startswith("5.")
    for one, other in zip(newer["exports"], older["exports"], strict=True):
        assert one["processor"] == other["processor"] == "Qwen2_5OmniProcessor"
        assert one["ids"] == other["ids"] and one["answer"] == other["answer"]
        assert one["logits"] == pytest.approx(other["logits"], rel=1e-5)


def test_both_layouts_say_the_same(said):
    for version in said:
        thinker, omni = version["exports"]
        assert thinker == omni
