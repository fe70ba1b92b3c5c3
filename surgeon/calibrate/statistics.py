"""Collectors: observers of a `surgeon.calibrate.walk.Walk` that sum up what passes through each module.

Sums are kept in float64 on the host, tokens are counted for every module, and nothing is divided
before the end: a module that no token reached is reported, not 0 / 0. All averages are over
tokens, so they do not depend on how samples were put into batches. ``state`` and ``restore``
exchange flat dictionaries of arrays, so that a walk can be resumed.
"""

from __future__ import annotations

import math
import re
import threading
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from surgeon.calibrate.settings import Settings
from surgeon.calibrate.skeleton import Skeleton
from surgeon.calibrate.statistics_file import Statistics, load, save
from surgeon.calibrate.walk import Walk
from surgeon.checkpoint.checkpoint import Checkpoint
from surgeon.checkpoint.header import printable
from surgeon.errors import InputError, Where

__all__ = [
    "ChannelNorms",
    "MeanAbsolute",
    "OutputCapture",
    "RouterCounts",
    "SecondMoments",
    "Statistics",
    "collect",
    "load",
    "save",
]

Choice = Callable[[str], bool]

_EMBEDDING = re.compile(r"embed|(^|\.)(wte|wpe)$")
_EXPERT = re.compile(r"^(?P<block>.+)\.experts\.(?P<number>\d+)\.(?P<matrix>[^.]+)$")


def takes_channels(module: str) -> bool:
    """Say whether a module's inputs are activations: all but embeddings, whose inputs are token ids."""
    return _EMBEDDING.search(module) is None


class _Sums:
    """float64 sums and token counts by module."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.tokens: dict[str, int] = {}

    def add(self, module: str, part: Tensor, tokens: int) -> None:
        part = part.to(device="cpu", dtype=torch.float64)
        held = self.sums.get(module)
        if held is None:
            self.sums[module] = part.clone()
        else:
            if held.shape != part.shape:
                raise ValueError(f"{module} had {tuple(held.shape)} channels before, {tuple(part.shape)} now")
            held += part
        self.tokens[module] = self.tokens.get(module, 0) + tokens

    def state(self) -> dict[str, np.ndarray]:
        found = {f"sum:{name}": value.numpy().copy() for name, value in self.sums.items()}
        return found | {f"tokens:{name}": np.array(count, np.int64) for name, count in self.tokens.items()}

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        self.sums = {
            name.removeprefix("sum:"): torch.from_numpy(np.array(value, np.float64))
            for name, value in state.items()
            if name.startswith("sum:")
        }
        self.tokens = {
            name.removeprefix("tokens:"): int(value)
            for name, value in state.items()
            if name.startswith("tokens:")
        }

    def statistics(
        self, kind: str, values: Mapping[str, Tensor], expected: Iterable[str], about: Mapping[str, Any]
    ) -> Statistics:
        arrays = {name: finite(name, value).numpy() for name, value in sorted(values.items())}
        unreached = tuple(sorted(set(expected) - {n for n, count in self.tokens.items() if count}))
        return Statistics(kind, arrays, {n: self.tokens[n] for n in arrays}, unreached, dict(about))


def finite(module: str, value: Tensor) -> Tensor:
    """Return a sum as it is.

    Raises:
        InputError: E384 an activation was NaN or infinite.
    """
    if not bool(torch.isfinite(value).all()):
        raise InputError(
            "E384", f"activations of {printable(module)} are not finite", where=Where(tensor=printable(module)),
            help="the model overflows in this precision, or its weights are damaged: try float32, and surgeon verify",
        )  # fmt: skip
    return value


class MeanAbsolute:
    """Mean over tokens of |x| for each input channel (AIM, arXiv 2502.02421).

    The reference adds up one mean per batch of equally long blocks and then divides by the largest
    channel, so only ratios count; the mean over all tokens has the same ratios for any batching.
    """

    kind = identity = "mean_absolute"

    def __init__(self, choose: Choice = takes_channels) -> None:
        self._choose = choose
        self._sums = _Sums()

    def wants(self, module: str) -> bool:
        return self._choose(module)

    def observe(self, module: str, inputs: Tensor, outputs: Tensor | None, sample: int | None) -> None:
        if len(inputs):
            self._sums.add(module, inputs.abs().sum(0, dtype=torch.float64), len(inputs))

    def state(self) -> dict[str, np.ndarray]:
        return self._sums.state()

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        self._sums.restore(state)

    def finish(self, expected: Iterable[str] = (), about: Mapping[str, Any] | None = None) -> Statistics:
        """Return the means, float64 [in] by module; of ``expected`` modules those without a token are named."""
        means = {name: total / self._sums.tokens[name] for name, total in self._sums.sums.items()}
        return self._sums.statistics(self.kind, means, expected, about or {})


class ChannelNorms:
    """L2 norm over all tokens of each input channel (Wanda, arXiv 2306.11695, equation 1)."""

    kind = identity = "channel_norms"

    def __init__(self, choose: Choice = takes_channels) -> None:
        self._choose = choose
        self._sums = _Sums()

    def wants(self, module: str) -> bool:
        return self._choose(module)

    def observe(self, module: str, inputs: Tensor, outputs: Tensor | None, sample: int | None) -> None:
        if len(inputs):
            # A float16 square ends at 255; float32 holds that of any 16-bit activation.
            self._sums.add(module, inputs.float().square().sum(0, dtype=torch.float64), len(inputs))

    def state(self) -> dict[str, np.ndarray]:
        return self._sums.state()

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        self._sums.restore(state)

    def finish(self, expected: Iterable[str] = (), about: Mapping[str, Any] | None = None) -> Statistics:
        """Return sqrt(sum x^2), float64 [in] by module."""
        norms = {name: total.sqrt() for name, total in self._sums.sums.items()}
        return self._sums.statistics(self.kind, norms, expected, about or {})


class SecondMoments:
    """X'X of each module's inputs, [in, in]; divided by nothing.

    Products are float32 over slices of at most ``slice_tokens`` tokens, slices add up in float64: a
    float32 sum over a whole calibration set would lose the small eigenvalues that solvers invert.
    """

    kind = identity = "second_moments"

    def __init__(self, choose: Choice = takes_channels, slice_tokens: int = 512) -> None:
        self._choose = choose
        self._slice = slice_tokens
        self._sums = _Sums()

    def wants(self, module: str) -> bool:
        return self._choose(module)

    def observe(self, module: str, inputs: Tensor, outputs: Tensor | None, sample: int | None) -> None:
        for start in range(0, len(inputs), self._slice):
            part = inputs[start : start + self._slice].float()
            self._sums.add(module, part.T @ part, len(part))

    def take(self, module: str) -> tuple[Tensor, int]:
        """Return X'X (float64) and the tokens of one module, and forget them: they are large."""
        return finite(module, self._sums.sums.pop(module)), self._sums.tokens.pop(module)

    def state(self) -> dict[str, np.ndarray]:
        return self._sums.state()

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        self._sums.restore(state)

    def finish(self, expected: Iterable[str] = (), about: Mapping[str, Any] | None = None) -> Statistics:
        """Return X'X, float64 [in, in] by module."""
        return self._sums.statistics(self.kind, self._sums.sums, expected, about or {})


Collector = MeanAbsolute | ChannelNorms | SecondMoments


def collect(
    checkpoint: Checkpoint,
    samples: Sequence[np.ndarray],
    settings: Settings,
    collector: Collector,
    *,
    about: Mapping[str, Any] | None = None,
    progress: Callable[[int, int], None] | None = None,
    stop: threading.Event | None = None,
    resume: bool = False,
) -> Statistics:
    """Run a model over samples and return what a collector summed up.

    Args:
        checkpoint: the model.
        samples: token ids, one array each.
        settings: where and how the model runs.
        about: plain data on the samples (`surgeon.calibrate.data.CalibrationSet.record`), kept with the result.
        progress, stop, resume: as `surgeon.calibrate.walk.Walk.run`.

    Returns:
        Statistics whose ``unreached`` names every wanted module that saw no token, experts among them.
    """
    with Walk(checkpoint, samples, settings) as walk:
        walk.run(collector, progress=progress, stop=stop, resume=resume)
        expected = [module for module in modules_of(walk.skeleton) if collector.wants(module)]
    made_on = {
        "model": [header.sha256 for header in checkpoint.headers],
        "view": getattr(checkpoint, "identity", ""),
        "precision": settings.dtype,
        "samples": len(samples),
        "tokens": int(sum(len(sample) for sample in samples)),
        "data": dict(about or {}),
    }
    return collector.finish(expected, made_on)


def modules_of(skeleton: Skeleton) -> list[str]:
    """Return the names of all modules that own a weight, per expert for experts; an untied head is one."""
    tables = [skeleton.pieces(layer) for layer in range(skeleton.layers)]
    tables += [skeleton.outer_pieces(), skeleton.head_pieces()]
    names = (p.name for table in tables for pieces in table.values() for p in pieces)
    return list(dict.fromkeys(name.removesuffix(".weight") for name in names if name.endswith(".weight")))


class RouterCounts:
    """How many tokens each expert was given, and how much probability its router gave it.

    Tokens are counted at the experts' own inputs, so they are exact whatever rule chose them. The
    probability mass is that over all experts before the choice: softmax of the router's logits,
    or their sigmoids divided by the sum (DeepSeek-V3); it needs a walk that hands over router outputs.

    Args:
        experts: routed experts per layer; some may never be seen.
        scoring: "softmax" or "sigmoid".
    """

    kind = identity = "router_counts"

    def __init__(self, experts: int, scoring: str = "softmax") -> None:
        if scoring not in {"softmax", "sigmoid"}:
            raise ValueError(f"scoring is softmax or sigmoid, not {scoring!r}")
        self._experts = experts
        self._scoring = scoring
        self._counted: dict[str, str] = {}
        self._counts = _Sums()
        self._mass = _Sums()

    def wants(self, module: str) -> bool:
        return _EXPERT.match(module) is not None or is_router(module)

    def observe(self, module: str, inputs: Tensor, outputs: Tensor | None, sample: int | None) -> None:
        place = _EXPERT.match(module)
        if place is not None:
            block, number = place["block"], int(place["number"])
            # An expert has two or three matrices and all see its tokens; one of them is counted.
            if self._counted.setdefault(block, place["matrix"]) == place["matrix"]:
                counts = torch.zeros(self._experts, dtype=torch.float64)
                counts[number] = len(inputs)
                self._counts.add(block, counts, len(inputs))
            return
        if outputs is None or not len(outputs):
            return
        logits = outputs.float()
        if self._scoring == "softmax":
            share = logits.softmax(-1)
        else:
            share = logits.sigmoid()
            share = share / share.sum(-1, keepdim=True)
        self._mass.add(module, share.sum(0, dtype=torch.float64), len(logits))

    def state(self) -> dict[str, np.ndarray]:
        found = {f"counts:{k}": v for k, v in self._counts.state().items()}
        found |= {f"mass:{k}": v for k, v in self._mass.state().items()}
        names = {
            f"matrix:{block}": np.frombuffer(matrix.encode(), np.uint8).copy()
            for block, matrix in self._counted.items()
        }
        return found | names

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        def part(prefix: str) -> dict[str, np.ndarray]:
            return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}

        self._counts.restore(part("counts:"))
        self._mass.restore(part("mass:"))
        self._counted = {block: matrix.tobytes().decode() for block, matrix in part("matrix:").items()}

    def finish(self, expected: Iterable[str] = (), about: Mapping[str, Any] | None = None) -> Statistics:
        """Return tokens per expert, float64 [experts] by MoE block (the parent of "experts").

        ``tokens`` of a block counts every choice: tokens times experts per token. Experts without a
        token are named in ``unreached`` as "BLOCK.experts.N".
        """
        silent = [
            f"{block}.experts.{number}"
            for block, counts in sorted(self._counts.sums.items())
            for number in (counts == 0).nonzero().flatten().tolist()
        ]
        found = self._counts.statistics(self.kind, self._counts.sums, expected, about or {})
        return Statistics(found.kind, found.values, found.tokens, (*found.unreached, *silent), found.about)

    def mass(self) -> dict[str, np.ndarray]:
        """Return each expert's mean probability, float64 [experts] by router; sums to 1."""
        return {
            name: finite(name, total / self._mass.tokens[name]).numpy()
            for name, total in sorted(self._mass.sums.items())
        }


def is_router(module: str) -> bool:
    """Say whether a module scores experts, by its name; ``gate_proj`` and shared experts' gates do not."""
    return re.search(r"(\.gate|\.router|\.router\.layer)$", module) is not None


class OutputCapture:
    """Outputs of chosen modules (and inputs of others), sample by sample, until they are taken.

    The walk must run with ``per_sample=True``. Beyond ``memory_limit`` bytes tensors go to files of
    their own in ``folder``. Pieces of one sample are joined in the order they came.
    """

    def __init__(
        self,
        outputs: Container[str],
        folder: Path,
        *,
        inputs: Container[str] = (),
        memory_limit: int = 1 << 28,
    ) -> None:
        self._outputs = outputs
        self._inputs = inputs
        self._folder = folder
        self._limit = memory_limit
        self._held = 0
        self._pieces: dict[tuple[str, str, int], list[Tensor | _Spilled]] = {}
        self._written = 0

    def wants(self, module: str) -> bool:
        return module in self._outputs or module in self._inputs

    def observe(self, module: str, inputs: Tensor, outputs: Tensor | None, sample: int | None) -> None:
        if sample is None:
            raise ValueError("outputs are kept sample by sample; the walk must not batch samples")
        if module in self._inputs:
            self._keep((module, "inputs", sample), inputs)
        if module in self._outputs:
            if outputs is None:
                raise ValueError(f"the walk does not compute the outputs of {module}")
            self._keep((module, "outputs", sample), outputs)

    def _keep(self, key: tuple[str, str, int], tensor: Tensor) -> None:
        copy = tensor.detach().to("cpu", copy=True).contiguous()
        pieces = self._pieces.setdefault(key, [])
        if self._held + copy.nbytes <= self._limit:
            self._held += copy.nbytes
            pieces.append(copy)
        else:
            self._written += 1
            pieces.append(_Spilled.write(self._folder / f"outputs-{id(self):x}-{self._written}", copy))

    def take(self, module: str, sample: int, part: str = "outputs") -> Tensor:
        """Return the outputs (or "inputs") [tokens, width] of one sample, and forget them.

        Raises:
            KeyError: they were not observed, or already taken.
        """
        pieces = []
        for piece in self._pieces.pop((module, part, sample)):
            if isinstance(piece, _Spilled):
                pieces.append(piece.read())
            else:
                self._held -= piece.nbytes
                pieces.append(piece)
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def close(self) -> None:
        """Forget everything, files included."""
        for pieces in self._pieces.values():
            for piece in pieces:
                if isinstance(piece, _Spilled):
                    piece.file.unlink(missing_ok=True)
        self._pieces.clear()
        self._held = 0


class _Spilled:
    """A tensor in a file of its own."""

    def __init__(self, file: Path, dtype: torch.dtype, shape: torch.Size) -> None:
        self.file = file
        self._dtype = dtype
        self._shape = shape

    @classmethod
    def write(cls, file: Path, tensor: Tensor) -> _Spilled:
        tensor.reshape(-1).view(torch.uint8).numpy().tofile(file)
        return cls(file, tensor.dtype, tensor.shape)

    def read(self) -> Tensor:
        """Return the tensor; its file is removed."""
        content = np.fromfile(self.file, dtype=np.uint8, count=math.prod(self._shape) * self._dtype.itemsize)
        self.file.unlink()
        return torch.from_numpy(content).view(self._dtype).view(self._shape)
