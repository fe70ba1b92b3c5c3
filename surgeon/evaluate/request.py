"""What the command line, a recipe step and the Python function can ask of an evaluation: one model."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from surgeon.errors import UsageError, wrong_options
from surgeon.evaluate import gates
from surgeon.evaluate.gates import Gate

SAMPLED = {"temperature": 0.6, "top_p": 0.95, "top_k": 20}
"""Sampling where several samples are asked for and nothing else: what long-to-short work reports with."""

MEASURED = ("tokens_mean", "tokens_median", "cap_rate", "reflection_rate")
JUDGED = ("accuracy", "intelligence_per_token")


class EvalRequest(BaseModel):
    """Options of ``surgeon eval``; every field is the option with underscores."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str
    questions: tuple[str, ...] = ()
    match: str | None = None
    length: bool = False
    perplexity: str | None = None
    kl: str | None = None
    text: str | None = None
    tasks: tuple[str, ...] = ()
    include_path: str | None = None
    limit: int | None = Field(default=None, ge=1)
    samples: int = Field(default=1, ge=1, le=10_000)
    temperature: float | None = Field(default=None, ge=0.0, le=100.0)
    top_p: float | None = Field(default=None, gt=0.0, le=1.0)
    top_k: int | None = Field(default=None, ge=0)
    max_new_tokens: int = Field(default=2048, ge=1)
    pass_at: tuple[int, ...] = ()
    reflection_words: tuple[str, ...] = ()
    template: bool = True
    sequence_length: int = Field(default=2048, ge=2)
    batch_size: int | Literal["auto"] = "auto"
    baseline: str | None = None
    gate: tuple[str, ...] = ()
    gate_limited: bool = False
    samples_out: str | None = None
    output: str | None = None
    resume: bool = True
    overwrite: bool = False
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: str = "auto"
    threads: int | None = Field(default=None, ge=1)
    memory_limit: int | None = Field(default=None, ge=1)
    seed: int = 0
    offline: bool = False
    dequantize: bool = False

    @field_validator("batch_size")
    @classmethod
    def _at_least_one(cls, value: int | str) -> int | str:
        if isinstance(value, int) and value < 1:
            raise ValueError("at least 1, or auto")
        return value

    @property
    def sampling(self) -> dict[str, float]:
        """Return temperature, top_p and top_k in force; temperature 0 is greedy."""
        given = {k: v for k in SAMPLED if (v := getattr(self, k)) is not None}
        greedy = {"temperature": 0.0, "top_p": 1.0, "top_k": 0}
        if given.get("temperature") == 0 or (self.samples == 1 and not given.get("temperature")):
            return greedy
        return (SAMPLED if not given else {"temperature": 1.0, "top_p": 1.0, "top_k": 0}) | given

    def result_file(self) -> Path | None:
        return Path(self.output).expanduser() if self.output else None

    def reply_file(self, role: str = "") -> Path | None:
        """Return where replies are kept: --samples-out, or beside the result until that is written."""
        ending = f".{role}" if role else ""
        if self.samples_out:
            path = Path(self.samples_out).expanduser()
            return path.with_name(f"{path.stem}{ending}{path.suffix}") if role else path
        result = self.result_file()
        return result.with_name(f"{result.stem}{ending}.replies.jsonl") if result and self.questions else None

    def checked(self) -> list[Gate]:
        """Refuse what does not go together; return the parsed gates.

        Raises:
            UsageError: E225 nothing to measure or an option without effect, E226, E228, E229.
        """
        if not (self.questions or self.perplexity or self.kl or self.tasks):
            raise UsageError("E225", "nothing to measure was named",
                             help="--questions FILE, --perplexity DATA, --kl REFERENCE or --tasks NAME")  # fmt: skip
        _need(self, bool(self.questions), "--questions", {
            "--length": self.length, "--match": self.match, "--samples": self.samples != 1, "--samples-out": self.samples_out,
            "--temperature": self.temperature is not None, "--top-p": self.top_p is not None, "--top-k": self.top_k is not None,
            "--pass-at": self.pass_at,
        })  # fmt: skip
        _need(self, self.kl is not None, "--kl", {"--text": self.text})
        _need(self, bool(self.tasks), "--tasks", {"--include-path": self.include_path})
        _need(self, bool(self.gate), "--gate", {"--gate-limited": self.gate_limited})
        greedy = self.sampling["temperature"] == 0
        if greedy and self.samples > 1:
            raise UsageError("E228", f"--samples {self.samples} with temperature 0 makes equal replies",
                             help="--temperature above 0, or one sample")  # fmt: skip
        if greedy and (self.top_p is not None or self.top_k is not None):
            raise UsageError(
                "E228", "--top-p and --top-k have no effect on greedy replies", help="add --temperature"
            )
        for k in self.pass_at:
            if not 1 <= k <= self.samples:
                raise UsageError("E228", f"--pass-at {k} needs at least {k} samples a question, {self.samples} are made",
                                 help=f"--samples {max(k, 2)}")  # fmt: skip
        if self.length and self.pass_at:
            raise UsageError(
                "E225", "--length judges no answers, so there is no pass@k", help="leave out one of the two"
            )
        parsed = [gates.parse(text) for text in self.gate]
        for gate in parsed:
            referred = self.baseline is not None or (gate.metric == "perplexity" and self.kl is not None)
            if ("baseline" in gate.names and self.baseline is None) or ("ref" in gate.names and not referred):
                name = "baseline" if "baseline" in gate.names and self.baseline is None else "ref"
                way = (
                    "--baseline MODEL"
                    if name == "baseline"
                    else "--kl REFERENCE (for perplexity) or --baseline MODEL"
                )
                raise UsageError(
                    "E229",
                    f'the gate "{gate.text}" compares with {name}, and none is given',
                    help=f"add {way}",
                )
        return parsed

    def metric_names(self, domains: tuple[str, ...] = ()) -> list[str]:
        """Return the metrics this run will have, those of domains as DOMAIN_METRIC."""
        found: list[str] = []
        if self.questions:
            found += [*MEASURED, *(() if self.length else (*JUDGED, *(f"pass@{k}" for k in self.pass_at)))]
            found += [f"{domain}_{name}" for domain in domains for name in list(found)]
        if self.perplexity:
            found.append("perplexity")
        if self.kl:
            found += ["kl", "top1_agreement"]
        return found


def _need(request: EvalRequest, present: bool, option: str, others: dict[str, Any]) -> None:
    useless = [name for name, value in others.items() if value]
    if useless and not present:
        raise UsageError("E225", f"{useless[0]} only has an effect with {option}", help=f"add {option}")


def build(**values: Any) -> EvalRequest:
    """Build a request; every field that is wrong becomes one UsageError (E228)."""
    try:
        return EvalRequest(**{k: v for k, v in values.items() if v is not None})
    except ValidationError as error:
        raise wrong_options(
            error.errors(), code="E228", verb="eval", known=EvalRequest.model_fields
        ) from None
