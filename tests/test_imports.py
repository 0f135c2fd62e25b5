"""Imports point one way; docs/architecture.md says which."""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FORBIDDEN = {
    "saber_jax/runs": (
        *("saber_jax.data", "saber_jax.models", "saber_jax.train", "saber_jax.hf"),
        *("saber_jax.generate", "saber_jax.evaluation", "saber_jax.main", "data_prep", "configs"),
    ),
    "saber_jax/data": (
        *("saber_jax.models", "saber_jax.train", "saber_jax.generate", "saber_jax.hf"),
        *("saber_jax.evaluation", "saber_jax.main", "data_prep", "configs"),
    ),
    "saber_jax/models": (
        *("saber_jax.data", "saber_jax.train", "saber_jax.hf", "saber_jax.evaluation"),
        *("saber_jax.generate", "saber_jax.main", "data_prep", "configs"),
    ),
    "saber_jax/train": ("saber_jax.main", "saber_jax.evaluation", "data_prep", "configs"),
    "saber_jax/hf": ("saber_jax.main", "saber_jax.evaluation", "saber_jax.generate", "data_prep"),
    "saber_jax/evaluation": ("saber_jax.main", "data_prep", "configs"),
    "data_prep": ("saber_jax.main", "saber_jax.evaluation", "configs"),
}


def imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("folder", FORBIDDEN)
def test_no_import_points_backwards(folder):
    backwards = [
        (path.name, name)
        for path in (ROOT / folder).rglob("*.py")
        for name in imports(path)
        if name.startswith(FORBIDDEN[folder])
    ]
    assert not backwards


def test_only_the_loader_brings_jax_into_data():
    importers = {
        path.name
        for path in (ROOT / "saber_jax/data").glob("*.py")
        if any(name.split(".")[0] in ("jax", "flax") for name in imports(path))
    }
    assert importers == {"loader.py"}


def test_processes_that_decode_start_without_jax():
    code = (
        "import saber_jax.data.isolation, saber_jax.data.decode, saber_jax.data.encoded, sys; "
        "sys.exit('jax' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_no_module_of_data_imports_itself_by_a_detour():
    folder = ROOT / "saber_jax/data"
    imported = {
        path.stem: {
            name.split(".")[2]
            for name in imports(path)
            if name.startswith("saber_jax.data.") and (folder / f"{name.split('.')[2]}.py").exists()
        }
        for path in folder.glob("*.py")
    }
    tuple(graphlib.TopologicalSorter(imported).static_order())  # Raises CycleError.


def test_what_jax_does_not_promise_to_keep_is_used_in_one_file():
    users = {
        path.relative_to(ROOT).as_posix()
        for folder in ("saber_jax", "data_prep", "launch", "benchmarks", "configs")
        for path in (ROOT / folder).rglob("*.py")
        if any("._src" in name for name in imports(path))
    }
    assert users <= {"saber_jax/runs/private.py"}
