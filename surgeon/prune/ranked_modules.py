"""The attentions and FFNs that are ranked, what their results depend on, and what is on disk of them already."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from surgeon.calibrate.placement import Placement
from surgeon.calibrate.settings import Settings
from surgeon.checkpoint import tensor_file
from surgeon.checkpoint.checkpoint import Checkpoint
from surgeon.checkpoint.header import printable
from surgeon.errors import InputError, UsageError, Where
from surgeon.prune.criteria import Context, Criterion, Moments
from surgeon.prune.hessians import read_hessian, read_moments
from surgeon.prune.levels import useful_modes
from surgeon.prune.ranking import MODES
from surgeon.structure.parts import Attention, Ffn, Structure

VERSION = 1
"""Part of every key: changes when results change."""

STRUCTURES = {"heads": "attention", "ffn": "ffn"}
"""What the command line calls it -> kind of a ranking."""


@dataclass(frozen=True)
class Module:
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


def columns_in(part: Attention | Ffn) -> int:
    return part.width if isinstance(part, Ffn) else part.heads * part.head_dim


def wanted_modes(
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


def modules_of(structure: Structure, wanted: dict[str, tuple[str, ...]], folder: Path) -> Iterator[Module]:
    for layer in range(structure.layers):
        for kind in ("attention", "ffn"):
            part = structure.attention[layer] if kind == "attention" else structure.ffn[layer]
            if part is not None and wanted.get(kind):
                yield Module(part, kind, wanted[kind], folder)


class Inputs:
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
        modules: tuple[Module, ...],
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

    def module(self, layer: int, kind: str) -> Module:
        for module in self.modules:
            if (module.part.layer, module.kind) == (layer, kind):
                return module
        raise InputError(
            "E316",
            f"layer {layer} has no ranking of {kind}",
            where=Where(self.checkpoint.label),
            help="--no-resume ranks again; report it if it happens again",
        )

    @cached_property
    def _model(self) -> str:
        return digest_of(
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
        return digest_of(
            model=self._model, text=self._text, dtype=self.settings.dtype, module=module, needs=needs
        )

    def ranking_key(self, module: Module, mode: str, weight: str) -> str:
        """Return what a ranking depends on; ``weight`` is the digest of the matrix."""
        return digest_of(
            statistics=self.statistics_key(module.name) if self.criterion.needs else self._model,
            weight=weight,
            module=module.name,
            mode=mode,
            method=[self.criterion.name, self.criterion.version],
            damp=self.damp,
            seed=self.seed,
        )

    def _statistics(self, module: Module) -> Any:
        found = tensor_file.find(module.statistics, self.statistics_key(module.name))
        if found is None:
            raise InputError("E312", f"no calibration token reached {printable(module.name)}",
                             where=Where(tensor=printable(module.name)),
                             help="the model does not run this layer, or the results of the pass were removed")  # fmt: skip
        return found

    def moments(self, module: Module) -> Moments | None:
        return read_moments(*self._statistics(module)) if self.criterion.needs else None

    def hessian(self, module: Module) -> Tensor:
        return read_hessian(self._statistics(module)[0])

    def context(self, module: Module, mode: str, *, ranked: bool = True) -> Context:
        """Return what a criterion sees of a module; only where it is to be ranked with second moments."""
        wanted = ranked and "hessian" in self.criterion.needs
        hessian = self.hessian(module).to(self.device) if wanted else None
        return Context(
            self.checkpoint, module.part, mode, self.damp, self.seed, self.moments(module), hessian, self.device
        )  # fmt: skip


def digest_of(**content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
