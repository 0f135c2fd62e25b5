"""Conversion between nested and flat dicts: parameters by path, settings by dotted name."""

from collections.abc import Mapping
from typing import Any


def flatten(tree: Mapping[str, Any], separator: str = "/") -> dict[str, Any]:
    """{"text": {"norm": x}} -> {"text/norm": x}, whatever the leaves are: arrays, shapes, numbers.

    An empty dict leaves nothing behind.
    """
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            inner = flatten(value, separator)
            flat |= {f"{name}{separator}{path}": leaf for path, leaf in inner.items()}
        else:
            flat[name] = value
    return flat


def merge(*parts: Mapping[str, Any]) -> dict[str, Any]:
    """Inverse of `flatten` with "/", over the union of `parts`."""
    tree: dict[str, Any] = {}
    for path, leaf in (item for part in parts for item in part.items()):
        *parents, last = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return tree
