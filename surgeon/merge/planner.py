"""From a MergeSpec and open checkpoints to a Plan; reads headers and configs, never weights.

One output tensor at a time: which tensor of which model it comes from, what the parameters are
there, which operation that makes. Everything that does not fit is collected and raised at once.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from surgeon.architectures import get as architecture_of
from surgeon.architectures.layered_config import COUNT_KEYS, num_layers, relayer_config
from surgeon.architectures.naming import layer_of, main_stack, relayer
from surgeon.checkpoint.checkpoint import Checkpoint
from surgeon.checkpoint.dtypes import CODES, DTYPES, promote
from surgeon.checkpoint.header import TensorInfo, printable
from surgeon.checkpoint.patterns import matches
from surgeon.copying import Cast, Copy, CopyIfEqual
from surgeon.errors import InputError, SurgeonError, UsageError, Where, raise_all
from surgeon.merge import align
from surgeon.merge.align import Findings
from surgeon.merge.lints import lint
from surgeon.merge.method import Binding, Method
from surgeon.merge.methods import catalogue
from surgeon.merge.parameters import (
    Resolved,
    SliceScopes,
    gradient_position,
    place_of,
    resolve_tensor,
    slice_scopes,
    unmatched_filters,
)
from surgeon.merge.spec import MergeSpec, ModelRef, Slice
from surgeon.plan import OutputModel, OutputTensor, Plan, Task, TensorRef, WorkItem


@dataclass(frozen=True)
class Options:
    """What a plan needs to know beside the spec.

    Attributes:
        structure: input that gives names, shapes and config; None = the base, else the first.
        refuse_positions: disagreement about rope or heads is an error (a pair of our own choosing).
        ignore: patterns of tensors copied unchanged from the structure donor.
        dense: patterns of tensors merged without dropping entries (density 1).
        layers: only these layers of the main stack are merged, the others copied.
        points: sweep points, name -> parameters replaced; empty = one output.
        reference: model that adjustments measure task vectors from; None = without adjustments.
        importance: AIM's channel importance in [0, 1] by tensor name of the reference, broadcastable to
            the tensor; None = not measured.
        seed, max_shard_bytes, allow_nonfinite, quirks: as on the command line.
    """

    structure: ModelRef | None = None
    refuse_positions: bool = False
    ignore: tuple[str, ...] = ()
    dense: tuple[str, ...] = ()
    layers: tuple[int, int] | None = None
    points: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    reference: ModelRef | None = None
    importance: Mapping[str, np.ndarray] | None = None
    seed: int = 0
    max_shard_bytes: int = 5_000_000_000
    allow_nonfinite: bool = False
    quirks: bool = False


@dataclass
class Draft:
    """A plan before companions are chosen: what `surgeon.merge.folder` completes."""

    spec: MergeSpec
    options: Options
    method: Method
    keys: dict[ModelRef, str]
    inputs: dict[str, Checkpoint]
    structure: ModelRef
    items: list[WorkItem]
    config: dict[str, Any] | None
    findings: Findings
    counts: dict[str, int]
    out_code: str | None


@dataclass(frozen=True)
class _Source:
    """One output tensor's origin: input tensor names by model, scopes, gradient position."""

    names: dict[ModelRef, str]
    scopes: SliceScopes
    t: float
    base: ModelRef | None


def draft(
    spec: MergeSpec,
    opened: Mapping[ModelRef, Checkpoint],
    keys: Mapping[ModelRef, str],
    options: Options,
    findings: Findings,
) -> Draft:
    """Plan the tensors of a merge.

    Args:
        spec: what to merge.
        opened: every model of the spec; views (adapters, aligned rows) are welcome.
        keys: short unique names, without paths; they enter the plan id.
        options, findings: see there; findings are raised together at the end.

    Raises:
        InputError, UsageError: all findings, the first one leading.
    """
    method = catalogue(spec.method)
    structure = options.structure or spec.base_model or spec.models()[0]
    inputs = {keys[ref]: opened[ref] for ref in spec.models()}
    arithmetic = method.name != "passthrough"
    sliced = any(s.layer_range is not None for m in spec.modules for p in m.slices for s in p.sources)
    if arithmetic or sliced:
        align.compare_configs(
            keys[structure], inputs, findings, refuse=options.refuse_positions, sliced=sliced
        )
    # Sizes and positions first: aligning tensors of different architectures would only add noise.
    raise_all(findings.errors)
    _check_layers(options.layers, opened[structure])
    origins, config = _origins(spec, opened, structure, findings)
    raise_all(findings.errors)
    _untie(spec, opened, structure, origins, config, findings)
    builder = _Builder(spec, options, method, dict(keys), opened, structure, findings, config)
    items = builder.items(origins)
    if builder.undamped:
        findings.warnings.append(
            f"aim leaves {len(builder.undamped)} tensors as merged: the base has no part in them, "
            f"{printable(min(builder.undamped))} for one"
        )
    for text, where in unmatched_filters(
        spec,
        origins.keys(),
        {ref: [o.names[ref] for o in origins.values() if ref in o.names] for ref in spec.models()},
    ):
        findings.warnings.append(f"{text} ({where})" if where else text)
    for ref in spec.models():
        dropped = getattr(opened[ref], "dropped", ())
        if dropped:
            findings.warnings.append(
                f"{opened[ref].label}: {len(dropped)} small matrices keep nothing of their task vector at this rank, "
                f"{printable(dropped[0])} for one"
            )
    findings.warnings.extend(lint(spec, method, options.points, builder.bound, findings))
    raise_all(findings.errors)
    out_code = CODES.get(spec.out_dtype or spec.dtype or "")
    return Draft(
        spec,
        options,
        method,
        dict(keys),
        inputs,
        structure,
        items,
        config,
        findings,
        builder.counts,
        out_code,
    )


def _check_layers(layers: tuple[int, int] | None, donor: Checkpoint) -> None:
    """Refuse --layers outside the model: nothing would be merged, or less than was meant (fault E10)."""
    stack = main_stack(list(donor.tensors), donor.config or {})
    if layers is None or stack is None:
        return
    depth = _depth(donor, stack)
    if not 0 <= layers[0] < layers[1] <= depth:
        raise UsageError("E214", f"--layers {layers[0]}:{layers[1]} exceeds the {depth} layers of {donor.label}",
                         help=f"the upper end is exclusive; the whole model is 0:{depth}")  # fmt: skip


def _origins(
    spec: MergeSpec, opened: Mapping[ModelRef, Checkpoint], structure: ModelRef, findings: Findings
) -> tuple[dict[str, _Source], dict[str, Any] | None]:
    """Return where every output tensor comes from, in the donor's file order, and the new config."""
    donor = opened[structure]
    order = sorted(donor.tensors.values(), key=lambda t: (str(t.file), t.offset, t.name))
    names = [t.name for t in order]
    stack = main_stack(names, donor.config or {})
    sliced = any(s.layer_range is not None for m in spec.modules for p in m.slices for s in p.sources)
    first, *others = spec.modules
    if others or (first.name and not sliced):
        return _module_origins(spec, opened, names, findings), donor.config
    if not _has_tensors(spec, first.name, names, findings):
        raise_all(findings.errors)
    if not sliced:
        return _whole_origins(spec, opened, structure, names, findings), donor.config
    return _slice_origins(spec, opened, structure, names, stack, findings)


def _whole_origins(spec, opened, structure, names, findings) -> dict[str, _Source]:
    piece = spec.modules[0].slices[0]
    refs = _slice_models(piece, spec)
    scopes = slice_scopes(spec, 0, 0)
    stacks = _stack_lengths(names)
    base = piece.base_model or spec.base_model
    origins = {}
    for name in names:
        place = layer_of(name)
        t = gradient_position(place.index, stacks[place.stack]) if place else 0.0
        origins[name] = _Source({ref: name for ref in refs}, scopes, t, base)
    known = set(names)
    for ref in refs:  # tensors only other models have: never dropped silently (fault E2)
        extra = [n for n in opened[ref].tensors if n not in known and not _is_head_of_untied(n, opened, refs)]
        for name in extra:
            known.add(name)
            place = layer_of(name)
            t = gradient_position(place.index, stacks.get(place.stack, place.index + 1)) if place else 0.0
            origins[name] = _Source({r: name for r in refs}, scopes, t, base)
    return origins


def _is_head_of_untied(name: str, opened, refs) -> bool:
    """The head that tied models do not store is added by `_untie`, not as an unknown tensor."""
    heads = {align.head_name(opened[r].tensors) for r in refs} - {None}
    return name in heads and any(align.is_tied(opened[r]) for r in refs)


def _stack_lengths(names: Sequence[str]) -> dict[str, int]:
    found: dict[str, int] = {}
    for name in names:
        place = layer_of(name)
        if place:
            found[place.stack] = max(found.get(place.stack, 0), place.index + 1)
    return found


def _slice_models(piece: Slice, spec: MergeSpec) -> list[ModelRef]:
    """Return a slice's inputs; a whole-model slice takes the base in as the last one (as mergekit does)."""
    refs = list(dict.fromkeys(s.model for s in piece.sources))
    base = piece.base_model or spec.base_model
    whole = all(s.layer_range is None for s in piece.sources)
    if whole and base is not None and base not in refs:
        refs.append(base)
    return refs


_AFTER = re.compile(
    r"(^|\.)(lm_head|norm|ln_f|final_layernorm|final_layer_norm|embed_out|score|classifier|pooler|cls|output)\b"
)


def _slice_origins(
    spec, opened, structure, names, stack, findings
) -> tuple[dict[str, _Source], dict[str, Any] | None]:
    donor = opened[structure]
    module = spec.modules[0]
    if stack is None:
        raise InputError(
            "E347", f"{donor.label} has no numbered layers to slice", help="use models: instead of slices:"
        )
    origins: dict[str, _Source] = {}
    outside = [n for n in names if (place := layer_of(n)) is None or place.stack != stack]
    last = len(module.slices) - 1
    layers: list[int] = []
    middle: dict[str, _Source] = {}
    for number, piece in enumerate(module.slices):
        base = piece.base_model or spec.base_model
        scopes = slice_scopes(spec, 0, number)
        ranges = _ranges(spec, piece, number, opened, stack, findings)
        if not ranges:
            continue
        length = next(iter(ranges.values()))
        count = length[1] - length[0]
        refs = list(ranges)
        first = opened[base] if base in ranges else opened[refs[0]]
        kinds = _LayerKinds(donor, first)
        start_of_first = ranges[base if base in ranges else refs[0]][0]
        template: dict[int, list[str]] = {}
        for name in first.tensors:
            place = layer_of(name)
            if place and place.stack == stack:
                template.setdefault(place.index, []).append(name)
        for i in range(count):
            target = len(layers)
            layers.append(kinds.donor_layer(start_of_first + i))
            for name in template.get(start_of_first + i, []):
                sources = {ref: relayer(name, ranges[ref][0] + i) for ref in refs}
                middle[relayer(name, target)] = _Source(sources, scopes, gradient_position(i, count), base)
    raise_all(findings.errors)
    # Before the layers the first slice counts, after them the last, both with t = 0 (mergekit).
    for name in outside:
        number = last if _AFTER.search(name) else 0
        piece = module.slices[number]
        refs = _slice_models(piece, spec)
        place = layer_of(name)
        t = gradient_position(place.index, _stack_lengths(names)[place.stack]) if place else 0.0
        origins[name] = _Source(
            {ref: name for ref in refs}, slice_scopes(spec, 0, number), t, piece.base_model or spec.base_model
        )
    ordered: dict[str, _Source] = {}
    placed = False
    for name in names:
        if name in origins:
            ordered[name] = origins[name]
        elif not placed:
            ordered.update(middle)
            placed = True
    config = relayer_config(donor.config, layers) if donor.config is not None else None
    return ordered, config


class _LayerKinds:
    """Finds, for a layer of another model, a layer of the donor that its config describes alike.

    The new config is the donor's, rebuilt for a choice of its layers; sliding and full attention
    and the like must follow the model that gives the layer.
    """

    def __init__(self, donor: Checkpoint, other: Checkpoint) -> None:
        self.donor = donor
        self.other = other
        self._known: dict[int, Any] = {}

    def donor_layer(self, layer: int) -> int:
        if self.other is self.donor or self.donor.config is None or self.other.config is None:
            return layer
        count = num_layers(self.donor.config) or 0
        wanted = _layer_kind(self.other.config, layer)
        for candidate in [layer, *range(count)]:
            if candidate < count:
                if candidate not in self._known:
                    self._known[candidate] = _layer_kind(self.donor.config, candidate)
                if self._known[candidate] == wanted:
                    return candidate
        raise InputError(
            "E344", f"layer {layer} of {self.other.label} is of a kind that {self.donor.label} has nowhere: "
            f"{'; '.join(f'{k} {align.short(v)}' for k, v in wanted.items())}",
            help="name the model that has such layers first",
        )  # fmt: skip


def _layer_kind(config: dict[str, Any], layer: int) -> dict[str, Any]:
    """Return what a config says about one layer: the keys that change when only it is kept."""
    found: dict[str, Any] = {}
    single = relayer_config(config, [layer])
    pairs = [(config, single)]
    pairs += [(config[k], single[k]) for k in single if isinstance(single[k], dict) and k in config]
    for before, after in pairs:
        for key in {*before, *after} - set(COUNT_KEYS):
            if not isinstance(after.get(key), dict) and before.get(key) != after.get(key):
                found[key] = after.get(key)
    return found


def _ranges(spec, piece, number, opened, stack, findings) -> dict[ModelRef, tuple[int, int]]:
    """Check a slice's layer ranges against the models' depth (fault E10)."""
    ranges: dict[ModelRef, tuple[int, int]] = {}
    for index, source in enumerate(piece.sources):
        depth = _depth(opened[source.model], stack)
        start, stop = source.layer_range or (0, depth)
        where = source.where or place_of(spec.where, ("slices", number, "sources", index, "layer_range"))
        label = opened[source.model].label
        if not 0 <= start < stop or stop > depth:
            what = "is empty" if start >= stop else f"exceeds the {depth} layers of {label}"
            findings.errors.append(
                UsageError("E214", f"layer_range [{start}, {stop}] {what}", where=where,
                           help=f"the upper end is exclusive; the whole model is [0, {depth}]")
            )  # fmt: skip
            continue
        if source.model in ranges:
            findings.errors.append(
                UsageError(
                    "E206", f"{label} is listed twice in one slice", where=where, help="list each model once"
                )
            )
        ranges[source.model] = (start, stop)
    lengths = {stop - start for start, stop in ranges.values()}
    if len(lengths) > 1:
        findings.errors.append(
            UsageError("E214", f"the sources of slice {number + 1} have different numbers of layers: "
                       f"{', '.join(map(str, sorted(lengths)))}",
                       where=place_of(spec.where, ("slices", number)),
                       help="all layer_range of one slice must be equally long")
        )  # fmt: skip
    base = piece.base_model or spec.base_model
    if (
        base is not None
        and base not in ranges
        and catalogue(spec.method).base in {"required", "optional"}
        and ranges
    ):
        findings.errors.append(
            UsageError("E205", f"the base {opened[base].label} is no source of slice {number + 1}",
                       where=place_of(spec.where, ("slices", number)),
                       help="list it among the slice's sources with the layers it stands for")
        )  # fmt: skip
    return ranges


def _depth(checkpoint: Checkpoint, stack: str) -> int:
    configured = num_layers(checkpoint.config) if checkpoint.config else None
    return configured or _stack_lengths(list(checkpoint.tensors)).get(stack, 0)


def _module_origins(spec, opened, names, findings) -> dict[str, _Source]:
    """Multi-part models: each module's slices rule the stack and tensors that carry its name."""
    stacks = _stack_lengths(names)
    by_module: dict[int, list[str]] = {}
    for name in names:
        chosen = [i for i, m in enumerate(spec.modules) if _in_module(name, m.name)]
        by_module.setdefault(chosen[0] if chosen else 0, []).append(name)
    origins: dict[str, _Source] = {}
    for index, module in enumerate(spec.modules):
        if not _has_tensors(spec, module.name, names, findings):
            continue
        if len(module.slices) != 1 or any(s.layer_range for s in module.slices[0].sources):
            findings.errors.append(
                UsageError("E213", f'slices inside the module "{printable(module.name)}" cannot change its depth',
                           where=place_of(spec.where, ("modules", module.name)),
                           help="list models: for it")
            )  # fmt: skip
            continue
        piece = module.slices[0]
        scopes = slice_scopes(spec, index, 0)
        refs = _slice_models(piece, spec)
        for name in by_module[index]:
            place = layer_of(name)
            t = gradient_position(place.index, stacks[place.stack]) if place else 0.0
            origins[name] = _Source({r: name for r in refs}, scopes, t, piece.base_model or spec.base_model)
    return {n: origins[n] for n in names if n in origins}


def _has_tensors(spec, module: str, names: Sequence[str], findings) -> bool:
    """Report a module that no tensor belongs to; a model of one part calls its only module default."""
    if (module in {"", "default"} and len(spec.modules) == 1) or any(_in_module(n, module) for n in names):
        return True
    tops = sorted({n.partition(".")[0] for n in names})[:6]
    findings.errors.append(
        UsageError("E218", f'no tensor belongs to the module "{printable(module)}"',
                   where=place_of(spec.where, ("modules", module)),
                   help=f"tensors begin with {', '.join(map(printable, tops))}; a model of one part has the module default")
    )  # fmt: skip
    return False


_MODULE_WORDS = {
    "text_decoder": (
        "language_model",
        "text_model",
        "lm_head",
        "model.layers",
        "model.embed_tokens",
        "model.norm",
    ),
    "vision_tower": ("vision_tower", "visual", "vision_model"),
    "multi_modal_projector": ("multi_modal_projector", "merger", "connector"),
    "vision_encoder": ("visual", "vision_tower", "vision_model"),
}


def _in_module(name: str, module: str) -> bool:
    words = _MODULE_WORDS.get(module, (module,))
    parts = f".{name}."
    return any(f".{word}." in parts for word in words)


def _untie(spec, opened, structure, origins, config, findings) -> None:
    """Decide from headers and configs whether the output is tied (ruling on tied embeddings)."""
    if config is None:
        return
    refs = list(dict.fromkeys(ref for o in origins.values() for ref in o.names))
    states = {ref: align.is_tied(opened[ref]) for ref in refs}
    heads = {ref: align.head_name(opened[ref].tensors) for ref in refs}
    embedding = align.embedding_name(opened[structure].tensors)
    if (
        len({s for s in states.values() if s is not None}) < 2
        or embedding is None
        or embedding not in origins
    ):
        head = align.head_name(origins)
        if states.get(structure) and head is not None and len(refs) > 1:
            # tied, but stored twice (equal copies): one is enough, and the two cannot drift apart
            del origins[head]
            findings.notes.append(f"{head} is not written: the embeddings are tied")
        return
    head = next((h for h in heads.values() if h), "lm_head.weight")
    source = origins.get(head) or _after_layers(spec) or origins[embedding]
    names = {ref: heads[ref] or embedding for ref in source.names}
    origins[head] = replace(source, names=names)
    config.update(_with_tie(config, False))
    tied = ", ".join(opened[r].label for r in refs if states[r])
    findings.notes.append(
        f"the models disagree about tied embeddings: the output is untied; the embedding of {tied} stands for its head"
    )


def _after_layers(spec: MergeSpec) -> _Source | None:
    """Return the origin of what follows the layers of a sliced model: its last slice."""
    if len(spec.modules) != 1 or all(
        s.layer_range is None for p in spec.modules[0].slices for s in p.sources
    ):
        return None
    number = len(spec.modules[0].slices) - 1
    piece = spec.modules[0].slices[number]
    names = dict.fromkeys(_slice_models(piece, spec), "")
    return _Source(names, slice_scopes(spec, 0, number), 0.0, piece.base_model or spec.base_model)


def _with_tie(config: dict[str, Any], tie: bool) -> dict[str, Any]:
    edited = dict(config)
    edited["tie_word_embeddings"] = tie
    for key in ("text_config", "llm_config", "language_config"):
        if isinstance(edited.get(key), dict) and "tie_word_embeddings" in edited[key]:
            edited[key] = {**edited[key], "tie_word_embeddings": tie}
    return edited


class _Builder:
    """Turns origins into work items, one output tensor at a time."""

    def __init__(self, spec, options, method, keys, opened, structure, findings, config):
        self.spec: MergeSpec = spec
        self.options: Options = options
        self.method: Method = method
        self.keys: dict[ModelRef, str] = keys
        self.opened: Mapping[ModelRef, Checkpoint] = opened
        self.structure: ModelRef = structure
        self.findings: Findings = findings
        self.config = config
        self.counts = {"merged": 0, "copied": 0, "identical inputs": 0}
        self.bound: list[tuple[str, Any]] = []
        self.used: set[str] = set()
        self.dense_used: set[str] = set()
        self.undamped: set[str] = set()
        self.ordinals = {ref: i for i, ref in enumerate(spec.models())}
        architecture = architecture_of((opened[structure].config or {}).get("model_type"))
        self.optional = {}
        if architecture is not None and opened[structure].config is not None:
            self.optional = architecture.expected(opened[structure].config)

    def items(self, origins: Mapping[str, _Source]) -> list[WorkItem]:
        items: list[WorkItem] = []
        for name, origin in origins.items():
            try:
                item = self._item(name, origin)
            except SurgeonError as error:
                self.findings.errors.append(error)
                if len(self.findings.errors) > 200:
                    break
                continue
            if item is not None:
                items.append(item)
        for pattern in self.options.ignore:
            if pattern not in self.used:
                self.findings.errors.append(_unmatched("--ignore", pattern, origins))
        for pattern in self.options.dense:
            if pattern not in self.dense_used:
                self.findings.errors.append(_unmatched("--dense", pattern, origins))
        return items

    def _item(self, name: str, origin: _Source) -> WorkItem | None:
        infos: dict[ModelRef, TensorInfo] = {}
        absent: list[ModelRef] = []
        for ref, source in origin.names.items():
            info = self.opened[ref].tensors.get(source)
            if info is None:
                absent.append(ref)
            else:
                infos[ref] = info
        pattern = next((p for p in self.options.ignore if matches(p, name)), None)
        if pattern is not None:
            self.used.add(pattern)
        place = layer_of(name)
        outside = (
            self.options.layers is not None
            and place is not None
            and not self.options.layers[0] <= place.index < self.options.layers[1]
        )
        donor = self.structure if self.structure in infos else next(iter(infos))
        if pattern is not None or outside or (self.options.layers is not None and place is None):
            return self._copy(name, donor, infos[donor])
        if absent:
            return self._partial(name, origin, infos, absent, donor)
        shapes = {i.shape for i in infos.values()}
        if len(shapes) > 1:
            listing = ", ".join(f"{self.opened[r].label} {list(i.shape)}" for r, i in infos.items())
            raise InputError(
                "E342", f"{printable(name)} has different shapes: {listing}", where=Where(tensor=printable(name)),
                help="vocabularies of different size: --vocab base or union" if _looks_like_vocabulary(name)
                else "only checkpoints of one architecture and size can be merged",
            )  # fmt: skip
        known = self.optional.get(origin.names[donor])
        families = {DTYPES[i.dtype].family for i in infos.values()}
        if families == {"float"} and known is not None and known.kind == "buffer":
            # Frequencies and masks are computed, not learned; scaling or trimming them means nothing.
            return self._copy(name, donor, infos[donor])
        if families != {"float"}:
            return self._not_float(name, infos, families, donor)
        return self._merge(name, origin, infos)

    def _copy(self, name: str, donor: ModelRef, info: TensorInfo) -> WorkItem:
        code = self._out_code([info], info)
        operation = (
            Copy()
            if self._is_plain_copy(donor, info, code)
            else Cast("F64" if info.dtype == "F64" else "F32")
        )
        self.counts["copied"] += 1
        return self._tasks(name, code, info, [donor], {donor: info.name}, lambda point: operation)

    def _is_plain_copy(self, ref: ModelRef, info: TensorInfo, code: str) -> bool:
        """Say whether stored bytes can be passed on: same type, and no view computes them."""
        computed = getattr(self.opened[ref], "computed", None)
        return code == info.dtype and not (computed is not None and computed(info.name))

    def _partial(self, name, origin, infos, absent, donor) -> WorkItem | None:
        """A tensor that some models lack: copied where that is defined, else refused."""
        lacking = ", ".join(self.opened[r].label for r in absent)
        if not infos:
            raise InputError("E341", f"{printable(name)} is missing in {lacking}", where=Where(tensor=printable(name)),
                             help="no input holds it, so the merge cannot: surgeon verify names what an input lacks")  # fmt: skip
        expected = self.optional.get(name)
        known = expected is not None and not expected.optional
        bare = self.config is None
        if known or bare:
            raise InputError(
                "E341", f"{printable(name)} is missing in {lacking}", where=Where(tensor=printable(name)),
                help=f"the models must hold the same tensors; --ignore '{printable(name)}' copies this one unchanged",
            )  # fmt: skip
        owner = origin.base if origin.base in infos else donor
        self.findings.notes.append(
            f"{printable(name)} is copied from {self.opened[owner].label}; {lacking} lacks it"
        )
        return self._copy(name, owner, infos[owner])

    def _not_float(self, name, infos, families, donor) -> WorkItem:
        codes = {i.dtype for i in infos.values()}
        if len(infos) == 1:
            return self._copy(name, donor, infos[donor])
        if len(codes) > 1 or not families <= {"integer", "bool"}:
            listing = ", ".join(f"{self.opened[r].label} {i.dtype}" for r, i in infos.items())
            raise InputError(
                "E323", f"{printable(name)} cannot be merged: {listing}", where=Where(tensor=printable(name)),
                help=f"only plain floats are averaged; --ignore '{printable(name)}' copies it unchanged",
            )  # fmt: skip
        self.counts["copied"] += 1
        info = infos[donor]
        refs = [donor, *[r for r in infos if r != donor]]
        return self._tasks(
            name,
            info.dtype,
            info,
            refs,
            {r: infos[r].name for r in refs},
            # Keys, not labels: operations enter the plan id, which must not depend on where models lie.
            lambda point: CopyIfEqual(tuple(self.keys[r] for r in refs)),
        )

    def _merge(self, name: str, origin: _Source, infos: dict[ModelRef, TensorInfo]) -> WorkItem:
        refs = list(infos)
        base = origin.base if origin.base in infos and self.method.base in {"required", "optional"} else None
        reference = infos.get(origin.base) if origin.base is not None else None  # type: ignore[arg-type]
        reference = reference or infos.get(self.structure) or infos[refs[0]]
        work = self._work(list(infos.values()))
        code = self._out_code(list(infos.values()), reference)
        dense = next((p for p in self.options.dense if matches(p, name)), None)
        if dense is not None:
            self.dense_used.add(dense)
        groups: set[str] = set()

        def operation(point: Mapping[str, float]):
            scopes = _with_point(origin.scopes, point, self.method)
            shared, each = resolve_tensor(
                scopes, self.method.table, output=name, inputs={r: infos[r].name for r in refs}, t=origin.t,
                base=base,
            )  # fmt: skip
            values = {k: v.value for k, v in shared.items()}
            per_model = [{k: v.value for k, v in each.get(r, {}).items()} for r in refs]
            if dense is not None:
                for entry in per_model:
                    entry.update({k: 1.0 for k in ("density", "keep") if k in entry})
                values.update({k: 1.0 for k in ("density", "keep") if k in values})
            self._check_values(shared, each, name)
            binding = Binding(
                name=name, shape=reference.shape, count=len(refs), base=refs.index(base) if base is not None else None,
                shared=values, each=tuple(per_model), work=work,
                ordinals=tuple(self.ordinals[r] for r in refs), input_names=tuple(infos[r].name for r in refs),
                seed=self.options.seed, native=self.spec.precision == "float32",
                stored=code,
            )  # fmt: skip
            bound = self.method.bind(binding)
            if isinstance(bound, Copy) and not self._is_plain_copy(refs[0], infos[refs[0]], code):
                bound = Cast(work)
            if len(self.bound) < 4096:
                self.bound.append((name, bound))
            if self.method.group_by and dense is None:  # a dense tensor has no threshold to share
                groups.add(str(values.get(self.method.group_by, "tensor")))
            return self._damped(name, bound, refs, infos, point)

        self._check_inputs_count(name, refs, base)
        self.counts["merged"] += 1
        item = self._tasks(name, code, reference, refs, {r: infos[r].name for r in refs}, operation)
        if groups - {"tensor"}:
            if len(groups) > 1:
                raise UsageError(
                    "E213", "scope cannot differ within one run", help="set it once, without a filter"
                )
            scope = groups.pop()
            place = layer_of(name)
            key = (
                "global"
                if scope == "global"
                else f"{place.stack}.{place.index}"
                if place
                else "outside layers"
            )
            item = replace(item, group=key)
        return item

    def _damped(self, name: str, bound: Any, refs: list[ModelRef], infos, point: Mapping[str, float]) -> Any:
        """Put AIM on top of an operation where the reference's channels were measured."""
        options, omega = self.options, point.get("aim", self.spec.adjust.aim)
        if omega is None or options.importance is None:
            return bound
        if options.reference not in refs:
            self.undamped.add(name)
            return bound
        # Layers may move; what lies outside them may stand for another tensor (a head, untied here).
        importance = options.importance.get(infos[options.reference].name if layer_of(name) else name)
        if importance is None:
            return bound
        from surgeon.merge.aim import damped

        factors = np.float32(1) - importance * np.float32(1 - omega)
        return damped(bound, refs.index(options.reference), factors)

    def _check_inputs_count(self, name: str, refs: list[ModelRef], base: ModelRef | None) -> None:
        least, most = self.method.models
        given = len(refs)
        if self.method.base == "required" and base is None:
            raise UsageError(
                "E205",
                f"{self.method.name} needs base_model",
                where=Where(tensor=printable(name)),
                help="--base MODEL, or base_model: MODEL in the YAML: the model that the others were trained from",
            )
        if self.method.base == "optional" and base is None and most is not None:
            most -= 1
        if given < least or (most is not None and given > most):
            span = f"{least}" if least == most else f"{least} to {most}" if most else f"at least {least}"
            raise UsageError(
                "E205",
                f"{self.method.name} takes {span} models, {given} are given for {printable(name)}",
                help='"surgeon methods merge" says how many models each method takes',
            )

    def _check_values(
        self, shared: dict[str, Resolved], each: dict[Any, dict[str, Resolved]], name: str
    ) -> None:
        for parameter in self.method.parameters:
            for scopes in each.values() if parameter.per_model else [shared]:
                found = scopes.get(parameter.name)
                if found is None:
                    continue
                try:
                    parameter.check(found.value, self.method.name)
                except UsageError as error:
                    place = place_of(self.spec.where, found.path) if found.path else None
                    error.where = place or Where(tensor=printable(name))
                    raise

    def _tasks(self, name, code, info: TensorInfo, refs, names, operation) -> WorkItem:
        points = self.options.points or {"": {}}
        tasks = tuple(
            Task(operation(point), (OutputTensor(name, code, info.shape, key),))
            for key, point in points.items()
        )
        return WorkItem(tuple(TensorRef(self.keys[r], names[r]) for r in refs), tasks)

    def _work(self, infos: list[TensorInfo]) -> str:
        common = promote([i.dtype for i in infos])
        if self.spec.precision == "mergekit":
            return CODES.get(self.spec.dtype or "", common)
        return "F64" if common == "F64" else "F32"

    def _out_code(self, infos: list[TensorInfo], reference: TensorInfo) -> str:
        if DTYPES[reference.dtype].family != "float":
            return reference.dtype
        if self.spec.precision != "mergekit":
            return CODES.get(self.spec.out_dtype or "", reference.dtype)
        if self.spec.out_dtype:
            return CODES[self.spec.out_dtype]
        if self.options.quirks and self.method.name in {"arcee_fusion", "ramplus_tl"}:
            return "F32"
        return CODES.get(self.spec.dtype or "") or promote([i.dtype for i in infos])


def _with_point(scopes: SliceScopes, point: Mapping[str, float], method: Method) -> SliceScopes:
    """Put a sweep point's values above everything else."""
    if not point:
        return scopes
    own = {k: v for k, v in point.items()}

    def override(scope):
        return replace(scope, settings={**{k: v for k, v in scope.settings.items() if k not in own}})

    shared = tuple(override(s) for s in scopes.shared)
    top = [replace(s, settings={**s.settings, **own}) for s in shared[-1:]]
    shared = (*shared[:-1], *top)
    per_model = {
        ref: (*(override(s) for s in chain[: len(chain) - len(scopes.shared)]), *shared)
        for ref, chain in scopes.per_model.items()
    }
    return SliceScopes(shared, per_model, scopes.where)


def _unmatched(option: str, pattern: str, names) -> UsageError:
    from surgeon.errors import close_matches

    return UsageError("E218", f'{option} "{pattern}" matches no tensor',
                      help=close_matches(pattern, names) or "names, globs (*.bias) and re:REGEX are understood")  # fmt: skip


def _looks_like_vocabulary(name: str) -> bool:
    return bool(align._VOCABULARY.search(name))


def assemble(draft: Draft, models: Mapping[str, OutputModel], recipe: dict[str, Any]) -> Plan:
    """Put a completed draft into a Plan."""
    return Plan(
        verb="merge",
        inputs=draft.inputs,
        items=tuple(draft.items),
        models=models,
        recipe=recipe,
        seed=draft.options.seed,
        notes=tuple(dict.fromkeys(draft.findings.notes)),
        warnings=tuple(dict.fromkeys(draft.findings.warnings)),
        max_shard_bytes=draft.options.max_shard_bytes,
        allow_nonfinite=draft.options.allow_nonfinite,
    )
