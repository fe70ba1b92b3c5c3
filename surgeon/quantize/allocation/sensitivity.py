"""What storing one module in one format costs: the scores, from the best founded to the cheapest, and tables of them.

D = Q(W) - W is the error of the quantizer that is really used, [out, in]. Whatever the score, the losses of one
problem must come from one calibration text and one score: sums of raw output errors choose worse than equal bits do,
because layers differ in scale. A score that is no finite number is refused (E464). Of the scores here the Fisher diagonal at the module's output chose as well as
divergences measured one by one; the relative output error, which needs no gradient, came next.

Sources: Fisher diagonal at the output: NVIDIA ModelOpt's auto_quantize; |g D|: AutoRound's AutoScheme; relative
weight error: HIGGS (arXiv 2411.17525) with all coefficients 1; gated experts: ours.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

from surgeon.errors import InputError
from surgeon.quantize.allocation.menus import KEPT, Menu, Option

Kind = Literal["weight", "rel-output", "delta-loss", "fisher", "kl"]


def weight_error(weight: np.ndarray, delta: np.ndarray) -> float:
    """Return numel * |D|^2 / |W|^2: needs neither text nor gradient."""
    return weight.size * _ratio(_squares(delta), _squares(weight))


def relative_output_error(weight: np.ndarray, delta: np.ndarray, hessian: np.ndarray) -> float:
    """Return tr(D H D') / tr(W H W') with H = sum of x x' over the tokens, [in, in], at any scale."""
    return _ratio(_energy(delta, hessian), _energy(weight, hessian))


def delta_loss(gradient: np.ndarray, delta: np.ndarray) -> float:
    """Return sum |g D| with g = dL/dW, [out, in]."""
    return _usable(float(np.abs(gradient.astype(np.float64) * delta).sum()))


def fisher(
    gradients: np.ndarray, inputs: np.ndarray, delta: np.ndarray, gates: np.ndarray | None = None
) -> float:
    """Return sum over tokens and outputs of g^2 (D x)^2, the loss to second order with a diagonal Fisher matrix.

    Args:
        gradients: dL/dy at the module's output, [T, out], labels drawn from the model itself.
        inputs: [T, in].
        delta: [out, in].
        gates: routing weights [T], where ``gradients`` are those at the output of a block of experts and the
            module is the last one of an expert: its own gradient is the block's times the gate.
    """
    return output_fisher(gradients, inputs.astype(np.float64) @ delta.T.astype(np.float64), gates)


def output_fisher(gradients: np.ndarray, changes: np.ndarray, gates: np.ndarray | None = None) -> float:
    """Return sum over tokens and outputs of g^2 d^2 for a known change d of an output, [T, out].

    For an expert as a whole d is the change of its output before the gate, which weighs it.
    """
    products = gradients.astype(np.float64) * changes
    if gates is not None:
        products = products * gates.astype(np.float64)[:, None]
    return _squares(products)


def routed_error(gates: np.ndarray, changes: np.ndarray) -> float:
    """Return by how much the output of a block of experts changes when one expert does: eps of PMQ.

    Nothing else of the block has to be computed: the router's input and the other experts stay as they are, so the
    block changes by gate times change, on this expert's tokens only.

    Args:
        gates: routing weights as the block applies them, [T], of the tokens that selected the expert.
        changes: of the expert's output on these tokens, [T, out].

    Source: MC-MoE (arXiv 2410.06270, section 3.2), one Frobenius norm over all tokens.
    """
    return math.sqrt(_squares(changes.astype(np.float64) * gates.astype(np.float64)[:, None]))


def _energy(rows: np.ndarray, hessian: np.ndarray) -> float:
    rows = rows.astype(np.float64)
    return _usable(float(np.einsum("oi,oi->", rows @ hessian.astype(np.float64), rows)))


def _squares(values: np.ndarray) -> float:
    flat = values.astype(np.float64).ravel()
    return _usable(float(flat @ flat))


def _usable(value: float) -> float:
    if not math.isfinite(value):
        raise InputError("E464", f"a score of sensitivity is {value}: the model or the text gives no usable numbers",
                         help="check the model with: surgeon verify MODEL")  # fmt: skip
    return value


def _ratio(part: float, whole: float) -> float:
    """Return part / whole; a module that computes nothing cannot lose anything."""
    return _usable(part / whole) if whole > 0 else 0.0


@dataclass(frozen=True)
class Sensitivities:
    """Losses of modules by format.

    Attributes:
        kind: of the score.
        modules: M names.
        formats: S names of schemes.
        losses: float64 [M, S]; NaN where a module cannot be stored so, or was not measured.
        tokens: that each module saw, int64 [M]; 0 for an expert that no token selected.
        parameters: of each module, int64 [M].
        about: everything that the values depend on, as plain data; "calibration" identifies the text.
        estimated: modules whose losses are filled in, not measured.
    """

    kind: Kind
    modules: tuple[str, ...]
    formats: tuple[str, ...]
    losses: np.ndarray
    tokens: np.ndarray
    parameters: np.ndarray
    about: Mapping[str, Any] = field(default_factory=dict)
    estimated: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        count = len(self.modules)
        shapes = (self.losses.shape, self.tokens.shape, self.parameters.shape)
        if shapes != ((count, len(self.formats)), (count,), (count,)) or len(set(self.modules)) != count:
            raise ValueError(f"{count} modules, {len(self.formats)} formats, arrays {shapes}")
        if np.isinf(self.losses).any() or (self.losses < 0).any():
            row, column = np.argwhere(np.isinf(self.losses) | (self.losses < 0))[0]
            raise InputError("E464", f"the loss of {self.modules[row]} as {self.formats[column]} is "
                             f"{self.losses[row, column]}: the model or the text gives no usable numbers",
                             help="check the model with: surgeon verify MODEL")  # fmt: skip

    def filled(self, like: Mapping[str, str]) -> Sensitivities:
        """Return the table with losses for modules that saw no token.

        They get the mean loss of those of their kind that did, in proportion to parameters, and are named in
        ``estimated``. A kind of which no module saw a token keeps what it has.

        Args:
            like: module -> kind ("layer 3 experts, down"); modules not named are left alone.
        """
        kinds: dict[str, list[int]] = {}
        for row, module in enumerate(self.modules):
            if module in like:
                kinds.setdefault(like[module], []).append(row)
        losses, marked = self.losses.copy(), []
        for rows in kinds.values():
            seen = [row for row in rows if self.tokens[row] > 0]
            unseen = [row for row in rows if self.tokens[row] <= 0]
            if not seen or not unseen:
                continue
            each = self.losses[seen] / self.parameters[seen][:, None]
            for column in range(len(self.formats)):
                known = each[:, column][~np.isnan(each[:, column])]
                if len(known):
                    losses[unseen, column] = known.mean() * self.parameters[unseen]
            marked += [self.modules[row] for row in unseen]
        return replace(self, losses=losses, estimated=tuple(sorted({*self.estimated, *marked})))

    def combined(self, reference: Sensitivities) -> Sensitivities:
        """Return the losses of ``reference`` where it has any, elsewhere one's own on its scale.

        For each format the scale is the median of reference / own over the modules that both measured, so that
        a costly score need only be taken of some modules.

        Raises:
            InputError: E463 the texts differ; E464 a format was measured in common nowhere.
        """
        if self.about.get("calibration") != reference.about.get("calibration"):
            raise InputError("E463", "losses measured on different texts cannot be combined",
                             help="measure both on the same calibration text")  # fmt: skip
        row_of = {module: row for row, module in enumerate(reference.modules)}
        column_of = {name: column for column, name in enumerate(reference.formats)}
        losses = np.full_like(self.losses, np.nan)
        for column, name in enumerate(self.formats):
            own, other = self.losses[:, column], np.full(len(self.modules), np.nan)
            if name in column_of:
                for row, module in enumerate(self.modules):
                    if module in row_of:
                        other[row] = reference.losses[row_of[module], column_of[name]]
            both = (own > 0) & ~np.isnan(other)
            needed = ~np.isnan(own) & np.isnan(other)
            if needed.any() and not both.any():
                raise InputError("E464", f"{name} was measured in no module by both {self.kind} and {reference.kind}",
                                 help="measure some modules in that format by both")  # fmt: skip
            factor = float(np.median(other[both] / own[both])) if both.any() else 1.0
            losses[:, column] = np.where(np.isnan(other), own * factor, other)
        return replace(self, kind=reference.kind, losses=losses,
                       about={**self.about, "scaled_to": dict(reference.about)})  # fmt: skip

    def menus(self, sizes: Mapping[str, Mapping[str, tuple[int, int]]]) -> list[Menu]:
        """Return one menu for each module that ``sizes`` names.

        Args:
            sizes: module -> format (or `KEPT`) -> (bytes, bytes in headers at most), of the formats that can store it.

        Raises:
            InputError: E464 a module was measured in none of them.
        """
        rows = {module: row for row, module in enumerate(self.modules)}
        found = []
        for module, formats in sizes.items():
            row = rows.get(module)
            if row is None:
                raise InputError(
                    "E464", f"{module} was not measured", help="measure sensitivities of this model again"
                )
            options = []
            for name, (size, header) in formats.items():
                loss = 0.0 if name == KEPT else self._loss(row, name)
                if not np.isnan(loss):
                    options.append(Option(name, size, float(loss), header))
            if not options:
                raise InputError("E464", f"{module} was measured in none of {', '.join(formats)}",
                                 help="measure sensitivities for these formats")  # fmt: skip
            found.append(Menu(module, tuple(options), (module,), int(self.parameters[row])))
        return found

    def _loss(self, row: int, name: str) -> float:
        return float(self.losses[row, self.formats.index(name)]) if name in self.formats else float("nan")


def union(tables: Sequence[Sensitivities]) -> Sensitivities:
    """Return tables of different modules (one for each layer, say) as one.

    Raises:
        InputError: E463 they were measured by different scores or on different texts.
        ValueError: none; different formats; a module twice.
    """
    first = tables[0]
    if any(
        one.kind != first.kind or one.about.get("calibration") != first.about.get("calibration")
        for one in tables
    ):
        raise InputError("E463", "losses measured by different scores or on different texts cannot be compared",
                         help="measure all modules in one run")  # fmt: skip
    if any(one.formats != first.formats for one in tables):
        raise ValueError("tables of different formats")
    return replace(
        first, modules=tuple(module for one in tables for module in one.modules),
        losses=np.concatenate([one.losses for one in tables]), tokens=np.concatenate([one.tokens for one in tables]),
        parameters=np.concatenate([one.parameters for one in tables]),
        estimated=tuple(sorted({module for one in tables for module in one.estimated})),
    )  # fmt: skip
