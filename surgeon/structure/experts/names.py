"""Taking tensor names apart by a family's record: which layer, which expert, which matrix of it."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from surgeon.architectures.expert_records.record import ExpertRecord, Fused, PerExpert
from surgeon.structure.experts.parts import Role

PACKED = frozenset({"qweight", "weight_packed", "blocks"})
"""Suffixes of payloads whose shape is not the matrix's."""

COMPANIONS = PACKED | {
    "g_idx", "qzeros", "scales", "scale", "scale_inv", "activation_scale", "input_activation_scale",
    "weight_scale_inv", "weight_scale", "weight_scale_2", "weight_zero_point", "weight_shape", "weight_g_idx",
    "weight_global_scale", "input_scale", "input_zero_point", "input_global_scale", "SCB", "weight_format",
}  # fmt: skip
"""What a quantized matrix is stored as and with; bitsandbytes adds names below "weight."."""

ROUTED = re.compile(r"(^|\.)(experts?|expert_bias|moe|moe_statics|router|block_sparse_moe)(\.|_|$)")
"""Names that only mixtures of experts have."""


@dataclass(frozen=True, slots=True)
class Piece:
    """One tensor of a storage: a matrix, a bias, or something beside a quantized matrix."""

    name: str
    role: Role
    expert: int | None
    suffix: str


@dataclass
class LayerNames:
    """All tensors of one layer, sorted by what the record says they are.

    Attributes:
        prefix: what the layer's names start with.
        pieces: storage number -> tensors of experts.
        router, bias, correction, hash_table: names of those found.
        quantized_router: names beside a router that is stored quantized.
        shared: tensors of shared experts.
        others: what the record does not describe.
    """

    prefix: str
    pieces: dict[int, list[Piece]] = field(default_factory=dict)
    router: list[str] = field(default_factory=list)
    bias: list[str] = field(default_factory=list)
    correction: list[str] = field(default_factory=list)
    hash_table: list[str] = field(default_factory=list)
    quantized_router: list[str] = field(default_factory=list)
    shared: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)

    @property
    def routed(self) -> bool:
        return bool(self.pieces or self.router or self.bias or self.correction or self.hash_table)

    def block(self) -> str:
        """Return what the names of router and experts start with, up to a full stop."""
        names = [*self.router, *(pieces[0].name for pieces in self.pieces.values())]
        common = common_module(names)
        return f"{common}." if common else self.prefix


@dataclass
class Found:
    """Every tensor name of a checkpoint taken apart.

    Attributes:
        layers: (stack's prefix before the number, number) -> its names; stacks of the model itself.
        extra: the same for stacks of layers with names of their own, counted from 0.
        outside: names in no layer.
    """

    layers: dict[tuple[str, int], LayerNames]
    extra: dict[tuple[str, int], LayerNames]
    outside: list[str]


def take_apart(names: Iterable[str], record: ExpertRecord) -> Found:
    """Sort all names of a checkpoint by layer and by what the record says of them."""
    matcher = _Matcher(record)
    stacks = [(_stack(pattern), False) for pattern in record.layers]
    stacks += [(_stack(pattern), True) for pattern in record.extra.layers]
    found = Found({}, {}, [])
    for name in names:
        for (before, expression), extra in stacks:
            match = expression.match(name)
            if match:
                layers = found.extra if extra else found.layers
                key = (before, int(match[1]))
                layer = layers.get(key)
                if layer is None:
                    layer = layers[key] = LayerNames(name[: match.end()])
                matcher.place(layer, name, name[match.end() :])
                break
        else:
            found.outside.append(name)
    return found


def common_module(names: Sequence[str]) -> str:
    """Return the longest path of modules all names start with, "" for none."""
    common = names[0].split(".")[:-1]
    for name in names[1:]:
        parts = name.split(".")[:-1]
        length = next((at for at, (a, b) in enumerate(zip(common, parts, strict=False)) if a != b), None)
        common = common[: min(len(common), len(parts)) if length is None else length]
    return ".".join(common)


def _stack(pattern: str) -> tuple[str, re.Pattern[str]]:
    before, after = pattern.split("{layer}")
    return before, re.compile(re.escape(before) + r"(\d{1,6})" + re.escape(after))


class _Matcher:
    """Knows what the names of one record mean, relative to a layer."""

    def __init__(self, record: ExpertRecord) -> None:
        router = record.router
        self._exact = {name: "router" for name in router.weight}
        self._exact |= {name: "bias" for name in router.bias}
        self._exact |= {name: "correction" for name in router.correction}
        self._exact |= {name: "hash_table" for name in router.hash_table}
        self._router_stems = {_stem(name) for name in router.weight}
        self._shared = [re.compile(fnmatch.translate(pattern)) for pattern in record.shared]
        self._elsewhere = [re.compile(fnmatch.translate(pattern)) for pattern in record.elsewhere]
        self._numbered: list[tuple[int, Role, re.Pattern[str]]] = []
        self._stacked: list[tuple[int, Role, str]] = []
        self._biases: dict[str, list[tuple[int, Role]]] = {}
        for number, storage in enumerate(record.storages):
            if isinstance(storage, PerExpert):
                self._numbered += _numbered(number, storage)
            else:
                self._add_fused(number, storage)

    def _add_fused(self, number: int, storage: Fused) -> None:
        roles: tuple[Role, ...] = ("gate_up", "up", "down")
        for role in roles:
            name = getattr(storage, role)
            if name is not None:
                self._stacked.append((number, role, _stem(name)))
        biases: tuple[Role, ...] = ("gate_up_bias", "up_bias", "down_bias")
        for role in biases:
            name = getattr(storage, role)
            if name is not None:
                self._biases.setdefault(name, []).append((number, role))

    def place(self, layer: LayerNames, name: str, rest: str) -> None:
        """Note what a tensor of a layer is; ``rest`` is its name without the layer's."""
        kind = self._exact.get(rest)
        if kind is not None:
            getattr(layer, kind).append(name)
            return
        pieces = self._pieces(name, rest)
        if pieces:
            for number, piece in pieces:
                layer.pieces.setdefault(number, []).append(piece)
        elif any(pattern.match(rest) for pattern in self._shared):
            layer.shared.append(name)
        elif any(_suffix(rest, stem) in COMPANIONS for stem in self._router_stems):
            layer.quantized_router.append(name)
        elif not any(pattern.match(rest) for pattern in self._elsewhere):
            layer.others.append(name)

    def _pieces(self, name: str, rest: str) -> list[tuple[int, Piece]]:
        """Return what a tensor is in each storage that knows it; several where they share names."""
        if rest in self._biases:
            return [(number, Piece(name, role, None, "bias")) for number, role in self._biases[rest]]
        found: list[tuple[int, Piece]] = []
        for number, role, expression in self._numbered:
            match = expression.fullmatch(rest)
            if match and match[2] == "bias":
                found.append((number, Piece(name, _bias_of(role), int(match[1]), "bias")))
            elif match and _known(match[2]):
                found.append((number, Piece(name, role, int(match[1]), match[2])))
        for number, role, stem in self._stacked:
            suffix = _suffix(rest, stem)
            if suffix is not None and _known(suffix):
                found.append((number, Piece(name, role, None, suffix)))
        return found


def _numbered(number: int, storage: PerExpert) -> Iterable[tuple[int, Role, re.Pattern[str]]]:
    roles: tuple[Role, ...] = ("gate", "up", "down")
    for role in roles:
        name = getattr(storage, role)
        if name is not None:
            before, after = map(re.escape, name.split("{expert}"))
            yield number, role, re.compile(f"{before}(\\d{{1,6}}){after}\\.(.+)")


def _bias_of(role: Role) -> Role:
    biases: dict[Role, Role] = {"gate": "gate_bias", "up": "up_bias", "down": "down_bias"}
    return biases[role]


def _known(suffix: str) -> bool:
    return suffix == "weight" or suffix in COMPANIONS or suffix.startswith("weight.")


def _stem(name: str) -> str:
    return name.removesuffix(".weight")


def _suffix(rest: str, stem: str) -> str | None:
    """Return what follows a matrix's stem: "weight" for itself, the companion's name, None for another matrix's."""
    if not rest.startswith(stem):
        return None
    after = rest[len(stem) :]
    if after in ("", ".weight"):
        return "weight"
    return after[1:] if after[0] in "._" else None
