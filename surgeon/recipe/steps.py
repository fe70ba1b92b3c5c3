"""Steps of a native recipe: from what people write to the options of the verb's request model, checked.

Every value is checked against the request model that the command uses, by itself first, so that one run shows every
mistake; then all options of a step together. The command's own errors keep their codes and get a line and a column.

Codes: E203 unknown key, E224 wrong type or range, E2008 what a recipe cannot set, E2011 not a step.
"""

from __future__ import annotations

import json
import re
from typing import Annotated, Any

from pydantic import TypeAdapter, ValidationError

from surgeon.errors import UsageError, close_matches
from surgeon.recipe.reading import Reading, known_list
from surgeon.recipe.recipe import Step, StepOutput, replaced
from surgeon.recipe.references import Names
from surgeon.recipe.schema import (
    COUNTS,
    FILES,
    MACHINE,
    METRICS,
    OUTPUTS,
    REFUSED,
    SIZES,
    TARGETS,
    TEXTS,
    VERBS,
    WRITES,
    Verb,
)
from surgeon.recipe.yaml import KeyPath
from surgeon.scalars import show
from surgeon.system import parse_size

_OPTION = re.compile(r"--([a-z][a-z0-9-]*)")


def read_steps(reading: Reading, names: Names, defaults: dict[str, Any], seed: int) -> list[Step]:
    """Return the steps; mistakes are recorded."""
    found = []
    for number, (identity, verb) in enumerate(names.steps):
        if verb is None:
            continue
        step = _Step(
            reading, names, VERBS[verb], identity or f"step {number + 1}", ("steps", number, verb), number
        )
        found.append(step.read(defaults, seed))
    return found


class _Step:
    """One step that is being read."""

    def __init__(
        self, reading: Reading, names: Names, verb: Verb, identity: str, path: KeyPath, number: int
    ) -> None:
        self.reading, self.names, self.verb, self.identity, self.path, self.number = (
            reading,
            names,
            verb,
            identity,
            path,
            number,
        )
        self.options: dict[str, Any] = {}
        self.places: dict[str, KeyPath] = {}
        self.sound = True
        self.wrong: set[str] = set()

    def refuse(
        self, code: str, message: str, path: KeyPath, help: str | None = None, *, key: bool = False
    ) -> None:
        self.sound = False
        self.reading.refuse(code, message, path, help, key=key)

    def take(self, name: str, value: Any, place: KeyPath) -> None:
        if name in self.options:
            self.refuse(
                "E224",
                f"{show(place[-1])} and {show(self.places[name][-1])} say the same",
                place,
                "leave one out",
                key=True,
            )
            return
        self.options[name], self.places[name] = value, place

    def read(self, defaults: dict[str, Any], seed: int) -> Step:
        given = self.reading.at(self.path)
        gate_limited = False
        if given is not None and not isinstance(given, dict):
            self.refuse(
                "E2011",
                f"{show(given)} where the settings of {self.verb.name} are expected",
                self.path,
                f"{self.verb.name}: {{...}}",
            )
        elif given:
            gate_limited = given.get("gate_limited") is True
            self._keys(given)
            for key in given:
                if key in self.verb.keys and key != "gate_limited":
                    self._key(key, given[key], (*self.path, key))
        self._defaults({name: value for name, value in defaults.items() if name in TEXTS})
        self._texts()
        self._defaults({"seed": seed, **defaults})
        self._references()
        if self.verb.name == "eval":
            self._metrics()
        self._validate()
        return Step(
            self.identity,
            self.verb.name,
            self.options,
            self.reading.document.key_where(self.path),
            self.verb.writes,
            gate_limited,
        )

    def _defaults(self, defaults: dict[str, Any]) -> None:
        """Take what the step does not say itself; the type of written weights is not the type a model is run in."""
        for name, value in defaults.items():
            known = name in self.verb.options and (name != "dtype" or self.verb.writes)
            if known and name not in self.options:
                self.take(
                    name,
                    value,
                    ("defaults", name) if self.reading.at(("defaults", name)) is not None else (name,),
                )

    # ---- keys ------------------------------------------------------------------------------------

    def _keys(self, given: dict[str, Any]) -> None:
        for key in given:
            place = (*self.path, key)
            if key in self.verb.keys:
                continue
            if key in MACHINE:
                self.refuse(
                    "E2008",
                    f"{key} belongs to the run, not to the recipe",
                    place,
                    f"surgeon run ... {MACHINE[key]}",
                    key=True,
                )
            elif key in REFUSED[self.verb.name] or key in OUTPUTS:
                reason = REFUSED[self.verb.name].get(key, WRITES)
                self.refuse("E2008", f"{key} cannot be set in a recipe", place, reason, key=True)
            else:
                near = close_matches(key, self.verb.keys)
                self.refuse("E203", f"unknown key {show(key)} in {self.verb.name}", place,
                            (f"{near} " if near else "") + f"{self.verb.name} takes {known_list(self.verb.keys)}", key=True)  # fmt: skip

    def _key(self, key: str, value: Any, place: KeyPath) -> None:
        verb = self.verb.name
        if verb == "merge" and key in ("models", "parameters", "overrides"):
            {"models": self._models, "parameters": self._parameters, "overrides": self._overrides}[key](
                value, place
            )
        elif key == "target" and verb in TARGETS:
            self._target(value, place)
        elif key == "schemes":
            self._schemes(value, place)
        elif key == "metrics" and verb == "eval":
            return
        elif key in self.verb.references:
            self.take(key, value, place)
        else:
            self.take(key, self._converted(key, value, place), place)

    def _converted(self, key: str, value: Any, place: KeyPath) -> Any:
        """Return a size as bytes, a count as a number, a file as its path; a single value where a list is possible."""
        if key in SIZES or key in COUNTS:
            return self._each(value, place, self._size if key in SIZES else self._count)
        if key in FILES and isinstance(value, str):
            return self.names.file(place) or value
        return value

    def _each(self, value: Any, place: KeyPath, one: Any) -> Any:
        if isinstance(value, list):
            return [one(item, (*place, number)) for number, item in enumerate(value)]
        return one(value, place)

    def _size(self, value: Any, place: KeyPath) -> Any:
        if isinstance(value, str):
            try:
                return parse_size(value)
            except ValueError:
                self.refuse("E224", f"{show(value)} is no size", place, "such as 5GB, 800MB, or bytes")
                return 1
        return value

    def _count(self, value: Any, place: KeyPath) -> Any:
        if isinstance(value, str):
            found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMB])", value.strip(), re.IGNORECASE)
            if found is None:
                self.refuse(
                    "E224", f"{show(value)} is no number of parameters", place, "such as 3B, 500M, or 120000"
                )
                return 1.0
            return float(found[1]) * {"K": 1e3, "M": 1e6, "B": 1e9}[found[2].upper()]
        return value

    def _target(self, value: Any, place: KeyPath) -> None:
        words = TARGETS[self.verb.name]
        if not isinstance(value, dict) or not value:
            self.refuse(
                "E224",
                f"{show(value)} where a target is expected",
                place,
                "such as {" + next(iter(words)) + ": 1.5}; one of " + known_list(words),
            )
            return
        self.sound &= self.reading.check_keys(place, words, f"target of {self.verb.name}")
        for word, one in value.items():
            if word in words:
                self.take(words[word], self._converted(words[word], one, (*place, word)), (*place, word))

    def _schemes(self, value: Any, place: KeyPath) -> None:
        texts = value if isinstance(value, list) else [value]
        if not all(isinstance(text, str) for text in texts):
            self.refuse("E224", "schemes are names such as W4A16, or PATTERN=SCHEME", place)
            return
        given = self.reading.at(self.path)
        targeted = "target" in given or any(name in given for name in TARGETS["quantize"].values())
        widths = []
        for number, text in enumerate(texts if targeted else ()):
            found = re.fullmatch(r"[Ww](\d)A16", text)
            if found:
                widths.append(int(found[1]))
            elif "=" not in text:
                self.refuse("E224", f"with a target, schemes are the widths to choose from, and {show(text)} is none",
                            (*place, number), "such as [W3A16, W4A16, W8A16]; PATTERN=SCHEME sets some matrices apart")  # fmt: skip
        named = [text for text in texts if "=" in text] if targeted else texts
        if widths:
            self.take("bits", widths, place)
        if named:
            self.take("scheme", named, place)

    # ---- merge -----------------------------------------------------------------------------------

    def _models(self, value: Any, place: KeyPath) -> None:
        if not isinstance(value, list) or not value:
            self.refuse(
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
                self.refuse("E224", "an entry of models names a model", here, "{model: long, weight: 0.6}")
                continue
            listed.append(item["model"])
            self.places[f"models.{item['model']}"] = named
            for name, one in item.items():
                if name != "model":
                    own.setdefault(name, {})[item["model"]] = one
                    self.places.setdefault(f"models.{name}", (*here, name))
        self.take("models", listed, place)
        base = (self.reading.at(self.path) or {}).get("base")
        others = [name for name in listed if name != base]
        for name, values in own.items():
            where = self.places[f"models.{name}"]
            missing = [model for model in others if model not in values]
            if missing or set(values) - set(others):
                wrong = missing[0] if missing else next(iter(set(values) - set(others)))
                self.refuse("E224", f"{name} is set for some models and {'not for ' + wrong if missing else 'for the base'}", where,
                            "give it to every model, the base excepted")  # fmt: skip
                continue
            ordered = [values[model] for model in others]
            if name in ("weight", "density"):
                self.take(name, ordered, where)
            else:
                self.options.setdefault("param", {})[name] = ordered
                self.places[f"param.{name}"] = where

    def _parameters(self, value: Any, place: KeyPath) -> None:
        if not isinstance(value, dict):
            self.refuse(
                "E224",
                f"{show(value)} where the method's parameters are expected",
                place,
                "parameters: {lambda: 1.0}",
            )
            return
        for name, one in value.items():
            if name in ("lambda", "t", "normalize"):
                self.take(name, one, (*place, name))
            else:
                self.options.setdefault("param", {})[name] = one
                self.places[f"param.{name}"] = (*place, name)

    def _overrides(self, value: Any, place: KeyPath) -> None:
        if not isinstance(value, list):
            self.refuse(
                "E224",
                f"{show(value)} where a list of overrides is expected",
                place,
                "overrides: [{match: 'lm_head.*', copy: base}]",
            )
            return
        for number, item in enumerate(value):
            here = (*place, number)
            if not isinstance(item, dict) or not isinstance(item.get("match"), str):
                self.refuse("E224", "an override names tensors", here, "{match: 'lm_head.*', copy: base}")
                continue
            self.sound &= self.reading.check_keys(here, ("match", "copy", "density"), "an override")
            if item.get("density") == 1 and "copy" not in item:
                self.options.setdefault("dense", []).append(item["match"])
            elif isinstance(item.get("copy"), str) and "density" not in item:
                self._copied(item["copy"], (*here, "copy"))
                self.options.setdefault("ignore", []).append(item["match"])
            else:
                self.refuse(
                    "E224",
                    "an override copies, or sets the density to 1",
                    here,
                    "{match: PATTERN, copy: base} or {match: PATTERN, density: 1}",
                )

    def _copied(self, name: str, place: KeyPath) -> None:
        """Tensors are copied from the model that gives the structure; from another one a merge cannot."""
        given = self.reading.at(self.path)
        models = [
            item["model"] if isinstance(item, dict) else item for item in given.get("models") or () if item
        ]
        donor = given.get("base") or self._implied(given, models)
        if name != donor:
            self.refuse("E224", f"tensors are copied from {show(donor)}, the model that gives the structure, not from {show(name)}",
                        place, f"copy: {donor}")  # fmt: skip

    @staticmethod
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

    # ---- references ------------------------------------------------------------------------------

    def _references(self) -> None:
        """Replace names of models and steps; the input of a step is the model made before it."""
        if self.verb.name == "merge":
            self._merged()
        for name in self.verb.references & self.options.keys():
            value, place = self.options[name], self.places.get(name, self.path)
            if not isinstance(value, str):
                if not isinstance(value, StepOutput) and value is not None:
                    self.refuse("E224", f"{show(value)} where a model is named", place)
                    del self.options[name]
                continue
            if name == "vocab" and value in ("base", "union", "truncate"):
                continue
            if name == "baseline" and value.endswith(".json"):
                self.options[name] = self.names.file(place) or value
                continue
            self.options[name] = self.names.model(value, self.number, place)
        if self.verb.name != "merge" and "model" not in self.options:
            self.options["model"] = self.names.default_input(self.number, self.path)
        if any(self.options.get(name, "") is None for name in self.verb.references):
            self.sound = False

    def _merged(self) -> None:
        listed = self.options.get("models")
        if listed is None:
            self.refuse(
                "E224",
                "a merge names the models it merges",
                self.path,
                "models: [{model: long, weight: 0.6}, {model: short, weight: 0.4}]",
                key=True,
            )
            return
        self.options["models"] = [
            self.names.model(name, self.number, self.places[f"models.{name}"]) for name in listed
        ]
        if None in self.options["models"]:
            self.sound = False

    def _texts(self) -> None:
        """Replace names of data sets; those for calibration bring their number of samples and length with them."""
        for name in TEXTS & self.options.keys():
            value, place = self.options[name], self.places[name]
            wanted = value if isinstance(value, list) else [value]
            if not all(isinstance(text, str) for text in wanted):
                continue  # the request model says what is expected
            found = []
            for number, text in enumerate(wanted):
                here = (*place, number) if isinstance(value, list) else place
                data = self.names.data.get(text)
                found.append(data.source if data else self.names.text(text, here))
                if data and name == "calibration":
                    for key in ("samples", "sequence_length"):
                        if (
                            getattr(data, key) is not None
                            and key in self.verb.options
                            and key not in self.options
                        ):
                            self.take(key, getattr(data, key), ("data", text, key))
                elif data and data.samples is not None:
                    self.refuse("E224", f"samples of the data set {show(text)} say how many records calibrate; {name} reads all of it",
                                here, "limit: N in the eval step reads the first N" if self.verb.name == "eval" else "a data set without samples")  # fmt: skip
            self.options[name] = found if isinstance(value, list) else found[0]

    def _metrics(self) -> None:
        """Turn words under ``metrics:`` into what measures them."""
        place = (*self.path, "metrics")
        words = self.reading.at(place)
        if words is None:
            return
        if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
            self.refuse(
                "E224",
                f"{show(words)} where a list of metrics is expected",
                place,
                "metrics: [perplexity, kl]",
            )
            return
        for number, word in enumerate(words):
            here = (*place, number)
            if word not in METRICS:
                near = close_matches(word, METRICS)
                self.refuse(
                    "E224",
                    f"unknown metric {show(word)}",
                    here,
                    (f"{near} " if near else "") + f"one of {known_list(METRICS)}",
                )
            elif word == "perplexity":
                self.options.setdefault("perplexity", "shipped")
            elif word == "kl" and "kl" not in self.options:
                baseline = self.options.get("baseline")
                if baseline is None or (isinstance(baseline, str) and baseline.endswith(".json")):
                    self.refuse(
                        "E224", "kl needs a model to compare with", here, "baseline: long, or kl: long"
                    )
                else:
                    self.options["kl"] = baseline
            elif word in ("answer_length", "accuracy") and "questions" not in self.options:
                tasks = self.options.get("tasks")
                if word == "accuracy" and tasks:
                    continue  # tasks bring their own
                self.refuse(
                    "E224",
                    f"{word} is measured on questions, and the step has none",
                    here,
                    "questions: FILE.jsonl",
                )

    # ---- checks ----------------------------------------------------------------------------------

    def _validate(self) -> None:
        for name, value in list(self.options.items()):
            info = self.verb.options.get(name) or self._hidden(name)
            if (
                info is None
                or name == "param"
                or name in self.verb.references
                or (name == "models" and self.verb.name == "merge")
            ):
                continue
            self.options[name] = self._typed(name, info, value)
        usable = {name: value for name, value in self.options.items() if name not in self.wrong}
        values = replaced(
            usable,
            lambda one: "<unknown>" if one is None else str(one) if isinstance(one, StepOutput) else one,
        )
        if self.verb.name == "merge":
            self._merge_parameters(values)
        try:
            self._build(values)
        except UsageError as error:
            for one in (error, *error.others):
                place = self._place_of(one.message)
                # What follows from a mistake that was reported already is none of its own.
                if self.sound or place != self.path:
                    self.reading.refuse(one.code, one.message, place, one.help, key=True)
        except ValidationError as error:
            for one in error.errors() if self.sound else ():
                self._refuse_field(str(one["loc"][0]) if one["loc"] else "", one)

    def _merge_parameters(self, values: dict[str, Any]) -> None:
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
            place = self.places.get(name) or self.places[f"param.{name}"]
            table_name = "keep" if name == "density" and "density" not in method.table else name
            try:
                if table_name not in method.table:
                    raise unknown_parameter(name, method)
                for one in holder[name] if isinstance(holder[name], list) else [holder[name]]:
                    method.table[table_name].check(one, method.name)
            except UsageError as error:
                self.refuse(error.code, error.message, place, error.help, key=error.code == "E211")
                del holder[name]

    def _hidden(self, name: str) -> Any:
        """Return the field of an option that has a shape of its own (lambda, scheme)."""
        for model in self.verb.classes:
            for field_name, info in model.model_fields.items():
                if name in (info.alias, field_name):
                    return info
        return None

    def _typed(self, name: str, info: Any, value: Any) -> Any:
        """Check one option by itself, as strictly as JSON: no text for numbers, no numbers for text."""
        if name == "keep_experts":
            return self._each(
                value, self.places[name], lambda one, _: one if isinstance(one, str) else repr(one)
            )
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
            self._refuse_field(name, error.errors()[0])
        except ValueError:
            self.wrong.add(name)
            self.refuse("E224", f"{name} is {value!r}", self.places[name], "a finite number")
        return value

    def _refuse_field(self, name: str, error: Any) -> None:
        self.wrong.add(name)
        place = self.places.get(name, self.path)
        inner = [part for part in error["loc"] if isinstance(part, int)]
        message = str(error["msg"])
        given = error.get("input")
        if error["type"] == "missing":
            self.refuse("E224", f"{self.verb.name} needs {name}", self.path, f"{name}: ...", key=True)
            return
        self.refuse("E224", f"{name} is {show(given)}: {message[:1].lower()}{message[1:]}", (*place, *inner))

    def _build(self, values: dict[str, Any]) -> None:
        """Build the request and let it check what belongs together."""
        verb = self.verb.name
        if verb == "merge":
            from surgeon.merge.request import MergeRequest, resolve

            resolve(MergeRequest(**values))
        elif verb == "prune":
            self._pruned(values)
        elif verb == "edit":
            values.pop("model", None)
            self.verb.classes[0](**values).checked()
        else:
            self.verb.classes[0](**_as_text_lists(values)).checked()

    def _pruned(self, values: dict[str, Any]) -> None:
        from surgeon.prune import request as dense
        from surgeon.prune.experts import request as experts

        only = experts.ExpertRequest.model_fields.keys() - dense.PruneRequest.model_fields.keys()
        method = str(values.get("method") or "").replace("_", "-").lower()
        known = experts if method in experts.METHODS or (not method and only & values.keys()) else dense
        built = known.build(**values)
        if len(built.targets) > 1:
            raise UsageError("E266", "a step makes one model, and several targets make several", help="give one, and vary it with sweep:")  # fmt: skip

    def _place_of(self, message: str) -> KeyPath:
        """Return where the option stands that a message of a request speaks of."""
        for word in _OPTION.findall(message):
            name = word.replace("-", "_")
            for key in (name, f"target_{name}", f"param.{name}", f"models.{name}"):
                if key in self.places:
                    return self.places[key]
        for name in re.findall(r'"([^"]+)"', message):
            for key in (f"param.{name}", f"models.{name}"):
                if key in self.places:
                    return self.places[key]
            for key, value in self.options.items():
                if value == name and key in self.places:
                    return self.places[key]
        for key, value in self.options.items():
            single = value[0] if isinstance(value, list) and len(value) == 1 else value
            if isinstance(single, (int, float)) and not isinstance(single, bool) and f" {single:g} " in message:
                return self.places.get(key, self.path)
        for name in sorted(self.places, key=len, reverse=True):
            word = name.rpartition(".")[2]
            if re.search(rf"\b{re.escape(word)}\b", message):
                return self.places[name]
        return self.path


def _adapter(info: Any) -> TypeAdapter[Any]:
    """Return what checks one field alone: its type and its limits, without its alias."""
    kind: Any = info.annotation
    for limit in info.metadata:
        kind = Annotated[kind, limit]
    return TypeAdapter(kind)


def _as_text_lists(values: dict[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
