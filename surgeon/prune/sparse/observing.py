"""What one layer's inputs say while it is observed: norms, or second moments, until the layer is done."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

from surgeon.calibrate.statistics import SecondMoments, finite


class LayerInputs:
    """An observer of a walk that changes layers: sums of the layer at hand, and which layers are done.

    Args:
        modules: whose inputs count -> their layers.
        second_moments: keep x x' besides the squares.
        identity: what the changes depend on; an interrupted pass continues only under the same.
        finished: says whether a layer's result is in a file already.
    """

    def __init__(
        self,
        modules: Mapping[str, int],
        *,
        second_moments: bool,
        identity: str,
        finished: Callable[[int], bool],
    ) -> None:
        self._layers = dict(modules)
        self._finished = finished
        self._moments = SecondMoments(lambda module: module in self._layers) if second_moments else None
        self._squares: dict[str, Tensor] = {}
        self._tokens: dict[str, int] = {}
        self.identity = identity

    def wants(self, module: str) -> bool:
        return module in self._layers

    def observe(self, module: str, inputs: Tensor, outputs: Tensor | None, sample: int | None) -> None:
        if self._finished(self._layers[module]) or not len(inputs):
            return
        if self._moments is not None:
            self._moments.observe(module, inputs, None, sample)
        else:
            part = inputs.float().square().sum(0, dtype=torch.float64).cpu()
            held = self._squares.get(module)
            self._squares[module] = part if held is None else held + part
        self._tokens[module] = self._tokens.get(module, 0) + len(inputs)

    def tokens(self, module: str) -> int:
        """Return how many tokens reached a module; 0 when none did."""
        return self._tokens.get(module, 0)

    def norms(self, module: str) -> Tensor:
        """Return the L2 norm of each input over all tokens, float64 [in].

        Raises:
            InputError: E384 an activation was not finite.
        """
        return finite(module, self._squares[module]).sqrt()

    def hessian(self, module: str) -> Tensor:
        """Return the mean of x x', float32 [in, in]; the sum is forgotten.

        Raises:
            InputError: E384 an activation was not finite.
        """
        assert self._moments is not None
        total, tokens = self._moments.take(module)
        return (total / tokens).float()

    def forget(self) -> None:
        """Drop the sums of a layer that is done."""
        self._squares.clear()
        self._tokens.clear()
        if self._moments is not None:
            self._moments.restore({})

    def state(self) -> dict[str, np.ndarray]:
        """Return which layers are done; their results are in files by now."""
        return {str(layer): np.array(1) for layer in set(self._layers.values()) if self._finished(layer)}

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        """Take up an interrupted pass.

        Raises:
            Stale: the result of a layer that it was computed with is gone.
        """
        if not all(self._finished(int(layer)) for layer in state):
            raise Stale


class Stale(Exception):
    """An interrupted pass cannot be continued because results of its earlier part are gone."""
