"""mergekit's YAML, unchanged, to `MergeSpec`: strict about mistakes, equal in meaning.

mergekit ignores unknown keys; here they are errors with a suggestion, because a misspelt
`density` silently merges with the default. Keys that mergekit knows and that have no effect
become notes. All errors of a file are reported together.

Errors (all `UsageError`), besides those of `surgeon.recipe.yaml`:

    E201  unknown merge method          E212  wrong type or value
    E204  not a model reference         E214  layer_range
    E206  a model is listed twice       E255  key missing or contradictory
    E210  unknown key                   E256  names and dependencies of documents
    E211  unknown parameter             E257  required parameter not found (when resolving)
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from surgeon.errors import SurgeonError, UsageError, Where, close_matches, raise_all
from surgeon.merge.settings import faults_in
from surgeon.merge.spec import MergeSpec, ModelRef, Module, ParameterMap, Slice, SliceSource
from surgeon.recipe import yaml
from surgeon.recipe.mergekit_reading import (
    LEVELS,
    MERGEKIT_PARAMETERS,
    Context,
    Note,
    Parameters,
    check_keys,
    read_model,
    whole_number,
)
from surgeon.recipe.mergekit_tokenizer import read_tokenizer
from surgeon.recipe.native_keys import read_native_keys
from surgeon.recipe.yaml import MAX_ERRORS, Document, KeyPath
from surgeon.scalars import show

METHODS = (
    "arcee_fusion", "breadcrumbs", "breadcrumbs_ties", "dare_linear", "dare_ties", "della", "della_linear",
    "karcher", "linear", "model_stock", "multislerp", "nearswap", "nuslerp", "passthrough", "ram", "ramplus_tl",
    "sce", "slerp", "task_arithmetic", "ties",
)  # fmt: skip
DTYPES = ("bfloat16", "float16", "float32", "float64", "int64")
_DTYPE_NICKNAMES = {
    "bf16": "bfloat16",
    "fp16": "float16",
    "half": "float16",
    "fp32": "float32",
    "float": "float32",
}
CHAT_TEMPLATES = ("auto", "alpaca", "chatml", "exaone", "llama3", "mistral")


def parse(
    text: str | bytes, file: str | None = None, *, known: Mapping[str, Parameters] | None = None
) -> tuple[list[MergeSpec], list[Note]]:
    """Read a mergekit file: one merge, or several documents that may use each other's results.

    Args:
        text: the file's content.
        file: its name, for messages.
        known: method -> parameter name -> parameter; by default `surgeon.merge.methods` is asked.

    Returns:
        The merges in file order (see `in_order`), and notes.

    Raises:
        UsageError: the first error, with all others attached.
    """
    documents = yaml.load_all(text, file, booleans="1.1")
    if not documents:
        raise UsageError(
            "E254",
            "the YAML is empty",
            where=Where(file, 1, 1),
            help="the file may not have been written to the end",
        )
    lookup = _catalogue if known is None else known.get
    contexts = [Context(document, lookup) for document in documents]
    specs = [_merge(context) for context in contexts]
    errors = [error for context in contexts for error in context.errors]
    if len(documents) > 1:
        errors += _name_errors(specs, documents)
    raise_all(sorted(errors, key=_reading_order))
    merges = [spec for spec in specs if spec is not None]
    if len(documents) > 1:
        in_order(merges)
    return merges, _distinct(note for context in contexts for note in context.notes)


def looks_like_mergekit(text: str | bytes) -> bool:
    """Return True for a file with a top-level `merge_method`, or with several documents; never raises."""
    try:
        documents = yaml.load_all(text)
    except UsageError:
        # Broken YAML is still recognised, so that the right parser reports what is wrong.
        content = text.decode("utf-8", "replace") if isinstance(text, bytes) else text
        return re.search(r"(?m)^\ufeff?[\"']?merge_method[\"']?[ \t]*:", content) is not None
    return len(documents) > 1 or any(
        isinstance(document.data, dict) and "merge_method" in document.data for document in documents
    )


def in_order(specs: Iterable[MergeSpec]) -> list[MergeSpec]:
    """Return the merges of one file so that each comes after those whose results it uses.

    Raises:
        UsageError: E256 when they depend on each other in a circle.
    """
    waiting = list(specs)
    names = {spec.name for spec in waiting if spec.name}
    done: set[str | None] = set()
    ordered: list[MergeSpec] = []
    while waiting:
        ready = [
            spec
            for spec in waiting
            if all(model.path in done for model in spec.models() if model.path in names)
        ]
        if not ready:
            circle = ", ".join(f'"{spec.name}"' for spec in waiting if spec.name)
            raise UsageError(
                "E256",
                f"the merges {circle} need each other's results",
                where=waiting[0].where.get(("name",)),
                help="one of them must begin with models that exist; a folder of the same name is written ./NAME",
            )
        ordered += ready
        done |= {spec.name for spec in ready}
        waiting = [spec for spec in waiting if spec.name not in done]
    return ordered


def _catalogue(method: str) -> Parameters | None:
    from surgeon.merge import methods

    try:
        found = methods.catalogue(method)
    except UsageError:
        return None
    # Other spellings that the command line takes (dare-ties) are unknown to mergekit.
    return {p.name: p for p in found.parameters} if found.name == method else None


def _merge(context: Context) -> MergeSpec | None:
    document, data = context.document, context.document.data
    if not isinstance(data, dict):
        context.refuse(
            "E212",
            f"{show(data)} where a merge is expected",
            (),
            "a merge begins with merge_method: linear, a recipe of several steps with version: 1",
        )
        return None
    check_keys(context, (), "the top level")
    method, parameters = _method(context)
    read = _Reading(context, method, parameters)
    base = read_model(context, ("base_model",)) if data.get("base_model") is not None else None
    native = read_native_keys(context)
    spec = MergeSpec(
        method=method,
        modules=_modules(read),
        base_model=base,
        parameters=_parameters(read, ("parameters",)),
        dtype=_dtype(context, "dtype"),
        out_dtype=_dtype(context, "out_dtype"),
        precision="mergekit",
        tokenizer=read_tokenizer(context),
        chat_template=_chat_template(context),
        adjust=native.adjust,
        calibration=native.calibration,
        text_from=native.text_from,
        name=document.source(("name",)) or None if data.get("name") is not None else None,
        flavour="mergekit",
        source_text=document.text,
        where=_positions(document),
    )
    if data.get("name") is not None and spec.name is None:
        context.refuse(
            "E212",
            f"the name of a merge is text, not {show(data['name'])}",
            ("name",),
            "one word, in quotes if it looks like a number",
        )
    return spec


@dataclass(frozen=True)
class _Reading:
    """A document together with the method whose parameters it may give (None: unknown method)."""

    context: Context
    method: str
    parameters: Parameters | None


def _method(context: Context) -> tuple[str, Parameters | None]:
    data = context.document.data
    method = data.get("merge_method")
    if not isinstance(method, str) or not method:
        if "merge_method" in data:
            context.refuse("E212", f"merge_method is a name, not {show(method)}", ("merge_method",),
                           'for example merge_method: linear; "surgeon methods merge" lists all')  # fmt: skip
        else:
            context.refuse("E255", "merge_method is missing", (), "for example merge_method: linear")
        return "", None
    parameters = context.known(method)
    if parameters is None:
        near = close_matches(method.lower().replace("-", "_"), METHODS)
        listing = '"surgeon methods merge" lists them all'
        message = f"unknown merge method {show(method)}"
        context.refuse("E201", message, ("merge_method",), f"{near} {listing}" if near else listing)
    return method, parameters


def _mapping(context: Context, path: KeyPath, level: str) -> bool:
    """Check that there is a mapping with only known keys at a path."""
    data = context.at(path)
    if not isinstance(data, dict):
        context.refuse(
            "E212",
            f"{show(data)} where {level} is expected",
            path,
            f"a mapping with {', '.join(LEVELS[level])}",
        )
        return False
    check_keys(context, path, level)
    return True


def _modules(read: _Reading) -> tuple[Module, ...]:
    context, data = read.context, read.context.document.data
    given = [key for key in ("models", "slices", "modules") if data.get(key) not in (None, [], {})]
    if len(given) != 1:
        found = " and ".join(given) if given else "none"
        context.refuse(
            "E255",
            f"exactly one of models, slices and modules is needed, found {found}",
            (given[1],) if given else (),
            "models: for whole models, slices: for ranges of layers, modules: for parts of a multimodal model",
            key=bool(given),
        )
    modules = []
    for key in given:
        if key != "modules":
            modules.append(Module("", _slices(read, (), key)))
        elif isinstance(data[key], dict):
            modules += [_module(read, (key, name)) for name in data[key]]
        else:
            context.refuse("E212", f"{show(data[key])} where modules by name are expected", (key,),
                           "modules: {NAME: {models: [...]}}")  # fmt: skip
    return tuple(modules)


def _module(read: _Reading, path: KeyPath) -> Module:
    context, name = read.context, str(path[-1])
    if not _mapping(context, path, "an entry of modules"):
        return Module(name, ())
    data = context.at(path)
    given = [key for key in ("models", "slices") if data.get(key) not in (None, [])]
    if len(given) != 1:
        context.refuse(
            "E255",
            f'module "{name}" needs either models or slices',
            path,
            "keep one of the two keys, with a list",
            key=True,
        )
    slices = tuple(piece for key in given for piece in _slices(read, path, key))
    return Module(name, slices, _parameters(read, (*path, "parameters")))


def _slices(read: _Reading, path: KeyPath, key: str) -> tuple[Slice, ...]:
    """Read `models` (one slice over all layers) or `slices`."""
    context, place = read.context, (*path, key)
    entries = context.at(place)
    if not isinstance(entries, list):
        context.refuse("E212", f"{show(entries)} where a list of {key} is expected", place,
                       "begin each entry with a dash: - " + ("model: ./model" if key == "models" else "sources: [...]"))  # fmt: skip
        return ()
    if key == "models":
        return (Slice(_sources(read, place, "an entry of models")),)
    return tuple(_slice(read, (*place, n)) for n in range(len(entries)))


def _slice(read: _Reading, path: KeyPath) -> Slice:
    context = read.context
    if not _mapping(context, path, "an entry of slices"):
        return Slice(())
    data = context.at(path)
    if not isinstance(data.get("sources"), list) or not data["sources"]:
        context.refuse(
            "E255",
            "a slice needs a list of sources",
            path,
            "sources: [{model: ./model, layer_range: [0, 12]}]",
        )
        return Slice(())
    sources = _sources(read, (*path, "sources"), "an entry of sources")
    lengths = {s.layer_range[1] - s.layer_range[0] for s in sources if s.layer_range}
    if len(lengths) > 1:
        ranges = ", ".join(str(list(s.layer_range)) for s in sources if s.layer_range)
        context.refuse(
            "E214",
            f"the sources of a slice need equally many layers, found {ranges}",
            (*path, "sources"),
            "the upper end of a layer_range is exclusive; layers are merged in pairs, first with first",
            key=True,
        )
    base = read_model(context, (*path, "base_model")) if data.get("base_model") is not None else None
    return Slice(sources, base, _parameters(read, (*path, "parameters")))


def _sources(read: _Reading, path: KeyPath, level: str) -> tuple[SliceSource, ...]:
    context = read.context
    sources: list[SliceSource] = []
    seen: set[ModelRef | None] = set()
    for n in range(len(context.at(path))):
        place = (*path, n)
        if not _mapping(context, place, level):
            continue
        data = context.at(place)
        if data.get("model") is None:
            context.refuse("E255", f"{level} needs a model", place, "model: a folder, or org/name")
        model = read_model(context, (*place, "model")) if data.get("model") is not None else None
        layers = None
        if level == "an entry of sources":
            layers = _layer_range(context, (*place, "layer_range"))
        if model is not None and model in seen:
            context.refuse("E206", f"{show(str(model))} is listed twice in one slice", (*place, "model"),
                           "keep one entry; another slice may use the model again")  # fmt: skip
        seen.add(model)
        settings = _parameters(read, (*place, "parameters"), source=True)
        where = context.document.where((*place, "layer_range"))
        sources.append(SliceSource(model or ModelRef(""), layers, settings, where))
    return tuple(sources)


def _layer_range(context: Context, path: KeyPath) -> tuple[int, int] | None:
    value = context.at(path)
    fix = "the upper end is exclusive: [0, 8] are the first eight layers"
    if value is None:
        context.refuse("E214", "a source needs a layer_range", path, fix)
        return None
    numbers = [whole_number(item) for item in value] if isinstance(value, list) else []
    if len(numbers) != 2 or None in numbers:
        context.refuse("E214", "layer_range is a list of two whole numbers", path, fix)
        return None
    start, stop = int(numbers[0] or 0), int(numbers[1] or 0)
    if start < 0 or stop <= start:
        context.refuse("E214", f"layer_range [{start}, {stop}] contains no layer", path, fix)
        return None
    return start, stop


def _parameters(read: _Reading, path: KeyPath, source: bool = False) -> ParameterMap:
    """Read one parameter map: names against the method's, settings against their kind."""
    context, data = read.context, read.context.at(path)
    if data is None:
        return {}
    if not isinstance(data, dict):
        context.refuse("E212", f"{show(data)} where parameters by name are expected", path,
                       "such as {weight: 0.5}" + (f"; known are {', '.join(read.parameters)}" if read.parameters else ""))  # fmt: skip
        return {}
    for name, setting in data.items():
        place = (*path, name)
        parameter = read.parameters.get(name) if read.parameters is not None else None
        if name == "int8_mask" or getattr(parameter, "inert", False):
            context.note(f"{name} has no effect on the result", place)
        elif read.parameters is None:
            pass  # the method is unknown and already refused
        elif parameter is None and name in MERGEKIT_PARAMETERS:
            context.note(f"{name} has no effect with {read.method}", place)
        elif parameter is None:
            takes = f"{read.method} takes {', '.join(sorted(read.parameters)) or 'no parameters'}"
            near = close_matches(name, read.parameters) if len(context.errors) < MAX_ERRORS else None
            message = f"unknown parameter {show(name)} for method {read.method}"
            context.refuse("E211", message, place, f"{near} {takes}" if near else takes, key=True)
        elif source and not parameter.per_model:
            context.note(
                f"{name} has no effect below a single model; it belongs in the outer parameters", place
            )
        for inner, message, fix in faults_in(setting, parameter):
            context.refuse("E212", f"{name}: {message}", (*place, *inner), fix)
    return dict(data)


def _dtype(context: Context, key: str) -> str | None:
    value = context.document.data.get(key)
    if value is None or value == "":
        return None
    name = value.removeprefix("torch.") if isinstance(value, str) else None
    if name == "int64":
        context.refuse(
            "E212", f"{key} int64 would cut all weights to whole numbers", (key,), "bfloat16 or float32"
        )
        return None
    if name in DTYPES:
        return name
    near = _DTYPE_NICKNAMES.get(name or "")
    fix = f'did you mean "{near}"?' if near else close_matches(name or "", DTYPES)
    choices = f"known are {', '.join(DTYPES)}"
    context.refuse("E212", f"unknown {key} {show(value)}", (key,), f"{fix} {choices}" if fix else choices)
    return None


def _chat_template(context: Context) -> str | None:
    value = context.document.data.get("chat_template")
    if value is None or value == "":
        return None
    if isinstance(value, str) and (value in CHAT_TEMPLATES or (len(value) >= 20 and "{" in value)):
        return value
    near = close_matches(value, CHAT_TEMPLATES) if isinstance(value, str) else None
    choices = f"give {', '.join(CHAT_TEMPLATES)}, or the text of a Jinja template"
    message = f"unknown chat_template {show(value)}"
    context.refuse("E212", message, ("chat_template",), f"{near} {choices}" if near else choices)
    return None


def _positions(document: Document) -> dict[tuple, Where]:
    """Return one position per path: the value's, or the key's when the value starts on a later line."""
    places: dict[tuple, Where] = {}
    for path, place in document.values.items():
        key = document.keys.get(path)
        places[path] = place if key is None or key.line == place.line else key
    return places


def _name_errors(specs: list[MergeSpec | None], documents: list[Document]) -> list[UsageError]:
    """Check that names are unique and that at most one merge, the final one, has none."""
    errors = []
    seen: dict[str, Where] = {}
    unnamed = None
    for spec, document in zip(specs, documents, strict=True):
        if spec is None:
            continue
        place = document.where(("name",))
        if spec.name is None and unnamed is not None:
            message = f"only the final merge may have no name, the one on line {unnamed.line} has none either"
            errors.append(UsageError("E256", message, where=document.where(()), help="add name: ..."))
        elif spec.name is None:
            unnamed = document.where(())
        elif spec.name in seen:
            message = f'two merges are called "{spec.name}", the other on line {seen[spec.name].line}'
            errors.append(UsageError("E256", message, where=place, help="give each merge a name of its own"))
        else:
            seen[spec.name] = place
    return errors


def _reading_order(error: SurgeonError) -> tuple[int, int]:
    where = error.where or Where()
    return where.line or 0, where.column or 0


def _distinct(notes: Iterable[Note]) -> list[Note]:
    """Keep the first of equal messages and say how often it came up."""
    places: dict[str, list[Where | None]] = {}
    for note in notes:
        places.setdefault(note.message, []).append(note.where)
    return [
        Note(message if len(where) == 1 else f"{message} ({len(where)} places)", where[0])
        for message, where in places.items()
    ]
