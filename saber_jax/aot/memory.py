"""Memory of one device by kind, and the largest buffers."""

import dataclasses
import math

import jax
import jax.numpy as jnp

from saber_jax.aot import hlo, programs
from saber_jax.train.stage import Stage

_NO_BUFFER = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while")


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of one device. `peak` is the compiler's figure, or with activations on the host the
    more careful one, arguments and temporaries; the kinds are what is live at any time of the step,
    so they need not add up to it."""

    weights: int
    optimizer: int
    batch: int
    activations: int  # What layers keep for the backward pass.
    gradients: int  # Stacked over layers, as they leave the backward loop.
    temporaries: int  # All that is neither argument nor result, activations and gradients included.
    host: int
    peak: int


def per_device(tree, dtype: str | None = None) -> int:
    """Bytes that one device holds of abstract arrays with shardings, in `dtype` or their own."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * jnp.dtype(dtype or leaf.dtype).itemsize
        for leaf in jax.tree.leaves(tree)
    )


def measure(
    compiled: jax.stages.Compiled, module: hlo.Module, name: str, stage: Stage, **walk
) -> Memory:
    """`name` is the program's, `walk` as hlo.executions."""
    stats = compiled.memory_analysis()
    assert stats is not None  # libtpu always has one; the type allows for plug-ins that do not.
    generation = name in programs.GENERATION
    forward, backward = _stacked(module, **walk)
    host, most = stats.host_temp_size_in_bytes, stats.peak_memory_in_bytes
    return Memory(
        # Generation reads them rounded to what it computes in.
        weights=per_device(stage.state.params, stage.compute.dtype if generation else None),
        optimizer=per_device(stage.state.opt_state) if name == "train" else 0,
        batch=per_device(stage.batch),
        activations=forward,
        gradients=backward,
        temporaries=stats.temp_size_in_bytes,
        host=host,
        peak=stats.argument_size_in_bytes + stats.temp_size_in_bytes if host else most,
    )


def _stacked(module: hlo.Module, **walk) -> tuple[int, int]:
    """Bytes that loops of the entry computation fill an index at a time: (forward, backward)."""
    forward = backward = 0
    for run in hlo.executions(module, {}, **walk):
        loop = run.instruction
        if loop.op != "while" or run.loops:
            continue
        body = module.computations[loop.attribute(r"body=%([\w.\-]+)") or ""]
        root = next(i for i in body.values() if i.root)
        size = 0
        for index, (name, array) in enumerate(zip(root.operands, loop.arrays, strict=False)):
            source = body[name]
            passed_on = source.op == "get-tuple-element" and source.attribute(
                r"index=(\d+)"
            ) == str(index)
            if array.space == 0 and array.dims[:1] == (run.turns,) and not passed_on:
                size += array.bytes
        if "transpose(" in loop.scope:
            backward += size
        else:
            forward += size
    return forward, backward


def largest(module: hlo.Module, count: int, **walk) -> list[tuple[int, str, str]]:
    """(bytes, shape, scope) of the largest arrays that instructions make, each shape and scope
    once."""
    found: dict[tuple[str, str], int] = {}
    for run in hlo.executions(module, {}, **walk):
        instruction = run.instruction
        if instruction.op in _NO_BUFFER or instruction.op.endswith("-done"):
            continue
        for array in instruction.arrays:
            if array.space == 0:
                shape = f"{array.dtype}[{','.join(map(str, array.dims))}]"
                found[shape, instruction.scope] = array.bytes
    ordered = sorted(((size, *key) for key, size in found.items()), reverse=True)
    return ordered[:count]
