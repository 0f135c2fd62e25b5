"""Gradients on a mesh whose FSDP axes divide only some widths as a whole, and the others in part.

test_shards.py runs it in a process with six devices, (fsdp_z, fsdp_x) = (3, 2). It prints what a
device has of each tower's width, with the width, and the largest difference to the gradients on one
device, relative to the largest number.
"""

import dataclasses
import json

import jax
import numpy as np

from saber_jax import sharding
from saber_jax.models import saber
from saber_jax.tree import flatten
from tests.models import weights
from tests.models.batches import CONFIG, Audio, Text, Video, conversation, pack

CFG = dataclasses.replace(
    CONFIG,
    text=dataclasses.replace(CONFIG.text, width=64),
    vision=dataclasses.replace(CONFIG.vision, out_width=64),
    audio=dataclasses.replace(CONFIG.audio, width=48, out_width=64),
)


def main() -> None:
    mesh = sharding.make_mesh(data=1, fsdp=6, tensor=1)
    params, places = weights.tree(CFG), saber.shardings(CFG, mesh)
    talks = [conversation(i, Text(3), Video((1, 4, 4)), Audio(90), Text(i)) for i in range(6)]
    batch = pack([[talk] for talk in talks], length=48, patches=16, chunks=1)
    weight = np.random.default_rng(0).normal(size=(6, 48, CFG.text.width)).astype(np.float32)
    weight *= (batch.text.segments > 0)[..., None]

    def on_one(params, batch):
        return saber.hidden(params, batch, CFG)

    def on_mesh(params, batch):
        return jax.shard_map(
            lambda params, rows: saber.hidden(params, rows, CFG, mesh=mesh),
            mesh=mesh,
            in_specs=(saber.specs(params, CFG, mesh), sharding.batch_specs(batch)),
            out_specs=sharding.BATCH_SPEC,
            check_vma=False,
        )(params, batch)

    def gradients(hidden, params, batch):
        total = jax.grad(lambda params: (hidden(params, batch) * weight).sum())
        return flatten(jax.jit(total)(params))

    want = gradients(on_one, params, batch)
    rows = jax.device_put(batch, sharding.batch_shardings(batch, mesh))
    got = gradients(on_mesh, jax.device_put(params, places), rows)
    shares = {}
    for tower in ("text", "vision", "audio"):
        name = f"{tower}/blocks/attn/w_o"
        whole = want[name].shape
        shares[tower] = [flatten(places)[name].shard_shape(whole)[-1], whole[-1]]
    largest = max(np.abs(leaf).max() for leaf in want.values())
    difference = max(np.abs(np.asarray(got[name]) - leaf).max() for name, leaf in want.items())
    print(json.dumps({"shares": shares, "difference": float(difference / largest)}))


if __name__ == "__main__":
    main()
