"""Take a direction out of everything that writes to the residual stream, or of chosen matrices.

W <- (I - w v v') W for attention outputs, FFN outputs (every expert's) and embedding rows. With one
direction for the whole model this is directional ablation ("Refusal in Language Models Is Mediated by a
Single Direction", arXiv 2406.11717, section 2.4); with each layer's own it is ThinkEdit without the choice of heads.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np

from surgeon.checkpoint.checkpoint import Checkpoint
from surgeon.edit.direction_file import Directions
from surgeon.edit.directions import unit
from surgeon.edit.edited_view import Projection, along, straight
from surgeon.edit.thinkedit import bias_of, of_writer
from surgeon.edit.writers import Stream
from surgeon.errors import UsageError

MATRICES = ("attention", "ffn", "embedding")


def projections(
    checkpoint: Checkpoint,
    stream: Stream,
    directions: Directions,
    *,
    matrices: Collection[str] = ("attention", "ffn"),
    layer: int | None = None,
    layers: tuple[int, int] | None = None,
    strength: float = 1.0,
    project_bias: bool = False,
) -> dict[str, Projection]:
    """Return what is taken out of which matrices.

    Args:
        matrices: of `MATRICES`.
        layer: whose direction is taken out everywhere; None = every layer its own.
        layers: the layers that are edited, the upper end exclusive; None = all that have a direction.
        strength: w.
        project_bias: of biases, too.

    Raises:
        UsageError: E298 nothing is chosen, or a layer that does not exist; the embedding without ``layer``.
    """
    unknown = [name for name in matrices if name not in MATRICES]
    if unknown or not matrices:
        raise UsageError(
            "E298", f"the matrices are {', '.join(unknown) or 'none'}", help="some of " + ", ".join(MATRICES)
        )
    if layer is not None and layer not in directions.vectors:
        raise UsageError(
            "E298",
            f"there is no direction for layer {layer}",
            help=f"layers 0 to {stream.layers - 1} have one",
        )
    if "embedding" in matrices and layer is None:
        raise UsageError(
            "E298",
            "the embedding belongs to no layer",
            help="--layer N says whose direction is taken out of it",
        )
    first, last = layers if layers is not None else (0, stream.layers)
    if not 0 <= first < last <= stream.layers:
        raise UsageError(
            "E298",
            f"the layers {first}:{last} of {stream.layers}",
            help=f"A:B with 0 <= A < B <= {stream.layers}",
        )
    found: dict[str, Projection] = {}
    for writer in stream.writers:
        source = writer.layer if layer is None else layer
        if (
            writer.part not in matrices
            or not first <= writer.layer < last
            or source not in directions.vectors
        ):
            continue
        vector = unit(directions.vectors, source)
        found[writer.tensor] = of_writer(writer, checkpoint, vector, strength)
        if project_bias and writer.bias is not None and len(checkpoint.tensors[writer.bias].shape) == 1:
            found[writer.bias] = bias_of(writer, checkpoint, vector, strength)
    if "embedding" in matrices and layer is not None:
        found[stream.embedding] = straight(unit(directions.vectors, layer), strength, 1)
    return found


def effect(
    checkpoint: Checkpoint, edited: Checkpoint, projections: Mapping[str, Projection], code: str | None = None
) -> list[dict[str, float | str]]:
    """Return |v' W| of each edited matrix before and after, as it will be stored."""
    found: list[dict[str, float | str]] = []
    for name, projection in projections.items():
        if projection.bias:
            continue
        stored = code or checkpoint.tensors[name].dtype
        before = along(checkpoint, name, projection.read, projection.output_axis)
        after = along(edited, name, projection.read, projection.output_axis, stored)
        found.append(
            {"tensor": name, "before": float(np.linalg.norm(before)), "after": float(np.linalg.norm(after))}
        )
    return found
