"""Where inputs of matrices can be scaled without changing what a model computes.

A scale s_j on input j of every matrix that reads a vector, and 1 / s_j on what produces that vector, cancel where
nothing but a product lies between:

- a norm's gain (and shift) -> everything that reads the norm: queries, keys and values; gate and up; of a mixture the
  router, all experts' gate and up, shared experts and their own gate;
- rows of up -> columns of down, where what enters down is act(gate) * up;
- rows of the value projection -> columns of the output projection, where every query head has a value head of its own.

Which tensors these are follows from the record of the family (`surgeon.architectures`): everything with the norm's
width among its axes is either known not to read the norm, or is scaled; where a tensor is neither, nothing is folded.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from surgeon import architectures
from surgeon.architectures.base import Architecture, Expected, Layout
from surgeon.calibrate.matrices import Matrix
from surgeon.checkpoint.checkpoint import Checkpoint
from surgeon.checkpoint.header import printable
from surgeon.errors import InputError
from surgeon.structure.experts.find import experts_of
from surgeon.structure.experts.parts import ExpertLayer, ExpertTensor
from surgeon.structure.find import WRITERS

PLAIN = frozenset({"F64", "F32", "F16", "BF16"})
ATTENTION = frozenset({"attention_q", "attention_k", "attention_v", "attention_qkv", "attention_q_down",
                       "attention_kv_down", "mixer_in"})  # fmt: skip
FFN = frozenset({"ffn_gate", "ffn_up", "ffn_gate_up", "expert_gate", "expert_up", "expert_gate_up", "expert_latent",
                 "router", "shared_expert_router", "shared_expert_gate", "shared_expert_up", "shared_expert_gate_up"})  # fmt: skip
"""Kinds of matrices that read a layer's norms."""
APART = frozenset({"norm", "norm_bias", "mixer_conv", *WRITERS, *(f"{kind}_bias" for kind in WRITERS)})
"""Kinds that have the width of the stream and do not read the norm."""
LATENTS = {
    "attention_q_up": frozenset({"attention_q_down", "attention_q_down_bias"}),
    "attention_kv_up": frozenset(),
}
"""Matrices that read a norm of their own -> what else has that norm's width."""
CLAMPED = frozenset({"gpt_oss"})
"""Families whose experts cut off what leaves up, so that its rows cannot be scaled."""


@dataclass(frozen=True)
class Span:
    """A range of one stored tensor along one axis; ``expert`` restricts it to one of a stack."""

    tensor: str
    axis: int
    start: int
    length: int
    expert: int | None = None


@dataclass(frozen=True)
class Site:
    """One vector that can be scaled.

    Attributes:
        name: of what produces it.
        kind: "norm", "up" or "value".
        layer: number of its layer.
        width: its length.
        producers: what is divided by the scales: first the gain (of a norm) or the rows, then the shift or bias.
        consumers: what is multiplied: every tensor that reads the vector.
        matrices: those of the consumers whose quantization counts.
        offset: what is added to a norm's weight before it multiplies.
    """

    name: str
    kind: str
    layer: int
    width: int
    producers: tuple[Span, ...]
    consumers: tuple[Span, ...]
    matrices: tuple[Matrix, ...]
    offset: float = 0.0


@dataclass(frozen=True)
class Skipped:
    """A place where nothing is folded, and why."""

    name: str
    reason: str


def sites_of(
    checkpoint: Checkpoint, layers: tuple[tuple[Matrix, ...], ...]
) -> tuple[tuple[tuple[Site, ...], ...], tuple[Skipped, ...]]:
    """Return the sites of every layer, and the places where folding would change the model.

    Args:
        checkpoint: a model of plain numbers.
        layers: the matrices that are quantized, by layer; a site that none of them reads is left out.
    """
    config = checkpoint.config or {}
    record = architectures.get(config.get("model_type"))
    assert record is not None  # whoever listed the matrices refused others
    layout = record.layout(config, checkpoint.tensors)
    routed: Mapping[int, ExpertLayer] = {}
    refusal = ""
    if any(spec.kind.startswith("expert_") for spec in layout.tensors.values()):
        try:
            routed = {layer.index: layer for layer in experts_of(checkpoint).layers if layer.runs}
        except InputError as error:
            refusal = error.message
    finder = _Finder(checkpoint, record, layout, routed, refusal)
    found = tuple(tuple(finder.layer(number, matrices)) for number, matrices in enumerate(layers))
    return found, tuple(finder.skipped)


class _Finder:
    def __init__(
        self, checkpoint: Checkpoint, record: Architecture, layout: Layout, routed: Mapping[int, ExpertLayer],
        refusal: str,
    ) -> None:  # fmt: skip
        self._checkpoint, self._record, self._layout = checkpoint, record, layout
        self._routed, self._refusal = routed, refusal
        self._sizes = record.sizes(record.settings(checkpoint.config or {}))
        limit = (checkpoint.config or {}).get("swiglu_limit")
        self._clamped = record.model_type in CLAMPED or limit is not None
        self._by_layer: dict[int, dict[str, Expected]] = {}
        for name, spec in layout.tensors.items():
            if spec.layer is not None and name in checkpoint.tensors:
                self._by_layer.setdefault(spec.layer, {})[name] = spec
        self._unknown: dict[int, str] = {}
        start = f"{layout.prefix}{record.stack}."
        for name in checkpoint.tensors:
            number = name.removeprefix(start).partition(".")[0]
            if name.startswith(start) and number.isdecimal() and name not in layout.tensors:
                self._unknown.setdefault(int(number), name)
        self.skipped: list[Skipped] = []

    def layer(self, number: int, matrices: Iterable[Matrix]) -> Iterator[Site]:
        """Yield the sites of one layer that quantized matrices read."""
        wanted = tuple(matrices)
        tensors = self._by_layer.get(number, {})
        if not wanted or not tensors:
            return
        for site in (
            *self._norms(number, tensors, wanted), *self._latents(number, tensors, wanted),
            *self._values(number, tensors, wanted), *self._dense(number, tensors, wanted),
            *self._experts(number, wanted),
        ):  # fmt: skip
            spans = (*site.producers, *site.consumers)
            odd = next(
                (s.tensor for s in spans if self._checkpoint.tensors[s.tensor].dtype not in PLAIN), None
            )
            if odd is None:
                yield site
            else:
                self._skip(site.name, f"{printable(odd)} is no tensor of plain numbers")

    def _skip(self, name: str, reason: str) -> None:
        self.skipped.append(Skipped(name, reason))

    # ---- norms ---------------------------------------------------------------------------------------

    def _norms(
        self, number: int, tensors: Mapping[str, Expected], wanted: tuple[Matrix, ...]
    ) -> Iterator[Site]:
        start = f"{self._layout.prefix}{self._record.stack}.{number}."
        for norm, kinds in self._branches(start, tensors):
            readers = {name: label for name, spec in tensors.items()
                       if spec.kind in kinds and (label := _of_stream(spec, tensors)) is not None}  # fmt: skip
            read = tuple(matrix for matrix in wanted if matrix.tensor in readers)
            if not read:
                continue
            name = f"{start}{norm}"
            reason = self._against(number, name, tensors)
            if reason:
                self._skip(name, reason)
                continue
            width = self._sizes["hidden"].value
            consumers = tuple(Span(n, tensors[n].axes.index(label), 0, width) for n, label in readers.items())
            yield self._norm_site(name, number, width, consumers, read)

    def _branches(self, start: str, tensors: Mapping[str, Expected]) -> list[tuple[str, frozenset[str]]]:
        """Return each norm of the stream and the kinds of matrices that read it."""
        attention, ffn = self._record.branch_norms
        if attention and ffn:
            return [(attention[0], ATTENTION), (ffn[0], FFN)]
        own = [name.removeprefix(start).removesuffix(".weight") for name, spec in tensors.items()
               if spec.kind == "norm" and spec.axes == ("hidden",)]  # fmt: skip
        own = [name for name in own if "." not in name]
        # One norm for attention and FFN side by side, or for the one mixer of the layer.
        return [(own[0], ATTENTION | FFN)] if len(own) == 1 else [("norms", ATTENTION | FFN)]

    def _against(self, number: int, norm: str, tensors: Mapping[str, Expected]) -> str:
        """Return what speaks against folding scales into a norm of the stream, "" when nothing does."""
        if self._record.post_norm:
            return "what leaves the norm goes on in the stream as well"
        if f"{norm}.weight" not in tensors:
            return "it has no weights of its own that scales could be folded into"
        if number in self._unknown:
            return f"{printable(self._unknown[number])} may read it too, and is not known"
        for name, spec in tensors.items():
            if _of_stream(spec, tensors) is not None and spec.kind not in ATTENTION | FFN | APART:
                return f"{printable(name)} may read it too"
        return ""

    def _norm_site(
        self, name: str, number: int, width: int, consumers: tuple[Span, ...], read: tuple[Matrix, ...]
    ) -> Site:
        parts = [part for part in (f"{name}.weight", f"{name}.bias") if part in self._checkpoint.tensors]
        producers = tuple(Span(part, 0, 0, width) for part in parts)
        return Site(
            name, "norm", number, width, producers, consumers, read, self._record.norm_offset(parts[0])
        )

    def _latents(
        self, number: int, tensors: Mapping[str, Expected], wanted: tuple[Matrix, ...]
    ) -> Iterator[Site]:
        """Yield the norms inside latent attention, each read by one matrix."""
        for reader, spec in tensors.items():
            read = tuple(matrix for matrix in wanted if matrix.tensor == reader)
            if spec.kind not in LATENTS or not read:
                continue
            label = spec.axes[1]
            norms = [
                name for name, other in tensors.items() if other.kind == "norm" and other.axes == (label,)
            ]
            beside = {other.kind for name, other in tensors.items()
                      if label in other.axes and name != reader and other.kind != "norm"}  # fmt: skip
            if len(norms) != 1 or beside - LATENTS[spec.kind] or number in self._unknown:
                self._skip(reader, "what feeds it is not one norm of its own")
                continue
            width = self._sizes[label].value
            name = norms[0].removesuffix(".weight")
            yield self._norm_site(name, number, width, (Span(reader, 1, 0, width),), read)

    # ---- values --------------------------------------------------------------------------------------

    def _values(
        self, number: int, tensors: Mapping[str, Expected], wanted: tuple[Matrix, ...]
    ) -> Iterator[Site]:
        kinds = {
            spec.kind: (name, spec) for name, spec in tensors.items() if spec.kind.startswith("attention_")
        }
        output, values = kinds.get("attention_o"), kinds.get("attention_v") or kinds.get("attention_qkv")
        if output is None:
            return
        read = tuple(matrix for matrix in wanted if matrix.tensor == output[0])
        if not read:
            return
        name, spec = values or ("", None)
        label = next((axis for axis in ("key_value", "query_key_value") if spec and axis in spec.axes), None)
        if spec is None or label is None or "query" not in output[1].axes:
            self._skip(output[0], "there is no value projection whose rows are its inputs")
            return
        width, heads, groups = (self._sizes[key].value for key in ("query", "heads", "groups"))
        if heads != groups:
            self._skip(output[0], f"{heads // groups} query heads share each value head")
            return
        begin = 2 * width if label == "query_key_value" else 0
        producers = [Span(name, spec.axes.index(label), begin, width)]
        bias = _bias_of(name)
        if bias in self._checkpoint.tensors:
            producers.append(Span(bias, 0, begin, width))
        consumers = (Span(output[0], output[1].axes.index("query"), 0, width),)
        yield Site(name, "value", number, width, tuple(producers), consumers, read)

    # ---- up and down ---------------------------------------------------------------------------------

    def _dense(
        self, number: int, tensors: Mapping[str, Expected], wanted: tuple[Matrix, ...]
    ) -> Iterator[Site]:
        for part in ("ffn", "shared_expert"):
            kinds = {spec.kind: (name, spec) for name, spec in tensors.items() if spec.kind.startswith(part)}
            down = kinds.get(f"{part}_down")
            read = () if down is None else tuple(matrix for matrix in wanted if matrix.tensor == down[0])
            if down is None or not read:
                continue
            joint = f"{part}_gate_up" in kinds
            up = kinds.get(f"{part}_gate_up" if joint else f"{part}_up")
            if up is None or not (joint or f"{part}_gate" in kinds):
                self._skip(down[0], "what enters it is an activation, not a product with up")
                continue
            if self._clamped:
                self._skip(down[0], "what leaves up is clamped")
                continue
            (name, _), axis = up, next(n for n, label in enumerate(up[1].axes) if label != "hidden")
            width = self._checkpoint.tensors[name].shape[axis] // (2 if joint else 1)
            start = width if joint else 0
            producers = [Span(name, axis, start, width)]
            bias = _bias_of(name)
            if bias in self._checkpoint.tensors:
                producers.append(Span(bias, 0, start, width))
            inputs = next(n for n, label in enumerate(down[1].axes) if label != "hidden")
            yield Site(name, "up", number, width, tuple(producers), (Span(down[0], inputs, 0, width),), read)

    def _experts(self, number: int, wanted: tuple[Matrix, ...]) -> Iterator[Site]:
        routed = [matrix for matrix in wanted if matrix.routed]
        if not routed:
            return
        layer = self._routed.get(number)
        place = f"{self._layout.prefix}{self._record.stack}.{number} experts"
        if layer is None:
            self._skip(place, self._refusal or "its experts are not known")
            return
        tensors = [
            tensor for tensor in layer.tensors if tensor.channel_axis is not None and not tensor.companion
        ]
        gated = any(tensor.role in ("gate", "gate_up") for tensor in tensors)
        if not gated or self._clamped:
            self._skip(
                place,
                "what leaves up is clamped" if gated else "down reads an activation, not a product with up",
            )
            return
        if any(tensor.order == "interleaved" for tensor in tensors):
            self._skip(place, "gate and up alternate")
            return
        downs = {(matrix.tensor, matrix.expert): matrix for matrix in routed}
        for expert in range(layer.count):
            site = self._expert(number, expert, [t for t in tensors if t.expert in (None, expert)], downs)
            if site is not None:
                yield site

    def _expert(
        self, number: int, expert: int, tensors: list[ExpertTensor], downs: Mapping[tuple[str, int | None], Matrix]
    ) -> Site | None:  # fmt: skip
        """Return the site of one expert, None where its down projection is not quantized."""
        spans: dict[str, Span] = {}
        for tensor in tensors:
            assert tensor.channel_axis is not None
            whole = self._checkpoint.tensors[tensor.name].shape[tensor.channel_axis]
            width = whole // (2 if tensor.order == "concatenated" else 1)
            start = width if tensor.order == "concatenated" else 0
            stacked = expert if tensor.expert_axis is not None else None
            role = tensor.role.replace("gate_up", "up") if tensor.order != "plain" else tensor.role
            spans[role] = Span(tensor.name, tensor.channel_axis, start, width, stacked)
        down = spans["down"]
        matrix = downs.get((down.tensor, down.expert))
        if matrix is None:
            return None
        producers = tuple(spans[role] for role in ("up", "up_bias") if role in spans)
        name = producers[0].tensor + ("" if down.expert is None else f"[{expert}]")
        return Site(name, "up", number, down.length, producers, (down,), (matrix,))


def _of_stream(spec: Expected, tensors: Mapping[str, Expected]) -> str | None:
    """Return the name of the axis of a tensor that is as wide as the stream, None where there is none."""
    if "hidden" in spec.axes:
        return "hidden"
    if "expert_hidden" not in spec.axes:
        return None
    # Experts may read a projection of the stream; without one their inputs are the stream's.
    return None if any(other.kind == "expert_latent" for other in tensors.values()) else "expert_hidden"


def _bias_of(weight: str) -> str:
    return weight.removesuffix(".weight") + ".bias"
