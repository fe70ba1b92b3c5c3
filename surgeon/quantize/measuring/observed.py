"""An observer of a pass that deals with each layer as soon as all batches went through it, while its inputs are known."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Protocol

import numpy as np
from torch import Tensor, nn

from surgeon.calibrate.matrices import Matrix
from surgeon.calibrate.walk import Walk
from surgeon.calibrate.watching import Watching
from surgeon.quantize.measuring.deltas import fitting
from surgeon.quantize.measuring.job import Job
from surgeon.quantize.observing import Inputs
from surgeon.quantize.shrinkage import ENOUGH
from surgeon.quantize.workspace import reserved


class Deals(Protocol):
    """What takes layers."""

    def part(self, layer: int, members: Sequence[Matrix], inputs: Inputs) -> None:
        """Take matrices of a layer that share their inputs, of which the sums are known now."""
        ...

    def finish(self, layer: int) -> None:
        """Keep the layer: all its matrices have been taken."""
        ...


class LayerByLayer:
    """Sums of a layer's inputs, handed over at its end; layers that are done already are not looked at.

    Args:
        job: its layers, and which are done.
        deals: takes each layer.
        limit: bytes of sums at a time; None: any number.
    """

    def __init__(self, job: Job, deals: Deals, limit: int | None) -> None:
        self.inputs = Inputs(job.layers, identity=job.key, finished=job.done, tokens=job.tokens, limit=limit)
        self.identity = f"sensitivities {job.key}"
        self._job, self._deals = job, deals
        self._dealt: set[str] = set()
        self.more = False

    def wants(self, module: str) -> bool:
        return self.inputs.wants(module)

    def observe(self, module: str, inputs: Tensor, outputs: Tensor | None, sample: int | None) -> None:
        raise AssertionError("a walk that knows observe_tokens calls that")

    def observe_tokens(self, module: str, inputs: Tensor, gates: Tensor | None, samples: Tensor) -> None:
        self.inputs.observe_tokens(module, inputs, gates, samples)

    @contextmanager
    def around_layer(self, number: int, root: nn.Module, watching: Watching) -> Iterator[None]:
        """Look at a layer while it runs, and deal with it behind its last batch."""
        done = self._job.done(number)
        yield
        if not done:
            self.deal(number)

    def deal(self, number: int) -> None:
        """Deal with the matrices whose inputs have been seen; with all that are left when none is waiting."""
        waiting = self.inputs.waiting()
        for module, members in by_module(self._job.layers[number]).items():
            if module in self.inputs.admitted or (not waiting and module not in self._dealt):
                self._job.check_stop()
                self._deals.part(number, members, self.inputs)
                self.inputs.done([module])
                self._dealt.add(module)
        self.inputs.new_pass()
        if not waiting:
            self._deals.finish(number)
            self.inputs.forget()
            self._dealt.clear()
        self.more = bool(waiting)

    def state(self) -> dict[str, np.ndarray]:
        """Return what is finished; its losses lie in files."""
        return {"done": np.array([self._job.done(n) for n in range(len(self._job.layers))])}

    def restore(self, state: Mapping[str, np.ndarray]) -> bool:
        """Say whether everything is still there that an interrupted pass had finished."""
        return all(self._job.done(number) for number, done in enumerate(state["done"]) if done)


class _Repeating(LayerByLayer):
    """For layers whose sums do not fit in memory together: they are looked at once more until all have been dealt with."""

    def again(self, layer: int) -> bool:
        return self.more


def walk_layers(job: Job, what: str, deals: Deals) -> None:
    """Run the calibration text through the model and deal with each layer that is not done, and with the head at last."""
    if job.complete:
        return
    with Walk(job.checkpoint, job.samples, job.settings, reserve=_reserve(job)) as walk:
        limit = walk.unused_bytes
        fits = max(map(sums_bytes, job.layers)) <= limit
        observer = LayerByLayer(job, deals, None) if fits else _Repeating(job, deals, limit)
        walk.run(
            observer, progress=lambda done, total: job.tell(what, done, total), stop=job.stop, resume=True
        )
        for number in range(walk.layers, len(job.layers)):  # the head
            if not job.done(number):
                observer.deal(number)


def _reserve(job: Job) -> int:
    """Return the bytes that GPTQ takes for a layer beside the pass."""
    integers = [scheme for scheme in job.menu if scheme.kind == "int"]
    if job.data_free:
        return 0
    layers = [
        [(matrix, integers[0]) for matrix in layer if fitting(matrix, integers[:1], job.form)]
        for layer in job.layers
    ]
    few = any(job.tokens < ENOUGH * matrix.columns for layer in job.layers for matrix in layer)
    return reserved(layers, job.form, few=few)


def sums_bytes(matrices: Sequence[Matrix]) -> int:
    """Return the bytes of all sums over a layer's inputs, two of each at most."""
    return sum(8 * members[0].columns ** 2 for members in by_module(matrices).values())


def by_module(matrices: Sequence[Matrix]) -> dict[str, list[Matrix]]:
    """Return matrices by the module under which their inputs are shown."""
    found: dict[str, list[Matrix]] = {}
    for matrix in matrices:
        found.setdefault(matrix.module, []).append(matrix)
    return found
