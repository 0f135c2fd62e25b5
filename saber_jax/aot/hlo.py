"""Parses the text of an optimized XLA module and counts how often each instruction runs.

The compiler's own cost analysis counts the body of a loop once and a Pallas kernel not at all, so
scanned layers would count as one.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Iterator, Mapping

BYTES = {
    **dict.fromkeys(("pred", "s8", "u8", "f8e4m3fn", "f8e5m2", "s4", "u4"), 1),
    **dict.fromkeys(("bf16", "f16", "s16", "u16"), 2),
    **dict.fromkeys(("f32", "s32", "u32"), 4),
    **dict.fromkeys(("f64", "s64", "u64", "c64"), 8),
}
_ARRAY = re.compile(rf"\b({'|'.join(BYTES)})\[([\d,]*)\](\{{[^}}]*\}})?")
_NAME = re.compile(r"%([\w.\-]+)")
_HEADER = re.compile(r"(ENTRY )?%([\w.\-]+) \(.*\{\s*$")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%([\w.\-]+) = (.*)$")
_TRANSPARENT = ("copy", "bitcast", "convert", "copy-start", "copy-done")


@dataclasses.dataclass(frozen=True, slots=True)
class Array:
    """One array of a shape; `space` 0 is HBM, others are on the chip or on the host."""

    dtype: str
    dims: tuple[int, ...]
    space: int

    @property
    def bytes(self) -> int:
        return BYTES[self.dtype] * math.prod(self.dims)


@dataclasses.dataclass(frozen=True, slots=True)
class Instruction:
    """`%name = shape op(operands), attributes`; of a constant `operands` is its value."""

    name: str
    shape: str
    op: str
    operands: tuple[str, ...]
    attributes: str
    root: bool

    @property
    def scope(self) -> str:
        """Where in the program it comes from: "jit(step)/jvp()/text/blocks/while/body/..."."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found[1] if found else ""

    def attribute(self, pattern: str) -> str | None:
        found = re.search(pattern, self.attributes)
        return found[1] if found else None

    def required(self, pattern: str) -> str:
        """Raises ValueError where there is no such attribute."""
        found = self.attribute(pattern)
        if found is None:
            raise ValueError(f"{self.op} {self.name} has no {pattern!r} in {self.attributes!r}.")
        return found

    @property
    def arrays(self) -> list[Array]:
        return arrays(self.shape)

    @property
    def called(self) -> list[str]:
        """Computations that it runs once: a fusion's, a branch's, an async operation's."""
        found = re.findall(r"(?:calls|to_apply)=%([\w.\-]+)", self.attributes)
        for group in re.findall(
            r"(?:branch_computations|called_computations)=\{([^}]*)\}", self.attributes
        ):
            found += _NAME.findall(group)
        return found + re.findall(r"(?:true|false)_computation=%([\w.\-]+)", self.attributes)


Computation = dict[str, Instruction]
Constants = Callable[[int], int | None]


@dataclasses.dataclass(frozen=True)
class Module:
    computations: dict[str, Computation]
    entry: str
    partitions: int


def arrays(shape: str) -> list[Array]:
    """The arrays of a shape, whether it is one array or a tuple."""
    return [
        Array(dtype, tuple(map(int, filter(None, dims.split(",")))), _space(layout))
        for dtype, dims, layout in _ARRAY.findall(shape)
    ]


def _space(layout: str) -> int:
    found = re.search(r"S\((\d+)\)", layout)
    return int(found[1]) if found else 0


def parse(text: str) -> Module:
    """Raises ValueError for text without an entry computation."""
    computations: dict[str, Computation] = {}
    entry, current = None, None
    for line in _logical_lines(text):
        if header := _HEADER.match(line):
            current = computations[header[2]] = {}
            entry = header[2] if header[1] else entry
        elif line.startswith("}"):
            current = None
        elif current is not None and (found := _INSTRUCTION.match(line)):
            instruction = _instruction(found[2], found[3], bool(found[1]))
            if instruction is not None:
                current[instruction.name] = instruction
    if entry is None:
        raise ValueError("This is no optimized HLO module: it has no ENTRY computation.")
    partitions = re.search(r"num_partitions=(\d+)", text)
    return Module(computations, entry, int(partitions[1]) if partitions else 1)


def _logical_lines(text: str) -> Iterator[str]:
    """Lines, with the attributes that a kernel spreads over several lines joined."""
    pending = ""
    for line in text.split("\n"):
        begins = line.startswith(("  %", "  ROOT", "%", "ENTRY")) or line == "}"
        if begins or not pending:
            if pending:
                yield pending
            pending = line
        else:
            pending += " " + line.strip()
    yield pending


def _instruction(name: str, rest: str, root: bool) -> Instruction | None:
    end = _closing(rest, 0) if rest[0] == "(" else rest.index(" ") - 1
    shape, rest = rest[: end + 1], rest[end + 2 :]
    head = re.match(r"([\w\-]+)\(", rest)
    if head is None:
        return None
    close = _closing(rest, head.end() - 1)
    inside = rest[head.end() : close]
    literal = head[1] in ("constant", "parameter")
    operands = (inside,) if literal else tuple(_NAME.findall(inside))
    return Instruction(name, shape, head[1], operands, rest[close + 1 :], root)


def _closing(text: str, start: int) -> int:
    """Index of the parenthesis that closes the one at `start`."""
    depth = 0
    for found in re.compile(r"[()]").finditer(text, start):
        depth += 1 if found[0] == "(" else -1
        if depth == 0:
            return found.start()
    raise ValueError(f"Unbalanced parentheses in {text[:80]!r}.")


@dataclasses.dataclass(frozen=True, slots=True)
class Execution:
    """An instruction outside of fusions, with how often one step runs it."""

    instruction: Instruction
    computation: Computation
    times: float
    loops: tuple[str, ...]  # Names of the loop bodies around it, the outermost first.
    turns: float = 1.0  # Of a loop.


def executions(
    module: Module, shares: Mapping[str, float], *, uncounted: float | None = None
) -> Iterator[Execution]:
    """Every instruction that runs, in schedule order; those inside a fusion are its own business.

    `shares` says how often a branch of a conditional is taken: the share of the first key that
    occurs in a scope inside the branch, or 1 for all branches of which nothing is said. A loop that
    is not counted up to a constant runs `uncounted` times; without that it raises ValueError.
    """
    walk = _Walk(module, shares, uncounted)
    yield from walk.computation(module.entry, 1.0, (), lambda index: None)


@dataclasses.dataclass(frozen=True)
class _Walk:
    module: Module
    shares: Mapping[str, float]
    uncounted: float | None

    def computation(
        self, name: str, times: float, loops: tuple[str, ...], argument: Constants
    ) -> Iterator[Execution]:
        """`argument(i)` is element i of what the computation is given, if that is a constant."""
        computation = self.module.computations[name]
        for instruction in computation.values():
            if instruction.op == "while":
                initial = _elements(computation, instruction.operands[0], argument)
                body = instruction.attribute(r"body=%([\w.\-]+)") or ""
                count = trip_count(self.module, instruction, initial)
                if count is None:
                    count = self._assumed(instruction)
                yield Execution(instruction, computation, times, loops, count)
                yield from self.computation(body, times * count, (*loops, body), initial)
            elif instruction.op == "conditional":
                for branch in instruction.called:
                    share = self._share(branch)
                    yield from self.computation(branch, times * share, loops, lambda index: None)
            elif instruction.op in ("call", "async-start"):
                for called in instruction.called:
                    yield from self.computation(called, times, loops, lambda index: None)
            else:
                yield Execution(instruction, computation, times, loops)

    def _assumed(self, loop: Instruction) -> float:
        if self.uncounted is None:
            raise ValueError(f"Cannot tell how often the loop {loop.name} ({loop.scope}) runs.")
        return self.uncounted

    def _share(self, branch: str) -> float:
        for instruction in self.module.computations[branch].values():
            for scope, share in self.shares.items():
                if scope in instruction.scope:
                    return share
        return 1.0


def _elements(computation: Computation, name: str, argument: Constants) -> Constants:
    """Of the tuple `name`: which constant each element is, if it is one."""
    made = computation[name]

    def element(index: int) -> int | None:
        if made.op != "tuple":
            return None
        return _constant(computation, made.operands[index], argument)

    return element


def trip_count(module: Module, loop: Instruction, initial: Constants) -> int | None:
    """How often a loop runs that is counted up to a constant, None for others."""
    known = loop.attribute(r'known_trip_count"?:\{"?n"?:"(\d+)"')
    if known:
        return int(known)
    condition = module.computations[loop.required(r"condition=%([\w.\-]+)")]
    for compare, scope, name_of in _comparisons(module, condition):
        counts = all(scope[name].arrays[0].dtype in ("s32", "u32") for name in compare.operands)
        if not counts or compare.attribute(r"direction=(\w+)") != "LT":
            continue
        low, high = (
            _constant(condition, name_of(operand), initial)
            if name_of(operand) in condition
            else _constant(scope, operand, None)
            for operand in compare.operands
        )
        if low is not None and high is not None:
            return max(0, -(-(high - low) // _step(module, loop, condition, compare)))
    return None


def _comparisons(module: Module, condition: Computation):
    """A loop's comparisons, bare or fused: (compare, where it is, operand -> name outside)."""
    for instruction in condition.values():
        if instruction.op == "compare":
            yield instruction, condition, lambda name: name
        elif instruction.op == "fusion":
            inner = module.computations[instruction.called[0]]

            def outside(name, inner=inner, fusion=instruction):
                parameter = inner[name]
                is_parameter = parameter.op == "parameter"
                return fusion.operands[int(parameter.operands[0])] if is_parameter else name

            for compare in inner.values():
                if compare.op == "compare":
                    yield compare, inner, outside


def _step(module: Module, loop: Instruction, condition: Computation, compare: Instruction) -> int:
    """What a loop adds to its counter in one turn; 1 unless the compiler unrolled it."""
    counter = condition.get(compare.operands[0])
    body = module.computations[loop.required(r"body=%([\w.\-]+)")]
    root = next(i for i in body.values() if i.root)
    if counter is None or counter.op != "get-tuple-element" or root.op != "tuple":
        return 1
    index = int(counter.required(r"index=(\d+)"))
    return _offset(body, root.operands[index], index) or 1


def _offset(body: Computation, name: str, index: int) -> int | None:
    """c, where `name` is tuple element `index` plus the constant c."""
    instruction = body.get(name)
    if instruction is None:
        return None
    if instruction.op == "get-tuple-element":
        return 0 if instruction.attribute(r"index=(\d+)") == str(index) else None
    if instruction.op in _TRANSPARENT:
        return _offset(body, instruction.operands[0], index)
    if instruction.op == "add":
        for a, b in (instruction.operands, instruction.operands[::-1]):
            constant, rest = _constant(body, b, None), _offset(body, a, index)
            if constant is not None and rest is not None:
                return constant + rest
    return None


def _constant(computation: Computation, name: str, initial: Constants | None) -> int | None:
    instruction = computation.get(name)
    if instruction is None:
        return None
    if instruction.op == "constant":
        return (
            int(instruction.operands[0]) if instruction.operands[0].lstrip("-").isdigit() else None
        )
    if instruction.op in _TRANSPARENT:
        return _constant(computation, instruction.operands[0], initial)
    if instruction.op == "get-tuple-element":
        source, index = (
            computation.get(instruction.operands[0]),
            int(instruction.required(r"index=(\d+)")),
        )
        if source is not None and source.op == "tuple":
            return _constant(computation, source.operands[index], initial)
        if source is not None and source.op == "parameter" and initial is not None:
            return initial(index)
    return None
