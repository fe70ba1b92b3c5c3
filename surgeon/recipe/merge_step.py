"""The shape of a merge step: a list of models with their weights, the method's parameters, overrides.

Codes: E224 wrong type or range; E211, E212 as the command.
"""

from __future__ import annotations

from typing import Any

from surgeon.errors import UsageError
from surgeon.recipe.step_reading import StepReading
from surgeon.recipe.yaml import KeyPath
from surgeon.scalars import show


def read_models(step: StepReading, value: Any, place: KeyPath) -> None:
    if not isinstance(value, list) or not value:
        step.refuse(
            "E224",
            f"{show(value)} where a list of models is expected",
            place,
            "models: [{model: long, weight: 0.6}, ...]",
        )
        return
    listed: list[str] = []
    own: dict[str, dict[str, Any]] = {}
    for number, item in enumerate(value):
        here = (*place, number)
        if isinstance(item, str):
            item, named = {"model": item}, here
        else:
            named = (*here, "model")
        if not isinstance(item, dict) or not isinstance(item.get("model"), str):
            step.refuse("E224", "an entry of models names a model", here, "{model: long, weight: 0.6}")
            continue
        listed.append(item["model"])
        step.places[f"models.{item['model']}"] = named
        for name, one in item.items():
            if name != "model":
                own.setdefault(name, {})[item["model"]] = one
                step.places.setdefault(f"models.{name}", (*here, name))
    step.take("models", listed, place)
    base = (step.reading.at(step.path) or {}).get("base")
    others = [name for name in listed if name != base]
    for name, values in own.items():
        where = step.places[f"models.{name}"]
        missing = [model for model in others if model not in values]
        if missing or set(values) - set(others):
            wrong = missing[0] if missing else next(iter(set(values) - set(others)))
            step.refuse("E224", f"{name} is set for some models and {'not for ' + wrong if missing else 'for the base'}", where,
                        "give it to every model, the base excepted")  # fmt: skip
            continue
        ordered = [values[model] for model in others]
        if name in ("weight", "density"):
            step.take(name, ordered, where)
        else:
            step.options.setdefault("param", {})[name] = ordered
            step.places[f"param.{name}"] = where


def read_parameters(step: StepReading, value: Any, place: KeyPath) -> None:
    if not isinstance(value, dict):
        step.refuse(
            "E224",
            f"{show(value)} where the method's parameters are expected",
            place,
            "parameters: {lambda: 1.0}",
        )
        return
    for name, one in value.items():
        if name in ("lambda", "t", "normalize"):
            step.take(name, one, (*place, name))
        else:
            step.options.setdefault("param", {})[name] = one
            step.places[f"param.{name}"] = (*place, name)


def read_overrides(step: StepReading, value: Any, place: KeyPath) -> None:
    if not isinstance(value, list):
        step.refuse(
            "E224",
            f"{show(value)} where a list of overrides is expected",
            place,
            "overrides: [{match: 'lm_head.*', copy: base}]",
        )
        return
    for number, item in enumerate(value):
        here = (*place, number)
        if not isinstance(item, dict) or not isinstance(item.get("match"), str):
            step.refuse("E224", "an override names tensors", here, "{match: 'lm_head.*', copy: base}")
            continue
        step.sound &= step.reading.check_keys(here, ("match", "copy", "density"), "an override")
        if item.get("density") == 1 and "copy" not in item:
            step.options.setdefault("dense", []).append(item["match"])
        elif isinstance(item.get("copy"), str) and "density" not in item:
            _copied(step, item["copy"], (*here, "copy"))
            step.options.setdefault("ignore", []).append(item["match"])
        else:
            step.refuse(
                "E224",
                "an override copies, or sets the density to 1",
                here,
                "{match: PATTERN, copy: base} or {match: PATTERN, density: 1}",
            )


def _copied(step: StepReading, name: str, place: KeyPath) -> None:
    """Tensors are copied from the model that gives the structure; from another one a merge cannot."""
    given = step.reading.at(step.path)
    models = [item["model"] if isinstance(item, dict) else item for item in given.get("models") or () if item]
    donor = given.get("base") or _implied(given, models)
    if name != donor:
        step.refuse("E224", f"tensors are copied from {show(donor)}, the model that gives the structure, not from {show(name)}",
                    place, f"copy: {donor}")  # fmt: skip


def _implied(given: dict[str, Any], models: list[Any]) -> Any:
    from surgeon.merge.adjustments import split_method
    from surgeon.merge.methods import catalogue

    try:
        required = catalogue(split_method(str(given.get("method", "linear")))[0]).base == "required"
    except UsageError:
        required = False  # an unknown method is refused where it stands
    if not models:
        return None
    return models[-1] if required else models[0]


def name_models(step: StepReading) -> None:
    listed = step.options.get("models")
    if listed is None:
        step.refuse(
            "E224",
            "a merge names the models it merges",
            step.path,
            "models: [{model: long, weight: 0.6}, {model: short, weight: 0.4}]",
            key=True,
        )
        return
    step.options["models"] = [
        step.names.model(name, step.number, step.places[f"models.{name}"]) for name in listed
    ]
    if None in step.options["models"]:
        step.sound = False


def check_parameters(step: StepReading, values: dict[str, Any]) -> None:
    """Check every parameter of a merge by itself, and leave out those that are wrong."""
    from surgeon.merge.adjustments import split_method
    from surgeon.merge.methods import catalogue
    from surgeon.merge.request import unknown_parameter

    try:
        method = catalogue(split_method(str(values.get("method", "linear")))[0])
    except UsageError:
        return
    given = {name: values for name in ("weight", "density") if name in values} | {
        name: values["param"] for name in values.get("param", {})
    }
    for name, holder in given.items():
        place = step.places.get(name) or step.places[f"param.{name}"]
        table_name = "keep" if name == "density" and "density" not in method.table else name
        try:
            if table_name not in method.table:
                raise unknown_parameter(name, method)
            for one in holder[name] if isinstance(holder[name], list) else [holder[name]]:
                method.table[table_name].check(one, method.name)
        except UsageError as error:
            step.refuse(error.code, error.message, place, error.help, key=error.code == "E211")
            del holder[name]
