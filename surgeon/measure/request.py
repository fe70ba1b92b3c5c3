"""What the command line, a recipe step and the Python function can ask of a measurement."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from surgeon.errors import UsageError, wrong_options
from surgeon.measure.conditions import PRECISION, Conditions


class MeasureRequest(BaseModel):
    """Options of ``surgeon measure``; every field is the option with underscores."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str
    baseline: str | None = None
    mode: Literal["table", "mix", "prefill", "decode", "memory"] | None = None
    workload: Literal["mix", "prefill", "decode"] | None = None
    batch: int | None = Field(default=None, ge=1)
    context: int | None = Field(default=None, ge=1)
    generate: int | None = Field(default=None, ge=1)
    heads: Literal["groups", "heads"] = "groups"
    round_to: int = Field(default=1, ge=1)
    repeat: int | None = Field(default=None, ge=3)
    precision: float = Field(default=PRECISION, gt=0.0, lt=1.0)
    time_limit: float = Field(default=60.0, gt=0.0)
    threads: int | None = Field(default=None, ge=1)
    device: str = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    attention: str | None = None
    memory_limit: int | None = Field(default=None, ge=1)
    output: str | None = None
    overwrite: bool = False
    seed: int = 0
    offline: bool = False

    def conditions(self) -> Conditions:
        """Return where and how carefully is measured."""
        return Conditions(
            device=self.device, dtype=self.dtype, threads=self.threads, attention=self.attention, precision=self.precision,
            repeat=self.repeat, time_limit=self.time_limit, memory_limit=self.memory_limit, seed=self.seed,
        )  # fmt: skip

    def result_file(self) -> Path | None:
        return Path(self.output).expanduser() if self.output else None

    def checked(self) -> None:
        """Refuse options without effect.

        Raises:
            UsageError: E281.
        """
        if self.baseline is not None and self.mode == "table":
            raise UsageError(
                "E281",
                "a latency table is about one model; --baseline has no effect on it",
                help="leave out one of the two",
            )
        if self.mode != "table" and ({"heads", "round_to"} & self.model_fields_set):
            raise UsageError(
                "E281", "--heads and --round-to only have an effect on a table", help="add --mode table"
            )
        if self.workload is not None and self.mode not in ("table", "memory"):
            raise UsageError(
                "E281",
                "--workload only has an effect on a table or on memory",
                help=f"--mode {self.workload}",
            )
        if self.repeat is not None and "precision" in self.model_fields_set:
            raise UsageError(
                "E281",
                "--repeat sets the number of rounds, so --precision has no effect",
                help="leave out one of the two",
            )


def build(**values: Any) -> MeasureRequest:
    """Build a request; every field that is wrong becomes one UsageError (E281)."""
    try:
        return MeasureRequest(**{k: v for k, v in values.items() if v is not None})
    except ValidationError as error:
        raise wrong_options(
            error.errors(), code="E281", verb="measure", known=MeasureRequest.model_fields
        ) from None
