"""The key ``surgeon:`` of a merge YAML: what only this program does. mergekit ignores it.

surgeon:
  text_from: ./long       # context length, generation settings, tokenizer and chat template
  aim: 0.4                # and the other adjustments of `surgeon.merge.adjustments`
  calibration: {source: questions.jsonl, samples: 100}
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from surgeon.errors import UsageError
from surgeon.merge.adjustments import ESTIMATORS, Adjustments, CalibrationSource
from surgeon.merge.spec import ModelRef
from surgeon.recipe.mergekit_reading import LEVELS, Context, check_keys, read_model, whole_number
from surgeon.recipe.yaml import KeyPath
from surgeon.scalars import show

KEY = "surgeon"
_NUMBERS = {
    "aim": "OMEGA from 0 to 1, usually 0.4",
    "acm": "THETA above 0, usually 0.7",
    "sens": "TEMPERATURE above 0, usually 2",
    "temperature": "a number above 0, usually 2",
    "delta_rank": "the share of the full rank that is kept, such as 0.1",
}


@dataclass(frozen=True)
class NativeKeys:
    """What stood under ``surgeon:``; everything at its default without it."""

    adjust: Adjustments = field(default_factory=Adjustments)
    calibration: CalibrationSource = field(default_factory=CalibrationSource)
    text_from: ModelRef | None = None


def read_native_keys(context: Context) -> NativeKeys:
    """Read the mapping; mistakes are recorded in the context."""
    data = context.document.data.get(KEY)
    if data is None:
        return NativeKeys()
    if not isinstance(data, dict):
        context.refuse(
            "E212",
            f"{show(data)} where the settings of surgeon are expected",
            (KEY,),
            f"a mapping with {', '.join(LEVELS[KEY])}",
        )
        return NativeKeys()
    check_keys(context, (KEY,), "surgeon")
    given: dict[str, Any] = {}
    for name in ("aim", "acm", "delta_rank"):
        if data.get(name) is not None:
            given[name] = _number(context, (KEY, name))
    sens = data.get("sens")
    if isinstance(sens, dict) and set(sens) == {"temperature"}:
        given["sens"] = _number(context, (KEY, "sens", "temperature"))
    elif sens is not None:
        given["sens"] = _number(context, (KEY, "sens"))
    if data.get("fim") is not None:
        if not isinstance(data["fim"], bool):
            context.refuse(
                "E212",
                f"fim is true or false, not {show(data['fim'])}",
                (KEY, "fim"),
                "write it without quotes",
            )
        given["fim"] = data["fim"] is True
    if data.get("acm_estimator") is not None:
        if data["acm_estimator"] not in ESTIMATORS:
            context.refuse("E212", f"acm_estimator is {show(data['acm_estimator'])}", (KEY, "acm_estimator"),
                           f"one of: {', '.join(ESTIMATORS)}")  # fmt: skip
        else:
            given["acm_estimator"] = data["acm_estimator"]
    if data.get("layer_scores") is not None:
        given["layer_scores"] = _file(context, (KEY, "layer_scores"))
    adjust = Adjustments(**{k: v for k, v in given.items() if v is not None})
    calibration = _calibration(context)
    for part in (adjust, calibration):
        try:
            part.check()
        except UsageError as error:
            context.refuse(error.code, error.message, (KEY,), error.help)
    text_from = read_model(context, (KEY, "text_from")) if data.get("text_from") is not None else None
    return NativeKeys(adjust, calibration, text_from)


def _number(context: Context, path: KeyPath) -> float | None:
    value = context.at(path)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        context.refuse("E212", f"{path[-1]} is a number, not {show(value)}", path, _NUMBERS[str(path[-1])])
        return None
    return float(value)


def _file(context: Context, path: KeyPath) -> str | None:
    """Return a file beside the YAML, or what is written: a path from here, or a dataset id."""
    text = context.document.source(path)
    if not text:
        context.refuse(
            "E212",
            f"{path[-1]} is a file name, not {show(context.at(path))}",
            path,
            "a path beside this file, or one from the current folder",
        )
        return None
    beside = Path(context.document.where(()).file or ".").parent / text
    return str(beside) if beside.exists() else text


def _calibration(context: Context) -> CalibrationSource:
    place = (KEY, "calibration")
    data = context.at(place)
    if data is None:
        return CalibrationSource()
    if not isinstance(data, dict):
        context.refuse("E212", f"{show(data)} where {{source: FILE, samples: N}} is expected", place,
                       "such as calibration: {source: questions.jsonl, samples: 100}")  # fmt: skip
        return CalibrationSource()
    check_keys(context, place, "calibration")
    given: dict[str, Any] = {}
    sources = data.get("source")
    if sources is not None:
        names = range(len(sources)) if isinstance(sources, list) else [None]
        paths = [(*place, "source") if n is None else (*place, "source", n) for n in names]
        given["sources"] = tuple(t for t in (_file(context, path) for path in paths) if t)
    for key in ("samples", "sequence_length"):
        if data.get(key) is not None:
            number = whole_number(data[key])
            if number is None:
                context.refuse(
                    "E212", f"{key} is a whole number, not {show(data[key])}", (*place, key), "such as 128"
                )
            else:
                given[key] = number
    if data.get("pack") is not None:
        given["pack"] = data["pack"] is True
    return CalibrationSource(**given)
