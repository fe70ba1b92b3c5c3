"""The functions have the options of their commands, typed as the requests behind them: nothing drifts apart."""

from __future__ import annotations

import ast
import inspect
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import pytest
import typer

import surgeon
from surgeon.cli import app as commands
from surgeon.deploy.export_request import ExportRequest
from surgeon.edit.request import EditRequest
from surgeon.errors import SurgeonError
from surgeon.evaluate.request import EvalRequest
from surgeon.measure.request import MeasureRequest
from surgeon.merge.request import MergeRequest
from surgeon.prune.experts.request import ExpertRequest
from surgeon.prune.request import PruneRequest
from surgeon.python import options
from surgeon.quantize.request import QuantizeRequest

PRINTING = {"json_", "quiet", "verbose", "no_progress", "help"}
"""How a command prints; a function returns."""

NAMES = {"eval": "evaluate"}
"""``surgeon.eval`` would hide a builtin from those who write ``from surgeon import *``."""

RENAMED: dict[str, dict[str, str]] = {
    # A command repeats an option for each value; a function takes them at once.
    "edit": {"marker": "markers"},
    "inspect": {
        "marker": "markers",
        "window": "windows",
        "cache_ratio": "cache_ratios",
        "router_logits": "logits",
    },
    "verify": {"no_hashes": "hashes"},
    "run": {"from": "start"},  # a word of the language
    "merge": {"lambda": "lambda_"},  # likewise
}
"""Option of the command -> parameter of the function."""

NOT_HERE: dict[str, dict[str, str]] = {
    "eval": {"report": "Result.report(path)"},
    "report": {"format": "the suffix of output, or Report.html and Report.markdown"},
    "inspect": {
        "layers": "printing: Inspection.layers",
        "config": "printing: Inspection.config",
        "sort": "printing",
        "guess": "surgeon.api.propose_experts",
    },
    "diff": {"by": "printing", "sort": "printing", "exit_code": "Difference.differs"},
}
"""Options without a parameter, and what there is instead."""

ONLY_HERE: dict[str, dict[str, str]] = {
    "merge": {"progress": "", "stop": ""},
    "diff": {"anatomy": "what diff --values always measures; False saves a second read"},
    "push": {"say": ""},
}
TELLING = {"progress", "say", "stop"}


def parameters(command: str) -> dict[str, Any]:
    """Return the long options and the arguments of a command by name."""
    found = typer.main.get_command(commands.build(command))
    named = {}
    for one in found.params:
        long = [text for text in one.opts if text.startswith("--")]
        named[long[0][2:].replace("-", "_") if long else str(one.name)] = one
    return named


def function(command: str) -> Any:
    return getattr(surgeon, NAMES.get(command, command))


@pytest.mark.parametrize("command", [name for name in commands.COMMANDS if name != "recipe"])
def test_a_function_takes_what_its_command_takes(command):
    renamed, absent = RENAMED.get(command, {}), NOT_HERE.get(command, {})
    taken = set(inspect.signature(function(command)).parameters)
    given = {
        n for n, one in parameters(command).items() if one.name not in PRINTING and n not in ("json", "quiet")
    }
    wanted = {renamed.get(name, name) for name in given if name not in absent}
    assert wanted <= taken, f"surgeon.{command} lacks {sorted(wanted - taken)}"
    more = taken - wanted - TELLING - set(ONLY_HERE.get(command, {}))
    assert not more, f"surgeon {command} lacks --{sorted(more)}"
    assert set(renamed) <= given and set(absent) <= given, "an exception that is none"


@pytest.mark.parametrize("command", ["validate", "show", "schema", "list", "copy"])
def test_recipe_functions_take_what_their_commands_take(command):
    group = typer.main.get_command(commands.build("recipe"))
    options_ = {str(p.opts[0]).lstrip("-").replace("-", "_") for p in group.commands[command].params}  # type: ignore[attr-defined]
    given = {n for n in options_ if n not in ("json", "quiet", "verbose", "help")}
    function_ = getattr(surgeon.recipe, command)
    assert callable(function_) and set(inspect.signature(function_).parameters) == given


def test_every_public_name_is_there_and_known_to_type_checkers():
    for name in surgeon.__all__:
        assert getattr(surgeon, name) is not None
    stub = ast.parse((Path(surgeon.__file__).parent / "__init__.pyi").read_text())
    told = {alias.asname for node in stub.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert told == set(surgeon.__all__) - {"__version__"}
    assert {NAMES.get(command, command) for command in commands.COMMANDS} <= set(surgeon.__all__)
    assert (Path(surgeon.__file__).parent / "py.typed").is_file()


def test_help_and_completion_show_the_options_whatever_was_imported_before():
    import surgeon.merge
    import surgeon.prune

    for found in (surgeon.prune, surgeon.api.prune):
        shown = inspect.signature(found)
        assert "target_speedup" in shown.parameters
        assert str(shown.parameters["target_speedup"]) == "target_speedup: 'float | Sequence[float]' = ..."
    assert "speedup" in str(surgeon.prune.__doc__)
    assert inspect.signature(surgeon.edit).parameters["method"].default is inspect.Parameter.empty


# ---- options and requests ------------------------------------------------------------------------------

PAIRS: list[tuple[Any, tuple[Any, ...], frozenset[str]]] = [
    (options.MergeOptions, (MergeRequest,), frozenset({"models", "method"})),
    (options.PruneOptions, (PruneRequest, ExpertRequest), frozenset({"model"})),
    (options.QuantizeOptions, (QuantizeRequest,), frozenset({"model"})),
    (options.EvaluateOptions, (EvalRequest,), frozenset({"model"})),
    (options.MeasureOptions, (MeasureRequest,), frozenset({"model"})),
    (options.EditOptions, (EditRequest,), frozenset()),
    (options.ExportOptions, (ExportRequest,), frozenset({"model"})),
]
WIDER = {
    ("MergeOptions", "base"): "a state dict",
    ("PruneOptions", "keep_experts"): "a count or a share, which the request turns into text",
    ("PruneOptions", "method"): "None chooses by the kind of model",
    ("ExportOptions", "to"): "checked by the request with a sentence of its own",
    ("ExportOptions", "weights"): "likewise",
}
IDS = [pair[0].__name__ for pair in PAIRS]


@pytest.mark.parametrize(("taken", "requests", "apart"), PAIRS, ids=IDS)
def test_options_are_the_fields_of_the_request(taken, requests, apart):
    fields = {name for request in requests for name in request.model_fields}
    assert set(taken.__annotations__) == fields - apart


def atoms(annotation: Any) -> set[Any]:
    """Return what a value may be: types, the words of literals, ("several", type)."""
    origin = typing.get_origin(annotation)
    if origin in (typing.Required, typing.NotRequired):
        return atoms(typing.get_args(annotation)[0])
    if origin in (typing.Union, types.UnionType):
        return set().union(*(atoms(one) for one in typing.get_args(annotation)))
    if origin is Literal:
        return set(typing.get_args(annotation))
    if origin is tuple and typing.get_args(annotation)[-1] is Ellipsis:
        one = atoms(typing.get_args(annotation)[0])
        return one | {("several", atom) for atom in one}
    if origin is Sequence:
        return {("several", atom) for atom in atoms(typing.get_args(annotation)[0])}
    if origin is tuple:
        return {("tuple", *(frozenset(atoms(one)) for one in typing.get_args(annotation)))}
    if origin in (dict, Mapping):
        return {Mapping}
    if origin is not None and getattr(origin, "__name__", "") == "PathLike":
        return set()  # text, spelled as a path
    return {annotation}


@pytest.mark.parametrize(("taken", "requests", "apart"), PAIRS, ids=IDS)
def test_types_of_options_are_those_of_the_request(taken, requests, apart):
    hints = typing.get_type_hints(taken, include_extras=True)
    for name, hint in hints.items():
        if (taken.__name__, name) in WIDER:
            continue
        wanted = set().union(
            *(atoms(r.model_fields[name].annotation) for r in requests if name in r.model_fields)
        )
        found = {atom for atom in atoms(hint) if atom != ("several", None)}
        assert found == wanted, f"{taken.__name__}.{name}"


def test_one_value_is_as_good_as_several_and_a_path_as_text():
    given = {
        "density": 0.3,
        "ignore": "a",
        "base": Path("b"),
        "sweep": ["x=1", "y=2"],
        "layers": (1, 2),
        "t": None,
    }
    found = options.plain(given, MergeRequest)
    assert found == {
        "density": (0.3,),
        "ignore": ("a",),
        "base": "b",
        "sweep": ("x=1", "y=2"),
        "layers": (1, 2),
    }
    assert MergeRequest(models=("a", "b"), **found).density == (0.3,)
    found = options.plain({"structures": "ffn", "calibration": Path("a.txt")}, PruneRequest, ExpertRequest)
    assert found == {"structures": ("ffn",), "calibration": ("a.txt",)}


def test_an_option_that_is_misspelt_is_refused_with_a_proposal():
    with pytest.raises(SurgeonError) as caught:
        surgeon.merge(["a", "b"], densty=0.3)  # type: ignore[call-overload]
    assert "densty" in caught.value.message


def test_the_functions_of_experts_agree():
    taken = set(options.ExpertOptions.__annotations__)
    function_ = set(inspect.signature(surgeon.api.inspect_experts).parameters)
    assert taken == function_ - {"model", "stats", "offline", "threads", "progress", "stop"}
