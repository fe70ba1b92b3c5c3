"""Several versions of a model over the same text, in one sweep over its layers.

Each version is a stream: the hidden states of all batches between two layers. A layer's weights
are in memory while every stream that needs it goes through, then the next layer is loaded. So
comparing the model with all its versions that skip one layer costs one read of the model, not one
for each version. Streams lie in memory while they fit a quarter of the limit, then in files.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from surgeon.calibrate import streaming
from surgeon.calibrate.batches import Batch, plan_batches
from surgeon.calibrate.conditions import memory_faults, threads
from surgeon.calibrate.layer_inputs import LayerInputs
from surgeon.calibrate.loader import Loader
from surgeon.calibrate.settings import Settings
from surgeon.calibrate.skeleton import Call, Skeleton
from surgeon.calibrate.watching import Watching
from surgeon.checkpoint.checkpoint import Checkpoint
from surgeon.errors import InputError, Interrupted

CALLS = 64
"""Shapes of batches whose masks and rotary tables are kept."""


class LayerSweep:
    """Streams of hidden states that are moved through a model's layers.

    Args:
        checkpoint: the model.
        samples: token ids, one array each.
        settings: where and how it runs.
        streams: how many streams there are, numbered from 0.
        stop: set it to stop after the batch in progress.

    Attributes:
        skeleton: the model without data.
        layers: number of layers.
        batches: how samples are grouped.
        tokens: tokens of all samples.

    Raises (constructor):
        InputError: E385 no samples or an empty one; E380-E383 the model cannot be run.
        EnvironmentFault: E504 a layer does not fit the memory limit.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        samples: Sequence[np.ndarray],
        settings: Settings,
        *,
        streams: int,
        stop: threading.Event | None = None,
    ) -> None:
        self.skeleton = Skeleton(checkpoint, settings)
        self.layers = self.skeleton.layers
        self.settings = settings
        self._samples = [np.asarray(sample, dtype=np.int64).reshape(-1) for sample in samples]
        self._check()
        config: Any = self.skeleton.model.config
        heads = {getattr(config, key, None) for key in ("num_attention_heads", "num_key_value_heads")}
        self.batches: list[Batch] = plan_batches(
            [len(sample) for sample in self._samples],
            settings.batch_tokens,
            equal=self.skeleton.length_dependent,
            unpadded={count for count in heads if count},
        )
        self.tokens = sum(len(sample) for sample in self._samples)
        self._memory = streaming.MemoryPlan.of(self.skeleton, self.batches, settings)
        self._streams = LayerInputs(
            streams, self._shapes(), self.skeleton.dtype, settings.budget() // 4, settings.spill
        )
        self._stop = stop
        self._calls: dict[tuple, tuple[Call, ...]] = {}

    def _check(self) -> None:
        if not self._samples:
            raise InputError("E385", "there is no calibration text", help="give at least one sample")
        limit = self.skeleton.most_tokens
        for number, sample in enumerate(self._samples):
            if not len(sample) or (limit is not None and len(sample) > limit):
                raise InputError("E385", f"sample {number} has {len(sample)} tokens"
                                 + ("" if limit is None else f", the model takes 1 to {limit}"),
                                 help="leave empty samples out, or lower the sequence length")  # fmt: skip

    def _shapes(self) -> list[tuple[int, ...]]:
        return [(len(b.samples), b.length, self.skeleton.hidden_size) for b in self.batches]

    def __enter__(self) -> LayerSweep:
        with ExitStack() as held:
            held.enter_context(self._streams)
            held.enter_context(torch.no_grad())
            held.enter_context(threads(self.settings.threads))
            self._held = held.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._calls.clear()
        self._held.close()

    # ---- streams -------------------------------------------------------------------------------

    def get(self, stream: int, batch: int) -> Tensor:
        """Return the states [samples, tokens, hidden] of one batch, padding included."""
        return self._streams.get(stream, batch)

    def put(self, stream: int, batch: int, states: Tensor) -> None:
        """Overwrite the states of one batch."""
        self._streams.put(stream, batch, states)

    def copy(self, source: int, target: int) -> None:
        """Make a stream equal to another."""
        for number in range(len(self.batches)):
            self._streams.put(target, number, self._streams.get(source, number))

    def real(self, batch: int, states: Tensor) -> Tensor:
        """Return the states of tokens that are not padding, [tokens, hidden]."""
        return states[self.batches[batch].mask().to(states.device)]

    # ---- computing -----------------------------------------------------------------------------

    def embed(self, stream: int) -> None:
        """Put the input of layer 0 into a stream."""
        with memory_faults("the embedding"):
            for number, batch in enumerate(self.batches):
                self.check_stop()
                recording = self.skeleton.record(batch.ids(self._samples), self._mask(batch))
                self._keep(batch, recording.calls)
                self.put(stream, number, recording.hidden)

    def over(self, layers: Iterable[int]) -> Iterator[int]:
        """Load one layer after the other, reading the next meanwhile, and yield its number while it is there."""
        wanted = list(layers)
        with closing(Loader(self.skeleton, self._memory)) as loader:
            for place, layer in enumerate(wanted):
                self.skeleton.fill(layer, loader.take(layer))
                try:
                    if place + 1 < len(wanted) and self._memory.prefetch:
                        loader.start(wanted[place + 1])
                    with memory_faults(f"layer {layer}"):
                        yield layer
                finally:
                    self.skeleton.empty(layer)
                    streaming.release_memory()

    def advance(self, layer: int, moves: Sequence[tuple[int, int]], without: Sequence[str] = ()) -> None:
        """Compute the loaded layer.

        Args:
            layer: its number.
            moves: (stream it reads, stream it writes); a stream may be both.
            without: names of output matrices (without ".weight") whose outputs, bias included, count
                as zero: the attention or the FFN that ends in them is skipped.
        """
        with self._silenced(layer, without):
            if self._memory.streams(layer):
                self._advance_experts(layer, moves)
                return
            for number, batch in enumerate(self.batches):
                call = self._call(layer, batch)
                for source, target in moves:
                    self.check_stop()
                    self.put(target, number, self.skeleton.call(layer, self.get(source, number), call))

    def _advance_experts(self, layer: int, moves: Sequence[tuple[int, int]]) -> None:
        """Compute a layer whose experts do not fit, one expert after the other."""
        job = streaming.ExpertStream(self.skeleton, layer, Watching(_Blind()))
        for source, target in moves:
            for group in self._memory.groups(self.batches):
                batches = {number: self.batches[number] for number in group}
                inputs = {number: self.get(source, number) for number in group}
                calls = {number: self._call(layer, batch) for number, batch in batches.items()}
                for number, out in job.run(inputs, calls, batches, self.check_stop):
                    self.put(target, number, out)

    @contextmanager
    def _silenced(self, layer: int, without: Sequence[str]) -> Iterator[None]:
        root = self.skeleton.model.get_submodule(self.skeleton.layer_path(layer))
        handles = []
        try:
            for name in without:
                path = next(
                    path.removesuffix(".weight")
                    for path, pieces in self.skeleton.pieces(layer).items()
                    if path.endswith(".weight") and len(pieces) == 1 and pieces[0].module == name
                )
                module = root.get_submodule(path)
                handles.append(module.register_forward_hook(lambda m, a, out: torch.zeros_like(out)))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def finish(self, stream: int, batch: int) -> Tensor:
        """Return the last hidden states of one batch of a stream that has passed all layers."""
        at = self.batches[batch]
        self.check_stop()
        return self.skeleton.finish(at.ids(self._samples), self.get(stream, batch), self._mask(at))

    # ---- calls ---------------------------------------------------------------------------------

    def _mask(self, batch: Batch) -> Tensor | None:
        return None if self.skeleton.causal or not batch.padded else batch.mask().to(torch.int64)

    def _key(self, batch: Batch) -> tuple:
        lengths = batch.lengths if self._mask(batch) is not None else ()
        return (len(batch.samples), batch.length, lengths)

    def _keep(self, batch: Batch, calls: tuple[Call, ...]) -> None:
        if len(self._calls) >= CALLS:
            self._calls.pop(next(iter(self._calls)))
        self._calls[self._key(batch)] = calls

    def _call(self, layer: int, batch: Batch) -> Call:
        key = self._key(batch)
        if key not in self._calls:
            self._keep(batch, self.skeleton.calls(batch.ids(self._samples), self._mask(batch)))
        return self._calls[key][layer]

    def check_stop(self) -> None:
        """Raise Interrupted (E130) when ``stop`` is set."""
        if self._stop is not None and self._stop.is_set():
            raise Interrupted("E130", "interrupted while layers were scored; nothing was kept")


class _Blind:
    """An observer that looks at nothing."""

    def wants(self, module: str) -> bool:
        return False

    def observe(self, module: str, inputs: Tensor, outputs: Tensor | None, sample: int | None) -> None:
        raise AssertionError("nothing was asked for")
