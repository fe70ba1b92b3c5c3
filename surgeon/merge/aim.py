"""Activation-informed merging: pull the channels that matter to a model back towards it.

AIM (arXiv 2502.02421, section 3) comes after any merge m of a model b. With a_c the mean |x| of
input channel c over calibration text in b, divided by the largest of its module,

    f_c = 1 - a_c (1 - omega),        y = b + (m - b) f_c

Omega 1 leaves the merge as it is, omega 0 keeps b wherever the largest channel is read. Weights of
matrices and norms are damped; embeddings, biases and buffers stay as merged. So does the output
head of a model with tied embeddings, whose matrix is the embedding.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from surgeon import architectures
from surgeon.architectures.base import Expected
from surgeon.architectures.naming import layer_of
from surgeon.calibrate.statistics_file import Statistics
from surgeon.checkpoint.header import printable
from surgeon.errors import InputError, UsageError, Where
from surgeon.plan import Block, Operation, WorkItem
from surgeon.traits import head_name

OMEGA = 0.4
"""For long-to-short merges on top of TIES (arXiv 2503.20641, appendix); the reference code's own default is 0.2."""

Shape = tuple[int, ...]

CHUNK = 1 << 15
"""Elements damped at once: what is touched then stays in the processor's cache."""


# ---- the operation -----------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Damped(Operation):
    """y = b + (m - b) f, m what another operation makes, before it is rounded to the output's type.

    Where f is 1 the bits are the inner operation's, where f is 0 (or m equals b) they are the base's.

    Attributes:
        inner: makes m; all its reduce passes run unchanged.
        base: index of b among the inputs.
        factors: float32, broadcast over the tensor, with as many axes.
        rounding: (storage code, random key) where the inner operation rounds stochastically: its own
            rounding is left out and happens here, after damping.
        layout: shape of ``factors``; equal bytes in another shape are another operation.
        exact: whether a factor is 1, and whether one is 0.
    """

    inner: Operation
    base: int
    factors: np.ndarray
    rounding: tuple[str, int] | None = None
    layout: Shape = field(init=False)
    exact: tuple[bool, bool] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "layout", tuple(self.factors.shape))
        object.__setattr__(self, "exact", (bool((self.factors == 1).any()), bool((self.factors == 0).any())))

    @property
    def name(self) -> str:  # type: ignore[override]
        return f"{self.inner.name} with aim"

    @property
    def unit(self) -> str:  # type: ignore[override]
        return self.inner.unit

    @property
    def scratch(self) -> int:  # type: ignore[override]
        return self.inner.scratch + 24

    def reduces(self) -> int:
        return self.inner.reduces()

    def reduce(self, step: int, block: Block, carried: Any) -> Any:
        return self.inner.reduce(step, block, carried)

    def merge(self, step: int, left: Any, right: Any) -> Any:
        return self.inner.merge(step, left, right)

    def finish(self, step: int, state: Any, carried: Any, elements: int) -> Any:
        return self.inner.finish(step, state, carried, elements)

    def map(self, block: Block, carried: Any) -> list[np.ndarray]:
        (merged,) = self.inner.map(unrounded(block), carried)
        base = block.value(self.base, "F64" if merged.dtype == np.float64 else "F32")
        result = np.empty_like(merged)
        for start in range(0, len(merged), CHUNK):
            part = slice(start, min(start + CHUNK, len(merged)))
            factors = spread(self.factors, block.shape, block.start + part.start, block.start + part.stop)
            self._damp(merged[part], base[part], factors, result[part])
        if self.rounding is not None:
            return [self._rounded(result, block, *self.rounding)]
        return [result]

    def _damp(self, merged: np.ndarray, base: np.ndarray, factors: np.ndarray, out: np.ndarray) -> None:
        """Write b + (m - b) f to ``out``, without rounding where f is 0 or 1."""
        with np.errstate(over="ignore", invalid="ignore"):  # what does not fit is reported when it is encoded
            np.subtract(merged, base, out=out)
            out *= factors
            # As `task_vectors.added`: a change of 0 leaves the base's bits, where -0.0 + 0.0 would give 0.0.
            np.subtract(out.dtype.type(0), out, out=out)
            np.subtract(base, out, out=out)
        for value, source, present in ((1, merged, self.exact[0]), (0, base, self.exact[1])):
            if present:
                np.copyto(out, source, where=factors == value)  # b + (m - b) rounds; 0 * inf is NaN

    def _rounded(self, values: np.ndarray, block: Block, code: str, key: int) -> np.ndarray:
        from surgeon.merge.methods.dler import stochastic
        from surgeon.seeds import uniform

        return stochastic(values, code, uniform(key, block.start, block.stop))

    def measure(self, block: Block, results: list[np.ndarray], carried: Any) -> np.ndarray | None:
        return self.inner.measure(block, results, carried)

    def summary(self, carried: Any, measured: np.ndarray | None) -> dict[str, Any] | None:
        return self.inner.summary(carried, measured)


def damped(inner: Operation, base: int, factors: np.ndarray | None) -> Operation:
    """Return ``inner`` followed by damping towards input ``base``.

    Without factors, with factors that are all 1, and for operations that pass stored bytes on, the
    inner operation itself comes back: the plan is then the one without AIM.
    """
    if factors is None or inner.copies or bool((factors == 1).all()):
        return inner
    rounding = None
    if getattr(inner, "stochastic", False) and inner.stored in {"BF16", "F16"}:  # type: ignore[attr-defined]
        rounding = (inner.stored, inner.rounding_key)  # type: ignore[attr-defined]
        inner = replace(inner, stochastic=False)  # type: ignore[type-var]
    return Damped(inner, base, np.ascontiguousarray(factors, dtype=np.float32), rounding)


def unrounded(block: Block) -> Block:
    """Return the block with float32 as target, so that compiled kernels give numbers; widened inputs are shared."""
    wide = Block(
        block.name, block.shape, block.raw, block.codes, block.start, block.stop, block.ordinal,
        block.position, "F32",
    )  # fmt: skip
    wide._values = block._values
    return wide


def spread(factors: np.ndarray, shape: Shape, start: int, stop: int) -> np.ndarray:
    """Return the factors of elements [start, stop) of a flattened tensor, 1-D.

    Args:
        factors: broadcastable to ``shape``.
        shape: of the tensor.
    """
    factors = factors.reshape((1,) * (len(shape) - factors.ndim) + factors.shape)
    if not shape:
        return np.broadcast_to(factors, (stop - start,))
    inner = math.prod(shape[1:])
    if stop <= start or not inner:
        return np.empty(0, dtype=factors.dtype)
    first, last = -(-start // inner), stop // inner  # whole slices of axis 0

    def slice_of(number: int) -> np.ndarray:
        return factors[0 if len(factors) == 1 else number]

    if first > last:
        return spread(slice_of(last), shape[1:], start - last * inner, stop - last * inner)
    parts = []
    if start < first * inner:
        parts.append(spread(slice_of(first - 1), shape[1:], start - (first - 1) * inner, inner))
    if first < last:
        body = factors if len(factors) == 1 else factors[first:last]
        parts.append(np.broadcast_to(body, (last - first, *shape[1:])).reshape(-1))
    if stop > last * inner:
        parts.append(spread(slice_of(last), shape[1:], 0, stop - last * inner))
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


# ---- factors from statistics -------------------------------------------------------------------


def channel_factors(activations: np.ndarray, omega: float) -> np.ndarray:
    """Return f_c = 1 - a_c (1 - omega), a divided by its maximum; float32 [in], in [omega, 1].

    Only ratios of activations count. A module that only saw zeros has nothing to protect: f = 1.

    Args:
        activations: mean |x| of each input channel [in], not negative.
        omega: in [0, 1].
    """
    check_omega(omega)
    largest = float(activations.max(initial=0.0))
    if largest == 0.0:
        return np.ones(activations.shape, dtype=np.float32)
    return (1.0 - activations / largest * (1.0 - omega)).astype(np.float32)


def check_omega(omega: float) -> None:
    """Raise E232 when omega lies outside [0, 1]."""
    if not 0.0 <= omega <= 1.0:
        raise UsageError("E232", f"aim: omega {omega:g} is out of range",
                         help="0 keeps the base where its largest channels are read, 1 leaves the merge as it is")  # fmt: skip


@dataclass(frozen=True)
class Damping:
    """The factors of a whole model.

    Attributes:
        omega: what they were made with.
        factors: tensor name -> float32 factors with the tensor's number of axes; tensors without an entry stay as merged.
        unreached: modules no calibration token reached, and experts among them: their factors are 1.
        silent: modules whose inputs were all 0: their factors are 1.
        tied: the head is skipped, stored or not.
    """

    omega: float
    factors: Mapping[str, np.ndarray]
    unreached: tuple[str, ...] = ()
    silent: tuple[str, ...] = ()
    tied: bool = False

    def notes(self) -> list[str]:
        """Return sentences for the user."""
        found = [f"aim: {len(self.factors)} tensors are damped towards the base with omega {self.omega:g}"]
        if self.tied:
            found.append("aim: the output head is the embedding and stays as merged")
        if self.unreached:
            found.append(
                f"aim: no calibration token reached {_listed(self.unreached)}; merged without damping"
            )
        if self.silent:
            found.append(f"aim: the inputs of {_listed(self.silent)} were all 0; merged without damping")
        return found

    def record(self) -> dict[str, Any]:
        """Return plain data for the manifest."""
        return {
            "omega": self.omega,
            "tensors": len(self.factors),
            "unreached": list(self.unreached),
            "silent": list(self.silent),
            "tied_head_skipped": self.tied,
        }


def _listed(names: Sequence[str], most: int = 3) -> str:
    shown = ", ".join(printable(n) for n in names[:most])
    return shown + (f" and {len(names) - most} more" if len(names) > most else "")


@dataclass(frozen=True)
class _Weight:
    """A tensor that has input channels: its statistics' modules, one or one per expert."""

    name: str
    shape: Shape
    expected: Expected | None
    modules: tuple[tuple[str, ...], ...]  # alternatives, for every expert

    @property
    def fused(self) -> bool:
        return len(self.shape) == 3


def damping(
    tensors: Mapping[str, Shape],
    config: Mapping[str, Any] | None,
    statistics: Statistics,
    omega: float,
    *,
    tied: bool,
) -> Damping:
    """Return the factors of every tensor of the base.

    Args:
        tensors: name -> shape, as the base stores them (plus an output head that it only has untied).
        config: the base's config.json; a known architecture says what each tensor is.
        statistics: mean |x| by module, of the base.
        omega: in [0, 1].
        tied: the output's head is its embedding.

    Raises:
        UsageError: E232 omega is out of range.
        InputError: E355 the statistics are of another kind, or of another model.
    """
    check_omega(omega)
    if statistics.kind != "mean_absolute":
        raise InputError(
            "E355",
            f"aim needs mean_absolute statistics, these are {printable(statistics.kind)}",
            help="leave the file out and they are measured on the base",
        )
    head = head_name(tensors)
    weights = [w for w in _weights(tensors, config) if not (tied and w.name == head)]
    reader = _Reader(statistics.values, weights)
    if omega == 1.0:
        return Damping(omega, {}, tied=tied)
    factors: dict[str, np.ndarray] = {}
    unreached: dict[str, None] = {}
    silent: dict[str, None] = {}
    for weight in weights:
        rows = []
        for alternatives in weight.modules:
            module = next((m for m in alternatives if m in statistics.values), None)
            activation = None if module is None else statistics.values[module]
            if module is None or activation is None or not statistics.tokens[module]:
                unreached[alternatives[0]] = None
                rows.append(None)
            else:
                if not activation.any():
                    silent[module] = None
                rows.append(channel_factors(activation, omega))
        found = reader.arranged(weight, rows)
        if found is not None:
            factors[weight.name] = found
    if not factors and weights:
        raise InputError("E355", "the statistics name no module of this model",
                         help="they were measured on another model; measure them on the base of this merge")  # fmt: skip
    return Damping(omega, factors, tuple(sorted(unreached)), tuple(sorted(silent)), tied)


def damp_items(
    items: Sequence[WorkItem], base: str, damping: Damping | Mapping[str, Damping]
) -> tuple[list[WorkItem], list[str]]:
    """Wrap the operations of a planned merge.

    Args:
        items: one for each output tensor.
        base: key of the model that is pulled towards, as in the items' inputs.
        damping: its factors by its own tensor names; or one for each output model (a sweep over omega).

    Returns:
        The items, and the names of damped tensors that do not read the base, which stay as they are.
    """
    found: list[WorkItem] = []
    lacking: list[str] = []
    for item in items:
        index = next((i for i, ref in enumerate(item.inputs) if ref.model == base), None)
        tasks = []
        for task in item.tasks:
            output = task.outputs[0]
            chosen = damping if isinstance(damping, Damping) else damping[output.model]
            name = output.name if index is None else item.inputs[index].name
            if head_name((output.name,)) and not head_name((name,)):
                name = output.name  # an embedding stands for the head of a model that ties them
            factors = chosen.factors.get(name)
            if index is None:
                if factors is not None and not task.operation.copies:
                    lacking.append(output.name)
                tasks.append(task)
            else:
                tasks.append(replace(task, operation=damped(task.operation, index, factors)))
        found.append(replace(item, tasks=tuple(tasks)))
    return found, lacking


_NO_WEIGHT = re.compile(r"(bias|buffer|sink|correction|scale|embedding)$")
_FUSED = re.compile(
    r"(^|\.)(experts|block_sparse_moe)\.(gate_up_proj|up_proj|down_proj|input_linear|output_linear)(\.weight)?$"
)
_INNER = ("gate_proj", "up_proj", "gate_up_proj", "w1", "w3")
_OUTER = ("down_proj", "w2")


def _weights(tensors: Mapping[str, Shape], config: Mapping[str, Any] | None) -> list[_Weight]:
    """Return the tensors that have input channels, sorted by name."""
    known = _record(tensors, config)
    found = []
    for name in sorted(tensors):
        shape, expected = tuple(tensors[name]), known.get(name)
        kind = expected.kind if expected is not None else ""
        if "embed" in name or _NO_WEIGHT.search(kind) or not all(shape):
            continue
        if len(shape) == 3 and (kind.startswith("expert") or _FUSED.search(name)):
            found.append(_Weight(name, shape, expected, _expert_modules(name, shape[0])))
        elif name.endswith((".weight", ".gamma")) and len(shape) in (1, 2):
            if expected is None and re.search(r"(^|\.)(wte|wpe)\.weight$", name):
                continue
            modules = (name.removesuffix(".weight"), name.removesuffix(".gamma"))
            found.append(_Weight(name, shape, expected, (tuple(dict.fromkeys(modules)),)))
    return found


def _record(tensors: Mapping[str, Shape], config: Mapping[str, Any] | None) -> Mapping[str, Expected]:
    architecture = architectures.get((config or {}).get("model_type"))
    if architecture is None or config is None:
        return {}
    return architecture.layout(config, tensors).tensors


def _expert_modules(name: str, count: int) -> tuple[tuple[str, ...], ...]:
    """Return, for each expert of a fused tensor, the names its part may be observed under.

    Gate and up projection read the same tokens: either one's statistics are both's.
    """
    inside = re.match(r"(.*\.experts)\.", name)
    container = inside[1] if inside else f"{name.removesuffix('.weight').rpartition('.')[0]}.experts"
    leaves = _OUTER if re.search(r"(down_proj|output_linear)", name) else _INNER
    return tuple(tuple(f"{container}.{expert}.{leaf}" for leaf in leaves) for expert in range(count))


class _Reader:
    """Decides along which axis of a tensor its input channels lie.

    The number of channels in the statistics decides; a square matrix follows the others of its layer
    (GPT-2 stores [in, out], everything else [out, in]), a square stack of experts its record.
    """

    def __init__(self, values: Mapping[str, np.ndarray], weights: Sequence[_Weight]) -> None:
        self._votes: dict[Any, list[int]] = {}
        for weight in weights:
            module = weight.modules[0][0]
            if len(weight.shape) != 2 or module not in values or layer_of(weight.name) is None:
                continue
            channels = len(values[module])
            if weight.shape[0] != weight.shape[1] and channels in weight.shape:
                self._votes.setdefault(self._place(weight.name), []).append(weight.shape.index(channels))

    def _place(self, name: str) -> Any:
        place = layer_of(name)
        return None if place is None else (place.stack, place.index)

    def arranged(self, weight: _Weight, rows: Sequence[np.ndarray | None]) -> np.ndarray | None:
        """Return factors with the tensor's number of axes, or None where all of them are 1."""
        present = [row for row in rows if row is not None]
        if not present or all((row == 1).all() for row in present):
            return None
        channels = len(present[0])
        if any(len(row) != channels for row in present):
            raise self._unfit(weight, "different numbers of")
        axis = self._axis(weight, channels)
        if not weight.fused:
            layout = [1] * len(weight.shape)
            layout[axis] = channels
            return present[0].reshape(layout)
        stacked = np.stack([np.ones(channels, np.float32) if row is None else row for row in rows])
        return stacked[:, None, :] if axis == 2 else stacked[:, :, None]

    def _axis(self, weight: _Weight, channels: int) -> int:
        first = 1 if weight.fused else 0
        fits = [axis for axis in range(first, len(weight.shape)) if weight.shape[axis] == channels]
        if not fits:
            raise self._unfit(weight, f"{channels}")
        if len(fits) == 1:
            return fits[0]
        if weight.fused:
            axes = weight.expected.axes if weight.expected is not None else ()
            wanted = "expert_ffn" if weight.modules[0] and weight.modules[0][0].endswith(_OUTER) else "hidden"
            return axes.index(wanted) if wanted in axes else fits[-1]
        votes = self._votes.get(self._place(weight.name), [])
        return 0 if votes.count(0) > votes.count(1) else 1

    def _unfit(self, weight: _Weight, count: str) -> InputError:
        name = printable(weight.name)
        return InputError(
            "E355", f"the statistics have {count} input channels for {name}, its shape is {list(weight.shape)}",
            where=Where(tensor=name), help="they were measured on another model; measure them on the base of this merge",
        )  # fmt: skip
