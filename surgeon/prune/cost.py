"""What a cut model costs: parameters, bytes or seconds, as a sum over its attentions and FFNs.

A search needs costs that add up. `Cost.rest` is what every cut of the model has, `Cost.beside` what a layer
has while it stays (norms that serve no single module), and `Cost.module` one attention or FFN of given sizes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Protocol

from surgeon.checkpoint.checkpoint import Checkpoint
from surgeon.checkpoint.dtypes import DTYPES
from surgeon.structure.check import shapes
from surgeon.structure.cut import Cut, LayerShape
from surgeon.structure.parts import Section, Structure


class Cost(ABC):
    """An additive cost of the shapes of a model.

    Attributes:
        unit: "parameters", "bytes" or "seconds".
        rest: what does not depend on the cut.
    """

    unit: str
    rest: float

    def __init__(self, structure: Structure) -> None:
        self.structure = structure

    @abstractmethod
    def module(self, layer: int, kind: str, shape: LayerShape) -> float:
        """Return the cost of one attention or FFN.

        Args:
            layer: its number in the source.
            kind: "attention" or "ffn".
            shape: its sizes; those of the other kind do not matter. Without heads or channels it is gone.
        """

    def beside(self, layer: int) -> float:
        """Return what a layer costs beside its modules as long as it stays."""
        return 0.0

    def layer(self, layer: int, shape: LayerShape) -> float:
        """Return the cost of one layer that stays."""
        found = self.beside(layer)
        if self.structure.attention[layer] is not None:
            found += self.module(layer, "attention", shape)
        if self.structure.ffn[layer] is not None:
            found += self.module(layer, "ffn", shape)
        return found

    def total(self, cut: Cut) -> float:
        """Return the cost of what a cut leaves; its residual stream must be whole."""
        assert cut.hidden is None, "costs are those of a whole residual stream"
        kept = zip(cut.kept_layers, shapes(cut, self.structure), strict=True)
        return self.rest + sum(self.layer(layer, shape) for layer, shape in kept)

    @property
    def dense(self) -> float:
        """What the source costs."""
        return self.total(Cut.whole(self.structure.layers))

    def prunable(self) -> float:
        """Return what all attentions and FFNs that can be cut cost together."""
        layers = range(self.structure.layers)
        return sum(self.layer(n, self.structure.shape(n)) - self.beside(n) for n in layers)


class SizeCost(Cost):
    """Exact parameters or bytes, from the header of the source.

    Args:
        checkpoint: the source.
        structure: of it.
        unit: "parameters" or "bytes".
        dtype: what tensors of floating-point numbers will be stored as ("BF16"); None leaves them as they are.
    """

    def __init__(
        self, checkpoint: Checkpoint, structure: Structure, unit: str = "parameters", dtype: str | None = None
    ) -> None:
        super().__init__(structure)
        self.unit = unit
        self._tensors = checkpoint.tensors
        self._dtype = dtype
        owned: set[str] = set()
        self._own: dict[tuple[int, str], float] = {}
        self._unit: dict[tuple[int, str, str], float] = {}
        for layer in range(structure.layers):
            self._measure(layer, owned)
        self._beside = [0.0] * structure.layers
        self.rest = 0.0
        for name in checkpoint.tensors:
            if name in owned:
                continue
            number = _layer_number(name, structure.prefix)
            if number is not None and number < structure.layers:
                self._beside[number] += self._size(name)
            else:
                self.rest += self._size(name)

    def _measure(self, layer: int, owned: set[str]) -> None:
        """Note what the modules of a layer cost as a whole, and each unit of them."""
        attention, ffn = self.structure.attention[layer], self.structure.ffn[layer]
        if attention is not None:
            self._own[layer, "attention"] = sum(self._size(name) for name in attention.own)
            owned.update(attention.own)
            norms = [section for section in attention.norms if section.units == attention.heads]
            others = [section for section in attention.norms if section.units != attention.heads]
            heads = self._units(attention.queries + tuple(norms))
            heads += self._size(attention.output.weight) / attention.heads
            self._unit[layer, "attention", "heads"] = heads
            self._unit[layer, "attention", "groups"] = self._units(attention.key_values + tuple(others))
        if ffn is not None:
            self._own[layer, "ffn"] = sum(self._size(name) for name in ffn.own)
            owned.update(ffn.own)
            self._unit[layer, "ffn", "channels"] = (
                self._units(ffn.inputs) + self._size(ffn.output.weight) / ffn.width
            )

    def _size(self, name: str) -> float:
        info = self._tensors[name]
        if self.unit == "parameters":
            return float(info.elements)
        dtype = DTYPES[info.dtype]
        if self._dtype is not None and dtype.family == "float":
            dtype = DTYPES[self._dtype]
        return info.elements * dtype.bits / 8

    def _units(self, sections: Sequence[Section]) -> float:
        """Return what one unit of each section costs together."""
        return sum(
            self._size(section.tensor) * section.length / self._tensors[section.tensor].shape[section.axis] / section.units
            for section in sections
        )  # fmt: skip

    def beside(self, layer: int) -> float:
        return self._beside[layer]

    def module(self, layer: int, kind: str, shape: LayerShape) -> float:
        whole = self.structure.shape(layer)
        if kind == "ffn":
            if not shape.ffn:
                return 0.0
            gone = (whole.ffn - shape.ffn) * self._unit[layer, "ffn", "channels"]
            return self._own[layer, "ffn"] - gone
        if not shape.heads:
            return 0.0
        gone = (whole.heads - shape.heads) * self._unit[layer, "attention", "heads"]
        gone += (whole.groups - shape.groups) * self._unit[layer, "attention", "groups"]
        return self._own[layer, "attention"] - gone


def _layer_number(name: str, prefix: str) -> int | None:
    if not name.startswith(prefix):
        return None
    number = name[len(prefix) :].split(".", 1)[0]
    return int(number) if number.isdecimal() else None


class Table(Protocol):
    """Measured seconds; `surgeon.measure.table.LatencyTable` is one."""

    def attention_seconds(self, heads: int, groups: int) -> float:
        """Return the seconds of one layer's attention; without heads of none."""
        ...

    def ffn_seconds(self, width: int) -> float:
        """Return the seconds of one layer's FFN; without channels of none."""
        ...

    def parts(self, shapes: Sequence[LayerShape]) -> tuple[float, float, float]:
        """Return the seconds of a model's attentions, FFNs and rest."""
        ...


class TimeCost(Cost):
    """Seconds, from a measured table that is the same for all layers."""

    unit = "seconds"

    def __init__(self, table: Table, structure: Structure) -> None:
        super().__init__(structure)
        self.rest = table.parts(())[2]
        self._table = table

    def module(self, layer: int, kind: str, shape: LayerShape) -> float:
        if kind == "ffn":
            return self._table.ffn_seconds(shape.ffn)
        return self._table.attention_seconds(shape.heads, shape.groups)

    def beside(self, layer: int) -> float:
        """Return what the table says of parts that cannot be cut: its rows without heads or channels."""
        found = 0.0
        if self.structure.attention[layer] is None:
            found += self._table.attention_seconds(0, 0)
        if self.structure.ffn[layer] is None:
            found += self._table.ffn_seconds(0)
        return found
