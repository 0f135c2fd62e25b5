"""The cost of one step on one device, from the compiled module: FLOPs, bytes and collectives."""

import collections
import dataclasses
import math
import re
from collections.abc import Iterator, Mapping

import numpy as np

from saber_jax.aot import hlo, kernels

TOWERS = ("vision", "audio", "text", "head", "embed", "merge", "optimizer")
COLLECTIVES = (
    *("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute"),
    *("ragged-all-to-all", "send"),
)
_FREE = (
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional"),
    *("after-all", "partition-id", "opt-barrier"),
)
_SLICES = ("slice", "dynamic-slice")
_PREFETCHES = ("copy-start", "slice-start")  # From HBM to on-chip memory before it is needed.


@dataclasses.dataclass(frozen=True, order=True)
class CollectiveKind:
    """The key by which collectives are summed. `hidden` ones overlap with computation."""

    op: str
    axes: tuple[str, ...]
    hidden: bool
    in_layers: bool


@dataclasses.dataclass
class Traffic:
    """`payload` is the whole array; `wire` is what one device sends on a ring."""

    count: float = 0.0
    payload: float = 0.0
    wire: float = 0.0


@dataclasses.dataclass
class Cost:
    """Of one step on one device. FLOPs by tower; `recomputed` is the part of them that only
    rematerialisation asks for; kernels are counted by the blocks that they visit."""

    matmul: dict[str, float]
    kernel: dict[str, float]
    recomputed: float
    hbm_bytes: float
    collectives: dict[CollectiveKind, Traffic]

    @property
    def flops(self) -> float:
        return sum(self.matmul.values()) + sum(self.kernel.values())


def analyze(
    module: hlo.Module,
    mesh_shape: Mapping[str, int],
    shares: Mapping[str, float],
    *,
    uncounted: float | None = None,
) -> Cost:
    """`mesh_shape` names the axes that partitions are laid out over; the rest as hlo.executions."""
    cost = Cost(
        matmul=collections.defaultdict(float),
        kernel=collections.defaultdict(float),
        recomputed=0.0,
        hbm_bytes=0.0,
        collectives=collections.defaultdict(Traffic),
    )
    seen: set[tuple[int, str]] = set()
    layers = _layer_loops(module)
    for run in hlo.executions(module, shares, uncounted=uncounted):
        matmul, kernel = _matmul_flops(module, run), kernels.flops(run)
        where = tower(run.instruction.scope)
        cost.matmul[where] += matmul * run.times
        cost.kernel[where] += kernel * run.times
        if "rematted_computation" in run.instruction.scope:
            cost.recomputed += (matmul + kernel) * run.times
        cost.hbm_bytes += _hbm_bytes(module, run) * run.times
        in_layers = not layers.isdisjoint(run.loops)
        for kind, traffic in _collectives(module, run, mesh_shape, in_layers, seen):
            total = cost.collectives[kind]
            total.count += run.times
            total.payload += traffic.payload * run.times
            total.wire += traffic.wire * run.times
    for towers in (cost.matmul, cost.kernel):
        for name in [name for name, value in towers.items() if not value]:
            del towers[name]
    return cost


def tower(scope: str) -> str:
    """The first named scope of the network in an instruction's scope, or "other"."""
    for part in re.split(r"[/()]", scope):
        if part in TOWERS:
            return part
    return "other"


def _matmul_flops(module: hlo.Module, run: hlo.Execution) -> float:
    return _products(module, run.instruction, run.computation)


def _products(module: hlo.Module, instruction: hlo.Instruction, scope: hlo.Computation) -> float:
    if instruction.op == "dot" or "__cublas" in instruction.attributes:
        lhs = scope[instruction.operands[0]].arrays[0].dims
        # A dot's dims={1}, or in the settings of a call of cuBLAS "dimensions":["1"].
        contracted = instruction.required(r'lhs_contracting_dim\w+"?[=:][{\[]([^}\]]*)')
        inner = math.prod(lhs[int(d)] for d in re.findall(r"\d+", contracted))
        return 2.0 * math.prod(instruction.arrays[0].dims) * inner
    if instruction.op == "convolution":
        return convolution_flops(instruction, scope)
    if instruction.op == "fusion":
        inner = module.computations[instruction.called[0]]
        return sum(_products(module, part, inner) for part in inner.values())
    return 0.0


def convolution_flops(instruction: hlo.Instruction, scope: hlo.Computation) -> float:
    """Multiply-adds with elements that exist, twice; TPUs write matrix products as convolutions."""
    lhs, rhs = (scope[name].arrays[0].dims for name in instruction.operands[:2])
    out = instruction.arrays[0].dims
    lhs_labels, rhs_labels, out_labels = re.split(
        "_|->", instruction.required(r"dim_labels=(\w+_\w+->\w+)")
    )
    window = dict(
        part.split("=") for part in (instruction.attribute(r"window=\{([^}]*)\}") or "").split()
    )
    spatial = sorted(label for label in rhs_labels if label.isdigit())

    def per_dimension(key: str, default: str) -> list[str]:
        return window[key].split("x") if key in window else [default] * len(spatial)

    total = 1
    for label, size, stride, pad, lhs_dilate, rhs_dilate in zip(
        spatial,
        *(per_dimension(key, "1") for key in ("size", "stride")),
        per_dimension("pad", "0_0"),
        *(per_dimension(key, "1") for key in ("lhs_dilate", "rhs_dilate")),
        strict=True,
    ):
        taps, places = np.arange(int(size)), np.arange(out[out_labels.index(label)])
        at = places[:, None] * int(stride) + taps[None] * int(rhs_dilate) - int(pad.split("_")[0])
        extent = lhs[lhs_labels.index(label)] * int(lhs_dilate)
        total *= int(((at >= 0) & (at < extent) & (at % int(lhs_dilate) == 0)).sum())
    groups = int(instruction.attribute(r"batch_group_count=(\d+)") or 1)
    inputs = rhs[rhs_labels.index("i")]  # Already divided by feature groups.
    batch = lhs[lhs_labels.index("b")] // groups
    return 2.0 * total * inputs * out[out_labels.index("f")] * batch


def _hbm_bytes(module: hlo.Module, run: hlo.Execution) -> float:
    """Bytes read and written in HBM: what stays on the chip, and all but a slice of what is sliced,
    left out."""
    instruction, scope = run.instruction, run.computation
    if instruction.op in _PREFETCHES:
        # Source and destination, of which one may be on the chip; of a slice the source is larger.
        ends = instruction.arrays[:2]
        moved = min(array.bytes for array in ends)
        return float(sum(moved for array in ends if array.space == 0))
    if instruction.op in _FREE or instruction.op.endswith(("-done", "-start", "-update")):
        return 0.0
    if "AllocateBuffer" in instruction.attributes:
        return 0.0
    operands = [scope[name] for name in instruction.operands if name in scope]
    if instruction.op == "fusion":
        inner = module.computations[instruction.called[0]]
        if "AsyncCollectiveStart" not in _root(inner).attributes:
            read = sum(
                min(_read(module, inner, _parameter(inner, index)), _hbm(operand))
                for index, operand in enumerate(operands)
            )
            return read + _written(module, inner, instruction.arrays)
    if instruction.op == "dynamic-update-slice":
        return 2.0 * _hbm(operands[1])
    if instruction.op in _SLICES:
        return 2.0 * _hbm(instruction)
    return sum(map(_hbm, operands)) + _hbm(instruction)


def _read(module: hlo.Module, inner: hlo.Computation, name: str | None) -> float:
    """Bytes that a fusion reads of what is called `name` inside of it; infinite for all of it.

    Buffers of a collective that it carries along are not its own to read.
    """
    total = 0.0
    for user in inner.values():
        if user.op == "parameter" or name not in user.operands:
            continue
        first = user.operands[0] == name
        if user.op == "fusion":
            called = module.computations[user.called[0]]
            parts = [i for i, operand in enumerate(user.operands) if operand == name]
            total += sum(_read(module, called, _parameter(called, i)) for i in parts)
        elif user.op in _SLICES and first:
            total += sum(array.bytes for array in user.arrays)
        elif user.op in ("bitcast", "reshape"):
            total += _read(module, inner, user.name)
        elif not (_carried(user) or user.op == "tuple" or (_updates(user) and first)):
            return math.inf
    return total


def _written(module: hlo.Module, inner: hlo.Computation, made: list[hlo.Array]) -> float:
    """Bytes that a fusion writes of the arrays it makes: of one that it updates, the update."""
    root, total = _root(inner), 0.0
    for name, array in zip(
        root.operands if root.op == "tuple" else (root.name,), made, strict=False
    ):
        result = inner[name]
        while result.op in ("bitcast", "reshape"):
            result = inner[result.operands[0]]
        if array.space or result.op == "parameter" or _carried(result):
            continue
        if result.op == "fusion":
            total += _written(module, module.computations[result.called[0]], [array])
        elif _updates(result):
            total += sum(part.bytes for part in inner[result.operands[1]].arrays)
        else:
            total += array.bytes
    return total


def _carried(part: hlo.Instruction) -> bool:
    """Whether it is a piece of a collective that began in an earlier fusion."""
    return part.op in COLLECTIVES or "AsyncCollective" in part.attributes


def _updates(part: hlo.Instruction) -> bool:
    return part.op == "dynamic-update-slice"


def _root(computation: hlo.Computation) -> hlo.Instruction:
    return next(part for part in computation.values() if part.root)


def _parameter(inner: hlo.Computation, index: int) -> str | None:
    """Name of a fusion's operand inside of it."""
    named = (i.name for i in inner.values() if i.op == "parameter" and i.operands[0] == str(index))
    return next(named, None)


def _hbm(instruction: hlo.Instruction) -> float:
    return float(sum(array.bytes for array in instruction.arrays if array.space == 0))


def _layer_loops(module: hlo.Module) -> set[str]:
    """Bodies of the loops over layers, by where most of their instructions say that they come from.
    Collectives themselves may have forgotten: those of several slices, and those made of others."""
    found = set()
    for name, computation in module.computations.items():
        scopes = [part.scope for part in computation.values() if part.scope]
        if 2 * sum("blocks/while/body" in scope for scope in scopes) > len(scopes):
            found.add(name)
    return found


def _collectives(
    module: hlo.Module,
    run: hlo.Execution,
    mesh_shape: Mapping[str, int],
    in_layers: bool,
    seen: set,
) -> Iterator[tuple[CollectiveKind, Traffic]]:
    """Of one instruction; the pieces that a collective is fused in count once, by their channel."""
    instruction = run.instruction
    if instruction.op in ("fusion", "call-start"):  # The latter runs on a SparseCore.
        inner = module.computations[instruction.called[0]]
        parts = [(i, inner) for i in inner.values()]
        hidden = instruction.op == "call-start" or _beside_others(inner)
    else:
        parts, hidden = [(instruction, run.computation)], instruction.op.endswith("-start")
    for part, scope in parts:
        op = part.op.removesuffix("-start")
        if op not in COLLECTIVES:
            continue
        if instruction.op == "fusion":
            piece = (id(run.computation), part.attribute(r"channel_id=(\d+)"), part.arrays[0].dims)
            if piece in seen:
                continue
            seen.add(piece)
        groups = _groups(part, module.partitions)
        size = groups.shape[1]
        sent = sum(a.bytes for n in part.operands if n in scope for a in scope[n].arrays)
        if op == "all-reduce" and instruction.op == "fusion":
            op = "reduce-scatter"  # Which the compiler writes as an all-reduce fused with a slice.
        payload = sent * size if op == "all-gather" else sent
        share = {"all-reduce": 2.0}.get(op, 1.0) * (size - 1) / size if size > 1 else 0.0
        wire = payload if op in ("collective-permute", "send") else payload * share
        axes = _axes(groups, mesh_shape)
        yield CollectiveKind(op, axes, hidden, in_layers), Traffic(1.0, payload, wire)


def _beside_others(fused: hlo.Computation) -> bool:
    """Whether a fusion with a collective computes something else, or is a piece of one that does.
    All others, such as a reduce-scatter with its slice, wait until the collective is done."""
    return any(
        part.op in ("fusion", "convolution", "dot") or "AsyncCollective" in part.attributes
        for part in fused.values()
    )


def _groups(instruction: hlo.Instruction, partitions: int) -> np.ndarray:
    """[groups, members] of partition numbers, in any of the three ways that HLO writes them."""
    text = instruction.attributes
    if pairs := re.search(r"source_target_pairs=\{(\{[\d,{}]*\})\}", text):
        return np.array(
            [[int(n) for n in pair.split(",")] for pair in re.findall(r"\{([\d,]+)\}", pairs[1])]
        )
    if listed := re.search(r"replica_groups=\{(\{[\d,{}]*\})\}", text):
        return np.array(
            [[int(n) for n in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", listed[1])]
        )
    if iota := re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        ids = np.arange(partitions).reshape([int(n) for n in iota[3].split(",")])
        if iota[4]:
            ids = ids.transpose([int(n) for n in iota[4].split(",")])
        return ids.reshape(int(iota[1]), int(iota[2]))
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}", text):
        return _mesh_groups(mesh[1], mesh[2])
    return np.arange(partitions).reshape(1, -1)


def _mesh_groups(sizes: str, members: str) -> np.ndarray:
    """ "'a'=16,'b'=16" and "'b'" or "'a':(4)2": the part of an axis that 4 stands before."""
    names = dict((name, int(size)) for name, size in re.findall(r"'([\w.]+)'=(\d+)", sizes))
    factors, chosen = [], []
    parts = {
        name: (int(before), int(size)) if size else (1, names[name])
        for name, before, size in re.findall(r"'([\w.]+)'(?::\((\d+)\)(\d+))?", members)
    }
    for name, size in names.items():
        before, part = parts.get(name, (size, 1))
        factors += [before, part, size // before // part]
        if name in parts:
            chosen.append(len(factors) - 2)
    ids = np.arange(math.prod(names.values())).reshape(factors)
    ids = np.moveaxis(ids, chosen, range(ids.ndim - len(chosen), ids.ndim))
    return ids.reshape(-1, math.prod(factors[axis] for axis in chosen))


def _axes(groups: np.ndarray, mesh_shape: Mapping[str, int]) -> tuple[str, ...]:
    """The mesh axes along which the members of a group differ."""
    places = np.array(np.unravel_index(groups[0], tuple(mesh_shape.values())))
    return tuple(
        axis for axis, place in zip(mesh_shape, places, strict=True) if len(set(place.tolist())) > 1
    )
