"""Records of families of mixtures of experts: one YAML file a family, data only, and records users bring along."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from surgeon.architectures.expert_records.record import ExpertRecord
from surgeon.errors import UsageError, Where, raise_all

__all__ = ["ExpertRecord", "known", "load", "record_of", "to_yaml"]

_FOLDER = Path(__file__).with_name("families")
_LARGEST = 1 << 20
_HELP = "`surgeon inspect MODEL --experts --guess` prints a record to start from"


def record_of(config: Mapping[str, Any]) -> ExpertRecord | None:
    """Return the record of a configuration's family, by its model_type or that of its text part; None without one."""
    for section in (config, config.get("text_config")):
        if isinstance(section, Mapping) and isinstance(section.get("model_type"), str):
            record = _by_type().get(section["model_type"])
            if record is not None:
                return record
    return None


@functools.cache
def known() -> tuple[ExpertRecord, ...]:
    """Return the records that come with the package, by family."""
    return tuple(load(file) for file in sorted(_FOLDER.glob("*.yaml")))


@functools.cache
def _by_type() -> dict[str, ExpertRecord]:
    return {model_type: record for record in known() for model_type in record.model_types}


def load(path: str | Path) -> ExpertRecord:
    """Read a record from a YAML file.

    Raises:
        UsageError: E240 it cannot be read, is not YAML, or is no record; with the line.
    """
    path = Path(path)
    try:
        if path.stat().st_size > _LARGEST:
            raise UsageError(
                "E240", f"{path} is too large for a record of experts", where=Where(str(path)), help=_HELP
            )
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise UsageError(
            "E240", f"the record of experts cannot be read: {reason}", where=Where(str(path)), help=_HELP
        ) from error
    return parse(text, str(path))


def parse(text: str, file: str) -> ExpertRecord:
    """Read a record from YAML text; ``file`` is for messages.

    Raises:
        UsageError: E240, as `load`.
    """
    try:
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, Loader=yaml.SafeLoader)):
            raise UsageError(
                "E240",
                "a record of experts uses no YAML aliases (*name)",
                where=Where(file),
                help="write the value out; " + _HELP,
            )
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        document = yaml.safe_load(text)
    except RecursionError:
        raise UsageError(
            "E240", "the record of experts is nested too deeply", where=Where(file), help=_HELP
        ) from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or "it is not YAML"
        raise UsageError(
            "E240", f"the record of experts is not valid YAML: {problem}",
            where=Where(file, mark.line + 1 if mark else None, mark.column + 1 if mark else None), help=_HELP,
        ) from error  # fmt: skip
    if not isinstance(document, dict):
        raise UsageError(
            "E240", "a record of experts is a YAML mapping with family, counts, storages and so on", where=Where(file),
            help=_HELP,
        )  # fmt: skip
    _refuse_repeated_keys(root, file)
    try:
        return ExpertRecord.model_validate_json(json.dumps(document))
    except ValidationError as error:
        raise_all([_finding(one, root, file) for one in error.errors(include_url=False)])
        raise  # pragma: no cover; pydantic never raises without findings
    except (TypeError, ValueError) as error:  # a date, a set: YAML has more types than JSON
        raise UsageError(
            "E240", f"the record of experts holds {error}", where=Where(file), help=_HELP
        ) from error


def to_yaml(record: ExpertRecord) -> str:
    """Return a record as YAML that `load` reads back equal; what is as by default is left out."""
    document = json.loads(record.model_dump_json(exclude_defaults=True))
    for name in ("storages", "moe_layers"):  # keep what tells the kinds apart in front
        document[name] = [_kind_first(part) for part in document[name]]
    return yaml.safe_dump(document, sort_keys=False, allow_unicode=True, width=110)


def _kind_first(part: dict[str, Any]) -> dict[str, Any]:
    return dict(sorted(part.items(), key=lambda item: item[0] not in ("storage", "rule")))


def _finding(error: Any, root: Any, file: str) -> UsageError:
    """Return one of pydantic's findings as ours, with the line the value is written in."""
    path = ".".join(str(key) for key in error["loc"])
    node = _node(root, error["loc"])
    message = error["msg"].removeprefix("Value error, ")
    message = {
        "Field required": "it is missing",
        "Extra inputs are not permitted": "there is no such key",
    }.get(message, message[0].lower() + message[1:])
    what = f"{path}: {message}" if path else message
    return UsageError(
        "E240",
        f"the record of experts is wrong: {what}",
        where=Where(file, node.start_mark.line + 1, None),
        help=_HELP,
    )


def _node(node: Any, location: tuple[Any, ...]) -> Any:
    """Return the deepest node of a YAML tree along pydantic's location (which also names kinds of unions)."""
    for key in location:
        if isinstance(node, yaml.MappingNode):
            below = {name.value: value for name, value in node.value}
            node = below.get(str(key), node)
        elif isinstance(node, yaml.SequenceNode) and isinstance(key, int) and key < len(node.value):
            node = node.value[key]
    return node


def _refuse_repeated_keys(node: Any, file: str) -> None:
    """Raise on a key that stands twice in a mapping; YAML would keep the last in silence."""
    if isinstance(node, yaml.SequenceNode):
        for below in node.value:
            _refuse_repeated_keys(below, file)
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for name, below in node.value:
            if name.value in seen:
                mark = name.start_mark
                raise UsageError(
                    "E240", f'"{name.value}" stands twice in the record of experts',
                    where=Where(file, mark.line + 1, mark.column + 1), help="leave one of them out",
                )  # fmt: skip
            seen.add(name.value)
            _refuse_repeated_keys(below, file)
