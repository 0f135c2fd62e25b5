"""What a disk damaged in an export is named, by hf.check and by hf.load."""

import json
import shutil

import jax
import numpy as np
import pytest

from saber_jax.hf import check, digests, export, load, tensors
from saber_jax.models import saber
from tests.models.batches import CONFIG


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    out = tmp_path_factory.mktemp("export") / "hf"
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: rng.standard_normal(leaf.shape, np.float32), saber.abstract(CONFIG)
    )
    export.export(params, CONFIG, out, shard_bytes=2**20)
    return out


@pytest.fixture
def copy(exported, tmp_path):
    return shutil.copytree(exported, tmp_path / "hf")


def flip(path, byte, bit=0):
    data = bytearray(path.read_bytes())
    data[byte] ^= 1 << bit
    path.write_bytes(data)


def test_an_intact_export_is_all_that_was_exported(exported, capsys):
    assert check.main([str(exported)]) == 0
    assert "tensors are what was exported" in capsys.readouterr().out
    load.load_params(exported)


@pytest.mark.parametrize("where", [0.1, 0.5, 0.999])
def test_a_flipped_bit_in_a_weight_is_named_by_both(copy, where, capsys):
    file = sorted(copy.glob("*.safetensors"))[-1]
    flip(file, int(file.stat().st_size * where), 6)
    assert check.main([str(copy)]) == 1
    assert file.name in capsys.readouterr().err
    with pytest.raises(ValueError, match=file.name):
        load.load_params(copy)


def test_a_flipped_bit_in_the_name_of_a_weight_is_named(copy, capsys):
    file = sorted(copy.glob("*.safetensors"))[-1]
    flip(file, file.read_bytes().index(b".weight") - 1)
    assert check.main([str(copy)]) == 1
    assert f"{file.name} has a damaged header" in capsys.readouterr().err


@pytest.mark.parametrize("place", [b"config.json", b'": ', b"tensors", b"headers"])
def test_a_flipped_bit_in_the_digests_is_named_as_theirs(copy, place, capsys):
    file = copy / digests.FILE
    flip(file, file.read_bytes().index(place) + 3)
    assert check.main([str(copy)]) == 1
    assert "digests.json is damaged" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"digests\.json is damaged"):
        load.open_checkpoint(copy)


def test_digests_of_an_earlier_version_are_compared_as_they_are(copy, capsys):
    file = copy / digests.FILE
    content = json.loads(file.read_text())
    file.write_text(json.dumps({key: content[key] for key in ("files", "tensors")}))
    assert check.main([str(copy)]) == 0
    capsys.readouterr()
    content["tensors"] = {name: sums[:-1] for name, sums in content["tensors"].items()}
    file.write_text(json.dumps({key: content[key] for key in ("files", "tensors")}))
    assert check.main([str(copy)]) == 1
    assert "digests.json lists" in capsys.readouterr().err


def test_a_flipped_digit_in_a_config_is_named_by_both(copy, capsys):
    text = (copy / "config.json").read_text()
    (copy / "config.json").write_text(text.replace("1e-06", "2e-06").replace("1000000", "1000001"))
    assert check.main([str(copy)]) == 1
    assert "config.json is not what was exported" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"config\.json is not what was exported; delete"):
        load.open_checkpoint(copy)


def test_missing_files_are_named(copy, capsys):
    lost = sorted(copy.glob("*.safetensors"))[0]
    lost.unlink()
    (copy / "generation_config.json").unlink()
    assert check.main([str(copy)]) == 1
    said = capsys.readouterr().err
    for name in ("generation_config.json", lost.name):
        assert f"{name}, which digests.json lists, is missing" in said


def test_a_directory_without_digests_loads_and_is_not_called_checked(copy, capsys):
    (copy / digests.FILE).unlink()
    assert check.main([str(copy)]) == 1
    assert "no digests.json" in capsys.readouterr().err
    load.open_checkpoint(copy)


def test_a_directory_that_is_not_there_is_said_not_to_be_there(tmp_path, capsys):
    assert check.main([str(tmp_path / "typo")]) == 1
    assert "typo is damaged or no export, 1 problem:\n  there is no such" in capsys.readouterr().err


def test_every_tensor_of_an_export_has_a_digest(exported):
    found, wrong = tensors.find(exported)
    assert not wrong and all(t.digest is not None for t in found.values())
