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
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from surgeon.calibrate.conditions import memory_faults, threads
from surgeon.calibrate.pieces import read_tensor
from surgeon.calibrate.settings import Settings
from surgeon.calibrate.walk import Walk
from surgeon.checkpoint import tensor_file
from surgeon.checkpoint.checkpoint import Checkpoint
from surgeon.checkpoint.header import printable
from surgeon.errors import InputError, Interrupted, UsageError, Where
from surgeon.prune import criteria
from surgeon.prune.closed_form import columns_of, solve
from surgeon.prune.criteria import Context, read_output
from surgeon.prune.hessians import ChannelStatistics, Stale
from surgeon.prune.ranked_modules import VERSION, Inputs, Module, columns_in, modules_of, wanted_modes
from surgeon.prune.ranking import MODES, Ranking
from surgeon.structure.biases import with_biases
from surgeon.structure.cut import Kept
from surgeon.structure.parts import Ffn, Structure

if TYPE_CHECKING:
    from surgeon.prune.true_loss import Solved

__all__ = ["Database", "Ranking", "build", "disk_bytes"]

Progress = Callable[[str, int, int], None]
"""Called with (what is done in a few words, steps done, steps)."""

COLUMN_ARRAYS = 7
"""Arrays of eight bytes a channel in a file of statistics, at most."""


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
        inputs: Inputs,
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
                             where=Where(self._inputs.checkpoint.label), help=reasons.get(layer) or "rank it again, with this structure and mode")  # fmt: skip
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
        added = self.criterion.bias(self._inputs.context(module, module.modes[0], ranked=False), kept)
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
                context = self._inputs.context(module, module.modes[0], ranked=False)
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
            thin = [m for m in self._inputs.modules if 4 * columns_in(m.part) > modules[m.name]["tokens"]]
            if thin:
                widest = max(columns_in(module.part) for module in thin)
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
    wanted = wanted_modes(structure, structures, modes)
    if not 0 <= damp <= 1:
        raise UsageError(
            "E265", f"a damping of {damp:g} makes no sense", help="between 0.001 and 0.1; 0.01 is usual"
        )
    modules = tuple(modules_of(structure, wanted, folder))
    if not modules:
        raise InputError("E317", f"{checkpoint.label} has nothing of " + " or ".join(structures) + " that can be cut",
                         where=Where(checkpoint.label), help="; ".join(dict(structure.reasons).values()) or "surgeon inspect MODEL shows what it has; --structures chooses among heads, ffn, layers")  # fmt: skip
    inputs = Inputs(checkpoint, structure, samples, settings, folder, criterion, damp, seed, modules)
    return _Build(inputs, progress, stop).run()


def disk_bytes(
    structure: Structure, method: str = "ziplm", structures: Sequence[str] = ("heads", "ffn")
) -> int:
    """Return the bytes `build` writes to its folder, at most; a spill folder of the pass not counted."""
    criterion = criteria.get(method)
    total = 0
    for module in modules_of(structure, wanted_modes(structure, structures, None), Path()):
        columns = columns_in(module.part)
        if criterion.needs:
            total += 8 * COLUMN_ARRAYS * columns + 4096
        if "hessian" in criterion.needs:
            total += 4 * columns * columns
        total += len(module.modes) * (12 * columns + 8192)
    return total


class _Build:
    """One run: the pass, and after each of its layers the rankings of that layer."""

    def __init__(self, inputs: Inputs, progress: Progress | None, stop: threading.Event | None) -> None:
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

    def _rank(self, modules: Sequence[Module]) -> None:
        for module in list(modules):
            if self._stop is not None and self._stop.is_set():
                raise Interrupted("E130", "interrupted while units were ranked; finished modules are kept")
            with threads(self._inputs.settings.threads), memory_faults(f"the ranking of {module.name}"):
                self._rank_module(module)
            self._waiting.remove(module)

    def _rank_module(self, module: Module) -> None:
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


def _read(path: Path, key: str, module: Module, mode: str) -> Ranking | None:
    """Return the ranking in a file if it is this one, else None."""
    found = tensor_file.find(path, key)
    if found is None:
        return None
    header, about = found
    order, errors = tensor_file.read(header, "order"), tensor_file.read(header, "errors")
    return Ranking(module.part.layer, module.kind, mode, order, errors, about["size"], about["about"])
