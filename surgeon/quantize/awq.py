"""Activation-aware scaling: a model that computes the same and loses less when it is quantized (AWQ).

    view, record = scaled(checkpoint, layers, schemes, samples, settings, folder, scale_dtype="BF16")

Some inputs of a matrix are many times larger than the rest, and errors in their weights cost accordingly. Multiplying
these weights, and dividing what produces the inputs, gives them more of the grid's steps; nothing else changes. Where
that can be done `awq_sites` says, by how much `awq_scales`, how the result is stored `awq_fold`. One pass of calibration
text through the unquantized model gives mean |x| and second moments, layer by layer; every layer's scales are in a
file as soon as they are found. Source: Lin et al. 2023, AWQ (arXiv 2306.00978).

The result is a `ScaledView`, from which any method of quantization can start (round to nearest, GPTQ).
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from surgeon import architectures
from surgeon.calibrate.matrices import Matrix, read_matrix
from surgeon.calibrate.settings import Settings
from surgeon.calibrate.statistics import finite
from surgeon.calibrate.walk import Walk
from surgeon.calibrate.watching import Watching
from surgeon.checkpoint import tensor_file
from surgeon.checkpoint.checkpoint import Checkpoint
from surgeon.checkpoint.header import printable
from surgeon.errors import InputError, Where
from surgeon.formats.scheme import Scheme
from surgeon.quantize.awq_fold import fold, scalable
from surgeon.quantize.awq_scales import Found, Reader, error, sampled, search
from surgeon.quantize.awq_sites import Site, Skipped, sites_of
from surgeon.quantize.grids import clips
from surgeon.quantize.moments import Moments
from surgeon.quantize.scaled_view import Factor, ScaledView

VERSION = 1
FEWEST_TOKENS = 32
"""What an expert saw fewer tokens of is not scaled: their means say too little."""

Progress = Callable[[int, int], None]
"""Called with (stages done, stages)."""


def scaled(
    checkpoint: Checkpoint,
    layers: tuple[tuple[Matrix, ...], ...],
    schemes: Mapping[str, Scheme | None],
    samples: Sequence[np.ndarray],
    settings: Settings,
    folder: Path,
    *,
    scale_dtype: str,
    clip: bool | None = None,
    progress: Progress | None = None,
    stop: threading.Event | None = None,
) -> tuple[ScaledView, dict[str, Any]]:
    """Return a model that computes what ``checkpoint`` does, scaled for its quantization, and what was found.

    Args:
        checkpoint: a model of plain numbers.
        layers: its matrices by layer, see `surgeon.calibrate.matrices.matrices_of`.
        schemes: label of a matrix -> how it will be stored; None or missing: as it is.
        samples: token ids, one array a sample.
        settings: where and how the model runs; with a spill folder an interrupted pass goes on where it stopped.
        folder: scales by layer; a run with the same key takes them up.
        scale_dtype: storage code of the grids' scales, "F16", "BF16" or "F32".
        clip: whether matrices are rounded with clipped ranges; None: up to 3 bits.
        progress, stop: as `surgeon.calibrate.walk.Walk.run`.

    Returns:
        The view, and a record: "sites", a list of {site, kind, layer, exponent, error, scaled_error, matrices};
        "kept", those of experts with too few tokens; "skipped", {site, reason}. Errors are relative to the outputs
        of the site's matrices rounded to nearest, before and after; an exponent of 0 means that nothing is scaled.

    Raises:
        InputError: E485 no place can be scaled; E486 no token reached a matrix; E450, E451, E453 (grids); what a
            walk raises.
        Interrupted: E130.
    """
    plan, skipped = _planned(checkpoint, layers, schemes)
    grids = _Grids(schemes, scale_dtype, clip)
    run = _Run(checkpoint, plan, grids, folder, _key(checkpoint, plan, grids, samples, settings))
    if not all(map(run.finished, range(len(plan)))):
        with Walk(checkpoint, samples, settings) as walk:
            walk.run(run, progress=progress, stop=stop, resume=True)
    return run.view(), run.record(skipped)


def _planned(
    checkpoint: Checkpoint, layers: tuple[tuple[Matrix, ...], ...], schemes: Mapping[str, Scheme | None]
) -> tuple[tuple[tuple[Site, ...], ...], list[Skipped]]:
    """Return the sites whose matrices all become codes, and the places that are left alone."""
    chosen = tuple(tuple(m for m in layer if schemes.get(m.label) is not None) for layer in layers)
    found, skipped = sites_of(checkpoint, chosen)
    left = list(skipped)
    plan = []
    for layer in found:
        kept = []
        for site in layer:
            other = next(
                (s for m in site.matrices if (s := schemes[m.label]) is not None and s.kind != "int"), None
            )
            if other is None:
                kept.append(site)
            else:
                left.append(
                    Skipped(
                        site.name, f"scales are searched for grids of whole numbers, not for {other.name}"
                    )
                )
        plan.append(tuple(kept))
    if not any(plan):
        reasons = "; ".join(dict.fromkeys(entry.reason for entry in left[::-1]))
        raise InputError(
            "E485", f"no input of {checkpoint.label} can be scaled without changing the model: "
            + (reasons or "nothing that reads such an input is quantized"),
            where=Where(checkpoint.label), help="--method gptq needs no scaling",
        )  # fmt: skip
    return tuple(plan), left


@dataclass(frozen=True)
class _Grids:
    """How matrices will be rounded."""

    schemes: Mapping[str, Scheme | None]
    scale_dtype: str
    clip: bool | None


def _key(
    checkpoint: Checkpoint, plan: tuple[tuple[Site, ...], ...], grids: _Grids, samples: Sequence[np.ndarray],
    settings: Settings,
) -> str:  # fmt: skip
    """Return a digest of everything the scales depend on."""
    text = hashlib.sha256()
    for sample in samples:
        text.update(len(sample).to_bytes(8, "little") + np.ascontiguousarray(sample, np.int64).tobytes())
    about = {
        "version": VERSION, "headers": [header.sha256 for header in checkpoint.headers],
        "stamps": [[h.stamp.size, h.stamp.mtime_ns] for h in checkpoint.headers],
        "view": getattr(checkpoint, "identity", ""), "config": checkpoint.config, "samples": text.hexdigest(),
        "sites": [[site.name, [[m.label, repr(grids.schemes[m.label])] for m in site.matrices]] for layer in plan for site in layer],
        "scale_dtype": grids.scale_dtype, "clip": grids.clip, "dtype": settings.dtype, "torch": torch.__version__,
    }  # fmt: skip
    return hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode()).hexdigest()


@dataclass
class _Seen:
    """What a module's inputs were: second moments, and sums of |x|."""

    moments: Moments
    absolute: Tensor
    tokens: int = 0


class _Run:
    """The observer of the pass: sums of the layer at hand, its scales when the layer is done."""

    def __init__(
        self, checkpoint: Checkpoint, plan: tuple[tuple[Site, ...], ...], grids: _Grids, folder: Path, key: str
    ) -> None:  # fmt: skip
        self._checkpoint, self._plan, self._grids, self._key = checkpoint, plan, grids, key
        self._folder = folder / f"awq-{key[:16]}"
        self._layers = {
            m.module: number for number, layer in enumerate(plan) for site in layer for m in site.matrices
        }
        config = checkpoint.config or {}
        record = architectures.get(config.get("model_type"))
        assert record is not None
        self._kinds = {
            name: spec.kind for name, spec in record.layout(config, checkpoint.tensors).tensors.items()
        }
        self._seen: dict[str, _Seen] = {}
        self._done: set[int] = set()
        self.identity = f"awq {key}"

    # ---- the pass ------------------------------------------------------------------------------------

    def wants(self, module: str) -> bool:
        return module in self._layers

    def observe(self, module: str, inputs: Tensor, outputs: Tensor | None, sample: int | None) -> None:
        if self.finished(self._layers[module]) or not len(inputs):
            return
        seen = self._seen.get(module)
        if seen is None:
            moments = Moments.empty(inputs.shape[1], device=inputs.device)
            seen = self._seen[module] = _Seen(moments, torch.zeros(inputs.shape[1], dtype=torch.float64))
        seen.moments.add(inputs)
        seen.absolute += inputs.float().abs().sum(0, dtype=torch.float64).cpu()
        seen.tokens += len(inputs)

    @contextmanager
    def around_layer(self, number: int, root: nn.Module, watching: Watching) -> Iterator[None]:
        """Find the scales of a layer when all text went through it."""
        yield
        if not self.finished(number):
            self._write(number)
        self._seen.clear()

    def state(self) -> dict[str, np.ndarray]:
        return {str(number): np.array(1) for number in range(len(self._plan)) if self.finished(number)}

    def restore(self, state: Mapping[str, np.ndarray]) -> bool:
        """Take up an interrupted pass; False where scales of an earlier layer are gone."""
        return all(self.finished(int(number)) for number in state)

    # ---- one layer -----------------------------------------------------------------------------------

    def _file(self, number: int) -> Path:
        return self._folder / f"layer-{number:04}.safetensors"

    def finished(self, number: int) -> bool:
        """Say whether the scales of a layer are there; a layer without sites has none to find."""
        if number in self._done or not self._plan[number]:
            return True
        if tensor_file.find(self._file(number), self._key) is None:
            return False
        self._done.add(number)
        return True

    def _write(self, number: int) -> None:
        arrays: dict[str, tuple[str, np.ndarray]] = {}
        records = []
        for place, site in enumerate(self._plan[number]):
            scales, record = self._solve(site)
            records.append(record)
            if record["exponent"]:
                arrays[f"scales.{place}"] = ("F32", scales)
        # A file of nothing but plain data is no safetensors file for every reader.
        arrays = arrays or {"none": ("F32", np.zeros(1, np.float32))}
        tensor_file.write(self._file(number), arrays, {"key": self._key, "sites": records})

    def _solve(self, site: Site) -> tuple[np.ndarray, dict[str, Any]]:
        """Return the scales of a site, float32 [width], and its record."""
        read = [matrix for matrix in site.matrices if self._tokens(matrix)]
        silent = [matrix for matrix in site.matrices if not self._tokens(matrix)]
        if silent and not all(matrix.routed for matrix in silent):
            raise InputError(
                "E486", f"no calibration token reached {printable(silent[0].label)}",
                where=Where(tensor=printable(silent[0].tensor)), help="calibrate with more or other texts",
            )  # fmt: skip
        record: dict[str, Any] = {"site": site.name, "kind": site.kind, "layer": site.layer, "exponent": 0.0,
                                  "matrices": len(site.matrices)}  # fmt: skip
        ones = np.ones(site.width, np.float32)
        modules = list(dict.fromkeys(matrix.module for matrix in read))
        tokens = sum(self._seen[module].tokens for module in modules)
        if tokens < FEWEST_TOKENS and all(matrix.routed for matrix in site.matrices):
            return ones, record | {"tokens": tokens}
        magnitude = sum((self._seen[module].absolute for module in modules), torch.zeros(site.width)) / tokens
        finite(site.name, magnitude)
        live = (magnitude > 0) & torch.from_numpy(scalable(self._checkpoint, site))
        parts = Counter(self._part(matrix) for matrix in read)
        rows = [self._reader(matrix, parts[self._part(matrix)]) for matrix in read]
        found = search(rows, magnitude, live, self._grids.scale_dtype, self._grids.clip)
        del rows
        return self._accepted(site, read, found, record, ones)

    def _accepted(
        self, site: Site, read: Sequence[Matrix], found: Found, record: dict[str, Any], ones: np.ndarray
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Return the scales where all rows, rounded as they will be, lose less with those that are really applied."""
        before = self._error(read, ones)
        record["error"] = record["scaled_error"] = before
        if not found.exponent:
            return ones, record
        scales = found.scales.numpy()
        after = self._error(read, fold(self._checkpoint, site, scales).scales)
        if not after < before:
            return ones, record
        return scales, record | {"exponent": found.exponent, "scaled_error": after}

    def _error(self, read: Sequence[Matrix], scales: np.ndarray) -> float:
        readers = (self._reader(matrix) for matrix in read)
        return error(readers, torch.from_numpy(scales), self._grids.scale_dtype, clip=self._grids.clip)

    def _reader(self, matrix: Matrix, matrices: int | None = None) -> Reader:
        """Return a matrix with all rows, or with those that the search looks at among so many ``matrices``."""
        hessian = self._seen[matrix.module].moments.hessian
        weight = read_matrix(self._checkpoint, matrix)
        scheme = self._grids.schemes[matrix.label]
        assert scheme is not None
        if matrices is not None:
            weight = sampled(weight, matrices, clips(scheme, self._grids.clip))
        code = self._checkpoint.tensors[matrix.tensor].dtype
        return Reader(self._part(matrix), weight.to(hessian.device), hessian, scheme, code, matrix.label)

    def _part(self, matrix: Matrix) -> str:
        return self._kinds[matrix.tensor]

    def _tokens(self, matrix: Matrix) -> int:
        seen = self._seen.get(matrix.module)
        return 0 if seen is None else seen.tokens

    # ---- what comes out of it ------------------------------------------------------------------------

    def view(self) -> ScaledView:
        """Return the model with all scales folded in."""
        factors: list[Factor] = []
        vectors: dict[str, np.ndarray] = {}
        for number, layer in enumerate(self._plan):
            header = self._header(number)
            for place, site in enumerate(layer):
                name = f"scales.{place}"
                if header is not None and name in header[0].tensors:
                    folded = fold(self._checkpoint, site, tensor_file.read(header[0], name))
                    factors += folded.factors
                    vectors |= folded.vectors
        return ScaledView(self._checkpoint, factors, vectors)

    def record(self, skipped: Sequence[Skipped]) -> dict[str, Any]:
        """Return what was found, as plain data."""
        found = [entry for number in range(len(self._plan)) if (header := self._header(number)) is not None
                 for entry in header[1]["sites"]]  # fmt: skip
        return {
            "sites": [entry for entry in found if "error" in entry],
            "kept": [entry for entry in found if "error" not in entry],
            "skipped": [{"site": entry.name, "reason": entry.reason} for entry in skipped],
        }

    def _header(self, number: int) -> Any:
        return tensor_file.find(self._file(number), self._key) if self._plan[number] else None
