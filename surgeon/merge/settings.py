"""One parameter setting as YAML gives it: scalar, gradient over layers, or list of filters.

    0.5                                       the value
    [0.1, 0.9]                                a gradient over the layers of the slice
    [{filter: mlp, value: 0.5}, {value: 1}]   the first filter that matches decides

A filter is a case-sensitive substring of the tensor name; `*` or none matches always. A
setting is silent (None) for a tensor when no filter matches or its list is empty.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Protocol

from surgeon.scalars import plain_number, show

Path = tuple[Any, ...]
_MIXED = "a list holds either values or {filter, value} entries, not both"
_BOOLEAN_WORDS = {
    **dict.fromkeys(("true", "yes", "on", "t", "y", "1"), True),
    **dict.fromkeys(("false", "no", "off", "f", "n", "0"), False),
}


class ParameterLike(Protocol):
    """What must be known of a parameter: see the catalogue of methods."""

    @property
    def name(self) -> str: ...
    @property
    def kind(self) -> str: ...
    @property
    def per_model(self) -> bool: ...
    @property
    def default(self) -> Any: ...


class Unusable(Exception):
    """A value that cannot be used, before it is known where it stands."""

    def __init__(self, message: str, help: str | None = None, path: Path = ()) -> None:
        super().__init__(message)
        self.message, self.help, self.path = message, help, path


def faults_in(setting: Any, parameter: ParameterLike | None) -> Iterator[tuple[Path, str, str | None]]:
    """Yield (path inside the setting, message, help) for all that is wrong with it for any tensor.

    Without a parameter only the shape is judged.
    """
    if isinstance(setting, dict):
        yield from _entry_faults(setting, parameter, ())
    elif isinstance(setting, list) and any(isinstance(item, dict) for item in setting):
        for n, item in enumerate(setting):
            if isinstance(item, dict):
                yield from _entry_faults(item, parameter, (n,))
            else:
                yield (n,), _MIXED, None
    else:
        yield from _value_faults(setting, parameter, ())


def evaluate(
    setting: Any, parameter: ParameterLike, tensor: str, t: float
) -> tuple[Any, str | None, bool] | None:
    """Return (value, filter text, came from a gradient), or None when the setting is silent.

    Raises:
        Unusable: the value has the wrong type or shape, or is not finite.
    """
    if isinstance(setting, dict):
        return _entry_value(setting, parameter, tensor, t, ())
    if not isinstance(setting, list):
        return _coerce(setting, parameter), None, False
    if any(isinstance(item, dict) for item in setting):
        if not all(isinstance(item, dict) for item in setting):
            raise Unusable(_MIXED)
        for n, item in enumerate(setting):
            if _matches(item.get("filter"), tensor):
                # The first match decides, even when its value is an empty list.
                return _entry_value(item, parameter, tensor, t, (n,))
        return None
    return None if not setting else (_along(setting, parameter, t), None, True)


def _entry_value(
    entry: dict, parameter: ParameterLike, tensor: str, t: float, path: Path
) -> tuple[Any, str | None, bool] | None:
    text = entry.get("filter")
    if not _matches(text, tensor):
        return None
    value = entry.get("value")
    try:
        if isinstance(value, list):
            return (_along(value, parameter, t), text, True) if value else None
        return _coerce(value, parameter), text, False
    except Unusable as fault:
        raise Unusable(fault.message, fault.help, (*path, "value", *fault.path)) from None


def _matches(filter: str | None, tensor: str) -> bool:
    return filter is None or filter == "*" or filter in tensor


def _along(values: list, parameter: ParameterLike, t: float) -> Any:
    """Read a gradient at t: numbers piecewise linearly, anything else by the step it falls on."""
    converted = []
    for n, value in enumerate(values):
        try:
            converted.append(_coerce(value, parameter))
        except Unusable as fault:
            raise Unusable(fault.message, fault.help, (n,)) from None
    scaled = t * (len(converted) - 1)
    low = int(scaled)
    if parameter.kind not in ("float", "int"):
        return converted[low]
    high = min(low + 1, len(converted) - 1)
    part = scaled - low
    return _coerce((1 - part) * converted[low] + part * converted[high], parameter)


def _coerce(value: Any, parameter: ParameterLike) -> Any:
    """Convert a scalar to the parameter's kind; text from YAML 1.1 files may hold a number."""
    kind = parameter.kind
    if kind == "str" and isinstance(value, str):
        return value
    if kind == "bool":
        if isinstance(value, bool):
            return value
        if isinstance(value, (int, float)) and value in (0, 1):
            return bool(value)
        if isinstance(value, str) and value.strip().lower() in _BOOLEAN_WORDS:
            return _BOOLEAN_WORDS[value.strip().lower()]
        raise Unusable(f"{show(value)} is neither true nor false")
    if kind in ("float", "int") and not isinstance(value, bool):
        number = _number(value)
        if kind == "float" and number is not None:
            return float(number)
        if number is not None and number == int(number):
            return int(number)
        if number is not None:
            raise Unusable(f"{show(value)} is not a whole number")
    article = {"float": "a number", "int": "a whole number", "str": "text"}[kind]
    fix = "write plain decimal numbers such as 0.5 or 1e-4" if isinstance(value, str) else None
    raise Unusable(f"{show(value)} is not {article}", fix)


def _number(value: Any) -> int | float | None:
    """Return a finite number, None when the value is no number at all."""
    if isinstance(value, str):
        text = value.strip()
        number: int | float | None = plain_number(text)
        if number is None:
            try:
                beyond = not math.isfinite(float(text.lower().replace(".inf", "inf").replace(".nan", "nan")))
            except ValueError:
                return None
            if beyond:
                raise Unusable(f"{show(value)} is not a finite number")
            return None
    elif isinstance(value, (int, float)):
        number = value
    else:
        return None
    try:
        if math.isfinite(float(number)):
            return number
    except OverflowError:
        pass
    raise Unusable(f"{show(value)} is not a finite number")


def _entry_faults(
    entry: dict, parameter: ParameterLike | None, path: Path
) -> Iterator[tuple[Path, str, str | None]]:
    for key in entry:
        if key not in ("filter", "value"):
            yield (*path, key), f'unknown key {show(key)}, an entry has "filter" and "value"', None
    text = entry.get("filter")
    if text is not None and not isinstance(text, str):
        yield (*path, "filter"), f"the filter {show(text)} is not text", "put it in quotes"
    if "value" not in entry:
        yield path, 'an entry with a filter needs a "value"', None
    else:
        yield from _value_faults(entry["value"], parameter, (*path, "value"))


def _value_faults(
    value: Any, parameter: ParameterLike | None, path: Path
) -> Iterator[tuple[Path, str, str | None]]:
    items = (
        [((*path, n), item) for n, item in enumerate(value)] if isinstance(value, list) else [(path, value)]
    )
    for place, item in items:
        if item is None or isinstance(item, (list, dict)):
            yield place, f"{show(item)} where a value is expected", None
        elif parameter is not None:
            try:
                _coerce(item, parameter)
            except Unusable as fault:
                yield place, fault.message, fault.help
