"""Settings that name buckets: handed on as folders, and mounted if asked to."""

import pytest

from tests.launch import standins

RUN = ("launch/tpu_run.sh", "configs/sft.py:7b")


@pytest.fixture
def host(tmp_path):
    """A machine with gcsfuse, and an interpreter that stands in for ours."""
    made = standins.Standins(tmp_path)
    made.add("gcsfuse", standins.GCSFUSE)
    made.add("mountpoint", standins.MOUNTPOINT)
    made.python = str(made.add("project_python", standins.PYTHON))
    return made


def launch(host, *settings, fuse="1"):
    where = {"SABER_PYTHON": host.python, "SABER_BUCKETS": str(host.folder / "my buckets")}
    return host.run(*RUN, *settings, HOME=str(host.folder), SABER_FUSE=fuse, **where)


def test_every_bucket_is_mounted_once_and_its_settings_become_paths(host):
    settings = (
        "--config.root=gs://runs-7b/first try",
        "--config.data.path=gs://runs/records",
        "--config.data.mixture=('gs://runs/a:train:1', 'gs://runs-7b/b:train:2')",
        "--config.seed=1",
    )
    for _ in range(2):
        done = launch(host, *settings)
        assert done.returncode == 0, done.stderr
    mounted = host.folder / "my buckets"
    (_, chain) = host.calls("project_python", "-m", "launch.chain")
    assert chain[3:] == [
        "--config=configs/sft.py:7b",
        f"--config.root={mounted}/runs-7b/first try",
        f"--config.data.path={mounted}/runs/records",
        f"--config.data.mixture=('{mounted}/runs/a:train:1', '{mounted}/runs-7b/b:train:2')",
        "--config.seed=1",
    ]
    flags = ["--implicit-dirs", "--rename-dir-limit=1000000", "--metadata-cache-ttl-secs=0"]
    assert host.calls("gcsfuse") == [
        ["gcsfuse", *flags, bucket, f"{mounted}/{bucket}"] for bucket in ("runs-7b", "runs")
    ]
    assert (mounted / "runs-7b").is_dir()


SHOW = """
import os, pathlib, sys
if "launch.chain" in sys.argv:
    for name in ("SABER_MOUNTS", "JAX_COMPILATION_CACHE_DIR"):
        print(f"{name}: {os.environ[name]!r}")
"""


def test_a_run_learns_what_is_mounted_where_and_compiles_into_its_bucket(host):
    host.python = str(host.add("project_python", SHOW))
    settings = ("--config.root=gs://runs-7b/first", "--config.data.path=gs://data/records")
    done = launch(host, *settings)
    mounted = host.folder / "my buckets"
    mounts = f"{mounted}/data=gs://data\n{mounted}/runs-7b=gs://runs-7b"
    assert f"SABER_MOUNTS: {mounts!r}" in done.stdout
    assert "JAX_COMPILATION_CACHE_DIR: 'gs://runs-7b/first/compilation_cache'" in done.stdout
    assert "SABER_MOUNTS: ''" in launch(host, "--config.root=/disk/7b").stdout


def test_on_gke_programs_are_compiled_into_the_bucket_that_the_volume_shows(host, monkeypatch):
    host.python = str(host.add("project_python", SHOW))
    device = host.folder / "sys/bus/pci/devices/0"
    device.mkdir(parents=True)
    (device / "vendor").write_text("0x1ae0")
    (device / "device").write_text("0x0063")
    monkeypatch.setenv("SABER_MOUNTS", "/runs=gs://runs-7b")
    for root, place in {"/runs/7b": "gs://runs-7b/7b", "/runs2/7b": "/runs2/7b"}.items():
        done = launch(host, f"--config.root={root}")
        assert f"JAX_COMPILATION_CACHE_DIR: '{place}/compilation_cache'" in done.stdout, done.stderr


def test_by_default_nothing_is_mounted_and_a_file_takes_the_folder_s_place(host):
    (host.folder / "bin" / "gcsfuse").unlink()
    place = host.folder / "my buckets/runs"
    place.mkdir(parents=True)  # Where an earlier run had mounted it.
    for _ in range(2):
        done = launch(host, "--config.root=gs://runs/7b", fuse="")
        assert done.returncode == 0, done.stderr
        assert place.read_bytes() == b""
    assert host.calls("project_python", "-m", "launch.chain")[0][-1] == f"--config.root={place}/7b"


def test_a_bucket_is_mounted_in_the_place_of_that_file(host):
    launch(host, "--config.root=gs://runs/7b", fuse="")
    assert launch(host, "--config.root=gs://runs/7b").returncode == 0
    assert (host.folder / "my buckets/runs").is_dir()


def test_without_buckets_nothing_is_mounted(host):
    assert launch(host, "--config.root=/disk/7b").returncode == 0
    assert not host.calls("gcsfuse")


def test_a_bucket_that_cannot_be_mounted_ends_the_run(host):
    done = launch(host, "--config.root=gs://locked/7b")
    assert done.returncode == 1
    assert "403 Forbidden" in done.stderr and "gs://locked could not be mounted" in done.stderr
    assert not host.calls("project_python", "-m", "launch.chain")


def test_a_missing_gcsfuse_is_said_with_what_to_do(host):
    (host.folder / "bin" / "gcsfuse").unlink()
    done = launch(host, "--config.root=gs://runs/7b")
    assert done.returncode == 1
    assert "gs://runs is mounted by gcsfuse, which is not here. Install it" in done.stderr


# What `sudo apt-get install gcsfuse` leaves.
SUDO = """
import os, pathlib, sys

there = pathlib.Path(os.environ["STANDIN_FOLDER"])
if "install" in sys.argv:
    os.rename(there / "gcsfuse_package", there / "bin" / "gcsfuse")
"""


def test_a_tpu_vm_gets_gcsfuse_by_itself(host):
    device = host.folder / "sys/bus/pci/devices/0"
    device.mkdir(parents=True)
    (device / "vendor").write_text("0x1ae0")
    (device / "device").write_text("0x0063")
    (host.folder / "bin" / "gcsfuse").rename(host.folder / "gcsfuse_package")
    host.add("sudo", SUDO)
    host.add("curl", "")
    host.add("lsb_release", "print('jammy')")
    done = launch(host, "--config.root=gs://runs/7b")
    assert done.returncode == 0, done.stderr
    assert host.calls("gcsfuse") and host.calls("sudo", "-n", "apt-get", "-qq", "update")
