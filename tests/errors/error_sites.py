"""Where the package refuses: every call that names an error code, read from the source without running it.

A site is a call whose first argument is a code (`InputError("E303", ...)`, `reading.refuse("E203", ...)`), or a call of
a local function with a parameter `code` that has a code as default. Texts that reach such a call through a variable,
a parameter or a constant are followed one step, so that the snapshot holds the words and not only their names.
"""

from __future__ import annotations

import ast
import contextlib
import copy
import functools
import gc
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[2] / "surgeon"
CODE = re.compile(r"E\d{3,4}")
CLASSES = {
    "SurgeonError",
    "UsageError",
    "InputError",
    "CheckFailed",
    "EnvironmentFault",
    "OutputConflict",
    "Interrupted",
}
"""The classes of surgeon/errors.py."""

RECORDERS = {"refuse": ("UsageError", 3), "_bad": ("InputError", 2), "_wrong": ("InputError", None)}
"""Functions that make the exception for their callers: its class, and the position of the help."""

PRINTED = {"E001": "SurgeonError", "E200": "UsageError"}
"""Codes that surgeon/cli writes itself, because there is no exception (a bug) or nothing is imported yet."""

CHOSEN = {
    "E268": "UsageError",
    "E360": "InputError",
    "E361": "InputError",
    "E362": "InputError",
    "E483": "InputError",
}
"""Codes that are picked from a table or by a condition before the exception is made."""

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Site:
    """One call: its code, the class it raises, its texts as written, and where the words in them come from."""

    code: str
    kind: str
    message: str
    help: str | None
    sources: tuple[str, ...]
    file: str
    line: int

    @property
    def block(self) -> str:
        lines = [f"{self.code} {self.kind}", f"  message  {self.message}"]
        if self.help is not None:
            lines.append(f"  help     {self.help}")
        return "\n".join([*lines, *(f"    {source}" for source in self.sources)])


class _Module:
    """A parsed file: functions, what they assign, module constants, imported names."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tree = ast.parse(path.read_text("utf-8"))
        self.owner: dict[int, Function] = {}
        self.calls: dict[str, list[ast.Call]] = defaultdict(list)
        self.functions: dict[str, Function] = {}
        self.constants: dict[str, ast.expr] = {}
        self.imported: dict[str, str] = {}
        self._index(self.tree, None)
        for node in self.tree.body:
            if isinstance(node, ast.Assign):
                self.constants.update({t.id: node.value for t in node.targets if isinstance(t, ast.Name)})

    def _index(self, node: ast.AST, function: Function | None) -> None:
        if isinstance(node, Function):
            function = self.functions[node.name] = node
        elif isinstance(node, ast.Call):
            self.calls[called(node)].append(node)
            if function is not None:
                self.owner[id(node)] = function
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("surgeon"):
            self.imported.update({alias.asname or alias.name: node.module for alias in node.names})
        for child in ast.iter_child_nodes(node):
            self._index(child, function)


@functools.cache
def module(path: Path) -> _Module:
    return _Module(path)


def called(call: ast.Call) -> str:
    """Return the last word of what is called."""
    return call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")


class _Plain(ast.NodeTransformer):
    """Replaces f-strings inside expressions by plain text: versions of Python quote nested ones differently."""

    def visit_JoinedStr(self, node: ast.JoinedStr) -> ast.Constant:
        return ast.Constant(template(node))


def expression(node: ast.expr) -> str:
    return ast.unparse(_Plain().visit(copy.deepcopy(node)))


def template(node: ast.expr) -> str:
    """Return a text as it is written, with its placeholders; other expressions after an equals sign."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        text = node.value
    elif isinstance(node, ast.JoinedStr):
        text = "".join(_piece(value) for value in node.values)
    else:
        text = f"= {expression(node)}"
    return text.replace("\n", "\\n")


def _piece(value: ast.expr) -> str:
    if isinstance(value, ast.FormattedValue):
        conversion = f"!{chr(value.conversion)}" if value.conversion != -1 else ""
        form = f":{template(value.format_spec)}" if value.format_spec else ""
        return f"{{{expression(value.value)}{conversion}{form}}}"
    return str(value.value) if isinstance(value, ast.Constant) else ""


def _says_something(node: ast.AST) -> bool:
    """Tell whether an expression holds words for people, not only keys."""
    return any(
        isinstance(n, ast.Constant) and isinstance(n.value, str) and " " in n.value.strip()
        for n in ast.walk(node)
    )


def literals(node: ast.expr | None) -> Iterator[str]:
    """Yield the texts written in an expression, without placeholders."""
    for inner in ast.walk(node) if node is not None else ():
        if isinstance(inner, ast.Constant) and isinstance(inner.value, str):
            yield inner.value


def _sources(found: _Module, call: ast.Call, texts: list[ast.expr]) -> Iterator[str]:
    names = {n.id for text in texts for n in ast.walk(text) if isinstance(n, ast.Name)}
    function = found.owner.get(id(call))
    if function is not None:
        for node in ast.walk(function):
            if isinstance(node, ast.Assign):
                targets = {n.id for t in node.targets for n in ast.walk(t) if isinstance(n, ast.Name)}
                if targets & names and _says_something(node.value):
                    yield f"{', '.join(sorted(targets & names))} = {expression(node.value)}"
        arguments = function.args
        parameters = {a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)}
        if parameters & names:
            for caller in _callers(found, function.name):
                if _says_something(caller):
                    yield f"from {expression(caller)}"
    for name in sorted(names):
        if name in found.constants and _says_something(found.constants[name]):
            yield f"{name} = {template(found.constants[name])}"
        elif name in found.imported:
            base = PACKAGE.parent / found.imported[name].replace(".", "/")
            path = base.with_suffix(".py") if base.with_suffix(".py").exists() else base / "__init__.py"
            value = module(path).constants.get(name)
            if value is not None and _says_something(value):
                yield f"{name} = {template(value)}"


@functools.cache
def _callers(found: _Module, name: str) -> list[ast.Call]:
    """Return the calls of a function: those of its module, then those of modules that import it by name."""
    calls = list(found.calls.get(name, ()))
    if name.startswith("_"):
        return calls
    place = ".".join(found.path.relative_to(PACKAGE.parent).with_suffix("").parts)
    for path, text in _texts().items():
        if f"from {place} import" in text and module(path).imported.get(name) == place:
            calls += module(path).calls.get(name, ())
    return calls


@functools.cache
def _texts() -> dict[Path, str]:
    return {path: path.read_text("utf-8") for path in sorted(PACKAGE.rglob("*.py"))}


def _is_code(node: ast.expr | None) -> bool:
    return (
        isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and CODE.fullmatch(node.value) is not None
    )


def _default_code(function: Function | None) -> str | None:
    """Return the code that a function's parameter `code` has by default."""
    if function is None:
        return None
    arguments = function.args
    positional = [*arguments.posonlyargs, *arguments.args]
    pairs = [
        *zip(positional[len(positional) - len(arguments.defaults) :], arguments.defaults, strict=True),
        *zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True),
    ]
    for argument, value in pairs:
        if argument.arg == "code" and value is not None and _is_code(value):
            return value.value  # type: ignore[attr-defined]
    return None


def _site(found: _Module, call: ast.Call) -> Site | None:
    name = called(call)
    arguments = list(call.args)
    named = bool(arguments) and _is_code(arguments[0])
    default = None if named else _default_code(found.functions.get(name))
    owner = found.owner.get(id(call))
    # Inside a function that makes exceptions for its callers there are no words of its own.
    chosen = (
        name in CLASSES and bool(arguments) and not named and (owner is None or owner.name not in RECORDERS)
    )
    if not named and not chosen and default is None:
        return None
    words = {keyword.arg: keyword.value for keyword in call.keywords if keyword.arg}
    if chosen:  # the code is picked by a condition or a table
        code, message = f"({expression(arguments[0])})", arguments[1] if len(arguments) > 1 else None
    elif named:
        code, message = arguments[0].value, arguments[1] if len(arguments) > 1 else words.get("message")  # type: ignore[attr-defined]
    else:
        given = [a for a in [words.get("code"), *arguments] if a is not None and _is_code(a)]
        code = given[0].value if given else default  # type: ignore[attr-defined]
        arguments = [a for a in arguments if not _is_code(a)]
        message = next((a for a in arguments if _says_something(a) or isinstance(a, ast.JoinedStr)), None)
        message = message if message is not None else (arguments[-1] if arguments else None)
    kind, place = RECORDERS.get(name, (name, None))
    help = words.get("help")
    if help is None and place is not None and len(arguments) > place:
        help = arguments[place]
    texts = [text for text in (arguments[0] if chosen else None, message, help) if text is not None]
    return Site(
        code, kind, template(message) if message is not None else "", None if help is None else template(help),
        tuple(_sources(found, call, texts)), str(found.path.relative_to(PACKAGE.parent)), call.lineno,
    )  # fmt: skip


@functools.cache
def sites() -> tuple[Site, ...]:
    """Return every site of the package, sorted by code and text."""
    with _no_collection():
        found = [
            site
            for path in files()
            for calls in module(path).calls.values()
            for call in calls
            if (site := _site(module(path), call))
        ]
    return tuple(sorted(found, key=lambda site: (site.code[0] == "(", len(site.code), site.block)))


@functools.cache
def files() -> tuple[Path, ...]:
    """Return the files that name a code."""
    return tuple(path for path, text in _texts().items() if re.search(r"""\bE\d{3,4}["'\]]""", text))


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """Keep the garbage collector from walking hundreds of syntax trees over and over: three quarters of the time."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


@functools.cache
def mentioned() -> dict[str, set[str]]:
    """Return every code that stands in the source by itself, or is printed as error[CODE] -> the files."""
    found: dict[str, set[str]] = defaultdict(set)
    with _no_collection():
        for path in files():
            for node in ast.walk(module(path).tree):
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    for code in re.findall(r"(?:^|error\[)(E\d{3,4})(?=$|\])", node.value):
                        found[code].add(str(path.relative_to(PACKAGE)))
    return found
