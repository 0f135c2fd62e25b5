"""The table of attention's blocks: what is read off a schedule, and what a row visits."""

import subprocess
import sys

import pytest

from saber_jax.aot import attention, hlo, kernels
from saber_jax.aot.attention import Row

SCHEDULE = """== CAPACITY:
MXU, XLU, VALU
    4     3     4
== UTILIZATION:
0 0 2
2 0 4
0 1 0
4 0 0
0 0 1
"""

KERNEL = """HloModule jit_step, num_partitions=1

ENTRY %main (q: bf16[28,384,64]) -> bf16[28,384,64] {
  %q = bf16[28,384,64]{2,1,0} parameter(0)
  ROOT %splash_mha_dkv_segmented.1 = bf16[28,384,64]{2,1,0} custom-call(%q), \
custom_call_target="tpu_custom_call", metadata={op_name="jit(step)/text/splash_3x128FORM/dkv"}
}
"""


def test_bundles_are_counted_from_the_first_to_the_last_matrix_product():
    assert attention.bundles(SCHEDULE) == (3, 5)


def test_rows_are_padded_by_region_or_at_their_end():
    row = Row("", 3072, 1152)
    assert row.padded(512, of_regions=True) == (6144, 1536)
    assert row.padded(512, of_regions=False) == (5632, 1152)
    assert row.padded(384, of_regions=True) == row.padded(384, of_regions=False) == (5376, 1152)


def test_a_row_costs_its_visited_blocks_and_at_most_the_loop_over_the_others():
    """Blocks of 1: two shared, one of each response. Of 16 pairs 9 are seen."""
    cycles = {"fwd": (10.0, 12.0)}
    least, most = attention.row_cycles(Row("", 2, 1), 1, cycles, regions=False)
    assert least == attention.HEADS * 9 * 10
    assert most == attention.HEADS * (9 * 12 + 7 * 2)


@pytest.mark.parametrize(("form", "products"), [("", 4), ("_fused", 5)])
def test_the_backward_kernel_counts_five_products_if_it_is_fused(form, products):
    module = hlo.parse(KERNEL.replace("FORM", form))
    (total,) = {kernels.flops(run) for run in hlo.executions(module, {})} - {0.0}
    assert total == 2 * products * 28 * 3 * 128**2 * 64


@pytest.mark.slow
def test_the_command_reads_the_schedule_of_every_kernel(four_chips):
    del four_chips  # Skips without the compiler.
    command = [sys.executable, "-m", "saber_jax.aot.attention", "v5e"]
    lines = subprocess.run(command, text=True, capture_output=True, check=True).stdout.splitlines()
    assert len(lines) == 1 + len(attention.FORMS)
    assert all("fwd" in line and "dkv" in line and "stage 2" in line for line in lines[1:])
