"""Making a model sparse, layer by layer, each seeing what the sparse layers before it give.

The result of a layer is a file of its own with its tensors as they will be stored, made under a key of
everything it depends on, so that an interrupted run goes on with the next layer. At the end a view puts the files
in front of the model, and any plan can be made from it.

Zeros make no server faster (`SPEED` says what the runtimes do with them), so the record says how many there are,
whether the pattern holds everywhere, and about how large the model is to download.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from surgeon.calibrate.matrices import Matrix, matrices_of, read_matrix
from surgeon.calibrate.placement import Placement
from surgeon.calibrate.settings import Settings
from surgeon.calibrate.skeleton import Skeleton
from surgeon.calibrate.walk import Walk
from surgeon.checkpoint import tensor_file
from surgeon.checkpoint.checkpoint import Checkpoint
from surgeon.checkpoint.dtypes import DTYPES
from surgeon.checkpoint.strict_json import read_json_object
from surgeon.errors import UsageError
from surgeon.kernels.cast import narrow, widen
from surgeon.prune.sparse import magnitude, owl, sparsegpt, wanda
from surgeon.prune.sparse.groups import check_groups
from surgeon.prune.sparse.masks import Pattern, holds
from surgeon.prune.sparse.observing import LayerInputs, Stale
from surgeon.prune.sparse.owl import SPREAD, THRESHOLD
from surgeon.prune.sparse.view import SparseView

METHODS = ("magnitude", "wanda", "sparsegpt")
FEWEST_TOKENS = 32
"""An expert that fewer calibration tokens reach is pruned by magnitude."""

SPEED = (
    "servers (vLLM, llama.cpp, transformers) run these zeros at 1.0x: the matrices stay dense",
    "zeros pay in the download (compressed), in torch's semi-structured matrices (2:4, CUDA only), and as the "
    "second stage after expert pruning; for speed: --method ziplm or depth",
)

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class SparseOptions:
    """How a model is made sparse.

    Attributes:
        method: of `METHODS`.
        sparsity: share of the weights of linear layers that becomes zero; None with a pattern.
        pattern: N:M.
        scope: of magnitude: layer, row or global.
        owl: layers get different sparsities by their outliers.
        owl_threshold, owl_spread: its M and lambda.
        damp: of SparseGPT.
        ignore: tensors that are left alone.
        skip_incompatible: matrices that the pattern does not divide stay dense instead of being refused.
    """

    method: str
    sparsity: float | None = None
    pattern: Pattern | None = None
    scope: str = "layer"
    owl: bool = False
    owl_threshold: float = THRESHOLD
    owl_spread: float = SPREAD
    damp: float = 1e-2
    ignore: tuple[str, ...] = ()
    skip_incompatible: bool = False

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise UsageError(
                "E265", f'"{self.method}" makes no model sparse', help="one of " + ", ".join(METHODS)
            )
        if (self.sparsity is None) == (self.pattern is None):
            raise UsageError(
                "E266", "sparsity is a share or a pattern", help="--sparsity 0.5, or --pattern 2:4"
            )
        if self.sparsity is not None and not 0 <= self.sparsity <= 1:
            raise UsageError("E266", f"a sparsity of {self.sparsity:g}", help="a share between 0 and 1")
        if self.scope not in magnitude.SCOPES or (
            self.scope != "layer" and (self.method != "magnitude" or self.pattern)
        ):
            raise UsageError(
                "E267",
                f"the scope {self.scope} is not one of {self.method}",
                help="row and global belong to magnitude without a pattern",
            )
        if self.owl and self.method == "magnitude":
            raise UsageError(
                "E267",
                "owl needs activations, which magnitude does not look at",
                help="--method wanda or sparsegpt",
            )

    def record(self) -> dict[str, Any]:
        """Return plain data for a manifest: only what has an effect."""
        found = {k: v for k, v in asdict(self).items() if v not in (None, (), False)}
        found["pattern"] = None if self.pattern is None else str(self.pattern)
        for name in ("owl_threshold", "owl_spread") if not self.owl else ():
            found.pop(name)
        if self.method != "sparsegpt":
            found.pop("damp", None)
        if self.method != "magnitude":
            found.pop("scope")
        return {k: v for k, v in found.items() if v is not None}


def sparsify(
    checkpoint: Checkpoint,
    samples: Sequence[np.ndarray],
    settings: Settings,
    options: SparseOptions,
    work: Path,
    *,
    progress: Progress | None = None,
    stop: threading.Event | None = None,
) -> tuple[SparseView, dict[str, Any]]:
    """Return the sparse model as a view of the dense one, and the record of what was done.

    Args:
        checkpoint: the dense model.
        samples: calibration tokens; magnitude looks at none and takes ().
        settings: where and how the model runs; with a spill folder an interrupted pass goes on where it stopped.
        options: see there.
        work: folder of the results by layer; they stay as long as the view is read.

    Raises:
        UsageError, InputError: E218, E265-E267, E314, E317, E318, and what the walk raises.
    """
    run = _Run(checkpoint, samples, settings, options, work, progress or (lambda *_: None), stop)
    run.targets()
    if options.method == "magnitude":
        run.by_magnitude()
    else:
        run.walk()
    return run.view(), run.record()


class _Run:
    """One sparsification."""

    def __init__(
        self, checkpoint: Checkpoint, samples: Sequence[np.ndarray], settings: Settings, options: SparseOptions,
        work: Path, progress: Progress, stop: threading.Event | None,
    ) -> None:  # fmt: skip
        self.checkpoint, self.samples, self.settings = checkpoint, samples, settings
        self.options, self.progress, self.stop = options, progress, stop
        self.layers = matrices_of(
            checkpoint, Skeleton(checkpoint, replace(settings, device="cpu")), ignore=options.ignore
        )
        self.placement = Placement.of(settings.device, len(self.layers))
        self.skipped: list[Matrix] = []
        if options.pattern is not None:
            everything = [matrix for layer in self.layers for matrix in layer]
            self.skipped = check_groups(everything, options.pattern, skip=options.skip_incompatible)
            self.layers = tuple(tuple(m for m in layer if m not in self.skipped) for layer in self.layers)
        self.key = self._key()
        self.folder = work / f"sparse-{self.key[:16]}"
        self.outliers: list[float] | None = None
        self.shares: list[float | Pattern] = []

    def _key(self) -> str:
        digest = hashlib.sha256()
        for sample in self.samples:
            digest.update(
                len(sample).to_bytes(8, "little") + np.ascontiguousarray(sample, np.int64).tobytes()
            )
        about = {
            "format": 1, "headers": [h.sha256 for h in self.checkpoint.headers],
            "stamps": [[h.stamp.size, h.stamp.mtime_ns] for h in self.checkpoint.headers],
            "view": getattr(self.checkpoint, "identity", ""), "config": self.checkpoint.config,
            "options": {**asdict(self.options), "pattern": str(self.options.pattern)},
            "samples": digest.hexdigest() if self.options.method != "magnitude" else "",
            "dtype": self.settings.dtype, "torch": torch.__version__,
        }  # fmt: skip
        return hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode()).hexdigest()

    # ---- how sparse each layer gets ------------------------------------------------------------------

    def targets(self) -> None:
        """Decide every layer's sparsity or pattern."""
        options = self.options
        flat: float | Pattern = (
            options.pattern if options.pattern is not None else float(options.sparsity or 0.0)
        )
        self.shares = [flat] * len(self.layers)
        if not options.owl:
            return
        self.outliers = self._measured()
        present = [number for number, layer in enumerate(self.layers) if layer]
        found = [self.outliers[number] for number in present]
        sizes = [sum(m.elements for m in self.layers[number]) for number in present]
        if options.pattern is not None:
            chosen: Sequence[float | Pattern] = owl.patterns(
                found, sizes, options.pattern, options.owl_spread
            )
        else:
            chosen = owl.sparsities(found, sizes, float(options.sparsity or 0.0), options.owl_spread)
        for number, value in zip(present, chosen, strict=True):
            self.shares[number] = value

    def _measured(self) -> list[float]:
        """Return D of every layer, from a pass through the dense model, or from a file of an earlier run."""
        file = self.folder / "outliers.json"
        if file.is_file():
            found = read_json_object(file)
            if found.get("key") == self.key:
                return [float(value) for value in found["outliers"]]
        modules = {matrix.module: matrix.layer for layer in self.layers for matrix in layer}
        observer = LayerInputs(
            modules, second_moments=False, identity="outliers", finished=lambda layer: False
        )
        found_outliers = [0.0] * len(self.layers)
        with Walk(self.checkpoint, self.samples, replace(self.settings, spill=None)) as walk:
            for number, stage in enumerate(walk.steps(observer)):
                self.progress("outliers", number + 1, len(walk.stages))
                _check(self.stop)
                if stage.startswith("layer "):
                    layer = number - 1
                    counter = owl.Outliers(self.options.owl_threshold)
                    for matrix in self.layers[layer]:
                        if observer.tokens(matrix.module):
                            weight = read_matrix(self.checkpoint, matrix)
                            counter.add(wanda.scores(weight, observer.norms(matrix.module)).numpy())
                    found_outliers[layer] = counter.percent()
                    observer.forget()
        self.folder.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({"key": self.key, "outliers": found_outliers}))
        return found_outliers

    # ---- layer by layer --------------------------------------------------------------------------------

    def walk(self) -> None:
        """Run the calibration text through the model, making every layer sparse before the next one is seen."""
        modules = {matrix.module: matrix.layer for layer in self.layers for matrix in layer}
        observer = LayerInputs(
            modules,
            second_moments=self.options.method == "sparsegpt",
            identity=self.key,
            finished=self._finished,
        )

        def changed(layer: int) -> dict[str, Tensor]:
            if not self._finished(layer):
                self._solve(layer, observer)
            observer.forget()
            return self._load(layer)

        def told(done: int, total: int) -> None:
            self.progress(self.options.method, done, total)

        if all(self._finished(layer) for layer in range(len(self.layers))):
            return
        for resume in (True, False):
            try:
                with Walk(self.checkpoint, self.samples, self.settings) as walk:
                    walk.run(observer, progress=told, stop=self.stop, resume=resume, replace=changed)
                return
            except Stale:
                continue

    def by_magnitude(self) -> None:
        """Make every layer sparse by its weights alone."""
        threshold = None
        if self.options.scope == "global":
            every = [matrix for layer in self.layers for matrix in layer]
            threshold = magnitude.GlobalThreshold(
                lambda: (read_matrix(self.checkpoint, matrix) for matrix in every),
                float(self.options.sparsity or 0.0),
            )
        for layer in range(len(self.layers)):
            _check(self.stop)
            if threshold is not None or not self._finished(layer):  # the threshold counts ties in order
                self._solve(layer, None, threshold)
            self.progress("magnitude", layer + 1, len(self.layers))

    def _solve(
        self, layer: int, observer: LayerInputs | None, threshold: magnitude.GlobalThreshold | None = None
    ) -> None:
        """Make one layer's matrices sparse and write them to the layer's file."""
        arrays: dict[str, tuple[str, np.ndarray]] = {}
        facts: list[dict[str, Any]] = []
        hessians: dict[str, Tensor] = {}
        # Counting bit patterns is NumPy's; everything else happens where the layer was computed.
        device = self.placement.of_layer(layer) if observer is not None else torch.device("cpu")
        for matrix in self.layers[layer]:
            weight = read_matrix(self.checkpoint, matrix).to(device)
            result, fact = self._one(matrix, weight, observer, hessians, threshold)
            info = self.checkpoint.tensors[matrix.tensor]
            result = result.cpu()
            stored = narrow((result.T if matrix.transposed else result).contiguous().numpy(), info.dtype)
            if matrix.expert is None:
                arrays[matrix.tensor] = (info.dtype, stored.reshape(info.shape))
            else:
                if matrix.tensor not in arrays:
                    arrays[matrix.tensor] = (info.dtype, np.empty(info.shape, stored.dtype))
                arrays[matrix.tensor][1][matrix.expert] = stored.reshape(info.shape[1:])
            facts.append(fact | {"zeros": int((widen(stored, info.dtype) == 0).sum())})
        tensor_file.write(self._file(layer), arrays, {"key": self._layer_key(layer), "facts": facts})

    def _one(
        self, matrix: Matrix, weight: Tensor, observer: LayerInputs | None, hessians: dict[str, Tensor],
        threshold: magnitude.GlobalThreshold | None,
    ) -> tuple[Tensor, dict[str, Any]]:  # fmt: skip
        """Return one sparse matrix [out, in] and facts about it."""
        share = self.shares[matrix.layer]
        pattern = share if isinstance(share, Pattern) else None
        sparsity = None if isinstance(share, Pattern) else share
        fact: dict[str, Any] = {"tensor": matrix.label, "elements": matrix.elements}
        few = observer is not None and matrix.routed and observer.tokens(matrix.module) < FEWEST_TOKENS
        if observer is None or few or not observer.tokens(matrix.module):
            if observer is not None:
                fact["fallback"] = f"magnitude: {observer.tokens(matrix.module)} calibration tokens"
            gone = (
                threshold.mask(weight)
                if threshold
                else magnitude.mask(weight, sparsity, pattern, scope=self.options.scope)
            )
            result = weight.masked_fill(gone, 0.0)
        elif self.options.method == "wanda":
            result = weight.masked_fill(
                wanda.mask(weight, observer.norms(matrix.module), sparsity, pattern), 0.0
            )
        else:
            if matrix.module not in hessians:
                hessians[matrix.module] = observer.hessian(matrix.module).to(weight.device)
            hessian = hessians[matrix.module]
            solved = sparsegpt.solve(
                weight, hessian, sparsity, pattern, damp=self.options.damp, module=matrix.label
            )
            result = solved.weight
            fact |= {"damp": solved.damp, "relative_error": _relative_error(weight, result, hessian)}
        if pattern is not None:
            fact |= {"pattern": str(pattern), "holds": holds(result, pattern)}
        return result, fact

    # ---- files -----------------------------------------------------------------------------------------

    def _file(self, layer: int) -> Path:
        return self.folder / f"layer-{layer:04d}.safetensors"

    def _layer_key(self, layer: int) -> str:
        return f"{self.key} {layer} {self.shares[layer]}"

    def _finished(self, layer: int) -> bool:
        return (
            not self.layers[layer] or tensor_file.find(self._file(layer), self._layer_key(layer)) is not None
        )

    def _load(self, layer: int) -> dict[str, Tensor]:
        """Return a finished layer's tensors as they are stored."""
        found = tensor_file.find(self._file(layer), self._layer_key(layer)) if self.layers[layer] else None
        if found is None:
            return {}
        header, _ = found
        tensors: dict[str, Tensor] = {}
        for name, info in header.tensors.items():
            values = tensor_file.read(header, name)
            if info.dtype == "BF16":
                tensors[name] = torch.from_numpy(values.view(np.int16)).view(torch.bfloat16)
            else:
                tensors[name] = torch.from_numpy(values)
        return tensors

    def view(self) -> SparseView:
        files = [self._file(layer) for layer in range(len(self.layers)) if self.layers[layer]]
        return SparseView(self.checkpoint, files)

    def record(self) -> dict[str, Any]:
        """Return what was done, as plain data without paths."""
        facts: list[Mapping[str, Any]] = []
        for layer in range(len(self.layers)):
            found = (
                tensor_file.find(self._file(layer), self._layer_key(layer)) if self.layers[layer] else None
            )
            if found is not None:
                facts.extend(found[1]["facts"])
        zeros = sum(fact["zeros"] for fact in facts)
        pruned = sum(fact["elements"] for fact in facts) + sum(m.elements for m in self.skipped)
        tensors = self.checkpoint.tensors.values()
        everything = sum(info.elements for info in tensors if DTYPES[info.dtype].family == "float")
        shares = [str(s) if isinstance(s, Pattern) else round(s, 6) for s in self.shares]
        return {
            "options": self.options.record(),
            "layers": shares,
            "outliers": None if self.outliers is None else [round(value, 6) for value in self.outliers],
            "matrices": [dict(fact) for fact in facts],
            "left_dense": [matrix.label for matrix in self.skipped],
            "zeros": zeros,
            "sparsity": zeros / pruned,
            "sparsity_of_all_parameters": zeros / everything,
            "pattern_holds": all(fact["holds"] for fact in facts)
            if self.options.pattern is not None
            else None,
            "fallbacks": [fact["tensor"] for fact in facts if "fallback" in fact],
            "bytes": sum(info.nbytes for info in tensors),
            "download_bytes": download_bytes(self.checkpoint, facts),
            "speed": list(SPEED),
        }


def download_bytes(checkpoint: Checkpoint, facts: Sequence[Mapping[str, Any]]) -> int:
    """Return about how large the model is to download when it is compressed (zstd or alike).

    Of a sparse matrix the values that are left, and one bit a weight for where they are; never more than
    it has now.
    """
    total = sum(info.nbytes for info in checkpoint.tensors.values())
    for fact in facts:
        width = DTYPES[checkpoint.tensors[fact["tensor"].partition("[")[0]].dtype].bits / 8
        dense = fact["elements"] * width
        total -= int(dense - min(dense, (fact["elements"] - fact["zeros"]) * width + fact["elements"] / 8))
    return total


def _relative_error(weight: Tensor, result: Tensor, hessian: Tensor) -> float:
    """Return |(W - W_sparse) X|^2 / |W X|^2 over the calibration tokens."""
    lost = weight - result
    before = float(((weight @ hessian) * weight).sum(dtype=torch.float64))
    return float(((lost @ hessian) * lost).sum(dtype=torch.float64)) / before if before > 0 else 0.0


def _check(stop: threading.Event | None) -> None:
    if stop is not None and stop.is_set():
        from surgeon.errors import Interrupted

        raise Interrupted("E130", "interrupted while the model is made sparse; finished layers are kept")
