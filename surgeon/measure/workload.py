"""What is timed: the work that "1.5 times as fast" speaks about. Printed with every figure.

Codes: E280 a workload that cannot be.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from surgeon.errors import UsageError

MODES = ("prefill", "decode", "mix")
STEPS = 16
"""Decode steps that are timed at once. A step's time grows linearly with the length of the cache, so steps
around the middle length have the mean time of all steps."""
LONGEST = 1 << 24
"""No prompt or reply is longer; a larger number is a slip."""


@dataclass(frozen=True)
class Workload:
    """One request: a prompt is read, a reply is generated.

    Attributes:
        mode: "prefill" reads the prompt (one forward, which fills the cache), "decode" generates token by
            token with the cache, "mix" does both.
        batch: sequences at once.
        context: tokens of the prompt.
        generate: tokens of the reply.
    """

    mode: str = "mix"
    batch: int = 1
    context: int = 512
    generate: int = 128

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise UsageError(
                "E280", f'the workload "{self.mode}" does not exist', help="use " + ", ".join(MODES)
            )
        for name in ("batch", "context", "generate"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= LONGEST:
                raise UsageError(
                    "E280", f"--{name} is {value!r}", help=f"a whole number from 1 to {LONGEST:,}"
                )

    @classmethod
    def usual(cls, *, decoder: bool, mode: str | None = None, **sizes: int | None) -> Workload:
        """Return the default workload, with the values given instead: decoders mix, encoders only read.

        Raises:
            UsageError: E280, also when an encoder is asked to generate.
        """
        if not decoder and mode not in (None, "prefill"):
            raise UsageError(
                "E280", f"an encoder generates nothing, so there is no {mode} to time", help="--mode prefill"
            )
        given = {name: value for name, value in sizes.items() if value is not None}
        return cls(mode or ("mix" if decoder else "prefill"), **given)

    @property
    def steps(self) -> int:
        """Decode steps that one sample times."""
        return min(self.generate, STEPS)

    @property
    def first_length(self) -> int:
        """Tokens in the cache before the first of the timed steps."""
        return self.context + (self.generate - self.steps) // 2

    @property
    def length(self) -> int:
        """Tokens of the longest sequence the workload makes."""
        return self.context if self.mode == "prefill" else self.context + self.generate

    def seconds(self, prefill: float, decode: float) -> float:
        """Return the time of the whole workload from its parts.

        Args:
            prefill: seconds of one prefill.
            decode: seconds of one decode step.
        """
        if self.mode == "prefill":
            return prefill
        return self.generate * decode + (prefill if self.mode == "mix" else 0.0)

    def sentence(self) -> str:
        """Return what is timed, in words."""
        rows = f"batch {self.batch}"
        if self.mode == "prefill":
            return f"prefill of {self.context:,} tokens, {rows}"
        sampled = (
            f" ({self.steps} steps timed around the middle length)" if self.steps < self.generate else ""
        )
        if self.mode == "decode":
            return f"decode of {self.generate:,} tokens after a context of {self.context:,}, {rows}{sampled}"
        return f"mix: prefill of {self.context:,} tokens, then {self.generate:,} generated, {rows}{sampled}"

    def document(self) -> dict[str, Any]:
        """Return the workload as plain data; `from_document` reads it."""
        return asdict(self)

    @classmethod
    def from_document(cls, document: Mapping[str, Any]) -> Workload:
        """Read what `document` made."""
        return cls(**{name: document[name] for name in ("mode", "batch", "context", "generate")})
