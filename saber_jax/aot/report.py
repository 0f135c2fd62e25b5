"""Figures of a compiled program, and the text report."""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import AbstractMesh
from ml_collections import ConfigDict

from saber_jax import sharding
from saber_jax.aot import cost, hlo, memory, programs
from saber_jax.aot.chips import GIB
from saber_jax.aot.targets import Target
from saber_jax.models import saber
from saber_jax.models.remat import BY_MEMORY
from saber_jax.train.stage import Stage

HEADROOM = 0.10  # Of the memory, for what a program is not alone with: input buffers, fragments.
LEAST_SHOWN = 0.01  # Of all that is sent; --json has every collective.


def figures(
    compiled: jax.stages.Compiled, name: str, stage: Stage, target: Target, seconds: float
) -> dict[str, Any]:
    """Everything that the compiled program says, per device unless it says otherwise."""
    module = hlo.parse(compiled.as_text() or "")
    uncounted = 1.0 if name == "decode" else None  # So decode's figures are those of one token.
    shares = programs.branch_shares(stage)
    costs = cost.analyze(module, dict(stage.mesh.shape), shares, uncounted=uncounted)
    used = memory.measure(compiled, module, name, stage, uncounted=uncounted)
    chip, devices = target.chip, stage.mesh.size
    result: dict[str, Any] = {
        "program": name,
        "topology": target.name,
        "devices": devices,
        "compile_seconds": seconds,
        "memory": dataclasses.asdict(used)
        | {"limit": chip.hbm, "headroom": 1 - used.peak / chip.hbm},
        "flops": {
            "matmul": dict(costs.matmul),
            "kernel": dict(costs.kernel),
            "recomputed": costs.recomputed,
            "total": costs.flops,
        },
        "hbm_bytes": costs.hbm_bytes,
        "collectives": [
            dataclasses.asdict(kind) | dataclasses.asdict(traffic)
            for kind, traffic in sorted(costs.collectives.items())
        ],
        "roofline": roofline(costs, target, stage.mesh.shape),
        "largest_buffers": memory.largest(module, 8, uncounted=uncounted),
        "shared_by_fewer": sharding.shared_by_fewer(
            stage.state.params, stage.cfg.widths, stage.mesh
        ),
    }
    if name == "train":
        asked = programs.full_row_cost(stage)
        model = sum(asked.flops.values()) / devices
        result["model_flops"] = {tower: value / devices for tower, value in asked.flops.items()}
        result["compiled_over_model"] = costs.flops / model
        result["flops_per_token"] = costs.flops * devices / asked.tokens
        result["flops_per_target"] = costs.flops * devices / asked.targets
    return result


def roofline(costs: cost.Cost, target: Target, mesh: Mapping[str, int]) -> dict[str, Any]:
    """Lower bounds of a step's seconds by resource, from the vendor's peak figures.

    Rings of different axes work at the same time, so the busiest counts.
    """
    chip = target.chip
    wires: dict[str, float] = {}
    for kind, traffic in costs.collectives.items():
        for axis, share in _ring_shares(kind, mesh):
            wires[axis] = wires.get(axis, 0.0) + traffic.wire * share
    by_axis = {
        axis: sent / (chip.dcn if axis == "data" and target.count > 1 else chip.ring(mesh[axis]))
        for axis, sent in wires.items()
    }
    seconds = {
        "compute": costs.flops / chip.flops,
        "hbm": costs.hbm_bytes / chip.hbm_bandwidth,
        "interconnect": max(by_axis.values(), default=0.0),
    }
    bound = max(seconds, key=lambda key: seconds[key])
    return {"seconds": seconds, "interconnect_by_axis": by_axis, "bound": bound}


def _ring_shares(kind: cost.CollectiveKind, mesh: Mapping[str, int]) -> list[tuple[str, float]]:
    """Traffic over several axes at once goes around each in turn, evenly."""
    return [(axis, 1 / len(kind.axes)) for axis in kind.axes if mesh[axis] > 1]


def text(figures: Mapping[str, Any]) -> str:
    """The report. Nothing in it was measured on a chip, and it says so."""
    m, f, r = figures["memory"], figures["flops"], figures["roofline"]
    lines = [
        f"{figures['program']} on {figures['topology']}, {figures['devices']} devices: "
        f"compiled in {figures['compile_seconds']:.0f} s. All figures are of one device.",
        "",
        f"memory, GiB           peak {_figure(m['peak'] / GIB)} of {m['limit'] / GIB:.2f}, "
        f"{m['headroom']:.0%} free",
        *(
            f"  {name:<20}{_figure(m[name] / GIB):>8}"
            for name in (*("weights", "optimizer", "batch"), "temporaries")
        ),
        f"    {'activations kept':<18}{_figure(m['activations'] / GIB):>8}",
        f"    {'gradients, stacked':<18}{_figure(m['gradients'] / GIB):>8}",
        *([f"  {'on the host':<20}{_figure(m['host'] / GIB):>8}"] if m["host"] else []),
        "",
        "operations, TFLOP     matrix products   attention kernels"
        + ("   asked for" if "model_flops" in figures else ""),
    ]
    for tower in sorted(f["matmul"].keys() | f["kernel"].keys()):
        lines.append(
            f"  {tower:<20}{_figure(f['matmul'].get(tower, 0) / 1e12):>15}"
            f"{_figure(f['kernel'].get(tower, 0) / 1e12):>20}"
        )
    lines.append(f"  computed twice      {_figure(f['recomputed'] / 1e12):>15}")
    if "model_flops" in figures:
        model = sum(figures["model_flops"].values())
        towers = ", ".join(f"{k} {_figure(v / 1e12)}" for k, v in figures["model_flops"].items())
        lines += [
            f"  model FLOPs of full rows {_figure(model / 1e12)} ({towers}; vocabulary in text): "
            f"compiled / model {figures['compiled_over_model']:.3f}",
            f"  {_figure(figures['flops_per_token'] / 1e9)} GFLOP a text slot, "
            f"{_figure(figures['flops_per_target'] / 1e9)} GFLOP a target token",
        ]
    lines += ["", "collectives, GB sent  axes                 times  in layers  beside computation"]
    sent = sum(entry["wire"] for entry in figures["collectives"])
    for entry in figures["collectives"]:
        if entry["wire"] >= LEAST_SHOWN * sent:
            lines.append(
                f"  {entry['op']:<18}{_figure(entry['wire'] / 1e9):>7}   "
                f"{'+'.join(entry['axes']):<18}"
                f"{entry['count']:7.0f}  {'yes' if entry['in_layers'] else 'no':<9}  "
                f"{'yes' if entry['hidden'] else 'no, it blocks'}"
            )
    seconds = ", ".join(f"{name} {_figure(value)} s" for name, value in r["seconds"].items())
    lines += [
        "",
        f"lower bounds          {seconds}: bound by {r['bound']}",
        "  from the makers' peak figures; nothing was run, and a real step takes longer",
        "",
        "largest buffers, GiB",
        *(
            f"  {_figure(size / GIB):>8}  {shape:<28} {_short(scope)}"
            for size, shape, scope in figures["largest_buffers"]
        ),
    ]
    lines += [line for said in figures["shared_by_fewer"] for line in ("", said)]
    if m["headroom"] < HEADROOM:
        lines += [
            "",
            f"fits with {m['headroom']:.0%} to spare, less than the {HEADROOM:.0%} advised",
        ]
    return "\n".join(lines)


def _figure(value: float) -> str:
    """Two decimals, or two digits of what is too small for that."""
    return f"{value:.2f}" if value >= 0.1 or value == 0 else f"{value:.2g}"


def _short(scope: str) -> str:
    parts = [p for p in re.split(r"[/()]", scope) if p not in ("", "jit", "jvp", "transpose")]
    kept = [p for p in parts if p not in ("shard_map", "while", "body", "closed_call")]
    return "/".join(kept[-4:])


def refusal(
    error: str, config: ConfigDict, stage: Stage, target: Target, name: str = "train"
) -> str:
    """What the compiler's error means and, where memory is short, which settings would help."""
    limit = target.chip.hbm
    needed = [_bytes(*found) for found in re.findall(r"([\d.]+)([KMGT]?)(?:iB)?\b", error)]
    needed = [size for size in needed if size > limit]
    if "RESOURCE_EXHAUSTED" not in error or not needed:
        return f"the compiler refused the program: {error}"
    return does_not_fit(min(needed), config, stage, target, name)


def does_not_fit(needed: float, config: ConfigDict, stage: Stage, target: Target, name: str) -> str:
    """`needed` is in bytes of one device."""
    limit = target.chip.hbm
    return (
        f"does not fit: {(needed - limit) / GIB:.1f} GiB over the {limit / GIB:.2f} GiB of a "
        f"{target.family} device; try {'; or '.join(suggestions(config, stage, name))}"
    )


def _bytes(number: str, unit: str) -> float:
    return float(number) * 1024 ** "_KMGT".index(unit or "_")


def suggestions(config: ConfigDict, stage: Stage, name: str = "train") -> list[str]:
    """Settings that lower memory, those that cost least first."""
    tries, compute = [], config.compute
    larger = f"a topology of {math.prod(stage.mesh.shape.values()) * 2} devices or more"
    if name in programs.GENERATION:
        prompts = config.generation.batch_size
        return [f"--config.generation.batch_size={max(1, prompts // 4)}", larger]
    shares = sharding.shards(sharding.BATCH_AXES, stage.mesh)
    rows = config.data.batch_rows // shares // compute.microbatches
    if rows > 1:
        parts = 2 * compute.microbatches
        tries.append(f"--config.compute.microbatches={parts} ({rows} rows a device at a time now)")
    if compute.head_keep:
        tries.append("--config.compute.head_keep=False")
    elif compute.head_chunk > 128:
        tries.append(f"--config.compute.head_chunk={compute.head_chunk // 2}")
    lower = BY_MEMORY[: BY_MEMORY.index(compute.remat)]
    if lower:
        tries.append(f"--config.compute.remat={lower[-1]}")
    if compute.kernel == "xla":
        tries.append("--config.compute.kernel=auto")
    if memory.per_device(stage.state.opt_state) > memory.per_device(stage.state.frozen):
        tries.append("--config.lora.rank=64")
    if rows > 1 or _weights(stage, twice=True) < _weights(stage):
        tries.append(larger)
    return tries or ["devices with more memory"]


def _weights(stage: Stage, *, twice: bool = False) -> int:
    """Numbers of weights that a device holds, or would hold among twice as many."""
    sizes = dict(stage.mesh.shape)
    sizes["fsdp_z"] *= 2 if twice else 1
    mesh = AbstractMesh(tuple(sizes.values()), tuple(sizes))
    shapes, places = saber.abstract(stage.cfg), saber.shardings(stage.cfg, mesh)
    held = jax.tree.map(lambda leaf, at: math.prod(at.shard_shape(leaf.shape)), shapes, places)
    return sum(jax.tree.leaves(held))


def side_by_side(a: Mapping[str, Any], b: Mapping[str, Any]) -> str:
    """Two reports' main figures, and their ratio."""
    rows = [("", str(a["config"]), str(b["config"]), "B / A")]
    for label, of, unit in (
        ("peak memory, GiB", lambda f: f["memory"]["peak"], GIB),
        ("  weights", lambda f: f["memory"]["weights"], GIB),
        ("  optimizer", lambda f: f["memory"]["optimizer"], GIB),
        ("  temporaries", lambda f: f["memory"]["temporaries"], GIB),
        ("operations, TFLOP", lambda f: f["flops"]["total"], 1e12),
        ("  computed twice", lambda f: f["flops"]["recomputed"], 1e12),
        ("sent, GB", lambda f: sum(c["wire"] for c in f["collectives"]), 1e9),
        ("  blocking", lambda f: sum(c["wire"] for c in f["collectives"] if not c["hidden"]), 1e9),
        ("HBM traffic, GB", lambda f: f["hbm_bytes"], 1e9),
        ("bound: compute, s", lambda f: f["roofline"]["seconds"]["compute"], 1),
        ("bound: HBM, s", lambda f: f["roofline"]["seconds"]["hbm"], 1),
        ("bound: interconnect, s", lambda f: f["roofline"]["seconds"]["interconnect"], 1),
    ):
        x, y = of(a) / unit, of(b) / unit
        rows.append((label, f"{x:.4g}", f"{y:.4g}", f"{y / x:.2f}" if x else ""))
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    return "\n".join(
        f"{row[0]:<{widths[0]}}  " + "  ".join(f"{row[i]:>{widths[i]}}" for i in (1, 2, 3))
        for row in rows
    )
