"""What ggml does to the other side of a product: it rounds what a quantized matrix is multiplied with.

The CPU code of ggml turns the inputs of a product to 8-bit integers in blocks, or to the 16-bit type of the matrix, before it
multiplies (``vec_dot_type``). That moves logits by some percent, more than many errors do, and sends tokens to
other experts. A reference that rounds its inputs in the same way agrees to the last digits, and any difference that is left is one of the file.

    with Rounding(model, rows):
        model(tokens)
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from surgeon.deploy.gguf_rows import Rows
from surgeon.formats.gguf_blocks import TYPES
from surgeon.traits import part_of

_GATES = {"gate_proj": 0, "w1": 0, "up_proj": 1, "w3": 1}
_EXPERT = re.compile(r"\.layers\.(\d+)\..*experts\.(\d+)\.(\w+)\.weight$")
_STACK = re.compile(r"\.layers\.(\d+)\..*experts\.(gate_up_proj|down_proj)$")

ASYMMETRIC = ("Q4_1", "Q5_1")
"""Types with a smallest value m: ggml adds m times the sum of a block's inputs, and rounds those sums to float16."""


def round_q8_0(values: Tensor) -> Tensor:
    """Return inputs [..., in] as blocks of 32 eight-bit integers with a float16 scale give them back."""
    codes, scale = _eight_bits(values)
    return (codes * scale.half().float()).reshape(values.shape)


def error_of_sums(values: Tensor) -> Tensor:
    """Return by how much the float16 sum of each block of 32 inputs is off, [..., in / 32]."""
    codes, scale = _eight_bits(values)
    total = codes.sum(1, keepdim=True)
    return ((scale * total).half().float() - scale.half().float() * total).reshape(*values.shape[:-1], -1)


def _eight_bits(values: Tensor) -> tuple[Tensor, Tensor]:
    blocks = values.reshape(-1, 32)
    scale = blocks.abs().amax(1, keepdim=True) / 127
    scaled = blocks * torch.where(scale > 0, 1 / scale, 0)
    return torch.trunc(
        scaled + torch.where(scaled >= 0, 0.5, -0.5)
    ), scale  # C's roundf: halves away from zero


def round_q8_k(values: Tensor) -> Tensor:
    """Return inputs [..., in] as blocks of 256 eight-bit integers with a float32 scale give them back.

    The value largest in magnitude becomes -127, whatever its sign.
    """
    blocks = values.reshape(-1, 256)
    largest = blocks.gather(1, blocks.abs().argmax(1, keepdim=True))
    inverse = torch.where(largest != 0, -127 / largest, 0)
    codes = torch.round(blocks * inverse).clamp(max=127)
    return torch.where(inverse != 0, codes / inverse, 0).reshape(values.shape)


def rounded(values: Tensor, kind: str) -> Tensor:
    """Return inputs as ggml rounds them for a matrix of this type."""
    if kind == "F32":
        return values
    if kind in ("F16", "BF16"):
        return values.to(torch.float16 if kind == "F16" else torch.bfloat16).float()
    return round_q8_k(values) if TYPES[kind].values == 256 else round_q8_0(values)


def smallest(blocks: np.ndarray, kind: str) -> Tensor:
    """Return m of every block of rows of a type in `ASYMMETRIC`, float32 [rows, in / 32]."""
    each = blocks.reshape(len(blocks), -1, TYPES[kind].bytes)[..., 2:4]
    return torch.from_numpy(np.ascontiguousarray(each).view(np.float16)[..., 0].astype(np.float32))


@dataclass
class _Matrix:
    """What is known of a parameter: types of its parts (gate and up may share one), smallest values by row, or None."""

    kinds: tuple[str, ...]
    smallest: Tensor | None


class Rounding(TorchFunctionMode):
    """While it is active, linear maps of a model round their inputs as ggml does for the type of their matrix.

    Args:
        model: a stock model in float32. Its experts are made to be computed one by one, and its plain matrices are
            rounded to the file's type.
        rows: name of a matrix in the checkpoint -> its blocks in the file.
        plain: type of the file's other matrices: F32, F16 or BF16. Routers are float32.
    """

    def __init__(self, model: Any, rows: Mapping[str, Rows], plain: str = "F32") -> None:
        super().__init__()
        # layer, parameter -> (gate or up, expert) -> blocks
        stacks: dict[tuple[str, str], dict[tuple[int, int], Rows]] = {}
        for name, one in rows.items():
            match = _EXPERT.search(name)
            if match is not None:
                whole, half = ("gate_up_proj", _GATES[match[3]]) if match[3] in _GATES else ("down_proj", 0)
                stacks.setdefault((match[1], whole), {})[half, int(match[2])] = one
        self._matrices: dict[int, _Matrix] = {}
        for name, parameter in model.named_parameters():
            match = _STACK.search(name)
            found = {(0, 0): rows[name]} if name in rows else {}
            if match is not None:
                found = stacks.get((match[1], match[2]), {})
            if found or (parameter.ndim > 1 and part_of(name) != "router"):
                halves = 2 if match is not None and match[2] == "gate_up_proj" else 1
                self._matrices[_place(parameter)] = _matrix(parameter, found, halves, plain)
        if hasattr(model, "set_experts_implementation"):
            model.set_experts_implementation("eager")

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = self._matrices.get(_place(args[1])) if func is functional.linear else None
        if known is None:
            return func(*args, **(kwargs or {}))
        inputs, weight, *rest = args
        parts = weight.chunk(len(known.kinds))
        made = [func(rounded(inputs, kind), part) for kind, part in zip(known.kinds, parts, strict=True)]
        total = torch.cat(made, -1)
        if known.smallest is not None:
            first = weight.storage_offset() // weight.shape[1]
            total = total + func(error_of_sums(inputs), known.smallest[first : first + weight.shape[0]])
        bias = [*rest, *(kwargs or {}).values()]
        return total if not bias or bias[0] is None else total + bias[0]


def _place(parameter: Tensor) -> int:
    return parameter.untyped_storage().data_ptr()


def _matrix(parameter: Tensor, found: Mapping[tuple[int, int], Rows], halves: int, plain: str) -> _Matrix:
    kinds = tuple(found[half, 0].kind if (half, 0) in found else plain for half in range(halves))
    for part, kind in zip(parameter.detach().chunk(halves, -2), kinds, strict=True):
        if kind == plain:
            part.copy_(rounded(part, plain))
    if not set(kinds) & set(ASYMMETRIC):
        return _Matrix(kinds, None)
    columns = parameter.shape[-1]
    whole = torch.zeros(parameter.numel() // columns, columns // 32)
    size = parameter.shape[-2] // halves
    for (half, expert), one in found.items():
        if one.kind in ASYMMETRIC:
            first = expert * parameter.shape[-2] + half * size
            whole[first : first + size] = smallest(one.read(0, size), one.kind)
    return _Matrix(kinds, whole)
