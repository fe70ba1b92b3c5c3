"""Layers that predict further tokens: on disk behind the model's own, not read by every library."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

from surgeon.architectures.base import Alternatives, Part, Tensor
from surgeon.architectures.blocks import grouped, linear, norm
from surgeon.architectures.settings import Settings

PREDICTION_LAYERS = ("num_nextn_predict_layers", "num_mtp_layers")
"""How many there are; of each, everything is present or nothing."""


def prediction_layers(settings: Settings) -> int:
    """Return how many layers of this kind a checkpoint may hold."""
    return settings.optional_integer(*PREDICTION_LAYERS, minimum=0) or 0


def predicting(settings: Settings, index: int, block: Iterable[Part]) -> Iterator[Part]:
    """Yield a layer's own tensors; beyond the last layer they are a group with what joins it to the model.

    Needs the size "two_hidden": the embedding of the next token beside the last hidden state.
    """
    if index < settings.integer("num_hidden_layers"):
        yield from block
        return
    yield from grouped(block, "prediction")
    yield from grouped(_joint(), "prediction")


def _joint() -> Iterator[Tensor]:
    yield from norm("enorm")
    yield from norm("hnorm")
    yield from linear("eh_proj", "hidden", "two_hidden", "prediction")
    yield from norm("shared_head.norm")
    yield Tensor("embed_tokens.weight", ("vocab", "hidden"), "embedding", optional=True)
    yield Tensor("shared_head.head.weight", ("vocab", "hidden"), "head", optional=True)


def under(path: str, parts: Iterable[Part]) -> Iterator[Part]:
    """Yield the parts of a block that stands outside the numbered layers, as one group."""
    for part in grouped(parts, "prediction"):
        if isinstance(part, Alternatives):
            yield Alternatives(tuple(tuple(_inside(path, one) for one in option) for option in part.options))
        else:
            yield _inside(path, part)


def _inside(path: str, tensor: Tensor) -> Tensor:
    return replace(tensor, name=f"{path}.{tensor.name}")
