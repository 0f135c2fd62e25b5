"""The checks of arrays that tests run under are on, and see what they should."""

import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Float, TypeCheckError

from saber_jax.models import masks
from saber_jax.train import losses
from tests.annotations import arrays_of


def test_an_array_of_another_shape_than_annotated_is_refused():
    masks.packed_text(jnp.ones((2, 3), jnp.int32), np.ones((2, 3), np.int32))
    with pytest.raises(TypeCheckError):
        masks.packed_text(jnp.ones((2, 3), jnp.int32), jnp.ones((2, 4), jnp.int32))


def test_an_array_of_another_dtype_than_annotated_is_refused():
    with pytest.raises(TypeCheckError):
        losses.section_nll(jnp.ones((1, 2)), jnp.ones((1, 2)), jnp.ones((1, 2)), 6)


def test_arrays_are_found_inside_tuples_and_options_and_nothing_else_is_asked():
    array = Float[np.ndarray, "a b"]
    assert isinstance(np.ones((2, 3)), arrays_of(array))
    assert arrays_of(tuple[array, array]).__args__[0].dim_str == "a b"
    assert type(None) in arrays_of(array | None).__args__
    assert arrays_of(int | str) is arrays_of(list[int])
