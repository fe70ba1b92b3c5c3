"""What the command line, a recipe step and the Python function can ask of pruning: one model.

Exactly one target. What "fraction removed" (--sparsity) counts depends on the method: `SPARSITY`
says it in one place.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from surgeon.errors import UsageError, close_matches, wrong_options

METHODS = {
    "ziplm": "structured OBS: heads, FFN channels and layers, weights re-solved; to a speedup, size or share",
    "width": "heads and FFN channels by a criterion (--criterion)",
    "depth": "whole layers by a criterion (--criterion)",
    "lapp": "learned thresholds per layer under a budget (LAPP-style); needs training steps",
    "sparsegpt": "single weights by second-order information; no speedup in servers",
    "wanda": "single weights by |weight| times input norm; no speedup in servers",
    "magnitude": "single weights by |weight|; no speedup in servers",
}
"""Method -> one line."""

STRUCTURED = ("ziplm", "width", "depth", "lapp")
SPARSE = ("sparsegpt", "wanda", "magnitude")

SPARSITY = {
    "ziplm": "parameters of attention and FFN that go, over all layers",
    "width": "heads and channels that go, the same share in every layer",
    "depth": "layers that go",
    "lapp": "parameters of attention and FFN that go, over all layers",
    "sparsegpt": "weights of the linear layers that become zero",
    "wanda": "weights of the linear layers that become zero",
    "magnitude": "weights of the linear layers that become zero",
}
"""What --sparsity is a fraction of."""

CRITERIA = {
    "depth": ("nmse", "block_influence", "uniform"),
    "width": ("flap", "minitron", "wanda", "magnitude", "random", "ziplm"),
}
"""Method -> its criteria, the default first."""

OPTIONS = {
    "layout": ("ziplm", "width", "lapp"), "round_to": ("ziplm", "width", "lapp"), "structures": ("ziplm", "width", "lapp"),
    "sequential": ("ziplm",), "damp": ("ziplm", "width", "sparsegpt"), "owl": ("sparsegpt", "wanda"),
    "train": ("lapp",), "bypass_rank": ("lapp",), "search": ("ziplm", "width"), "search_budget": ("ziplm", "width"),
    "distill": ("ziplm", "width", "depth"), "nested": ("ziplm", "width"),
    "allow_norm_approx": ("ziplm", "width", "lapp"), "protect_layers": STRUCTURED,
}  # fmt: skip
"""Option -> methods that know it; what is not here, all know."""

OF_SPEEDUP = frozenset(
    {
        "mode",
        "batch",
        "context",
        "generate",
        "latency_table",
        "table_anyway",
        "tolerance",
        "measure",
    }
)
OF_TRAINING = frozenset({"distill_steps", "distill_batch", "distill_length", "learning_rate"})

TARGETS = ("target_speedup", "target_params", "target_size", "sparsity", "keep_layers", "pattern")


@dataclass(frozen=True)
class Target:
    """What a result has to reach.

    Attributes:
        kind: "speedup", "params", "size", "sparsity", "layers" or "pattern".
        value: a factor, a number, bytes, a fraction, or layers kept; 0 for a pattern.
        pattern: N:M, where that is the target.
    """

    kind: str
    value: float
    pattern: str = ""

    @property
    def name(self) -> str:
        """How a member of a family is called: "speedup=1.5"."""
        # Every digit counts: two members must never share a folder.
        shown = self.pattern or (f"{self.value:.12g}" if self.value < 1e6 else f"{self.value / 1e6:.12g}M")
        return f"{self.kind}={shown}"


class PruneRequest(BaseModel):
    """Options of ``surgeon prune``; every field is the option with underscores."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str
    method: str = "ziplm"
    criterion: str | None = None
    target_speedup: tuple[float, ...] = ()
    target_params: tuple[float, ...] = ()
    target_size: tuple[float, ...] = ()
    sparsity: tuple[float, ...] = ()
    keep_layers: tuple[int, ...] = ()
    pattern: str | None = None
    structures: tuple[Literal["heads", "ffn", "layers", "hidden"], ...] | None = None
    layout: Literal["uniform", "per-layer"] = "uniform"
    round_to: int | Literal["auto"] = "auto"
    protect_layers: tuple[int, ...] = ()
    search: Literal["spdy", "dp"] = "spdy"
    search_budget: float = Field(default=10.0, gt=0)
    sequential: bool = False
    damp: float = Field(default=1e-2, gt=0, le=1)
    allow_norm_approx: bool = False
    owl: bool = False
    mode: Literal["mix", "prefill", "decode"] | None = None
    batch: int = Field(default=1, ge=1)
    context: int = Field(default=512, ge=1)
    generate: int = Field(default=128, ge=1)
    tolerance: float = Field(default=0.03, gt=0, le=0.5)
    latency_table: str | None = None
    table_anyway: bool = False
    measure: bool = True
    calibration: tuple[str, ...] = ()
    samples: int = Field(default=128, ge=1)
    sequence_length: int = Field(default=2048, ge=2)
    calibration_dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    distill: bool = False
    distill_steps: int = Field(default=1000, ge=1)
    distill_batch: int = Field(default=8, ge=1)
    distill_length: int = Field(default=512, ge=2)
    learning_rate: float = Field(default=8e-5, gt=0)
    train: Literal["thresholds", "full"] = "thresholds"
    bypass_rank: int = Field(default=0, ge=0)
    nested: bool = False
    dtype: Literal["float32", "float16", "bfloat16"] | None = None
    max_shard_size: int = 5_000_000_000
    device: str = "auto"
    threads: int | None = Field(default=None, ge=1)
    memory_limit: int | None = Field(default=None, ge=1)
    seed: int = 0
    offline: bool = False
    dequantize: bool = False
    work: str | None = None

    @property
    def targets(self) -> tuple[Target, ...]:
        """The targets in the order of a family: weakest cut first."""
        found = [
            *(Target("speedup", v) for v in sorted(self.target_speedup)),
            *(Target("params", v) for v in sorted(self.target_params, reverse=True)),
            *(Target("size", v) for v in sorted(self.target_size, reverse=True)),
            *(Target("sparsity", v) for v in sorted(self.sparsity)),
            *(Target("layers", v) for v in sorted(self.keep_layers, reverse=True)),
        ]
        if self.pattern:
            found = [Target("pattern", 0.0, self.pattern)]
        return tuple(dict.fromkeys(found))

    @property
    def solver(self) -> str:
        """Name of the criterion that ranks units or layers."""
        if self.criterion:
            return self.criterion
        return CRITERIA[self.method][0] if self.method in CRITERIA else self.method

    def checked(self) -> PruneRequest:
        """Refuse what does not go together.

        Raises:
            UsageError: E265 method or criterion, E266 target, E267 an option without effect.
        """
        if self.method not in METHODS:
            raise unknown_method(self.method)
        self._check_criterion()
        self._check_target()
        self._check_options()
        return self

    def _check_criterion(self) -> None:
        if self.criterion is None:
            return
        allowed = CRITERIA.get(self.method)
        if allowed is None:
            raise UsageError(
                "E265", f"{self.method} has no --criterion", help="--method width or --method depth"
            )
        if self.criterion not in allowed:
            near = close_matches(self.criterion, allowed)
            raise UsageError("E265", f'unknown criterion "{_shown(self.criterion)}" of {self.method}',
                             help=(near + " " if near else "") + "one of: " + ", ".join(allowed))  # fmt: skip

    def _check_target(self) -> None:
        given = [name for name in TARGETS if getattr(self, name)]
        if len(given) != 1:
            said = ", ".join("--" + name.replace("_", "-") for name in given) or "none"
            raise UsageError("E266", f"pruning needs one kind of target, {said} given",
                             help="one of --target-speedup 1.5, --target-params 3B, --target-size 6GB, --sparsity 0.25, --pattern 2:4 and --keep-layers 24")  # fmt: skip
        for value in self.target_speedup:
            if not 1 < value < 1000:
                raise UsageError("E266", f"--target-speedup {value:g} is not above 1", help="1.5 makes the model take two thirds of the time")  # fmt: skip
        for value in self.sparsity:
            if not 0 < value < 1:
                raise UsageError("E266", f"--sparsity {value:g} is not between 0 and 1",
                                 help=f"it is the fraction removed: of {SPARSITY[self.method]}")  # fmt: skip
        for value in (*self.target_params, *self.target_size, *self.keep_layers):
            if not 1 <= value < math.inf:
                raise UsageError(
                    "E266", f"a target of {value:g} is no size", help="a number above 0, such as 3B or 6GB"
                )
        if self.method in SPARSE and given[0] not in ("sparsity", "pattern"):
            option = "--" + given[0].replace("_", "-")
            raise UsageError("E266", f"{self.method} sets weights to zero and leaves every shape as it is: {option} cannot be reached",
                             help="--sparsity or --pattern; for speed or size: --method ziplm or depth")  # fmt: skip
        if self.pattern is not None:
            if self.method not in SPARSE:
                raise UsageError("E266", f"--pattern is for {', '.join(SPARSE)}, not {self.method}", help="choose one of them with --method")  # fmt: skip
            if not re.fullmatch(r"[1-9]\d?:[1-9]\d?", self.pattern):
                raise UsageError("E266", f'--pattern "{_shown(self.pattern)}" is not N:M', help="2:4 makes two of each four zero")  # fmt: skip
        if self.keep_layers and self.method not in ("depth",):
            raise UsageError("E266", f"--keep-layers is for --method depth, not {self.method}", help="add --method depth")  # fmt: skip
        if self.method in SPARSE and len(self.targets) > 1:
            raise UsageError("E266", f"{self.method} makes one model at a time", help="give one --sparsity")

    def _check_options(self) -> None:
        default = type(self).model_fields
        changed = {name for name in default if getattr(self, name) != default[name].default}
        for name, methods in OPTIONS.items():
            if name in changed and self.method not in methods:
                raise UsageError("E267", f"--{_dashed(name)} has no effect on {self.method}",
                                 help=f"it belongs to {', '.join(methods)}")  # fmt: skip
        if self.method == "lapp" and self.layout == "uniform":
            raise UsageError("E272", "lapp learns a threshold for every layer, so layers end with sizes of their own",
                             help="add --layout per-layer, or use --method ziplm")  # fmt: skip
        for name in sorted(changed & OF_SPEEDUP) if not self.target_speedup else ():
            option = "--no-measure" if name == "measure" else f"--{_dashed(name)}"
            raise UsageError("E267", f"{option} has no effect without --target-speedup", help="leave it out")
        trains = self.distill or self.method == "lapp"
        for name in sorted(changed & OF_TRAINING) if not trains else ():
            raise UsageError(
                "E267", f"--{_dashed(name)} has no effect without --distill", help="add --distill"
            )
        self._check_structures()
        self._check_families()

    def _check_structures(self) -> None:
        structures, shares = self.structures, self.method == "width" and bool(self.sparsity)
        if structures is not None and not set(structures) & {"heads", "ffn", "hidden"}:
            raise UsageError("E267", f"--method {self.method} cuts heads and FFN channels, and --structures names neither",
                             help="add ffn; to drop layers alone: --method depth")  # fmt: skip
        if "hidden" in (structures or ()) and (self.solver != "minitron" or not shares):
            raise UsageError("E267", "the hidden size is only cut by --method width --criterion minitron --sparsity",
                             help="leave hidden out of --structures")  # fmt: skip
        if shares and ("layers" in (structures or ()) or self.layout == "per-layer"):
            option = "--layout per-layer" if self.layout == "per-layer" else "layers in --structures"
            raise UsageError("E267", f"{option} has no effect here: width --sparsity takes the same share of every layer",
                             help="--target-params or --target-speedup chooses; or leave it out")  # fmt: skip
        if self.protect_layers and self.method != "depth" and self.layout == "uniform":
            raise UsageError("E267", "--protect-layers cannot be kept in a uniform layout: all layers shrink alike",
                             help="--layout per-layer, or --method depth")  # fmt: skip

    def _check_families(self) -> None:
        several = len(self.targets) > 1
        if self.nested and (not several or self.layout != "uniform" or self.distill):
            raise UsageError("E267", "--nested needs two or more targets, the uniform layout and no --distill",
                             help="a nested family: --target-speedup 1.3,1.6,2 --nested")  # fmt: skip
        if self.distill and several and self.layout == "per-layer":
            raise UsageError("E267", "--distill makes each member of a family from the one before, which --layout per-layer cannot take up",
                             help="one target at a time, or --layout uniform")  # fmt: skip

    def work_folder(self, destination: Path) -> Path:
        """Return where rankings, Hessians and candidates lie: a folder of its own in --work, or in OUT.work."""
        place = destination.absolute().parent / f"{destination.name}.work"
        return (Path(self.work).expanduser().absolute() if self.work else place) / "prune"


def build(**values: Any) -> PruneRequest:
    """Return a checked request.

    Raises:
        UsageError: E265-E269.
    """
    for name in ("target_speedup", "target_params", "target_size", "sparsity", "keep_layers"):
        if isinstance(values.get(name), (int, float)):
            values[name] = (values[name],)
    if isinstance(values.get("criterion"), str):
        values["criterion"] = values["criterion"].replace("-", "_").lower()
    if isinstance(values.get("method"), str) and values["method"] not in METHODS:
        raise unknown_method(values["method"])
    try:
        return PruneRequest(**values).checked()
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"]) or "request"
        if first["type"] == "extra_forbidden" and _of_experts(name):
            raise UsageError("E267", f"--{_dashed(name)} has no effect on {values.get('method') or 'ziplm'}",
                             help="it belongs to the methods for mixtures of experts: surgeon methods prune") from None  # fmt: skip
        raise wrong_options(
            error.errors(), code="E268", verb="prune", known=PruneRequest.model_fields
        ) from None


def _dashed(name: str) -> str:
    return name.replace("_", "-")


def unknown_method(method: str) -> UsageError:
    """Return the error for a method that neither dense models nor mixtures of experts have."""
    from surgeon.prune.experts.request import METHODS as OF_EXPERTS

    near = close_matches(method, (*METHODS, *OF_EXPERTS))
    return UsageError("E265", f'unknown pruning method "{_shown(method)}"',
                      help=(near + " " if near else "") + "one of: " + ", ".join(METHODS) + "; of experts: " + ", ".join(OF_EXPERTS))  # fmt: skip


def _of_experts(name: str) -> bool:
    from surgeon.prune.experts.request import ExpertRequest

    return name in ExpertRequest.model_fields


def _shown(text: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in text)[:60]
