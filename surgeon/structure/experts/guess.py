"""A proposed record for a family that has none: looked for in names and shapes, to be checked by a person.

A layer with experts has a router, a matrix of E rows as wide as the residual stream, and beside it either an index
that runs from 0 to E - 1 or tensors of three axes with E entries along the first. What shapes cannot show (how
scores are computed, whether stacked gate and up alternate) is taken from the configuration or assumed, and said.
Nothing here is ever used without the person asking for it.
"""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from surgeon.architectures.expert_records.layer_rules import (
    AfterDense,
    AllLayers,
    EveryStep,
    LayerRule,
    Listed,
    Period,
    Typed,
    Window,
)
from surgeon.architectures.expert_records.record import (
    Counts,
    ExpertRecord,
    Extra,
    Fused,
    PerExpert,
    Router,
    Taps,
)
from surgeon.checkpoint.checkpoint import Checkpoint
from surgeon.errors import InputError
from surgeon.structure.experts.names import common_module

NUMBERED = re.compile(r"^(.*?(?:^|\.))(\d{1,6})\.(.+)$")
"""The first number in a name, with what stands before and after it."""

DOWN = re.compile(r"down|w2|output|out_proj|fc2|wo|c_proj")
GATE = re.compile(r"gate|w1|wi_0")
CORRECTION = re.compile(r"correction|expert_bias|statics|balanc")
ATTENTION = re.compile(r"att(entio)?n")

Shape = tuple[int, ...]


@dataclass
class _Stack:
    """Layers under one prefix, and what of them looks routed.

    Attributes:
        shapes: layer -> name inside the layer -> shape.
        routed: the layers that hold experts.
    """

    before: str
    shapes: dict[int, dict[str, Shape]] = field(default_factory=lambda: defaultdict(dict))
    routed: list[int] = field(default_factory=list)


@dataclass
class _Block:
    """What one layer shows: number of experts, router, and matrices by what stands for the expert's number."""

    experts: int
    hidden: int
    router: str
    numbered: dict[str, Shape]
    stacked: dict[str, Shape]
    biases: dict[str, Shape]
    corrections: dict[str, Shape]


def propose(checkpoint: Checkpoint) -> tuple[ExpertRecord, list[str]]:
    """Return a record that describes a checkpoint's experts, and what a person must check in it.

    Raises:
        InputError: E421 nothing in it looks like experts beside a router, or it has no configuration.
    """
    if checkpoint.config is None:
        raise InputError("E421", f"{checkpoint.label} has no config.json to propose a record from",
                         help="give it with --config")  # fmt: skip
    stacks = _stacks(checkpoint)
    for stack in stacks:
        stack.routed = [layer for layer, shapes in sorted(stack.shapes.items()) if _block(shapes) is not None]
    stacks = sorted((s for s in stacks if s.routed), key=lambda s: (-len(s.routed), s.before))
    if not stacks:
        raise InputError(
            "E421", f"{checkpoint.label} shows no layer with a router of E rows beside E experts",
            help="it is a dense model, or it stores experts in a way a record cannot describe",
        )  # fmt: skip
    try:
        return _Proposal(checkpoint, stacks).record()
    except ValidationError as error:  # names that no record can hold, such as some with braces
        raise InputError(
            "E421", f"{checkpoint.label} names its tensors in a way no record can describe: {error.errors()[0]['msg']}",
            help="rename the tensors in the checkpoint: names of plain letters, digits, dots and underscores can be described",
        ) from error  # fmt: skip


def _stacks(checkpoint: Checkpoint) -> list[_Stack]:
    found: dict[str, _Stack] = {}
    for name, info in checkpoint.tensors.items():
        match = NUMBERED.match(name)
        if match:
            stack = found.setdefault(match[1], _Stack(match[1]))
            stack.shapes[int(match[2])][match[3]] = tuple(info.shape)
    return list(found.values())


def _block(shapes: dict[str, Shape]) -> _Block | None:
    """Return what a layer shows of experts, None when it is no layer of experts."""
    own = {name: shape for name, shape in shapes.items() if not ATTENTION.search(name)}
    counts: dict[str, set[int]] = defaultdict(set)
    examples: dict[str, Shape] = {}
    for name, shape in own.items():
        match = NUMBERED.match(name)
        if match:
            template = f"{match[1]}{{expert}}.{match[3]}"
            counts[template].add(int(match[2]))
            examples[template] = shape
    runs = {
        template: len(ids) for template, ids in counts.items() if len(ids) > 1 and ids == set(range(len(ids)))
    }
    stacked = {name: shape for name, shape in own.items() if len(shape) == 3 and min(shape) > 1}
    for experts in sorted({*runs.values(), *(shape[0] for shape in stacked.values())}, reverse=True):
        for router in _routers(own, experts):
            hidden = own[router][1]
            block = _Block(
                experts=experts,
                hidden=hidden,
                router=router,
                numbered={template: examples[template] for template, count in runs.items() if count == experts},
                stacked={
                    name: shape for name, shape in stacked.items() if shape[0] == experts and hidden in shape[1:]
                },
                biases={
                    name: shape for name, shape in own.items()
                    if len(shape) == 2 and shape[0] == experts and _bias_like(name)
                },
                corrections={
                    name: shape for name, shape in own.items()
                    if not NUMBERED.match(name) and max(shape, default=0) == experts and _single(shape)
                },
            )  # fmt: skip
            if block.numbered or block.stacked:
                return block
    return None


def _routers(shapes: dict[str, Shape], experts: int) -> list[str]:
    """Return the matrices with one row per expert, those that are called like routers first."""
    found = [
        name for name, shape in shapes.items()
        if len(shape) == 2 and shape[0] == experts and not NUMBERED.match(name) and not _bias_like(name)
    ]  # fmt: skip
    return sorted(
        found, key=lambda name: (not re.search(r"gate|router|wg|switch", name), name.count("."), name)
    )


def _bias_like(name: str) -> bool:
    return name.endswith("bias")


def _single(shape: Shape) -> bool:
    return sum(size > 1 for size in shape) == 1


class _Proposal:
    def __init__(self, checkpoint: Checkpoint, stacks: list[_Stack]) -> None:
        self._config = checkpoint.config or {}
        self._checkpoint = checkpoint
        self._stack = stacks[0]
        self._others = stacks[1:]
        block = _block(self._stack.shapes[self._stack.routed[0]])
        assert block is not None  # it is routed
        self._block = block
        self._notes: list[str] = []
        self._section, self._settings = self._find_section()

    def record(self) -> tuple[ExpertRecord, list[str]]:
        storage, gated, width = self._storage()
        counts = self._counts(width)
        rule, layers = self._rule(counts)
        family = self._config.get("model_type")
        family = family if isinstance(family, str) and re.fullmatch(r"[\w.-]{1,60}", family) else "proposed"
        names = (*self._stack.shapes[self._stack.routed[0]],)
        shared = sorted({match[1] + "*" for name in names if (match := re.match(r"(.*?shared\w*\.)", name))})
        elsewhere = self._elsewhere()
        record = ExpertRecord(
            family=family,
            model_types=(family,),
            sections=(self._section,),
            counts=counts,
            moe_layers=(rule,),
            layers=(self._stack.before + "{layer}.",),
            extra=Extra(
                appended=any(layer >= layers for layer in self._stack.routed),
                layers=tuple(stack.before + "{layer}." for stack in self._others),
            ),
            storages=(storage,),
            router=self._router(),
            shared=tuple(shared),
            elsewhere=elsewhere,
            taps=self._taps(names),
            gated=gated,
        )
        self._notes.append(
            "the norm before the experts and scales of the residual are not visible in a checkpoint: check taps"
        )
        return record, self._notes

    # --- tensors

    def _storage(self) -> tuple[PerExpert | Fused, bool, int]:
        if self._block.numbered:
            return self._per_expert()
        return self._fused()

    def _per_expert(self) -> tuple[PerExpert, bool, int]:
        hidden = self._block.hidden
        stems = {
            t.removesuffix(".weight"): s for t, s in self._block.numbered.items() if t.endswith(".weight")
        }
        stems = {stem: shape for stem, shape in stems.items() if len(shape) == 2}
        if len(stems) not in (2, 3):
            raise self._unclear(f"{len(stems)} matrices an expert, where two or three were expected", stems)
        width = next((size for shape in stems.values() for size in shape if size != hidden), hidden)
        downs = [stem for stem, shape in stems.items() if shape == (hidden, width)]
        if width == hidden or len(downs) != 1:
            downs = [stem for stem in stems if DOWN.search(_last(stem))]
            self._notes.append("matrices are square: the down projection was told by its name")
        if len(downs) != 1:
            raise self._unclear("no matrix of an expert is clearly its down projection", stems)
        first = sorted(stem for stem in stems if stem != downs[0])
        gate, up = self._gate_and_up(first)
        return PerExpert(storage="per expert", gate=gate, up=up, down=downs[0]), gate is not None, width

    def _gate_and_up(self, stems: list[str]) -> tuple[str | None, str]:
        if len(stems) == 1:
            return None, stems[0]
        gates = [stem for stem in stems if GATE.search(_last(stem))]
        if len(gates) != 1:
            self._notes.append(
                f"which of {_last(stems[0])} and {_last(stems[1])} is the gate could not be told"
            )
            gates = stems[:1]
        else:
            self._notes.append(f"{_last(gates[0])} is taken for the gate by its name")
        return gates[0], next(stem for stem in stems if stem != gates[0])

    def _fused(self) -> tuple[Fused, bool, int]:
        hidden, found = self._block.hidden, self._block.stacked
        if len(found) != 2:
            raise self._unclear(f"{len(found)} stacked tensors a layer, where two were expected", found)
        (one, a), (two, b) = sorted(found.items())
        inner = {name: shape[1] * shape[2] // hidden for name, shape in found.items()}
        down, first = (one, two) if inner[one] < inner[two] else (two, one)
        gated = inner[first] == 2 * inner[down]
        if inner[one] == inner[two]:
            downs = [name for name in found if DOWN.search(_last(name.removesuffix(".weight")))]
            if len(downs) != 1:
                raise self._unclear("neither stacked tensor is clearly the down projection", found)
            down, first = downs[0], next(name for name in found if name != downs[0])
        elif not gated:
            raise self._unclear("the stacked tensors' widths fit neither gated nor plain experts", found)
        width = inner[down]
        transposed = self._transposed(found[first], found[down], width * (2 if gated else 1), width)
        if transposed is None:
            raise self._unclear("the stacked tensors' shapes do not fit each other", {one: a, two: b})
        if gated:
            self._notes.append(
                "whether gate and up lie one after the other or alternate cannot be seen: check order"
            )
        biases = self._stacked_biases(first, down, width * (2 if gated else 1), hidden)
        return Fused(
            storage="fused", gate_up=first if gated else None, up=None if gated else first, down=down,
            transposed=transposed, gate_up_bias=biases[0] if gated else None, up_bias=None if gated else biases[0],
            down_bias=biases[1],
        ), gated, width  # fmt: skip

    def _transposed(self, first: Shape, down: Shape, rows: int, width: int) -> bool | None:
        """Return how the matrices lie, None when they fit neither way; told by both tensors together."""
        hidden = self._block.hidden
        plain = first[1:] == (rows, hidden) and down[1:] == (hidden, width)
        turned = first[1:] == (hidden, rows) and down[1:] == (width, hidden)
        return None if not plain and not turned else turned and not plain

    def _stacked_biases(self, first: str, down: str, rows: int, hidden: int) -> tuple[str | None, str | None]:
        names: list[str | None] = []
        for matrix, size in ((first, rows), (down, hidden)):
            stem = matrix.removesuffix(".weight")
            names.append(
                next((n for n, s in self._block.biases.items() if n.startswith(stem) and s[1] == size), None)
            )
        return names[0], names[1]

    def _router(self) -> Router:
        stem = self._block.router.removesuffix(".weight")
        corrections = [name for name in self._block.corrections if CORRECTION.search(name)]
        biases = [
            name for name in self._block.corrections if name == f"{stem}.bias" and name not in corrections
        ]
        if biases:
            self._notes.append(
                f"{biases[0]} is taken for a part of the logits: if it only helps to choose, call it correction"
            )
        rest = set(self._block.corrections) - {*corrections, *biases}
        if rest:
            self._notes.append(f"{min(rest)} has one value per expert and was left out: name what it is")
        score = self._config_text("scoring_func", "score_function", "moe_router_score_function")
        if score not in ("softmax", "sigmoid", "sqrtsoftplus"):
            score = "sigmoid" if corrections else "softmax"
            self._notes.append(f"scores are assumed to be a {score}; a checkpoint does not show it")
        groups = "top2_sum" if self._key(r"^(n_group|num_expert_group)$") else "none"
        if groups != "none":
            self._notes.append("groups are assumed to be scored by the sum of their best two")
        return Router(
            weight=(self._block.router,),
            bias=tuple(biases),
            correction=tuple(corrections),
            correction_axis=_axis(self._block.corrections[corrections[0]]) if corrections else 0,
            score=score,
            groups=groups,
            renormalised=self._key(r"norm_topk_prob|moe_renormalize|norm_top_k") or False,
            scale=self._key(r"^routed_scaling_factor$|route_scale"),
        )  # fmt: skip

    def _elsewhere(self) -> tuple[str, ...]:
        """Return patterns of attention's tensors with one entry per expert; such models share the number."""
        shapes = self._stack.shapes[self._stack.routed[0]]
        odd = [
            name for name, shape in shapes.items()
            if ATTENTION.search(name) and "experts" in name.split(".") and self._block.experts in shape
        ]  # fmt: skip
        if odd:
            self._notes.append("attention has experts as well: whole experts cannot be removed")
        return tuple(sorted({name.split(".")[0] + ".*" for name in odd}))

    def _taps(self, names: tuple[str, ...]) -> Taps:
        block = common_module([self._block.router, *self._block.numbered, *self._block.stacked])
        norms = [n.removesuffix(".weight") for n in names if n.endswith("norm.weight") and "." not in n[:-7]]
        wanted = [norm for norm in norms if re.search(r"post_attention|pre_ff|ffn|mlp", norm)]
        return Taps(
            norm=(wanted or norms or ["post_attention_layernorm"])[0],
            block=block or "mlp",
            router=self._block.router.removesuffix(".weight"),
        )

    # --- configuration

    def _find_section(self) -> tuple[str, dict[str, Any]]:
        """Return the part of the configuration that gives the number of experts, the top when none does."""
        for section in (
            "",
            "text_config",
            *(key for key, value in self._config.items() if isinstance(value, dict)),
        ):
            part = self._config if section == "" else self._config.get(section)
            if isinstance(part, dict) and self._block.experts in [
                v for k, v in part.items() if "expert" in k
            ]:
                return section, part
        raise self._unclear(f"config.json names no number of experts equal to {self._block.experts}", {})

    def _key(self, pattern: str) -> str | None:
        return next((key for key in sorted(self._settings) if re.search(pattern, key)), None)

    def _config_text(self, *keys: str) -> str | None:
        return next((self._settings[key] for key in keys if isinstance(self._settings.get(key), str)), None)

    def _counts(self, width: int) -> Counts:
        block = self._block
        experts = self._equal(block.experts, r"expert", r"per_tok|shared|group|top|_k$")
        top_k = self._keys(
            r"experts_per_tok(en)?$|^moe_?_?k$|^moe_top_?k$|^top_?k(_experts)?$|^num_selected_experts$"
        )
        widths = self._equal(width, r"intermediate|ffn|inner|width|hidden_dim", r"shared|dense|mlp$")
        narrow = tuple(key for key in widths if "moe" in key or "expert" in key)
        hidden = self._equal(block.hidden, r"^(hidden_size|d_model|n_embd|dim)$", r"$^")
        for what, keys in (("top_k", top_k), ("width", widths), ("hidden", hidden)):
            if not keys:
                raise self._unclear(f"config.json has no key that gives {what}", {})
        if len(narrow or widths) > 1:
            self._notes.append(
                f"several keys are as large as an expert is wide: {', '.join(narrow or widths)}"
            )
        return Counts(
            experts=experts,
            top_k=top_k,
            width=narrow or widths,
            groups=self._keys(r"^(n_group|num_expert_group)$"),
            topk_group=self._keys(r"^topk_group$"),
            layers=self._keys(r"^(num_hidden_layers|n_layers?|num_layers)$")
            or self._keys(r"layers_block_type|layer_types"),
            hidden=hidden,
        )

    def _equal(self, value: int, pattern: str, never: str) -> tuple[str, ...]:
        return tuple(
            key for key, given in sorted(self._settings.items())
            if re.search(pattern, key) and not re.search(never, key) and _scalar(given) == value
        )  # fmt: skip

    def _keys(self, pattern: str) -> tuple[str, ...]:
        return tuple(
            key
            for key in sorted(self._settings)
            if re.search(pattern, key) and self._settings[key] is not None
        )

    def _rule(self, counts: Counts) -> tuple[LayerRule, int]:
        """Return the first rule whose keys give exactly the layers that hold experts, and the number of layers."""
        value = next((self._settings[key] for key in counts.layers), None)
        layers = len(value) if isinstance(value, list | str) else value if isinstance(value, int) else 0
        wanted = frozenset(layer for layer in self._stack.routed if layer < layers)
        settings = {key: value for key, value in self._settings.items() if value is not None}
        for rule in self._rules(settings, wanted, layers):
            try:
                if rule.layers(settings, layers) == wanted:
                    return rule, layers
            except ValueError:
                continue
        self._notes.append(
            f"no rule of config.json gives the layers with experts, {sorted(wanted)}: write moe_layers"
        )
        return AllLayers(rule="all"), layers

    def _rules(self, settings: dict[str, Any], wanted: frozenset[int], layers: int) -> list[LayerRule]:
        """Return rules to try, those that say most first."""
        rules: list[LayerRule] = []
        for key, value in sorted(settings.items()):
            if isinstance(value, list) and len(value) == layers and all(isinstance(v, str) for v in value):
                types = sorted({value[layer] for layer in wanted})
                rules.append(Typed(rule="typed", key=key, types=tuple(types)))
            elif isinstance(value, list) and value and all(isinstance(v, int) for v in value):
                rules.append(Listed(rule="listed", key=key))
            elif re.search(r"dense", key) and isinstance(value, int):
                rules.append(AfterDense(rule="after_dense", first=key))
            elif re.search(r"step|interval|freq", key) and isinstance(value, int):
                dense = self._key(r"mlp_only_layers|dense_layers$")
                rules.append(EveryStep(rule="every_step", step=key, dense=dense))
            elif key.endswith("_period"):
                offset = key.removesuffix("period") + "offset"
                rules.append(Period(rule="period", period=key, offset=offset))
            elif re.search(r"start_index$", key) and isinstance(value, int):
                stem = key.removesuffix("start_index")
                rules.append(
                    Window(rule="window", first=key, last=stem + "end_index", step=stem + "interval")
                )
        everywhere = wanted == frozenset(range(layers))
        telling = [
            rule
            for rule in rules
            if re.search(r"moe|expert|sparse|dense|mlp|interleave|block_type", str(rule))
        ]
        return [AllLayers(rule="all")] * everywhere + telling

    def _unclear(self, what: str, names: Any) -> InputError:
        seen = (
            ", ".join(f"{name} {list(shape)}" for name, shape in sorted(names.items())[:4]) if names else ""
        )
        return InputError(
            "E421", f"{self._checkpoint.label}: {what}" + (f" ({seen})" if seen else ""),
            help="write the record by hand, starting from one of surgeon/architectures/expert_records/families",
        )  # fmt: skip


def _last(stem: str) -> str:
    return stem.rpartition(".")[2]


def _axis(shape: Shape) -> int:
    return max(range(len(shape)), key=lambda axis: shape[axis])


def _scalar(value: Any) -> Any:
    return value[0] if isinstance(value, list) and value and all(v == value[0] for v in value) else value
