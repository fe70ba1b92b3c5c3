"""The passes behind `surgeon.calibrate.gradients`: forward keeping inputs, the head, the layers in reverse.

A layer is recomputed from its kept input with gradients on. Each parameter hands its gradient over as soon
as it is complete and drops it, so that one layer's weights and little more lie in memory; stacked experts
do so one by one (`expert_gradients`).
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from surgeon.calibrate import experts
from surgeon.calibrate.answers import TokenSample, answer_places, check_lengths
from surgeon.calibrate.batches import plan_batches
from surgeon.calibrate.expert_gradients import delivering_experts
from surgeon.calibrate.head import BLOCK_BYTES, Head
from surgeon.calibrate.head_gradients import Answer, LogitRule, loss_and_gradients
from surgeon.calibrate.layer_inputs import LayerInputs
from surgeon.calibrate.pieces import Piece
from surgeon.calibrate.skeleton import Call, Skeleton
from surgeon.calibrate.streaming import MemoryPlan
from surgeon.errors import InputError, Interrupted, Where

CALLS_KEPT = 4
"""Sequence lengths whose masks and rotary tables are kept; an eager mask grows with the length squared."""


STATES = 3
"""Hidden states held in memory beside the inputs of layers: last outputs, gradients, the head's part of tied rows."""


class GradientReceiver(Protocol):
    """What takes the gradients."""

    def receive(
        self, sample: int, tensor: str, weight: Tensor, gradient: Tensor, rows: Tensor | None = None
    ) -> None:
        """Take a tensor's gradient for one sample.

        Args:
            sample: index of the sample.
            tensor: name in the checkpoint; experts one by one whatever their storage; a tied head and
                embedding arrive as one sum under the embedding's name.
            weight, gradient: of one shape, in the compute precision, on the compute device; only valid
                during the call.
            rows: None for a whole tensor. Else the rows along axis 0 that this part covers: head and
                embedding arrive in several parts without common rows. A row, or a tensor such as an expert
                without tokens, that never arrives has the gradient zero.

        Head first, then the layers from last to first, then what lies before them and the final norm.
        """
        ...


def check_loss(skeleton: Skeleton) -> None:
    """Raise E380 for a model without a language-model loss."""
    if (
        not skeleton.causal
        or "weight" not in skeleton.head_pieces()
        or skeleton.model.config.model_type == "bert"
    ):
        raise InputError("E380", f"{skeleton.checkpoint.label} has no language-model head, so it has no loss to differentiate",
                         where=Where(skeleton.checkpoint.label),
                         help="gradients need a decoder such as LlamaForCausalLM")  # fmt: skip


class Pass:
    """One forward and backward pass over groups of samples."""

    def __init__(
        self,
        skeleton: Skeleton,
        samples: Sequence[TokenSample],
        receiver: GradientReceiver,
        progress: Callable[[str], None],
        stop: threading.Event | None,
        hidden: Callable[[int, Tensor], None] | None,
    ) -> None:
        self.skeleton = skeleton
        self.samples = samples
        self.receiver = receiver
        self.progress = progress
        self.stop = stop
        self.hidden = hidden
        check_loss(skeleton)
        pieces = skeleton.head_pieces()
        self.head = Head(skeleton.checkpoint, skeleton.settings, skeleton=skeleton)
        self.rule = LogitRule.of(skeleton.model.config)
        self.head_names = {part: listed[0].tensor for part, listed in pieces.items()}
        check_lengths(samples, skeleton.most_tokens)
        embedding: Any = skeleton.model.get_input_embeddings()
        # The skeleton renumbers rows and clears this; the stock model drops that row's gradient.
        self.padding = embedding.padding_idx
        self.embedding = f"{skeleton.embedding_module}.weight"
        self.embedding_name = skeleton.outer_pieces()[self.embedding][0].tensor
        self.tied = self.embedding_name == self.head.tensor
        lengths = [len(sample.ids) for sample in samples]
        batches = plan_batches(lengths, skeleton.settings.batch_tokens, alone=True)
        self.memory = MemoryPlan.of(skeleton, batches, skeleton.settings)
        self._calls: dict[int, tuple[Call, ...]] = {}

    # ---- memory --------------------------------------------------------------------------------

    def _inputs_limit(self) -> int:
        """Return the bytes for kept inputs: what a layer's weights and gradients and the head leave."""
        skeleton = self.skeleton
        largest = max(
            skeleton.bytes_of_layer(n, experts_too=not self.memory.streams(n)) for n in range(skeleton.layers)
        )
        return max(
            0, skeleton.settings.budget() - 2 * largest - 2 * skeleton.bytes_outside() - 4 * BLOCK_BYTES
        )

    def groups(self) -> list[list[int]]:
        """Return the samples that pass together, longest first.

        As many as fit in memory; all of them, part of their inputs in the spill folder, where that moves
        fewer bytes than reading the model again for every further group.
        """
        skeleton = self.skeleton
        lengths = [len(sample.ids) for sample in self.samples]
        order = sorted(range(len(lengths)), key=lambda n: (-lengths[n], n))
        limit = self._inputs_limit()
        groups: list[list[int]] = []
        filled = 0
        for number in order:
            need = self._state_bytes([number], skeleton.layers + STATES)
            if not groups or filled + need > limit:
                groups.append([])
                filled = 0
            groups[-1].append(number)
            filled += need
        model = sum(skeleton.bytes_of_layer(n) for n in range(skeleton.layers))
        spilled = 2 * max(0, self._state_bytes(order, skeleton.layers + STATES) - limit)
        fits = self._state_bytes(order, STATES) <= limit
        if skeleton.settings.spill is not None and fits and spilled < 2 * model * (len(groups) - 1):
            return [order]
        return groups

    def _state_bytes(self, numbers: Sequence[int], states: int) -> int:
        """Return the bytes of so many hidden states for every token of some samples."""
        size = torch.empty(0, dtype=self.skeleton.dtype).element_size()
        return sum(len(self.samples[n].ids) for n in numbers) * states * self.skeleton.hidden_size * size

    # ---- one group -----------------------------------------------------------------------------

    def group(self, numbers: list[int]) -> dict[int, float]:
        """Run the samples of one group forward and backward; return their losses."""
        skeleton = self.skeleton
        shapes = [(1, len(self.samples[number].ids), skeleton.hidden_size) for number in numbers]
        limit = max(0, self._inputs_limit() - self._state_bytes(numbers, STATES))
        with LayerInputs(skeleton.layers, shapes, skeleton.dtype, limit, skeleton.settings.spill) as inputs:
            final = self._forward(numbers, inputs)
            losses, towards, kept = self._head(numbers, final)
            for layer in reversed(range(skeleton.layers)):
                self._backward(layer, numbers, inputs, towards)
            self._embed_backward(numbers, towards, kept)
        return losses

    def _step(self, name: str) -> None:
        self._check_stop()
        self.progress(name)

    def _check_stop(self) -> None:
        if self.stop is not None and self.stop.is_set():
            raise Interrupted("E130", "interrupted while gradients were measured")

    def _ids(self, number: int) -> Tensor:
        return torch.as_tensor(np.asarray(self.samples[number].ids, dtype=np.int64))[None]

    def _call(self, layer: int, length: int) -> Call:
        """Return what a layer is called with beside its hidden states; it depends on the length alone."""
        found = self._calls.get(length)
        if found is None:
            found = self.skeleton.calls(torch.zeros(1, length, dtype=torch.int64))
            while len(self._calls) >= CALLS_KEPT:
                del self._calls[next(iter(self._calls))]
            self._calls[length] = found
        return found[layer]

    def _forward(self, numbers: list[int], inputs: LayerInputs) -> dict[int, Tensor]:
        """Keep the input of every layer and return the outputs of the last one."""
        self._step("embedding")
        skeleton = self.skeleton
        for place, number in enumerate(numbers):
            inputs.put(0, place, skeleton.record(self._ids(number)).hidden)
        final: dict[int, Tensor] = {}
        for layer in range(skeleton.layers):
            self._step(f"forward, layer {layer}")
            with self._loaded(layer) as module, self._experts(layer, module, None):
                for place, number in enumerate(numbers):
                    self._check_stop()
                    given = inputs.get(layer, place)
                    out = skeleton.call(layer, given, self._call(layer, given.shape[1]))
                    self._check_finite(out, f"layer {layer} gives values", number)
                    if layer + 1 < skeleton.layers:
                        inputs.put(layer + 1, place, out)
                    else:
                        final[number] = out.to("cpu")
        return final

    def _check_finite(self, value: Tensor, what: str, number: int) -> None:
        if not bool(torch.isfinite(value).all()):
            line = self.samples[number].line
            raise InputError("E384", f"{what} that are not finite for sample {number} (line {line})",
                             where=Where(self.skeleton.checkpoint.label, line=line or None),
                             help="the weights may be damaged, or the precision too low; try float32")  # fmt: skip

    @contextlib.contextmanager
    def _loaded(self, layer: int) -> Iterator[nn.Module]:
        try:
            yield self.skeleton.fill(
                layer, self.skeleton.read_layer(layer, experts_too=not self.memory.streams(layer))
            )
        finally:
            self.skeleton.empty(layer)

    def _experts(self, layer: int, module: nn.Module, number: int | None) -> Any:
        """Return the context in which a layer's experts run one by one and hand over their gradients."""

        def receive(piece: Piece, weight: Tensor, gradient: Tensor) -> None:
            assert number is not None  # only a backward pass delivers
            self.receiver.receive(number, piece.name, weight, gradient)

        return delivering_experts(self.skeleton, layer, module, receive)

    # ---- head ----------------------------------------------------------------------------------

    def _head(
        self, numbers: list[int], final: dict[int, Tensor]
    ) -> tuple[dict[int, float], dict[int, Tensor], dict[int, tuple[Tensor, Tensor]]]:
        """Return losses, gradients towards the last layer's outputs, and the head's part of tied rows.

        Consumes ``final``.
        """
        self._step("loss")
        losses: dict[int, float] = {}
        towards: dict[int, Tensor] = {}
        kept: dict[int, tuple[Tensor, Tensor]] = {}
        for batch in self._head_batches(numbers):
            self._check_stop()
            answers = [self._answer(number, final[number]) for number in batch]
            if self.hidden is not None:
                for answer in answers:
                    self.hidden(answer.sample, answer.hidden)
            rows = {number: torch.unique(self._ids(number)) for number in batch} if self.tied else {}
            parts: dict[int, list[tuple[Tensor, Tensor]]] = {number: [] for number in rows}
            found, to_hidden = loss_and_gradients(
                self.head, self.rule, answers, self._deliver_head(rows, parts)
            )
            for answer, loss, gradient in zip(answers, found, to_hidden, strict=True):
                number = answer.sample
                self._check_finite(torch.tensor(loss), "the loss has values", number)
                losses[number] = loss
                towards[number] = self._finish_backward(number, final.pop(number), gradient)
            kept |= {
                n: (torch.cat([r for r, _ in p]), torch.cat([g for _, g in p])) for n, p in parts.items()
            }
        return losses, towards, kept

    def _head_batches(self, numbers: list[int]) -> Iterator[list[int]]:
        """Yield samples whose answers go through the head together: the head is read once for each batch."""
        batch: list[int] = []
        tokens = 0
        for number in numbers:
            places = answer_places(self.samples[number])
            length = places.stop - places.start
            if batch and tokens + length > self.skeleton.settings.batch_tokens:
                yield batch
                batch, tokens = [], 0
            batch.append(number)
            tokens += length
        yield batch

    def _answer(self, number: int, out: Tensor) -> Answer:
        ids, places = self._ids(number), answer_places(self.samples[number])
        hidden = self.skeleton.finish(ids, out)[0, places]
        targets = ids[0, places.start + 1 : places.stop + 1].to(hidden.device)
        return Answer(number, hidden.contiguous(), targets)

    def _deliver_head(
        self, rows: Mapping[int, Tensor], parts: dict[int, list[tuple[Tensor, Tensor]]]
    ) -> Callable[[Answer, str, Tensor, Tensor, slice], None]:
        """Return what takes the head's blocks: rows that an input token will add to are put aside."""

        def deliver(answer: Answer, part: str, weight: Tensor, gradient: Tensor, block: slice) -> None:
            covered = torch.arange(block.start, block.stop)
            if self.tied and part == "weight":
                used = rows[answer.sample]
                used = used[(used >= block.start) & (used < block.stop)]
                place = (used - block.start).to(gradient.device)
                parts[answer.sample].append((used, gradient[place].to("cpu")))
                others = torch.ones(len(covered), dtype=torch.bool)
                others[used - block.start] = False
                covered = covered[others]
                others = others.to(gradient.device)
                weight, gradient = weight[others], gradient[others]
            if len(covered):
                self.receiver.receive(answer.sample, self.head_names[part], weight, gradient, covered)

        return deliver

    def _finish_backward(self, number: int, out: Tensor, gradient: Tensor) -> Tensor:
        """Go back through the final norm: deliver its gradients, return that of the last layer's output."""
        places = answer_places(self.samples[number])
        outer = self._outer_leaves()
        try:
            with torch.enable_grad():
                given = out.detach().to(self.skeleton.placement.outer).requires_grad_()
                normed = self.skeleton.finish(self._ids(number), given)
                full = torch.zeros_like(normed)
                full[0, places] = gradient
                found = torch.autograd.grad(normed, [given, *outer.values()], full, allow_unused=True)
        finally:
            _leaves(outer, False)
        self._deliver_outer(number, outer, found[1:])
        return found[0].to("cpu")

    # ---- layers --------------------------------------------------------------------------------

    def _backward(
        self, layer: int, numbers: list[int], inputs: LayerInputs, towards: dict[int, Tensor]
    ) -> None:
        """Replace the gradients of a layer's outputs by those of its inputs; deliver its parameters'."""
        self._step(f"backward, layer {layer}")
        skeleton = self.skeleton
        pieces = skeleton.pieces(layer)
        with self._loaded(layer) as module:
            stacked = {name for name, _ in experts.stacked_parameters(module)}
            leaves = {n: p for n, p in module.named_parameters() if n not in stacked}
            _leaves(leaves, True)
            for place, number in enumerate(numbers):
                self._check_stop()
                hooks = [
                    p.register_post_accumulate_grad_hook(self._taker(number, pieces[name]))
                    for name, p in leaves.items()
                ]
                given = inputs.get(layer, place)
                given = (
                    skeleton.placement.send(given, skeleton.placement.of_layer(layer))
                    .detach()
                    .requires_grad_()
                )
                with torch.enable_grad(), self._experts(layer, module, number):
                    out = skeleton.call(layer, given, self._call(layer, given.shape[1]))
                    out.backward(towards[number].to(out.device))
                for hook in hooks:
                    hook.remove()
                assert given.grad is not None
                towards[number] = given.grad.to("cpu")
        inputs.drop(layer)

    def _taker(self, number: int, pieces: list[Piece]) -> Callable[[Tensor], None]:
        """Return what takes a parameter's finished gradient and frees it."""

        def take(parameter: Tensor) -> None:
            gradient = parameter.grad
            assert gradient is not None
            for piece in pieces:
                weight = parameter.detach()
                self.receiver.receive(number, piece.name, weight[piece.index], gradient[piece.index])
            parameter.grad = None

        return take

    # ---- before the layers ---------------------------------------------------------------------

    def _outer_leaves(self) -> dict[str, nn.Parameter]:
        outer = {n: p for n, p in self.skeleton.outer().items() if n != self.embedding}
        _leaves(outer, True)
        return outer

    def _deliver_outer(
        self, number: int, outer: Mapping[str, Tensor], found: Sequence[Tensor | None]
    ) -> None:
        pieces = self.skeleton.outer_pieces()
        for (name, parameter), gradient in zip(outer.items(), found, strict=True):
            if gradient is not None:
                for piece in pieces[name]:
                    self.receiver.receive(
                        number, piece.name, parameter.detach()[piece.index], gradient[piece.index]
                    )

    def _embed_backward(
        self, numbers: list[int], towards: dict[int, Tensor], kept: dict[int, tuple[Tensor, Tensor]]
    ) -> None:
        """Deliver the gradients of the embedding, and of learned positions."""
        self._step("backward, embedding")
        for number in numbers:
            ids = self._ids(number)
            self.skeleton.record(ids)  # loads the rows, so that they can be made leaves
            embedding: Any = self.skeleton.model.get_input_embeddings()
            outer = self._outer_leaves()
            embedding.weight.requires_grad_(True)
            try:
                with torch.enable_grad():
                    first = self.skeleton.record(ids).hidden
                    found = torch.autograd.grad(
                        first,
                        [embedding.weight, *outer.values()],
                        towards.pop(number).to(first.device),
                        allow_unused=True,
                    )
            finally:
                embedding.weight.requires_grad_(False)
                _leaves(outer, False)
            self._deliver_outer(number, outer, found[1:])
            rows, gradient = self.skeleton.embedding_rows, found[0]
            if self.padding is not None:
                gradient[(rows == self.padding).to(gradient.device)] = 0
            if self.tied:
                others, from_head = kept.pop(number)
                assert torch.equal(others, rows)  # both are the sample's distinct tokens, sorted
                gradient = gradient + from_head.to(gradient.device)
            self.receiver.receive(number, self.embedding_name, embedding.weight.detach(), gradient, rows)


def _leaves(parameters: Mapping[str, Tensor], wanted: bool) -> None:
    for parameter in parameters.values():
        parameter.requires_grad_(wanted)
