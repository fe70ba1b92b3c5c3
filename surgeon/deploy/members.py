"""Nested families: one parent whose heads and channels are sorted, so that every member is its leading slices.

Sorting changes nothing: query heads move within their group, groups move together with their query heads,
FFN channels move with their row and column. The parent then holds all members at once (after the nested
models of Nemotron Elastic, here without training: quality is what was measured, in ``members.json``).
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from surgeon.checkpoint.checkpoint import Checkpoint
from surgeon.checkpoint.header import printable
from surgeon.errors import InputError, UsageError, Where, close_matches
from surgeon.structure.cut import Cut, LayerCut
from surgeon.structure.parts import Attention, Ffn, Section, Structure

FILE = "members.json"
SCHEMA = 1


@dataclass(frozen=True)
class LayerOrder:
    """The order units of one layer shall take, most important first; None leaves them.

    Attributes:
        groups: all key/value heads.
        heads: for each key/value head (by its old number) its query heads, numbered within the group.
        channels: all FFN channels.
    """

    groups: Sequence[int] | None = None
    heads: Sequence[Sequence[int]] | None = None
    channels: Sequence[int] | None = None


@dataclass(frozen=True)
class Kept:
    """What a member keeps of one layer, counted from the front: groups, query heads of each, channels."""

    groups: int
    heads_per_group: int
    ffn: int


@dataclass(frozen=True)
class Member:
    """One model of a family.

    Attributes:
        name: how it is asked for.
        layers: number of the parent's layer -> what is kept of it; other layers are dropped.
        figures: sizes, predicted and measured quality, as plain data.
    """

    name: str
    layers: Mapping[int, Kept]
    figures: Mapping[str, Any] = field(default_factory=dict)

    def cut(self, structure: Structure) -> Cut:
        """Return the member as a cut of the parent; `surgeon.structure.views.PrunedView` slices it out.

        Raises:
            InputError: E330 the parent has no such layer, or fewer units.
        """
        if not self.layers or max(self.layers) >= structure.layers:
            raise _bad(f"member {self.name} names layers that the model has not")
        kept = [self.layers.get(number) for number in range(structure.layers)]
        return Cut(
            tuple(
                None if one is None else self._layer(structure, number, one)
                for number, one in enumerate(kept)
            )
        )

    def _layer(self, structure: Structure, number: int, kept: Kept) -> LayerCut:
        attention, ffn = structure.attention[number], structure.ffn[number]
        heads = channels = None
        if attention is not None:
            each = attention.per_group
            if not 0 <= kept.groups <= attention.groups or not 0 <= kept.heads_per_group <= each:
                raise _bad(f"member {self.name} keeps {kept.groups} x {kept.heads_per_group} heads of layer {number}, "
                           f"which has {attention.groups} x {each}")  # fmt: skip
            heads = tuple(
                group * each + head for group in range(kept.groups) for head in range(kept.heads_per_group)
            )
        if ffn is not None:
            if not 0 <= kept.ffn <= ffn.width:
                raise _bad(
                    f"member {self.name} keeps {kept.ffn} channels of layer {number}, which has {ffn.width}"
                )
            channels = tuple(range(kept.ffn))
        return LayerCut(
            None if attention is None or len(heads or ()) == attention.heads else heads,
            None if ffn is None or kept.ffn == ffn.width else channels,
        )


def permute(checkpoint: Checkpoint, structure: Structure, orders: Mapping[int, LayerOrder]) -> PermutedView:
    """Return a view of a model with heads, groups and channels in another order; it computes the same.

    Args:
        checkpoint: the model.
        structure: of it.
        orders: layer -> order.

    Raises:
        UsageError: E289 an order that is not one of all units, or a norm over all heads stands in the way.
    """
    return PermutedView(checkpoint, structure, orders)


class PermutedView:
    """A Checkpoint with rows and columns in another order; see `permute`."""

    def __init__(
        self, checkpoint: Checkpoint, structure: Structure, orders: Mapping[int, LayerOrder]
    ) -> None:
        self.source = checkpoint
        self.label, self.folder, self.headers = checkpoint.label, checkpoint.folder, checkpoint.headers
        self.config, self.tensors = checkpoint.config, checkpoint.tensors
        self._axes: dict[str, dict[int, np.ndarray]] = {}
        for layer, order in sorted(orders.items()):
            attention, ffn = structure.attention[layer], structure.ffn[layer]
            if order.groups is not None or order.heads is not None:
                if attention is None:
                    raise UsageError(
                        "E289",
                        f"layer {layer} has no heads to sort",
                        help=f"leave layer {layer} out of the orders of heads",
                    )
                self._attention(attention, order)
            if order.channels is not None:
                if ffn is None:
                    raise UsageError(
                        "E289",
                        f"layer {layer} has no FFN channels to sort",
                        help=f"leave layer {layer} out of the orders of channels",
                    )
                self._channels(ffn, order.channels)
        digest = hashlib.sha256(f"permuted 1\0{getattr(checkpoint, 'identity', '')}\0".encode())
        for name, axes in sorted(self._axes.items()):
            for axis, order in sorted(axes.items()):
                digest.update(f"{name}\0{axis}\0".encode() + order.astype("<i8").tobytes())
        self.identity = digest.hexdigest()

    def _attention(self, attention: Attention, order: LayerOrder) -> None:
        groups = _permutation(order.groups, attention.groups, f"groups of layer {attention.layer}")
        each = attention.per_group
        if order.heads is not None and len(order.heads) != attention.groups:
            raise UsageError(
                "E289",
                f"layer {attention.layer} has {attention.groups} groups, the order of heads lists {len(order.heads)}",
                help="one order of heads for each group",
            )
        within = [
            _permutation(
                None if order.heads is None else order.heads[group],
                each,
                f"heads of group {group} in layer {attention.layer}",
            )
            for group in range(attention.groups)
        ]
        heads = np.concatenate([group * each + within[group] for group in groups])
        for section in (*attention.queries, _inputs(attention)):
            self._move(section, heads)
        for section in attention.key_values:
            self._move(section, groups)
        for section in attention.norms:  # a norm over all heads does not care for their order
            self._move(section, heads if section.units == attention.heads else groups)

    def _channels(self, ffn: Ffn, order: Sequence[int]) -> None:
        channels = _permutation(order, ffn.width, f"channels of layer {ffn.layer}")
        for section in (*ffn.inputs, _inputs(ffn)):
            self._move(section, channels)

    def _move(self, section: Section, order: np.ndarray) -> None:
        axes = self._axes.setdefault(section.tensor, {})
        if section.axis not in axes:
            axes[section.axis] = np.arange(self.tensors[section.tensor].shape[section.axis])
        size = section.length // section.units
        moved = (order[:, None] * size + np.arange(size)).reshape(-1) + section.start
        axes[section.axis][section.start : section.start + section.length] = moved

    def computed(self, name: str) -> bool:
        """Say whether values are computed, so that a byte copy is impossible."""
        inner = getattr(self.source, "computed", None)
        return name in self._axes or (inner is not None and inner(name))

    def granularity(self, name: str) -> int:
        """Elements that are cheapest to read together: one row of a moved matrix."""
        shape = self.tensors[name].shape
        return shape[-1] if name in self._axes and len(shape) > 1 else self.source.granularity(name)

    def read_bytes(self, name: str, start: int, stop: int) -> np.ndarray:
        """Return stored bytes of a tensor that nothing moves in."""
        if self.computed(name):
            raise AssertionError(f"{name} is permuted; it has no stored bytes")
        return self.source.read_bytes(name, start, stop)

    def read(self, name: str, start: int, stop: int) -> np.ndarray:
        """Return elements [start, stop) of the flattened tensor."""
        axes = self._axes.get(name)
        if axes is None or stop <= start:
            return self.source.read(name, start, stop)
        shape = self.tensors[name].shape
        width = shape[1] if len(shape) > 1 else 1
        first, end = start // width, -(-stop // width)
        rows = axes[0][first:end] if 0 in axes else np.arange(first, end)
        runs = np.split(rows, np.flatnonzero(np.diff(rows) != 1) + 1)
        parts = [self.source.read(name, int(run[0]) * width, (int(run[-1]) + 1) * width) for run in runs]
        block = np.concatenate(parts).reshape(-1, width)
        if 1 in axes:
            block = block[:, axes[1]]
        return block.reshape(-1)[start - first * width : stop - first * width]


def companion(members: Sequence[Member], structure: Structure) -> tuple[str, bytes]:
    """Return the file that describes a family, as (name, content).

    Raises:
        UsageError: E289 two members of one name, or members that are not nested. InputError: E330.
    """
    check_nested(members, structure)
    entries = [
        {"name": member.name, "layers": [
            {"layer": number, "groups": kept.groups, "heads_per_group": kept.heads_per_group, "ffn": kept.ffn}
            for number, kept in sorted(member.layers.items())
        ], "figures": dict(member.figures)}
        for member in members
    ]  # fmt: skip
    return FILE, (json.dumps({"schema": SCHEMA, "members": entries}, indent=2) + "\n").encode()


def read_members(content: bytes) -> tuple[Member, ...]:
    """Read what `companion` wrote.

    Raises:
        InputError: E330 it is damaged.
    """
    try:
        document = json.loads(content)
        if document["schema"] != SCHEMA:
            raise _bad(f"it has schema {document['schema']!r}, this version reads {SCHEMA}")
        return tuple(
            Member(str(entry["name"]), {
                int(one["layer"]): Kept(int(one["groups"]), int(one["heads_per_group"]), int(one["ffn"]))
                for one in entry["layers"]
            }, dict(entry["figures"]))
            for entry in document["members"]
        )  # fmt: skip
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _bad(f"it is not what surgeon writes ({type(error).__name__})") from error


def named(members: Sequence[Member], name: str) -> Member:
    """Return a member by its name (E289 with what there is)."""
    for member in members:
        if member.name == name:
            return member
    names = [member.name for member in members]
    raise UsageError(
        "E289",
        f'the family has no member "{printable(name)}"',
        help=close_matches(name, names) or ", ".join(names),
    )


def check_nested(members: Sequence[Member], structure: Structure) -> None:
    """Refuse members that do not lie inside one another, from the largest down."""
    names = [member.name for member in members]
    if len(set(names)) != len(names):
        raise UsageError(
            "E289",
            "two members of the family have one name",
            help="make the family again, with targets that lie further apart",
        )
    units = [_units(member.cut(structure), structure) for member in members]
    ranked = sorted(range(len(members)), key=lambda number: -len(units[number]))
    for larger, smaller in itertools.pairwise(ranked):
        if not units[smaller] <= units[larger]:
            raise UsageError("E289", f"member {names[smaller]} keeps something that the larger {names[larger]} does not",
                             help="members of a family are nested: each keeps a part of the next larger")  # fmt: skip


def _units(cut: Cut, structure: Structure) -> set[tuple[int, str, int]]:
    found: set[tuple[int, str, int]] = set()
    for number in cut.kept_layers:
        layer = cut.layers[number]
        assert layer is not None
        attention, ffn = structure.attention[number], structure.ffn[number]
        found.add((number, "layer", 0))
        if attention is not None:
            found |= {
                (number, "head", unit)
                for unit in (range(attention.heads) if layer.heads is None else layer.heads)
            }
        if ffn is not None:
            found |= {
                (number, "channel", unit)
                for unit in (range(ffn.width) if layer.channels is None else layer.channels)
            }
    return found


def _inputs(part: Attention | Ffn) -> Section:
    units, size = (part.heads, part.head_dim) if isinstance(part, Attention) else (part.width, 1)
    return Section(part.output.weight, part.output.input_axis, 0, units * size, units)


def _permutation(order: Sequence[int] | None, count: int, what: str) -> np.ndarray:
    found = np.arange(count) if order is None else np.asarray(order, dtype=np.int64)
    if not np.array_equal(np.sort(found), np.arange(count)):
        raise UsageError(
            "E289",
            f"the order of the {what} does not name each of 0 to {count - 1} once",
            help="make the family again",
        )
    return found


def _bad(what: str) -> InputError:
    return InputError("E330", f"{FILE} is not usable: {printable(what)}", where=Where(file=FILE),
                      help=f"restore {FILE} from a copy of the family, or make the family again")  # fmt: skip
