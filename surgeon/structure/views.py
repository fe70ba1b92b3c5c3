"""The model a cut leaves, as a Checkpoint that is read from the source: masked in the old shapes, or physically smaller.

Both compute the same: a removed head or channel contributes through columns of one output matrix, so
zeros there (`MaskedView`) and slices everywhere (`PrunedView`) give equal logits. Weights that were solved
again for the kept columns take the place of the source's in either.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from surgeon.checkpoint.checkpoint import Checkpoint
from surgeon.checkpoint.dtypes import DTYPES
from surgeon.checkpoint.header import TensorInfo, printable
from surgeon.errors import InputError, UsageError, Where
from surgeon.structure.check import check, kept_groups, kept_heads
from surgeon.structure.config import pruned_config
from surgeon.structure.cut import Cut, Kept
from surgeon.structure.cut_view import CutView, KeptInputs
from surgeon.structure.find import record_of, residual_writers
from surgeon.structure.parts import Attention, Ffn, Section, Structure
from surgeon.structure.selection import Selection


class MaskedView(CutView):
    """A Checkpoint of the source's shapes that computes what the pruned model computes.

    Columns of output matrices that belong to removed heads and channels are zero; a dropped layer, or a
    branch that is removed altogether, has output matrices and biases of zeros.

    Args:
        checkpoint: the source.
        structure: from `surgeon.structure.find.structure_of`.
        cut: what is kept.
        solved: tensors under the source's names of output matrices and their biases, at kept width, in the
            source's orientation, of any float type; what it lacks is the source's. It may hold a bias that the
            source lacks if the family can have one: all biases that come with it are added as zeros.

    Raises:
        UsageError, InputError: as `surgeon.structure.check.check`.
        InputError: E366 a dropped layer of a model that normalises its residual sums (BERT), E369 solved
            tensors do not fit.
    """

    def __init__(
        self, checkpoint: Checkpoint, structure: Structure, cut: Cut, solved: Checkpoint | None = None
    ) -> None:
        config = checkpoint.config
        assert config is not None  # structure_of refuses a model without one
        check(cut, structure, config, allow_norm_approx=True)
        if cut.hidden is not None:
            raise UsageError("E260", "a cut of the residual stream has no masked equivalent: its norms change",
                             help="compare the pruned model itself with the source")  # fmt: skip
        super().__init__(checkpoint, structure, cut, solved)
        self.config = self.source.config
        self.tensors = dict(self.source.tensors)
        self._zero = self._zeros()
        self._masked = {
            name: kept
            for name, kept in self.outputs.items()
            if kept.axis is not None and len(kept.indices) < self.tensors[name].shape[kept.axis]
        }

    def _zeros(self) -> frozenset[str]:
        """Return the tensors that are zero as a whole: output matrices and biases of what is dropped."""
        record, layout = record_of(self.source)
        found: set[str] = set()
        for layer, kept in enumerate(self.cut.layers):
            if kept is None:
                if record.post_norm:
                    raise InputError(
                        "E366", f"a {record.model_type} model normalises what every layer leaves, so no weights make layer {layer} "
                        "pass its input through", help="use PrunedView, which leaves the layer out",
                    )  # fmt: skip
                found |= residual_writers(layout, layer)
                continue
            for part, units in ((self.structure.attention[layer], kept.heads), (self.structure.ffn[layer], kept.channels)):  # fmt: skip
                if part is not None and units == ():
                    found |= {part.output.weight, part.output.bias or part.output.weight}
        return frozenset(found & self.tensors.keys())

    def computed(self, name: str) -> bool:
        """Say whether values are computed, so that a byte copy is impossible."""
        return (
            name in self._zero or name in self._masked or self.is_solved(name) or self.source_computed(name)
        )

    def granularity(self, name: str) -> int:
        """Elements that are cheapest to read together: one row of a masked matrix."""
        if name in self._zero:
            return 1
        if name in self._masked:
            return self.tensors[name].shape[-1]
        if self.is_solved(name):
            return self._solved.granularity(name) if self._solved is not None else 1
        return self.source.granularity(name)

    def read_bytes(self, name: str, start: int, stop: int) -> np.ndarray:
        """Return stored bytes of a tensor the cut leaves alone."""
        if self.computed(name):
            raise AssertionError(f"{name} is masked; it has no stored bytes")
        return self.source.read_bytes(name, start, stop)

    def read(self, name: str, start: int, stop: int) -> np.ndarray:
        """Return elements [start, stop) of the flattened tensor; zeros for what is removed."""
        if name in self._zero:
            return np.zeros(stop - start, dtype=DTYPES[self.tensors[name].dtype].carrier)
        if name in self._masked:
            width = self.tensors[name].shape[-1]
            first, end = start // width, -(-stop // width)
            rows = self._masked_rows(name, self._masked[name], first, end)
            return rows.reshape(-1)[start - first * width : stop - first * width]
        if self.is_solved(name):
            return self.solved_values(name, start, stop)
        return self.source.read(name, start, stop)

    def _masked_rows(self, name: str, kept: KeptInputs, first: int, end: int) -> np.ndarray:
        """Return rows [first, end) of a masked matrix."""
        width = self.tensors[name].shape[-1]
        by_column = kept.axis == 1
        if not self.is_solved(name):
            rows = np.array(self.source.read(name, first * width, end * width)).reshape(-1, width)
            removed = np.ones(self.tensors[name].shape[kept.axis or 0], dtype=bool)
            removed[kept.indices] = False
            if by_column:
                rows[:, removed] = 0
            else:
                rows[removed[first:end]] = 0
            return rows
        if by_column:
            count = len(kept.indices)
            values = self.solved_values(name, first * count, end * count).reshape(-1, count)
            rows = np.zeros((end - first, width), dtype=values.dtype)
            rows[:, kept.indices] = values
            return rows
        low, high = np.searchsorted(kept.indices, (first, end))
        values = self.solved_values(name, int(low) * width, int(high) * width).reshape(-1, width)
        rows = np.zeros((end - first, width), dtype=values.dtype)
        rows[kept.indices[low:high] - first] = values
        return rows


class PrunedView(CutView):
    """A Checkpoint of the pruned model: sliced tensors, layers numbered anew, its own configuration.

    Values of a tensor that is only sliced are the source's bits; a tensor that is not touched can be
    copied byte by byte, under its new name.

    Args:
        checkpoint, structure, cut, solved: as in `MaskedView`.
        allow_norm_approx: as in `surgeon.structure.check.check`.

    Attributes:
        config: a stock configuration where the library's class can hold the result, else with ``block_configs``.
        source_names: name -> the source's name of it.
        notes: sentences on what is left out beside the cut.

    Raises:
        UsageError, InputError: as `surgeon.structure.check.check` and `surgeon.structure.config.pruned_config`;
            E368 a tensor nobody knows lies in a model whose residual stream is cut, E369 as in `MaskedView`.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        structure: Structure,
        cut: Cut,
        solved: Checkpoint | None = None,
        *,
        allow_norm_approx: bool = False,
    ) -> None:
        config = checkpoint.config
        assert config is not None  # structure_of refuses a model without one
        check(cut, structure, config, allow_norm_approx=allow_norm_approx)
        super().__init__(checkpoint, structure, cut, solved)
        assert self.source.config is not None
        self.config = pruned_config(self.source.config, self.structure, cut)
        self.notes: list[str] = []
        self.tensors: dict[str, TensorInfo] = {}
        self.source_names: dict[str, str] = {}
        self._selections: dict[str, Selection] = {}
        self._predicting = self._outside_predictors()
        kept = self._kept_indices()
        gone = self._gone()
        for name, info in self.source.tensors.items():
            renamed = self._renamed(name)
            if renamed is None or name in gone:
                continue
            axes = kept.get(name, {})
            if self.is_solved(name):  # its input axis is at kept width already
                axes = {axis: indices for axis, indices in axes.items() if axis != self.outputs[name].axis}
                info = replace(info, shape=self._solved_info(name).shape)
            if axes:
                self._selections[name] = Selection(info.shape, axes)
                info = replace(info, shape=self._selections[name].shape)
            info = replace(info, name=renamed)
            self.tensors[renamed] = replace(info, nbytes=info.elements * DTYPES[info.dtype].bits // 8)
            self.source_names[renamed] = name

    def _solved_info(self, name: str) -> TensorInfo:
        assert self._solved is not None
        return self._solved.tensors[name]

    def _kept_indices(self) -> dict[str, dict[int, np.ndarray]]:
        """Return tensor -> axis -> kept indices, for every axis that becomes shorter."""
        masks: dict[str, dict[int, np.ndarray]] = defaultdict(dict)

        def keep(section: Section, units: Kept) -> None:
            axes = masks[section.tensor]
            if section.axis not in axes:
                axes[section.axis] = np.ones(
                    self.source.tensors[section.tensor].shape[section.axis], dtype=bool
                )
            flags = np.zeros(section.units, dtype=bool)
            flags[list(units)] = True
            place = slice(section.start, section.start + section.length)
            axes[section.axis][place] = np.repeat(flags, section.length // section.units)

        for number in self.cut.kept_layers:
            layer = self.cut.layers[number]
            attention, ffn = self.structure.attention[number], self.structure.ffn[number]
            assert layer is not None
            if attention is not None and layer.heads:
                heads = kept_heads(self.cut, attention)
                groups = kept_groups(heads, attention)
                for section in attention.queries:
                    keep(section, heads)
                for section in attention.key_values:
                    keep(section, groups)
                for section in attention.norms:
                    keep(section, heads if section.units == attention.heads else groups)
                keep(_output_section(attention), heads)
            if ffn is not None and layer.channels:
                for section in (*ffn.inputs, _output_section(ffn)):
                    keep(section, layer.channels)
        for section in self._hidden_sections():
            assert self.cut.hidden is not None
            keep(section, self.cut.hidden)
        return {
            name: shorter
            for name, axes in masks.items()
            if (shorter := {axis: np.flatnonzero(mask) for axis, mask in axes.items() if not mask.all()})
        }

    def _hidden_sections(self) -> Iterator[Section]:
        """Yield the ranges of all tensors along the residual stream, if it is cut."""
        width = self.structure.hidden
        if self.cut.hidden is None or len(self.cut.hidden) == width:
            return
        _, layout = record_of(self.source)
        for name in self.source.tensors:
            spec = layout.tensors.get(name)
            if spec is None:
                raise InputError(
                    "E368", f"{printable(name)} of {self.label} is unknown, so it cannot be cut with the residual stream",
                    where=Where(self.label, tensor=printable(name)), help="remove it, or prune heads, FFN channels or layers",
                )  # fmt: skip
            for axis, label in enumerate(spec.axes):
                for place in range({"hidden": 1, "two_hidden": 2}.get(label, 0)):
                    yield Section(name, axis, place * width, width, width)

    def _gone(self) -> frozenset[str]:
        """Return the tensors of branches that are removed altogether, in layers that stay."""
        found: set[str] = set()
        for number in self.cut.kept_layers:
            layer = self.cut.layers[number]
            assert layer is not None
            for part, units in ((self.structure.attention[number], layer.heads), (self.structure.ffn[number], layer.channels)):  # fmt: skip
                if part is not None and units == ():
                    found.update(part.own)
        return frozenset(found)

    def _outside_predictors(self) -> frozenset[str]:
        """Return the tensors outside the layers that predict further tokens, if layers they build on are dropped."""
        if len(self.cut.kept_layers) == self.structure.layers:
            return frozenset()
        _, layout = record_of(self.source)
        found = {n for n, spec in layout.tensors.items() if spec.layer is None and spec.group.startswith("prediction")}  # fmt: skip
        return frozenset(found & self.source.tensors.keys())

    def _renamed(self, name: str) -> str | None:
        """Return a tensor's name in the pruned model, None for one of a layer that is dropped."""
        if name in self._predicting:
            note = "the block that predicts further tokens from all layers is left out"
            if note not in self.notes:
                self.notes.append(note)
            return None
        number, _, rest = name.removeprefix(self.structure.prefix).partition(".")
        if not name.startswith(self.structure.prefix) or not number.isdecimal() or not rest:
            return name
        kept, layer = self.cut.kept_layers, int(number)
        if layer >= self.structure.layers:  # predicts further tokens from the last layer's output
            if len(kept) == self.structure.layers:
                return name
            note = f"layer {layer}, which predicts a further token from all layers, is left out"
            if note not in self.notes:
                self.notes.append(note)
            return None
        return f"{self.structure.prefix}{kept.index(layer)}.{rest}" if layer in kept else None

    def computed(self, name: str) -> bool:
        """Say whether values are gathered or solved, so that a byte copy is impossible."""
        source = self.source_names[name]
        return source in self._selections or self.is_solved(source) or self.source_computed(source)

    def granularity(self, name: str) -> int:
        """Elements that are cheapest to read together: one row of a sliced tensor."""
        source = self.source_names[name]
        if source in self._selections:
            return self._selections[source].granularity
        if self.is_solved(source) and self._solved is not None:
            return self._solved.granularity(source)
        return self.source.granularity(source)

    def read_bytes(self, name: str, start: int, stop: int) -> np.ndarray:
        """Return stored bytes of a tensor that is passed on as it is."""
        if self.computed(name):
            raise AssertionError(f"{name} is sliced; it has no stored bytes")
        return self.source.read_bytes(self.source_names[name], start, stop)

    def read(self, name: str, start: int, stop: int) -> np.ndarray:
        """Return elements [start, stop) of the flattened tensor, reading only the rows they come from."""
        source = self.source_names[name]

        def whole(first: int, end: int) -> np.ndarray:
            if self.is_solved(source):
                return self.solved_values(source, first, end)
            return self.source.read(source, first, end)

        selection = self._selections.get(source)
        return whole(start, stop) if selection is None else selection.read(whole, start, stop)


def _output_section(part: Attention | Ffn) -> Section:
    """Return the inputs of an output matrix, one unit a head or channel."""
    units = part.heads if isinstance(part, Attention) else part.width
    length = part.heads * part.head_dim if isinstance(part, Attention) else part.width
    return Section(part.output.weight, part.output.input_axis, 0, length, units)
