"""GGUF as the result of a command: written beside its place, asked by llama.cpp, then moved there.

`surgeon.deploy.gguf` writes the file. Here is what makes it a command's result: an equal file is left alone, the
disk is looked at first, and a file that llama.cpp reads as another model never arrives.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
import os
import secrets
import threading
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from surgeon import __version__
from surgeon.checkpoint.checkpoint import Checkpoint
from surgeon.checkpoint.companions import TEMPLATE_FILES, TOKENIZER_FILES
from surgeon.checkpoint.digests import known_digest, remember
from surgeon.checkpoint.header import Header, printable
from surgeon.checkpoint.strict_json import read_bytes
from surgeon.deploy import gguf, gguf_layout, gguf_tensors, llama_cpp, per_layer
from surgeon.deploy.configured import Configured
from surgeon.deploy.gguf_rows import Dequantized, Rows
from surgeon.deploy.gguf_tokenizer import read_tokenizer
from surgeon.derive import Derived, Source, plan_of
from surgeon.errors import EnvironmentFault, OutputConflict
from surgeon.execute import execute
from surgeon.output.disk import Disk
from surgeon.output.manifest import MANIFEST, seal_holds
from surgeon.output.staging import DestinationLock, check_destination, staging_prefix
from surgeon.system import memory_budget

MARGIN = 64 << 20
"""Bytes kept free beside the tensors: keys and tokenizer."""

CHECK_MEMORY = 1.5
"""Memory of the comparison, relative to the parameters in float32: the reference and what is mapped beside it."""

Tell = Callable[[str, int, int], None]


def write_gguf(
    source: Source,
    view: Checkpoint,
    where: Path,
    *,
    dtype: str,
    name: str,
    recipe: Mapping[str, Any],
    quantized: Mapping[str, Rows] = gguf.EMPTY,
    verb: str = "export",
    check: bool = True,
    overwrite: bool = False,
    dry_run: bool = False,
    threads: int = 1,
    memory_limit: int | None = None,
    progress: Tell | None = None,
    stop: threading.Event | None = None,
) -> dict[str, Any]:
    """Write ``view`` as one GGUF file, and publish it when llama.cpp computes the same from it.

    Args:
        source: the model, for names and the tokenizer.
        view: what is written, in plain numbers; the source itself, or a view of it.
        where: the file.
        dtype: float32, float16 or bfloat16, type of matrices that are not quantized.
        name: the model's name in the file.
        recipe: everything the result follows from beside the model's files, without paths.
        quantized: matrix of ``view`` -> its blocks, from `surgeon.deploy.gguf_rows`; what llama.cpp computes is compared
            with the values they stand for.
        verb: of the command, for the manifest.
        check: compare with transformers.

    Returns:
        "output", "notes", "architecture", "types" (type -> tensors) and "check" (what llama.cpp answered, or why it was
        not asked).

    Raises:
        InputError: E328, E329 as `surgeon.deploy.gguf.write` and `surgeon.deploy.gguf_check.check`; E466, E467 a matrix
            cannot have its type.
        OutputConflict: E601-E603. EnvironmentFault: E501 disk, E512 gguf is not installed.
    """
    check_place(where)
    types = {matrix: rows.kind for matrix, rows in quantized.items()}
    layout = gguf_layout.plan(view)
    folder = source.checkpoint.folder
    assert folder is not None and view.config is not None  # gguf_layout.plan refuses a bare file
    words = read_tokenizer(folder, int(view.config["vocab_size"]))
    total = gguf.Sizes(layout, words, dtype, name).of(types)
    kinds = gguf_tensors.types_of(layout, gguf.TYPES[dtype], types)
    found: dict[str, Any] = {
        "architecture": layout.architecture, "check": None, "types": gguf.counted(kinds),
        "notes": [*(() if quantized else layout.notes), *words.notes],
        "output": {"bytes": total, "parameters": sum(math.prod(tensor.shape) for tensor in layout.tensors), "dtype": dtype},
    }  # fmt: skip
    same = finished(source, view, where, recipe=recipe, dtype=dtype)
    if same is not None:
        found["output"] |= {"unchanged": True, "sha256": {where.name: same}, "bytes": where.stat().st_size}
        return found
    inputs = [folder, *(header.file for header in view.headers)]
    check_destination(where, inputs, overwrite=overwrite, is_file=True)
    reference = Dequantized(view, quantized) if quantized else view
    skipped = "--no-check" if not check else _cannot_check(view, memory_limit)
    _check_disk(where, total, _reference_bytes(source, reference) if skipped is None else 0)
    if dry_run:
        return found
    with _beside(where) as place:
        written = gguf.write(
            view, place / where.name, dtype=dtype, tokenizer=folder, name=name, quantized=quantized, verb=verb,
            recipe=_whole_recipe(source, view, recipe, folder), stop=stop,
            progress=(lambda done, size: progress("writing", done, size)) if progress else None,
        )  # fmt: skip
        if skipped is None:
            if progress is not None:
                progress("asking llama.cpp", 0, 1)
            held = _reference(source, reference, place, where.name, folder, threads, memory_limit, stop)
            found["check"] = _checked(place / where.name, held, dtype, quantized, folder)
        else:
            found["check"] = {"skipped": skipped}
            found["notes"].append(f"not compared with transformers: {skipped}")
        _publish(place, where)
    found["output"] |= {"sha256": {where.name: written.sha256}, "bytes": written.bytes}
    return found


def check_place(where: Path) -> None:
    """Refuse a destination that is no GGUF file, and a machine that cannot write one.

    Raises:
        OutputConflict: E601. EnvironmentFault: E512 gguf is not installed.
    """
    if where.suffix != ".gguf":
        raise OutputConflict("E601", f"the result is one file; {printable(where.name)} must end in .gguf",
                             help=f"-o {printable(where.name)}.gguf")  # fmt: skip
    if importlib.util.find_spec("gguf") is None:
        raise EnvironmentFault(
            "E512", "gguf is not installed; it writes GGUF headers", help='pip install "model-surgeon[gguf]"'
        )


def sizes(source: Source, view: Checkpoint, *, dtype: str, name: str) -> gguf.Sizes:
    """Return what tells the bytes of the file `write_gguf` would write: ``sizes(...).of({matrix: "Q4_0"})``.

    Raises:
        InputError: E328, E365 llama.cpp has no graph for the model, E329 its tokenizer cannot be written.
    """
    layout = gguf_layout.plan(view)
    folder = source.checkpoint.folder
    assert folder is not None and view.config is not None
    return gguf.Sizes(layout, read_tokenizer(folder, int(view.config["vocab_size"])), dtype, name)


def finished(
    source: Source, view: Checkpoint, where: Path, *, recipe: Mapping[str, Any], dtype: str
) -> str | None:
    """Return the sha256 of the file when it is there already, undamaged and made of the same; arguments as of `write_gguf`."""
    folder = source.checkpoint.folder
    if folder is None:
        return None
    return _finished(where, _whole_recipe(source, view, recipe, folder), dtype, view)


def model_name(source: Source, member: str | None = None) -> str:
    """Return what a file calls the model."""
    return f"{source.key} {member}" if member else source.key


def _whole_recipe(
    source: Source, view: Checkpoint, recipe: Mapping[str, Any], folder: Path
) -> dict[str, Any]:
    """Return what the file follows from beside the weights, without paths."""
    words = {
        name: hashlib.sha256(read_bytes(folder / name, 256_000_000)).hexdigest()
        for name in (*TOKENIZER_FILES, *TEMPLATE_FILES, "generation_config.json")
        if (folder / name).is_file()
    }
    config = hashlib.sha256(json.dumps(view.config, sort_keys=True).encode()).hexdigest()
    return {
        **recipe, "model": {"key": source.key, "repo": source.repo, "commit": source.commit},
        "view": getattr(view, "identity", ""), "config": config, "tokenizer": words,
    }  # fmt: skip


def _finished(where: Path, recipe: dict[str, Any], dtype: str, view: Checkpoint) -> str | None:
    """Return the digest of an equal, undamaged file that is there already."""
    sidecar = where.with_name(f"{where.name}.{MANIFEST}")
    try:
        body = sidecar.read_bytes()
        said = json.loads(body)
        digest = said["files"][where.name]
        inputs = {name: entry["sha256"] for name, entry in said["inputs"].items()}
        equal = (
            seal_holds(body) and said["recipe"] == json.loads(json.dumps(recipe)) and said["dtype"] == dtype
        )
        if not equal or said["program"]["version"] != __version__ or not where.is_file():
            return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    if inputs != {header.file.name: _digest(header) for header in view.headers} or _hashed(where) != digest:
        return None
    return digest


def _digest(header: Header) -> str:
    found = known_digest(header)
    if found is None:
        found = _hashed(header.file)
        remember([(header, found)])
    return found


def _hashed(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _cannot_check(view: Checkpoint, memory_limit: int | None) -> str | None:
    """Return why llama.cpp is not asked about the file, None when it is."""
    missing = [
        name for name in ("torch", "transformers", "xllamacpp") if importlib.util.find_spec(name) is None
    ]
    if missing or not llama_cpp.installed():
        return f"{', '.join(missing)} is not installed here"
    needed = int(4 * CHECK_MEMORY * sum(info.elements for info in view.tensors.values()))
    limit = memory_limit or memory_budget()
    if needed > limit:
        return f"that needs about {needed / 1e9:.1f} GB of memory, {limit / 1e9:.1f} GB may be used"
    return None


def _reference_bytes(source: Source, view: Checkpoint) -> int:
    """Return the bytes a folder for the comparison takes on disk: none where the source is one."""
    return 0 if _is_folder(source, view) else sum(info.nbytes for info in view.tensors.values())


def _is_folder(source: Source, view: Checkpoint) -> bool:
    """Say whether the library can load the source as it lies on disk, and it is what is written."""
    checkpoint = source.checkpoint
    stored = all(header.file.suffix == ".safetensors" for header in checkpoint.headers)
    return view is checkpoint and stored and getattr(checkpoint, "adapter_folder", None) is None


def _check_disk(where: Path, total: int, beside: int) -> None:
    info = os.statvfs(where.parent)
    free, needed = info.f_bavail * info.f_frsize, total + beside + MARGIN
    if needed > free:
        raise EnvironmentFault(
            "E501", f"not enough disk space for {printable(str(where))}: needs {needed / 1e9:,.1f} GB, {free / 1e9:,.1f} GB free",
            help="--dtype bfloat16 halves float32 output" + ("; --no-check saves the copy it is compared with" if beside else ""),
        )  # fmt: skip


@contextmanager
def _beside(where: Path):
    """Give a folder beside the destination that is gone afterwards, while the destination is locked."""
    disk = Disk()
    lock = DestinationLock.acquire(where)
    place = where.with_name(f"{staging_prefix(where)}{secrets.token_hex(6)}")
    try:
        disk.make_folder(place)
        yield place
    finally:
        if place.exists():
            disk.remove_tree(place)
        lock.release()


def _publish(place: Path, where: Path) -> None:
    """Move the sidecar, then the file: its arrival is the commit."""
    disk = Disk()
    for name in (f"{where.name}.{MANIFEST}", where.name):
        disk.rename(place / name, where.with_name(name))
    disk.sync_folder(where.parent)


def _reference(
    source: Source, view: Checkpoint, place: Path, title: str, folder: Path, threads: int,
    memory_limit: int | None, stop: threading.Event | None,
) -> Path:  # fmt: skip
    """Return the model as a folder that transformers loads; what is none yet is written as one."""
    if _is_folder(source, view):
        return folder
    reference = place / "reference"
    files: dict[str, bytes] = {}
    if per_layer.is_per_layer(view.config or {}):
        config, code = per_layer.finish(view.config or {})
        view, files = Configured(view, config), dict(code)
    derived = Derived(view, {}, "export", {}, title, files)
    execute(plan_of(source, {"": derived}, verb="export"), reference, threads=threads, memory_limit=memory_limit,
            resume=False, stop=stop)  # fmt: skip
    return reference


def _checked(
    file: Path, reference: Path, dtype: str, quantized: Mapping[str, Rows], folder: Path
) -> dict[str, Any]:
    from surgeon.deploy.gguf_check import check

    agreed = check(file, reference, dtype=dtype, quantized=quantized, tokenizer=folder)
    return {
        "texts": agreed.texts, "prompts": agreed.prompts, "kl": agreed.divergence,
        "largest_difference": agreed.difference, "same_first_choice": agreed.same_choice,
    }  # fmt: skip
