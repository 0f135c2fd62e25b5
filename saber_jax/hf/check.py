"""Checks whether an exported directory is undamaged.

    python -m saber_jax.hf.check DIR

Exits with 0 if every file and every tensor has the digest that the export wrote to
DIR/digests.json, and otherwise with 1 and a line for each that differs. `python -m
saber_jax.hf.load` makes the same check while it reads.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from saber_jax.hf import digests, tensors


def problems(directory: Path) -> tuple[int, list[str]]:
    """(number of tensors, all problems)."""
    if not directory.is_dir():
        return 0, ["there is no such directory"]
    if not (directory / digests.FILE).is_file():
        return 0, [f"it has no {digests.FILE}: only `python -m saber_jax.hf.export` writes one"]
    adapters = (
        not (directory / tensors.INDEX).exists() and not (directory / tensors.SINGLE).exists()
    )
    found, wrong = tensors.find(directory, tensors.ADAPTERS if adapters else tensors.SINGLE)
    ordered = sorted(found.items(), key=lambda item: (item[1].path, item[1].offset))
    for name, tensor in tqdm(ordered, desc="reading", unit="tensor", disable=len(ordered) < 100):
        try:
            tensor.read_bytes()
        except (ValueError, OSError) as error:
            wrong.append(f"{name}: {error}")
    bare = [name for name, tensor in ordered if tensor.digest is None]
    if bare and not wrong:
        wrong.append(f"{digests.FILE} has no digest of {len(bare)} tensors, such as {bare[0]}")
    return len(found), wrong


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("directory", type=Path)
    directory = parser.parse_args(argv).directory
    count, wrong = problems(directory)
    if wrong:
        listing = "\n  ".join(wrong)
        how_many = f"{len(wrong)} problem{'s' if len(wrong) > 1 else ''}"
        print(
            f"{directory} is damaged or no export, {how_many}:\n  {listing}\n"
            "Export it again, or copy it again from where it came from.",
            file=sys.stderr,
        )
        return 1
    print(f"{directory}: all {count} tensors are what was exported.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
