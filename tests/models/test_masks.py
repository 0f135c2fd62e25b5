"""Every mask is the one that its docstring draws."""

import inspect
import itertools

import jax.numpy as jnp
import numpy as np

from saber_jax.models import masks


def drawing(function, head: str) -> np.ndarray:
    """The x marks of a docstring's table: rows below the line that starts with `head`."""
    lines = inspect.getdoc(function).splitlines()
    start = next(i for i, line in enumerate(lines) if line.split()[:1] == [head])
    first = lines[start].index(head) + len(head)
    columns = [i for i, mark in enumerate(lines[start]) if i >= first and mark != " "]
    rows = []
    for line in itertools.takewhile(str.strip, lines[start + 1 :]):
        rows.append([line[column : column + 1] == "x" for column in columns])
    return np.array(rows)


def test_packed_text_is_the_drawing():
    segments = jnp.array([[1, 1, 1, 1, 1, 1, 2, 2, 0]])
    branch = jnp.array([[0, 0, 1, 1, 2, 2, 0, 1, 0]])
    want = drawing(masks.packed_text, "sees")
    assert want.shape == (9, 9) and want.sum() == 20
    np.testing.assert_array_equal(masks.packed_text(segments, branch).dense()[0], want)


def test_cached_text_is_the_drawing():
    first, counts = jnp.array([2, 0]), jnp.array([1, 1])
    got = masks.cached_text(first, counts, jnp.int32(0), prompt_slots=3, answer_slots=2).dense()
    np.testing.assert_array_equal(got[:, 0], [[0, 0, 1, 1, 0], [1, 1, 1, 1, 0]])


def test_slots_of_answers_are_a_ring_as_drawn():
    first, counts = jnp.array([2, 0, 1]), jnp.array([1, 2, 3])
    got = masks.cached_text(first, counts, jnp.int32(1), prompt_slots=3, answer_slots=4).dense()
    want = [[0, 0, 1, 0, 1, 0, 0], [1, 1, 1, 1, 1, 0, 0], [0, 1, 1, 1, 1, 0, 1]]
    np.testing.assert_array_equal(got[:, 0], want)


def test_audio_chunk_is_the_drawing():
    want = drawing(masks.audio_chunk, "sees")
    assert want.sum() == 9
    np.testing.assert_array_equal(masks.audio_chunk(jnp.array([3]), 4).dense()[0], want)


def test_same_segment_is_the_drawing():
    want = drawing(masks.same_segment, "segment")
    assert want.shape == (6, 6) and want.sum() == 13
    got = masks.same_segment(jnp.array([[1, 1, 2, 2, 2, 0]])).dense()[0]
    np.testing.assert_array_equal(got, want)


def test_nearby_segment_is_the_drawing():
    got = masks.nearby_segment(jnp.array([[1, 2, 2, 3]]), block=2)
    np.testing.assert_array_equal(got.key_segments, [[0, 0, 1, 2, 2, 3], [1, 2, 2, 3, 0, 0]])
    want = [
        [[0, 0, 1, 0, 0, 0], [0, 0, 0, 1, 1, 0]],
        [[0, 1, 1, 0, 0, 0], [0, 0, 0, 1, 0, 0]],
    ]
    np.testing.assert_array_equal(got.dense(), np.array(want, bool))
