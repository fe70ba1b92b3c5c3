"""What calibration text says about the inputs of output matrices: moments by channel, second moments.

`ChannelStatistics` watches a pass. Every module's results go to a file of their own as soon as its layer
is done and are forgotten, so that memory holds those of one layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from surgeon.calibrate.damping import exact_products
from surgeon.calibrate.statistics import finite
from surgeon.checkpoint.header import Header, printable
from surgeon.checkpoint.tensor_file import TensorFile, find, read
from surgeon.errors import InputError, Where
from surgeon.prune.criteria import Moments

FLOAT64_COLUMNS = 8192
"""Second moments of up to so many channels are added up in float64, of more in float32."""

SLICE = 2048
"""Tokens whose float32 products are summed before they join the total."""

BLOCK = 1024
"""Columns of second moments computed at once; only the upper triangle of blocks is."""

ROWS = 512
"""Rows that are converted at once."""


class ChannelStatistics:
    """An observer of a `surgeon.calibrate.walk.Walk` that sums up the inputs of chosen modules.

    Args:
        files: module -> where its results go.
        key: what results depend on, by module; a complete file with the same key is not made again.
        needs: subset of `surgeon.prune.criteria.NEEDS`; "samples" takes a pass with one sample a batch.
    """

    def __init__(self, files: Mapping[str, Path], key: Callable[[str], str], needs: frozenset[str]) -> None:
        self._files = dict(files)
        self._key = key
        self._needs = needs
        self._sums: dict[str, _Sums] = {}
        self.identity = "+".join(sorted(needs))
        self.done = {name for name, path in self._files.items() if find(path, key(name)) is not None}

    def wants(self, module: str) -> bool:
        return module in self._files

    def observe(self, module: str, inputs: Tensor, outputs: Tensor | None, sample: int | None) -> None:
        if module in self.done or not len(inputs):
            return
        if module not in self._sums:
            self._sums[module] = _Sums(inputs, self._needs)
        self._sums[module].add(inputs, sample)

    def settle(self) -> None:
        """Write what was seen of every module and forget it.

        Raises:
            InputError: E384 an activation was not finite.
        """
        for module in sorted(self._sums):
            self._sums[module].write(module, self._files[module], self._key(module))
            self.done.add(module)
            del self._sums[module]

    def state(self) -> dict[str, np.ndarray]:
        """Return the names of finished modules; their results are in files by now."""
        self.settle()
        return {module: np.array(1, np.int64) for module in self.done}

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        """Take up an interrupted pass.

        Raises:
            Stale: results that its earlier part had written are gone.
        """
        if not state.keys() <= self.done:
            raise Stale


class Stale(Exception):
    """An interrupted pass cannot be continued because results of its earlier part are gone."""


class _Sums:
    """Sums over tokens of one module's inputs."""

    def __init__(self, like: Tensor, needs: frozenset[str]) -> None:
        width, device = like.shape[1], like.device
        self.tokens = 0
        self.mean = torch.zeros(width, dtype=torch.float64, device=device)
        self.spread = torch.zeros_like(self.mean)
        self.square = torch.zeros_like(self.mean)
        self.absolute = torch.zeros_like(self.mean)
        self.active = torch.zeros(width, dtype=torch.int64, device=device)
        self.samples = torch.zeros_like(self.mean) if "samples" in needs else None
        wide = torch.float64 if width <= FLOAT64_COLUMNS else torch.float32
        self.products = torch.zeros(width, width, dtype=wide, device=device) if "hessian" in needs else None

    def add(self, inputs: Tensor, sample: int | None) -> None:
        if self.samples is not None:
            if sample is None:
                raise ValueError("statistics by sample take a pass with one sample a batch")
            self.samples += inputs.abs().mean(0, dtype=torch.float64).square()
        for rows in inputs.split(ROWS):
            self._moments(rows.double())
        if self.products is not None:
            with exact_products():
                for rows in inputs.split(SLICE):
                    self._products(rows.float())

    def _moments(self, rows: Tensor) -> None:
        """Merge mean and spread of some rows into those so far (Chan, Golub and LeVeque, 1979)."""
        count = len(rows)
        mean = rows.mean(0)
        apart = mean - self.mean
        total = self.tokens + count
        self.spread += (rows - mean).square().sum(0) + apart.square() * (self.tokens * count / total)
        self.mean += apart * (count / total)
        self.square += rows.square().sum(0)
        self.absolute += rows.abs().sum(0)
        self.active += (rows != 0).sum(0)
        self.tokens = total

    def _products(self, rows: Tensor) -> None:
        assert self.products is not None
        for start in range(0, rows.shape[1], BLOCK):
            stop = min(start + BLOCK, rows.shape[1])
            self.products[:stop, start:stop] += rows[:, :stop].T @ rows[:, start:stop]

    def write(self, module: str, path: Path, key: str) -> None:
        finite(module, self.square)
        columns = {
            "mean": self.mean,
            "variance": self.spread / self.tokens,
            "norm": self.square.sqrt(),
            "absolute": self.absolute / self.tokens,
        }
        if self.samples is not None:
            columns["sample_absolute"] = self.samples.sqrt()
        width = len(self.mean)
        layout: dict[str, tuple[str, tuple[int, ...]]] = {name: ("F64", (width,)) for name in columns}
        layout["active"] = ("I64", (width,))
        if self.products is not None:
            layout["hessian"] = ("F32", (width, width))
        about = {"key": key, "module": module, "tokens": self.tokens}
        with TensorFile(path, layout, about) as out:
            for name, value in columns.items():
                out.write(name, value.cpu().numpy())
            out.write("active", self.active.cpu().numpy())
            if self.products is not None:
                for start in range(0, width, BLOCK):
                    out.write("hessian", self._rows(module, start, min(start + BLOCK, width)))

    def _rows(self, module: str, start: int, stop: int) -> np.ndarray:
        """Return rows of the mean of x x', float32, from the upper triangle."""
        assert self.products is not None
        rows = torch.cat([self.products[:start, start:stop].T, self.products[start:stop, start:]], dim=1)
        return (finite(module, rows) / self.tokens).float().cpu().numpy()


def read_moments(header: Header, about: Mapping[str, Any]) -> Moments:
    """Return the moments in a module's file."""
    names = ("mean", "variance", "norm", "absolute", "active", "sample_absolute")
    found = {name: read(header, name) for name in names if name in header.tensors}
    return Moments(tokens=int(about["tokens"]), **found)


def read_hessian(header: Header) -> Tensor:
    """Return the mean of x x' in a module's file, float32 [in, in].

    Raises:
        InputError: E312 the file holds none.
    """
    if "hessian" not in header.tensors:
        raise InputError("E312", f"{printable(header.file.name)} holds no second moments", where=Where(str(header.file)),
                         help="calibrate again with a method that needs them")  # fmt: skip
    return torch.from_numpy(read(header, "hessian"))
