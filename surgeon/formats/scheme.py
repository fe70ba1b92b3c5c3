"""What quantizing decides about one matrix, and what comes out of it: the words every format and method speaks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

Kind = Literal["int", "float8", "nvfp4", "mxfp4", "nf4", "fp4", "int8"]


@dataclass(frozen=True, order=True)
class Scheme:
    """How the numbers of one matrix [out, in] are stored.

    Attributes:
        kind: "int": codes of 2 to 8 bits with a scale a group; "float8" (E4M3), "nvfp4", "mxfp4": short floats with
            scales; "nf4", "fp4", "int8": those of bitsandbytes.
        bits: of one code.
        group: inputs that share a scale; -1 a whole row, 0 where the kind decides.
        symmetric: whether zero is in the middle of the codes.
    """

    kind: Kind
    bits: int
    group: int = 128
    symmetric: bool = True

    @property
    def name(self) -> str:
        """In a few letters: int4g128, int8c (a scale a row, "channel"), int4g32a (asymmetric), nf4."""
        if self.kind != "int":
            return self.kind
        group = "c" if self.group <= 0 else f"g{self.group}"
        return f"int{self.bits}{group}{'' if self.symmetric else 'a'}"


@dataclass
class Codes:
    """A quantized matrix before it is packed: value = (code - zero) * scale.

    Attributes:
        scheme: how.
        codes: uint8 [out, in], 0 to 2^bits - 1, in the order of the stored columns.
        scales: float32 [out, groups], already rounded to the type they are stored in; of either sign.
        zeros: uint8 [out, groups]; 2^(bits - 1) everywhere when symmetric. float32 where a smallest value is stored instead:
            zeros = -smallest / scales, which may be any number.
        loss: relative output error tr(D H D') / tr(W H W') where it is known, else NaN.
    """

    scheme: Scheme
    codes: np.ndarray
    scales: np.ndarray
    zeros: np.ndarray
    loss: float = float("nan")

    @property
    def group(self) -> int:
        """Inputs that share a scale."""
        return self.scheme.group if self.scheme.group > 0 else self.codes.shape[1]

    def values(self) -> np.ndarray:
        """Return what the codes stand for, float32 [out, in]."""
        repeat = self.group
        scales = np.repeat(self.scales, repeat, axis=1)[:, : self.codes.shape[1]]
        zeros = np.repeat(self.zeros.astype(np.float32), repeat, axis=1)[:, : self.codes.shape[1]]
        return (self.codes.astype(np.float32) - zeros) * scales
