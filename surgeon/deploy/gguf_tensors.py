"""What a GGUF file is put together from: tensors, each made of pieces of the checkpoint's, and the types they are stored in."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from surgeon.checkpoint.header import printable
from surgeon.errors import InputError, Where
from surgeon.formats.gguf_blocks import row_bytes

ALIGNMENT = 32
"""Bytes; every tensor begins at a multiple."""


@dataclass(frozen=True)
class Piece:
    """Rows of an output tensor: a tensor of the checkpoint, or (source None) ``rows`` of one value.

    Attributes:
        source: tensor name.
        rows: how many.
        head_dim: reorder the rows of every head from halves to neighbouring pairs; 0 leaves them.
        value: what a piece without source is filled with.
    """

    source: str | None
    rows: int
    head_dim: int = 0
    value: float = 0.0


@dataclass(frozen=True)
class GgufTensor:
    """One tensor of the file: name, shape with the slowest axis first, pieces one below the other.

    A tensor with ``values`` holds those instead. ``exact`` ones are float32 in every file.
    """

    name: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...] = ()
    values: tuple[float, ...] = ()
    exact: bool = False

    @property
    def columns(self) -> int:
        """Values of a row: 1 where the tensor is a vector."""
        return self.shape[-1] if len(self.shape) > 1 else 1


@dataclass(frozen=True)
class GgufLayout:
    """Architecture, keys (without those of the tokenizer) and tensors of a file."""

    architecture: str
    keys: Mapping[str, Any]
    tensors: tuple[GgufTensor, ...]
    notes: tuple[str, ...] = ()


def types_of(layout: GgufLayout, plain: str, quantized: Mapping[str, str]) -> dict[str, str]:
    """Return the type of every tensor of a file.

    Args:
        plain: type of matrices that nothing else is said about: F32, F16 or BF16.
        quantized: the checkpoint's matrix -> its type.

    Raises:
        InputError: E466 a row is not made of whole blocks, or the matrix has no place in which it may be quantized;
            E467 matrices that lie in one tensor of the file are of different types.
    """
    found, placed = {}, set()
    for tensor in layout.tensors:
        # llama.cpp multiplies norms and adds biases in float32 only.
        if len(tensor.shape) < 2 or tensor.exact:
            found[tensor.name] = "F32"
            continue
        kinds = {quantized.get(piece.source or "", plain): piece.source for piece in tensor.pieces}
        if len(kinds) > 1:
            one, other = sorted(kinds)[:2]
            raise InputError(
                "E467", f"{printable(str(kinds[one]))} cannot be {one} and {printable(str(kinds[other]))} {other}: "
                f"llama.cpp has them in one tensor, {tensor.name}", where=Where(tensor=printable(str(kinds[one]))),
                help="give them the same type: all experts of a layer's gate, up or down share one",
            )  # fmt: skip
        (found[tensor.name],) = kinds or (plain,)
        placed |= {piece.source for piece in tensor.pieces}
        try:
            row_bytes(found[tensor.name], tensor.columns)
        except InputError as error:
            error.where = Where(tensor=printable(str(tensor.pieces[0].source)))
            raise
    for name, kind in quantized.items():
        if name not in placed:
            raise InputError("E466", f"{printable(name)} cannot be stored as {kind} in GGUF: it is no matrix that llama.cpp multiplies with",
                             where=Where(tensor=printable(name)), help="leave it as it is")  # fmt: skip
    return found


def tensor_bytes(tensor: GgufTensor, kind: str) -> int:
    """Return the bytes of a tensor without padding."""
    return math.prod(tensor.shape) // tensor.columns * row_bytes(kind, tensor.columns)


def padded(count: int) -> int:
    return -(-count // ALIGNMENT) * ALIGNMENT
