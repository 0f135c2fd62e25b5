"""Adapters: what they add, what they leave alone, and what they cost."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

from saber_jax import sharding
from saber_jax.models import lora, saber
from saber_jax.models.config import LoraConfig, SaberConfig, saber_config
from saber_jax.models.parameters import Kind, Role
from saber_jax.tree import flatten
from tests.models.batches import CONFIG, Audio, Image, Text, conversation, pack, prompts, text_batch

TALK = conversation(1, Text(3), Image((1, 4, 6)), Audio(230), Text(5))
BATCH = pack([[TALK]], length=80, patches=24, chunks=2)
TEXT_LAYERS = {
    *(f"text/blocks/attn/w_{side}" for side in "qkvo"),
    *(f"text/blocks/mlp/w_{part}" for part in ("gate", "up", "down")),
}


def adapted(*targets: str, rank: int = 3) -> SaberConfig:
    return dataclasses.replace(CONFIG, lora=LoraConfig(rank=rank, alpha=6.0, targets=targets))


def drawn(cfg: SaberConfig) -> dict:
    """Random parameters, including B, which is zero in a fresh adapter."""
    noise = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: noise.normal(0, 0.15, leaf.shape).astype(np.float32), saber.abstract(cfg)
    )


def weights_with_adapters(cfg: SaberConfig) -> set[str]:
    names = flatten(saber.abstract(cfg)["lora"])
    assert {name.rsplit("/", 1)[1] for name in names} == {"a", "b"}
    return {name.rsplit("/", 1)[0] for name in names}


def hidden(cfg: SaberConfig):
    return jax.jit(functools.partial(saber.hidden, cfg=cfg))


def test_the_published_targets_are_the_linear_layers_of_the_text_tower():
    assert weights_with_adapters(adapted("text/*")) == TEXT_LAYERS
    shapes = saber.abstract(adapted("text/*"))["lora"]["text"]["blocks"]["attn"]
    assert [shapes["w_o"][side].shape for side in "ab"] == [(3, 6, 16, 3), (3, 3, 48)]


def test_every_matrix_of_every_tower_can_take_one_and_no_table_does():
    names = weights_with_adapters(adapted("*"))
    matrices = {n for n in flatten(saber.abstract(CONFIG)) if n.split("/")[-1].startswith("w")}
    assert names == matrices
    assert not names & {"text/embed", "text/lm_head", "audio/bos_eos"}


@pytest.mark.parametrize("target", ["text/lm_head", "txet/*", "text/norm"])
def test_a_target_that_is_no_linear_layer_is_refused(target):
    with pytest.raises(ValueError, match=rf"{target.replace('*', '.')}' matches no linear layer"):
        saber.abstract(adapted("text/*", target))


def test_adapters_add_the_product_of_their_matrices_in_every_tower():
    cfg = adapted("*")
    params = drawn(cfg)
    merged = saber.merge_lora(params, cfg)
    saber.check_tree(saber.abstract(CONFIG), merged)
    w, adapter = params["text"]["blocks"]["attn"]["w_o"], params["lora"]["text"]["blocks"]["attn"]
    delta = np.einsum("YNHR,YRD->YNHD", adapter["w_o"]["a"], adapter["w_o"]["b"])
    np.testing.assert_allclose(merged["text"]["blocks"]["attn"]["w_o"], w + 2.0 * delta, atol=1e-6)
    want = hidden(CONFIG)(merged, BATCH)
    got = hidden(cfg)(params, BATCH)
    base = hidden(CONFIG)(saber.without_lora(params), BATCH)
    assert np.abs(want - base).max() > 0.1
    np.testing.assert_allclose(got, want, atol=2e-5 * np.abs(want).max())


def test_without_adapters_it_is_the_base_model_to_the_bit():
    cfg = adapted("text/*")
    params = drawn(cfg)
    off = saber.without_lora(params)
    assert off["text"] is params["text"]
    base = hidden(CONFIG)(off, BATCH)
    np.testing.assert_array_equal(hidden(cfg)(off, BATCH), base)
    fresh = jax.jit(lambda: saber.init_lora(cfg, jax.random.key(0)))()
    np.testing.assert_array_equal(hidden(cfg)(off | {"lora": fresh}, BATCH), base)


def test_decoding_uses_the_adapters():
    cfg = adapted("text/*")
    params = drawn(cfg)

    def next_hidden(params, cfg):
        batch = prompts(BATCH, jnp.array([[12]]), jnp.array([[12]]))
        _, cache = saber.prefill(params, batch, cfg, prompt_slots=12, answer_slots=1)
        one = jnp.full((1,), 77)
        return saber.decode(
            params, jnp.array([11]), one, cache, one * 0, jnp.int32(0), one * 0 + 1, cfg
        )[0]

    run = jax.jit(next_hidden, static_argnames="cfg")
    got, want = run(params, cfg), run(saber.merge_lora(params, cfg), CONFIG)
    np.testing.assert_allclose(got, want, atol=2e-5 * np.abs(want).max())


def test_gradients_of_adapters_cost_no_gradient_of_the_weights():
    cfg, batch = adapted("text/*"), text_batch(1, 40)
    params = jax.tree.map(jnp.asarray, drawn(cfg))

    def loss(part):
        return saber.hidden(params | part, batch, cfg).std()

    def flops(function, *towers: str) -> float:
        part = {tower: params[tower] for tower in towers}
        return jax.jit(function).lower(part).compile().cost_analysis()["flops"]

    forward = flops(loss, "lora")
    assert flops(jax.grad(loss), "lora") < 2.5 * forward
    assert flops(jax.grad(loss), "lora", "text") > 2.9 * forward


def test_adapters_are_sharded_by_the_rules_of_their_weights():
    cfg = dataclasses.replace(
        saber_config("7b"), lora=LoraConfig(rank=8, alpha=32.0, targets=("text/*",))
    )
    mesh = sharding.make_mesh(data=1, fsdp=2, tensor=1)
    specs = sharding.parameter_shardings(saber.axes(cfg), saber.abstract(cfg), mesh)["lora"]
    attn = specs["text"]["blocks"]["attn"]
    assert attn["w_q"]["a"].spec == PartitionSpec(None, sharding.FSDP, None)
    assert attn["w_q"]["b"].spec == PartitionSpec(None, None, "tensor", None)
    assert attn["w_o"]["b"].spec == PartitionSpec(None, None, sharding.FSDP)
    sizes = [leaf.size for leaf in jax.tree.leaves(saber.abstract(cfg)["lora"])]
    assert sum(sizes) == 20_185_088  # What peft counts for all linear layers of that tower, r = 8.


def test_a_config_with_adapters_survives_json():
    cfg = adapted("text/*", "vision/merger/*")
    assert SaberConfig.from_dict(cfg.to_dict()) == cfg
    assert SaberConfig.from_dict(CONFIG.to_dict()) == CONFIG
    with pytest.raises(ValueError, match="rank of at least 1"):
        adapted("text/*", rank=0)


def test_merging_numpy_arrays_stays_numpy_and_rounds_once():
    cfg = adapted("text/*")
    params = drawn(cfg)
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), saber.without_lora(params))
    merged = saber.merge_lora(half | {"lora": params["lora"]}, cfg)
    w = half["text"]["blocks"]["mlp"]["w_up"]
    a, b = (params["lora"]["text"]["blocks"]["mlp"]["w_up"][side] for side in "ab")
    got = merged["text"]["blocks"]["mlp"]["w_up"]
    assert isinstance(got, np.ndarray) and got.dtype == jnp.bfloat16
    np.testing.assert_array_equal(got, (w.astype(np.float32) + 2.0 * (a @ b)).astype(jnp.bfloat16))
    assert merged["text"]["embed"] is half["text"]["embed"]
    assert lora.ADAPTERS not in merged


def keys(rows: int, seed: int = 0):
    return jax.random.split(jax.random.key(seed), rows)


def test_dropout_zeroes_its_share_and_makes_up_for_it():
    x = jnp.full((2 * 3, 400, 33), 7.0)  # Rows of three entries each, and an odd width.
    for rate in (0.05, 0.3):
        got = np.asarray(lora.dropped(x, keys(2), rate))
        zero, spread = got == 0, (rate * (1 - rate) / x[0].size) ** 0.5
        np.testing.assert_allclose(zero.mean((1, 2)), rate, atol=5 * spread)
        np.testing.assert_allclose(got[~zero], 7.0 / (1 - rate), rtol=1e-4)
        shared = np.einsum("aLD,bLD->ab", 1.0 * zero, 1.0 * zero) / x[0].size
        np.testing.assert_allclose(shared[~np.eye(6, dtype=bool)], rate**2, atol=5 * spread)
    np.testing.assert_array_equal(lora.dropped(x, keys(2), 0.0), x)


def test_what_is_dropped_of_a_slot_does_not_depend_on_how_long_its_row_is_or_who_is_beside_it():
    x = jnp.ones((4, 50, 16))
    whole = lora.dropped(x, keys(4), 0.5)
    np.testing.assert_array_equal(lora.dropped(x[:, :30], keys(4), 0.5), whole[:, :30])
    np.testing.assert_array_equal(lora.dropped(x[1:3], keys(4)[1:3], 0.5), whole[1:3])


def test_on_average_over_keys_an_adapter_that_drops_is_the_adapter():
    noise, cfg = np.random.default_rng(0), LoraConfig(rank=3, alpha=6, targets="*", dropout=0.3)
    x, w, a, b = (
        jnp.asarray(noise.normal(size=shape), jnp.float32)
        for shape in ((2, 5, 8), (8, 2, 4), (8, 3), (3, 2, 4))
    )

    def project(keys):
        params = (nnx.Param(value) for value in (w, a, b))
        held = None if keys is None else nnx.Variable(keys)
        return lora.Adapted(*params, cfg, held).project("BLD,DNH->BLNH", x)

    draws, want = jax.vmap(project)(keys(2 * 4000).reshape(4000, 2)), project(None)
    error = draws.std(0) / 4000**0.5
    assert (jnp.abs(draws.mean(0) - want) < 5 * error).all() and (error > 1e-3).all()


def test_only_rows_with_keys_drop_and_only_in_adapters():
    plain = adapted("text/blocks/attn/w_o", "text/blocks/mlp/w_up")
    cfg = dataclasses.replace(plain, lora=dataclasses.replace(plain.lora, dropout=0.5))
    params, batch = drawn(cfg), text_batch(2, 20)
    keyed, other = (
        dataclasses.replace(batch, dropout_keys=keys(3)[jnp.array(rows)])
        for rows in ([0, 1], [0, 2])
    )
    programs = [hidden(c).lower(params, batch).as_text() for c in (cfg, plain)]
    assert programs[0] == programs[1]
    base = saber.without_lora(params)
    programs = [hidden(cfg).lower(base, rows).as_text() for rows in (batch, keyed)]
    assert programs[0] == programs[1]
    run = hidden(cfg)
    got, again = run(params, keyed), run(params, other)
    np.testing.assert_array_equal(got[0], again[0])
    assert np.abs(got[1] - again[1]).max() > 0.1
    assert (np.abs(got - run(params, batch)).max((1, 2)) > 0.1).all()


def test_every_layer_and_every_module_draws_its_own():
    made = {"inputs": 8, "role": Role(Kind.ADAPTER), "zero": False}
    leaves = {
        "stacked": {
            "a": lora.LoraMatrix(shape=(3, 8, 2), axes=("layers", "embed", "rank"), **made)
        },
        "single": {"a": lora.LoraMatrix(shape=(8, 2), axes=("embed", "rank"), **made)},
    }
    got = lora.keys_of(leaves, keys(2))
    assert (got["stacked"].shape, got["single"].shape) == ((3, 2), (2,))
    every = np.concatenate([jax.random.key_data(k).reshape(-1, 2) for k in got.values()])
    assert len(np.unique(every, axis=0)) == 3 * 2 + 2


def test_keys_are_those_of_seed_step_and_row_and_nobody_has_any_without_dropout():
    batch, cfg = text_batch(3, 20), LoraConfig(rank=3, alpha=6, targets="*", dropout=0.1)

    def data(seed, step, rows=batch):
        return jax.random.key_data(lora.keyed(rows, cfg, seed, jnp.int32(step)).dropout_keys)

    np.testing.assert_array_equal(data(0, 5), data(0, 5))
    np.testing.assert_array_equal(data(0, 5, text_batch(4, 20))[:3], data(0, 5))
    every = np.concatenate([data(0, 5), data(0, 6), data(1, 5)])
    assert len(np.unique(every, axis=0)) == 9
    for without in (None, dataclasses.replace(cfg, dropout=0.0)):
        assert lora.keyed(batch, without, 0, jnp.int32(5)) is batch
