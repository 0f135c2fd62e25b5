"""An installed libtpu is asked for TPUs only where there may be some."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from saber_jax.runs import platforms


def plug(sysfs, vendor, kind):
    device = sysfs / "bus/pci/devices/0000:00:05.0"
    device.mkdir(parents=True)
    (device / "vendor").write_text(f"{vendor}\n")
    (device / "class").write_text(f"{kind}\n")


@pytest.mark.parametrize(
    ("vendor", "kind", "expected"),
    [
        ("0x1ae0", "0x088000", True),  # A TPU.
        ("0x1ae0", "0x020000", False),  # Google's network card.
        ("0x8086", "0x060000", False),
    ],
)
def test_google_devices_other_than_network_cards_count(
    tmp_path, monkeypatch, vendor, kind, expected
):
    for name in platforms.ASKS_FOR_TPUS:
        monkeypatch.delenv(name, raising=False)
    plug(tmp_path, vendor, kind)
    assert platforms.may_have_accelerator(tmp_path, tmp_path / "dev") is expected


def test_a_device_file_and_a_setting_count(tmp_path, monkeypatch):
    dev = tmp_path / "dev"
    dev.mkdir()
    (dev / "nvidia0").touch()
    assert platforms.may_have_accelerator(tmp_path, dev)
    monkeypatch.setenv("TPU_WORKER_ID", "0")
    assert platforms.may_have_accelerator(tmp_path, tmp_path / "none")


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None
    or platforms.may_have_accelerator(Path("/sys"), Path("/dev")),
    reason="needs libtpu on a machine without accelerators",
)
def test_a_cpu_is_found_without_a_word_though_libtpu_is_installed():
    environ = {key: value for key, value in os.environ.items() if key != "JAX_PLATFORMS"}
    done = subprocess.run(
        [sys.executable, "-c", "import saber_jax, jax; print(jax.devices()[0].platform)"],
        capture_output=True,
        text=True,
        env=environ,
    )
    assert (done.stdout, done.stderr) == ("cpu\n", "")
