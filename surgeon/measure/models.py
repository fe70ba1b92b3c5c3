"""Models of random weights in the shapes that a latency table needs: shapes decide about time, values do not.

Codes: E284 a model that cannot be taken apart into equal layers, E517 not enough memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from surgeon.architectures.layered_config import num_layers
from surgeon.deploy.build import build
from surgeon.errors import EnvironmentFault, UsageError
from surgeon.measure.conditions import Conditions
from surgeon.measure.runner import Runner
from surgeon.measure.workload import Workload
from surgeon.scalars import show
from surgeon.structure.config import pruned_config
from surgeon.structure.cut import Cut, LayerCut, LayerShape
from surgeon.structure.parts import Structure

DEEP = 4
CACHED = 64 << 20
"""Bytes of weights that processor caches may hold: models of fewer layers than 4 times this would run in a
cache in which the whole model does not fit, so more of its layers are built."""
HEADROOM = 1.3
"""Memory of a model in use over that of its weights: cache, activations, allocator."""
MOST = 8
"""Models that take turns: with more, the baseline's time has changed before the last one ran."""
_TILE = 1 << 20


@dataclass(frozen=True)
class Variant:
    """A model with ``layers`` equal layers of one shape."""

    layers: int
    shape: LayerShape


def dtype_of(config: Mapping[str, Any], conditions: Conditions) -> str:
    """Return the type to compute in: the one asked for, else the one config.json declares."""
    section = config.get("text_config") if isinstance(config.get("text_config"), Mapping) else {}
    declared = next((s[k] for s in (config, section) if s for k in ("dtype", "torch_dtype") if isinstance(s.get(k), str)), "float32")  # fmt: skip
    return conditions.precision_of(str(declared).removeprefix("torch."))


def shape_of(structure: Structure) -> LayerShape:
    """Return the shape all layers share.

    Raises:
        UsageError: E284 layers differ in heads, width or kind: one row for all of them would be wrong.
    """
    found = {structure.shape(layer) for layer in range(structure.layers)}
    kinds = {(structure.attention[i] is None, structure.ffn[i] is None) for i in range(structure.layers)}
    if len(found) > 1 or len(kinds) > 1:
        raise UsageError("E284", "the layers of this model are not all of one kind and shape, which one table cannot describe",
                         help="time the whole model: surgeon measure MODEL --mode mix")  # fmt: skip
    return found.pop()


class RandomModels:
    """Builds variants of one model; embeddings and vocabulary head are one copy for all of them.

    Attributes:
        full: shape of the model's layers.
        dtype, attention: precision and attention implementation the variants run with.
        deep, short: layers of the two dense variants.
    """

    def __init__(
        self, config: Mapping[str, Any], structure: Structure, workload: Workload, conditions: Conditions
    ) -> None:
        self.config, self.structure = dict(config), structure
        self.workload, self.conditions = workload, conditions
        self.full = shape_of(structure)
        self.dtype = dtype_of(config, conditions)
        self.attention = conditions.attention or ""
        self._torch_dtype = getattr(torch, self.dtype)
        self._donor: Any = None
        self._budget = conditions.memory() / HEADROOM
        layer, outer = self._bytes()
        self._layer, self._outer = layer, outer
        self.deep, self.short = self._depths()

    def room(self) -> int:
        """Return how many models of the deep kind fit beside the dense one."""
        free = self._budget - self._outer - self._layer * self.deep
        return max(1, min(MOST, int(free // (self._layer * self.deep))))

    def sample(self, variant: Variant) -> Runner:
        """Build a variant; dropping the runner frees it."""
        model = random_model(self._config(variant), self._torch_dtype, self.conditions, donor=self._donor)
        if self._donor is None:
            self._donor = model
        return Runner(model, self.workload, self.conditions.clock()[1], seed=self.conditions.seed)

    def _bytes(self) -> tuple[int, int]:
        """Return the bytes of one layer's weights, and of everything outside the layers."""
        count = num_layers(self.config) or self.structure.layers
        if count < 2:
            raise UsageError("E284", "a model of one layer has no layer to take the difference with",
                             help="time the whole model: surgeon measure MODEL --mode mix")  # fmt: skip
        sizes = []
        for number in (1, 2):
            model = build(self._config(Variant(number, self.full)), dtype=self._torch_dtype, device="meta")
            self.attention = self.attention or attention_of(model)
            sizes.append(_size(model))
        layer = max(1, sizes[1] - sizes[0])
        return layer, max(0, sizes[0] - layer)

    def _depths(self) -> tuple[int, int]:
        """Return how many layers the two models have whose difference is layers: 4 and 2 where they fit."""
        count = self.structure.layers
        deep = min(
            count, max(DEEP, -(-4 * CACHED // self._layer) if self._layer * DEEP < 4 * CACHED else DEEP)
        )
        budget = self._budget - self._outer
        while deep > 2 and 2 * deep * self._layer > budget:
            deep = deep // 2 if deep > DEEP else 2
        needed = HEADROOM * (self._outer + 4 * self._layer)
        if 2 * deep * self._layer > budget:
            raise EnvironmentFault("E517", f"timing two models of 2 layers needs about {needed / 1e9:.1f} GB, {self._budget * HEADROOM / 1e9:.1f} GB are available",
                                   help="--memory-limit, another --device, or --dtype bfloat16")  # fmt: skip
        return deep, deep // 2

    def _config(self, variant: Variant) -> dict[str, Any]:
        """Return the configuration of a variant: layers spread over the model's depth, so that kinds stay in proportion."""
        count = self.structure.layers
        chosen = {min(count - 1, (2 * i + 1) * count // (2 * variant.layers)) for i in range(variant.layers)}
        cut = Cut(
            tuple(self._layer_cut(variant.shape) if layer in chosen else None for layer in range(count))
        )
        return pruned_config(self.config, self.structure, cut)

    def _layer_cut(self, shape: LayerShape) -> LayerCut:
        full = self.full
        heads = channels = None
        if (shape.heads, shape.groups) != (full.heads, full.groups):
            each, whole = (shape.heads // shape.groups, full.heads // full.groups) if shape.groups else (0, 1)
            heads = tuple(group * whole + head for group in range(shape.groups) for head in range(each))
        if shape.ffn != full.ffn:
            channels = tuple(range(shape.ffn))
        return LayerCut(heads, channels)


def random_model(
    config: Mapping[str, Any], dtype: torch.dtype, conditions: Conditions, *, donor: Any = None
) -> nn.Module:
    """Build a model of small random numbers, quickly: one tile of them, repeated.

    Args:
        donor: a model of the same vocabulary whose embeddings and head are used instead of own ones.

    Raises:
        EnvironmentFault: E517 it does not fit.
    """
    from transformers.initialization import no_init_weights

    try:
        with no_init_weights():
            model = cast(Any, build(config, dtype=dtype, device=conditions.place))
        set_attention(model, conditions)
        shared: set[int] = set()
        if donor is not None:
            model.set_input_embeddings(donor.get_input_embeddings())
            shared = {id(p) for p in donor.get_input_embeddings().parameters()}
            head = donor.get_output_embeddings()
            if head is not None:
                model.set_output_embeddings(head)
                shared |= {id(p) for p in head.parameters()}
        _fill(model, shared)
    except torch.OutOfMemoryError as error:
        raise EnvironmentFault("E517", f"the memory of {conditions.place} is used up", help="a smaller --memory-limit, or another device") from error  # fmt: skip
    return model


@torch.no_grad()
def _fill(model: nn.Module, skip: set[int]) -> None:
    """Give parameters values as trained ones have them: no zeros, denormals or infinities that run at another speed."""
    tile: Tensor | None = None
    for name, parameter in model.named_parameters():
        if id(parameter) in skip or not parameter.is_floating_point():
            continue
        if parameter.dim() < 2:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)
            continue
        if tile is None:
            generator = torch.Generator().manual_seed(0)
            tile = (0.02 * torch.randn(_TILE, generator=generator)).to(parameter)
        flat = parameter.view(-1)
        for start in range(0, flat.numel(), _TILE):
            part = flat[start : start + _TILE]
            part.copy_(tile[: part.numel()])


def set_attention(model: Any, conditions: Conditions) -> None:
    """Make a model compute attention the way that was asked for.

    Raises:
        UsageError: E281 its class has no such way. EnvironmentFault: E512 a package is missing for it.
    """
    if conditions.attention is None:
        return
    try:
        model.set_attn_implementation(conditions.attention)
    except ValueError as error:
        raise UsageError("E281", f"--attention is {show(conditions.attention)}, which {type(model).__name__} does not have",
                         help="eager, sdpa, or leave it out") from error  # fmt: skip
    except ImportError as error:
        raise EnvironmentFault("E512", f"--attention {conditions.attention} needs a package that is not installed",
                               help="install it, or use eager or sdpa") from error  # fmt: skip


def attention_of(model: Any) -> str:
    """Return the attention implementation a model runs with."""
    return str(getattr(model.config, "_attn_implementation", None) or "eager")


def _size(model: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in {id(p): p for p in model.parameters()}.values())
