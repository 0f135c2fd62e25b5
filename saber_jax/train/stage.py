"""The two stages: abstract state, abstract batch and jitted steps of a config, without values.

`main` runs what is built here and `aot` compiles it, so that aot reports describe the step that is
trained.
"""

import abc
import dataclasses
import functools
from collections.abc import Callable
from typing import ClassVar, cast, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.typing import DTypeLike
from jaxtyping import Array
from ml_collections import ConfigDict

from saber_jax import sharding
from saber_jax.batch import Batch, empty
from saber_jax.data.packing import Budget
from saber_jax.data.pairs import Pair, read_pairs
from saber_jax.data.withhold import View
from saber_jax.models import saber, sequence
from saber_jax.models.config import LoraConfig, SaberConfig, saber_config
from saber_jax.models.kernels import PLATFORM, WITHOUT_GRADIENT, Kernel, of_device
from saber_jax.models.remat import BY_MEMORY
from saber_jax.train import optimizer as optimizer_lib
from saber_jax.train.nonfinite import skipping
from saber_jax.train.objectives import Compute, cadpo_probe, reference_log_probs
from saber_jax.train.preference import Preference
from saber_jax.train.step import Metrics, TrainState, cadpo_step, partition, sft_step
from saber_jax.train.validate import (
    PAIR_METRICS,
    SECTION_METRICS,
    BatchSums,
    measure_pairs,
    measure_sections,
)
from saber_jax.tree import flatten, merge

DTYPES = ("float32", "bfloat16")
"""Of compute. float16 would need a scaled loss, or small gradients would become 0."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Stage(abc.ABC):
    """One stage on one mesh. `state` and `batch` hold jax.ShapeDtypeStruct with shardings.

    The differences between the stages are in their classes, and no other code checks which one is
    running. `items` names the contents of a row for the console; `validated` names the validation
    metrics that training can improve; `reference_views` are the views for which the stage needs
    log pi_ref.
    """

    items: ClassVar[str]
    validated: ClassVar[tuple[str, ...]]

    cfg: SaberConfig
    compute: Compute
    tx: optax.GradientTransformation
    seed: int
    mesh: Mesh
    trainable: tuple[str, ...]
    state: TrainState[jax.ShapeDtypeStruct]
    batch: Batch[jax.ShapeDtypeStruct]

    @abc.abstractmethod
    def step(self, state: TrainState[Array], batch: Batch) -> tuple[TrainState[Array], Metrics]:
        """One optimizer step, see train/step.py."""

    @property
    def reference_views(self) -> tuple[View, ...]:
        return ()

    def read_pairs(self, config: ConfigDict) -> list[Pair] | None:
        """The preference pairs of the stage; None if it trains on records."""
        return None

    def reference_step(self, view: View) -> Callable[[dict, Batch], jax.Array]:
        """Jitted (params, batch) -> log pi of every target with `view` withheld."""
        raise ValueError("This stage has no reference policy. Give configs/cadpo.py:VARIANT.")

    def probe(self) -> Callable[[TrainState[Array], Batch], Metrics] | None:
        """Jitted metrics that are too costly for every step, or None."""
        return None

    @abc.abstractmethod
    def measure(self, params: dict, batch: Batch) -> BatchSums:
        """The sums that validation adds up over the held-out examples, see train/validate.py."""

    def measurement(self) -> Callable[[TrainState[Array], Batch], BatchSums]:
        """The jitted `measure`."""
        everywhere = sharding.replicated(self.mesh)
        return jax.jit(lambda s, batch: self.measure(s.params, batch), out_shardings=everywhere)

    @property
    def beta(self) -> float:
        """The scale of rewards; 0 for stage 1."""
        return 0.0

    @property
    def warn_displacement(self) -> float:
        """Fall of the chosen answers' log pi, in nats per token, that validation warns of; or 0."""
        return 0.0

    @property
    def param_shardings(self) -> dict:
        """Shardings of the parameters, as a nested dict."""
        return merge(_shardings(self.state.trainable), _shardings(self.state.frozen))

    @property
    def param_dtypes(self) -> dict[str, DTypeLike]:
        """Dtypes of the parameters, by flattened name."""
        return {n: leaf.dtype for n, leaf in (self.state.trainable | self.state.frozen).items()}

    def train_step(
        self, *, skip: bool = False
    ) -> Callable[[TrainState[Array], Batch], tuple[TrainState[Array], Metrics]]:
        """The jitted step, which donates its state. With `skip`, a step with non-finite values
        changes nothing."""
        step = skipping(self.step) if skip else self.step
        everywhere = sharding.replicated(self.mesh)
        places = (_shardings(self.state), everywhere)
        return jax.jit(step, donate_argnums=0, out_shardings=places)

    def begin(self, params: dict) -> TrainState[Array]:
        """The state at step 0, with moments sharded like their weights."""
        trainable, frozen = partition(params, self.trainable)
        init = jax.jit(self.tx.init, out_shardings=_shardings(self.state.opt_state))
        step = jax.device_put(jnp.zeros((), jnp.int32), sharding.replicated(self.mesh))
        return TrainState(step, trainable, frozen, init(trainable))


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Sed(Stage):
    """Stage 1, structured evidence decomposition: supervised fine-tuning on six sections."""

    items = "clips"
    validated = SECTION_METRICS

    def step(self, state: TrainState[Array], batch: Batch) -> tuple[TrainState[Array], Metrics]:
        return sft_step(
            state, batch, cfg=self.cfg, compute=self.compute, tx=self.tx, seed=self.seed
        )

    def measure(self, params: dict, batch: Batch) -> BatchSums:
        return measure_sections(params, batch, self.cfg, self.compute)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class CaDpo(Stage):
    """Stage 2, consistency-aware DPO on pairs of answers, against cached log pi_ref."""

    items = "pairs"
    validated = SECTION_METRICS + PAIR_METRICS

    preference: Preference

    def step(self, state: TrainState[Array], batch: Batch) -> tuple[TrainState[Array], Metrics]:
        return cadpo_step(
            state,
            batch,
            cfg=self.cfg,
            compute=self.compute,
            tx=self.tx,
            options=self.preference,
            seed=self.seed,
        )

    @property
    def reference_views(self) -> tuple[View, ...]:
        return self.preference.reference_views

    def measure(self, params: dict, batch: Batch) -> BatchSums:
        return measure_pairs(params, batch, self.cfg, self.compute)

    @property
    def beta(self) -> float:
        return self.preference.beta

    @property
    def warn_displacement(self) -> float:
        return self.preference.warn_displacement

    def reference_step(self, view: View) -> Callable[[dict, Batch], jax.Array]:
        log_probs = functools.partial(
            reference_log_probs, cfg=self.cfg, compute=self.compute, view=view
        )
        return jax.jit(log_probs, out_shardings=sharding.batch_sharding(self.mesh))

    def probe(self) -> Callable[[TrainState[Array], Batch], Metrics]:
        probe = functools.partial(cadpo_probe, cfg=self.cfg, compute=self.compute)
        return jax.jit(
            lambda state, batch: probe(state.params, batch),
            out_shardings=sharding.replicated(self.mesh),
        )

    def read_pairs(self, config: ConfigDict) -> list[Pair]:
        return checked_pairs(config, self.preference)


def checked_pairs(config: ConfigDict, options: Preference) -> list[Pair]:
    """The pairs of config.data.pairs, checked for the information that `options` need.

    Raises ValueError if it is missing, or if an option would have no effect on these pairs.
    """
    if config.data.withhold:
        raise ValueError(
            f"config.data.withhold={config.data.withhold} belongs to stage 1: the reference's "
            "log-probs are of whole clips. Set it to 0; config.loss.conditional_* withholds here."
        )
    pairs = read_pairs(config.data.pairs)
    needs = {
        "withheld": (options.needs_ignored, "conditional_ignored_only, invariance, sensitivity"),
        "kappa": (options.conflict_power > 0, "conflict_power"),
    }
    for key, (needed, who) in needs.items():
        lacking = [pair.clip_id for pair in pairs if getattr(pair, key) in ("", None)]
        if needed and lacking:
            raise ValueError(
                f"config.loss ({who}) needs {key!r} of every pair, but {len(lacking)} of "
                f"{len(pairs)} in {config.data.pairs} lack it, the first for {lacking[0]}. Mine "
                "them with python -m data_prep.preferences, add it, or unset the option."
            )
    idle = {
        f"conditional_{modality}": f"no pair ignored {modality}"
        for modality in options.conditional
        if options.conditional_ignored_only and all(p.withheld != modality for p in pairs)
    }
    if options.conflict_power and all(pair.kappa == 1 for pair in pairs):
        idle["conflict_power"] = "kappa is 1 everywhere"
    for name, why in idle.items():
        raise ValueError(
            f"config.loss.{name} would have no effect on {config.data.pairs}: {why}. Set it to 0."
        )
    return pairs


def build(config: ConfigDict, mesh: Mesh) -> Stage:
    """Everything about a run but its data and its values.

    Where config.steps is None, as the data decide, learning rates are those of a run of one step.
    """
    cfg, compute = network(config), _compute(config, mesh)
    sequence.check(mesh.shape, cfg.text, config.data)
    optimizer = optimizer_lib.OptimizerConfig(**config.optimizer)
    roles = flatten(saber.roles(cfg))
    tx = optimizer_lib.make_optimizer(optimizer, config.steps or 1, roles)
    patterns = tuple(config.trainable if cfg.lora is None else config.lora.trainable)
    state = _abstract_state(cfg, tx, patterns, mesh, config.compute.dtype)
    optimizer_lib.check_vocabulary(optimizer, state.trainable, roles)
    common = {
        "cfg": cfg,
        "compute": compute,
        "tx": tx,
        "seed": config.seed,
        "mesh": mesh,
        "trainable": patterns,
        "state": state,
        "batch": _abstract_batch(budget(config), _rows(config, mesh), mesh),
    }
    # The only place that checks the stage.
    if config.stage == "cadpo":
        return CaDpo(**common, preference=Preference(**config.loss))
    return Sed(**common)


def network(config: ConfigDict) -> SaberConfig:
    """The network's config, with adapters if config.lora.rank is set."""
    cfg = saber_config(config.model)
    if not config.lora.rank:
        return cfg
    lora = LoraConfig(
        rank=config.lora.rank,
        alpha=config.lora.alpha,
        targets=tuple(config.lora.targets),
        dropout=config.lora.dropout,
    )
    return dataclasses.replace(cfg, lora=lora)


def _compute(config: ConfigDict, mesh: Mesh) -> Compute:
    for name, known in (("dtype", DTYPES), ("remat", BY_MEMORY)):
        if (got := config.compute[name]) not in known:
            raise ValueError(
                f"config.compute.{name} must be one of {', '.join(known)}; got {got!r}."
            )
    by_hand = mesh.shape["tensor"] == 1
    return Compute(
        **{**config.compute, "kernel": _kernel(config.compute.kernel, mesh, by_hand=by_hand)},
        response=config.data.response,
        frame_patches=config.data.frame_patches,
        mesh=mesh if by_hand else None,
        one_vector=_copied(mesh) and not config.lora.rank and tuple(config.trainable) == ("*",),
    )


def _copied(mesh: Mesh) -> bool:
    """Whether each of several CPUs has all weights."""
    cpus = mesh.devices.flat[0].platform == "cpu"
    return cpus and mesh.size > 1 and mesh.shape["data"] == mesh.size


def _kernel(named: str, mesh: Mesh, *, by_hand: bool) -> Kernel:
    """The form of attention for the mesh's devices, which are here or only described.

    Raises ValueError for a name that is none, and for a kernel that cannot run on this mesh.
    """
    device = mesh.devices.flat[0]
    platform, fitting = device.platform, of_device(device.platform, device.device_kind)
    if named == "auto":
        return fitting if by_hand else "xla"
    known = [kernel for kernel in get_args(Kernel) if kernel not in WITHOUT_GRADIENT]
    if named not in known:
        names = ", ".join(map(repr, ("auto", *known)))
        raise ValueError(f"config.compute.kernel must be one of {names}; got {named!r}.")
    if PLATFORM.get(named, platform) != platform:
        raise ValueError(
            f"config.compute.kernel={named!r} does not run on this machine's devices, which are of "
            f"the platform {platform!r}. Set it to 'auto', which picks {fitting!r} here."
        )
    if not by_hand and named != "xla":
        raise ValueError(
            f"config.compute.kernel={named!r} needs config.mesh.tensor=1, got "
            f"{mesh.shape['tensor']}: a kernel is written for one device, and tensor "
            "parallelism is left to XLA. Set tensor to 1, or the kernel to 'auto'."
        )
    return cast("Kernel", named)


def budget(config: ConfigDict) -> Budget:
    """The static shape of one row."""
    return Budget(**{field.name: config.data[field.name] for field in dataclasses.fields(Budget)})


def _abstract_state(
    cfg: SaberConfig,
    tx: optax.GradientTransformation,
    patterns: tuple[str, ...],
    mesh: Mesh,
    dtype: str,
) -> TrainState[jax.ShapeDtypeStruct]:
    """Trainable weights are float32 masters. Frozen ones have the compute dtype, which gives the
    same results with half the memory."""
    params = _placed(saber.abstract(cfg), saber.shardings(cfg, mesh))
    trainable, frozen = partition(params, patterns)
    frozen = {
        name: jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(dtype), sharding=leaf.sharding)
        for name, leaf in frozen.items()
    }
    opt_shardings = optimizer_lib.optimizer_shardings(tx, trainable, _shardings(trainable), mesh)
    opt_state = _placed(jax.eval_shape(tx.init, trainable), opt_shardings)
    step = jax.ShapeDtypeStruct((), jnp.int32, sharding=sharding.replicated(mesh))
    return TrainState(step, trainable, frozen, opt_state)


def _rows(config: ConfigDict, mesh: Mesh) -> int:
    """Rows of a batch; raises ValueError if a microbatch does not divide over the devices."""
    rows, parts = sharding.batch_rows(config.data.batch_rows, mesh), config.compute.microbatches
    shares = sharding.shards(sharding.BATCH_AXES, mesh)
    if rows % (parts * shares):
        raise ValueError(
            f"config.data.batch_rows={config.data.batch_rows} must be a multiple of "
            f"config.compute.microbatches={parts} times the {shares} devices that rows are spread "
            f"over: {parts * shares}."
        )
    return rows


def _abstract_batch(row: Budget, rows: int, mesh: Mesh) -> Batch[jax.ShapeDtypeStruct]:
    one = empty(1, row)

    def abstract(array: np.ndarray, place: NamedSharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((rows, *array.shape[1:]), array.dtype, sharding=place)

    places = sharding.batch_shardings(one, mesh)
    return cast("Batch[jax.ShapeDtypeStruct]", jax.tree.map(abstract, one, places))


def _placed(tree, shardings):
    return jax.tree.map(
        lambda leaf, s: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=s), tree, shardings
    )


def _shardings(tree):
    return jax.tree.map(lambda leaf: leaf.sharding, tree)
