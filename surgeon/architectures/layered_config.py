"""What config.json says about each layer, and how to rewrite it for another choice of layers.

A configuration describes its layers in four ways: a number of layers, lists with one entry a
layer, lists of layer numbers, and rules such as "every fourth layer". Taking layers out (or
repeating them) moves all four. ``relayer_config`` rebuilds each so that every kept layer stays
what it was, and refuses, naming the key, where no value of the key says so.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from surgeon.errors import InputError, UsageError, Where

Config = Mapping[str, Any]
Path = tuple[str, ...]

COUNT_KEYS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
"""Names of the number of layers; the first one present is believed."""

MOST_LAYERS = 10_000
"""No model has more; a larger number is a damaged file and is taken for no number."""

TEXT_SECTIONS = ("text_config", "llm_config", "language_config", "decoder_config", "thinker_config")
"""Nested configurations of the language model inside a multimodal one."""

INDEX_LISTS = frozenset(
    {
        "mlp_only_layers",
        "full_attn_idxs",
        "moe_layers",
        "attn_layer_indices",
        "attention_layers_idx",
        "hybrid_layer_ids",
        "cross_attention_layers",
        "local_layer_ids",
    }
)
"""Keys that hold a list of 0-based layer numbers."""

NOT_PER_LAYER = frozenset(
    {
        "architectures",
        "pruned_heads",
        "dilations",
        "suppress_tokens",
        "torch_dtype",
        "mtp_layers_block_type",
        "time_step_limit",
    }
)
"""Keys whose lists are about something else, whatever their length."""

PER_LAYER_STRINGS = frozenset({"hybrid_override_pattern"})
"""Keys that hold one character a layer."""

SLIDING_PERIOD = {"gemma2": 2, "gpt_oss": 2, "gemma3_text": 6, "cohere2": 4}
"""Families whose layer i is full attention iff (i + 1) % period == 0 when no list says so."""

COUNTING_LISTS = ("layers_block_type", "hybrid_override_pattern")
"""Lists with one entry a layer (or one character) that count the layers where no number does."""

IMPLIED_TYPES: dict[str, Callable[[Config, int], str]] = {
    "qwen3_next": lambda config, layer: _linear_but(_every(layer, _interval(config))),
    "qwen3_5_moe_text": lambda config, layer: _linear_but(_every(layer, _interval(config))),
    "minimax": lambda config, layer: _linear_but(layer % 2 == 0),
    "kimi_linear": lambda config, layer: _linear_but(layer > 0 and layer % 4 == 0),
    "granitemoehybrid": lambda config, layer: _linear_but(False),
}
"""The kind of layer i that hybrid families assume when no list says so."""

WINDOW_DEFAULT = 28
"""What the families below assume when max_window_layers is absent."""

REFUSED = ("attention_types", "kv_source_layers", "layer_rope_theta")
"""Keys that describe layers in a way that is not rebuilt here."""

KNOWN_RULES = frozenset(
    {
        "attn_layer_offset",
        "attn_layer_period",
        "decoder_sparse_step",
        "expert_layer_offset",
        "expert_layer_period",
        "first_k_dense_replace",
        "full_attention_interval",
        "global_attn_every_n_layers",
        "interleave_moe_layer_step",
        "max_window_layers",
        "moe_layer_end_index",
        "moe_layer_freq",
        "moe_layer_interval",
        "moe_layer_start_index",
        "mtp_layers_block_type",
        "no_rope_layer_interval",
        "num_dense_layers",
        "num_kv_shared_layers",
        "num_nextn_predict_layers",
        "num_mtp_layers",
        "sliding_window_pattern",
    }
)
"""Keys about layers that are rebuilt above, or that stay right whatever the layers are."""

SUSPICIOUS_WORDS = frozenset(
    {
        "end",
        "every",
        "first",
        "freq",
        "frequency",
        "group",
        "interval",
        "last",
        "offset",
        "pattern",
        "period",
        "start",
        "step",
    }
)
"""With "layer" in the same key, these mark a rule about layers that nothing here knows."""


def num_layers(config: Config) -> int | None:
    """Return the number of language-model layers, or None when the configuration has none."""
    return next((count for _, section in _sections(config) if (count := _count(section)) is not None), None)


def implied_layer_type(config: Config, layer: int) -> str:
    """Return the kind of a layer that the family assumes without a list of kinds; full attention mostly."""
    rule = IMPLIED_TYPES.get(str(config.get("model_type")))
    return "full_attention" if rule is None else rule(config, layer)


def per_layer_lists(config: Config) -> list[Path]:
    """Return the paths of all values with one entry a layer, and of all lists of layer numbers."""
    return [
        (*path, key)
        for path, section in _sections(config)
        if (count := _count(section)) is not None
        for key, value in section.items()
        if _is_index_list(key, value, count) or _is_per_layer(key, value, count)
    ]


def relayer_config(config: Config, source_layers: Sequence[int]) -> dict[str, Any]:
    """Return a new configuration whose layer i is the old layer ``source_layers[i]``.

    Layers may be left out, repeated and reordered. Key order and unknown keys are kept, the
    argument is not changed. Tensors of extra prediction layers (MTP) are the caller's matter.

    Raises:
        UsageError: no layer is chosen, or one does not exist.
        InputError: E341 a key describes layers in a way that the new choice cannot be expressed in, E405 a model
            of several kinds of layers would lose all its attention.
    """
    result = copy.deepcopy(dict(config))
    sections = [section for _, section in _sections(result) if _count(section) is not None]
    if not sections:
        raise InputError(
            "E340",
            "config.json does not say how many layers the model has",
            where=Where(file="config.json"),
            help=f"it needs one of {', '.join(COUNT_KEYS)}",
        )
    if config.get("is_encoder_decoder"):
        raise InputError(
            "E341",
            "is_encoder_decoder is true, and the layers of two stacks cannot be chosen by one list",
            where=Where(file="config.json"),
            help="list models: instead of slices:",
        )
    attended = [_attends(section) for section in sections]
    for section, before in zip(sections, attended, strict=True):
        _relayer_section(section, list(source_layers))
        if before and not _attends(section):
            raise InputError(
                "E405",
                "no layer of attention would be left, only layers that pass on a state of fixed size",
                where=Where(file="config.json"),
                help="keep one: the library counts the tokens of a text by a layer of attention, and fails without",
            )
    return result


def _relayer_section(section: dict[str, Any], source: list[int]) -> None:
    count = _count(section)
    assert count is not None
    if not source or not all(0 <= layer < count for layer in source):
        chosen = ", ".join(map(str, source)) or "none"
        raise UsageError("E241", f"layers {chosen} were chosen", help=f"valid layers are 0 to {count - 1}")
    if source == list(range(count)):
        return
    change = _Relayering(section, count, source)
    change.refuse_unknown()
    change.attention()
    change.experts()
    change.lists()
    for key in COUNT_KEYS:
        if section.get(key) == count:
            section[key] = len(source)


def _every(layer: int, period: int) -> bool:
    return (layer + 1) % period == 0


def _every_from_zero(layer: int, period: int) -> bool:
    return layer % period == 0


def _interval(config: Config) -> int:
    value = config.get("full_attention_interval")
    return value if isinstance(value, int) and _is_count(value) else 4


def _linear_but(full: bool) -> str:
    return "full_attention" if full else "linear_attention"


def _from_limit(layer: int, limit: int) -> bool:
    return layer >= limit


def _alternating_below_limit(layer: int, limit: int) -> bool:
    return layer % 2 == 0 and layer < limit


WINDOW_RULES: dict[str, Callable[[int, int], bool]] = {
    "qwen2": _from_limit,
    "qwen3": _from_limit,
    "qwen2_moe": _alternating_below_limit,
}
"""Which layers slide, given max_window_layers, in families that also read layer_types."""


class _Relayering:
    """One section on its way from ``count`` layers to the layers in ``source``."""

    def __init__(self, section: dict[str, Any], count: int, source: list[int]) -> None:
        self.section = section
        self.old = dict(section)
        self.count = count
        self.source = source
        self.family = str(section.get("model_type"))

    def refuse(self, key: str) -> InputError:
        return InputError(
            "E341",
            f"{key} = {self.old.get(key)!r} cannot be rewritten for the chosen layers",
            where=Where(file="config.json"),
            help="choose layers that keep the pattern, or edit the key by hand and say so in the config",
        )

    def rule(self, key: str, value: Any, holds: Callable[[int, Any], bool]) -> bool:
        """Say whether the rule gives every new layer what its source layer had under the old value."""
        return all(holds(new, value) == holds(layer, self.old[key]) for new, layer in enumerate(self.source))

    def number(self, key: str) -> int | None:
        value = self.old.get(key)
        return value if isinstance(value, int) and not isinstance(value, bool) else None

    def has_list(self, key: str) -> bool:
        return isinstance(self.old.get(key), list) and len(self.old[key]) == self.count

    def refuse_unknown(self) -> None:
        for key in REFUSED:
            if self.old.get(key) is not None:
                raise self.refuse(key)
        if self.number("hidden_size_per_layer_input"):
            raise self.refuse("hidden_size_per_layer_input")  # its embedding has an axis over the layers
        for key, value in self.old.items():
            if key in INDEX_LISTS and value and not _is_index_list(key, value, self.count):
                raise self.refuse(key)
            if key in KNOWN_RULES or key in INDEX_LISTS or key in COUNT_KEYS or "layer" not in key:
                continue
            if key.startswith("vision") or "norm" in key:
                continue
            if self.number(key) is not None and SUSPICIOUS_WORDS.intersection(key.split("_")):
                raise self.refuse(key)
            if isinstance(value, list) and value and not _is_per_layer(key, value, self.count):
                raise self.refuse(key)

    def attention(self) -> None:
        """Rebuild the rules that say which layers use which attention."""
        types = self.has_list("layer_types") or self._implied_types()
        self._window()
        self._linear_attention()
        for key, holds in (
            ("sliding_window_pattern", _every),
            ("full_attention_interval", _every),
            ("global_attn_every_n_layers", _every_from_zero),
        ):
            if not self.number(key) or self.rule(key, self.old[key], holds):
                continue
            if not types and not self._write_layer_types(self.old[key]):
                raise self.refuse(key)
            self.section.pop(key, None)  # the explicit list says it all, a stale rule would contradict it
        period = SLIDING_PERIOD.get(self.family)
        if period and not types and "sliding_window_pattern" not in self.old:
            moved = any(_every(new, period) != _every(layer, period) for new, layer in enumerate(self.source))
            if moved:
                self._write_layer_types(period)
        key = "no_rope_layer_interval"
        if (
            self.number(key)
            and not self.has_list("no_rope_layers")
            and not self.rule(key, self.old[key], _every)
        ):
            self.section["no_rope_layers"] = [
                0 if _every(layer, self.old[key]) else 1 for layer in self.source
            ]
        self._shared_kv()
        for period_key, offset_key in (
            ("attn_layer_period", "attn_layer_offset"),
            ("expert_layer_period", "expert_layer_offset"),
        ):
            self._periodic(period_key, offset_key)

    def _implied_types(self) -> bool:
        """Write a list of kinds where the family implied them by a rule that the new numbers would break."""
        if self.family not in IMPLIED_TYPES or self.old.get("linear_attn_config") is not None:
            return False
        kinds = [implied_layer_type(self.old, layer) for layer in self.source]
        if kinds == [implied_layer_type(self.old, new) for new in range(len(kinds))]:
            return False
        self.section["layer_types"] = kinds
        return True

    def _linear_attention(self) -> None:
        """Kimi lists the layers of each kind of attention, counted from one."""
        key = "linear_attn_config"
        nested = self.old.get(key)
        if nested is None:
            return
        names = ("kda_layers", "full_attn_layers")
        listed = [nested.get(name) for name in names] if isinstance(nested, dict) else []
        lists = [one for one in listed if isinstance(one, list) and all(type(n) is int for n in one)]
        if len(lists) != len(names) or sorted(number for one in lists for number in one) != list(
            range(1, self.count + 1)
        ):
            raise self.refuse(key)
        for name, layers in zip(names, lists, strict=True):
            self.section[key][name] = [new + 1 for new, old in enumerate(self.source) if old + 1 in layers]

    def _window(self) -> None:
        """Sliding attention may begin at a layer number; where that no longer fits, a list says it."""
        key = "max_window_layers"
        limit = self.number(key)
        implied = bool(self.old.get("use_sliding_window")) and not self.has_list("layer_types")
        if limit is None:
            if not implied or self.family not in WINDOW_RULES:
                return
            limit = WINDOW_DEFAULT
        if limit < self.count:
            new_limit = sum(layer < limit for layer in self.source)
        else:
            new_limit = len(self.source) if limit == self.count else max(limit, len(self.source))
        if key in self.old or implied:
            self.section[key] = new_limit
        if not implied:
            return
        slides = WINDOW_RULES.get(self.family, _from_limit)
        flags = [slides(layer, limit) for layer in self.source]
        if [slides(new, new_limit) for new in range(len(flags))] == flags:
            return
        if self.family not in WINDOW_RULES:
            raise self.refuse(key)
        self.section["layer_types"] = ["sliding_attention" if flag else "full_attention" for flag in flags]

    def _write_layer_types(self, period: int) -> bool:
        if self.family not in SLIDING_PERIOD:
            return False
        self.section["layer_types"] = [
            "full_attention" if _every(layer, period) else "sliding_attention" for layer in self.source
        ]
        return True

    def _shared_kv(self) -> None:
        """The last layers may reuse the keys and values of the last layer of their type before them."""
        key = "num_kv_shared_layers"
        shared = self.number(key)
        if not shared:
            return
        first = self.count - shared
        flags = [layer >= first for layer in self.source]
        kept = flags.count(True)
        types = self.old["layer_types"] if self.has_list("layer_types") else [None] * self.count
        owners = [layer for layer in self.source if layer < first]
        for layer in self.source[len(owners) :]:
            of_type = [own for own in range(first) if types[own] == types[layer]]
            now = [own for own in owners if types[own] == types[layer]]
            if not of_type or not now or of_type[-1] != now[-1]:
                raise self.refuse(key)
        if flags != sorted(flags):
            raise self.refuse(key)
        self.section[key] = kept

    def _periodic(self, period_key: str, offset_key: str) -> None:
        period, offset = self.number(period_key), self.number(offset_key) or 0
        if not period:
            return
        flags = [layer % period == offset for layer in self.source]
        used = [at for at, flag in enumerate(flags) if flag]
        choices = [(period, offset)]
        if used:
            gap = used[1] - used[0] if len(used) > 1 else len(flags)
            choices += [(period, used[0]), (gap, used[0])]
        else:
            choices.append((len(flags) + 1, len(flags)))
        for new_period, new_offset in choices:
            if [at % new_period == new_offset for at in range(len(flags))] == flags:
                self.section[period_key] = new_period
                if offset_key in self.section or new_offset:
                    self.section[offset_key] = new_offset
                return
        raise self.refuse(period_key)

    def experts(self) -> None:
        """Rebuild the rules that say which layers hold experts."""
        self._sparse_step()
        for key in ("first_k_dense_replace", "num_dense_layers"):
            self._dense_prefix(key)
        self._expert_range()
        step = self.number("interleave_moe_layer_step")
        explicit = isinstance(self.old.get("moe_layers"), list)
        if step and not explicit and not self.rule("interleave_moe_layer_step", step, _every):
            self.section["moe_layers"] = [new for new, layer in enumerate(self.source) if _every(layer, step)]

    def _sparse_step(self) -> None:
        key = "decoder_sparse_step"
        step = self.number(key) or 1
        dense_layers = self.old.get("mlp_only_layers") or []
        if self.rule_holds(lambda layer: _every(layer, step)):
            return
        dense = [
            new for new, layer in enumerate(self.source) if layer in dense_layers or not _every(layer, step)
        ]
        self.section[key] = 1
        self.section["mlp_only_layers"] = dense

    def rule_holds(self, holds: Callable[[int], bool]) -> bool:
        return all(holds(new) == holds(layer) for new, layer in enumerate(self.source))

    def _dense_prefix(self, key: str) -> None:
        limit = self.number(key)
        every = (self.number("moe_layer_freq") or 1) if key == "first_k_dense_replace" else 1
        if limit is None:
            if every != 1 and not self.rule_holds(lambda layer: layer % every == 0):
                raise self.refuse("moe_layer_freq")
            return
        flags = [layer >= limit and layer % every == 0 for layer in self.source]
        new_limit = flags.index(True) if True in flags else len(flags)
        if [at >= new_limit and at % every == 0 for at in range(len(flags))] != flags:
            raise self.refuse(key)
        self.section[key] = max(limit, new_limit) if limit > self.count else new_limit

    def _expert_range(self) -> None:
        key = "moe_layer_start_index"
        start = self.number(key)
        if start is None:
            return
        end = self.number("moe_layer_end_index")
        last = self.count - 1 if end is None or end == -1 else end
        interval = self.number("moe_layer_interval") or 1
        flags = [start <= layer <= last and (layer + 1) % interval == 0 for layer in self.source]
        used = [at for at, flag in enumerate(flags) if flag]
        if not used:
            raise self.refuse(key)
        open_ended = end is None or end == -1
        final = len(flags) - 1 if open_ended else used[-1]
        if [used[0] <= at <= final and (at + 1) % interval == 0 for at in range(len(flags))] != flags:
            raise self.refuse(key)
        self.section[key] = used[0]
        if not open_ended:
            self.section["moe_layer_end_index"] = final

    def lists(self) -> None:
        """Rebuild the lists themselves; values the rules above have written are left alone."""
        for key, value in self.old.items():
            if key not in self.section or self.section[key] is not self.old[key]:
                continue
            if _is_index_list(key, value, self.count):
                wanted = set(value)
                self.section[key] = [new for new, layer in enumerate(self.source) if layer in wanted]
            elif _is_per_layer(key, value, self.count):
                chosen = [copy.deepcopy(value[layer]) for layer in self.source]
                self.section[key] = "".join(chosen) if isinstance(value, str) else chosen


def _sections(config: Config) -> Iterator[tuple[Path, Any]]:
    """Yield the configuration itself and the nested ones of the language model, with their paths."""
    yield (), config
    for key in TEXT_SECTIONS:
        nested = config.get(key)
        if isinstance(nested, dict):
            for path, section in _sections(nested):
                yield (key, *path), section


def _count(section: Config) -> int | None:
    for key in COUNT_KEYS:
        if _is_count(section.get(key)):
            return section[key]
    for key in COUNTING_LISTS:
        value = section.get(key)
        if isinstance(value, (list, str)) and _is_count(len(value)):
            return len(value)
    return None


NO_ATTENTION = frozenset({"linear_attention", "mamba", "conv", "moe", "mlp", "M", "E", "-"})
"""Kinds of layers, and letters of patterns, that are no attention over all earlier tokens."""


def _attends(section: Config) -> bool:
    """Say whether some layer attends to all earlier tokens; True where all layers are of one kind."""
    count = _count(section) or 0
    for key in ("layer_types", *COUNTING_LISTS):
        kinds = section.get(key)
        if isinstance(kinds, (list, str)) and len(kinds) == count:
            return not all(isinstance(kind, str) and kind in NO_ATTENTION for kind in kinds)
    nested = section.get("linear_attn_config")
    if isinstance(nested, dict) and isinstance(nested.get("full_attn_layers"), list):
        return bool(nested["full_attn_layers"])
    period, offset = section.get("attn_layer_period"), section.get("attn_layer_offset")
    if isinstance(period, int) and _is_count(period) and isinstance(offset, int):
        return any(layer % period == offset for layer in range(count))
    return any(implied_layer_type(section, layer) == "full_attention" for layer in range(count))


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value <= MOST_LAYERS


def _is_index_list(key: str, value: Any, count: int) -> bool:
    return (
        key in INDEX_LISTS
        and isinstance(value, list)
        and all(isinstance(item, int) and not isinstance(item, bool) and 0 <= item < count for item in value)
    )


def _is_per_layer(key: str, value: Any, count: int) -> bool:
    if key in PER_LAYER_STRINGS:
        return isinstance(value, str) and len(value) == count
    if (
        key in NOT_PER_LAYER
        or key in INDEX_LISTS
        or key.endswith(("_token_id", "_tokens", "_ids", "_indices", "_idx", "_idxs"))
    ):
        return False
    return isinstance(value, list) and len(value) == count and count > 0
