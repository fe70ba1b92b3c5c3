"""Tables with a library behind them: parquet files and Hugging Face datasets.

pyarrow and datasets are imported here only, when such a source is named. A dataset is read from
its Arrow tables, so nothing is decoded (an image stays the bytes it was stored as) and no code
of a dataset repository runs.
"""

from __future__ import annotations

import datetime
import hashlib
import importlib
import importlib.util
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from surgeon.checkpoint.header import printable
from surgeon.data.records import Record, Records
from surgeon.errors import EnvironmentFault, InputError, Where, close_matches

_BATCH = 1024


def _library(name: str, source: str) -> Any:
    if importlib.util.find_spec(name) is None:
        raise EnvironmentFault("E512", f"{name} is not installed; {printable(source)} cannot be read without it",
                               help=f"pip install {name}, or export the data to JSON lines")  # fmt: skip
    return importlib.import_module(name)


def read_parquet(path: Path, label: str, limit: int) -> list[Record]:
    """Return the rows of a parquet file; a row's line is its number, from 1.

    Raises:
        InputError: E371 damaged, E373 above ``limit`` bytes when unpacked.
        EnvironmentFault: E512 pyarrow is missing.
    """
    _library("pyarrow", path.name)
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    records: list[Record] = []
    try:
        with parquet.ParquetFile(path) as file:
            meta = file.metadata
            size = sum(meta.row_group(i).total_byte_size for i in range(meta.num_row_groups))
            _check_size(path.name, size, limit, Where(str(path)))
            for batch in file.iter_batches(batch_size=_BATCH):
                records += [
                    Record(row, len(records) + i, label) for i, row in enumerate(batch.to_pylist(), 1)
                ]
    except (arrow.ArrowException, OSError) as error:
        raise InputError("E371", f"{printable(path.name)} is no readable parquet file: {_first_line(error)}",
                         where=Where(str(path)), help="the file is damaged; fetch it again") from error  # fmt: skip
    return records


def _check_size(label: str, size: int, limit: int, where: Where | None) -> None:
    if size > limit:
        raise InputError("E373", f"{printable(label)} has {size:,} bytes of data; at most {limit:,} are read",
                         where=where, help="read a part of it: a split such as train[:10000], or an export")  # fmt: skip


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def read_saved(folder: Path, split: str | None, limit: int) -> Records:
    """Read a folder written by ``Dataset.save_to_disk`` or ``DatasetDict.save_to_disk``."""
    datasets = _library("datasets", folder.name)
    try:
        found = datasets.load_from_disk(str(folder))
    except Exception as error:
        raise InputError("E371", f"{printable(folder.name)} is no readable dataset: {_first_line(error)}",
                         where=Where(str(folder)), help="save it again with save_to_disk") from error  # fmt: skip
    if isinstance(found, dict):
        chosen = _split_of(folder.name, list(found), split)
        base, bracket, slice_ = chosen.partition("[")
        table = found[base]
        if bracket:
            raise InputError("E379", f"{printable(folder.name)}: slices such as [{slice_} need a dataset of the hub",
                             help=f'use split "{base}"')  # fmt: skip
    else:
        chosen, table = split, found
    return _records(table, folder.name, chosen, limit)


def _split_of(label: str, splits: list[str], wanted: str | None) -> str:
    """Return the split to read: the wanted one, else the only one, else train."""
    if wanted is None and (len(splits) == 1 or "train" in splits):
        return splits[0] if len(splits) == 1 else "train"
    listed = f"it has {', '.join(splits)}"
    if wanted is None:
        raise InputError("E379", f"{printable(label)} has several splits and none is named", help=listed)
    # a slice (train[:10]) or a sum (train+test) of splits is checked by its names
    for part in wanted.split("+"):
        name = part.partition("[")[0].strip()
        if name not in splits:
            raise InputError("E379", f'{printable(label)} has no split "{printable(name)}"',
                             help=close_matches(name, splits) or listed)  # fmt: skip
    return wanted


def read_dataset(name: str, config: str | None, split: str | None, offline: bool, limit: int) -> Records:
    """Read a dataset of the hub: from the local cache, else over the network when that is allowed.

    Raises:
        InputError: E379 no such configuration or split. EnvironmentFault: E512, E521, E522, E524.
    """
    datasets = _library("datasets", name)
    label = name + (f":{config}" if config else "")
    builder = _cached(datasets, name, config)
    if builder is None:
        offline = offline or os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}
        offline = offline or os.environ.get("HF_DATASETS_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}
        if offline:
            raise EnvironmentFault("E521", f"{label} is neither a file nor in the local datasets cache, and the network is off",
                                   help=_export(name, config))  # fmt: skip
        builder = _downloaded(datasets, name, config, label)
    chosen = _split_of(label, list(builder.info.splits or ()), split)
    try:
        table = builder.as_dataset(split=chosen)
    except Exception as error:
        raise InputError("E379", f'{label}: split "{printable(chosen)}" cannot be read: {_first_line(error)}',
                         help=f"remove its entry from the datasets cache, or {_export(name, config)}") from error  # fmt: skip
    return _records(table, label, chosen, limit)


def _export(name: str, config: str | None) -> str:
    call = f"load_dataset('{name}'" + (f", '{config}'" if config else "") + ", split='train')"
    return f"once online: python -c \"from datasets import *; {call}.to_json('data.jsonl')\", then give data.jsonl"


def _cached(datasets: Any, name: str, config: str | None) -> Any:
    """Return a builder over the cached Arrow files, or None when the cache has nothing of that name.

    The builder that ``load_dataset`` itself falls back to offline is used directly: whether this
    process may use the network is fixed in ``datasets`` when it is imported, too early for us.
    """
    from datasets.packaged_modules.cache.cache import Cache

    folder = Path(os.path.expanduser(str(datasets.config.HF_DATASETS_CACHE)))
    parts = name.split("/")
    parts[-1] = datasets.naming.camelcase_to_snakecase(parts[-1])
    configs = sorted({p.parts[-4] for p in (folder / "___".join(parts)).glob("*/*/*/dataset_info.json")})
    if not configs:
        return None
    if config is None and len(configs) > 1 and "default" not in configs:
        raise InputError("E379", f"{name} has several configurations in the cache and none is named",
                         help=f"one of {', '.join(f'{name}:{c}' for c in configs)}")  # fmt: skip
    if config is None:
        config = configs[0] if len(configs) == 1 else "default"
    if config not in configs:
        return None
    quiet = datasets.utils.logging
    level = quiet.get_verbosity()
    quiet.set_verbosity_error()  # it would warn that it uses the cache, with the whole path
    try:
        return Cache(repo_id=name, dataset_name=parts[-1], config_name=config, version="auto", hash="auto")
    except (ValueError, OSError) as error:
        raise InputError("E379", f"the cached copy of {name}:{config} cannot be read: {_first_line(error)}",
                         help=f"remove its entry from the datasets cache, or {_export(name, config)}") from error  # fmt: skip
    finally:
        quiet.set_verbosity(level)


def _downloaded(datasets: Any, name: str, config: str | None, label: str) -> Any:
    try:
        datasets.load_dataset(name, config)
    except ValueError as error:
        raise InputError(
            "E379", f"{label} cannot be loaded: {_first_line(error)}", help=_export(name, config)
        ) from error
    except Exception as error:
        kind = type(error).__name__
        if kind in {"DatasetNotFoundError", "RepositoryNotFoundError"}:
            raise EnvironmentFault("E522", f"{label} is neither a file nor a dataset of the hub (or it is private)",
                                   help="check the spelling; for a local file start with ./") from error  # fmt: skip
        raise EnvironmentFault("E524", f"the hub cannot be reached for {label}: {kind}",
                               help=f"try again later, or {_export(name, config)}") from error  # fmt: skip
    builder = _cached(datasets, name, config)
    if builder is None:
        raise InputError(
            "E379", f"{label} was loaded but is not in the datasets cache", help=_export(name, config)
        )
    return builder


def _records(table: Any, label: str, split: str | None, limit: int) -> Records:
    """Return the rows of a dataset with the sha256 over their canonical JSON, one line each."""
    _check_size(label, int(table.data.nbytes) if table._indices is None else 0, limit, None)
    digest = hashlib.sha256()
    records = []
    size = 0
    for number, row in enumerate(_rows(table), 1):
        line = json.dumps(row, sort_keys=True, ensure_ascii=False, default=_plain).encode(
            "utf-8", "surrogatepass"
        )
        digest.update(line + b"\n")
        size += len(line)
        _check_size(label, size, limit, None)
        records.append(Record(row, number, label))
    if not records:
        raise InputError(
            "E372", f"{printable(label)} has no records", help="name another split, or another data set"
        )
    notes = (f'{label}: split "{split}"',) if split else ()
    return Records(tuple(records), label, digest.hexdigest(), "dataset", notes)


def _rows(table: Any) -> Iterator[dict[str, Any]]:
    plain = table.with_format("arrow")
    for start in range(0, len(plain), _BATCH):
        yield from plain[start : start + _BATCH].to_pylist()


def _plain(value: Any) -> str:
    """Return a stable text for what JSON has no word for; only the digest sees it."""
    if isinstance(value, (bytes, bytearray)):
        return hashlib.sha256(value).hexdigest()
    if isinstance(value, (datetime.date, datetime.time)):
        return value.isoformat()
    return str(value)
