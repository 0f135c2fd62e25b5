"""CA-DPO: the paper's loss, and every option as one term.

Notation: c is a clip with its prompt, c~m the same clip with modality m withheld, c~ with both;
y_w the chosen and y_l the rejected response, both with their end token; kappa in [0, 1] how
strongly the modalities of c disagree. Log-probabilities are sums over response tokens, in nats.

    rho(y|c) = log pi_theta(y|c) - log pi_ref(y|c)        Delta = rho(y_w|c) - rho(y_l|c)
    l(c)     = log pi(y_w|c) - log pi(y_l|c)

The paper's form is -log sigmoid(beta Delta), the mean over pairs whose modalities conflict.

Axis letters: B rows, P pairs of a row.
"""

import dataclasses
from collections.abc import Mapping
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from saber_jax.data.conflicts import IGNORED
from saber_jax.data.withhold import MODALITIES, Modality, View

Form = Literal["sigmoid", "robust", "ipo", "hinge"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preference:
    """config.loss of stage 2; the defaults are the paper's form. Each option is a term below, but
    for `warn_displacement`: validation warns when log pi of the chosen answers has fallen by more
    nats per token; 0 is never.

    Raises ValueError for an option that is set but would have no effect.
    """

    beta: float = 0.1
    form: Form = "sigmoid"
    label_smoothing: float = 0.0
    margin: float = 0.0
    conflict_power: float = 0.0
    length_alpha: float = 1.0
    sft: float = 0.0
    anchor: float = 0.0
    conditional_audio: float = 0.0
    conditional_video: float = 0.0
    conditional_ignored_only: bool = False
    invariance: float = 0.0
    sensitivity: float = 0.0
    text_prior: float = 0.0
    warn_displacement: float = 0.5

    def __post_init__(self):
        if self.form not in get_args(Form):
            raise ValueError(f"config.loss.form is {self.form!r}; choose from {get_args(Form)}.")
        if self.beta <= 0:
            raise ValueError(f"config.loss.beta must be positive, got {self.beta}.")
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(
                "config.loss.label_smoothing is the share of pairs whose labels are swapped, from "
                f"0 to below 0.5; got {self.label_smoothing}."
            )
        if not 0 <= self.length_alpha <= 1:
            raise ValueError(
                f"config.loss.length_alpha must be in [0, 1], got {self.length_alpha}."
            )
        for name, effective, why in self._effects():
            default = type(self).__dataclass_fields__[name].default
            if getattr(self, name) != default and not effective:
                raise ValueError(
                    f"config.loss.{name}={getattr(self, name)!r} would have no effect: {why}. "
                    f"Set it back to {default!r}, or change what it needs."
                )

    def _effects(self) -> tuple[tuple[str, bool, str], ...]:
        logistic = self.form != "ipo"
        ipo = "the ipo form regresses per-token averages and has no such term"
        conditional = self.conditional_audio or self.conditional_video
        return (
            (
                "label_smoothing",
                self.form in ("sigmoid", "robust"),
                f"the {self.form} form does not smooth labels",
            ),
            (
                "form",
                self.form != "robust" or self.label_smoothing > 0,
                "robust without label_smoothing is sigmoid",
            ),
            ("margin", logistic, ipo),
            ("invariance", logistic, ipo),
            ("sensitivity", logistic, ipo),
            ("text_prior", logistic, ipo),
            (
                "conditional_ignored_only",
                bool(conditional),
                "neither conditional_audio nor conditional_video is set",
            ),
        )

    @property
    def conditional(self) -> dict[Modality, float]:
        """The conditional terms that are on, with their weights."""
        weights: dict[Modality, float] = {
            "audio": self.conditional_audio,
            "video": self.conditional_video,
        }
        return {modality: weight for modality, weight in weights.items() if weight}

    @property
    def decoupled(self) -> bool:
        """Whether MoD-DPO's terms are on, which score both responses with a modality withheld."""
        return bool(self.invariance or self.sensitivity)

    @property
    def policy_views(self) -> tuple[Modality, ...]:
        """The modalities that a step withholds from the policy, with one forward pass each."""
        return MODALITIES if self.decoupled else tuple(self.conditional)

    @property
    def reference_views(self) -> tuple[View, ...]:
        """The views that the reference cache needs."""
        prior: tuple[View, ...] = ("both",) if self.text_prior else ()
        return ("whole", *self.conditional, *prior)

    @property
    def needs_ignored(self) -> bool:
        """Whether pairs need the modality that was withheld for their rejected response."""
        return self.conditional_ignored_only or self.decoupled


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class ChosenRejected:
    """log pi of the chosen and of the rejected response."""

    chosen: Float[Array, "B P"]
    rejected: Float[Array, "B P"]

    @property
    def difference(self) -> Float[Array, "B P"]:
        """l(c)."""
        return self.chosen - self.rejected

    def __sub__(self, other: "ChosenRejected") -> "ChosenRejected":
        return ChosenRejected(
            chosen=self.chosen - other.chosen, rejected=self.rejected - other.rejected
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class PairData:
    """Data of each pair besides its log-probabilities.

    `lengths` counts tokens; `ignored` indexes IGNORED; `chosen_nll` is -log pi_theta(y_w|c) of all
    tokens alike, whatever `length_alpha` says.
    """

    kappa: Float[Array, "B P"]
    ignored: Int[Array, "B P"]
    lengths: ChosenRejected
    chosen_nll: Float[Array, "B P"]


def cadpo_loss(
    policy: Mapping[View, ChosenRejected],
    reference: Mapping[View, ChosenRejected],
    pairs: PairData,
    options: Preference,
) -> tuple[Float[Array, "B P"], dict[str, Float[Array, "B P"]]]:
    """The loss of each pair, and each of its terms that is on, before weights are applied.

    `policy` and `reference` map "whole", and every other view that `options` asks for, to scores.
    """
    rho = policy["whole"] - reference["whole"]
    terms = {"preference": preference(rho, policy, reference, pairs, options)}
    loss = conflict_weight(pairs.kappa, options.conflict_power) * terms["preference"]
    if options.sft:
        terms["sft"] = likelihood(pairs.chosen_nll, pairs.lengths.chosen)
        loss += options.sft * terms["sft"]
    if options.anchor:
        terms["anchor"] = anchor(rho.chosen, options.beta)
        loss += options.anchor * terms["anchor"]
    for modality, weight in options.conditional.items():
        rho_without = policy[modality].chosen - reference[modality].chosen
        term = conditional(rho.chosen, rho_without, options.beta)
        if options.conditional_ignored_only:
            term = jnp.where(pairs.ignored == IGNORED.index(modality), term, 0.0)
        terms[f"conditional_{modality}"] = term
        loss += weight * term
    return loss, terms


def preference(
    rho: ChosenRejected,
    policy: Mapping[View, ChosenRejected],
    reference: Mapping[View, ChosenRejected],
    pairs: PairData,
    options: Preference,
) -> Float[Array, "B P"]:
    """The term that compares the two responses, in the form that `options` names."""
    if options.form == "ipo":
        return ipo(rho, pairs.lengths, options.beta)
    z = options.beta * rho.difference - options.margin
    if options.decoupled:
        z += decoupling(policy, pairs.ignored, options)
    if options.text_prior:
        z -= options.text_prior * reference["both"].difference
    if options.form == "hinge":
        return hinge(z)
    smoothed = robust if options.form == "robust" else sigmoid
    return smoothed(z, options.label_smoothing)


def sigmoid(z: Float[Array, "B P"], label_smoothing: float) -> Float[Array, "B P"]:
    """-log sigmoid(z), eq. 7 of DPO (https://arxiv.org/abs/2305.18290) for z = beta Delta.

    With label smoothing e it is cDPO (https://ericmitchell.ai/cdpo.pdf), which expects a
    share e of the labels to be swapped: -(1 - e) log sigmoid(z) - e log sigmoid(-z).
    """
    loss = -jax.nn.log_sigmoid(z)
    # log sigmoid(-z) = log sigmoid(z) - z.
    return loss + label_smoothing * z if label_smoothing else loss


def robust(z: Float[Array, "B P"], label_smoothing: float) -> Float[Array, "B P"]:
    """rDPO, https://arxiv.org/abs/2403.00409: unbiased although a share e is swapped.

    (-(1 - e) log sigmoid(z) + e log sigmoid(-z)) / (1 - 2 e)
    """
    e = label_smoothing
    return (-(1 - e) * jax.nn.log_sigmoid(z) + e * jax.nn.log_sigmoid(-z)) / (1 - 2 * e)


def ipo(rho: ChosenRejected, lengths: ChosenRejected, beta: float) -> Float[Array, "B P"]:
    """IPO, eq. 17 of https://arxiv.org/abs/2310.12036 with tau = beta, on per-token averages.

    (rho(y_w)/|y_w| - rho(y_l)/|y_l| - 1/(2 beta))^2. The paper's equation has sums, whose scale
    grows with length; averages are what its authors say they ran, and what TRL computes.
    """
    chosen = rho.chosen / jnp.maximum(lengths.chosen, 1)
    rejected = rho.rejected / jnp.maximum(lengths.rejected, 1)
    return (chosen - rejected - 1 / (2 * beta)) ** 2


def hinge(z: Float[Array, "B P"]) -> Float[Array, "B P"]:
    """max(0, 1 - z): SLiC's loss on DPO's margin, https://arxiv.org/abs/2309.06657."""
    return jnp.maximum(0.0, 1.0 - z)


def conflict_weight(kappa: Float[Array, "B P"], power: float) -> Float[Array, "B P"]:
    """w(kappa) = kappa^power, ours: the more the modalities disagree, the more a pair counts.

    Power 0 is the paper's form, in which every conflicting clip counts alike.
    """
    return kappa**power if power else jnp.ones_like(kappa)


def likelihood(
    chosen_nll: Float[Array, "B P"], chosen_lengths: Float[Array, "B P"]
) -> Float[Array, "B P"]:
    """-log pi_theta(y_w|c) / |y_w|, RPO's likelihood of the chosen response per token
    (https://arxiv.org/abs/2404.19733, https://arxiv.org/abs/2405.16436).

    A mean over each response's tokens and then over pairs. TRL's `rpo_alpha` takes one mean over
    the tokens of all pairs of a microbatch, in which long responses count for more; of a single
    pair both are the same.
    """
    return chosen_nll / jnp.maximum(chosen_lengths, 1)


def conditional(
    rho_chosen: Float[Array, "B P"], rho_without: Float[Array, "B P"], beta: float
) -> Float[Array, "B P"]:
    """-log sigmoid(beta (rho(y_w|c) - rho(y_w|c~m))): y_w has to need the modality m.

    mDPO's conditional term (https://arxiv.org/abs/2406.11839, after its official code); once per
    modality it is OmniDPO's (https://arxiv.org/abs/2509.00723), and only for the modality that an
    example is about, here the one that the rejected response ignored, AVEm-DPO's
    (https://arxiv.org/abs/2602.07054).

    Only mDPO's was read from its authors. OmniDPO's is from the paper's abstract, which gives no
    weights, and AVEm-DPO's from a third party's notes on the paper.
    """
    return -jax.nn.log_sigmoid(beta * (rho_chosen - rho_without))


def anchor(rho_chosen: Float[Array, "B P"], beta: float) -> Float[Array, "B P"]:
    """-log sigmoid(beta rho(y_w|c)), mDPO's anchor (https://arxiv.org/abs/2406.11839).

    Delta can grow while both responses become less likely; this holds the chosen one up.
    """
    return -jax.nn.log_sigmoid(beta * rho_chosen)


def decoupling(
    policy: Mapping[View, ChosenRejected], ignored: Int[Array, "B P"], options: Preference
) -> Float[Array, "B P"]:
    """MoD-DPO's addition to beta Delta (https://arxiv.org/abs/2603.03192), sg = stop-gradient:

        invariance  (l_theta(c) - sg l_theta(c~followed))
      - sensitivity (l_theta(c) - sg l_theta(c~ignored))

    It is the reward that the closed form implies when the policy is also pulled towards itself
    without the modality that should not decide, and pushed away from itself without the one that
    should. For a CA-DPO pair the first is the modality that the rejected response followed, the
    second the one that it ignored. A pair that names neither gets 0. `text_prior` (MoD-DPO++ and
    AVEm-DPO) subtracts what the reference says of the two responses with both withheld.

    The formulas of both papers are those of third parties, a re-implementation (MoD-DPO) and notes
    (AVEm-DPO); the papers' own equations were not seen. Check them before you compare numbers.
    """
    here = policy["whole"].difference
    without = {m: jax.lax.stop_gradient(policy[m].difference) for m in MODALITIES}
    audio_ignored = ignored == IGNORED.index("audio")
    of_ignored = jnp.where(audio_ignored, without["audio"], without["video"])
    of_followed = jnp.where(audio_ignored, without["video"], without["audio"])
    change = options.invariance * (here - of_followed) - options.sensitivity * (here - of_ignored)
    return jnp.where(ignored > 0, change, 0.0)
