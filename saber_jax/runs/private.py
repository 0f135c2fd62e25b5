"""All uses of jax's private API.

There is no public equivalent in the pinned versions. tests/runs/test_private.py fails if a new
version moves one of them, so that this is noticed before a run on a pod.
"""

from typing import Any

TPU_PODS = ("gketpu", "gcetpu")
"""jax's names of the two ways in which a TPU pod's hosts find each other: GKE and TPU VMs."""


def tpu_cluster() -> Any | None:
    """jax's own description of the TPU pod that this host belongs to; None elsewhere.

    `jax.distributed.initialize()` uses the same one. It has `get_process_id()` and
    `get_process_count()`, which do not initialise the accelerator.
    """
    from jax._src.clusters import ClusterEnv

    kinds = [kind for kind in ClusterEnv._cluster_types if kind.name in TPU_PODS]
    return next((kind for kind in kinds if kind.is_env_present()), None)


def key_value_store() -> Any | None:
    """The store of short texts that the processes of a run share, None for a single process.

    Has `key_value_set(key, text, allow_overwrite=True)` and `key_value_dir_get(prefix)`.
    """
    from jax._src import distributed

    return distributed.global_state.client
