"""Digests of arrays, which are saved with a checkpoint to detect damaged arrays.

The digest of an array is a sum modulo 2 ** 32 over its elements:

    digest(x) = sum_i mix(bits(x[i]) + i * SPREAD)        i counts elements in C order

`mix` is one-to-one, so a change of one element is always detected; other changes are missed with
probability 2 ** -32. The sum does not depend on the order of its terms, so devices can sum the
parts that they hold on any mesh, and a reader that streams layers can add them up.

It is computed in three ways: by NumPy from any array in memory, by XLA on the devices that hold an
array, and, where those are CPUs, by a loop that XLA compiles, several times as fast as NumPy.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, UInt, UInt32

SPREAD = 0x9E3779B1
"""Odd, and otherwise arbitrary: the first prime of xxHash32."""
MULTIPLIERS = (0x85EBCA6B, 0xC2B2AE35)
"""The multipliers of MurmurHash3's fmix32, https://github.com/aappleby/smhasher."""
BLOCK = 1 << 16
"""Elements that NumPy mixes at a time: few enough to stay in a core's second cache, and enough for
threads not to wait for each other to start the next pass."""
CHUNK = 1 << 21
"""Elements that a call of the compiled loop sums. It is compiled once for each size of element."""
LANES = 1 << 11
"""Sums that the loop holds, one for every LANES-th element. They, their places and what it reads at
a time fit in a core's first cache; with fewer it begins anew too often."""
UNROLLED = 8
"""Rows of LANES elements that a pass of the loop adds, so that it reads and writes its sums once
for all of them: a seventh less time than one row a pass on an idle core, and half of it on one
whose neighbours are busy. 16 are no faster."""


def of_arrays(arrays: Mapping[str, Array | np.ndarray]) -> dict[str, int]:
    """Digests by name, computed on the arrays' devices. Every process must call it."""
    here = {name: leaf for name, leaf in arrays.items() if _in_memory(leaf)}
    away = {name: _on_device(leaf) for name, leaf in arrays.items() if name not in here}
    sums = dict.fromkeys(here, 0)
    with ThreadPoolExecutor() as pool:
        parts = [
            (name, pool.submit(part))
            for name, leaf in here.items()
            for part in _parts(np.asarray(leaf))
        ]
        for name, part in parts:
            sums[name] = (sums[name] + part.result()) % 2**32
    return sums | {name: int(value) for name, value in jax.device_get(away).items()}


def _in_memory(leaf: Array | np.ndarray) -> bool:
    """Whether NumPy can read the array directly."""
    if isinstance(leaf, np.ndarray):
        return True
    local = leaf.is_fully_addressable
    return local and all(device.platform == "cpu" for device in leaf.devices())


def _parts(array: np.ndarray) -> Iterator[Callable[[], int]]:
    """Functions that return parts of an array's digest."""
    whole = 0
    if array.flags.c_contiguous and jax.default_backend() == "cpu":
        array = array.reshape(-1)
        whole = array.size - array.size % CHUNK
    for first in range(0, whole, CHUNK):
        chunk = _bits(array[first : first + CHUNK]), np.uint32(_spread(first))
        yield lambda chunk=chunk: int(_of_chunk(*jax.device_put(chunk)))
    if whole < array.size:
        yield lambda: of_numpy(array[whole:] if whole else array, first=whole)


@jax.jit
def _of_chunk(bits: UInt[Array, "CHUNK"], place: UInt32[Array, ""]) -> UInt32[Array, ""]:
    """The part of consecutive elements; `place` is that of the first one.

    Where a CPU has to add up what it computes, XLA does so one element after the other. So the loop
    adds whole rows of LANES elements, for which it has vector instructions.
    """
    rows = bits.reshape(-1, LANES)
    places = place + jax.lax.iota(jnp.uint32, LANES) * np.uint32(SPREAD)

    def add(index: Array, sums: UInt32[Array, "LANES"]) -> UInt32[Array, "LANES"]:
        row = jax.lax.dynamic_index_in_dim(rows, index, keepdims=False).astype(jnp.uint32)
        return sums + _mixed(row + places + index.astype(jnp.uint32) * np.uint32(_spread(LANES)))

    start = jnp.zeros(LANES, jnp.uint32)
    sums = jax.lax.fori_loop(0, len(rows), add, start, unroll=UNROLLED)
    return jnp.sum(sums, dtype=jnp.uint32)


def of_numpy(array: np.ndarray, *, first: int = 0, strides: tuple[int, ...] | None = None) -> int:
    """The digest of an array in memory, or the part of it that a slice contributes. The first
    element of the slice has index `first`, and `strides` are the index steps along its axes."""
    if strides is None and array.flags.c_contiguous:
        array, strides = array.reshape(-1), (1,)
    strides = strides or c_strides(array.shape)
    if not array.ndim:
        array, strides = array.reshape(1), (1,)
    if not array.size:
        return 0
    row = array[0].size
    if row > BLOCK:
        rows = enumerate(array)
        parts = (of_numpy(x, first=first + i * strides[0], strides=strides[1:]) for i, x in rows)
        return sum(parts) % 2**32
    count, total = min(BLOCK // row, len(array)), 0
    places = np.zeros((1,) * array.ndim, np.uint32)
    for axis, (n, stride) in enumerate(zip((count, *array.shape[1:]), strides, strict=True)):
        along = np.arange(n, dtype=np.uint32) * np.uint32(_spread(stride))
        places = places + along.reshape((n,) + (1,) * (array.ndim - 1 - axis))
    unsigned = _bits(array)
    # Every pass over a block writes into one of these two: memory of their own would cost more.
    mixed, shifted = np.empty_like(places), np.empty_like(places)
    for start in range(0, len(array), count):
        bits = unsigned[start : start + count]
        x, y = mixed[: len(bits)], shifted[: len(bits)]
        np.add(bits, places[: len(bits)], out=x)
        with np.errstate(over="ignore"):
            x += np.uint32(_spread(first + start * strides[0]))
        x ^= np.right_shift(x, 16, out=y)
        x *= np.uint32(MULTIPLIERS[0])
        x ^= np.right_shift(x, 13, out=y)
        x *= np.uint32(MULTIPLIERS[1])
        x ^= np.right_shift(x, 16, out=y)
        total += int(x.sum(dtype=np.uint32))
    return total % 2**32


def c_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


@jax.jit
def _on_device(x: Array) -> UInt32[Array, ""]:
    unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
    bits = x if x.dtype == jnp.bool_ else jax.lax.bitcast_convert_type(x, unsigned)
    places = bits.astype(jnp.uint32)
    for axis, stride in enumerate(c_strides(x.shape)):
        place = jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
        places += place * np.uint32(_spread(stride))
    return jnp.sum(_mixed(places), dtype=jnp.uint32)


def _mixed(x: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    """MurmurHash3's fmix32."""
    for shift, multiplier in zip((16, 13), MULTIPLIERS, strict=True):
        x = (x ^ (x >> shift)) * np.uint32(multiplier)
    return x ^ (x >> 16)


def _spread(element: int) -> int:
    """The place of an element of this index, which is added to its bits."""
    return element * SPREAD % 2**32


def _bits(array: np.ndarray) -> np.ndarray:
    return array.view(np.dtype(f"u{array.dtype.itemsize}"))
