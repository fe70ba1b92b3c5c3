"""One layer of experts: its storage chosen, every tensor's shape checked, gaps named."""

from __future__ import annotations

from collections.abc import Sequence

from surgeon.architectures.expert_records.record import ExpertRecord, Fused, PerExpert
from surgeon.checkpoint.checkpoint import Checkpoint
from surgeon.checkpoint.header import printable
from surgeon.errors import InputError, Where
from surgeon.structure.experts.names import PACKED, LayerNames, Piece
from surgeon.structure.experts.parts import ExpertLayer, ExpertTensor, Order, Role
from surgeon.structure.experts.sizes import Sizes

PLAIN = frozenset({"F64", "F32", "F16", "BF16"})
"""Types whose values are the weights themselves."""

_INCOMPLETE = (
    "a shard is missing, or config.json belongs to another model: surgeon verify MODEL shows what is missing"
)
_MIXED = "tensors or config.json come from another model: surgeon verify MODEL shows every disagreement"

MATRICES: tuple[Role, ...] = ("gate", "up", "gate_up", "down")


def read_layer(
    checkpoint: Checkpoint, record: ExpertRecord, sizes: Sizes, names: LayerNames, index: int, runs: bool
) -> tuple[ExpertLayer | None, list[InputError]]:
    """Return one layer's experts, or None and what is wrong with it."""
    return _Layer(checkpoint, record, sizes, names, index).read(runs)


class _Layer:
    def __init__(
        self, checkpoint: Checkpoint, record: ExpertRecord, sizes: Sizes, names: LayerNames, index: int
    ) -> None:
        self._checkpoint = checkpoint
        self._record = record
        self._sizes = sizes
        self._names = names
        self._index = index
        self._findings: list[InputError] = []

    def read(self, runs: bool) -> tuple[ExpertLayer | None, list[InputError]]:
        if self._names.hash_table:
            self._wrong(
                f"layer {self._index} chooses experts by a table of tokens, so none of them can be told apart by routing",
                self._names.hash_table[0], code="E403", help="models with hash-routed layers cannot be cut",
            )  # fmt: skip
            return None, self._findings
        number = self._storage()
        if number is None:
            return None, self._findings
        storage = self._record.storages[number]
        pieces = self._names.pieces[number]
        count = self._count_numbered(pieces) if isinstance(storage, PerExpert) else self._count_fused(pieces)
        if self._findings:
            return None, self._findings
        experts = [self._tensor(piece, storage) for piece in pieces]
        tensors = [tensor for tensor in experts if tensor is not None] + self._routing(count)
        if self._findings:
            return None, self._findings
        layer = ExpertLayer(
            self._index, runs, self._names.block(), "fused" if isinstance(storage, Fused) else "per expert", count,
            tuple(sorted(tensors, key=lambda tensor: (tensor.expert is None, tensor.expert or 0))),
            tuple(sorted(self._names.shared)), self._quantized(pieces),
        )  # fmt: skip
        return layer, []

    def _storage(self) -> int | None:
        """Return the storage of the layer: the first whose tensors are all there and fit."""
        candidates = [number for number in sorted(self._names.pieces) if self._complete(number)]
        if not candidates:
            some = next((pieces[0].name for pieces in self._names.pieces.values()), None)
            what = "has no tensors of experts" if some is None else "lacks tensors of experts"
            self._wrong(
                f"layer {self._index} {what}: no storage of {self._record.family} is complete",
                some,
                help=_INCOMPLETE,
            )
            return None
        # Two orientations under one name: the record lists both, the shapes of all tensors tell which.
        chosen = max(candidates, key=self._fitting)
        own = {piece.name for piece in self._names.pieces[chosen]}
        for pieces in self._names.pieces.values():
            for piece in pieces:
                if piece.name not in own:
                    self._wrong(
                        f"layer {self._index} mixes two ways of storing experts: {printable(min(own))} is there as well",
                        piece.name, help="a conversion left both behind; remove one of them",
                    )  # fmt: skip
                    return None
        return chosen

    def _complete(self, number: int) -> bool:
        storage = self._record.storages[number]
        if isinstance(storage, PerExpert):
            wanted = {role for role in MATRICES if getattr(storage, role, None) is not None}
        else:
            wanted = {role for role in ("gate_up", "up", "down") if getattr(storage, role) is not None}
        return wanted <= {piece.role for piece in self._names.pieces[number] if _is_payload(piece)}

    def _fitting(self, number: int) -> int:
        """Return how many tensors have the shape a storage wants."""
        storage = self._record.storages[number]
        return sum(
            self._shape(piece) == self._expected(piece, storage)
            for piece in self._names.pieces[number]
            if self._comparable(piece)
        )

    def _count_numbered(self, pieces: list[Piece]) -> int:
        """Return how many experts the layer has, all of them complete, without holes."""
        by_role: dict[Role, set[int]] = {}
        for piece in pieces:
            if _is_payload(piece) and piece.expert is not None:
                by_role.setdefault(piece.role, set()).add(piece.expert)
        numbers = set().union(*by_role.values())
        routers = [self._info(name) for name in self._names.router]
        rows = max((shape[0] for shape in routers if shape[1:] == (self._sizes.hidden,)), default=0)
        count = max(max(numbers) + 1, rows)  # the router shows that experts are missing at the end
        missing = sorted(set(range(count)) - numbers)
        if missing:
            self._wrong(f"layer {self._index} should have experts 0-{count - 1} but lacks {_listed(missing)}",
                        help="a shard is missing, or experts were removed without renumbering")  # fmt: skip
        for role, has in by_role.items():
            without = sorted(numbers - has)
            if without:
                self._wrong(
                    f"layer {self._index}: the {role} projection of expert {_listed(without)} is missing",
                    help=_INCOMPLETE,
                )
        return count

    def _count_fused(self, pieces: list[Piece]) -> int:
        counts = {self._shape(piece)[:1]: piece.name for piece in pieces if _is_payload(piece)}
        if len(counts) > 1 or () in counts:
            name = sorted(counts.values())[-1]
            self._wrong(
                f"layer {self._index}: stacked tensors hold different numbers of experts",
                name,
                help=_MIXED,
                shape=self._info(name),
            )
            return 0
        return next(iter(counts))[0]

    def _tensor(self, piece: Piece, storage: PerExpert | Fused) -> ExpertTensor | None:
        shape = self._shape(piece)
        companion = piece.suffix not in ("weight", "bias") or not self._plain(piece)
        fused = isinstance(storage, Fused)
        if fused and companion and shape[:1] != (self._stacked(storage),):
            if not shape or set(shape) == {1}:
                return None  # one number for all experts moves with none of them
            self._wrong(
                "a companion of stacked experts has another number of experts",
                piece.name,
                help=_MIXED,
                shape=shape,
            )
        if self._comparable(piece):
            expected = self._expected(piece, storage)
            if shape != expected:
                self._wrong(
                    f"layer {self._index}: a tensor of experts has another shape than the configuration gives",
                    piece.name, help=_MIXED, shape=shape, expected=expected,
                )  # fmt: skip
        order: Order = "plain"
        if fused and piece.role in ("gate_up", "gate_up_bias"):
            order = storage.order
        return ExpertTensor(
            piece.name, piece.role, piece.expert, 0 if fused else None,
            self._channel_axis(piece.role, storage) if self._comparable(piece) else None, order, companion,
        )  # fmt: skip

    def _stacked(self, storage: Fused) -> int:
        number = self._record.storages.index(storage)
        piece = next(p for p in self._names.pieces[number] if p.role == "down" and _is_payload(p))
        return self._shape(piece)[0]

    def _channel_axis(self, role: Role, storage: PerExpert | Fused) -> int | None:
        if role == "down_bias":
            return None
        if isinstance(storage, PerExpert):
            return 1 if role == "down" else 0
        if role in ("gate_up_bias", "up_bias"):
            return 1
        return 2 if (role == "down") != storage.transposed else 1

    def _expected(self, piece: Piece, storage: PerExpert | Fused) -> tuple[int, ...]:
        """Return the shape of a plain tensor; the number of experts is the tensor's own."""
        width, read = self._sizes.width, self._sizes.input
        rows = {"gate_up": 2 * width, "gate_up_bias": 2 * width, "down": read, "down_bias": read}.get(
            piece.role, width
        )
        shape = (rows,) if piece.suffix == "bias" else (rows, width if piece.role == "down" else read)
        if isinstance(storage, PerExpert):
            return shape
        if storage.transposed and len(shape) == 2:
            shape = shape[::-1]
        return (*self._shape(piece)[:1], *shape)

    def _routing(self, count: int) -> list[ExpertTensor]:
        """Return router, its bias and the correction bias."""
        names, axis = self._names, self._record.router.correction_axis
        found: list[ExpertTensor] = []
        roles: Sequence[tuple[list[str], Role, int, tuple[int, ...]]] = (
            (names.router, "router", 0, (count, self._sizes.hidden)),
            (names.bias, "router_bias", 0, (count,)),
            (names.correction, "correction_bias", axis, (1,) * axis + (count,)),
        )
        if not names.router:
            quantized = names.quantized_router[0] if names.quantized_router else None
            what = (
                "its router is quantized, rows cannot be taken out" if quantized else "its router is missing"
            )
            self._wrong(f"layer {self._index}: {what}", quantized,
                        help="expected " + " or ".join(f"{names.prefix}{n}" for n in self._record.router.weight))  # fmt: skip
        for tensors, role, along, expected in roles:
            if len(tensors) > 1:
                self._wrong(f"layer {self._index} stores its {role.replace('_', ' ')} twice", tensors[1],
                            help="one of the two names is left over: save the model again with the program that made it")  # fmt: skip
            for name in tensors[:1]:
                shape = self._info(name)
                if shape != expected:
                    self._wrong(
                        f"layer {self._index}: the {role.replace('_', ' ')} does not fit {count} experts", name,
                        help=_MIXED, shape=shape, expected=expected,
                    )  # fmt: skip
                found.append(ExpertTensor(name, role, None, along, None))
        return found

    def _quantized(self, pieces: list[Piece]) -> str | None:
        """Return the method the layer's experts are quantized with, by the configuration or by the names."""
        suffixes = {piece.suffix for piece in pieces}
        types = {self._checkpoint.tensors[piece.name].dtype for piece in pieces if piece.suffix == "weight"}
        if suffixes <= {"weight", "bias"} and types <= PLAIN:
            return None
        config = self._checkpoint.config or {}
        for section in (config, config.get(self._sizes.section)):
            method = (section or {}).get("quantization_config") or {}
            if isinstance(method, dict) and isinstance(method.get("quant_method"), str):
                return method["quant_method"]
        if "blocks" in suffixes:
            return "mxfp4"
        if "qweight" in suffixes:
            return "gptq" if "g_idx" in suffixes else "awq"
        if suffixes & {"weight_packed", "weight_scale", "weight_zero_point"}:
            return "compressed-tensors"
        if any(suffix.startswith("weight.") for suffix in suffixes):
            return "bitsandbytes"
        return "fp8" if types & {"F8_E4M3", "F8_E5M2"} else "unknown"

    def _comparable(self, piece: Piece) -> bool:
        """Say whether a tensor has the shape of the matrix it stands for."""
        dtype = self._checkpoint.tensors[piece.name].dtype
        return piece.suffix in ("weight", "bias") and (dtype in PLAIN or dtype.startswith("F8"))

    def _plain(self, piece: Piece) -> bool:
        return self._checkpoint.tensors[piece.name].dtype in PLAIN

    def _shape(self, piece: Piece) -> tuple[int, ...]:
        return self._info(piece.name)

    def _info(self, name: str) -> tuple[int, ...]:
        return tuple(self._checkpoint.tensors[name].shape)

    def _wrong(
        self, what: str, name: str | None = None, *, code: str = "E423", help: str | None = None,
        shape: tuple[int, ...] | None = None, expected: tuple[int, ...] | None = None,
    ) -> None:  # fmt: skip
        if shape is not None:
            what += f": {list(shape)}" + (f", expected {list(expected)}" if expected is not None else "")
        where = Where(tensor=printable(name)) if name is not None else None
        self._findings.append(InputError(code, f"{self._checkpoint.label}: {what}", where=where, help=help))


def _is_payload(piece: Piece) -> bool:
    return piece.suffix == "weight" or piece.suffix in PACKED


def _listed(numbers: list[int]) -> str:
    """Return numbers as text, runs of them shortened: "3, 5-8 and 11"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    words = [str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs[:8]]
    words += ["more"] if len(runs) > 8 else []
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " and " + words[-1]
