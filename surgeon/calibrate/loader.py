"""Reading the next layer while one computes."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from surgeon.calibrate.skeleton import Skeleton
from surgeon.calibrate.streaming import MemoryPlan


class Loader:
    """Reads the next layer's weights while one computes."""

    def __init__(self, skeleton: Skeleton, memory: MemoryPlan) -> None:
        self._skeleton = skeleton
        self._memory = memory
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="surgeon-layer")
        self._ahead: tuple[int, Future[dict[str, Tensor]]] | None = None

    def _read(self, layer: int) -> dict[str, Tensor]:
        with torch.no_grad():
            return self._skeleton.read_layer(layer, experts_too=not self._memory.streams(layer))

    def start(self, layer: int) -> None:
        """Begin to read a layer."""
        if layer < self._skeleton.layers and self._ahead is None:
            self._ahead = (layer, self._pool.submit(self._read, layer))

    def take(self, layer: int) -> dict[str, Tensor]:
        """Return a layer's weights, waiting for them."""
        if self._ahead is None or self._ahead[0] != layer:
            self._ahead = None
            self.start(layer)
        assert self._ahead is not None
        future, self._ahead = self._ahead[1], None
        return future.result()

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._ahead = None
