"""What a merge method is: its inputs and parameters as data, and a function that binds them.

A method is one file in `surgeon.merge.methods` with one constant METHOD. Its name is the
module's name; nothing is registered anywhere else.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from surgeon.errors import UsageError
from surgeon.plan import Operation


@dataclass(frozen=True)
class Parameter:
    """One parameter of a method.

    Attributes:
        name: as users write it.
        kind: "float", "int", "bool" or "str".
        help: one line.
        per_model: a value for each model; else one for all.
        every_input: with ``per_model``: the base needs one, too (linear, passthrough).
        default: value when nothing is given; None with ``required`` unset means "not set".
        required: nothing is assumed (mergekit YAML).
        cli: default on the command line where it differs from mergekit's.
        low, high: closed range; ``open_low`` excludes the lower end.
        choices: allowed words of a "str".
        inert: accepted for compatibility, without effect.
        native_only: not known to mergekit; a YAML that sets it runs here only.
    """

    name: str
    kind: str
    help: str
    per_model: bool = False
    every_input: bool = False
    default: Any = None
    required: bool = False
    cli: Any = None
    low: float | None = None
    high: float | None = None
    open_low: bool = False
    choices: tuple[str, ...] = ()
    inert: bool = False
    native_only: bool = False

    def check(self, value: Any, method: str) -> None:
        """Raise E212 when a resolved value is out of range."""
        if value is None:
            return
        if self.choices and value not in self.choices:
            raise UsageError(
                "E212", f'{method}: {self.name} is "{value}"', help=f"one of: {', '.join(self.choices)}"
            )
        if self.kind in {"float", "int"}:
            number = float(value)
            low, high = self.low, self.high
            below = low is not None and (number < low or (self.open_low and number == low))
            if not math.isfinite(number) or below or (high is not None and number > high):
                left = "(" if self.open_low else "["
                span = f"{left}{'-inf' if low is None else low}, {'inf' if high is None else high}]"
                raise UsageError(
                    "E212", f"{method}: {self.name} {value} is out of range", help=f"it must be in {span}"
                )


@dataclass(frozen=True)
class Binding:
    """Resolved parameters of one tensor, ready for a method's ``bind``.

    Attributes:
        name: output tensor name.
        shape: its shape.
        count: number of inputs, base included.
        base: index of the base among the inputs, or None.
        shared: parameter -> value.
        each: per input, parameter -> value; the base's is empty unless every_input.
        work: storage code arithmetic rounds to after every step ("F32" on the command line).
        ordinals: per input, its number in the request, for random streams.
        input_names: per input, the tensor's name there, for random streams.
        seed: seed of random methods.
        stored: storage code of the output tensor, for methods that round on their own.
        native: False when mergekit's numerics are to be reproduced.
    """

    name: str
    shape: tuple[int, ...]
    count: int
    base: int | None
    shared: dict[str, Any]
    each: tuple[dict[str, Any], ...]
    work: str = "F32"
    ordinals: tuple[int, ...] = ()
    input_names: tuple[str, ...] = ()
    seed: int = 0
    native: bool = True
    stored: str = "F32"

    @property
    def others(self) -> tuple[int, ...]:
        """Indices of the inputs that are not the base."""
        return tuple(i for i in range(self.count) if i != self.base)

    def of(self, name: str) -> tuple[Any, ...]:
        """Return a per-model parameter for the non-base inputs, in order."""
        return tuple(self.each[i][name] for i in self.others)


@dataclass(frozen=True)
class Method:
    """A merge method.

    Attributes:
        name: with underscores; equals the module name.
        title: how people call it.
        summary: one sentence for listings.
        bind: Binding -> Operation for one tensor.
        parameters: see `Parameter`.
        base: "required", "optional", "ignored" (a base is one more input) or "forbidden".
        models: least and most number of inputs including the base; None = no limit.
        reference: where it was published.
        page: longer text for ``surgeon methods NAME``: formula, advice, failure modes.
        group_by: name of the parameter whose value ("tensor", "layer", "global") says which
            tensors share their reduce passes.
    """

    name: str
    title: str
    summary: str
    bind: Callable[[Binding], Operation]
    parameters: tuple[Parameter, ...] = ()
    base: str = "required"
    models: tuple[int, int | None] = (2, None)
    reference: str = ""
    page: str = ""
    random: bool = False
    group_by: str | None = None
    table: dict[str, Parameter] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        self.table.update({p.name: p for p in self.parameters})
