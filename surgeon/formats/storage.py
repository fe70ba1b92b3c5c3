"""How config.json says that a module is stored, in the same words for every format."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Storage:
    """How one matrix [out, in] is said to be stored.

    Attributes:
        form: its format: a name of compressed-tensors, or "gptq", "awq", "fp8", "bnb-4bit", "bnb-8bit".
        bits: of a code.
        group: inputs that share a scale; -1 a whole row, 0 the whole matrix.
        block: (rows, columns) that share a scale, where those are blocks.
        symmetric: whether zero points need not be stored.
        reordered: whether inputs were put into groups in another order, which is stored.
        kind: of bitsandbytes' four bits: "nf4" or "fp4".
        nested: whether bitsandbytes' scales are quantized themselves.
    """

    form: str
    bits: int
    group: int = -1
    block: tuple[int, int] | None = None
    symmetric: bool = True
    reordered: bool = False
    kind: str = ""
    nested: bool = False

    @property
    def words(self) -> str:
        """For messages: 4 bits as pack-quantized in groups of 128."""
        if self.kind:
            return f"{self.kind} of bitsandbytes"
        shared = {-1: "with a scale a row", 0: "with one scale"}.get(self.group, f"in groups of {self.group}")
        if self.block is not None:
            shared = f"in blocks of {self.block[0]} x {self.block[1]}"
        return f"{self.bits} bits as {self.form} {shared}"


@dataclass(frozen=True)
class Said:
    """What is said of one module.

    Attributes:
        storage: None for plain numbers.
        certain: whether readers take nothing else; False where it depends on the class of the module, or nothing is said.
    """

    storage: Storage | None
    certain: bool = True


PLAIN = Said(None)


class Declarations(Protocol):
    """What config.json says of the modules of one model."""

    of: Callable[[str], Said]
    """Name of a module in the files, without ".weight" -> how it is stored."""
