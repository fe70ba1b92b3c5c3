"""A pass forward keeping inputs of layers, the loss, and back layer by layer; subclasses say what is looked at on the way.

Every step turns the states at one boundary into those at the next: hidden states on the way up, gradients on the
way down. With a spill folder each step is recorded there, and a later pass continues behind it.
"""

from __future__ import annotations

import math
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from surgeon.calibrate.activations import Activations, InFile
from surgeon.calibrate.answers import TokenSample, answer_places, check_lengths
from surgeon.calibrate.backward import CALLS_KEPT, check_loss
from surgeon.calibrate.batches import Batch, plan_batches
from surgeon.calibrate.boundaries import Boundaries
from surgeon.calibrate.expert_reverse import ReversedExperts
from surgeon.calibrate.head import BLOCK_BYTES, Head
from surgeon.calibrate.head_gradients import Answer, LogitRule, loss_and_gradients
from surgeon.calibrate.pass_state import PassState, identity_of
from surgeon.calibrate.resume import PassFolder
from surgeon.calibrate.settings import Settings
from surgeon.calibrate.skeleton import Call, Skeleton
from surgeon.calibrate.streaming import MemoryPlan, release_memory
from surgeon.calibrate.watching import finite
from surgeon.checkpoint.checkpoint import Checkpoint
from surgeon.errors import InputError, Interrupted, Where

KEPT_EVERY = 8
"""Every so many layers the input is kept when not all fit in memory."""

PEAK = 6
"""In 16 bits the largest value of a gradient is scaled to 2**PEAK: 2**10 from float16's largest, 2**30 from its smallest."""

Progress = Callable[[int, int], None]
"""Called with (steps done, steps)."""


class Receiver(Protocol):
    """What takes the results of a pass. ``identity`` separates receivers whose states must not be mixed."""

    identity: str

    def state(self) -> Mapping[str, np.ndarray]:
        """Return everything taken so far; a pass with a spill folder can then continue after an interruption."""
        ...

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        """Take up what `state` returned."""
        ...


@dataclass(frozen=True)
class SummedLoss:
    """The loss over all samples: nats, and the tokens it sums over."""

    total: float
    tokens: int


class ForwardAndBack(ABC):
    """One forward and one backward pass over all batches.

    Steps: 0 the embedding; 1 + l layer l forward; 1 + L the loss; then backward from layer L-1 to the first
    that matters. What is looked at on the way back is a subclass's.

    Attributes:
        name: of the pass: what one stored another one does not take up.
    """

    name: str

    def __init__(
        self, checkpoint: Checkpoint, samples: Sequence[TokenSample], receiver: Receiver, settings: Settings,
        progress: Progress | None, stop: threading.Event | None,
    ) -> None:  # fmt: skip
        self.skeleton = skeleton = Skeleton(checkpoint, settings)
        self._samples = samples
        self._ids = [np.asarray(sample.ids, dtype=np.int64).reshape(-1) for sample in samples]
        self._taker = receiver
        self._progress = progress
        self._stop = stop
        check_loss(skeleton)
        check_lengths(samples, skeleton.most_tokens)
        self.layers = skeleton.layers
        self.first = self._first()
        config: Any = skeleton.model.config
        heads = {getattr(config, key, None) for key in ("num_attention_heads", "num_key_value_heads")}
        self.batches = plan_batches(
            [len(ids) for ids in self._ids], settings.batch_tokens, equal=skeleton.length_dependent,
            unpadded={count for count in heads if count},
        )  # fmt: skip
        memory = MemoryPlan.of(skeleton, self.batches, settings)
        places = max(len(batch.samples) * batch.length for batch in self.batches)
        # A group on its way back holds twice the states of one on its way forward.
        self.memory = replace(memory, group_tokens=max(places, memory.group_tokens // 2))
        self._calls: dict[tuple[int, int], tuple[Call, ...]] = {}
        self._folder: PassFolder | None = None
        self._stage = -1
        self._state = PassState(np.zeros(len(self.batches), dtype=np.int64))
        self._over: list[Path] = []

    # ---- order of work -------------------------------------------------------------------------

    @property
    def steps(self) -> int:
        return self.layers + 2 + self.layers - self.first

    def run(self, resume: bool) -> SummedLoss:
        """Run all steps that are not done yet."""
        shapes = [(len(b.samples), b.length, self.skeleton.hidden_size) for b in self.batches]
        self._folder = self._pass_folder()
        try:
            where = None if self._folder is None else self._folder.path
            with Boundaries(shapes, self.skeleton.dtype, self._room(), where) as self._stores:
                states = self.layers - self.first + 1
                self._every = 1 if where is None and states <= self._stores.in_memory else KEPT_EVERY
                found = self._restore() if resume else None
                if found is None and self._folder is not None:
                    self._folder.forget()
                self._go(found)
        finally:
            if self._folder is not None:
                self._folder.close()
        return SummedLoss(self._state.loss, self._state.tokens)

    def _go(self, boundary: Activations | None) -> None:
        for stage in range(self._stage + 1, self.steps):
            fresh = self._boundary(stage, boundary)
            if stage == 0:
                self._embed(fresh)
            elif stage <= self.layers:
                assert boundary is not None
                self._forward(stage - 1, boundary, fresh)
            else:
                assert boundary is not None
                layer = 2 * self.layers + 1 - stage
                if layer == self.layers:
                    self._head(boundary, fresh)
                else:
                    self._backward(layer, boundary, fresh)
            if boundary is not None and boundary is not fresh:
                self._stores.close(boundary)
            boundary, self._stage = fresh, stage
            self._save(boundary)
            if self._progress is not None:
                self._progress(stage + 1, self.steps)

    def _room(self) -> int:
        """Return the bytes for states: what a layer, its way back, and the head leave."""
        skeleton = self.skeleton
        largest = max(
            skeleton.bytes_of_layer(n, experts_too=not self.memory.streams(n)) for n in range(self.layers)
        )
        size = torch.empty(0, dtype=skeleton.dtype).element_size()
        work = max(len(b.samples) * b.length for b in self.batches) * skeleton.widest * 12 * size
        return max(0, skeleton.settings.budget() - largest - work - 2 * skeleton.bytes_outside() - 4 * BLOCK_BYTES) // 2  # fmt: skip

    def _boundary(self, stage: int, before: Activations | None) -> Activations:
        """Return where a step puts its results: over those of the step before, unless they must survive."""
        if self._folder is not None:
            return self._stores.lasting(self._folder.activations(stage).stem)
        return before or self._stores.passing()

    def _check_stop(self) -> None:
        if self._stop is not None and self._stop.is_set():
            raise Interrupted(
                "E130",
                "interrupted while gradients were measured; finished layers are kept where a folder was given",
            )

    def _call(self, layer: int, batch: Batch) -> Call:
        """Return what a layer is called with beside its hidden states; it depends on the shape alone."""
        key = (len(batch.samples), batch.length)
        if key not in self._calls:
            while len(self._calls) >= CALLS_KEPT:
                del self._calls[next(iter(self._calls))]
            self._calls[key] = self.skeleton.calls(torch.zeros(key, dtype=torch.int64))
        return self._calls[key][layer]

    @contextmanager
    def _loaded(self, layer: int) -> Iterator[nn.Module]:
        try:
            tensors = self.skeleton.read_layer(layer, experts_too=not self.memory.streams(layer))
            yield self.skeleton.fill(layer, tensors)
        finally:
            self.skeleton.empty(layer)
            release_memory()

    # ---- forward -------------------------------------------------------------------------------

    def _embed(self, fresh: Activations) -> None:
        for number, batch in enumerate(self.batches):
            self._check_stop()
            fresh.put(number, self.skeleton.record(batch.ids(self._ids)).hidden)
        self._keep(0, fresh)

    def _keep(self, layer: int, inputs: Activations) -> None:
        """Keep a layer's inputs when the way back starts from them."""
        if not self.first <= layer < self.layers or (layer - self.first) % self._every:
            return
        store = self._stores.lasting(f"kept-{layer}")
        for number in range(len(self.batches)):
            store.put(number, inputs.get(number))
        if isinstance(store, InFile):
            store.sync()
        self._state.kept[layer] = store

    def _forward(self, layer: int, boundary: Activations, fresh: Activations) -> None:
        self._compute(layer, boundary, fresh)
        self._keep(layer + 1, fresh)

    def _compute(self, layer: int, inputs: Activations, outputs: Activations) -> None:
        """Run a layer on all batches."""
        with self._loaded(layer):
            for number, out in self._outputs(layer, inputs):
                if not finite(out):
                    raise self._not_finite(f"layer {layer} of {self.skeleton.checkpoint.label} gives values")
                outputs.put(number, out)

    def _outputs(self, layer: int, inputs: Activations) -> Iterator[tuple[int, Tensor]]:
        if not self.memory.streams(layer):
            for number, batch in enumerate(self.batches):
                self._check_stop()
                yield number, self.skeleton.call(layer, inputs.get(number), self._call(layer, batch))
            return
        job = ReversedExperts(self.skeleton, layer)
        for group in self.memory.groups(self.batches):
            states = {number: inputs.get(number) for number in group}
            calls = {number: self._call(layer, self.batches[number]) for number in group}
            yield from job.run(states, calls, {n: self.batches[n] for n in group}, self._check_stop)

    def _not_finite(self, what: str) -> InputError:
        return InputError("E384", f"{what} that are not finite", where=Where(self.skeleton.checkpoint.label),
                          help="the weights may be damaged, or the precision too low; try bfloat16 or float32")  # fmt: skip

    # ---- loss ----------------------------------------------------------------------------------

    def _head(self, boundary: Activations, fresh: Activations) -> None:
        """Replace the last layer's outputs by the gradients of the loss towards them."""
        head = Head(self.skeleton.checkpoint, self.skeleton.settings, skeleton=self.skeleton)
        rule = LogitRule.of(self.skeleton.model.config)
        for number, batch in enumerate(self.batches):
            self._check_stop()
            leaf = boundary.get(number).detach().to(self.skeleton.placement.outer).requires_grad_()
            with torch.enable_grad():
                normed = self.skeleton.finish(batch.ids(self._ids), leaf)
            answers = self._answers(head, batch, normed)
            losses, found = loss_and_gradients(head, rule, answers, None)
            if not math.isfinite(math.fsum(losses)):
                raise self._not_finite("the loss has values")
            towards = torch.zeros_like(normed, dtype=found[0].dtype)
            for row, (answer, gradient) in enumerate(zip(answers, found, strict=True)):
                towards[row, answer_places(self._samples[answer.sample])] = gradient
                self._state.tokens += len(answer.targets)
            self._state.loss += math.fsum(losses)
            self._state.exponents[number] = 0
            scaled = self._scaled(number, towards)
            (gradient,) = torch.autograd.grad(normed, leaf, scaled)
            fresh.put(number, self._scaled(number, gradient))

    def _answers(self, head: Head, batch: Batch, normed: Tensor) -> list[Answer]:
        """Return what each sample of a batch predicts; the loss is that of the text's own next tokens."""
        return [self._answer(row, sample, normed) for row, sample in enumerate(batch.samples)]

    def _answer(self, row: int, sample: int, normed: Tensor) -> Answer:
        places = answer_places(self._samples[sample])
        targets = torch.from_numpy(self._ids[sample])[places.start + 1 : places.stop + 1]
        return Answer(sample, normed[row, places].detach().contiguous(), targets.to(normed.device))

    def _scaled(self, number: int, gradient: Tensor) -> Tensor:
        """Return a batch's gradient in the compute precision, in 16 bits times a power of two that is noted."""
        dtype = self.skeleton.dtype
        if dtype.itemsize > 2:
            return gradient.to(dtype)
        peak = float(gradient.abs().max())
        if peak == 0 or not math.isfinite(peak):
            return gradient.to(dtype)
        shift = max(-100, min(100, PEAK - math.frexp(peak)[1]))
        self._state.exponents[number] += shift
        return (gradient.float() * 2.0**shift).to(dtype)

    # ---- backward ------------------------------------------------------------------------------

    def _backward(self, layer: int, towards: Activations, fresh: Activations) -> None:
        """Replace the gradients of a layer's outputs by those of its inputs; deliver what lies between."""
        inputs = self._inputs(layer)
        with self._loaded(layer) as module:
            for number, gradient in self._back(layer, module, inputs, towards):
                if not finite(gradient):
                    raise self._not_finite(f"the gradient of the input of layer {layer} has values")
                fresh.put(number, self._scaled(number, gradient))
        self._stores.close(inputs)
        del self._state.kept[layer]
        if isinstance(inputs, InFile):
            self._over.append(inputs.path)

    def _inputs(self, layer: int) -> Activations:
        """Return a layer's inputs, recomputed from the kept ones below when they are not there."""
        for place in range(max(n for n in self._state.kept if n <= layer), layer):
            self._state.kept[place + 1] = self._stores.passing()
            self._compute(place, self._state.kept[place], self._state.kept[place + 1])
        return self._state.kept[layer]

    # ---- what a subclass decides -------------------------------------------------------------------

    @abstractmethod
    def _first(self) -> int:
        """Return the first layer that matters; the way back ends there."""

    @abstractmethod
    def _back(
        self, layer: int, module: nn.Module, inputs: Activations, towards: Activations
    ) -> Iterator[tuple[int, Tensor]]:
        """Yield (batch number, gradient of the layer's input) for all batches, and look at what lies between."""

    # ---- continuing later ----------------------------------------------------------------------

    def _pass_folder(self) -> PassFolder | None:
        if self.skeleton.settings.spill is None:
            return None
        receiver = [type(self._taker).__qualname__, self._taker.identity]
        own = {"pass": self.name, "kept_every": KEPT_EVERY, "receiver": receiver}
        return PassFolder(self.skeleton.settings.spill, {**identity_of(self.skeleton, self._samples), **own})

    def _save(self, boundary: Activations) -> None:
        if self._folder is not None:
            assert isinstance(boundary, InFile)
            boundary.sync()
            arrays = {f"pass {name}": value for name, value in self._state.packed().items()}
            arrays |= {f"receiver {name}": value for name, value in self._taker.state().items()}
            self._folder.save(self._stage, boundary.digests, arrays)
        while self._over:  # only now does nothing refer to them
            self._over.pop().unlink(missing_ok=True)

    def _restore(self) -> Activations | None:
        """Take up a pass where it was left when all that is on disk can be believed; return the boundary."""
        found = None if self._folder is None else self._folder.load()
        if self._folder is None or found is None or found[2] is None:
            return None
        stage, digests, arrays = found
        state = PassState.unpacked(_under("pass ", arrays), self._stores)
        boundary = self._stores.found(self._folder.activations(stage).stem, digests)
        if state is None or boundary is None or stage >= self.steps:
            return None
        self._state, self._stage = state, stage
        self._taker.restore(_under("receiver ", arrays))
        return boundary


def _under(start: str, arrays: Mapping[str, np.ndarray] | None) -> dict[str, np.ndarray]:
    return {
        name.removeprefix(start): value for name, value in (arrays or {}).items() if name.startswith(start)
    }
