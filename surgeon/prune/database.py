"""The pruning database: for every attention and FFN the order in which its units go, and what that costs.

One pass over calibration text serves every target. Layer by layer the inputs of the output matrices
are summed up, written to a file, and turned into rankings, each in a file of its own; then the
layer is forgotten. Every file says what it was made from, so an interrupted run continues where it was
and a changed setting repeats only what depends on it.

    database = build(checkpoint, structure, samples, settings, folder=folder)
    database.ranking(3, "ffn").kept(1024)
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from surgeon.calibrate.conditions import memory_faults, threads
from surgeon.calibrate.pieces import read_tensor
from surgeon.calibrate.placement import Placement
from surgeon.calibrate.settings import Settings
from surgeon.calibrate.walk import Walk
from surgeon.checkpoint.checkpoint import Checkpoint
from surgeon.checkpoint.header import printable
from surgeon.errors import InputError, Interrupted, UsageError, Where
from surgeon.prune import criteria, tensor_file
from surgeon.prune.criteria import Context, Criterion, Moments, read_output
from surgeon.prune.hessians import ChannelStatistics, Stale, read_hessian, read_moments
from surgeon.prune.levels import useful_modes
from surgeon.prune.obs import columns_of, solve
from surgeon.prune.ranking import MODES, Ranking
from surgeon.structure.biases import with_biases
from surgeon.structure.cut import Kept
from surgeon.structure.parts import Attention, Ffn, Structure

if TYPE_CHECKING:
    from surgeon.prune.true_loss import Solved

__all__ = ["Database", "Ranking", "build", "disk_bytes"]

VERSION = 1

Progress = Callable[[str, int, int], None]
"""Called with (what is done in a few words, steps done, steps)."""

STRUCTURES = {"heads": "attention", "ffn": "ffn"}
"""What the command line calls it -> kind of a ranking."""

COLUMN_ARRAYS = 7
"""Arrays of eight bytes a channel in a file of statistics, at most."""


@dataclass(frozen=True)
class _Module:
    """One attention or FFN to rank, and where its files lie."""

    part: Attention | Ffn
    kind: str
    modes: tuple[str, ...]
    folder: Path

    @property
    def name(self) -> str:
        return self.part.output.module

    @property
    def statistics(self) -> Path:
        return self.folder / f"layer-{self.part.layer:03d}.{self.kind}.statistics.safetensors"

    def ranking(self, mode: str) -> Path:
        return self.folder / f"layer-{self.part.layer:03d}.{self.kind}.{mode}.safetensors"


class Database:
    """Rankings of a model's modules, and the statistics they were made from.

    Attributes:
        criterion: how units were ranked.
        damp: relative damping that was asked for.
        rankings: (layer, kind, mode) -> ranking.
        folder: where its files lie.
        record: plain data for the manifest: method, version, damp, precision, tokens, and by module how many of
            its channels were never active and what the ranking reports.
        notes: sentences for the user.
    """

    def __init__(
        self,
        inputs: _Inputs,
        rankings: dict[tuple[int, str, str], Ranking],
    ) -> None:
        self._inputs = inputs
        self.criterion = inputs.criterion
        self.damp = inputs.damp
        self.folder = inputs.folder
        self.rankings = rankings
        self._held: tuple[str, Tensor] | None = None

    @property
    def method(self) -> str:
        return self.criterion.name

    @property
    def settings(self) -> Settings:
        """Settings of the pass."""
        return self._inputs.settings

    def ranking(self, layer: int, kind: str, mode: str = "channels") -> Ranking:
        """Return one ranking.

        Raises:
            InputError: E316 the layer has none of this kind.
        """
        found = self.rankings.get((layer, kind, mode))
        if found is None:
            reasons = dict(self._inputs.structure.reasons)
            raise InputError("E316", f"layer {layer} has no ranking of {kind} by {mode}",
                             where=Where(self._inputs.checkpoint.label), help=reasons.get(layer))  # fmt: skip
        return found

    def context(self, layer: int, kind: str, mode: str) -> Context:
        """Return what a criterion sees of one module; the statistics are read now."""
        return self._inputs.context(self._inputs.module(layer, kind), mode)

    def hessian(self, layer: int, kind: str) -> Tensor:
        """Return the mean of x x' of one output matrix's inputs, float32 [in, in], undamped, on the CPU."""
        return self._inputs.hessian(self._inputs.module(layer, kind))

    def solution(self, layer: int, kind: str, kept: Kept) -> tuple[Tensor | None, Tensor | None]:
        """Return what an output matrix and its bias become when these query heads or channels stay.

        Returns:
            (float32 [out, kept inputs] or None where the source's columns stay as they are, float32 [out] or
            None where the source's bias, or none, stays), on the CPU.
        """
        module = self._inputs.module(layer, kind)
        part = module.part
        if not kept or len(kept) == (part.width if isinstance(part, Ffn) else part.heads):
            return None, None
        weight = None
        if self.criterion.solves:
            if self._held is None or self._held[0] != module.name:
                self._held = (module.name, self._inputs.hessian(module))
            device = self._inputs.device
            original = read_output(self._inputs.checkpoint, part.output).to(device)
            columns = columns_of(np.array(kept), 1 if isinstance(part, Ffn) else part.head_dim)
            hessian = self._held[1].to(device)
            weight = solve(original, hessian, columns, self.damp, module=module.name).cpu()
        return weight, self.bias(layer, kind, kept)

    def bias(self, layer: int, kind: str, kept: Kept) -> Tensor | None:
        """Return the bias an output matrix has when these query heads or channels stay, float32 [out] on the CPU.

        None where it is the source's (or none), which is so, too, where the family's class cannot have one.
        """
        if not self._bias_kinds[kind]:
            return None
        module = self._inputs.module(layer, kind)
        added = self.criterion.bias(self._inputs.context(module, module.modes[0]), kept)
        if added is None:
            return None
        own = module.part.output.bias
        if own is not None:
            width = self._inputs.checkpoint.tensors[own].elements
            added = added.cpu() + read_tensor(self._inputs.checkpoint, own, 0, width, torch.float32)
        return added.float().cpu()

    def weights(self, layer: int, kind: str, kept: Kept) -> Solved | None:
        """Return the same as `solution` for `surgeon.prune.true_loss.TrueLoss`, None where nothing changes."""
        from surgeon.prune.true_loss import Solved

        weight, bias = self.solution(layer, kind, kept)
        if weight is None and bias is None:
            return None
        if weight is None:
            part = self._inputs.module(layer, kind).part
            columns = columns_of(np.array(kept), 1 if isinstance(part, Ffn) else part.head_dim)
            weight = read_output(self._inputs.checkpoint, part.output)[:, torch.from_numpy(columns)]
        return Solved(weight, bias)

    @property
    def _lost_means(self) -> list[str]:
        """Kinds of modules for which the criterion would give a bias that the family cannot hold."""
        found = []
        for kind in MODES:
            module = next((one for one in self._inputs.modules if one.kind == kind), None)
            if module is not None and not self._bias_kinds[kind]:
                ranking = self.rankings[module.part.layer, kind, module.modes[0]]
                context = self._inputs.context(module, module.modes[0])
                if self.criterion.bias(context, ranking.kept(ranking.units - 1)) is not None:
                    found.append("FFNs" if kind == "ffn" else kind)
        return found

    @cached_property
    def _bias_kinds(self) -> dict[str, bool]:
        """Say of which kind of module the output matrix can have a bias."""
        found = {}
        for kind in MODES:
            outputs = [module.part.output for module in self._inputs.modules if module.kind == kind]
            try:
                with_biases(
                    self._inputs.checkpoint,
                    self._inputs.structure,
                    [f"{output.module}.bias" for output in outputs],
                )
            except InputError:
                found[kind] = False
            else:
                found[kind] = True
        return found

    @cached_property
    def record(self) -> dict[str, Any]:
        modules: dict[str, Any] = {}
        for module in self._inputs.modules:
            entry: dict[str, Any] = {}
            moments = self._inputs.moments(module)
            if moments is not None:
                entry |= {"tokens": moments.tokens, "never_active": int((moments.active == 0).sum())}
            for mode in module.modes:
                about = self.rankings[module.part.layer, module.kind, mode].about
                if about:
                    entry[mode] = dict(about)
            modules[module.name] = entry
        samples = self._inputs.samples if self.criterion.needs else ()
        return {
            "method": self.method,
            "version": [VERSION, self.criterion.version],
            "damp": self.damp,
            "seed": self._inputs.seed,
            "precision": self._inputs.settings.dtype,
            "samples": len(samples),
            "tokens": int(sum(len(sample) for sample in samples)),
            "modules": modules,
        }

    @property
    def notes(self) -> tuple[str, ...]:
        found = []
        modules = self.record["modules"]
        silent = {name: entry["never_active"] for name, entry in modules.items() if entry.get("never_active")}
        if silent:
            most = max(silent, key=silent.__getitem__)
            found.append(
                f"{sum(silent.values())} channels in {len(silent)} modules were never active on the calibration text "
                f"({silent[most]} of them in {printable(most)}); they go first"
            )
        if self._lost_means:
            found.append(
                f"the output matrices of {' and '.join(self._lost_means)} have no bias in this family: what removed "
                f"channels contributed on average is lost; --criterion ziplm makes up for it"
            )
        if "hessian" in self.criterion.needs:
            thin = [m for m in self._inputs.modules if 4 * _columns(m.part) > modules[m.name]["tokens"]]
            if thin:
                widest = max(_columns(module.part) for module in thin)
                found.append(
                    f"{self.record['tokens']} tokens are few for {widest} columns: "
                    f"use {4 * widest} or more for a reliable ranking"
                )
            raised = [
                name for name, entry in modules.items()
                if any(isinstance(about, dict) and about.get("escalated") for about in entry.values())
            ]  # fmt: skip
            if raised:
                found.append(
                    f"damping had to be raised in {len(raised)} modules, first in {printable(raised[0])}"
                )
        return tuple(found)


def build(
    checkpoint: Checkpoint,
    structure: Structure,
    samples: Sequence[np.ndarray],
    settings: Settings,
    *,
    folder: Path,
    method: str = "ziplm",
    structures: Sequence[str] = ("heads", "ffn"),
    modes: Sequence[str] | None = None,
    damp: float = 1e-2,
    seed: int = 0,
    progress: Progress | None = None,
    stop: threading.Event | None = None,
) -> Database:
    """Rank the units of every module.

    Args:
        checkpoint: the model.
        structure: where its parts lie.
        samples: token ids, one array each; not looked at by criteria that need no text.
        settings: of the pass. With ``spill`` an interrupted pass continues at its layer.
        folder: where results are kept (`disk_bytes`). What lies there from an equal run is used.
        method: name of a criterion.
        structures: "heads", "ffn" or both.
        modes: units of attention, "groups" and "heads"; None takes those that differ in this model.
        damp: relative damping of Hessians.
        seed: of criteria that draw.
        progress: called with ("calibrating", stages done, stages) and ("ranking units", rankings, rankings).
        stop: set it to stop; finished modules are kept.

    Raises:
        UsageError: E264 no such criterion, E265 structures, modes or damping that do not exist.
        InputError: E312 a module saw no token, E313 to E315 a Hessian cannot be used, E317 nothing to rank; and
            what `surgeon.calibrate.walk.Walk` raises.
        Interrupted: E130 ``stop`` was set.
    """
    criterion = criteria.get(method)
    wanted = _wanted_modes(structure, structures, modes)
    if not 0 <= damp <= 1:
        raise UsageError(
            "E265", f"a damping of {damp:g} makes no sense", help="between 0.001 and 0.1; 0.01 is usual"
        )
    modules = tuple(_modules(structure, wanted, folder))
    if not modules:
        raise InputError("E317", f"{checkpoint.label} has nothing of " + " or ".join(structures) + " that can be cut",
                         where=Where(checkpoint.label), help="; ".join(dict(structure.reasons).values()) or None)  # fmt: skip
    inputs = _Inputs(checkpoint, structure, samples, settings, folder, criterion, damp, seed, modules)
    return _Build(inputs, progress, stop).run()


def disk_bytes(
    structure: Structure, method: str = "ziplm", structures: Sequence[str] = ("heads", "ffn")
) -> int:
    """Return the bytes `build` writes to its folder, at most; a spill folder of the pass not counted."""
    criterion = criteria.get(method)
    total = 0
    for module in _modules(structure, _wanted_modes(structure, structures, None), Path()):
        columns = _columns(module.part)
        if criterion.needs:
            total += 8 * COLUMN_ARRAYS * columns + 4096
        if "hessian" in criterion.needs:
            total += 4 * columns * columns
        total += len(module.modes) * (12 * columns + 8192)
    return total


def _columns(part: Attention | Ffn) -> int:
    return part.width if isinstance(part, Ffn) else part.heads * part.head_dim


def _wanted_modes(
    structure: Structure, structures: Sequence[str], modes: Sequence[str] | None
) -> dict[str, tuple[str, ...]]:
    """Return kind -> modes."""
    unknown = [name for name in structures if name not in STRUCTURES]
    unknown += [mode for mode in modes or () if mode not in MODES["attention"]]
    if unknown or not structures:
        raise UsageError("E265", f'"{unknown[0]}" cannot be ranked' if unknown else "no structures were named",
                         help="structures are heads and ffn; heads go by groups or by heads")  # fmt: skip
    found: dict[str, tuple[str, ...]] = {}
    for name in structures:
        kind = STRUCTURES[name]
        if kind == "ffn":
            found[kind] = MODES[kind]
        else:
            found[kind] = tuple(dict.fromkeys(modes)) if modes is not None else useful_modes(structure)
    return found


def _modules(structure: Structure, wanted: dict[str, tuple[str, ...]], folder: Path) -> Iterator[_Module]:
    for layer in range(structure.layers):
        for kind in ("attention", "ffn"):
            part = structure.attention[layer] if kind == "attention" else structure.ffn[layer]
            if part is not None and wanted.get(kind):
                yield _Module(part, kind, wanted[kind], folder)


class _Inputs:
    """Everything results depend on, and access to what is on disk already."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        structure: Structure,
        samples: Sequence[np.ndarray],
        settings: Settings,
        folder: Path,
        criterion: Criterion,
        damp: float,
        seed: int,
        modules: tuple[_Module, ...],
    ) -> None:
        self.checkpoint = checkpoint
        self.structure = structure
        self.samples = samples
        self.settings = settings
        self.folder = folder
        self.criterion = criterion
        self.damp = damp
        self.seed = seed
        self.modules = modules
        self.device = Placement.of(settings.device, structure.layers).outer

    def module(self, layer: int, kind: str) -> _Module:
        for module in self.modules:
            if (module.part.layer, module.kind) == (layer, kind):
                return module
        raise InputError(
            "E316", f"layer {layer} has no ranking of {kind}", where=Where(self.checkpoint.label)
        )

    @cached_property
    def _model(self) -> str:
        return _digest(
            version=VERSION,
            headers=[[h.sha256, h.stamp.size, h.stamp.mtime_ns] for h in self.checkpoint.headers],
            view=getattr(self.checkpoint, "identity", ""),
            config=self.checkpoint.config,
        )

    @cached_property
    def _text(self) -> str:
        digest = hashlib.sha256()
        for sample in self.samples:
            ids = np.asarray(sample, dtype=np.int64)
            digest.update(ids.size.to_bytes(8, "little") + ids.tobytes())
        return digest.hexdigest()

    def statistics_key(self, module: str) -> str:
        """Return what the statistics of a module depend on."""
        needs = sorted(self.criterion.needs)
        return _digest(
            model=self._model, text=self._text, dtype=self.settings.dtype, module=module, needs=needs
        )

    def ranking_key(self, module: _Module, mode: str, weight: str) -> str:
        """Return what a ranking depends on; ``weight`` is the digest of the matrix."""
        return _digest(
            statistics=self.statistics_key(module.name) if self.criterion.needs else self._model,
            weight=weight,
            module=module.name,
            mode=mode,
            method=[self.criterion.name, self.criterion.version],
            damp=self.damp,
            seed=self.seed,
        )

    def _statistics(self, module: _Module) -> Any:
        found = tensor_file.find(module.statistics, self.statistics_key(module.name))
        if found is None:
            raise InputError("E312", f"no calibration token reached {printable(module.name)}",
                             where=Where(tensor=printable(module.name)),
                             help="the model does not run this layer, or the results of the pass were removed")  # fmt: skip
        return found

    def moments(self, module: _Module) -> Moments | None:
        return read_moments(*self._statistics(module)) if self.criterion.needs else None

    def hessian(self, module: _Module) -> Tensor:
        return read_hessian(self._statistics(module)[0])

    def context(self, module: _Module, mode: str) -> Context:
        hessian = self.hessian(module).to(self.device) if "hessian" in self.criterion.needs else None
        return Context(
            self.checkpoint, module.part, mode, self.damp, self.seed, self.moments(module), hessian, self.device
        )  # fmt: skip


def _digest(**content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


class _Build:
    """One run: the pass, and after each of its layers the rankings of that layer."""

    def __init__(self, inputs: _Inputs, progress: Progress | None, stop: threading.Event | None) -> None:
        self._inputs = inputs
        self._progress = progress
        self._stop = stop
        self._rankings: dict[tuple[int, str, str], Ranking] = {}
        self._waiting = list(inputs.modules)
        self._ranked = 0

    def run(self) -> Database:
        inputs = self._inputs
        inputs.folder.mkdir(parents=True, exist_ok=True)
        if inputs.criterion.needs:
            try:
                self._walk(resume=True)
            except Stale:
                self._walk(resume=False)
        self._rank(self._waiting)
        return Database(inputs, dict(sorted(self._rankings.items())))

    def _walk(self, *, resume: bool) -> None:
        inputs = self._inputs
        by_name = {module.name: module for module in inputs.modules}
        observer = ChannelStatistics(
            {name: module.statistics for name, module in by_name.items()},
            inputs.statistics_key,
            inputs.criterion.needs,
        )
        if observer.done == by_name.keys():
            return
        per_sample = "samples" in inputs.criterion.needs
        with Walk(inputs.checkpoint, inputs.samples, inputs.settings, per_sample=per_sample) as walk:

            def after(stage: int, stages: int) -> None:
                observer.settle()
                self._report("calibrating", stage, stages)
                self._rank([module for module in self._waiting if module.name in observer.done])

            walk.run(observer, progress=after, stop=self._stop, resume=resume)

    def _rank(self, modules: Sequence[_Module]) -> None:
        for module in list(modules):
            if self._stop is not None and self._stop.is_set():
                raise Interrupted("E130", "interrupted while units were ranked; finished modules are kept")
            with threads(self._inputs.settings.threads), memory_faults(f"the ranking of {module.name}"):
                self._rank_module(module)
            self._waiting.remove(module)

    def _rank_module(self, module: _Module) -> None:
        inputs = self._inputs
        weight = read_output(inputs.checkpoint, module.part.output)
        digest = hashlib.sha256(weight.numpy().data).hexdigest()
        del weight
        context: Context | None = None
        for mode in module.modes:
            path, key = module.ranking(mode), inputs.ranking_key(module, mode, digest)
            ranking = _read(path, key, module, mode)
            if ranking is None:
                context = inputs.context(module, mode) if context is None else replace(context, mode=mode)
                ranking = inputs.criterion.rank(context)
                _write(path, key, ranking)
            self._rankings[module.part.layer, module.kind, mode] = ranking
            self._ranked += 1
            self._report("ranking units", self._ranked, sum(len(one.modes) for one in inputs.modules))

    def _report(self, what: str, done: int, total: int) -> None:
        if self._progress is not None:
            self._progress(what, done, total)


def _write(path: Path, key: str, ranking: Ranking) -> None:
    about = {"key": key, "size": ranking.size, "about": dict(ranking.about)}
    arrays = {"order": ("I32", ranking.order), "errors": ("F64", ranking.errors)}
    tensor_file.write(path, arrays, about)


def _read(path: Path, key: str, module: _Module, mode: str) -> Ranking | None:
    """Return the ranking in a file if it is this one, else None."""
    found = tensor_file.find(path, key)
    if found is None:
        return None
    header, about = found
    order, errors = tensor_file.read(header, "order"), tensor_file.read(header, "errors")
    return Ranking(module.part.layer, module.kind, mode, order, errors, about["size"], about["about"])
