"""The value a parameter has for one tensor: scopes, filters, gradients.

Scopes from highest to lowest: the source's own parameters, the slice's, the module's, the
global ones, the method's default. Within a scope a setting is one of

    0.5                                       the value
    [0.1, 0.9]                                a gradient over the layers of the slice
    [{filter: mlp, value: 0.5}, {value: 1}]   the first filter that matches decides

A filter is a case-sensitive substring of the tensor name; `*` or none matches always. When no
filter matches, or the list is empty, the next scope is asked. Shared parameters are matched
against the output tensor's name, per-model ones against that model's input tensor name (they
differ when slices shift layers).

Errors: `UsageError` E212 (wrong type, not finite, malformed), E257 (required but not found).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from surgeon.errors import UsageError, Where
from surgeon.merge.settings import ParameterLike, Unusable, evaluate
from surgeon.merge.spec import MergeSpec, ModelRef, ParameterMap

Path = tuple[Any, ...]


@dataclass(frozen=True)
class Scope:
    """One parameter map and where it was written; ``model`` is set for a source's own map."""

    level: str
    path: Path
    settings: ParameterMap
    model: ModelRef | None = None


@dataclass(frozen=True)
class SliceScopes:
    """The scopes that count for the tensors of one slice, highest first."""

    shared: tuple[Scope, ...]
    per_model: dict[ModelRef, tuple[Scope, ...]]
    where: dict[tuple, Where]

    def of(self, model: ModelRef | None) -> tuple[Scope, ...]:
        """Return the scopes for one model's parameters, or for shared ones (None)."""
        return self.shared if model is None else self.per_model.get(model, self.shared)


@dataclass(frozen=True)
class Resolved:
    """A value and where it came from.

    Attributes:
        value: of the parameter's kind.
        level: "source", "slice", "module", "global" or "default".
        path: YAML path of the setting, () for a default.
        filter: text of the filter that chose it, if any.
        gradient: True when it was read off a list over layers.
    """

    value: Any
    level: str = "default"
    path: Path = ()
    filter: str | None = None
    gradient: bool = False


def gradient_position(index: int, count: int) -> float:
    """Return t of layer ``index`` in a slice of ``count`` layers: i/(L-1), and 1 when L is 1.

    Tensors outside layers (embedding, final norm, output head) use t = 0.
    """
    return index / (count - 1) if count > 1 else 1.0


def slice_scopes(spec: MergeSpec, module: int = 0, piece: int = 0) -> SliceScopes:
    """Collect the scopes for the ``piece``-th slice of the ``module``-th module of a merge."""
    shared: list[Scope] = []
    own: dict[ModelRef, list[Scope]] = {}
    for scope, place in _all_scopes(spec):
        if place not in ((), (module,), (module, piece)):
            continue
        if scope.model is None:
            shared.append(scope)
        else:
            own.setdefault(scope.model, []).append(scope)
    order = {"slice": 0, "module": 1, "global": 2}
    shared.sort(key=lambda scope: order[scope.level])
    return SliceScopes(
        tuple(shared), {model: (*scopes, *shared) for model, scopes in own.items()}, spec.where
    )


def resolve_tensor(
    scopes: SliceScopes,
    parameters: Mapping[str, ParameterLike],
    *,
    output: str,
    inputs: Mapping[ModelRef, str],
    t: float = 0.0,
    base: ModelRef | None = None,
) -> tuple[dict[str, Resolved], dict[ModelRef, dict[str, Resolved]]]:
    """Resolve all parameters of a method for one output tensor.

    Args:
        scopes: from `slice_scopes`.
        parameters: the method's, by name.
        output: name of the tensor to be written.
        inputs: each model's name of the tensor it is read from.
        t: position among the slice's layers, see `gradient_position`.
        base: of this model only parameters marked ``every_input`` are asked.

    Returns:
        Shared parameters by name, and per-model ones by model and name.

    Raises:
        UsageError: E257 a required parameter is not given, E212 a value has the wrong type.
    """
    shared = {
        name: resolve(parameter, scopes, output, t)
        for name, parameter in parameters.items()
        if not parameter.per_model
    }
    per_model = {
        model: {
            name: resolve(parameter, scopes, source, t, model=model)
            for name, parameter in parameters.items()
            if parameter.per_model and (model != base or getattr(parameter, "every_input", False))
        }
        for model, source in inputs.items()
    }
    return shared, per_model


def resolve(
    parameter: ParameterLike,
    scopes: SliceScopes,
    tensor: str,
    t: float = 0.0,
    *,
    model: ModelRef | None = None,
) -> Resolved:
    """Find the value of one parameter for one tensor, and say where it came from."""
    for scope in scopes.of(model):
        if parameter.name not in scope.settings:
            continue
        path = (*scope.path, parameter.name)
        try:
            found = evaluate(scope.settings[parameter.name], parameter, tensor, t)
        except Unusable as fault:
            raise UsageError(
                "E212",
                f"{parameter.name}: {fault.message}",
                where=_with_tensor(place_of(scopes.where, (*path, *fault.path)), tensor),
                help=fault.help,
            ) from None
        if found is not None:
            value, filter, gradient = found
            return Resolved(value, scope.level, path, filter, gradient)
    if parameter.default is None and getattr(parameter, "required", True):
        of = f" of model {model}" if model is not None else ""
        raise UsageError(
            "E257",
            f'the required parameter "{parameter.name}"{of} is not given for tensor {tensor}',
            where=_with_tensor(_first_mention(scopes, parameter.name, model), tensor),
            help=f"add {parameter.name}, or a last entry without a filter when it is a list of filters",
        )
    return Resolved(parameter.default)


def unmatched_filters(
    spec: MergeSpec, outputs: Iterable[str], inputs: Mapping[ModelRef, Iterable[str]] | None = None
) -> list[tuple[str, Where | None]]:
    """Return a warning and its position for every filter that is part of no tensor name.

    Args:
        spec: the merge.
        outputs: names of all output tensors.
        inputs: each model's input tensor names, where they differ from the output names.
    """
    outputs = list(outputs)
    named = {model: list(names) for model, names in (inputs or {}).items()}
    everything = sorted({*outputs, *(name for names in named.values() for name in names)})
    found = []
    for scope, _ in _all_scopes(spec):
        names = everything if scope.model is None else named.get(scope.model, outputs)
        for parameter, setting in scope.settings.items():
            entries = setting if isinstance(setting, list) else [setting]
            for n, entry in enumerate(entries):
                text = entry.get("filter") if isinstance(entry, dict) else None
                if text in (None, "*") or any(text in name for name in names):
                    continue
                inner = (n, "filter") if isinstance(setting, list) else ("filter",)
                found.append(
                    (
                        f'filter "{text}" of {parameter} matches no tensor'
                        + (" (filters are plain parts of names, not patterns)" if "*" in text else ""),
                        place_of(spec.where, (*scope.path, parameter, *inner)),
                    )
                )
    return found


def place_of(where: Mapping[tuple, Where], path: Path) -> Where | None:
    """Return the position of a path or of the nearest enclosing one that is known."""
    while path and path not in where:
        path = path[:-1]
    return where.get(path)


def _all_scopes(spec: MergeSpec) -> Iterator[tuple[Scope, tuple[int, ...]]]:
    """Yield every parameter map with () for global, (module,) or (module, slice)."""
    yield Scope("global", ("parameters",), spec.parameters), ()
    for m, module in enumerate(spec.modules):
        top: Path = ("modules", module.name) if module.name else ()
        whole = (*top, "models") in spec.where
        yield Scope("module", (*top, "parameters"), module.parameters), (m,)
        for s, piece in enumerate(module.slices):
            yield Scope("slice", (*top, "slices", s, "parameters"), piece.parameters), (m, s)
            for n, source in enumerate(piece.sources):
                path = (*top, "models", n) if whole else (*top, "slices", s, "sources", n)
                yield Scope("source", (*path, "parameters"), source.parameters, source.model), (m, s)


def _first_mention(scopes: SliceScopes, name: str, model: ModelRef | None) -> Where | None:
    for scope in scopes.of(model):
        if name in scope.settings:
            return place_of(scopes.where, (*scope.path, name))
    highest = scopes.of(model)[0].path if scopes.of(model) else ()
    return place_of(scopes.where, highest)


def _with_tensor(where: Where | None, tensor: str) -> Where:
    if where is None:
        return Where(tensor=tensor)
    return Where(where.file, where.line, where.column, tensor)
