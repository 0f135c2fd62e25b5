"""The XLA flags that training sets on TPUs, with reasons.

    LIBTPU_INIT_ARGS="$(python -m saber_jax.aot.xla_flags)"   what launch/tpu_run.sh does on a TPU
    compiled = lowered.compile(compiler_options=FLAGS)       ahead of time, on any machine

A libtpu that does not know a flag refuses to start, so tests/test_xla_flags.py has the pinned one
compile with all of them. What they did to a scanned FSDP step of four MLP layers (2048 x 8192,
bfloat16) in libtpu 0.0.42.1: on v6e:8x8 a quarter of the all-gathers goes into matrix products and
the compiler's estimate falls from 799 to 708 thousand cycles, for 56 MiB more; one alone does
nothing. On v5e:16x16 they are the default already; on v5p:4x4x4 nothing changes. On v6e libtpu
warns that it recommends this fusion of all-gathers on v5e only; widely used all the same, but look
at the first losses of a run there.

Reduce-scatters were tried on eight such layers of the 7B (3584 x 18944, docs/aot_table.md). On
v6e:16x16 and v5p:4x4x4 those of the outermost ring otherwise stop the tensor core.

Not in it, because they leave the reduce-scatters of a v5e:16x16 step blocking:
xla_tpu_enable_async_collective_fusion_fuse_reduce_scatter, which changes no letter of it, and
xla_tpu_enable_windowed_einsum_for_reduce_scatter.
"""

# name -> value. What a flag does stands above it; they are libtpu's, not jax's, and change with it.
FLAGS: dict[str, str | bool] = {
    # Collectives run as part of neighbouring matrix products instead of between them: FSDP's
    # all-gathers hide behind the layer before.
    "xla_tpu_enable_async_collective_fusion": "true",
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": "true",
    # ... stretched over several products where one is too short.
    "xla_tpu_enable_async_collective_fusion_multiple_steps": "true",
    # The tensor core that computes also drives such a collective.
    "xla_tpu_overlap_compute_collective_tc": "true",
    # Reduce-scatters run on the SparseCores of v5p and v6e while the tensor core computes. A v5e
    # has none and ignores it.
    "xla_tpu_enable_sparse_core_collective_offload_reduce_scatter": "true",
    # All-gathers start early and end when their result is needed.
    "xla_enable_async_all_gather": "true",
}


def init_args() -> str:
    """The table as LIBTPU_INIT_ARGS takes it."""
    return " ".join(f"--{name}={value}" for name, value in FLAGS.items())


if __name__ == "__main__":
    print(init_args())
