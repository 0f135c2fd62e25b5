"""The shell scripts: what they find on a machine, and what they install for it."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launch import standins

PYTHON = "import sys"


@pytest.fixture
def machine(tmp_path):
    """A machine with a virtual environment whose interpreter stands in for a real one."""
    made = standins.Standins(tmp_path)
    (tmp_path / "venv" / "bin").mkdir(parents=True)
    (tmp_path / "venv" / "bin" / "python").symlink_to(made.add("venv_python", PYTHON))
    return made


def plug(machine, slot, vendor, device):
    folder = machine.folder / "sys/bus/pci/devices" / slot
    folder.mkdir(parents=True)
    (folder / "vendor").write_text(vendor)
    (folder / "device").write_text(device)


def installed(machine, *flags):
    venv = str(machine.folder / "venv")
    done = machine.run("launch/setup.sh", *flags, SABER_VENV=venv, SABER_PYTHON="")
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{machine.folder}/venv/bin/python\n"
    return [call[-1] for call in machine.calls("venv_python", "-m", "pip", "install")]


def jax_pin():
    lines = (standins.ROOT / "requirements.txt").read_text().splitlines()
    return next(line for line in lines if line.startswith("jax==")).removeprefix("jax==")


def test_a_tpu_vm_gets_libtpu_once(machine):
    for slot in "0123":
        plug(machine, slot, "0x1ae0\n", "0x0063\n")
    assert installed(machine) == ["requirements.txt", f"jax[tpu]=={jax_pin()}"]
    assert len(installed(machine)) == 2
    count = machine.run("bash", "-c", "source launch/hardware.sh; tpu_chips")
    assert count.stdout == "4\n"


def test_an_nvidia_gpu_gets_jax_with_cuda(machine):
    machine.add("nvidia-smi", "print('GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-1)')")
    assert installed(machine) == ["requirements.txt", f"jax[cuda12]=={jax_pin()}"]


def test_neither_googles_network_card_nor_a_driver_without_gpu_is_an_accelerator(machine):
    plug(machine, "0", "0x1ae0\n", "0x0042\n")
    machine.add("nvidia-smi", "import sys; print('No devices were found'); sys.exit(6)")
    assert installed(machine) == ["requirements.txt"]


def test_the_benchmarks_get_their_peers_and_torchvision_in_a_folder_of_its_own(machine):
    found = installed(machine, "--bench")
    torch = next(line for line in found if line.startswith("torch=="))
    assert found == [
        *("requirements.txt", "requirements-prep.txt"),
        *(torch, "requirements-torch.txt", "requirements-bench.txt"),
    ]
    last = machine.calls("venv_python", "-m", "pip", "install")[-1]
    assert last[last.index("--target") + 1] == f"{machine.folder}/venv/bench"
    assert "--no-deps" in last
    assert installed(machine, "--bench") == found


def test_the_image_for_tpus_is_made_by_the_setup_script_from_files_that_are_there(machine):
    lines = (standins.ROOT / "launch/Dockerfile").read_text().splitlines()
    instructions = [line.split() for line in lines if line and line[0] != "#"]
    assert [name for name, *_ in instructions] == [
        *("FROM", "WORKDIR", "COPY", "COPY", "RUN", "ENV", "COPY")
    ]
    copies, (run,) = (
        [words for name, *words in instructions if name == wanted] for wanted in ("COPY", "RUN")
    )
    image = machine.folder / "image"
    for *sources, target in copies[:2]:
        (image / target).mkdir(parents=True, exist_ok=True)
        for source in sources:
            shutil.copy(standins.ROOT / source, image / target)
    venv = machine.folder / "venv"
    environ = machine.environ(SABER_VENV=str(venv), SABER_PYTHON="")
    subprocess.run(run, cwd=image, env=environ, check=True)
    installs = [call[-1] for call in machine.calls("venv_python", "-m", "pip", "install")]
    assert installs == ["requirements.txt", f"jax[tpu]=={jax_pin()}"]


def test_shell_scripts_pass_shellcheck():
    scripts = sorted(map(str, Path("launch").glob("*.sh")))
    shellcheck = Path(sys.executable).parent / "shellcheck"
    done = subprocess.run(
        [shellcheck, "-x", *scripts], cwd=standins.ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout
