"""What the command line, a recipe step and the Python function can ask of quantizing a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from surgeon.errors import UsageError, close_matches, wrong_options
from surgeon.quantize import forms

METHODS = {
    "rtn": "round to nearest, with a search for the range at up to 3 bits; needs no text",
    "gptq": "GPTQ: later inputs make up for the error of earlier ones; second moments shrunk for rare experts",
    "awq": "scale inputs by their activations, folded into what produces them, then round to nearest",
    "awq-gptq": "the same scaling, then GPTQ",
}
"""Method -> one line."""

SENSITIVITIES = {
    "auto": "fisher where the model is a decoder whose layers fit the memory limit, else rel-output; said",
    "rel-output": "relative error of each matrix's outputs; one pass",
    "fisher": "errors of outputs weighted by squared gradients; one pass back and forth",
    "kl": "divergence of the model with one group quantized, measured; at most 300 groups",
    "weight": "relative error of the weights; needs no text",
}
"""Sensitivity -> one line."""

TARGETS = ("target_bits", "target_size", "target_kl")

DEFAULT_SCHEME = {"compressed-tensors": "W4A16", "auto-round": "W4A16", "bitsandbytes": "NF4", "gguf": "Q4_0"}
"""Form -> what is made when neither a scheme nor a target is given."""

MENU = (2, 3, 4, 8)
"""Widths that targets choose from, as far as the form stores them."""


class QuantizeRequest(BaseModel):
    """Options of ``surgeon quantize``; every field is the option with underscores."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str
    scheme: tuple[str, ...] = ()
    target_bits: float | None = Field(default=None, gt=0)
    target_size: float | None = Field(default=None, ge=1)
    target_kl: float | None = Field(default=None, gt=0)
    plan: str | None = None
    bits: tuple[int, ...] = ()
    method: str | None = None
    group_size: int | None = None
    symmetric: bool = True
    format: str = "compressed-tensors"
    runtime: Literal["transformers", "vllm"] = "transformers"
    tensor_parallel: int = Field(default=1, ge=1)
    double_quant: bool = False
    ignore: tuple[str, ...] | None = None
    sensitivity: str = "auto"
    sensitivities: str | None = None
    allocation: Literal["optimal", "pmq"] = "optimal"
    granularity: Literal["expert", "layer", "projection"] = "expert"
    scope: Literal["layer", "model"] = "layer"
    must_appear: tuple[int, ...] = ()
    drop_experts: bool = False
    order: Literal["static-act", "group-aware", "none"] = "static-act"
    damp: float = Field(default=0.01, gt=0)
    clip: bool | None = None
    true_sequential: bool | None = None
    target_shift: bool = False
    calibration: tuple[str, ...] = ()
    samples: int = Field(default=128, ge=1)
    sequence_length: int = Field(default=2048, ge=2)
    calibration_dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    dtype: Literal["float32", "float16", "bfloat16"] | None = None
    max_shard_size: int = Field(default=5_000_000_000, ge=1)
    device: str = "auto"
    threads: int | None = Field(default=None, ge=1)
    memory_limit: int | None = Field(default=None, ge=1)
    seed: int = 0
    offline: bool = False
    dequantize: bool = False
    work: str | None = None

    @field_validator("scheme", "ignore", "calibration", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @property
    def target(self) -> tuple[str, float] | None:
        """("bits" | "size" | "kl", value), or None."""
        for name in TARGETS:
            value = getattr(self, name)
            if value is not None:
                return name.removeprefix("target_"), value
        return None

    @property
    def wishes(self) -> list[tuple[str | None, str]]:
        """(pattern, name of a scheme) in the order given; the pattern is None for what nothing else names."""
        found: list[tuple[str | None, str]] = []
        for text in self.scheme:
            pattern, sign, name = text.rpartition("=")
            found.append((pattern if sign else None, name))
        if self.target is None and self.plan is None and not any(pattern is None for pattern, _ in found):
            found.append((None, DEFAULT_SCHEME[self.format]))
        return found

    def checked(self) -> QuantizeRequest:
        """Refuse what does not go together.

        Raises:
            UsageError: E216 targets and schemes, E217 options, E221 the form.
        """
        if self.format not in forms.NAMES:
            raise UsageError("E221", f'there is no format "{self.format[:60]}" to quantize to',
                             help=close_matches(self.format, forms.NAMES) or "formats are " + ", ".join(forms.NAMES))  # fmt: skip
        given = [name for name in TARGETS if getattr(self, name) is not None]
        whole = [text for text in self.scheme if "=" not in text]
        if len(given) + bool(self.plan) > 1 or ((given or self.plan) and whole):
            said = (
                [_option(name) for name in given]
                + (["--plan"] if self.plan else [])
                + [f"--scheme {t}" for t in whole]
            )
            raise UsageError("E216", f"{' and '.join(said)} each decide about all matrices", help="give one of them; --scheme PATTERN=SCHEME goes with a target")  # fmt: skip
        if len(whole) > 1:
            raise UsageError("E216", f"{len(whole)} schemes for all matrices: {', '.join(whole)[:80]}",
                             help="--scheme 're:.*down_proj=W8A16' names those a scheme is for")  # fmt: skip
        for text in self.scheme:
            if text.startswith("="):
                raise UsageError("E216", f'--scheme "{text[:60]}" has no pattern', help="PATTERN=SCHEME, or a scheme alone")  # fmt: skip
        self._check_names()
        self._check_options(bool(given))
        return self

    def _check_names(self) -> None:
        for value, names, what in (
            (self.method, METHODS, "method of quantizing"),
            (self.sensitivity, SENSITIVITIES, "sensitivity"),
        ):
            if value is not None and value not in names:
                raise UsageError("E217", f'unknown {what} "{value[:60]}"',
                                 help=(f"{near} " if (near := close_matches(value, names)) else "") + "one of: " + ", ".join(names))  # fmt: skip
        for width in self.bits:
            if not 2 <= width <= 8:
                raise UsageError("E217", f"--bits {width}: matrices have 2 to 8 bits", help="such as --bits 2,3,4,8")  # fmt: skip
        if self.group_size is not None and (self.group_size < -1 or self.group_size == 0):
            raise UsageError("E231", f"--group-size {self.group_size}", help="inputs that share a scale, such as 128; -1 is a whole row")  # fmt: skip

    def _check_options(self, targeted: bool) -> None:
        without = {
            "bits": targeted, "sensitivities": targeted, "double_quant": self.format == "bitsandbytes",
            "target_shift": self.method != "rtn", "true_sequential": self.method != "rtn",
        }  # fmt: skip
        reasons = {
            "bits": "there is no target",
            "sensitivities": "there is no target",
            "double_quant": "it belongs to bitsandbytes",
        }
        for name, sensible in without.items():
            value = getattr(self, name)
            if value and not sensible:
                raise UsageError("E217", f"{_option(name)} has no effect: {reasons.get(name, 'rounding to nearest looks at no text')}", help="leave it out")  # fmt: skip
        self._check_experts(targeted)
        if self.sensitivity != "auto" and not targeted:
            raise UsageError("E217", "--sensitivity has no effect without a target", help="--target-bits, --target-size or --target-kl")  # fmt: skip
        if self.runtime != "transformers" and self.format in ("bitsandbytes", "gguf"):
            raise UsageError("E217", f"--runtime {self.runtime} has no effect on {self.format}", help="leave it out")  # fmt: skip
        if self.tensor_parallel > 1 and self.runtime != "vllm":
            raise UsageError("E217", "--tensor-parallel matters to vLLM", help="--runtime vllm")
        if self.format == "bitsandbytes" and self.method not in (None, "rtn", "awq"):
            raise UsageError("E217", f"bitsandbytes has tables of numbers of its own; {self.method} works on evenly spaced ones",
                             help="--method rtn, or --format compressed-tensors")  # fmt: skip

    def _check_experts(self, targeted: bool) -> None:
        """Refuse options of mixtures that do not go together."""
        if self.allocation == "pmq" and (self.target_bits is None or self.drop_experts):
            raise UsageError("E217", "--allocation pmq chooses widths of experts for an average of bits", help="--target-bits 2.5, without --drop-experts")  # fmt: skip
        if self.allocation == "pmq" and self.sensitivity != "auto":
            raise UsageError("E217", "--sensitivity has no effect on --allocation pmq, which has a score of its own", help="leave it out")  # fmt: skip
        if self.sensitivities and (self.allocation == "pmq" or self.drop_experts):
            option = "--drop-experts" if self.drop_experts else "--allocation pmq"
            raise UsageError("E217", f"--sensitivities has no effect on {option}, which measures losses of its own", help="leave it out")  # fmt: skip
        if self.drop_experts and self.format == "gguf":
            raise UsageError("E217", "--drop-experts writes folders", help="surgeon prune --keep-experts first, then --format gguf")  # fmt: skip
        if self.drop_experts and self.target_size is None:
            raise UsageError("E217", "--drop-experts decides about experts and bits together, for a size", help="--target-size 20GB")  # fmt: skip
        for name in ("granularity", "scope", "must_appear"):
            if (
                self.allocation != "pmq"
                and getattr(self, name) != type(self).model_fields[name].default
                and not (name == "granularity" and self.drop_experts)
            ):
                raise UsageError("E217", f"{_option(name)} has no effect without --allocation pmq", help="leave it out")  # fmt: skip

    def work_folder(self, destination: Path) -> Path:
        """Return where layers and sensitivities lie: a folder of its own in --work, or in OUT.work."""
        place = destination.absolute().parent / f"{destination.name}.work"
        return (Path(self.work).expanduser().absolute() if self.work else place) / "quantize"


def build(**values: Any) -> QuantizeRequest:
    """Return a checked request.

    Raises:
        UsageError: E216, E217, E221, E231.
    """
    for name in ("bits", "must_appear"):
        if isinstance(values.get(name), int):
            values[name] = (values[name],)
    for name in ("method", "sensitivity", "format"):
        if isinstance(values.get(name), str):
            values[name] = values[name].replace("_", "-").lower()
    if values.get("sensitivity") == "relative-output":
        values["sensitivity"] = "rel-output"
    try:
        return QuantizeRequest(**values).checked()
    except ValidationError as error:
        raise wrong_options(
            error.errors(), code="E217", verb="quantize", known=QuantizeRequest.model_fields
        ) from None


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")
