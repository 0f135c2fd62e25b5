"""The shell scripts: what they find on a machine, and what they install for it."""

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launch import standins

# Only what a test asks for fails: BROKEN in the folder breaks pip, as in a half-made environment.
PYTHON = """
import os, pathlib, sys

if sys.argv[1:3] == ["-m", "pip"] and pathlib.Path(os.environ["STANDIN_FOLDER"], "BROKEN").exists():
    sys.exit("No module named pip")
"""
# A Python that makes environments whose interpreter is the stand-in above.
MAKES_VENVS = """
import os, pathlib, sys

folder = pathlib.Path(os.environ["STANDIN_FOLDER"])
if sys.argv[1:3] == ["-m", "venv"]:
    (folder / "BROKEN").unlink(missing_ok=True)
    made = pathlib.Path(sys.argv[3], "bin")
    made.mkdir(parents=True)
    (made / "python").symlink_to(folder / "bin/venv_python")
"""
UNFIT = "import sys; sys.exit(1)"
UV = MAKES_VENVS.replace('["-m", "venv"]', '["venv", "--quiet"]').replace("argv[3]", "argv[-1]")


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


def makes_environments(machine, *, pythons):
    """Pythons on the PATH: those named here make environments, the others cannot."""
    for name in ("python3.12", "python3.11", "python3"):
        machine.add(name, MAKES_VENVS if name in pythons else UNFIT)
    return [call for name in pythons for call in machine.calls(name, "-m", "venv")]


def test_a_tpu_vm_gets_libtpu_once(machine):
    for slot in "0123":
        plug(machine, slot, "0x1ae0\n", "0x0063\n")
    assert installed(machine) == ["requirements.txt", "jax[tpu]"]
    last = machine.calls("venv_python", "-m", "pip", "install")[-1]
    pins = ["-c", "requirements.txt", "-c", "requirements-tpu.txt"]  # Also libtpu's.
    assert last[-5:] == [*pins, "jax[tpu]"]
    assert len(installed(machine)) == 2
    count = machine.run("bash", "-c", "source launch/hardware.sh; tpu_chips")
    assert count.stdout == "4\n"


@pytest.mark.parametrize(("driver", "cuda"), [("580.82.07", "cuda13"), ("550.54.15", "cuda12")])
def test_an_nvidia_gpu_gets_jax_with_the_cuda_that_its_driver_runs(machine, driver, cuda):
    machine.add(
        "nvidia-smi",
        f"import sys; print('{driver}' if '--format=csv,noheader' in sys.argv else 'GPU 0: H100')",
    )
    assert installed(machine) == ["requirements.txt", f"jax[{cuda}]"]
    last = machine.calls("venv_python", "-m", "pip", "install")[-1]
    assert last[last.index("-c") + 1] == "requirements.txt"  # At the version of all other pins.


def test_the_newest_python_that_can_make_an_environment_makes_it(machine):
    shutil.rmtree(machine.folder / "venv")
    makes_environments(machine, pythons=("python3.12", "python3.11"))
    assert installed(machine) == ["requirements.txt"]
    assert machine.calls("python3.12", "-m", "venv") and not machine.calls(
        "python3.11", "-m", "venv"
    )


def test_a_half_made_environment_is_made_anew(machine):
    (machine.folder / "BROKEN").touch()
    (machine.folder / "venv/left_over").touch()
    makes_environments(machine, pythons=("python3.11",))
    assert installed(machine) == ["requirements.txt"]
    assert not (machine.folder / "venv/left_over").exists()


# Makes an environment as soon as a test says so.
WAITS = MAKES_VENVS.replace(
    "    made =",
    """    import time

    while not (folder / "GO").exists():
        time.sleep(0.01)
    made =""",
)


@pytest.fixture(params=["flock", "mkdir"])
def tools(request, machine):
    """PATH with and without flock."""
    everything = os.environ["PATH"]
    if request.param == "mkdir":
        kept = machine.folder / "kept"
        kept.mkdir()
        for file in (file for folder in everything.split(":") for file in Path(folder).glob("*")):
            if file.name != "flock" and not (kept / file.name).is_symlink():
                (kept / file.name).symlink_to(file)
        everything = str(kept)
    return f"{machine.folder}/bin:{everything}"


def test_two_setups_of_one_environment_take_turns(machine, tools):
    shutil.rmtree(machine.folder / "venv")
    for name in ("python3.12", "python3.11", "python3"):
        machine.add(name, WAITS)
    venv = str(machine.folder / "venv")
    environ = machine.environ(PATH=tools, SABER_VENV=venv, SABER_PYTHON="")

    def start() -> subprocess.Popen:
        pipe = subprocess.PIPE
        return subprocess.Popen(
            "launch/setup.sh", cwd=standins.ROOT, env=environ, stdout=pipe, stderr=pipe, text=True
        )

    first = start()
    assert first.stderr is not None and first.stderr.readline().startswith("setup: making")
    second = start()
    assert second.stderr is not None
    assert f"({holder(first.pid)})" in second.stderr.readline()  # It waits.
    (machine.folder / "GO").touch()
    for setup in (first, second):
        assert setup.communicate(timeout=60)[0] == f"{venv}/bin/python\n" and not setup.returncode
    assert len([call for call in machine.calls() if call[1:3] == ["-m", "venv"]]) == 1
    assert len(machine.calls("venv_python", "-m", "pip", "install")) == 1


def holder(process: int) -> str:
    return f"process {process} on {socket.gethostname()}"


def test_the_lock_of_a_setup_that_was_killed_is_taken_over(machine, tools):
    lock = machine.folder / "venv.lock"
    gone = subprocess.Popen("true")
    gone.wait()
    (machine.folder / "venv.lock.d").mkdir()
    for file in (lock, machine.folder / "venv.lock.d/holder"):
        file.write_text(holder(gone.pid))
    done = machine.run(
        "launch/setup.sh", PATH=tools, SABER_VENV=str(machine.folder / "venv"), SABER_PYTHON=""
    )
    assert done.returncode == 0
    without = shutil.which("flock", path=tools) is None
    assert (f"taking over the lock of {holder(gone.pid)}, which is gone" in done.stderr) == without
    assert (machine.folder / "venv.lock.d").exists() != without


def test_uv_brings_a_python_where_the_system_has_none(machine):
    shutil.rmtree(machine.folder / "venv")
    makes_environments(machine, pythons=())
    machine.add("uv", UV)
    assert installed(machine) == ["requirements.txt"]
    assert machine.calls("uv", "venv")


def test_without_any_python_it_is_said_what_to_install(machine):
    shutil.rmtree(machine.folder / "venv")
    makes_environments(machine, pythons=())
    machine.add("uv", UNFIT)
    done = machine.run("launch/setup.sh", SABER_VENV=str(machine.folder / "venv"), SABER_PYTHON="")
    assert done.returncode == 1
    assert "python3.11-venv" in done.stderr and not (machine.folder / "venv").exists()


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


def test_the_gpu_compiler_gets_a_folder_of_its_own_where_jax_does_not_find_it_unasked(machine):
    assert installed(machine, "--aot-gpu") == ["requirements.txt", "requirements-cuda.txt"]
    last = machine.calls("venv_python", "-m", "pip", "install")[-1]
    assert last[last.index("--target") + 1] == f"{machine.folder}/venv/cuda"


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
    assert installs == ["requirements.txt", "jax[tpu]"]


def test_shell_scripts_pass_shellcheck():
    scripts = sorted(map(str, Path("launch").glob("*.sh")))
    shellcheck = Path(sys.executable).parent / "shellcheck"
    done = subprocess.run(
        [shellcheck, "-x", *scripts], cwd=standins.ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout


def test_transparent_huge_pages_are_switched_on_where_they_are_not(machine):
    switch = machine.folder / "sys/kernel/mm/transparent_hugepage/enabled"
    switch.parent.mkdir(parents=True)
    for before, after in (
        ("always [madvise] never", "always"),
        ("[always] never", "[always] never"),
    ):
        switch.write_text(before)
        done = machine.run("bash", "-euc", "source launch/hardware.sh; huge_pages")
        assert done.returncode == 0 and not done.stderr
        assert switch.read_text().strip() == after
    switch.unlink()
    assert machine.run("bash", "-euc", "source launch/hardware.sh; huge_pages").returncode == 0
