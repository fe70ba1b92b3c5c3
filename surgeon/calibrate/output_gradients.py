"""Inputs of every matrix of a model, and gradients of the loss at its outputs, for labels drawn from the model itself.

    y = W x,   g = dL/dy [tokens, out],   L = -sum log p(label)

With labels from the model's own predictions the mean of g g' is its Fisher information at y, which says what a change of
y does to the predictions: KL = 1/2 d' F d to second order. Labels from the text would also measure how wrong the model is.

Forward, layer by layer, inputs of layers kept; back, layer by layer, each recomputed from its input (`ForwardAndBack`). A
layer is run twice on the way back when its receiver wants to see all inputs before any gradient. Experts are gone
through one by one; gradients at their outputs contain the routing weight.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from surgeon.calibrate.activations import Activations
from surgeon.calibrate.answers import check_answers
from surgeon.calibrate.batches import Batch
from surgeon.calibrate.conditions import memory_faults, threads
from surgeon.calibrate.expert_gradients import delivering_outputs
from surgeon.calibrate.forward_and_back import ForwardAndBack, Progress, Receiver, SummedLoss
from surgeon.calibrate.head import Head
from surgeon.calibrate.head_gradients import Answer, LogitRule
from surgeon.calibrate.matrices import Matrix
from surgeon.calibrate.pieces import is_experts
from surgeon.calibrate.settings import Observer, Settings
from surgeon.calibrate.skeleton import Skeleton
from surgeon.calibrate.watching import Watching, finite
from surgeon.checkpoint.checkpoint import Checkpoint
from surgeon.errors import EnvironmentFault, InputError, Where
from surgeon.seeds import stream_key, uniform


class OutputReceiver(Receiver, Protocol):
    """What takes inputs and gradients, layer by layer from the last to the first."""

    def wants_layer(self, layer: int) -> bool:
        """Say whether a layer's matrices matter; the head is the layer behind the last one."""
        ...

    def observer(self, layer: int) -> Observer | None:
        """Return what sees all inputs of a layer before the first gradient; None when nothing does."""
        ...

    def begin(self, layer: int) -> None:
        """Prepare for a layer's gradients; its inputs have been seen."""
        ...

    def outputs(self, matrix: Matrix, inputs: Tensor, gradients: Tensor, columns: slice) -> None:
        """Take one batch's tokens: inputs [T, in] and gradients [T, outputs], float32, without padding, of the outputs
        ``columns`` of a matrix; only valid during the call."""
        ...

    def end(self, layer: int, predicted: int) -> None:
        """Finish a layer; ``predicted`` tokens make up the loss."""
        ...


@dataclass(frozen=True)
class Text:
    """One sample of which every token is predicted."""

    ids: np.ndarray
    answer_start: int = 0
    line: int = 0


def output_gradients(
    checkpoint: Checkpoint, samples: Sequence[np.ndarray], layers: Sequence[Sequence[Matrix]], receiver: OutputReceiver,
    settings: Settings, *, seed: int = 0, progress: Progress | None = None, stop: threading.Event | None = None,
    resume: bool = False,
) -> SummedLoss:  # fmt: skip
    """Hand inputs of matrices and gradients at their outputs to a receiver.

    Args:
        checkpoint: a decoder with a language-model head.
        samples: token ids, one array a sample, each of two tokens at least.
        layers: matrices by layer; an output head may follow as one more layer.
        receiver: takes them.
        settings: device, precision, memory; ``spill`` keeps what a later pass continues from.
        seed: which labels are drawn: a function of it, the sample's number and the place alone.
        progress: called after each layer.
        stop: ends the pass early with `Interrupted`.
        resume: continue where an interrupted pass over the same model, samples and settings stopped.

    Returns:
        The loss of the drawn labels, summed: the entropy of the predictions in the mean.

    Raises:
        InputError: E434 gradients that are not finite, E387 a sample of one token, E384, E385, E380.
        EnvironmentFault: E504 a layer with all its experts does not fit the memory limit.
    """
    texts = [Text(np.asarray(sample)) for sample in samples]
    check_answers(texts)
    with (
        threads(settings.threads),
        torch.no_grad(),
        memory_faults("the gradients at the outputs of matrices"),
    ):
        return _Pass(checkpoint, texts, layers, receiver, settings, seed, progress, stop).run(resume)


class _Pass(ForwardAndBack):
    """The pass that looks at every matrix; the way back ends at the first layer that matters."""

    name = "output gradients"

    def __init__(
        self, checkpoint: Checkpoint, samples: Sequence[Text], layers: Sequence[Sequence[Matrix]], receiver: OutputReceiver,
        settings: Settings, seed: int, progress: Progress | None, stop: threading.Event | None,
    ) -> None:  # fmt: skip
        self._matrices, self._receiver, self._seed = layers, receiver, seed
        super().__init__(checkpoint, samples, receiver, settings, progress, stop)
        streamed = next((n for n in range(self.layers) if self.memory.streams(n)), None)
        if streamed is not None:
            raise EnvironmentFault("E504", f"the experts of layer {streamed} do not fit the memory limit together, which gradients "
                                   "at their outputs need", help="raise --memory-limit, or use --sensitivity rel-output")  # fmt: skip

    def _wants(self, layer: int) -> bool:
        return (
            layer < len(self._matrices) and bool(self._matrices[layer]) and self._receiver.wants_layer(layer)
        )

    def _first(self) -> int:
        return next(
            (n for n in range(self.layers) if n < len(self._matrices) and self._matrices[n]), self.layers - 1
        )

    # ---- the head ------------------------------------------------------------------------------------

    def _head(self, boundary: Activations, fresh: Activations) -> None:
        wanted = self._wants(self.layers)
        if wanted:
            observer = self._receiver.observer(self.layers)
            if observer is not None:
                for number, batch in enumerate(self.batches):
                    self._check_stop()
                    normed = self.skeleton.finish(batch.ids(self._ids), boundary.get(number))
                    watching = Watching(observer)
                    watching.begin(batch)
                    for matrix in self._matrices[self.layers]:
                        watching.show(matrix.module, normed, None)
            self._receiver.begin(self.layers)
        super()._head(boundary, fresh)
        if wanted:
            self._receiver.end(self.layers, self._state.tokens)

    def _answers(self, head: Head, batch: Batch, normed: Tensor) -> list[Answer]:
        """Return what each sample of a batch predicts, with labels drawn from the predictions."""
        answers = super()._answers(head, batch, normed)
        for answer in answers:
            key = stream_key(self._seed, answer.sample, "labels of the Fisher information")
            chances = torch.from_numpy(uniform(key, 0, len(answer.targets))).to(normed.device)
            logs = _log_sums(head, answer.hidden)
            answer.targets = _drawn(head, answer.hidden, logs, chances)
            if self._wants(self.layers):
                self._show_head(head, answer, logs)
        return answers

    def _show_head(self, head: Head, answer: Answer, logs: Tensor) -> None:
        """Hand over the head's own inputs and gradients, block by block of the vocabulary."""
        rule = LogitRule.of(self.skeleton.model.config)
        for start, stop, weight, bias in head.blocks(head.rows_per_block(len(answer.hidden))):
            logits = head.block_logits(answer.hidden, weight, bias)
            gradients = torch.exp(logits - logs[:, None])
            own = ((answer.targets >= start) & (answer.targets < stop)).nonzero().reshape(-1)
            gradients[own, answer.targets[own] - start] -= 1
            for matrix in self._matrices[self.layers]:
                self._receiver.outputs(
                    matrix, answer.hidden, rule.pull_back(logits, gradients), slice(start, stop)
                )

    # ---- layers --------------------------------------------------------------------------------------

    def _back(
        self, layer: int, module: nn.Module, inputs: Activations, towards: Activations
    ) -> Iterator[tuple[int, Tensor]]:
        wanted = self._wants(layer)
        taps = None
        if wanted:
            self._observe(layer, module, inputs)
            self._receiver.begin(layer)
            taps = _Taps(self.skeleton, layer, module, self._matrices[layer])
        for number, batch in enumerate(self.batches):
            self._check_stop()
            leaf = inputs.get(number).detach().requires_grad_()
            with ExitStack() as stack:
                if taps is not None:
                    stack.enter_context(taps.attached(batch, self._receive(layer, number)))
                with torch.enable_grad():
                    out = self.skeleton.call(layer, leaf, self._call(layer, batch))
                (gradient,) = torch.autograd.grad(out, leaf, towards.get(number).to(out.device))
            yield number, gradient
        if wanted:
            self._receiver.end(layer, self._state.tokens)

    def _observe(self, layer: int, module: nn.Module, inputs: Activations) -> None:
        """Show all inputs of a layer to the receiver's observer."""
        observer = self._receiver.observer(layer)
        if observer is None:
            return
        watching = Watching(observer)
        with watching.attached(module, self.skeleton.pieces(layer)), watching.layer(layer, module):
            for number, batch in enumerate(self.batches):
                self._check_stop()
                watching.begin(batch)
                self.skeleton.call(layer, inputs.get(number), self._call(layer, batch))
                watching.end()

    def _receive(self, layer: int, number: int) -> Callable[[Matrix, Tensor, Tensor, slice], None]:
        scale = 2.0 ** -int(self._state.exponents[number])

        def receive(matrix: Matrix, inputs: Tensor, gradients: Tensor, columns: slice) -> None:
            if not finite(gradients):
                raise InputError(
                    "E434", f"the gradients at the outputs of {matrix.label} are not finite",
                    where=Where(self.skeleton.checkpoint.label),
                    help="its weights may be damaged, or the precision too low; try bfloat16 or float32",
                )  # fmt: skip
            self._receiver.outputs(
                matrix,
                inputs,
                gradients.to(torch.promote_types(gradients.dtype, torch.float32)) * scale,
                columns,
            )

        return receive


class _Taps:
    """Follows the matrices of one layer on the way back."""

    def __init__(self, skeleton: Skeleton, layer: int, module: nn.Module, matrices: Sequence[Matrix]) -> None:
        self._skeleton, self._layer, self._module = skeleton, layer, module
        self._places = places_of(skeleton, layer, matrices)
        self._experts = next((path for path, part in module.named_modules() if is_experts(part)), "")

    @contextmanager
    def attached(
        self, batch: Batch, receive: Callable[[Matrix, Tensor, Tensor, slice], None]
    ) -> Iterator[None]:
        """Hand over one batch that runs forward and back inside."""
        watching = Watching(_Unwatched())
        watching.begin(batch)

        def hook(places: Sequence[tuple[Matrix, slice]]) -> Any:
            def forward(module: nn.Module, args: tuple, kwargs: Mapping[str, Any], output: Tensor) -> None:
                if not torch.is_grad_enabled():
                    return
                entering = watching.rows((args[0] if args else next(iter(kwargs.values()))).detach())

                def back(gradient: Tensor) -> None:
                    found = watching.rows(gradient)
                    for matrix, columns in places:
                        receive(matrix, entering, found[:, columns], slice(0, matrix.rows))

                output.register_hook(back)

            return forward

        def experts(expert: int, name: str, rows: Tensor, entering: Tensor, gradients: Tensor) -> None:
            path = f"{self._experts}.{name}" if self._experts else name
            for matrix, columns in self._places.get((path, expert), ()):
                receive(matrix, entering, gradients[:, columns], slice(0, matrix.rows))

        with ExitStack() as stack:
            for path, part in self._module.named_modules():
                places = self._places.get((f"{path}.weight", None))
                if places:
                    stack.callback(part.register_forward_hook(hook(places), with_kwargs=True).remove)
            stack.enter_context(delivering_outputs(self._skeleton, self._layer, self._module, experts))
            yield


Places = dict[tuple[str, int | None], list[tuple[Matrix, slice]]]
"""(parameter inside the layer, expert or None) -> the matrices in it, and which outputs are theirs."""


def places_of(skeleton: Skeleton, layer: int, matrices: Sequence[Matrix]) -> Places:
    """Return where matrices lie in the parameters of a layer."""
    known = {(matrix.tensor, matrix.expert): matrix for matrix in matrices}
    found: Places = {}
    for name, pieces in skeleton.pieces(layer).items():
        for piece in pieces:
            matrix = known.get((piece.tensor, int(piece.stored[0]) if piece.stored else None))
            if matrix is None:
                continue
            place = found.setdefault((name, piece.expert), [])
            if piece.stored:  # gate and up of one expert: two pieces, one matrix
                columns = slice(None)
            elif piece.expert is None:
                columns = piece.index[0] if piece.index else slice(None)
            else:
                columns = piece.index[1] if len(piece.index) > 1 else slice(None)
            if not any(held is matrix for held, _ in place):
                place.append((matrix, columns))
    return found


class _Unwatched:
    """An observer that wants nothing."""

    def wants(self, module: str) -> bool:
        return False

    def observe(self, module: str, inputs: Tensor, outputs: Tensor | None, sample: int | None) -> None:
        raise AssertionError("nothing is observed here")


def _log_sums(head: Head, hidden: Tensor) -> Tensor:
    """Return log sum exp of the logits at every place, float64 [n]."""
    total = torch.full((len(hidden),), -torch.inf, dtype=torch.float64, device=hidden.device)
    for _, _, weight, bias in head.blocks(head.rows_per_block(len(hidden))):
        total = torch.logaddexp(total, torch.logsumexp(head.block_logits(hidden, weight, bias).double(), 1))
    return total


def _drawn(head: Head, hidden: Tensor, logs: Tensor, chances: Tensor) -> Tensor:
    """Return one token for each place: the first at which the summed probability exceeds the place's chance, int64 [n]."""
    below = torch.zeros_like(chances)
    found = torch.full((len(hidden),), -1, dtype=torch.int64, device=hidden.device)
    for start, _, weight, bias in head.blocks(head.rows_per_block(len(hidden))):
        logits = head.block_logits(hidden, weight, bias).double()
        running = below[:, None] + torch.exp(logits - logs[:, None]).cumsum(1)
        hit = (running > chances[:, None]) & (found < 0)[:, None]
        reached = hit.any(1)
        found[reached] = start + hit[reached].int().argmax(1)
        below = running[:, -1]
    # A chance next to 1, and sums that round to less: the last token stands for it.
    return torch.where(found < 0, head.vocabulary - 1, found)
