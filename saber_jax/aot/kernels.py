"""FLOPs of our attention kernels, which are custom calls to the compiler.

Their scopes say how many blocks they visit: `splash_BLOCKSxLENGTH`, or that with `_fused`
(models/kernels.py), and `flash_BLOCKSxQUERIESxKEYS` (models/triton.py), there in rows of a single
example.
"""

import math
import re

from saber_jax.aot import hlo

# Matrix products in each of the kernels, by a part of its name.
SPLASH = {"_fwd": 2, "_dq": 3, "_dkv": 4}
FUSED_SPLASH = {"_fwd": 2, "_dkv": 5}
FLASH = {"flash_forward": 2, "flash_backward_q": 3, "flash_backward_kv": 4}


def flops(run: hlo.Execution) -> float:
    """0 for what is no kernel. Raises ValueError for a kernel whose cost is not known."""
    instruction = run.instruction
    if instruction.op != "custom-call":
        return 0.0
    if "tpu_custom_call" in instruction.attributes:
        return _splash(run)
    return _flash(run) if "__gpu$xla.gpu.triton" in instruction.attributes else 0.0


def _splash(run: hlo.Execution) -> float:
    instruction = run.instruction
    blocks = re.search(r"splash_(\d+)x(\d+)(_fused)?", instruction.scope)
    by_name = FUSED_SPLASH if blocks and blocks[3] else SPLASH
    products = [n for part, n in by_name.items() if part in instruction.name]
    if blocks is None or not products:
        raise _unknown(instruction)
    # Queries come first; a batch of one row loses its axis.
    *batch, heads, _, head_dim = _first_operand(run, axes=3)
    count, length = int(blocks[1]), int(blocks[2])
    return 2.0 * products[0] * math.prod(batch) * heads * count * length**2 * head_dim


def _flash(run: hlo.Execution) -> float:
    blocks = re.search(r"flash_(\d+)x(\d+)x(\d+)", run.instruction.scope)
    products = [n for part, n in FLASH.items() if f"/{part}/" in run.instruction.scope]
    if blocks is None or not products:
        raise _unknown(run.instruction)
    batch, _, heads, head_dim = _first_operand(run, axes=4)
    scores = math.prod(map(int, blocks.groups()))
    # Heads are padded to a power of two inside of a program.
    width = 1 << (head_dim - 1).bit_length()
    return 2.0 * products[0] * batch * heads * scores * width


def _first_operand(run: hlo.Execution, *, axes: int) -> tuple[int, ...]:
    """The shape of the first float operand with at least so many axes, which is the queries'."""
    operands = (a for name in run.instruction.operands for a in run.computation[name].arrays)
    return next(a.dims for a in operands if len(a.dims) >= axes and a.dtype in ("bf16", "f32"))


def _unknown(instruction: hlo.Instruction) -> ValueError:
    return ValueError(
        f"The kernel {instruction.name} ({instruction.scope}) does not say what it costs."
    )
