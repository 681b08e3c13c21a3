"""Choose a run's attention, packing and loss. Only what the proof has shown is relied on."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from sftdata.errors import UsageError
from sfttrain.attention import ASKED, FLATTENED, Choice, takes_no_mask
from sfttrain.config import TrainConfig
from sfttrain.forward import depends_on_row_length, text_config
from sfttrain.pictures import PictureInputs
from sfttrain.process import Say, reason_of
from sfttrain.proofs import Proof, Surroundings, prove, remembered

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_COMPILED = "flex_attention"  # seconds to compile, so tried only where masks can help


@dataclass(frozen=True, slots=True)
class Plan:
    """What was decided.

    Attributes:
        attention: implementation.
        flatten: whether batches are one row with cumulative lengths.
        unpack: whether every document is trained alone.
        loss: engine of the fused loss, or None for the model's own.
        boundaries: whether batches say where documents end.
        restart: whether rotary factors follow the length of each document, which padding must not lengthen.
        terms: whether the model adds terms of its own to the cross entropy.
        unreached: modules that text gives no gradient.
        pictures: those of the sets; None where they are of text.
    """

    attention: str
    flatten: bool
    unpack: bool
    loss: str | None
    boundaries: bool = False
    restart: bool = False
    terms: bool = False
    unreached: tuple[str, ...] = ()
    pictures: PictureInputs | None = None


def choose_path(
    config: TrainConfig, model_config: PreTrainedConfig, choice: Choice, where: Surroundings, say: Say
) -> Plan:
    """Try packing and the chunked loss on the architecture at tiny size, one attention after the other.

    Raises:
        UsageError: packing would leak and `packing=require`, the attention or loss asked for cannot be used
            on this model, or the model is none that is trained left to right.
    """
    search = _Search(config, model_config, where, say)
    for name in (choice.name, *choice.others):
        plan = search.packed(name)
        if plan is not None:
            return plan
    asked = choice.name if not choice.others and choice.reason == ASKED else None
    return search.unpacked(asked)


class _Search:
    """The proofs so far, and why each attention was rejected."""

    def __init__(
        self, config: TrainConfig, model_config: PreTrainedConfig, where: Surroundings, say: Say
    ) -> None:
        self._config, self._model_config, self._where, self._say = config, model_config, where, say
        self._family = model_config.model_type
        self._proofs: dict[str, Proof] = {}
        self._before: set[str] = set()  # proven by an earlier run
        self._rejected: dict[str, str] = {}
        self._failure: Exception | None = None

    def packed(self, name: str) -> Plan | None:
        """Return the plan with this attention, if it keeps packed documents apart or need not."""
        if name == _COMPILED and any(not proof.apart for proof in self._proofs.values()):
            return None  # the architecture leaks, whatever the attention
        maskless = takes_no_mask(name, self._model_config, self._where.device, self._where.compute)
        proof = self._prove(name, packed=not maskless)
        if proof is None:
            return None
        if maskless:
            self._rejected[name] = f"{name} takes no mask"
            return None
        if not proof.isolated:
            self._rejected[name] = _leak_text(self._family, name, proof)
            return None
        if self._config.packing == "unpack":
            return self._plan(name, proof, unpack=True) if name in FLATTENED else None
        for failed, reason in self._rejected.items():
            self._say(f"attention: {name} instead of {failed} ({reason})")
        when = "before (prove_again=true proves anew), " if name in self._before else ""
        found = f"packed = alone within {proof.difference:.1e} ({name})"
        self._say(f"packing: proven {when}on a tiny {self._family}: {found}")
        return self._plan(name, proof, unpack=False)

    def unpacked(self, asked: str | None) -> Plan:
        """Return the plan with one document a row, by an attention that takes padded rows."""
        reason, width = self._reason(), self._config.sequence_parallel
        if width > 1:
            raise UsageError(f"sequence_parallel={width}: {reason}.", "leave it out.") from self._failure
        if self._config.packing == "require":
            fix = (
                "set attention=auto, or packing=auto."
                if asked
                else "set packing=auto to train documents one by one."
            )
            raise UsageError(f"packing=require: {reason}.", fix) from self._failure
        if asked in FLATTENED:
            raise UsageError(f"attention={asked}: {reason}.", "set attention=auto.") from self._failure
        if self._config.packing != "unpack":
            when = "; so it was proven before (prove_again=true proves anew)" if self._before else ""
            self._say(f"packing: {reason}{when}; every document is trained in a row of its own")
        name = next((name for name in self._proofs if name not in FLATTENED), None)
        if name is None:
            return self._unproven(asked or "eager")
        proof = self._proofs[name]
        if not proof.pads:
            self._refuse_padding(proof)
        return self._plan(name, proof, unpack=True)

    def _prove(self, name: str, packed: bool) -> Proof | None:
        where = self._where
        try:
            proof, before = remembered(
                self._model_config,
                {"attention": name, "packed": packed, **asdict(where)},
                Proof,
                lambda: prove(self._model_config, name, where, self._config.trust_remote_code, packed),
                self._config.prove_again,
            )
        except Exception as error:  # whatever a foreign model raises: what cannot be shown is not relied on
            self._failure = self._failure or error
            self._rejected[name] = f"it could not be tried on this architecture ({reason_of(error)})"
            return None
        if not proof.causal:
            found = (
                f"{self._family}: each token sees those behind it, so it would be trained on its own answer"
            )
            fix = "name a model that is trained left to right (is_decoder=true in its config)."
            raise UsageError(f"{found}.", fix)
        self._proofs[name] = proof
        if before:
            self._before.add(name)
        return proof

    def _plan(self, name: str, proof: Proof, unpack: bool) -> Plan:
        engine = self._loss_engine(proof)
        self._say_terms(proof, engine)
        restart = depends_on_row_length(self._model_config, self._where.reach)
        flatten = name in FLATTENED
        boundaries = proof.boundaries and (flatten or not unpack)
        more = proof.terms, proof.unreached, self._where.pictures
        return Plan(name, flatten, unpack, engine, boundaries, restart, *more)

    def _unproven(self, name: str) -> Plan:
        """Nothing could be tried: the model's own loss on rows of one document.

        Raises:
            UsageError: the run asks for more than that; pictures always do.
        """
        if self._where.pictures is not None:
            fix = "train a model of the family that the set was prepared for, with its versions of packages."
            raise UsageError(f"pictures: {self._reason()}.", fix) from self._failure
        for setting, usual in (("objective", ("nll",)), ("loss", ("auto", "plain"))):
            value = getattr(self._config, setting)
            if value not in usual:
                what = f"{setting}={value}: {self._reason()}."
                raise UsageError(what, f"set {setting}={usual[0]}.") from self._failure
        return Plan(name, False, True, None)

    def _reason(self) -> str:
        found = dict.fromkeys(self._rejected.values())
        return (
            "; ".join(found).replace("it could not be tried", "could not be tried", 1)
            if found
            else "unpacked as asked"
        )

    def _refuse_padding(self, proof: Proof) -> None:
        if self._where.rows == 1:
            raise UsageError(
                f"{self._family}: it counts positions otherwise than from 0 "
                f"(logits move by {proof.padded:.1e})."
            )
        found = f"{self._family}: rows of several lengths in a batch change each other "
        found += f"(logits move by {proof.padded:.1e})"
        fix = (
            "set per_device_train_batch_size=1, per_device_eval_batch_size=1 "
            "and gradient_accumulation_steps instead."
        )
        raise UsageError(f"{found}.", fix)

    def _loss_engine(self, proof: Proof) -> str | None:
        config = self._config
        if config.loss == "plain":
            return None
        if proof.fuses:
            return "torch" if config.loss == "torch" else "chunked"
        reason = f"{self._family} has a head that does more than the chunked loss knows"
        if config.objective != "nll":
            raise UsageError(f"objective={config.objective}: {reason}.", "set objective=nll.")
        if config.loss != "auto":
            raise UsageError(f"loss={config.loss}: {reason}.", "set loss=auto.")
        self._say(f"loss: the model's own, with full logits ({reason})")
        return None

    def _say_terms(self, proof: Proof, engine: str | None) -> None:
        text = text_config(self._model_config)
        weight = getattr(text, "router_aux_loss_coef", None) or 0
        if proof.terms:
            prefix = f"router loss: on, {weight:g} times" if weight else "loss: with terms of"
            self._say(f"{prefix} the model's own, the mean over the micro-batches of a step")
        elif weight and hasattr(text, "output_router_logits"):
            switch = "--set model_init_kwargs.output_router_logits=true turns it on"
            self._say(f"router loss: off, as the model's config says ({switch})")


def _leak_text(family: str, attention: str, proof: Proof) -> str:
    if proof.apart:
        return f"{attention} rounds {proof.rounding:.1f} times as much as plain attention does in this dtype"
    by = max(proof.difference, proof.leak)
    return f"{family} with {attention} leaks between packed documents (logits move by {by:.1e})"
