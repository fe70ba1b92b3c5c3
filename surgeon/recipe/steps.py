"""Steps of a native recipe: from what people write to the options of the verb's request model, checked.

Every value is checked against the request model that the command uses, by itself first, so that one run shows every
mistake; then all options of a step together. The command's own errors keep their codes and get a line and a column.

Codes: E203 unknown key, E224 wrong type or range, E2008 what a recipe cannot set, E2011 not a step.
"""

from __future__ import annotations

import re
from typing import Any

from surgeon.errors import close_matches
from surgeon.recipe.merge_step import name_models, read_models, read_overrides, read_parameters
from surgeon.recipe.reading import Reading, known_list
from surgeon.recipe.recipe import Step, StepOutput
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
)
from surgeon.recipe.step_checks import validate
from surgeon.recipe.step_reading import StepReading
from surgeon.recipe.yaml import KeyPath
from surgeon.scalars import show
from surgeon.system import parse_size


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
        for used in {one.id for one in found if gguf_made(one)}.intersection(found[-1].uses):
            reading.refuse("E2014", f"{step.identity} reads what {used} makes, a GGUF file, which only llama.cpp runs", step.path,
                           "read the model it is made from: model: ID; quantize compares a GGUF file with its source by itself", key=True)  # fmt: skip
    return found


def gguf_made(step: Step) -> bool:
    """Say whether a step makes a GGUF file, not a folder."""
    key = {"export": "to", "quantize": "format"}.get(step.verb)
    return key is not None and step.options.get(key) == "gguf"


class _Step(StepReading):
    """One step that is being read."""

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
            self._decoding()
        validate(self)
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
                place: KeyPath = (
                    ("defaults", name) if name in (self.reading.at(("defaults",)) or {}) else (name,)
                )
                self.take(name, value, place)

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
            {"models": read_models, "parameters": read_parameters, "overrides": read_overrides}[key](
                self, value, place
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
            return self.each(value, place, self._size if key in SIZES else self._count)
        if key in FILES and isinstance(value, str):
            return self.names.file(place) or value
        return value

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
            self.refuse("E224", f"{show(next(t for t in texts if not isinstance(t, str)))} is no scheme", place,
                        'names such as W4A16, or PATTERN=SCHEME; "surgeon methods quantize" lists all')  # fmt: skip
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

    # ---- references ------------------------------------------------------------------------------

    def _references(self) -> None:
        """Replace names of models and steps; the input of a step is the model made before it."""
        if self.verb.name == "merge":
            name_models(self)
        for name in self.verb.references & self.options.keys():
            value, place = self.options[name], self.places.get(name, self.path)
            if not isinstance(value, str):
                if not isinstance(value, StepOutput) and value is not None:
                    self.refuse("E224", f"{show(value)} where a model is named", place,
                                "a folder, org/name, the name of a model of this recipe, or the id of an earlier step")  # fmt: skip
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

    def _decoding(self) -> None:
        """Permit decoding what a step of this recipe quantized: passes over text need plain numbers."""
        model = self.options.get("model")
        made = {identity for identity, verb in self.names.steps if verb == "quantize"}
        if (
            isinstance(model, StepOutput)
            and model.step in made
            and self.options.keys() & {"perplexity", "kl"}
        ):
            self.options.setdefault("dequantize", True)

    # ---- checks ----------------------------------------------------------------------------------
