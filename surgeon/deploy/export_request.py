"""What the command line, a recipe step and the Python function can ask of an export."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from surgeon.checkpoint.header import printable
from surgeon.deploy.gguf_choice import parse_override, parse_type
from surgeon.errors import UsageError, close_matches, wrong_options

FORMATS = {
    "safetensors": "a clean model folder: another float type, other shards, pickles turned into safetensors",
    "gguf": "one file for llama.cpp, its matrices plain or quantized; layers may differ in size",
    "decilm": "a folder for vLLM and TensorRT-LLM, layers may differ in size (Llama and Mistral families)",
}
"""Form -> one line."""

QUANTIZED = ("compressed-tensors", "bitsandbytes")
"""Forms of quantized weights, which ``surgeon quantize`` writes."""


class ExportRequest(BaseModel):
    """Options of ``surgeon export``; every field is the option with underscores."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str
    to: str = "safetensors"
    member: str | None = None
    dtype: Literal["float32", "float16", "bfloat16"] | None = None
    gguf_type: str | None = None
    gguf_override: tuple[str, ...] = ()
    max_shard_size: int = Field(default=5_000_000_000, ge=1)
    check: bool = True
    allow_pickle: bool = False
    allow_nonfinite: bool = False
    dequantize: bool = False
    ignore_unlisted: bool = False
    weights: str = "auto"
    offline: bool = False

    def checked(self) -> ExportRequest:
        """Refuse a form that does not exist, and types of another form (E285)."""
        if self.to in FORMATS:
            return self._with_known_types()
        forms = ", ".join(FORMATS)
        if self.to in QUANTIZED:
            raise UsageError("E285", f"{self.to} holds weights quantized with or without data, which is more than another form",
                             help=f"surgeon quantize MODEL --format {self.to}; forms of an export are {forms}")  # fmt: skip
        near = close_matches(self.to, FORMATS)
        raise UsageError("E285", f'there is no form "{printable(self.to)[:60]}" to export to',
                         help=(f"{near} " if near else "") + f"forms are {forms}")  # fmt: skip

    def _with_known_types(self) -> ExportRequest:
        if (self.gguf_type or self.gguf_override) and self.to != "gguf":
            option = "--gguf-type" if self.gguf_type else "--gguf-override"
            raise UsageError(
                "E285",
                f"{option} says how matrices of a GGUF file are stored, not of {self.to}",
                help="--to gguf",
            )
        if self.gguf_type:
            parse_type(self.gguf_type, "--gguf-type")
        for override in self.gguf_override:
            parse_override(override)
        return self

    def recipe(self) -> dict[str, Any]:
        """Return what of the request decides about the result, without paths."""
        types = {"gguf_type": self.gguf_type, "gguf_override": list(self.gguf_override)}
        return {
            **({name: value for name, value in types.items() if value}),
            "verb": "export", "to": self.to, "member": self.member, "dtype": self.dtype,
            "allow_pickle": self.allow_pickle, "allow_nonfinite": self.allow_nonfinite,
            **({"dequantize": True} if self.dequantize else {}),
        }  # fmt: skip

    def command(self, key: str) -> str:
        """Return the command that repeats the export, without paths."""
        words = ["surgeon export", key]
        words += [f"--member {self.member}"] if self.member else []
        words += [f"--to {self.to}"] if self.to != "safetensors" else []
        words += [f"--gguf-type {self.gguf_type}"] if self.gguf_type else []
        words += [f"--gguf-override '{override}'" for override in self.gguf_override]
        words += [f"--dtype {self.dtype}"] if self.dtype else []
        words += ["--dequantize"] if self.dequantize else []
        return " ".join([*words, "-o OUT"])

    def default_output(self, path: str, *, bare: bool) -> Path:
        """Return where the result goes when nobody says: beside a local model, else in the current folder.

        Args:
            path: the model as it was named, without adapter and revision.
            bare: it is a file without config.json, and so is the result.
        """
        place = Path(path)
        here = place.resolve().parent if place.exists() else Path()
        name = place.resolve().name if place.exists() else path.rstrip("/").rpartition("/")[2]
        if place.is_file():
            name = place.resolve().stem
        name += f"-{self.member}" if self.member else ""
        if bare:
            return here / f"{name}-export.safetensors"
        if self.to == "gguf":
            return here / (f"{name}-{self.gguf_type.upper()}.gguf" if self.gguf_type else f"{name}.gguf")
        return here / (name if self.member and self.to == "safetensors" else f"{name}-{self.to}")


def build(**values: Any) -> ExportRequest:
    """Return a checked request.

    Raises:
        UsageError: E285 a value that does not exist.
    """
    try:
        return ExportRequest(**values).checked()
    except ValidationError as error:
        raise wrong_options(
            error.errors(), code="E285", verb="export", known=ExportRequest.model_fields
        ) from None
