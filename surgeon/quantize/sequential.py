"""Quantizing a model layer by layer, each seeing what the quantized layers before it give.

    finished = quantize_layers(checkpoint, layers, schemes, form, samples, settings, Options("gptq"), folder)

A layer's inputs are summed in one pass over it, with the layers before it as their readers will compute them and its
own weights as they were (`Options.true_sequential` refines that inside the layer); its matrices are quantized and
packed; then it runs again with the new values for what the next layer sees. Without calibration, for rounding to
nearest and for kinds that are encoded directly, matrices are worked on one by one.

The result of a layer is a file with its tensors as they will be stored, made under a key of everything it depends on,
so that an interrupted run goes on with the next layer.
"""

from __future__ import annotations

import functools
import hashlib
import json
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from surgeon.calibrate.conditions import memory_faults, threads
from surgeon.calibrate.matrices import Matrix, read_matrix
from surgeon.calibrate.settings import Settings
from surgeon.calibrate.walk import Walk
from surgeon.checkpoint.checkpoint import Checkpoint
from surgeon.errors import Interrupted
from surgeon.formats.compressed_runtimes import fused
from surgeon.formats.float4 import shared_scale
from surgeon.formats.scheme import Scheme
from surgeon.quantize import rtn
from surgeon.quantize.forms import Form, Parts
from surgeon.quantize.grids import clips
from surgeon.quantize.layer_file import LayerFiles, Values, write_rows
from surgeon.quantize.observing import Inputs, kind_of
from surgeon.quantize.shrinkage import ENOUGH
from surgeon.quantize.solving import (
    Options,
    Read,
    Solved,
    by_rows,
    pieces,
    solve,
    together,
    weight_error,
)
from surgeon.quantize.workspace import Group, batches, reserved

__all__ = ["Finished", "Options", "quantize_layers"]

FEW_BITS = 3
"""Integers of so many bits make matrices inside a layer see each other's errors, unless it is said otherwise."""

Layers = Sequence[Sequence[Matrix]]
Progress = Callable[[str, int, int], None]
"""Called with (what is done, steps done, steps)."""


@dataclass(frozen=True)
class Finished:
    """What a quantization leaves.

    Attributes:
        files: with the stored tensors of the quantized matrices, by layer.
        records: one of each quantized matrix, in order: label, scheme, bits, elements, bytes, method, and what is
            known of its error: ``weight_error`` |Q - W|^2 / |W|^2; with calibration ``error`` and ``rounding_error``,
            relative errors of its outputs and of those of plain rounding, ``tokens``, and how GPTQ went.
    """

    files: tuple[Path, ...]
    records: tuple[dict[str, Any], ...]


def quantize_layers(
    checkpoint: Checkpoint,
    layers: Layers,
    schemes: Mapping[str, Scheme | None],
    form: Form,
    samples: Sequence[np.ndarray],
    settings: Settings,
    options: Options,
    folder: Path,
    *,
    progress: Progress | None = None,
    stop: threading.Event | None = None,
) -> Finished:
    """Quantize the matrices of a model and leave what is to be stored in files by layer.

    Args:
        checkpoint: plain numbers.
        layers: matrices by layer; one more entry may hold the output head, under the name a walk shows it.
        schemes: label of a matrix -> how it is stored; None, or not named, as it is.
        form: how matrices are stored; it has nothing against these schemes.
        samples: calibration tokens; () where nothing needs them.
        settings: where and how the model runs; with a spill folder an interrupted pass goes on where it stopped.
        options: see there.
        folder: of the results by layer; they stay.

    Raises:
        InputError: E450-E453 (`surgeon.quantize.gptq`), E452 a matrix that no token reached; what a form and a walk raise.
        Interrupted: E130.
    """
    run = _Run(checkpoint, layers, schemes, form, samples, settings, options, folder, progress or (lambda *_: None), stop)  # fmt: skip
    return run.finish()


class _Observed(Inputs):
    """Inputs of a layer that may be looked at several times."""

    repeat: Callable[[int], bool]

    def again(self, layer: int) -> bool:
        return self.repeat(layer)


class _Run:
    """One quantization."""

    def __init__(
        self, checkpoint: Checkpoint, layers: Layers, schemes: Mapping[str, Scheme | None], form: Form,
        samples: Sequence[np.ndarray], settings: Settings, options: Options, folder: Path, progress: Progress,
        stop: threading.Event | None,
    ) -> None:  # fmt: skip
        self.checkpoint, self.form, self.settings, self.options = checkpoint, form, settings, options
        self.samples, self.progress, self.stop = samples, progress, stop
        self.layers: list[list[tuple[Matrix, Scheme]]] = []
        for layer in layers:
            for matrix in layer:  # forms refuse others
                assert matrix.expert is None and not matrix.transposed, matrix.label
            named = [(matrix, schemes.get(matrix.label)) for matrix in layer]
            self.layers.append([(matrix, scheme) for matrix, scheme in named if scheme is not None])
        self.solved = [
            [(m, s) for m, s in layer if options.method == "gptq" and s.kind == "int"]
            for layer in self.layers
        ]
        self.calibrated = any(self.solved)
        # Readers hold plain numbers of the model's type, whatever the codes stand for.
        self.dtype = form.reader.dtype if form.reader.dtype in ("BF16", "F16", "F32") else "F32"
        self.files = LayerFiles(folder, self._keys())
        self._ready: set[int] = set()
        self._begin(-1)

    def _begin(self, layer: int) -> None:
        """Start with a layer, of which nothing is done."""
        self._layer, self._steps, self._more = layer, 0, False
        self._parts: Parts = {}
        self._records: dict[str, dict[str, Any]] = {}

    # ---- keys --------------------------------------------------------------------------------------------

    def _keys(self) -> list[str]:
        """Return of each layer what its result depends on: itself, and with calibration the layers before it."""
        about: dict[str, Any] = {
            "format": 1, "headers": [h.sha256 for h in self.checkpoint.headers],
            "stamps": [[h.stamp.size, h.stamp.mtime_ns] for h in self.checkpoint.headers],
            "view": getattr(self.checkpoint, "identity", ""), "config": self.checkpoint.config,
            "form": [self.form.name, self.form.model_type, self.form.scale_dtype, asdict(self.form.reader)],
            "clip": self.options.clip, "torch": torch.__version__,
        }  # fmt: skip
        if self.calibrated:
            digest = hashlib.sha256()
            for sample in self.samples:
                digest.update(
                    len(sample).to_bytes(8, "little") + np.ascontiguousarray(sample, np.int64).tobytes()
                )
            about |= {
                "options": asdict(self.options), "samples": digest.hexdigest(), "dtype": self.settings.dtype,
                "batch_tokens": self.settings.batch_tokens,
            }  # fmt: skip
        base = previous = _digest(about)
        keys = []
        for number, layer in enumerate(self.layers):
            stored = [self.form.layout(m.tensor, (m.rows, m.columns), s) for m, s in layer]
            found = _digest([previous, number, [(m.label, s.name) for m, s in layer], stored])
            keys.append(found)
            previous = found if self.calibrated else base
        return keys

    # ---- from beginning to end -----------------------------------------------------------------------------

    def finish(self) -> Finished:
        """Do what is left to do and return all of it."""
        if not all(map(self._stored, range(len(self.layers)))):
            if self.calibrated:
                self._walk()
            else:
                self._one_by_one()
        self.files.forget_values()
        files, records = [], []
        for number, layer in enumerate(self.layers):
            if layer:
                about = self.files.about(number)
                assert about is not None
                files.append(self.files.path(number))
                records.extend(about["records"])
        return Finished(tuple(files), tuple(records))

    def _stored(self, layer: int) -> bool:
        """Say whether a layer's result is in its file."""
        if layer not in self._ready and (not self.layers[layer] or self.files.about(layer) is not None):
            self._ready.add(layer)
        return layer in self._ready

    def _one_by_one(self) -> None:
        """Quantize every matrix by its weights alone."""
        for number in range(len(self.layers)):
            _check(self.stop)
            if not self._stored(number):
                self._begin(number)
                with threads(self.settings.threads), memory_faults(f"layer {number}"):
                    for _ in self._plain(self.layers[number]):
                        _check(self.stop)
                self._publish()
            self.progress("quantize", number + 1, len(self.layers))

    def _walk(self) -> None:
        """Run the calibration text through the model, quantizing every layer before the next one is seen."""
        tokens = sum(map(len, self.samples))
        few = any(tokens < ENOUGH * matrix.columns for layer in self.solved for matrix, _ in layer)
        cross = self.options.target_shift
        needs = reserved(self.solved, self.form, few=few, cross=cross)
        with Walk(self.checkpoint, self.samples, self.settings, original=cross, reserve=needs) as walk:
            self.placement, self.depth = walk.skeleton.placement, walk.layers
            observer = _Observed(
                [[matrix for matrix, _ in layer] for layer in self.solved],
                identity=_digest([self.files.path(number).name for number in range(len(self.layers))]),
                finished=self._stored,
                skip=functools.cache(lambda layer: self._values(layer) is not None),
                cross=cross,
                tokens=tokens,
                limit=_limit(walk),
                in_order=self._in_order,
            )  # fmt: skip
            observer.repeat = lambda layer: self._more
            walk.run(
                observer, stop=self.stop, resume=True, piecewise=True,
                replace=lambda layer: self._replace(layer, observer),
                progress=lambda done, total: self.progress("quantize", done, total),
            )  # fmt: skip
            for number in range(walk.layers, len(self.layers)):  # the head
                if not self._stored(number):
                    with threads(self.settings.threads), memory_faults("the head"), torch.no_grad():
                        self._replace(number, observer)

    def _in_order(self, layer: int) -> bool:
        """Say whether matrices of a layer see what the quantized ones before them give."""
        wanted = self.options.true_sequential
        if wanted is None:
            few = any(scheme.bits <= FEW_BITS for _, scheme in self.solved[layer])
            return few and not self.options.target_shift
        return wanted

    # ---- one layer -----------------------------------------------------------------------------------------

    def _values(self, layer: int) -> Values | None:
        """Return what readers make of a finished layer, where that is there."""
        if not self._stored(layer):
            return None
        about = self.files.about(layer) if self.layers[layer] else {"steps": 0}
        return None if about is None else self.files.values(layer, about["steps"])

    def _replace(self, layer: int, observer: _Observed) -> Mapping[str, Tensor]:
        """Quantize what has been looked at; return the new values that the next look is to see."""
        if self._layer != layer:
            self.files.forget_values(but=layer)
            known = self._values(layer)
            self._begin(layer)
            if known is not None:
                observer.forget()
                return known
        in_order, waiting = self._in_order(layer), observer.waiting()
        ready = set(observer.admitted)
        if in_order and observer.kind() is not None:  # those of the same kind that no token reached
            ready |= {
                m.module for m, _ in self.solved[layer] if kind_of(m.module) == observer.kind()
            } - waiting
        if not ready or not waiting:
            ready = {matrix.module for matrix, _ in self.solved[layer]}
        self._solve(layer, ready, observer)
        observer.done(ready)
        self._more = bool(waiting - ready)
        if self._more:
            observer.new_pass()
        else:
            observer.forget()
            self._publish()
        # Other passes over the layer are about memory only, unless matrices are to see each other's errors.
        values = self.files.values(layer, self._steps) if in_order or not self._more else None
        return {} if values is None else values

    def _solve(self, layer: int, modules: set[str], observer: _Observed) -> None:
        """Quantize the matrices with these inputs, and in the first step those that need no inputs."""
        direct = (
            [(m, s) for m, s in self.layers[layer] if (m, s) not in self.solved[layer]]
            if not self._steps
            else []
        )
        groups: dict[str, list[tuple[Matrix, Scheme]]] = {}
        for matrix, scheme in self.solved[layer]:
            if matrix.module in modules and matrix.label not in self._records:
                groups.setdefault(matrix.module, []).append((matrix, scheme))
        for group in groups.values():  # as solving takes and gives them
            group.sort(key=lambda entry: (entry[1].group, entry[1]))
        ordered = [
            matrix for matrix, _ in (*direct, *(entry for group in groups.values() for entry in group))
        ]
        device = self.placement.outer if layer >= self.depth else self.placement.of_layer(layer)

        def read(matrix: Matrix) -> Tensor:
            return read_matrix(self.checkpoint, matrix).to(device)

        shapes = {m.tensor: (self.dtype, (m.rows, m.columns)) for m in ordered}
        with self.files.writing(layer, self._steps, shapes) as out:
            for matrix, rows in self._plain(direct):
                write_rows(out, matrix.tensor, rows, self.dtype)
            for batch in batches(groups.values(), observer, self.options, device):
                _check(self.stop)
                for found in self._solved(batch, observer, read):
                    scheme = found.codes.scheme
                    self._keep(
                        found.matrix, scheme, self.form.pack(found.matrix.tensor, found.codes), found.record
                    )
                    write_rows(out, found.matrix.tensor, by_rows(found.codes), self.dtype)
                observer.done([group[0][0].module for group in batch])
        self._steps += 1

    def _solved(self, batch: Sequence[Group], observer: _Observed, read: Read) -> Iterator[Solved]:
        """Yield the matrices of one group, or of several that are solved together."""
        about = observer, read, self.options, self.form.scale_dtype
        if len(batch) == 1:
            yield from solve(batch[0], *about)
        else:
            for group in together(batch, *about):
                yield from group

    def _plain(
        self, matrices: Iterable[tuple[Matrix, Scheme]]
    ) -> Iterator[tuple[Matrix, Iterable[np.ndarray]]]:
        """Quantize matrices by their weights alone; yield each with the values readers will compute, by rows."""
        shared = self._shared(matrices := list(matrices))
        for matrix, scheme in matrices:
            weight = read_matrix(self.checkpoint, matrix)
            if scheme.kind == "int":
                codes = rtn.quantize(
                    weight, scheme, scale_dtype=self.form.scale_dtype, clip=self.options.clip, module=matrix.label
                )  # fmt: skip
                parts, rows = self.form.pack(matrix.tensor, codes), lambda codes=codes: by_rows(codes)
                record: dict[str, Any] = {"method": "rtn", "clipped": clips(scheme, self.options.clip)}
            else:
                parts, values = self.form.encode(
                    matrix.tensor, weight.numpy(), scheme, shared.get(matrix.tensor)
                )
                record, rows = {"method": "encoded"}, lambda values=values: pieces(values)
            record["weight_error"] = weight_error(rows(), weight)
            del weight
            self._keep(matrix, scheme, parts, record)
            yield matrix, rows()

    def _shared(self, matrices: Iterable[tuple[Matrix, Scheme]]) -> dict[str, np.float32]:
        """Return the shared scales of NVFP4 matrices that a runtime loads as one."""
        four = {matrix.tensor: matrix for matrix, scheme in matrices if scheme.kind == "nvfp4"}
        found = {}
        for group in fused(four):
            scale = shared_scale(read_matrix(self.checkpoint, four[name]).numpy() for name in group)
            found |= dict.fromkeys(group, scale)
        return found

    def _keep(self, matrix: Matrix, scheme: Scheme, parts: Parts, record: dict[str, Any]) -> None:
        self._parts |= parts
        self._records[matrix.label] = {
            "label": matrix.label, "scheme": scheme.name, "bits": scheme.bits, "elements": matrix.elements,
            "bytes": sum(array.nbytes for _, array in parts.values()), **record,
        }  # fmt: skip

    def _publish(self) -> None:
        """Write the file of the layer at hand."""
        layer = self._layer
        records = [self._records[matrix.label] for matrix, _ in self.layers[layer]]
        self.files.write(layer, self._parts, records, self._steps)
        self._ready.add(layer)
        self._parts, self._records = {}, {}


def _limit(walk: Walk) -> int:
    """Return how many bytes sums may take at a time."""
    free = [walk.unused_bytes]
    for device in walk.skeleton.placement.devices:
        if device.type == "cuda":
            free.append(torch.cuda.mem_get_info(device)[0] // 2)
    return min(free)


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def _check(stop: threading.Event | None) -> None:
    if stop is not None and stop.is_set():
        raise Interrupted("E130", "interrupted while the model is quantized; finished layers are kept")
