"""Which matrices of a model methods that work matrix by matrix may change, under which names their inputs are seen, and how they lie in the files."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from surgeon import architectures
from surgeon.architectures.base import Expected
from surgeon.calibrate.pieces import Piece, load_expert, read_tensor
from surgeon.calibrate.skeleton import Skeleton
from surgeon.checkpoint.checkpoint import Checkpoint
from surgeon.checkpoint.dtypes import DTYPES
from surgeon.checkpoint.patterns import select
from surgeon.errors import InputError, Where

_KINDS = re.compile(r"(cross_)?attention_(q|k|v|o|qkv|kv|q_down|q_up|kv_down|kv_up)|ffn_(gate|up|down|gate_up)|expert_(gate|up|down|gate_up)|shared_expert_(gate|up|down)")  # fmt: skip
_CONV1D = ("gpt2",)
"""Families whose two-dimensional matrices are stored [in, out]."""
_SHARED = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj", "w3": "w1"}
"""Matrices that read what another one of the same module reads."""


@dataclass(frozen=True)
class Matrix:
    """One matrix [out, in], or one expert's slice of a stack of them.

    Attributes:
        tensor: the checkpoint tensor.
        layer: number of its layer.
        module: the name under which a walk shows its inputs.
        transposed: stored [in, out].
        expert: its place in a stack; None for a tensor of its own.
        rows, columns: outputs and inputs.
        routed: only some tokens reach it.
    """

    tensor: str
    layer: int
    module: str
    transposed: bool
    expert: int | None
    rows: int
    columns: int
    routed: bool

    @property
    def elements(self) -> int:
        return self.rows * self.columns

    @property
    def label(self) -> str:
        """Its name in reports."""
        return self.tensor if self.expert is None else f"{self.tensor}[{self.expert}]"


def matrices_of(
    checkpoint: Checkpoint, skeleton: Skeleton, *, ignore: Sequence[str] = ()
) -> tuple[tuple[Matrix, ...], ...]:
    """Return the matrices of every layer, in the order of the model's parameters.

    All linear maps inside layers count; embeddings, head, routers, norms and biases never do.

    Args:
        ignore: patterns of tensors that are left alone: a name, a glob, or re:REGEX.

    Raises:
        UsageError: E218 a pattern that matches nothing.
        InputError: E317 the layers hold no matrix, or none that is left.
    """
    config = checkpoint.config or {}
    record = architectures.get(config.get("model_type"))
    assert record is not None  # the skeleton refuses others
    expected = record.layout(config, checkpoint.tensors).tensors
    skipped = {name for pattern in ignore for name in select(pattern, checkpoint.tensors, "--ignore")}
    conv = record.model_type in _CONV1D
    found = tuple(
        tuple(_layer(layer, skeleton.pieces(layer).values(), expected, checkpoint, skipped, conv))
        for layer in range(skeleton.layers)
    )
    if not any(found):
        raise InputError("E317", f"{checkpoint.label} has no matrix left to work on",
                         where=Where(checkpoint.label), help="--ignore covers all of them, or the model is of another kind")  # fmt: skip
    return found


def _layer(
    layer: int, parameters: Iterable[Sequence[Piece]], expected: Mapping[str, Expected], checkpoint: Checkpoint,
    skipped: set[str], conv: bool,
) -> list[Matrix]:  # fmt: skip
    found: dict[tuple[str, int | None], Matrix] = {}
    modules = {piece.module for pieces in parameters for piece in pieces}
    for pieces in parameters:
        for piece in pieces:
            spec = expected.get(piece.tensor)
            if spec is None or not _KINDS.fullmatch(spec.kind) or piece.tensor in skipped:
                continue
            info = checkpoint.tensors[piece.tensor]
            stack = int(piece.stored[0]) if piece.stored else None
            if len(info.shape) != (2 if stack is None else 3) or DTYPES[info.dtype].family != "float":
                continue
            if (piece.tensor, stack) in found:  # gate and up lie in one matrix and read the same
                continue
            transposed = conv if stack is None else _stacked_transposed(spec)
            height, width = info.shape[-2:]
            rows, columns = (width, height) if transposed else (height, width)
            found[piece.tensor, stack] = Matrix(
                piece.tensor,
                layer,
                _shared(piece.module, modules),
                transposed,
                stack,
                rows,
                columns,
                piece.expert is not None,
            )
    return list(found.values())


def _stacked_transposed(spec: Expected) -> bool:
    """Say whether experts are stored [experts, in, out], from the names of the axes."""
    hidden_first = spec.axes[1] == "hidden"
    return not hidden_first if spec.kind == "expert_down" else hidden_first


def _shared(module: str, modules: set[str]) -> str:
    parent, _, leaf = module.rpartition(".")
    other = f"{parent}.{_SHARED.get(leaf, leaf)}"
    return other if other in modules else module


def read_matrix(checkpoint: Checkpoint, matrix: Matrix) -> Tensor:
    """Return a matrix [out, in], float32."""
    info = checkpoint.tensors[matrix.tensor]
    if matrix.expert is None:
        value = read_tensor(checkpoint, matrix.tensor, 0, info.elements, torch.float32).reshape(info.shape)
    else:
        piece = Piece("", matrix.tensor, (), (matrix.expert,), matrix.expert)
        value = load_expert(checkpoint, [piece], tuple(info.shape[1:]), torch.float32)
    return value.T.contiguous() if matrix.transposed else value
