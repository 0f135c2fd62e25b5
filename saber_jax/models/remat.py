"""Rematerialisation policies: which activations a layer keeps for its backward pass.

They are ordered from least memory to least computation. The numbers below are GiB that one text
layer of the 7b size keeps for 8192 tokens in bfloat16. Every kept GiB saves about the same amount
of computation.
"""

from typing import Literal, get_args

import jax

Remat = Literal[
    "layer_offload", "layer", "qkv_offload", "qkv", "attention", "gate", "matmuls", "none"
]

# Names that layers give to what they compute, see jax.ad_checkpoint.checkpoint_name.
INPUT = "layer_input"
QKV = "qkv"  # Rotated queries and keys, and values.
ATTENTION = "attention_output"  # The kernel's output and log-sum-exp.
MLP_INPUT = "mlp_input"  # The sum of the layer's input and what attention adds.
GATE, UP = "gate", "up"  # The two wide projections.

BY_MEMORY = get_args(Remat)  # From the least memory on the device to the most.

_KEPT: dict[str, tuple[str, ...]] = {
    "layer": (),  # 0.05: the input alone.
    "qkv": (QKV,),  # 0.12: not the projections before the attention kernel.
    "attention": (QKV, ATTENTION),  # 0.18: nor the kernel.
    "gate": (QKV, ATTENTION, MLP_INPUT, GATE),  # 0.52: nor one of the two wide products.
    "matmuls": (QKV, ATTENTION, MLP_INPUT, GATE, UP),  # 0.81: nor the other.
}
# Activations that are offloaded to host memory until the backward pass.
_OFFLOADED: dict[str, tuple[str, ...]] = {
    "layer_offload": (INPUT,),
    "qkv_offload": (INPUT, QKV, ATTENTION),
}


def rematerialised(layer, remat: Remat):
    """`layer`, a scan body, under a policy. Raises ValueError for a name that is not one."""
    if remat == "none":
        return layer
    if remat in _OFFLOADED:
        policy = jax.checkpoint_policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[],
            names_which_can_be_offloaded=list(_OFFLOADED[remat]),
            offload_src="device",
            offload_dst="pinned_host",
        )
    elif remat in _KEPT:
        policy = jax.checkpoint_policies.save_only_these_names(*_KEPT[remat])
    else:
        names = ", ".join(map(repr, BY_MEMORY))
        raise ValueError(f"config.compute.remat must be one of {names}; got {remat!r}.")
    # A scan body is never merged with its own recomputation, so the barrier that prevent_cse adds
    # would cost without protecting anything.
    return jax.checkpoint(layer, prevent_cse=False, policy=policy)
