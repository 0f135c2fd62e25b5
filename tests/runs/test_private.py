import inspect

import jax
from jax._src import clusters, distributed
from jax._src.lib import _jax

from saber_jax.runs import private


def test_jax_still_knows_both_kinds_of_tpu_pods_by_the_names_we_look_for():
    kinds = {kind.name: kind for kind in clusters.ClusterEnv._cluster_types}
    for name in private.TPU_PODS:
        for method in ("is_env_present", "get_process_id", "get_process_count"):
            assert callable(getattr(kinds[name], method))


def test_this_machine_is_no_tpu_pod(monkeypatch):
    for name in ("TPU_WORKER_HOSTNAMES", "TPU_WORKER_ID", "CLUSTER_NAME"):
        monkeypatch.delenv(name, raising=False)
    assert private.tpu_cluster() is None


def test_jax_s_key_value_store_still_takes_and_gives_what_we_ask():
    assert jax.process_count() == 1 and private.key_value_store() is None
    assert hasattr(distributed.global_state, "client")
    client = _jax.DistributedRuntimeClient
    assert {"key_value_set", "key_value_dir_get"} <= set(dir(client))
    assert "allow_overwrite" in (inspect.getdoc(client.key_value_set) or "")
