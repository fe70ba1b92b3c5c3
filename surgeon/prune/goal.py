"""What a pruned model has to reach, as a budget of the cost it is counted in, and what can be reached at all."""

from __future__ import annotations

import math
from dataclasses import dataclass

from surgeon.errors import UsageError
from surgeon.prune.cost import Cost

KINDS = ("speedup", "params", "size", "sparsity")


@dataclass(frozen=True)
class Goal:
    """A target.

    Attributes:
        kind: "speedup" (dense time over pruned time), "params", "size" (bytes), or "sparsity" (the share of
            the parameters of all attentions and FFNs that goes).
        value: its number.
        cost: what it is counted in: seconds, parameters, bytes, parameters.
    """

    kind: str
    value: float
    cost: Cost

    @property
    def budget(self) -> float:
        """The most that the pruned model may cost."""
        if self.kind == "speedup":
            return self.cost.dense / self.value
        if self.kind == "sparsity":
            return self.cost.dense - self.value * self.cost.prunable()
        return self.value

    def achieved(self, total: float) -> float:
        """Return the speedup, parameters, bytes or sparsity of a model that costs ``total``."""
        if self.kind == "speedup":
            return self.cost.dense / total
        if self.kind == "sparsity":
            return (self.cost.dense - total) / self.cost.prunable()
        return total

    def show(self, total: float) -> str:
        """Return `achieved` in words; factors and shares are rounded down, so that what is named can be asked for."""
        value = self.achieved(total)
        if self.kind == "speedup":
            return f"{math.floor(100 * value + 1e-9) / 100:.2f}x"
        if self.kind == "sparsity":
            return f"{math.floor(1000 * value + 1e-9) / 10:.1f}%"
        return f"{value:,.0f} parameters" if self.kind == "params" else f"{value / 1e6:,.1f} MB"

    def check(self, least: float) -> None:
        """Refuse a target that no cut reaches.

        Args:
            least: cost of the smallest model that is among the choices.

        Raises:
            UsageError: E264 it lies beyond that, or the model reaches it as it is.
        """
        budget = self.budget
        if budget < least:
            limit = {"speedup": "at most", "sparsity": "at most"}.get(self.kind, "at least")
            raise UsageError(
                "E264", f"{self._said()} cannot be reached: {limit} {self.show(least)}",
                help=f"between {self.show(self.cost.dense)} and {self.show(least)} is possible; "
                "what lies outside attention and FFN stays as it is",
            )  # fmt: skip
        if budget >= self.cost.dense:
            raise UsageError("E264", f"{self._said()} asks for nothing: the model has {self.show(self.cost.dense)} as it is",
                             help=f"ask for something down to {self.show(least)}")  # fmt: skip

    def _said(self) -> str:
        if self.kind == "speedup":
            return f"speedup {float(self.value)}"
        if self.kind == "sparsity":
            return f"sparsity {self.value:g}"
        return (
            f"{self.value:,.0f} parameters"
            if self.kind == "params"
            else f"a size of {self.value / 1e6:,.1f} MB"
        )
