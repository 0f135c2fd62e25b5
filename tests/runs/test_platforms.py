"""What is settled from environment variables before jax is imported."""

import importlib.util
import os
import platform
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


TWO = "--xla_dump_to= --xla_force_host_platform_device_count=2"


@pytest.mark.parametrize(
    ("variables", "kept"),
    [
        ({}, True),
        ({"XLA_FLAGS": "--xla_force_host_platform_device_count=1"}, True),
        ({"XLA_FLAGS": TWO}, False),
        ({"JAX_NUM_CPU_DEVICES": "2"}, False),
        ({"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0"}, False),
        ({"XLA_FLAGS": TWO, "JAX_PLATFORMS": "tpu,cpu"}, True),
    ],
)
def test_several_cpu_devices_do_without_the_compilation_cache_and_say_so(
    monkeypatch, capsys, variables, kept
):
    for name in ("XLA_FLAGS", "JAX_NUM_CPU_DEVICES", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"):
        monkeypatch.delenv(name, raising=False)
    settings = {"JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": "/compiled"} | variables
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    platforms.keep_collectives_out_of_the_cache()
    assert ("JAX_COMPILATION_CACHE_DIR" in os.environ) is kept
    said = capsys.readouterr().err
    assert said == "" if kept else "/compiled is not used" in said and said.count("\n") == 1


def test_a_program_of_this_project_has_settled_it_before_jax_reads_the_variable():
    settings = {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": TWO,
        "JAX_COMPILATION_CACHE_DIR": "/compiled",
    }
    code = "import saber_jax.tree, jax; print(jax.config.jax_compilation_cache_dir)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | settings,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "None\n"


ALLOCATE = """
import resource, threading
import numpy as np

def step():
    for _ in range(40):
        [np.ones(2**20, np.uint8) for _ in range(40)]

threads = [threading.Thread(target=step) for _ in range(2)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_buffers_are_kept_between_the_steps_of_every_thread(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)

    def page_faults(environ):
        command = [sys.executable, "-c", ALLOCATE]
        done = subprocess.run(command, env=environ, capture_output=True, text=True, check=True)
        return int(done.stdout)

    kept = page_faults(platforms.with_kept_buffers(os.environ))
    assert kept < page_faults(dict(os.environ)) / 5


def test_only_programs_on_cpu_keep_buffers_and_a_choice_stays():
    elsewhere, here = {"JAX_PLATFORMS": "tpu,cpu"}, {"JAX_PLATFORMS": "cpu"}
    assert platforms.with_kept_buffers(elsewhere) == elsewhere
    assert platforms.with_kept_buffers(here).keys() == {"JAX_PLATFORMS", "GLIBC_TUNABLES"}
    mine = here | {"GLIBC_TUNABLES": "glibc.malloc.perturb=1"}
    assert platforms.with_kept_buffers(mine) == mine
