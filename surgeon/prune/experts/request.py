"""What the command line, a recipe step and the Python function can ask of pruning a mixture of experts."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from surgeon.errors import UsageError, close_matches, wrong_options
from surgeon.prune.request import Target

METHODS = {
    "reap": "whole experts by mean gated output norm (REAP): general use, the default of mixtures of experts",
    "easy-ep": "whole experts by gated output norm and how far each token moves (EASY-EP): few demonstrations of a domain",
    "frequency": "whole experts by how many tokens each is given",
    "gate-mass": "whole experts by summed routing weight",
    "ean": "whole experts by summed output norm",
    "rean": "whole experts by summed gated output norm",
    "man": "whole experts by mean output norm over routed tokens",
    "msan": "whole experts by mean squared output norm over routed tokens",
    "reap-l2": "whole experts by mean gated squared output norm",
    "router-norm": "whole experts by the norm of their router rows; needs no text",
    "router-distance": "whole experts by distance between router rows (STUN's first half); needs no text",
    "aimer": "whole experts by how flat their weights are (AIMER); needs no text",
    "random": "whole experts at random, seeded: the baseline",
    "naee": "whole experts by the best subset of each layer (NAEE); for few experts a layer",
    "stun": "router clusters, each kept as its most central expert (STUN)",
    "hc-smoe": "experts merged by clusters of their mean outputs (HC-SMoE)",
    "m-smoe": "experts merged into the most used by router agreement (M-SMoE)",
    "heapr": "channels of experts by second-order loss change (HEAPr); needs one backward pass",
}  # fmt: skip
"""Method -> one line."""

BY_SCORE = tuple(name for name in METHODS if name not in ("naee", "stun", "hc-smoe", "m-smoe", "heapr"))
MERGING = ("stun", "hc-smoe", "m-smoe")
WITHOUT_TEXT = ("router-norm", "router-distance", "aimer", "random")
"""Methods whose choice needs no text; super experts are then protected only where --calibration or --scores says which they are."""

CHANNELS = {
    "heapr": "mean a^2 times mean (dL/da)^2 over routed tokens",
    "heapr-all": "the same times the expert's share of tokens",
    "joint": "mean (a dL/da)^2 over routed tokens",
    "joint-all": "sum (a dL/da)^2 over all tokens",
    "magnitude": "mean a^2 times the squared norm of the down column; no gradient",
    "random": "seeded",
}
"""Criteria of heapr."""

SPARSITY = {name: "routed experts that go, in every layer" for name in METHODS} | {
    "heapr": "channels of routed experts that go"
}
"""What --sparsity is a fraction of."""

DEMONSTRATIONS, DEMONSTRATION_TOKENS = 25, 16_384
"""EASY-EP: few demonstrations, whole (arXiv 2504.06792, section 4)."""

TARGETS = ("keep_experts", "target_params", "target_size", "sparsity")

OPTIONS: dict[str, tuple[str, ...]] = {
    "criterion": ("heapr",), "scope": ("heapr",), "layout": ("heapr",), "round_to": ("heapr",),
    "router": MERGING, "mix": BY_SCORE, "domain_weight": BY_SCORE, "scores": BY_SCORE,
}  # fmt: skip
"""Option -> methods that know it; what is not here, all know."""


class ExpertRequest(BaseModel):
    """Options of ``surgeon prune`` on a mixture of experts; every field is the option with underscores."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str
    method: str = "reap"
    keep_experts: tuple[str, ...] = ()
    sparsity: tuple[float, ...] = ()
    target_params: tuple[float, ...] = ()
    target_size: tuple[float, ...] = ()
    criterion: str | None = None
    scope: Literal["global", "per-layer", "per-expert"] = "global"
    layout: Literal["uniform", "per-layer", "padded", "ragged"] = "uniform"
    round_to: int | Literal["auto"] = "auto"
    router: Literal["representative", "average", "mass"] | None = None
    mix: Literal["auto", "mean", "max", "pool"] = "auto"
    domain_weight: tuple[str, ...] = ()
    protect: tuple[str, ...] = ()
    no_protect: bool = False
    mtp: Literal["copy-last", "drop", "error"] = "copy-last"
    expert_record: str | None = None
    scores: str | None = None
    from_report: str | None = None
    calibration: tuple[str, ...] = ()
    samples: int | None = Field(default=None, ge=1)
    sequence_length: int | None = Field(default=None, ge=2)
    calibration_dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    dtype: Literal["float32", "float16", "bfloat16"] | None = None
    max_shard_size: int = 5_000_000_000
    device: str = "auto"
    threads: int | None = Field(default=None, ge=1)
    memory_limit: int | None = Field(default=None, ge=1)
    seed: int = 0
    offline: bool = False
    dequantize: bool = False
    work: str | None = None

    @field_validator("keep_experts", mode="before")
    @classmethod
    def _as_text(cls, value: Any) -> Any:
        values = value if isinstance(value, (list, tuple)) else (value,)
        return tuple(repr(one) if isinstance(one, (int, float)) else one for one in values)

    @property
    def targets(self) -> tuple[Target, ...]:
        """The targets in the order of a family: weakest cut first; experts kept are resolved when the model is known."""
        found = [
            *(Target("experts", 0.0, text.strip()) for text in self.keep_experts),
            *(Target("params", v) for v in sorted(self.target_params, reverse=True)),
            *(Target("size", v) for v in sorted(self.target_size, reverse=True)),
            *(Target("sparsity", v) for v in sorted(self.sparsity)),
        ]
        return tuple(dict.fromkeys(found))

    @property
    def samples_wanted(self) -> int:
        return self.samples or (DEMONSTRATIONS if self.method == "easy-ep" else 128)

    @property
    def tokens_wanted(self) -> int:
        return self.sequence_length or (DEMONSTRATION_TOKENS if self.method == "easy-ep" else 2048)

    @property
    def protected(self) -> dict[int, frozenset[int]]:
        """Layer -> experts the user protects."""
        return _places(self.protect, "--protect")

    @property
    def weights(self) -> dict[str, float]:
        """Domain -> weight."""
        found = {}
        for text in self.domain_weight:
            name, _, number = text.rpartition("=")
            try:
                found[name] = float(number)
            except ValueError:
                name = ""
            if not name or not 0 <= found[name] < float("inf"):
                raise UsageError("E258", f'--domain-weight "{text[:60]}"', help="NAME=WEIGHT, such as code=2")
        return found

    def checked(self) -> ExpertRequest:
        """Refuse what does not go together.

        Raises:
            UsageError: E258.
        """
        if self.method not in METHODS:
            near = close_matches(self.method, METHODS)
            raise UsageError("E258", f'unknown method for mixtures of experts "{self.method[:60]}"',
                             help=(near + " " if near else "") + "one of: " + ", ".join(METHODS))  # fmt: skip
        given = [name for name in TARGETS if getattr(self, name)]
        if self.from_report is not None:
            if given:
                raise UsageError("E258", f"--from-report says which experts stay, and {_option(given[0])} says it, too",
                                 help="give one of them")  # fmt: skip
        elif len(given) != 1:
            said = ", ".join(map(_option, given)) or "none"
            raise UsageError("E258", f"pruning experts needs one kind of target, {said} given",
                             help="--keep-experts 0.5, --keep-experts 64, --sparsity 0.25, --target-size 30GB or --target-params 20B")  # fmt: skip
        if self.method == "heapr" and self.keep_experts:
            raise UsageError("E258", "heapr narrows every expert and drops none: --keep-experts cannot be reached",
                             help="--sparsity 0.25; to drop experts: --method reap")  # fmt: skip
        for value in self.sparsity:
            if not 0 < value < 1:
                raise UsageError("E258", f"--sparsity {value:g} is not between 0 and 1",
                                 help=f"it is the fraction removed: of {SPARSITY[self.method]}")  # fmt: skip
        for value in (*self.target_params, *self.target_size):
            if not 1 <= value < float("inf"):
                raise UsageError(
                    "E258", f"a target of {value:g} is no size", help="a number such as 20B or 30GB"
                )
        self._check_options()
        _ = self.protected, self.weights
        return self

    def _check_options(self) -> None:
        fields = type(self).model_fields
        changed = {name for name in fields if getattr(self, name) != fields[name].default}
        for name, methods in OPTIONS.items():
            if name in changed and self.method not in methods:
                raise UsageError("E258", f"{_option(name)} has no effect on {self.method}",
                                 help=f"it belongs to {', '.join(methods[:4])}{', ...' if len(methods) > 4 else ''}")  # fmt: skip
        if self.criterion is not None and self.criterion not in CHANNELS:
            near = close_matches(self.criterion, CHANNELS)
            raise UsageError("E258", f'unknown criterion "{self.criterion[:60]}" of heapr',
                             help=(near + " " if near else "") + "one of: " + ", ".join(CHANNELS))  # fmt: skip
        if self.no_protect and self.protect:
            raise UsageError("E258", "--protect and --no-protect contradict each other", help="leave one out")
        if self.layout == "ragged" and len(self.targets) > 1:
            raise UsageError("E258", "a ragged layout is only evaluated, one target at a time", help="give one target")  # fmt: skip

    def work_folder(self, destination: Path) -> Path:
        """Return where statistics lie: a folder of its own in --work, or in OUT.work."""
        place = destination.absolute().parent / f"{destination.name}.work"
        return (Path(self.work).expanduser().absolute() if self.work else place) / "prune"


def kept_of(text: str, experts: int) -> int:
    """Return how many experts ``--keep-experts`` means: a whole number is a count, one with a dot or % a fraction.

    Raises:
        UsageError: E258.
    """
    text = text.strip()
    if re.fullmatch(r"\d{1,9}", text):
        value = int(text)
    elif found := re.fullmatch(r"(\d*\.\d+|\d+\.\d*|\d+(?:\.\d+)?%)", text):
        given = found[1]
        share = float(given[:-1]) / 100 if given.endswith("%") else float(given)
        value = round(share * experts) if 0 < share <= 1 else 0
    else:
        value = 0
    if not 1 <= value <= experts:
        raise UsageError("E258", f'--keep-experts is "{text[:40]}", and a layer has {experts}',
                         help=f"a count from 1 to {experts}, or a fraction such as 0.5 or 50%")  # fmt: skip
    return value


def build(**values: Any) -> ExpertRequest:
    """Return a checked request.

    Raises:
        UsageError: E258.
    """
    for name in ("target_params", "target_size", "sparsity"):
        if isinstance(values.get(name), (int, float)):
            values[name] = (values[name],)
    for name in ("method", "criterion"):
        if isinstance(values.get(name), str):
            values[name] = values[name].replace("_", "-").lower()
    try:
        return ExpertRequest(**values).checked()
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0]) if first["loc"] else "request"
        if first["type"] == "extra_forbidden":
            raise UsageError("E258", f"{_option(name)} has no effect on experts", help="it belongs to dense models, or to --method depth") from None  # fmt: skip
        raise wrong_options(
            error.errors(), code="E258", verb="prune", known=ExpertRequest.model_fields
        ) from None


def _places(texts: tuple[str, ...], option: str) -> dict[int, frozenset[int]]:
    found: dict[int, set[int]] = {}
    for part in (piece.strip() for text in texts for piece in text.split(",")):
        place = re.fullmatch(r"(\d{1,6}):(\d{1,6})", part)
        if place is None:
            raise UsageError(
                "E258", f'{option} "{part[:40]}" is no LAYER:EXPERT', help="such as 3:82, or 1:68,2:92"
            )
        found.setdefault(int(place[1]), set()).add(int(place[2]))
    return {layer: frozenset(ids) for layer, ids in found.items()}


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")
