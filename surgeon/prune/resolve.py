"""What the weights that stay become once the cut is known, written to a file one matrix at a time.

`resolve` solves every module by itself, from the second moments of the dense model. `sequential` walks
through the dense and the pruned model side by side: a module is solved for the inputs it will really see
behind the pruned layers before it, so that it gives what the dense module gave. With X0 and X the inputs in
the dense and the pruned stream,

    W_K = (W0 X0 X_K' + lambda W0_K) (X_K X_K' + lambda I)^-1

a ridge towards the original weights. Within a layer the attention is solved first and the FFN sees its result.
Modules that the cut leaves whole keep their weights.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from surgeon.calibrate.conditions import memory_faults, threads
from surgeon.calibrate.damping import exact_products, shift
from surgeon.calibrate.settings import Settings
from surgeon.calibrate.statistics import finite
from surgeon.calibrate.walk import Walk
from surgeon.calibrate.watching import Watching
from surgeon.checkpoint.checkpoint import Checkpoint, open_path
from surgeon.checkpoint.header import Header, TensorInfo, printable
from surgeon.checkpoint.tensor_file import TensorFile
from surgeon.errors import InputError, Interrupted, Where
from surgeon.prune.closed_form import columns_of, ridge
from surgeon.prune.criteria import read_output
from surgeon.prune.database import Database
from surgeon.structure.cut import Cut, Kept
from surgeon.structure.parts import Attention, Ffn, Output, Structure
from surgeon.structure.views import MaskedView

Progress = Callable[[str, int, int], None]
"""Called with (what is done in a few words, steps done, steps)."""

SLICE = 2048
"""Tokens whose float32 products are summed before they join the float64 total."""

Part = Attention | Ffn


def cut_parts(structure: Structure, cut: Cut) -> Iterator[tuple[Part, Kept]]:
    """Yield the modules of which something stays and something goes, and what stays, in the order of the model."""
    for layer in cut.kept_layers:
        own = cut.layers[layer]
        assert own is not None
        attention, ffn = structure.attention[layer], structure.ffn[layer]
        if attention is not None and own.heads and len(own.heads) < attention.heads:
            yield attention, own.heads
        if ffn is not None and own.channels and len(own.channels) < ffn.width:
            yield ffn, own.channels


def input_columns(part: Part, kept: Kept) -> np.ndarray:
    """Return the input columns of a module's output matrix that stay, int64 ascending."""
    return columns_of(np.array(kept), part.head_dim if isinstance(part, Attention) else 1)


def resolve(
    database: Database,
    checkpoint: Checkpoint,
    structure: Structure,
    cut: Cut,
    out: Path,
    *,
    progress: Progress | None = None,
    stop: threading.Event | None = None,
) -> Checkpoint | None:
    """Write solved weights, and biases that make up for what goes, for every module that is cut.

    Args:
        database: of the same model; its criterion decides what is solved.
        checkpoint, structure: the model.
        cut: what is kept.
        out: a safetensors file; names and orientation are the source's, numbers float32.
        progress: called with ("solving weights", modules done, modules).
        stop: set it to stop after the module in progress.

    Returns:
        The file as a Checkpoint for the views of `surgeon.structure.views`; None when the criterion leaves all
        weights as they are, or nothing is cut.

    Raises:
        InputError: E314 a system cannot be solved. Interrupted: E130 ``stop`` was set.
    """
    parts = list(cut_parts(structure, cut))
    biases = {}
    for part, kept in parts:
        bias = database.bias(part.layer, _kind(part), kept)
        if bias is not None:
            biases[part.output.module] = bias
    solves = database.criterion.solves
    layout = _layout(checkpoint, parts if solves else [])
    for module, bias in biases.items():
        layout[f"{module}.bias"] = ("F32", (len(bias),))
    if not layout:
        return None
    with TensorFile(out, layout, {"method": database.method}) as file, threads(database.settings.threads):
        for number, (part, kept) in enumerate(parts if solves else []):
            _check(stop)
            weight, _ = database.solution(part.layer, _kind(part), kept)
            assert weight is not None
            file.write(part.output.weight, oriented(weight, part.output))
            if progress is not None:
                progress("solving weights", number + 1, len(parts))
        for module, bias in biases.items():
            file.write(f"{module}.bias", bias.numpy())
    return open_path(out)


def sequential(
    database: Database,
    checkpoint: Checkpoint,
    structure: Structure,
    cut: Cut,
    out: Path,
    samples: Sequence[np.ndarray],
    settings: Settings,
    *,
    progress: Progress | None = None,
    stop: threading.Event | None = None,
) -> Checkpoint | None:
    """Write weights solved layer by layer on the pruned prefix.

    Args:
        database: tells the damping; its criterion has no part in this.
        checkpoint, structure, cut, out: as in `resolve`; the residual stream is not cut.
        samples: token ids, one array each.
        settings: of both passes, which share its memory. Nothing is kept for resuming.
        progress: called with ("solving weights in sequence", layers done, layers).
        stop: set it to stop.

    Returns:
        The file as a Checkpoint, None when no module is cut in part.

    Raises:
        UsageError, InputError: as `surgeon.structure.views.MaskedView`, and E312 a module saw no token, E314 a
            system cannot be solved. Interrupted: E130 ``stop`` was set.
    """
    parts = list(cut_parts(structure, cut))
    if not parts:
        return None
    solved = _Growing(f"{checkpoint.label} (solved)")
    view = MaskedView(checkpoint, structure, cut, solved)
    own = replace(settings, memory_limit=settings.budget() * 2 // 5, spill=None)
    with ExitStack() as held:
        file = held.enter_context(TensorFile(out, _layout(checkpoint, parts), {"method": "sequential"}))
        dense = held.enter_context(closing(_Stream(checkpoint, samples, own)))
        pruned = held.enter_context(closing(_Follower(view, samples, own, dense)))
        last = max(part.layer for part, _ in parts)

        def solve_layer(layer: int) -> None:
            solved.forget()
            for part, kept in parts:
                if part.layer == layer:
                    weight = _solve_part(part, kept, checkpoint, dense, pruned, database.damp, stop)
                    values = oriented(weight, part.output)
                    file.write(part.output.weight, values)
                    solved.put(part.output.weight, values)

        pruned.before = solve_layer
        # The pruned stream goes first: its layer needs the inputs of the dense one, which its own step replaces.
        steps: list[Any] = [walk.steps(_Nothing()) for walk in (pruned, dense)]
        for generator in steps:
            held.enter_context(closing(generator))
        for stage in range(last + 2):
            _check(stop)
            for one in steps[: 1 if stage > last else 2]:
                next(one)
            if progress is not None and stage:
                progress("solving weights in sequence", stage, last + 1)
    return open_path(out)


def oriented(weight: Tensor, output: Output) -> np.ndarray:
    """Return an [out, in] matrix as its tensor is stored: a Conv1D is [in, out]."""
    return (weight if output.input_axis == 1 else weight.T).contiguous().cpu().numpy()


def _kind(part: Part) -> str:
    return "attention" if isinstance(part, Attention) else "ffn"


def _layout(
    checkpoint: Checkpoint, parts: Sequence[tuple[Part, Kept]]
) -> dict[str, tuple[str, tuple[int, ...]]]:
    layout: dict[str, tuple[str, tuple[int, ...]]] = {}
    for part, kept in parts:
        shape = list(checkpoint.tensors[part.output.weight].shape)
        shape[part.output.input_axis] = len(input_columns(part, kept))
        layout[part.output.weight] = ("F32", tuple(shape))
    return layout


def _check(stop: threading.Event | None) -> None:
    if stop is not None and stop.is_set():
        raise Interrupted("E130", "interrupted while weights were solved; nothing was kept")


# ---- two streams -------------------------------------------------------------------------------


class _Stream(Walk):
    """A pass that can run the layer it stands before, up to one module, without moving on."""

    def fill_layer(self, layer: int) -> None:
        """Read a layer's weights as they are now."""
        tensors = self.skeleton.read_layer(layer, experts_too=not self._memory.streams(layer))
        self._module = self.skeleton.fill(layer, tensors)

    def inputs_of(self, layer: int, module: str, number: int) -> Tensor | None:
        """Return what a module of the filled layer sees in one batch, [tokens, in]; None when it does not run."""
        states = self._states
        assert states is not None
        seen = _Seen(module)
        watching = Watching(seen)
        batch = self.batches[number]
        with watching.attached(self._module, self.skeleton.pieces(layer)):
            watching.begin(batch)
            try:
                self.skeleton.call(layer, states.get(number), self._call(layer, batch))
            except _Enough:
                pass
            finally:
                watching.end()
        return seen.inputs


class _Follower(_Stream):
    """The pruned stream: before it moves through a layer, the layer is solved.

    Attributes:
        before: called with the number of a layer when both streams stand before it.
    """

    before: Callable[[int], None]

    def __init__(
        self, view: Checkpoint, samples: Sequence[np.ndarray], settings: Settings, dense: _Stream
    ) -> None:
        super().__init__(view, samples, settings)
        assert [b.samples for b in dense.batches] == [b.samples for b in self.batches]

    def _layer(self, layer: int, loader: Any, *rest: Any) -> None:
        loader.take(layer)  # it was read ahead, before its weights were known
        self.before(layer)
        super()._layer(layer, loader, *rest)


class _Nothing:
    """An observer of nothing."""

    def wants(self, module: str) -> bool:
        return False

    def observe(self, module: str, inputs: Tensor, outputs: Tensor | None, sample: int | None) -> None:
        raise AssertionError("nothing is wanted")


class _Enough(Exception):
    """What was wanted has been seen; the rest of the layer need not run."""


class _Seen:
    """Keeps the inputs of one module."""

    def __init__(self, module: str) -> None:
        self._module = module
        self.inputs: Tensor | None = None

    def wants(self, module: str) -> bool:
        return module == self._module

    def observe(self, module: str, inputs: Tensor, outputs: Tensor | None, sample: int | None) -> None:
        self.inputs = inputs
        raise _Enough


class _Growing:
    """A Checkpoint of the matrices solved for the layer at hand."""

    folder: Path | None = None
    config: dict[str, Any] | None = None
    headers: tuple[Header, ...] = ()

    def __init__(self, label: str) -> None:
        self.label = label
        self.tensors: dict[str, TensorInfo] = {}
        self._values: dict[str, np.ndarray] = {}

    def put(self, name: str, values: np.ndarray) -> None:
        self._values[name] = values.reshape(-1)
        self.tensors[name] = TensorInfo(name, "F32", tuple(values.shape), Path(self.label), 0, values.nbytes)

    def forget(self) -> None:
        """Drop everything: a layer is not read again once both streams are behind it."""
        self.tensors.clear()
        self._values.clear()

    def read(self, name: str, start: int, stop: int) -> np.ndarray:
        return self._values[name][start:stop]

    def read_bytes(self, name: str, start: int, stop: int) -> np.ndarray:
        return self._values[name].view(np.uint8)[start:stop]

    def granularity(self, name: str) -> int:
        return 1


def _solve_part(
    part: Part,
    kept: Kept,
    checkpoint: Checkpoint,
    dense: _Stream,
    pruned: _Stream,
    damp: float,
    stop: threading.Event | None,
) -> Tensor:
    """Return the kept columns of one output matrix, solved on the pruned stream: float32 [out, kept]."""
    module, layer = part.output.module, part.layer
    columns = torch.from_numpy(input_columns(part, kept))
    weight = read_output(checkpoint, part.output)
    sums = _Sums(weight, columns)
    for stream in (dense, pruned):
        stream.fill_layer(layer)
    try:
        for number in range(len(dense.batches)):
            _check(stop)
            wanted, found = (stream.inputs_of(layer, module, number) for stream in (dense, pruned))
            if wanted is not None and found is not None:
                sums.add(wanted, found)
    finally:
        for stream in (dense, pruned):
            stream.skeleton.empty(layer)
    return sums.solve(damp, module)


class _Sums:
    """Y X_K' and X_K X_K' over tokens, with Y = W0 X0 of the dense stream; Y itself is never kept."""

    def __init__(self, weight: Tensor, columns: Tensor) -> None:
        self._weight = weight
        self._columns = columns
        out, count = len(weight), len(columns)
        self._target = torch.zeros(out, count, dtype=torch.float64)
        self._gram = torch.zeros(count, count, dtype=torch.float64)
        self._diagonal = torch.zeros(weight.shape[1], dtype=torch.float64)
        self._tokens = 0

    def add(self, dense: Tensor, pruned: Tensor) -> None:
        device = pruned.device
        for name in ("_weight", "_columns", "_target", "_gram", "_diagonal"):
            setattr(self, name, getattr(self, name).to(device))
        with exact_products():
            for wanted, found in zip(dense.split(SLICE), pruned.split(SLICE), strict=True):
                found = found.float()
                kept = found[:, self._columns]
                y = wanted.to(device).float() @ self._weight.T
                self._target += y.T @ kept
                self._gram += kept.T @ kept
                self._diagonal += found.square().sum(0, dtype=torch.float64)
                self._tokens += len(found)

    def solve(self, damp: float, module: str) -> Tensor:
        if not self._tokens:
            raise InputError("E312", f"no calibration token reached {printable(module)}",
                             where=Where(tensor=printable(module)), help="the model does not run this module")  # fmt: skip
        finite(module, self._diagonal)
        gram = self._gram.div_(self._tokens)
        original = self._weight[:, self._columns].double()
        known = self._target.div_(self._tokens).addmm_(original, gram, alpha=-1)
        every = torch.arange(len(gram), device=gram.device)
        diagonal = self._diagonal / self._tokens
        with exact_products(), memory_faults(f"the weights of {module}"):
            change, _ = ridge(known, gram, every, lambda r: shift(diagonal, r)[self._columns], damp, module)
        return (original + change).float().cpu()
