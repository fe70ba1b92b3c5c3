"""One expert's weights at a time, whatever the storage: single tensors, stacks, alternating or transposed channels.

Two ways to look at them. `read_expert` gives matrices the way formulas write them: gate and up [width, hidden], down
[hidden, width]. `parts` and `Part` give what is stored of one expert as it lies there, which is enough for sums,
means and distances, and is the address under which replacements are found (`Part.key`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from surgeon.checkpoint.checkpoint import Checkpoint
from surgeon.checkpoint.dtypes import DTYPES
from surgeon.checkpoint.header import printable
from surgeon.errors import InputError, Where
from surgeon.kernels.cast import widen
from surgeon.structure.experts.parts import ExpertLayer, ExpertTensor, Role

WEIGHTS: tuple[Role, ...] = ("gate", "up", "gate_up", "down")
BIASES: tuple[Role, ...] = ("gate_bias", "up_bias", "gate_up_bias", "down_bias")
ROUTING: tuple[Role, ...] = ("router", "router_bias", "correction_bias")


@dataclass(frozen=True)
class Part:
    """What one stored tensor holds of one expert.

    Attributes:
        tensor: the stored tensor.
        expert: whose part it is.
        shape: of the part: the tensor's, without the axis that runs over experts.
        channel_axis: of the part, None without channels.
        offset: elements of the tensor before the part; None where it is not one stretch of it.
    """

    tensor: ExpertTensor
    expert: int
    shape: tuple[int, ...]
    channel_axis: int | None
    offset: int | None

    @property
    def key(self) -> str:
        """The name a replacement of this part goes by: the tensor's, with "#expert" where it holds all experts."""
        return self.tensor.name if self.tensor.expert_axis is None else f"{self.tensor.name}#{self.expert}"

    @property
    def elements(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64))

    def read(self, checkpoint: Checkpoint, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Return elements [start, stop) of the flattened part as float32, or float64 where that is stored."""
        name = self.tensor.name
        info = checkpoint.tensors[name]
        stop = self.elements if stop is None else stop
        if self.offset is not None:
            return widen(checkpoint.read(name, self.offset + start, self.offset + stop), info.dtype)
        whole = checkpoint.read(name, 0, info.elements).reshape(info.shape)
        part = np.take(whole, self.expert, axis=self.tensor.expert_axis)
        return widen(np.ascontiguousarray(part.reshape(-1)[start:stop]), info.dtype)

    def read_rows(self, checkpoint: Checkpoint, rows: np.ndarray) -> np.ndarray:
        """Return chosen rows [rows, columns] along the part's first axis, reading no others."""
        width = self.elements // self.shape[0]
        found = np.empty((len(rows), width), dtype=np.float32)
        place = 0
        while place < len(rows):
            end = place + 1
            while end < len(rows) and rows[end] == rows[end - 1] + 1:  # neighbours come in one read
                end += 1
            first = int(rows[place])
            found[place:end] = self.read(checkpoint, first * width, (first + end - place) * width).reshape(
                -1, width
            )
            place = end
        return found


@dataclass(frozen=True)
class ExpertWeights:
    """One expert, f(x) = down a(gate x, up x), in float32.

    Attributes:
        gate: [width, hidden], None in families whose experts have no gate.
        up: [width, hidden].
        down: [hidden, width].
        gate_bias, up_bias: [width] or None.
        down_bias: [hidden] or None.
    """

    gate: np.ndarray | None
    up: np.ndarray
    down: np.ndarray
    gate_bias: np.ndarray | None = None
    up_bias: np.ndarray | None = None
    down_bias: np.ndarray | None = None


def refuse_quantized(checkpoint: Checkpoint, layer: ExpertLayer) -> None:
    """Refuse a layer whose weights are not plain numbers.

    Raises:
        InputError: E442.
    """
    method = layer.quantized
    coded = next((t for t in layer.tensors if t.companion), None)
    for tensor in () if method or coded else layer.tensors:
        if DTYPES[checkpoint.tensors[tensor.name].dtype].family != "float":
            coded = tensor
            break
    if method is None and coded is None:
        return
    what = method or (checkpoint.tensors[coded.name].dtype if coded else "")
    raise InputError(
        "E442", f"the experts of layer {layer.index} of {checkpoint.label} are stored as {what}, and their values are needed here",
        where=Where(tensor=printable(coded.name)) if coded else None,
        help="--dequantize reads them as plain numbers; or choose a criterion that needs no weights, such as reap",
    )  # fmt: skip


def parts(checkpoint: Checkpoint, layer: ExpertLayer, expert: int, *roles: Role) -> dict[Role, Part]:
    """Return what is stored of one expert, by role, in the order of ``roles`` (matrices and biases by default).

    Raises:
        InputError: E442 quantized.
    """
    refuse_quantized(checkpoint, layer)
    return _parts(checkpoint, layer, expert, roles or (*WEIGHTS, *BIASES))


def routing_parts(checkpoint: Checkpoint, layer: ExpertLayer, expert: int) -> dict[Role, Part]:
    """Return an expert's router row, its router bias and its correction bias, those that exist.

    Raises:
        InputError: E442 quantized.
    """
    for role in ROUTING:
        for tensor in layer.of(role):
            info = checkpoint.tensors[tensor.name]
            if tensor.companion or DTYPES[info.dtype].family != "float":
                raise InputError("E442", f"the router of layer {layer.index} of {checkpoint.label} is stored as {info.dtype}",
                                 where=Where(tensor=printable(tensor.name)), help="its values are needed here: --dequantize")  # fmt: skip
    return _parts(checkpoint, layer, expert, ROUTING)


def _parts(
    checkpoint: Checkpoint, layer: ExpertLayer, expert: int, roles: tuple[Role, ...]
) -> dict[Role, Part]:
    found: dict[Role, Part] = {}
    for role in roles:
        for tensor in layer.of(role):
            if tensor.expert is None or tensor.expert == expert:
                found[role] = _part(checkpoint, tensor, expert)
    return found


def _part(checkpoint: Checkpoint, tensor: ExpertTensor, expert: int) -> Part:
    shape = checkpoint.tensors[tensor.name].shape
    along, channels = tensor.expert_axis, tensor.channel_axis
    if along is None:
        return Part(tensor, expert, tuple(shape), channels, 0)
    rest = (*shape[:along], *shape[along + 1 :])
    if channels is not None and channels > along:
        channels -= 1
    # Axes of length 1 in front of the experts' (a bias of shape [1, experts]) leave a part in one stretch.
    stretch = all(length == 1 for length in shape[:along])
    each = int(np.prod(rest, dtype=np.int64))
    return Part(tensor, expert, rest, channels, expert * each if stretch else None)


def channel_rows(part: Part, width: int) -> np.ndarray:
    """Return where an expert's channels lie along the part's channel axis.

    Returns:
        int64 [1, width], or [2, width] (gate, up) for a part that holds both.
    """
    order = part.tensor.order
    if order == "plain":
        return np.arange(width)[None]
    if order == "interleaved":
        return np.stack([np.arange(0, 2 * width, 2), np.arange(1, 2 * width, 2)])
    return np.stack([np.arange(width), np.arange(width, 2 * width)])


def read_expert(checkpoint: Checkpoint, layer: ExpertLayer, expert: int) -> ExpertWeights:
    """Return one expert's matrices and biases in float32, in the orientation of `ExpertWeights`.

    Raises:
        InputError: E442 quantized.
    """
    found: dict[str, np.ndarray] = {}
    for role, part in parts(checkpoint, layer, expert).items():
        values = part.read(checkpoint).reshape(part.shape).astype(np.float32, copy=False)
        if role in ("down", "down_bias"):
            found[role] = values.T if role == "down" and part.channel_axis == 0 else values
            continue
        values = np.moveaxis(values, part.channel_axis or 0, 0)
        if role.startswith("gate_up"):
            ending = role.removeprefix("gate_up")
            gate, up = channel_rows(part, len(values) // 2)
            found[f"gate{ending}"], found[f"up{ending}"] = values[gate], values[up]
        else:
            found[role] = values
    return ExpertWeights(**{**{"gate": None}, **found})  # type: ignore[arg-type]


def each_expert(checkpoint: Checkpoint, layer: ExpertLayer) -> Iterator[ExpertWeights]:
    """Yield the experts of a layer in order, one in memory at a time."""
    for expert in range(layer.count):
        yield read_expert(checkpoint, layer, expert)


def router_rows(checkpoint: Checkpoint, layer: ExpertLayer) -> np.ndarray:
    """Return the router's rows, float32 [experts, hidden].

    Raises:
        InputError: E442 quantized.
    """
    rows = []
    for expert in range(layer.count):
        part = routing_parts(checkpoint, layer, expert)["router"]
        rows.append(part.read(checkpoint).astype(np.float32, copy=False))
    return np.stack(rows)
