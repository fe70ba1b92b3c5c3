"""The inputs of every layer for every sample of a group, between the forward and the backward pass."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from surgeon.calibrate.activations import Activations, InFile, InMemory
from surgeon.errors import EnvironmentFault, Where


class LayerInputs:
    """Hidden states by (layer, place in the group): in memory while they fit, then in files.

    A context manager; its files are removed at the end, whatever happens.

    Args:
        layers: how many.
        shapes: of each sample's hidden states.
        dtype: of all of them.
        limit: bytes that may lie in memory.
        spill: folder for the rest; None takes the system's folder for temporary files.
    """

    def __init__(
        self,
        layers: int,
        shapes: Sequence[tuple[int, ...]],
        dtype: torch.dtype,
        limit: int,
        spill: Path | None = None,
    ) -> None:
        self._shapes = list(shapes)
        self._dtype = dtype
        self._spill = spill
        self._folder: Path | None = None
        size = torch.empty(0, dtype=dtype).element_size()
        each = sum(torch.Size(shape).numel() for shape in shapes) * size
        self.layers_in_memory = min(layers, limit // max(1, each))
        self._stores: dict[int, Activations] = {}

    def __enter__(self) -> LayerInputs:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for store in self._stores.values():
            store.close()
        self._stores.clear()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def put(self, layer: int, place: int, value: Tensor) -> None:
        """Keep one sample's input of a layer."""
        if layer not in self._stores:
            self._stores[layer] = self._new(layer)
        self._stores[layer].put(place, value)

    def get(self, layer: int, place: int) -> Tensor:
        """Return one sample's input of a layer, on the CPU."""
        return self._stores[layer].get(place)

    def drop(self, layer: int) -> None:
        """Forget a layer's inputs."""
        self._stores.pop(layer).close()

    def _new(self, layer: int) -> Activations:
        if layer < self.layers_in_memory:
            return InMemory(len(self._shapes))
        if self._folder is None:
            place = self._spill or Path(tempfile.gettempdir())
            try:
                place.mkdir(parents=True, exist_ok=True)
                self._folder = Path(tempfile.mkdtemp(prefix="surgeon-activations-", dir=place))
            except OSError as error:
                raise EnvironmentFault("E502", f"cannot write activations: {error.strerror}", where=Where(str(place)),
                                       help="choose another folder for them") from error  # fmt: skip
        return InFile(self._folder / f"{layer}.bin", self._shapes, self._dtype)
