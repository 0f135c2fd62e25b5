"""What ms-swift's loader asks of a Qwen2.5-Omni directory, read off its wheel, is in an export."""

import ast
import json
import subprocess
import sys
import zipfile

import pytest

from saber_jax.hf.export import export
from saber_jax.hf.load import open_checkpoint
from tests.hf import vocabulary
from tests.models import weights
from tests.models.batches import CONFIG

pytestmark = pytest.mark.slow

VERSION = "4.6.0"


@pytest.fixture(scope="module")
def swift(tmp_path_factory):
    """The sources of its wheel; none of it is run."""
    place = tmp_path_factory.mktemp("swift")
    command = ["pip", "download", "--quiet", "--no-deps", "--dest", str(place)]
    done = subprocess.run(
        [sys.executable, "-m", *command, f"ms-swift=={VERSION}"], capture_output=True, text=True
    )
    if done.returncode:
        pytest.skip(f"ms-swift cannot be downloaded here: {done.stderr.strip()[-300:]}")
    with zipfile.ZipFile(next(place.glob("*.whl"))) as wheel:
        files = ("swift/model/models/qwen.py", "swift/model/model_arch.py")
        return {name: wheel.read(name).decode() for name in files}


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    out = tmp_path_factory.mktemp("export") / "omni"
    tokenizer = vocabulary.write(out.with_name("vocabulary"))
    export(weights.tree(CONFIG), CONFIG, out, tokenizer, layout="omni")
    return out


def call(source: str, kind: str, first: str) -> dict[str, list[str]]:
    """Lists among the keyword arguments of the call KIND(FIRST, ...)."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or ast.unparse(node.func) != kind or not node.args:
            continue
        if ast.unparse(node.args[0]) == first:
            lists = [k for k in node.keywords if isinstance(k.value, ast.List)]
            return {str(k.arg): ast.literal_eval(k.value) for k in lists}
    raise AssertionError(f"{kind}({first}, ...) is not in ms-swift {VERSION}")


def test_swift_knows_the_export_by_its_architecture_and_finds_its_files(swift, exported):
    about = call(swift["swift/model/models/qwen.py"], "ModelMeta", "MLLMModelType.qwen2_5_omni")
    config = json.loads((exported / "config.json").read_text())
    assert set(config["architectures"]) <= set(about["architectures"])
    assert all((exported / name).is_file() for name in about["additional_saved_files"])


def test_swift_finds_every_module_that_it_trains_or_freezes(swift, exported):
    about = call(swift["swift/model/model_arch.py"], "MultiModelKeys", "MLLMModelArch.qwen2_5_omni")
    names = open_checkpoint(exported).everything
    parts = [part for kind in ("language_model", "vision_tower", "aligner") for part in about[kind]]
    for part in parts:
        assert any(name.startswith(f"{part}.") for name in names), part
    towers = (*about["language_model"], *about["vision_tower"])
    assert all(name.startswith(towers) for name in names)
