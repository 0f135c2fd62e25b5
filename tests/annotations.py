"""How tests check the arrays that functions are annotated with: their shapes and dtypes.

beartype checks them, under jaxtyping's import hook (conftest.py). It is shown arrays alone, and not
asked for their class: most functions take jax's, NumPy's and bare shapes alike. Everything else in
a signature is left to pyright, which checks it without running anything.
"""

import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jaxtyping
from beartype import beartype

CONTAINERS = (tuple, list, dict, Sequence, Mapping)


def check_arrays(function: Callable) -> Callable:
    """`function`, made to raise for arrays of another shape or dtype than it is annotated with."""
    hints = {name: arrays_of(hint) for name, hint in function.__annotations__.items()}
    if all(hint is Any for hint in hints.values()):
        return function
    function.__annotations__ = {name: hint for name, hint in hints.items() if hint is not Any}
    return beartype(function)


def arrays_of(hint: Any) -> Any:
    """The array annotations of `hint`, also those inside other types; Any if it has none."""
    if isinstance(hint, type) and issubclass(hint, jaxtyping.AbstractArray):
        return hint.dtype[Any, hint.dim_str]
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    inner = tuple(p if p in (None, type(None), ...) else arrays_of(p) for p in parts)
    if origin in (typing.Union, types.UnionType):
        return Any if Any in inner else typing.Union[inner]  # noqa: UP007
    if origin in CONTAINERS and any(p not in (Any, None, ...) for p in inner):
        return origin[inner]
    return Any
