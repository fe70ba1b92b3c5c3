"""ThinkEdit: take the direction of short thinking out of the heads that write it.

"ThinkEdit: Interpretable Weight Editing to Mitigate Overly Short Thinking in Reasoning Models" (arXiv
2503.22048). A head h of layer l adds W_h a_h to the residual stream; with v the unit vector from short to long

    score    s_lh = - v' W_h mean(a_h)          over the responses with short thinking (section 3.2)
    edit     W_h <- (I - w v v') W_h            for the heads with the largest scores (section 3.3)

The released models edit about 4 % of the heads, the paper's text 2 %. Behind a norm (Gemma 2 and 3) heads are
scored with g o v, and the direction is taken out of what leaves the norm; that norm divides by the size of the
whole output, so editing some heads rescales the others a little.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from surgeon.checkpoint.checkpoint import Checkpoint
from surgeon.edit.direction_file import Directions
from surgeon.edit.directions import unit
from surgeon.edit.edited_view import Projection, along, behind_norm, straight
from surgeon.edit.writers import Stream, Writer, gain_of
from surgeon.errors import InputError, UsageError

FRACTION = 0.04


@dataclass(frozen=True, order=True)
class Head:
    """One query head of one layer."""

    layer: int
    head: int

    def __str__(self) -> str:
        return f"{self.layer}:{self.head}"


def scores(checkpoint: Checkpoint, stream: Stream, directions: Directions) -> dict[Head, float]:
    """Return how much each head writes towards short thinking, on average over the short responses.

    Args:
        checkpoint: the model.
        stream: its writers.
        directions: with the mean inputs of the attention outputs.

    Raises:
        InputError: E416 the directions hold no such inputs, or of another width.
    """
    found: dict[Head, float] = {}
    for writer in _with_direction(stream, directions):
        mean = directions.inputs.get(writer.layer)
        if mean is None or len(mean) != writer.inputs:
            raise InputError("E416", f"the directions hold no mean inputs of {writer.tensor}, so heads cannot be scored",
                             help="extract them with --method thinkedit, or name the heads: --heads 3:1,5:0")  # fmt: skip
        vector, gain = unit(directions.vectors, writer.layer), gain_of(writer, checkpoint)
        read = vector if gain is None else gain * vector
        parts = -along(checkpoint, writer.tensor, read, writer.output_axis)[0] * mean
        for head in range(writer.heads):
            found[Head(writer.layer, head)] = float(parts[writer.columns(head)].sum())
    return found


def _with_direction(stream: Stream, directions: Directions) -> list[Writer]:
    return [writer for writer in stream.attention() if writer.layer in directions.vectors]


def choose(
    scored: Mapping[Head, float], *, fraction: float | None = FRACTION, count: int | None = None
) -> list[Head]:
    """Return the heads with the largest scores, at least one; ties go to the lower layer, then head.

    Args:
        scored: all heads.
        fraction: of the heads, rounded; in (0, 1].
        count: or how many.

    Raises:
        UsageError: E297 out of range.
    """
    if count is None:
        if fraction is None or not 0 < fraction <= 1:
            raise UsageError("E297", f"the fraction of heads is {fraction}", help="in (0, 1]; 0.04 is usual")
        count = max(1, round(fraction * len(scored)))
    if not 1 <= count <= len(scored):
        raise UsageError("E297", f"{count} heads of {len(scored)}", help=f"from 1 to {len(scored)}")
    return sorted(scored, key=lambda head: (-scored[head], head))[:count]


def parse_heads(texts: Iterable[str]) -> list[Head]:
    """Parse LAYER:HEAD entries.

    Raises:
        UsageError: E297 malformed, or given twice.
    """
    found: list[Head] = []
    for text in texts:
        layer, sign, head = text.partition(":")
        if not sign or not layer.strip().isdecimal() or not head.strip().isdecimal():
            raise UsageError("E297", f'"{text}" is not a head', help="LAYER:HEAD, from 0: --heads 3:1,5:0")
        entry = Head(int(layer), int(head))
        if entry in found:
            raise UsageError("E297", f"head {entry} is given twice", help="name each head once")
        found.append(entry)
    return found


def projections(
    checkpoint: Checkpoint,
    stream: Stream,
    directions: Directions,
    heads: Sequence[Head],
    *,
    strength: float = 1.0,
    project_bias: bool = False,
) -> dict[str, Projection]:
    """Return what is taken out of which matrices.

    Args:
        heads: the heads to edit.
        strength: w: 1 takes all of the direction out, below 1 a part, above 1 reflects it.
        project_bias: take it out of the biases of the edited matrices, too.

    Raises:
        UsageError: E297 a head the model does not have, or a layer without direction.
    """
    writers = {writer.layer: writer for writer in stream.attention()}
    by_layer: dict[int, list[int]] = {}
    for entry in sorted(heads):
        writer = writers.get(entry.layer)
        if writer is None or entry.head >= writer.heads:
            most = (
                f"layers 0 to {stream.layers - 1}"
                if writer is None
                else f"heads 0 to {writer.heads - 1} in layer {entry.layer}"
            )
            raise UsageError("E297", f"there is no head {entry}", help=f"the model has {most}")
        if entry.layer not in directions.vectors:
            raise UsageError(
                "E297",
                f"there is no direction for layer {entry.layer}",
                help="extract directions of this model",
            )
        by_layer.setdefault(entry.layer, []).append(entry.head)
    found: dict[str, Projection] = {}
    for layer, numbers in by_layer.items():
        writer = writers[layer]
        chosen = np.zeros(writer.inputs, bool)
        for number in numbers:
            chosen[writer.columns(number)] = True
        vector = unit(directions.vectors, layer)
        found[writer.tensor] = of_writer(writer, checkpoint, vector, strength, chosen)
        if project_bias and writer.bias is not None:
            found[writer.bias] = bias_of(writer, checkpoint, vector, strength)
    return found


def of_writer(
    writer: Writer,
    checkpoint: Checkpoint,
    vector: np.ndarray,
    strength: float,
    inputs: np.ndarray | None = None,
) -> Projection:
    """Return the projection of one matrix, through the norm behind it where there is one."""
    gain = gain_of(writer, checkpoint)
    if gain is None:
        return straight(vector, strength, writer.output_axis, inputs)
    return behind_norm(vector, gain, strength, writer.output_axis, inputs)


def bias_of(writer: Writer, checkpoint: Checkpoint, vector: np.ndarray, strength: float) -> Projection:
    """Return the projection of a matrix's bias [out]."""
    whole = of_writer(writer, checkpoint, vector, strength)
    return Projection(whole.read, whole.write, strength, 0, None, True)


def effect(
    checkpoint: Checkpoint, edited: Checkpoint, stream: Stream, projections: Mapping[str, Projection],
    heads: Sequence[Head], code: str | None = None,
) -> list[dict[str, float | int]]:  # fmt: skip
    """Return |v' W_h| of each edited head before and after, as it will be stored.

    Args:
        code: storage type of the result where it is not the tensor's own.
    """
    writers = {writer.layer: writer for writer in stream.attention()}
    found: list[dict[str, float | int]] = []
    for layer in sorted({head.layer for head in heads}):
        writer = writers[layer]
        projection = projections[writer.tensor]
        stored = code or checkpoint.tensors[writer.tensor].dtype
        before = along(checkpoint, writer.tensor, projection.read, writer.output_axis)[0]
        after = along(edited, writer.tensor, projection.read, writer.output_axis, stored)[0]
        for entry in sorted(h for h in heads if h.layer == layer):
            part = writer.columns(entry.head)
            found.append({
                "layer": layer, "head": entry.head, "before": float(np.linalg.norm(before[part])),
                "after": float(np.linalg.norm(after[part])),
            })  # fmt: skip
    return found
