"""What the text tower's attention costs on a TPU by the size of its blocks, from compiled kernels.

    python -m saber_jax.aot.attention v5e v6e

The compiler schedules the kernels for every size, and this counts the cycles that a block takes,
between two bounds. The lower one counts from the first to the last matrix product of the schedule,
or what the chip's peak allows if that is more. The upper one counts the whole schedule, with the
loop over blocks and with what runs once for a row of blocks. Neither contains waiting for HBM.
docs/aot_table.md says what follows for models/kernels.py.
"""

import dataclasses
import os
import re
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from saber_jax.aot import chips
from saber_jax.aot.kernels import FUSED_SPLASH, SPLASH
from saber_jax.models.kernels import PackedMask, splash_kernel
from saber_jax.models.masks import Mask

HEADS, KV_HEADS, HEAD_DIM = 28, 4, 128  # Of the 7B.
CLOCKS = {"v5e": 1.503e9, "v6e": 1.751e9, "v5p": 1.751e9}


@dataclasses.dataclass(frozen=True)
class Row:
    """Slots of a row: `shared`, then two responses; `of_regions` if blocks have to divide them."""

    name: str
    shared: int
    response: int = 0

    def padded(self, block: int, *, of_regions: bool) -> tuple[int, int]:
        """(length, response) for blocks of this size: every region padded, or the row's end."""

        def up(slots: int) -> int:
            return slots + -slots % block

        if of_regions:
            return up(self.shared) + 2 * up(self.response), up(self.response)
        return up(self.shared + 2 * self.response), self.response


ROWS = (Row("stage 1", 4096), Row("stage 2", 3072, 1152))
# (block, whether responses are told apart inside of blocks, whether the backward kernel is fused)
FORMS = [
    *[(block, False, False) for block in (256, 384, 512, 1024)],
    *[(block, True, False) for block in (384, 512)],
    *[(block, False, True) for block in (384, 512)],
]


def kernel_cycles(
    chip: str, block: int, *, regions: bool, fused: bool, dump: Path
) -> dict[str, tuple[float, float]]:
    """{kernel: (least, most)} cycles of one block and head."""
    length = 6 * max(block, 512)
    response = block + 128 if regions else 0  # No whole number of blocks.
    run = splash_kernel(PackedMask(length, response, block), HEADS, block, fused=fused)

    def total(q, k, v, ids):
        out = jax.vmap(lambda q, k, v, s: run(q, k, v, splash.SegmentIds(q=s, kv=s)))(q, k, v, ids)
        return out.astype(jnp.float32).sum()

    shape = "2x2x1" if chip == "v5p" else "2x2"
    devices = chips.parse_topology(f"{chip}:{shape}").devices()
    rows = PartitionSpec("rows")
    place = NamedSharding(Mesh(np.array(devices), ("rows",)), rows)
    step = jax.shard_map(
        jax.grad(total, (0, 1, 2)), mesh=place.mesh, in_specs=rows, out_specs=rows, check_vma=False
    )
    given = [
        jax.ShapeDtypeStruct((len(devices), heads, length, HEAD_DIM), jnp.bfloat16, sharding=place)
        for heads in (HEADS, KV_HEADS, KV_HEADS)
    ]
    ids = jax.ShapeDtypeStruct((len(devices), length), jnp.int32, sharding=place)
    for old in dump.iterdir():
        old.unlink()
    jax.jit(step).lower(*given, ids).compile()
    cycles = {}
    for name, products in (FUSED_SPLASH if fused else SPLASH).items():
        (found,) = dump.glob(f"*splash_mha{name}_*per-bundle-utilization*")
        inside, whole = bundles(found.read_text(errors="replace"))
        peak = 2.0 * products * block**2 * HEAD_DIM / chips.CHIPS[chip].flops * CLOCKS[chip]
        cycles[name[1:]] = max(inside, peak), max(whole, peak)
    return cycles


def bundles(text: str) -> tuple[int, int]:
    """Instruction bundles of a kernel: from the first matrix product to the last, and all.

    `text` is the compiler's table of the slots that each bundle uses, the first column of which is
    the matrix units'.
    """
    lines = text.split("== UTILIZATION:", 1)[1].splitlines()
    used = [int(line.split()[0]) for line in lines if re.fullmatch(r"[\d ]*\d[\d ]*", line)]
    products = [number for number, count in enumerate(used) if count]
    return products[-1] - products[0] + 1, len(used)


def row_cycles(
    row: Row, block: int, cycles: dict[str, tuple[float, float]], *, regions: bool
) -> tuple[float, float]:
    """(least, most) cycles of all heads of a row in one layer, forward and backward."""
    length, response = row.padded(block, of_regions=not regions)
    meet = Mask.packed(length, response).may_meet(block, block, length)
    if regions:
        chosen, rejected = row.shared, row.shared + row.response
        meet = Mask(True, chosen, rejected).may_meet(block, block, length)
    visited, skipped = int(meet.sum()), int((~meet).sum())
    least = HEADS * visited * sum(low for low, _ in cycles.values())
    around = sum(high - low for low, high in cycles.values())
    most = HEADS * (visited * sum(high for _, high in cycles.values()) + skipped * around)
    return least, most


def main(names: list[str]) -> None:
    if not names or set(names) - CLOCKS.keys():
        sys.exit(f"saber_jax.aot.attention: name some of {', '.join(CLOCKS)}; got {names}")
    with tempfile.TemporaryDirectory() as scratch:
        # Read when libtpu is loaded. Without the last flag it writes hundreds of megabytes.
        os.environ["LIBTPU_INIT_ARGS"] = (
            f"--xla_jf_dump_to={scratch} --xla_jf_dump_llo_text=true "
            "--xla_jf_dump_llo_pass_label_regex=.*final.*"
        )
        print("cycles of a block; ms of a row and layer, all heads, forward and backward")
        for chip in names:
            for block, regions, fused in FORMS:
                cycles = kernel_cycles(
                    chip, block, regions=regions, fused=fused, dump=Path(scratch)
                )
                said = [f"{name} {low:.0f}-{high:.0f}" for name, (low, high) in cycles.items()]
                form = f"{chip} {block:4d} {'regions' if regions else 'causal '}"
                for row in ROWS:
                    if row.response or not regions:
                        low, high = row_cycles(row, block, cycles, regions=regions)
                        low, high = (1e3 * c / CLOCKS[chip] for c in (low, high))
                        said.append(f"{row.name} {low:.2f}-{high:.2f} ms")
                print(f"{form} {'fused ' if fused else ''}{'; '.join(said)}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
