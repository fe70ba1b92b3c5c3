"""One pass over calibration text, layer by layer: a layer's weights in memory, everybody's activations beside it.

    walk = Walk(checkpoint, samples, Settings(dtype="bfloat16"))
    walk.run(observer)                       # every stage
    for sample, states in walk.hidden():     # last hidden states
        ...

Stages are "embedding", "layer 0" ... and "final". The weights of the next layer are read in a
thread while one computes. Activations go to a file when they would not fit the memory limit. A
layer of experts that does not fit is computed one expert at a time (see `streaming`).

Sequential methods change a layer before the next one is looked at. With ``replace`` a layer runs twice: once
with the weights as they are, for the observer; then ``replace(layer)`` returns the tensors that are new, and
the layer runs again, unobserved, for the outputs that the next layer gets. An observer with ``again`` may have
the layer observed several times, each time with what ``replace`` has returned so far.

With ``original`` a second stream of hidden states goes through the model without replacements, beside the first.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from surgeon.calibrate import streaming
from surgeon.calibrate.activations import Activations, InFile, InMemory
from surgeon.calibrate.batches import Batch, plan_batches
from surgeon.calibrate.conditions import memory_faults, threads
from surgeon.calibrate.loader import Loader
from surgeon.calibrate.resume import PassFolder
from surgeon.calibrate.settings import Observer, Settings
from surgeon.calibrate.skeleton import Call, Skeleton
from surgeon.calibrate.watching import Watching, finite
from surgeon.checkpoint.checkpoint import Checkpoint
from surgeon.errors import EnvironmentFault, InputError, Interrupted, Where

__all__ = ["Observer", "Settings", "Walk"]

Progress = Callable[[int, int], None]
"""Called with (stages done, stages)."""

Replace = Callable[[int], Mapping[str, Tensor]]
"""Called with a layer's number after each observation; returns checkpoint names -> new tensors of the stored shape."""

CALLS_BYTES = 256 << 20
"""Masks and rotary tables of recorded calls kept for further batches of the same shape."""


class Walk:
    """A streamed pass of samples through a model.

    Args:
        checkpoint: any view of a model: a folder, an adapter on a base, a merge not yet written.
        samples: token ids, one array per sample.
        settings: device, precision, memory, spill folder.
        per_sample: one sample a batch, so that observers learn which sample they see.
        original: carry along what the model without replacements gives, for ``observe_original``.
        reserve: bytes of the memory limit that are not the pass's: what is done with a layer between its runs takes them.

    Attributes:
        layers: number of layers.
        skeleton: the model without data.
        batches: how samples are grouped.

    Raises (constructor):
        InputError: E380-E383 the model cannot be run, E385 no samples, or one that is empty or too long.
        EnvironmentFault: E504 a layer does not fit the memory limit.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        samples: Sequence[np.ndarray],
        settings: Settings,
        *,
        per_sample: bool = False,
        original: bool = False,
        reserve: int = 0,
    ) -> None:
        self.settings = settings
        self._original = original
        self.skeleton = Skeleton(checkpoint, settings)
        self.layers = self.skeleton.layers
        self._checkpoint = checkpoint
        self._samples = [np.asarray(sample, dtype=np.int64).reshape(-1) for sample in samples]
        self._per_sample = per_sample
        _check_samples(self._samples, self.skeleton)
        config: Any = self.skeleton.model.config
        heads = {getattr(config, key, None) for key in ("num_attention_heads", "num_key_value_heads")}
        self.batches = plan_batches(
            [len(sample) for sample in self._samples],
            settings.batch_tokens,
            alone=per_sample,
            equal=self.skeleton.length_dependent,
            unpadded={count for count in heads if count},
        )
        stores = 3 if original else 1
        self._memory = streaming.MemoryPlan.of(self.skeleton, self.batches, settings, stores, reserve)
        if original and self._memory.streamed:
            raise EnvironmentFault("E504", f"the experts of layer {min(self._memory.streamed)} do not fit the memory limit together, which "
                                   "a pass beside the original model needs", help="raise --memory-limit, or leave the target shift out")  # fmt: skip
        self._calls: OrderedDict[tuple, tuple[Call, ...]] = OrderedDict()
        self._states: Activations | None = None
        self._beside: Activations | None = None  # of the model without replacements
        self._stage = -1
        self._temporary: tempfile.TemporaryDirectory | None = None
        self._folder: PassFolder | None = None

    @property
    def stages(self) -> list[str]:
        """Names of the stages in order."""
        return ["embedding", *(f"layer {number}" for number in range(self.layers)), "final"]

    @property
    def unused_bytes(self) -> int:
        """Memory the pass leaves to its observer."""
        return self._memory.unused

    # ---- driving -------------------------------------------------------------------------------

    def run(
        self,
        observer: Observer,
        *,
        progress: Progress | None = None,
        stop: threading.Event | None = None,
        resume: bool = False,
        replace: Replace | None = None,
        piecewise: bool = False,
    ) -> None:
        """Run all stages.

        Args:
            observer: sees every module it wants.
            progress: called with (stages done, stages) after each stage.
            stop: set it to stop after the batch in progress.
            resume: continue where an interrupted pass with the same model, samples, settings and kind
                of observer stopped. Needs ``settings.spill`` and an observer with state and restore; what
                ``replace`` does must follow from the observer's ``identity`` then.
            replace: gives the weights with which a layer's outputs are computed.
            piecewise: what ``replace`` returns reads a tensor when it is asked for it, so that a layer of experts
                that does not fit in memory can be replaced.

        Raises:
            Interrupted: E130 ``stop`` was set.
            InputError: E384 activations are not finite; the layer is named.
            EnvironmentFault: E504 ``replace`` that is not piecewise and a layer of experts that does not fit the
                memory limit.
        """
        total = len(self.stages)
        for _ in self._advance(observer, stop, resume, replace, piecewise):
            if progress is not None:
                progress(self._stage + 1, total)

    def steps(self, observer: Observer, replace: Replace | None = None) -> Iterator[str]:
        """Run one stage for each item taken, and yield its name; ``replace`` as in `run`.

        A caller may stop in between; close the generator (or drop it) to release what it holds.
        """
        yield from self._advance(observer, None, False, replace, False)

    def hidden(self) -> Iterator[tuple[int, Tensor]]:
        """Yield (sample, last hidden states [tokens, hidden]) for all samples in order, on the CPU.

        Only after the last stage; the states are those behind the final norm.
        """
        if self._stage != len(self.stages) - 1 or self._states is None:
            raise RuntimeError("the pass has not reached its end")
        place = {
            sample: (number, row) for number, batch in enumerate(self.batches) for row, sample in enumerate(batch.samples)
        }  # fmt: skip
        held: tuple[int, Tensor] | None = None
        for sample in range(len(self._samples)):
            number, row = place[sample]
            if held is None or held[0] != number:
                held = (number, self._states.get(number))
            yield sample, held[1][row, : len(self._samples[sample])]

    def close(self) -> None:
        """Release activations; what lies in a spill folder stays."""
        for states in (self._states, self._beside):
            if states is not None:
                states.close()
        self._states = self._beside = None
        if self._temporary is not None:
            self._temporary.cleanup()
            self._temporary = None
        if self._folder is not None:
            self._folder.close()
            self._folder = None
        self._calls.clear()

    def __enter__(self) -> Walk:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    # ---- stages --------------------------------------------------------------------------------

    def _advance(
        self, observer: Observer, stop: threading.Event | None, resume: bool, replace: Replace | None, piecewise: bool
    ) -> Iterator[str]:  # fmt: skip
        self.close()
        folder = self._folder = self._pass_folder(observer)
        self._stage = -1
        if resume and folder is not None:
            self._restore(folder, observer)
        if folder is not None and self._stage < 0:
            folder.forget()
        watching = Watching(observer)
        loader = Loader(self.skeleton, self._memory)
        names = self.stages
        try:
            loader.start(max(0, self._stage))
            while self._stage < len(names) - 1:
                stage = self._stage + 1
                with threads(self.settings.threads), torch.no_grad(), memory_faults(names[stage]):
                    fresh, beside = self._store(stage, folder), self._store_beside(stage, folder)
                    try:
                        if stage == 0:
                            self._embed(watching, fresh, beside, stop)
                        elif stage <= self.layers:
                            self._layer(stage - 1, loader, watching, fresh, beside, stop, replace, piecewise)
                        else:
                            self._final(watching, fresh, beside, stop)
                    except BaseException:
                        fresh.close()
                        if beside is not None:
                            beside.close()
                        if fresh is self._states:  # half of it is the next boundary already
                            self._states, self._stage = None, -1
                        raise
                    if self._states is not None and self._states is not fresh:
                        self._states.close()
                    if self._beside is not None:
                        self._beside.close()
                    self._states, self._beside, self._stage = fresh, beside, stage
                    if folder is not None:
                        self._save(folder, observer)
                yield names[stage]
        finally:
            loader.close()

    def _embed(
        self, watching: Watching, fresh: Activations, beside: Activations | None, stop: threading.Event | None
    ) -> None:
        skeleton = self.skeleton
        with watching.attached(skeleton.model, skeleton.outer_pieces(), lambda: skeleton.phase == "before"):
            for number, batch in enumerate(self.batches):
                _check(stop)
                watching.begin(batch)
                recording = skeleton.record(batch.ids(self._samples), self._mask(batch))
                watching.end()
                self._keep(batch, recording.calls)
                self._put(fresh, number, recording.hidden, "the embedding")
                if beside is not None:
                    self._put(beside, number, recording.hidden, "the embedding")

    def _layer(
        self, layer: int, loader: Loader, watching: Watching, fresh: Activations, beside: Activations | None,
        stop: threading.Event | None, replace: Replace | None, piecewise: bool,
    ) -> None:  # fmt: skip
        skeleton = self.skeleton
        if self._memory.streams(layer) and replace is not None and not piecewise:
            raise EnvironmentFault("E504", f"the experts of layer {layer} do not fit the memory limit together, which changing "
                                   "them layer by layer needs", help="raise --memory-limit")  # fmt: skip
        module = skeleton.fill(layer, loader.take(layer))
        try:
            if layer + 1 < self.layers and self._memory.prefetch:
                loader.start(layer + 1)
            # Outputs may take the place of inputs, so they are kept only when the layer is not run again.
            last = replace is None and not watching.repeats
            replaced: Mapping[str, Tensor] = {}
            while True:
                with watching.attached(module, skeleton.pieces(layer)), watching.layer(layer, module):
                    self._run(layer, watching, fresh if last else None, beside, stop, replaced)
                if last:
                    return
                replaced = {} if replace is None else replace(layer)
                skeleton.replace(layer, replaced)
                if not watching.again(layer):
                    break
            self._run(layer, watching, fresh, None, stop, replaced)
        finally:
            watching.end()
            skeleton.empty(layer)
            streaming.release_memory()

    def _run(
        self, layer: int, watching: Watching, fresh: Activations | None, beside: Activations | None,
        stop: threading.Event | None, replaced: Mapping[str, Tensor],
    ) -> None:  # fmt: skip
        """Run all batches through a loaded layer, and keep the outputs where there is a place for them."""
        skeleton, states = self.skeleton, self._states
        assert states is not None
        if self._memory.streams(layer):
            job = streaming.ExpertStream(skeleton, layer, watching, replaced)
            for group in self._memory.groups(self.batches):
                _check(stop)
                inputs = {number: states.get(number) for number in group}
                calls = {number: self._call(layer, self.batches[number]) for number in group}
                outputs = job.run(inputs, calls, {n: self.batches[n] for n in group}, lambda: _check(stop))
                for number, out in outputs:
                    if fresh is not None:
                        self._put(fresh, number, out, f"layer {layer}")
            return
        for number, batch in enumerate(self.batches):
            _check(stop)
            call = self._call(layer, batch)
            if beside is not None:
                assert self._beside is not None
                watching.begin(batch, original=True)
                self._put(
                    beside, number, skeleton.call(layer, self._beside.get(number), call), f"layer {layer}"
                )
            watching.begin(batch)
            out = skeleton.call(layer, states.get(number), call)
            watching.end()
            if fresh is not None:
                self._put(fresh, number, out, f"layer {layer}")

    def _final(
        self, watching: Watching, fresh: Activations, beside: Activations | None, stop: threading.Event | None
    ) -> None:
        states = self._states
        assert states is not None
        skeleton = self.skeleton
        with watching.attached(skeleton.model, skeleton.outer_pieces(), lambda: skeleton.phase != "before"):
            for number, batch in enumerate(self.batches):
                _check(stop)
                if beside is not None:
                    assert self._beside is not None
                    watching.begin(batch, original=True)
                    self._put(
                        beside,
                        number,
                        self._finish(batch, self._beside.get(number), watching),
                        "the final norm",
                    )
                watching.begin(batch)
                final = self._finish(batch, states.get(number), watching)
                watching.end()
                self._put(fresh, number, final, "the final norm")

    def _finish(self, batch: Batch, states: Tensor, watching: Watching) -> Tensor:
        """Return the last hidden states, and show what enters the head to who wants it."""
        head = self._head_name()
        final = self.skeleton.finish(batch.ids(self._samples), states, self._mask(batch))
        if head is not None:
            entering = self.skeleton.head_input(final)
            if watching.wants(head):
                watching.show(head, entering, None)
        return final

    def _head_name(self) -> str | None:
        """Return the name the output embedding is observed under: the checkpoint's, or the model's when tied."""
        if self.skeleton.head_module is None:
            return None
        pieces = self.skeleton.head_pieces().get("weight")
        embedding = self.skeleton.outer_pieces()[f"{self.skeleton.embedding_module}.weight"]
        if pieces is None or pieces == embedding:
            return self.skeleton.head_module
        return pieces[0].module

    def _put(self, fresh: Activations, number: int, value: Tensor, where: str) -> None:
        if not finite(value):
            raise InputError(
                "E384", f"{where} of {self._checkpoint.label} gives values that are not finite",
                where=Where(self._checkpoint.label),
                help="its weights are damaged, or the precision is too narrow: try bfloat16 or float32",
            )  # fmt: skip
        fresh.put(number, value)

    # ---- calls ---------------------------------------------------------------------------------

    def _mask(self, batch: Batch) -> Tensor | None:
        return None if self.skeleton.causal or not batch.padded else batch.mask().to(torch.int64)

    def _key(self, batch: Batch) -> tuple:
        lengths = batch.lengths if self._mask(batch) is not None else ()
        return (len(batch.samples), batch.length, lengths)

    def _keep(self, batch: Batch, calls: tuple[Call, ...]) -> None:
        self._calls[self._key(batch)] = calls
        self._calls.move_to_end(self._key(batch))
        while (
            len(self._calls) > 1 and sum(_bytes(entry) for entry in self._calls.values()) > self._memory.calls
        ):
            self._calls.popitem(last=False)

    def _call(self, layer: int, batch: Batch) -> Call:
        """Return what a layer is called with for a batch, recorded again when it was dropped."""
        key = self._key(batch)
        if key not in self._calls:
            self._keep(batch, self.skeleton.calls(batch.ids(self._samples), self._mask(batch)))
        self._calls.move_to_end(key)
        return self._calls[key][layer]

    # ---- activations on disk ---------------------------------------------------------------------

    def _shapes(self) -> list[tuple[int, ...]]:
        width = self.skeleton.hidden_size
        return [(len(batch.samples), batch.length, width) for batch in self.batches]

    def _store(self, stage: int, folder: PassFolder | None) -> Activations:
        if folder is not None:
            return InFile(folder.activations(stage), self._shapes(), self.skeleton.dtype, kept=True)
        if not self._memory.spill:  # a batch's input is not needed once its output is there
            return self._states or InMemory(len(self.batches))
        if self._temporary is None:
            self._temporary = tempfile.TemporaryDirectory(
                prefix="surgeon-activations-", ignore_cleanup_errors=True
            )
        path = Path(self._temporary.name) / f"activations-{stage % 2}.bin"
        return InFile(path, self._shapes(), self.skeleton.dtype)

    def _store_beside(self, stage: int, folder: PassFolder | None) -> Activations | None:
        """Return a store for the states without replacements; the ones before stay, as layers may run repeatedly."""
        if not self._original:
            return None
        if folder is not None:
            return InFile(self._beside_file(stage, folder), self._shapes(), self.skeleton.dtype, kept=True)
        if not self._memory.spill:
            return InMemory(len(self.batches))
        assert self._temporary is not None  # made for the other stream
        path = Path(self._temporary.name) / f"original-{stage % 2}.bin"
        return InFile(path, self._shapes(), self.skeleton.dtype)

    @staticmethod
    def _beside_file(stage: int, folder: PassFolder) -> Path:
        return folder.path / f"original-{stage % 2}.bin"

    def _pass_folder(self, observer: Observer) -> PassFolder | None:
        if self.settings.spill is None:
            return None
        samples = hashlib.sha256()
        for sample in self._samples:
            samples.update(len(sample).to_bytes(8, "little") + sample.tobytes())
        kind = type(observer)
        skeleton = self.skeleton
        tables = [*map(skeleton.pieces, range(self.layers)), skeleton.outer_pieces(), skeleton.head_pieces()]
        modules = {piece.module for table in tables for pieces in table.values() for piece in pieces}
        # One kind of observer may look at different modules: what it has not seen cannot be made up for.
        wanted = "\n".join(sorted(filter(observer.wants, modules)))
        return PassFolder(
            self.settings.spill,
            {
                "headers": [header.sha256 for header in self._checkpoint.headers],
                "stamps": [[h.stamp.size, h.stamp.mtime_ns] for h in self._checkpoint.headers],
                "view": getattr(self._checkpoint, "identity", ""),
                "config": self._checkpoint.config,
                "samples": samples.hexdigest(),
                "dtype": self.settings.dtype,
                "devices": [device.type for device in self.skeleton.placement.devices],
                "batch_tokens": self.settings.batch_tokens,
                "per_sample": self._per_sample,
                **({"original": True} if self._original else {}),
                "observer": [kind.__module__, kind.__qualname__, str(getattr(observer, "identity", ""))],
                "wanted": hashlib.sha256(wanted.encode()).hexdigest(),
                "versions": [importlib.metadata.version(name) for name in ("torch", "transformers")],
            },
        )

    def _save(self, folder: PassFolder, observer: Observer) -> None:
        states = self._states
        assert isinstance(states, InFile)
        states.sync()
        digests = list(states.digests)
        if self._beside is not None:
            assert isinstance(self._beside, InFile)
            self._beside.sync()
            digests += self._beside.digests
        state = getattr(observer, "state", None)
        folder.save(self._stage, digests, None if state is None else state())

    def _restore(self, folder: PassFolder, observer: Observer) -> None:
        """Take up a pass where it was left, when what is on disk can be believed."""
        found = folder.load()
        restore = getattr(observer, "restore", None)
        if found is None or found[2] is None or restore is None:
            return
        stage, digests, state = found
        count = len(self.batches)
        if stage >= len(self.stages) or len(digests) != count * (2 if self._original else 1):
            return
        stores = [self._found(folder.activations(stage), digests[:count])]
        if self._original:
            stores.append(self._found(self._beside_file(stage, folder), digests[count:]))
        # What the observer keeps elsewhere may not be there any more.
        if any(store is None for store in stores) or restore(state) is False:
            for store in stores:
                if store is not None:
                    store.close()
            return
        self._states, self._stage = stores[0], stage
        self._beside = stores[1] if self._original else None

    def _found(self, path: Path, digests: list[str]) -> InFile | None:
        """Return activations of an earlier pass, None when they are not what they were."""
        if not path.is_file():
            return None
        states = InFile(path, self._shapes(), self.skeleton.dtype, existing=True, kept=True)
        if path.stat().st_size != states.bytes or any(states.digest(n) != d for n, d in enumerate(digests)):
            states.close()
            return None
        states.digests = digests
        return states


def _check_samples(samples: list[np.ndarray], skeleton: Skeleton) -> None:
    if not samples:
        raise InputError("E385", "there is no calibration text", help="give at least one sample")
    limit = skeleton.most_tokens
    for number, sample in enumerate(samples):
        if not len(sample):
            raise InputError("E385", f"sample {number} has no tokens", help="leave empty samples out")
        if limit is not None and len(sample) > limit:
            raise InputError("E385", f"sample {number} has {len(sample)} tokens, the model takes {limit}",
                             help="lower the sequence length")  # fmt: skip


def _check(stop: threading.Event | None) -> None:
    if stop is not None and stop.is_set():
        raise Interrupted(
            "E130", "interrupted during calibration; finished layers are kept where a folder was given"
        )


def _bytes(calls: tuple[Call, ...]) -> int:
    """Return the bytes of the tensors in recorded calls, each counted once."""
    seen: dict[int, int] = {}

    def add(value: Any) -> None:
        if isinstance(value, Tensor):
            seen[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        elif isinstance(value, (tuple, list)):
            for entry in value:
                add(entry)
        elif isinstance(value, dict):
            for entry in value.values():
                add(entry)

    for call in calls:
        add(call.args)
        add(call.kwargs)
    return sum(seen.values())
