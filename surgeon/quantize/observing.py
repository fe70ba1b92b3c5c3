"""Second moments of the inputs of one layer's matrices, from a walk, until the layer is done.

Matrices that read the same inputs share their sums. The tokens of an expert count as its gate squared says
(`surgeon.quantize.moments`). Where there are few tokens for the inputs there are, every fourth sample is summed apart:
what is chosen on three quarters is judged on the rest.

Not every layer is seen in one go. The sums of all experts may not fit in memory together: those that were not admitted
wait for another pass over the layer. And where each matrix is to see what the quantized ones before it give, a
pass admits one kind of matrix of a layer: what comes first among those that are not done.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from surgeon.calibrate.matrices import Matrix
from surgeon.quantize.moments import Moments, held_out
from surgeon.quantize.shrinkage import ENOUGH


@dataclass(frozen=True)
class _Seen:
    """A module whose inputs are summed."""

    layer: int
    columns: int
    routed: bool


class Inputs:
    """An observer of a walk: sums over the inputs of the layer at hand.

    Args:
        matrices: whose inputs count, by layer.
        identity: what the sums depend on beside the model and its samples; an interrupted pass continues only
            under the same.
        finished: says whether a layer's result is there already.
        cross: sum also (x0 - x) x' for modules that every token reaches, x0 being their inputs in the model without
            replacements; the walk must have been made with ``original``.
        skip: says which layers need not be looked at; those that are finished, if None.
        tokens: of all samples; None is taken for few. Modules that every token reaches are summed as one when this
            is enough.
        limit: bytes of sums at a time; None: any number.
        in_order: says in which layers a pass admits one kind of matrix only.
    """

    def __init__(
        self, matrices: Sequence[Sequence[Matrix]], *, identity: str, finished: Callable[[int], bool],
        cross: bool = False, skip: Callable[[int], bool] | None = None, tokens: int | None = None,
        limit: int | None = None, in_order: Callable[[int], bool] = lambda layer: False,
    ) -> None:  # fmt: skip
        self.identity = identity
        self._finished = finished
        self._skip = finished if skip is None else skip
        self._cross = cross
        self._all_tokens = tokens
        self._limit = limit
        self._in_order = in_order
        self._modules: dict[str, _Seen] = {}
        self._dense: dict[int, set[str]] = {}
        for number, layer in enumerate(matrices):
            for matrix in layer:
                self._modules[matrix.module] = _Seen(number, matrix.columns, matrix.routed)
                if not matrix.routed:
                    self._dense.setdefault(number, set()).add(matrix.module)
        self._sums: dict[str, tuple[Moments, Moments | None]] = {}
        self._tokens: dict[str, int] = {}
        self._originals: dict[str, Tensor] = {}
        self._seen: set[str] = set()
        self._done: set[str] = set()
        self._refused: set[str] = set()
        self._kind: tuple[str, str] | None = None

    # ---- what a walk asks ------------------------------------------------------------------------------

    def wants(self, module: str) -> bool:
        return module in self._modules

    def observe(self, module: str, inputs: Tensor, outputs: Tensor | None, sample: int | None) -> None:
        raise AssertionError("a walk that knows observe_tokens calls that")

    def observe_original(self, module: str, inputs: Tensor) -> None:
        """Keep what the model without replacements feeds a module, for the batch at hand."""
        seen = self._modules[module]
        if self._cross and not seen.routed and module not in self._done and not self._skip(seen.layer):
            self._originals[module] = inputs

    def observe_tokens(self, module: str, inputs: Tensor, gates: Tensor | None, samples: Tensor) -> None:
        """Add a batch's inputs [tokens, in] of a module, with gates [tokens] or None, and the sample of each token."""
        seen = self._modules[module]
        original = self._originals.pop(module, None)
        if module in self._done or self._skip(seen.layer) or not len(inputs):
            return
        self._seen.add(module)
        if not self._admits(module, seen):
            return
        if module not in self._sums:
            cross = self._cross and not seen.routed
            made = [Moments.empty(seen.columns, cross=cross, device=inputs.device) for _ in range(1 + self.divided(module))]  # fmt: skip
            self._sums[module] = (made[0], made[1] if len(made) > 1 else None)
        train, held = self._sums[module]
        self._tokens[module] = self._tokens.get(module, 0) + len(inputs)
        if held is None:
            train.add(inputs, gates, original)
            return
        apart = _apart(samples).to(inputs.device)
        for moments, rows in ((train, ~apart), (held, apart)):
            if bool(rows.any()):
                moments.add(
                    inputs[rows], None if gates is None else gates[rows],
                    None if original is None else original[rows],
                )  # fmt: skip

    def _admits(self, module: str, seen: _Seen) -> bool:
        """Say whether a module is summed in this pass; the answer is the same for all of the pass."""
        if module in self._sums or module in self._refused:
            return module in self._sums
        admitted = True
        if self._in_order(seen.layer):
            # Experts that are streamed run before attention is shown, so dense modules are not left to chance.
            if seen.routed and not self._dense.get(seen.layer, set()) <= self._done:
                admitted = False
            else:
                self._kind = self._kind or kind_of(module)
                admitted = kind_of(module) == self._kind
        if admitted and self._limit is not None and self._sums:
            admitted = sum(map(self._bytes, self._sums)) + self._bytes(module) <= self._limit
        if not admitted:
            self._refused.add(module)
        return admitted

    def _bytes(self, module: str) -> int:
        seen = self._modules[module]
        sums = (1 + self.divided(module)) * (2 if self._cross and not seen.routed else 1)
        return sums * seen.columns**2 * 4

    # ---- what a layer's solver asks --------------------------------------------------------------------

    def divided(self, module: str) -> bool:
        """Say whether samples are held out of a module's sums."""
        seen = self._modules[module]
        return seen.routed or self._all_tokens is None or self._all_tokens < ENOUGH * seen.columns

    @property
    def admitted(self) -> tuple[str, ...]:
        """Modules with sums, in the order in which they were first seen."""
        return tuple(self._sums)

    def kind(self) -> tuple[str, str] | None:
        """Return which kind of module this pass was about, None for all."""
        return self._kind

    def waiting(self) -> set[str]:
        """Return modules of the layer that tokens reach and that are neither done nor summed."""
        return self._seen - self._done - self._sums.keys()

    def tokens(self, module: str) -> int:
        """Return how many tokens reached a module; 0 when none did."""
        return self._tokens.get(module, 0)

    def moments(self, module: str) -> tuple[Moments, Moments]:
        """Return the sums over three quarters of the samples and over the others; empty where none were held out."""
        if module not in self._sums:
            empty = Moments.empty(self._modules[module].columns)
            return empty, empty
        train, held = self._sums[module]
        return train, Moments.empty(len(train.hessian), cross=train.cross is not None, device=train.hessian.device) if held is None else held  # fmt: skip

    def whole(self, module: str) -> Moments:
        """Return the sums over all samples."""
        if module not in self._sums:
            return Moments.empty(self._modules[module].columns)
        train, held = self._sums[module]
        return train if held is None else train.merged(held)

    def done(self, modules: Collection[str]) -> None:
        """Drop the sums of modules that are solved; further passes over the layer leave them out."""
        self._done.update(modules)
        for module in modules:
            self._sums.pop(module, None)
            self._tokens.pop(module, None)

    def new_pass(self) -> None:
        """Let modules that were refused try again, those of the kind at hand before others."""
        self._refused.clear()
        if not any(kind_of(module) == self._kind for module in self.waiting()):
            self._kind = None

    def forget(self) -> None:
        """Drop everything about a layer that is done."""
        for held in (self._sums, self._tokens, self._originals, self._seen, self._done, self._refused):
            held.clear()
        self._kind = None

    # ---- interruptions -----------------------------------------------------------------------------------

    def state(self) -> dict[str, np.ndarray]:
        """Return which layers are done, their results being in files by now, and the sums that still wait."""
        layers = {seen.layer for seen in self._modules.values()}
        found: dict[str, np.ndarray] = {
            f"done {layer}": np.array(1) for layer in layers if self._finished(layer)
        }
        for module, pair in self._sums.items():
            found[f"tokens {module}"] = np.array(self._tokens[module])
            for part, moments in zip(("train", "held"), pair, strict=True):
                if moments is not None:
                    found[f"{part} {module}"] = moments.hessian.cpu().numpy()
                    found[f"{part}-gates {module}"] = np.array([moments.squares, moments.fourths])
                    if moments.cross is not None:
                        found[f"{part}-cross {module}"] = moments.cross.cpu().numpy()
        return found

    def restore(self, state: Mapping[str, np.ndarray]) -> bool:
        """Take up an interrupted pass; False when the result of a layer that it was computed with is gone."""
        split = {name: name.partition(" ") for name in state}
        if not all(self._finished(int(rest)) for kind, _, rest in split.values() if kind == "done"):
            return False
        self.forget()
        for kind, _, module in split.values():
            if kind == "tokens":
                self._tokens[module] = int(state[f"tokens {module}"])
                self._seen.add(module)
                train = _unpacked(state, "train", module)
                assert train is not None
                self._sums[module] = (train, _unpacked(state, "held", module))
        return True


def kind_of(module: str) -> tuple[str, str]:
    """Return what modules have in common that are quantized at the same time: part of the layer and last name.

    All experts of a layer are alike: "model.layers.3.mlp.experts.17.down_proj" gives ("mlp", "down_proj").
    """
    parts = module.split(".")
    start = next((place for place, part in enumerate(parts) if part.isdecimal()), -1) + 1
    inside = parts[start:] or parts
    return inside[0], inside[-1]


def _apart(samples: Tensor) -> Tensor:
    """Return which tokens belong to samples held out, bool [tokens]."""
    found, places = torch.unique(samples, return_inverse=True)
    apart = torch.tensor([held_out(int(sample)) for sample in found], dtype=torch.bool, device=samples.device)
    return apart[places]


def _unpacked(state: Mapping[str, np.ndarray], part: str, module: str) -> Moments | None:
    hessian = state.get(f"{part} {module}")
    if hessian is None:
        return None
    squares, fourths = (float(value) for value in state[f"{part}-gates {module}"])
    cross = state.get(f"{part}-cross {module}")
    return Moments(
        torch.from_numpy(hessian.copy()), squares, fourths, None if cross is None else torch.from_numpy(cross.copy())
    )  # fmt: skip
