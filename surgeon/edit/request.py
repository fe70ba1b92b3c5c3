"""What the command line, a recipe step and the Python function can ask of an edit."""

from __future__ import annotations

import math
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from surgeon.errors import UsageError, wrong_options

SUMMARIES = {
    "thinkedit": "takes the short-thinking direction out of the heads that write it: the model thinks longer",
    "project-out": "takes a direction out of chosen matrices",
    "steer": "shifts the residual stream behind one layer by a constant, baked as a bias, or as a control vector",
    "rice": "multiplies the contribution of the experts a model thinks with; an experiment",
}
"""Method -> one line."""
METHODS = tuple(SUMMARIES)

_ONLY: dict[str, tuple[str, ...]] = {
    "heads": ("thinkedit",), "heads_fraction": ("thinkedit",), "heads_count": ("thinkedit",),
    "matrices": ("project-out",), "layers": ("project-out",), "layer": ("project-out", "steer"),
    "strength": ("thinkedit", "project-out"), "project_bias": ("thinkedit", "project-out"),
    "markers": ("rice",), "beta": ("rice",), "experts_count": ("rice",), "scale_experts": ("rice",),
    "expert_record": ("rice",),
    "gamma": ("steer",), "kl_budget": ("steer",), "relabel": ("steer",), "control_vector": ("steer",),
}  # fmt: skip


class EditRequest(BaseModel):
    """Options of ``surgeon edit``; every field is the option with underscores."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    method: Literal["thinkedit", "project-out", "steer", "rice"]
    direction: str | None = None
    save_direction: str | None = None
    responses: str | None = None
    long: str | None = None
    short: str | None = None
    thresholds: tuple[int, int] = (1000, 100)
    site: Literal["attn", "mlp", "layer"] | None = None
    window: Literal["response", "last"] | None = None
    samples: int = Field(default=500, ge=1)
    sequence_length: int = Field(default=8192, ge=2)
    force: bool = False
    heads: tuple[str, ...] = ()
    heads_fraction: float | None = None
    heads_count: int | None = None
    strength: float | None = None
    project_bias: bool = False
    matrices: tuple[str, ...] = ()
    layer: int | None = None
    layers: tuple[int, int] | None = None
    gamma: float | None = None
    kl_budget: float | None = None
    relabel: Literal["auto", "never"] = "auto"
    control_vector: str | None = None
    markers: tuple[str, ...] = ()
    beta: float | None = None
    experts_count: int | None = None
    scale_experts: tuple[str, ...] = ()
    expert_record: str | None = None
    calibration: tuple[str, ...] = ()
    check: bool = True
    device: str = "auto"
    dtype: Literal["float32", "float16", "bfloat16"] | None = None
    max_shard_size: int = Field(default=5_000_000_000, ge=1)
    allow_nonfinite: bool = False
    dequantize: bool = False
    seed: int = 0
    offline: bool = False

    def checked(self) -> EditRequest:
        """Refuse what does not go together.

        Raises:
            UsageError: E295 no direction and nothing to make one from; E296 an option without effect, or two
                that exclude each other; E297 to E299 a value that would change nothing.
        """
        for name, methods in _ONLY.items():
            if getattr(self, name) != type(self).model_fields[name].default and self.method not in methods:
                raise UsageError("E296", f"--{_option(name)} has no effect with --method {self.method}",
                                 help=f"it belongs to {' and '.join(methods)}")  # fmt: skip
        if self.method == "rice":
            self._rice()
            return self
        given = [name for name in ("responses", "long", "short") if getattr(self, name) is not None]
        if self.direction is None and not given:
            raise UsageError("E295", "there is no direction, and no responses to find one",
                             help="--responses FILE.jsonl (prompt, thinking, response), or --direction FILE; "
                             "surgeon eval --samples-out writes a model's own responses")  # fmt: skip
        if self.direction is not None and given and self.method != "steer":
            raise UsageError(
                "E296", f"--{given[0]} has no effect beside --direction", help="leave out one of the two"
            )
        if self.direction is not None and self.save_direction is not None:
            raise UsageError(
                "E296",
                "--save-direction keeps what was extracted, and --direction was read",
                help="leave one out",
            )
        if (
            sum(bool(x) for x in (self.heads, self.heads_fraction is not None, self.heads_count is not None))
            > 1
        ):
            raise UsageError(
                "E296",
                "the heads are chosen in more than one way",
                help="--heads, --heads-fraction or --heads-count",
            )
        if self.strength is not None and (self.strength == 0 or not math.isfinite(self.strength)):
            raise UsageError(
                "E297",
                f"--strength {self.strength:g} would change nothing",
                help="1 takes all of the direction out",
            )
        self._steering()
        return self

    def _rice(self) -> None:
        for name in ("direction", "save_direction", "long", "short", "thresholds", "site", "window", "force"):
            if getattr(self, name) != type(self).model_fields[name].default:
                raise UsageError("E296", f"--{_option(name)} has no effect with --method rice",
                                 help="rice takes --responses with --beta, or --scale-experts")  # fmt: skip
        if self.scale_experts:
            for name in ("responses", "beta", "markers", "experts_count"):
                if getattr(self, name) != type(self).model_fields[name].default:
                    raise UsageError("E296", f"--{_option(name)} has no effect beside --scale-experts",
                                     help="leave out one of the two")  # fmt: skip
            return
        if self.responses is None:
            raise UsageError("E295", "there are no responses in which the experts of thinking could be found",
                             help="--responses FILE.jsonl (prompt, thinking, response), or name them with --scale-experts; "
                             "surgeon eval --samples-out writes a model's own responses")  # fmt: skip
        if self.beta is None:
            raise UsageError("E247", "rice needs the factor its experts are multiplied with",
                             help="--beta 4; 2 to 512 were published, tuned for each model, and too much makes output collapse")  # fmt: skip
        if self.experts_count is not None and self.experts_count < 1:
            raise UsageError("E247", f"--experts-count is {self.experts_count}", help="2 to 5 is usual")

    def _steering(self) -> None:
        if self.method != "steer":
            return
        if self.layer is None:
            raise UsageError("E299", "steering needs the layer whose output is shifted",
                             help="--layer N; the published layers lie at about 70 % of the depth")  # fmt: skip
        if self.gamma is not None and self.kl_budget is not None:
            raise UsageError(
                "E296", "--gamma and --kl-budget both set the strength", help="give one of the two"
            )
        if self.gamma is None and self.kl_budget is None and self.control_vector is None:
            raise UsageError(
                "E299", "steering needs a strength", help="--kl-budget 0.05 finds one; --gamma G sets it"
            )
        if self.gamma is not None and (self.gamma == 0 or not math.isfinite(self.gamma)):
            raise UsageError(
                "E299", f"--gamma {self.gamma:g} would change nothing", help="0.2 to 0.5 is usual"
            )
        if self.control_vector is not None and self.dtype is not None:
            raise UsageError("E296", "--dtype has no effect on a control vector", help="it is always float32")

    @property
    def place(self) -> str:
        """Where the direction is taken."""
        return self.site or ("layer" if self.method == "steer" else "attn")

    @property
    def tokens(self) -> str:
        """Which tokens count."""
        return self.window or ("last" if self.method == "steer" else "response")


def _option(name: str) -> str:
    """Return the option of a field."""
    return "marker" if name == "markers" else name.replace("_", "-")


def build(**values: Any) -> EditRequest:
    """Build a request; every field that is wrong becomes one UsageError (E296)."""
    try:
        return EditRequest(**{k: v for k, v in values.items() if v is not None}).checked()
    except ValidationError as error:
        raise wrong_options(
            error.errors(), code="E296", verb="edit", known=EditRequest.model_fields
        ) from None
