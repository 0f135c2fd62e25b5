"""Files have one subject, and a size that can be read in one sitting."""

from pathlib import Path

ROOT = Path(__file__).parent.parent
FOLDERS = ("saber_jax", "data_prep", "configs", "launch", "benchmarks", "tests")


def test_no_file_of_code_is_longer_than_400_lines():
    lines = {
        path.relative_to(ROOT).as_posix(): len(path.read_text(encoding="utf-8").splitlines())
        for folder in FOLDERS
        for path in (ROOT / folder).rglob("*.py")
    }
    assert {name: count for name, count in lines.items() if count > 400} == {}
