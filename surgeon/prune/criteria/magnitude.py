"""Magnitude: units with small weights go first; needs no text.

A model computes the same when a channel's up row is multiplied by c and its down column divided by
c, so a norm of one of them says nothing. The scores do not change under that:

    FFN channel     ||down_j|| * ||up_j|| (* ||gate_j||)
    head            ||O_h V_h||_F, with V_h the value rows its head reads (and their biases as a further
                    column) and O_h its columns of the output matrix
    group           root of the sum of squares over its query heads

The product of a head's value and output matrices does not even change when both are multiplied by
a matrix and its inverse. Queries and keys are left out: they decide where a head looks, not how much it
writes, and where they are normalised their size has no meaning at all.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from surgeon.prune.criteria import Context, read_section
from surgeon.prune.ranking import Ranking
from surgeon.structure.cut import Kept
from surgeon.structure.parts import Attention, Section


class Magnitude:
    """Ranks by products of norms that do not depend on how a unit's scale is shared out."""

    name = "magnitude"
    version = 1
    needs: frozenset[str] = frozenset()
    solves = False

    def rank(self, context: Context) -> Ranking:
        """Rank the units of one module."""
        return context.ranking(_heads(context) if isinstance(context.part, Attention) else _channels(context))

    def bias(self, context: Context, kept: Kept) -> Tensor | None:
        return None


def _channels(context: Context) -> np.ndarray:
    squares: dict[tuple[str, int], Tensor] = {}
    for section, rows in context.producers():
        # A matrix and its bias are one producer; gate and up may be two ranges of one tensor.
        producer = (section.tensor.rpartition(".")[0], section.start)
        found = rows.double().square().sum(1)
        squares[producer] = squares[producer] + found if producer in squares else found
    product = context.weight.double().square().sum(0)
    for square in squares.values():
        product = product * square
    return product.sqrt().cpu().numpy()


def _heads(context: Context) -> np.ndarray:
    part = context.part
    assert isinstance(part, Attention)
    size = part.head_dim
    value, bias = _value_sections(context)
    rows = read_section(context.checkpoint, value).double().reshape(part.groups, size, -1)
    if bias is not None:
        shift = read_section(context.checkpoint, bias).double().reshape(part.groups, size, 1)
        rows = torch.cat([rows, shift], dim=2)
    rows = rows.to(context.device)
    made = torch.einsum("gae,gbe->gab", rows, rows)
    columns = context.weight.double().reshape(-1, part.heads, size)
    written = torch.einsum("oha,ohb->hab", columns, columns)
    # ||O V||^2 = tr(O'O V V'): two small matrices a head, never the product itself.
    squares = (written * made.repeat_interleave(part.per_group, dim=0)).sum((1, 2)).clamp(min=0)
    return squares.reshape(context.units, -1).sum(1).sqrt().cpu().numpy()


def _value_sections(context: Context) -> tuple[Section, Section | None]:
    """Return the sections of the value matrix and of its bias: the second of keys and values."""
    part = context.part
    assert isinstance(part, Attention)
    shapes = {s: context.checkpoint.tensors[s.tensor].shape for s in part.key_values}
    matrices = [section for section in part.key_values if len(shapes[section]) == 2]
    if len(matrices) != 2:
        raise ValueError(f"{context.module} has {len(matrices)} matrices of keys and values")
    value = matrices[1]
    path = value.tensor.removesuffix(".weight")
    biases = [s for s in part.key_values if s.tensor == f"{path}.bias" and s.start == value.start]
    return value, biases[0] if biases else None


CRITERION = Magnitude()
