"""Checks of one step: every option by itself, then all of them together, with the models of the commands.

Codes: E224 wrong type or range; else those of the request models, placed in the file.
"""

from __future__ import annotations

import json
import re
from typing import Annotated, Any

from pydantic import TypeAdapter, ValidationError

from surgeon.errors import UsageError
from surgeon.recipe.merge_step import check_parameters
from surgeon.recipe.recipe import StepOutput, replaced
from surgeon.recipe.step_reading import StepReading
from surgeon.recipe.yaml import KeyPath
from surgeon.scalars import show

_OPTION = re.compile(r"--([a-z][a-z0-9-]*)")


def validate(step: StepReading) -> None:
    for name, value in list(step.options.items()):
        info = step.verb.options.get(name) or _hidden(step, name)
        if (
            info is None
            or name == "param"
            or name in step.verb.references
            or (name == "models" and step.verb.name == "merge")
        ):
            continue
        step.options[name] = _typed(step, name, info, value)
    usable = {name: value for name, value in step.options.items() if name not in step.wrong}
    values = replaced(
        usable,
        lambda one: "<unknown>" if one is None else str(one) if isinstance(one, StepOutput) else one,
    )
    if step.verb.name == "merge":
        check_parameters(step, values)
    try:
        _build(step, values)
    except UsageError as error:
        for one in (error, *error.others):
            place = _place_of(step, one.message)
            # What follows from a mistake that was reported already is none of its own.
            if step.sound or place != step.path:
                step.reading.refuse(one.code, one.message, place, one.help, key=True)
    except ValidationError as error:
        for one in error.errors() if step.sound else ():
            _refuse_field(step, str(one["loc"][0]) if one["loc"] else "", one)


def _hidden(step: StepReading, name: str) -> Any:
    """Return the field of an option that has a shape of its own (lambda, scheme)."""
    for model in step.verb.classes:
        for field_name, info in model.model_fields.items():
            if name in (info.alias, field_name):
                return info
    return None


def _typed(step: StepReading, name: str, info: Any, value: Any) -> Any:
    """Check one option by itself, as strictly as JSON: no text for numbers, no numbers for text."""
    if name == "keep_experts":
        return step.each(value, step.places[name], lambda one, _: one if isinstance(one, str) else repr(one))
    annotation = str(info.annotation)
    if (
        "tuple" in annotation
        and not isinstance(value, (list, dict))
        and value is not None
        and "Literal" not in annotation
    ):
        value = [value]
    try:
        json.dumps(value, allow_nan=False)
        _adapter(info).validate_json(json.dumps(value), strict=True)
    except ValidationError as error:
        _refuse_field(step, name, error.errors()[0])
    except ValueError:
        step.wrong.add(name)
        step.refuse("E224", f"{name} is {value!r}", step.places[name], "a finite number")
    return value


def _refuse_field(step: StepReading, name: str, error: Any) -> None:
    step.wrong.add(name)
    place = step.places.get(name, step.path)
    inner = [part for part in error["loc"] if isinstance(part, int)]
    message = str(error["msg"]).removeprefix("Value error, ")
    given = error.get("input")
    if error["type"] == "missing":
        step.refuse("E224", f"{step.verb.name} needs {name}", step.path, f"{name}: ...", key=True)
        return
    step.refuse(
        "E224",
        f"{name} is {show(given)}: {message[:1].lower()}{message[1:]}",
        (*place, *inner),
        f'"surgeon {step.verb.name} --help" says what each option takes',
    )


def _build(step: StepReading, values: dict[str, Any]) -> None:
    """Build the request and let it check what belongs together."""
    verb = step.verb.name
    if verb == "merge":
        from surgeon.merge.request import MergeRequest, resolve

        resolve(MergeRequest(**values))
    elif verb == "prune":
        _pruned(step, values)
    elif verb == "edit":
        values.pop("model", None)
        step.verb.classes[0](**values).checked()
    else:
        step.verb.classes[0](**_as_text_lists(values)).checked()


def _pruned(step: StepReading, values: dict[str, Any]) -> None:
    from surgeon.prune import request as dense
    from surgeon.prune.experts import request as experts

    only = experts.ExpertRequest.model_fields.keys() - dense.PruneRequest.model_fields.keys()
    method = str(values.get("method") or "").replace("_", "-").lower()
    known = experts if method in experts.METHODS or (not method and only & values.keys()) else dense
    built = known.build(**values)
    if len(built.targets) > 1:
        raise UsageError("E266", "a step makes one model, and several targets make several", help="give one, and vary it with sweep:")  # fmt: skip


def _place_of(step: StepReading, message: str) -> KeyPath:
    """Return where the option stands that a message of a request speaks of."""
    for word in _OPTION.findall(message):
        name = word.replace("-", "_")
        for key in (name, f"target_{name}", f"param.{name}", f"models.{name}"):
            if key in step.places:
                return step.places[key]
    for name in re.findall(r'"([^"]+)"', message):
        for key in (f"param.{name}", f"models.{name}"):
            if key in step.places:
                return step.places[key]
        for key, value in step.options.items():
            if value == name and key in step.places:
                return step.places[key]
    for key, value in step.options.items():
        single = value[0] if isinstance(value, list) and len(value) == 1 else value
        if isinstance(single, (int, float)) and not isinstance(single, bool) and f" {single:g} " in message:
            return step.places.get(key, step.path)
    for name in sorted(step.places, key=len, reverse=True):
        word = name.rpartition(".")[2]
        if re.search(rf"\b{re.escape(word)}\b", message):
            return step.places[name]
    return step.path


def _adapter(info: Any) -> TypeAdapter[Any]:
    """Return what checks one field alone: its type and its limits, without its alias."""
    kind: Any = info.annotation
    for limit in info.metadata:
        kind = Annotated[kind, limit]
    return TypeAdapter(kind)


def _as_text_lists(values: dict[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
