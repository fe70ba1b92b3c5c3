"""Second moments of the inputs of one matrix, tokens weighted by the gate of their expert.

The output of an expert enters the stream times its gate g, so its error counts g^2 times:
H = sum g^2 x x'. Such a sum is worth fewer tokens than it has: (sum g^2)^2 / sum g^4 (Kish's effective sample size).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from surgeon.calibrate.damping import exact_products

SLICE = 4096
"""Tokens of one float32 product."""


@dataclass
class Moments:
    """Sums over tokens.

    Attributes:
        hessian: float32 [in, in], sum of g^2 x x'.
        squares: sum of g^2.
        fourths: sum of g^4.
        cross: float32 [in, in], sum of g^2 (x0 - x) x' where x0 is what the unquantized model feeds the matrix; or None.
    """

    hessian: Tensor
    squares: float = 0.0
    fourths: float = 0.0
    cross: Tensor | None = None

    @classmethod
    def empty(cls, inputs: int, *, cross: bool = False, device: torch.device | str = "cpu") -> Moments:
        """Return sums over no token."""
        zeros = torch.zeros(inputs, inputs, device=device)
        return cls(zeros, cross=torch.zeros_like(zeros) if cross else None)

    @property
    def count(self) -> float:
        """Effective number of tokens; their number where all gates are equal."""
        return self.squares**2 / self.fourths if self.fourths else 0.0

    def add(self, inputs: Tensor, gates: Tensor | None = None, original: Tensor | None = None) -> None:
        """Add tokens.

        Args:
            inputs: x, [tokens, in], without padding.
            gates: g, [tokens]; None: 1.
            original: x0, [tokens, in], for matrices that keep ``cross``.
        """
        with exact_products(), torch.no_grad():
            for start in range(0, len(inputs), SLICE):
                here = slice(start, start + SLICE)
                rows = inputs[here].float()
                weights = torch.ones(len(rows), device=rows.device) if gates is None else gates[here].float()
                scaled = rows * weights[:, None]
                self.hessian.addmm_(scaled.T, scaled)
                if self.cross is not None:
                    if original is None:
                        raise ValueError("a shift of the target needs the inputs of the original model")
                    self.cross.addmm_(((original[here].float() - rows) * weights[:, None]).T, scaled)
                squares = weights.double().square()
                self.squares += float(squares.sum())
                self.fourths += float(squares.square().sum())

    def merged(self, other: Moments) -> Moments:
        """Return the sums over the tokens of both."""
        cross = None if self.cross is None or other.cross is None else self.cross + other.cross
        return Moments(
            self.hessian + other.hessian, self.squares + other.squares, self.fourths + other.fourths, cross
        )


def held_out(sample: int) -> bool:
    """Say whether a sample, counted from 0, belongs to the quarter held out. Whole samples: tokens of one text are alike."""
    return sample % 4 == 3
