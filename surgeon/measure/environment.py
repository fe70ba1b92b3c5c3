"""What times depend on beside the model: times of one environment say nothing about another (fault J7).

Codes: E516 measured elsewhere.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from surgeon.errors import EnvironmentFault
from surgeon.measure.conditions import Conditions

_NAMES = {
    "torch": "torch version",
    "transformers": "transformers version",
    "attention": "attention implementation",
}


@dataclass(frozen=True)
class Environment:
    """Identity of a measuring environment.

    Attributes:
        device: "cpu" or "cuda".
        device_name: model name of the processor or GPU.
        threads: threads of torch (1 on a GPU, where they do not matter).
        dtype: precision computed in.
        torch, transformers: versions.
        attention: attention implementation of the timed models ("sdpa", "eager", ...).
        clock: what times are read from.
    """

    device: str
    device_name: str
    threads: int
    dtype: str
    torch: str
    transformers: str
    attention: str
    clock: str

    @classmethod
    def here(cls, conditions: Conditions, *, dtype: str, attention: str) -> Environment:
        """Return the environment that conditions make on this machine."""
        import torch
        import transformers

        place = conditions.place
        cuda = place != "cpu"
        return cls(
            device=place.partition(":")[0], device_name=torch.cuda.get_device_name(place) if cuda else processor(),
            threads=1 if cuda else conditions.cores, dtype=dtype, torch=torch.__version__,
            transformers=transformers.__version__, attention=attention, clock=conditions.clock()[0],
        )  # fmt: skip

    def differences(self, other: Environment) -> list[str]:
        """Return what differs, as "threads 4 there, 1 here" with ``self`` there and ``other`` here."""
        return [
            f"{_NAMES.get(f.name, f.name.replace('_', ' '))} {getattr(self, f.name)} there, {getattr(other, f.name)} here"
            for f in fields(self)
            if getattr(self, f.name) != getattr(other, f.name)
        ]

    def check(self, here: Environment, what: str) -> None:
        """Refuse times that were taken elsewhere.

        Raises:
            EnvironmentFault: E516.
        """
        found = self.differences(here)
        if found:
            raise EnvironmentFault("E516", f"{what} was measured in another environment: {'; '.join(found)}",
                                   help="measure again here: surgeon measure MODEL --mode table; --table-anyway uses it as it is")  # fmt: skip

    def sentence(self) -> str:
        """Return the environment in words."""
        cores = f"{self.threads} thread{'s' if self.threads > 1 else ''}, " if self.device == "cpu" else ""
        return f"{self.device_name}, {cores}{self.dtype}, torch {self.torch}, transformers {self.transformers}, {self.attention} attention; {self.clock}"

    def document(self) -> dict[str, Any]:
        """Return the environment as plain data; `from_document` reads it."""
        return asdict(self)

    @classmethod
    def from_document(cls, document: Mapping[str, Any]) -> Environment:
        """Read what `document` made."""
        return cls(**{f.name: document[f.name] for f in fields(cls)})


def processor() -> str:
    """Return the processor's model name."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() in ("model name", "Model") and value.strip():
                return " ".join(value.split())
    except OSError:
        pass
    return platform.processor() or platform.machine()
