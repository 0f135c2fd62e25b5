"""The cost of small programs whose cost is known, compiled for four TPU chips."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from saber_jax import sharding
from saber_jax.aot import cost, hlo

MESH_SHAPE = {"data": 1, "fsdp_z": 1, "fsdp_y": 2, "fsdp_x": 2, "sequence": 1, "tensor": 1}


@pytest.fixture(scope="module")
def mesh(four_chips):
    mesh = sharding.make_mesh(data=1, fsdp=4, tensor=1, devices=four_chips)
    assert dict(mesh.shape) == MESH_SHAPE
    return mesh


def analyze(function, *arguments, **walk):
    return cost.analyze(compiled(function, *arguments), MESH_SHAPE, {}, **walk)


def compiled(function, *arguments):
    return hlo.parse(jax.jit(function).lower(*arguments).compile().as_text())


def of(mesh, shape, dtype=jnp.bfloat16, spec=PartitionSpec()):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))


def scanned(x, weights):
    with jax.named_scope("text"):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0]


def test_a_scanned_layer_counts_as_often_as_it_runs(mesh):
    got = analyze(scanned, of(mesh, (64, 256)), of(mesh, (5, 256, 256)))
    assert got.matmul == {"text": 5 * 2 * 64 * 256 * 256}
    assert got.kernel == {} and got.recomputed == 0


def test_a_loop_reads_of_stacked_arrays_what_it_takes_of_them(mesh):
    """The output of a layer of 32 MiB stays on the chip, and so does a part of one of 64 MiB."""
    got = analyze(scanned, of(mesh, (4096, 4096)), of(mesh, (5, 4096, 4096)))
    # Five layers' weights; the first layer's input is copied to the chip, the last output from it.
    assert got.hbm_bytes == pytest.approx((5 + 2) * 2 * 4096**2, rel=0.01)

    def filled(x):
        return jax.lax.scan(lambda x, _: (jnp.sin(x), jnp.cos(x)), x, length=50)[1]

    # A fiftieth of the result at a time, and the carry as far as it is not on the chip.
    one = 4 * 4096**2
    got = analyze(filled, of(mesh, (4096, 4096), jnp.float32))
    assert 50 * one <= got.hbm_bytes <= 50 * 3 * one


def test_what_a_backward_pass_computes_again_is_told_apart(mesh):
    def loss(weights, x):
        layer = jax.checkpoint(lambda x, w: (jnp.tanh(x @ w @ w), None))
        return jax.lax.scan(layer, x, weights)[0].astype(jnp.float32).sum()

    got = analyze(jax.grad(loss), of(mesh, (3, 256, 256)), of(mesh, (64, 256)))
    product = 2 * 64 * 256 * 256
    # Two products forward, twice that backward, and both once more.
    assert got.flops == pytest.approx(3 * 8 * product, rel=0.02)
    assert got.recomputed == pytest.approx(3 * 2 * product, rel=0.02)


def test_a_loop_without_a_known_end_is_an_error_unless_told(mesh):
    def search(x):
        return jax.lax.while_loop(lambda x: x.sum() < 9.0, lambda x: x @ x, x)

    x = of(mesh, (256, 256), jnp.float32)
    with pytest.raises(ValueError, match="Cannot tell how often the loop"):
        analyze(search, x)
    assert analyze(search, x, uncounted=1.0).flops >= 2 * 256**3


def test_collectives_are_told_by_kind_and_axis_and_bytes(mesh):
    def gathered(x):
        x = jax.lax.all_gather(x, "fsdp_x", tiled=True)
        return jax.lax.psum_scatter(jnp.sin(x), "fsdp_y", tiled=True)

    spec = PartitionSpec(("fsdp_y", "fsdp_x"))
    by_hand = jax.shard_map(
        gathered,
        mesh=mesh,
        in_specs=spec,
        out_specs=PartitionSpec(("fsdp_x", "fsdp_y")),
        check_vma=False,
    )
    got = analyze(by_hand, of(mesh, (4096, 1024), jnp.float32, spec))
    by_kind = {(kind.op, kind.axes): traffic for kind, traffic in got.collectives.items()}
    whole = 4 * 2048 * 1024
    gather = by_kind["all-gather", ("fsdp_x",)]
    assert (gather.payload, gather.wire) == (whole, whole / 2)
    scatter = by_kind["reduce-scatter", ("fsdp_y",)]
    assert (scatter.payload, scatter.wire) == (whole, whole / 2)


SCATTERS = """HloModule jit_step, num_partitions=4

%region (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%alone (x: f32[8,4]) -> f32[2,4] {
  %x = f32[8,4]{1,0} parameter(0)
  %first = s32[] constant(0)
  %all-reduce.1 = f32[8,4]{1,0} all-reduce(%x), channel_id=1, \
replica_groups={{0,1,2,3}}, to_apply=%region
  ROOT %own = f32[2,4]{1,0} dynamic-slice(%all-reduce.1, %first, %first), \
dynamic_slice_sizes={2,4}
}

%sparse (y: f32[8,4]) -> f32[2,4] {
  %y = f32[8,4]{1,0} parameter(0)
  ROOT %reduce-scatter.2 = f32[2,4]{1,0} reduce-scatter(%y), channel_id=2, \
replica_groups={{0,1,2,3}}, dimensions={0}, to_apply=%region
}, execution_thread="sparsecore"

ENTRY %main (p: f32[8,4]) -> f32[2,4] {
  %p = f32[8,4]{1,0} parameter(0)
  %start = ((f32[8,4]{1,0}), f32[2,4]{1,0}) call-start(%p), \
async_execution_thread="sparsecore", to_apply=%sparse
  %fusion.1 = f32[2,4]{1,0} fusion(%p), kind=kCustom, calls=%alone
  %done = f32[2,4]{1,0} call-done(%start)
  ROOT %add.3 = f32[2,4]{1,0} add(%fusion.1, %done)
}
"""


def test_a_reduce_scatter_blocks_in_a_fusion_of_its_own_and_not_on_a_sparsecore():
    got = cost.analyze(hlo.parse(SCATTERS), {"fsdp_x": 4}, {}).collectives
    sent = {(kind.op, kind.hidden): traffic.wire for kind, traffic in got.items()}
    assert sent == dict.fromkeys((("reduce-scatter", False), ("reduce-scatter", True)), 96.0)


PREFETCHES = """HloModule jit_step

ENTRY %main (p: f32[8,4]) -> f32[8,4] {
  %p = f32[8,4]{1,0} parameter(0)
  %copy-start.1 = (f32[8,4]{1,0:S(1)}, f32[8,4]{1,0}, u32[]{:S(2)}) copy-start(%p)
  %copy-done.1 = f32[8,4]{1,0:S(1)} copy-done(%copy-start.1)
  %slice-start.1 = ((f32[8,4]{1,0}), f32[2,4]{1,0:S(1)}, s32[]{:S(2)}) slice-start(%p), \
slice={[0:2], [0:4]}
  %slice-done.1 = f32[2,4]{1,0:S(1)} slice-done(%slice-start.1)
  ROOT %negate.1 = f32[8,4]{1,0:S(1)} negate(%copy-done.1)
}
"""


def test_what_is_copied_to_the_chip_ahead_is_read_from_hbm_once():
    assert cost.analyze(hlo.parse(PREFETCHES), {}, {}).hbm_bytes == 128 + 32


def test_replica_groups_are_read_in_every_notation():
    def groups(text):
        instruction = hlo.Instruction("x", "f32[]", "all-reduce", (), text, False)
        return cost._groups(instruction, 8).tolist()

    rows, columns = [[0, 1, 2, 3], [4, 5, 6, 7]], [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert groups("replica_groups={{0,1,2,3},{4,5,6,7}}") == rows
    assert groups("replica_groups=[2,4]<=[8]") == rows
    assert groups("replica_groups=[4,2]<=[2,4]T(1,0)") == columns
    assert groups("replica_groups=mesh['a'=2,'b'=4] {'b'}") == rows
    assert groups("replica_groups=mesh['a'=2,'b'=4] {'a'}") == columns
    assert groups("replica_groups=mesh['a'=8] {'a':(1)2}") == columns
    assert groups("source_target_pairs={{0,1},{1,0}}") == [[0, 1], [1, 0]]
