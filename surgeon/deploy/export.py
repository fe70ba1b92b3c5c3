"""A model in another form, or one member of a nested family as a model of its own.

Folders go through a plan like every other output: values that stay are copied byte by byte, and nothing is
published that was not read back. What a form needs of a model (`_form`) is settled before a weight is read.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from surgeon import traits
from surgeon.checkpoint.checkpoint import Checkpoint
from surgeon.checkpoint.companions import allowed_roots, check_link
from surgeon.checkpoint.dtypes import CODES
from surgeon.checkpoint.header import printable
from surgeon.checkpoint.strict_json import read_bytes
from surgeon.deploy import decilm, members, per_layer, runtimes
from surgeon.deploy.configured import Configured
from surgeon.deploy.export_request import ExportRequest
from surgeon.derive import Derived, Source, plan_of
from surgeon.errors import InputError, UsageError, Where
from surgeon.execute import execute, preflight
from surgeon.formats.dequantized import plain_needed
from surgeon.output import staging
from surgeon.output.manifest import MANIFEST
from surgeon.plan import Plan
from surgeon.structure.find import structure_of
from surgeon.structure.views import PrunedView
from surgeon.system import peak_memory, physical_cores

Tell = Callable[[str, int, int], None]

OF_PARENT = frozenset({members.FILE, "pruning.json"})
"""Companions of a family's parent that say nothing true about a member."""


@dataclass(frozen=True)
class Form:
    """A model as it is to be written.

    Attributes:
        view: its tensors and config.
        added: files that join or replace the source's.
        dropped: names of the source's files that stay behind.
        unchecked: nothing but its own class says whether tensors and config belong together.
    """

    view: Checkpoint
    added: Mapping[str, bytes]
    dropped: frozenset[str] = frozenset()
    unchecked: bool = False


def export(
    source: Source,
    request: ExportRequest,
    destination: Path | None = None,
    *,
    overwrite: bool = False,
    resume: bool = True,
    dry_run: bool = False,
    threads: int | None = None,
    memory_limit: int | None = None,
    progress: Tell | None = None,
    stop: threading.Event | None = None,
) -> dict[str, Any]:
    """Write a model in another form and publish it when it was verified.

    Args:
        source: the model.
        request: a checked request.
        destination: folder or file; default `ExportRequest.default_output`.
        overwrite: replace an earlier result.
        resume: continue a matching interrupted run (folders; a GGUF file begins anew).
        dry_run: only say what would be written, or refuse as the run would.
        progress: (what, done, total).

    Returns:
        The document ``surgeon export --json`` prints.

    Raises:
        UsageError: E285 a type GGUF does not have, E286 shapes DeciLM cannot say, E289 no such member.
        InputError: E311 quantized weights; E324, E325, E327, E330 the model cannot take this form; E328, E329 llama.cpp
            computes something else; E466, E467 a matrix cannot have its GGUF type.
        OutputConflict, EnvironmentFault: destination, disk, memory, packages.
    """
    started = time.perf_counter()
    form = _form(source, request)
    bare = form.view.config is None
    where = (destination or request.default_output(source.path, bare=bare)).absolute()
    said = _document(source, request, form, where)
    if request.to == "gguf":
        found = _gguf(source, request, form.view, where, overwrite=overwrite, dry_run=dry_run, threads=threads or physical_cores(),
                      memory_limit=memory_limit, progress=progress, stop=stop)  # fmt: skip
    else:
        found = _folder(source, request, form, where, overwrite=overwrite, resume=resume, dry_run=dry_run,
                        threads=threads or physical_cores(), memory_limit=memory_limit, progress=progress, stop=stop)  # fmt: skip
    said["output"] |= found.pop("output")
    said["notes"] += [note for note in found.pop("notes", ()) if note not in said["notes"]]
    return {
        **said, **found, "status": "dry-run" if dry_run else "ok",
        "seconds": round(time.perf_counter() - started, 3), "peak_memory_bytes": peak_memory(),
    }  # fmt: skip


def stored_dtype(checkpoint: Checkpoint) -> str:
    """Return the type most numbers of a model are stored in, among those a form can be asked for."""
    names = {code: name for name, code in CODES.items()}
    counts: dict[str, int] = {}
    for name, info in checkpoint.tensors.items():
        code = getattr(checkpoint, "stored_dtype", lambda n: checkpoint.tensors[n].dtype)(name)
        if code in names:
            counts[names[code]] = counts.get(names[code], 0) + info.elements
    usable = {name: count for name, count in counts.items() if name in ("float32", "float16", "bfloat16")}
    return max(sorted(usable), key=usable.__getitem__, default="float32")


def _gguf(
    source: Source, request: ExportRequest, view: Checkpoint, where: Path, threads: int, **options: Any
) -> dict[str, Any]:
    from surgeon.deploy import gguf_choice, gguf_layout, gguf_rows
    from surgeon.deploy.export_gguf import check_place, model_name, write_gguf

    check_place(where)
    types = gguf_choice.chosen(view, gguf_layout.plan(view), request.gguf_type, request.gguf_override)
    return write_gguf(
        source, view, where, dtype=request.dtype or stored_dtype(view), name=model_name(source, request.member),
        recipe=request.recipe(), quantized=gguf_rows.rounded(view, types, threads), check=request.check, threads=threads, **options,
    )  # fmt: skip


# ---- what is written --------------------------------------------------------------------------------


def _form(source: Source, request: ExportRequest) -> Form:
    view = source.checkpoint
    quantized = traits.quantized(view)
    if quantized and (request.to != "safetensors" or request.dtype or request.member):
        raise plain_needed(
            view,
            "this needs plain weights"
            + ("; without --dtype its stored form can be copied" if request.dtype else ""),
        )
    if view.config is None and (request.to != "safetensors" or request.member):
        raise InputError("E308", f"{view.label} has no config.json, which this form is made from", where=Where(view.label),
                         help="give the model folder; a bare file can only become another safetensors file")  # fmt: skip
    form = Form(view, {})
    if request.member:
        form = _member(view, request.member)
    config = form.view.config
    if request.to == "decilm":
        assert config is not None
        finished, code = _as_decilm(config)
        form = replace(form, view=Configured(form.view, finished), added=dict(code), unchecked=True)
    elif request.to == "safetensors" and config is not None and _is_ours(config):
        finished, code = per_layer.finish(config)  # code of an older version is replaced by this one's
        form = replace(form, view=Configured(form.view, finished), added=dict(code), unchecked=True)
    if form.unchecked:
        _check_class(form.view)
    return form


def _as_decilm(config: dict[str, Any]) -> tuple[dict[str, Any], list[tuple[str, bytes]]]:
    try:
        return decilm.finish(config)
    except UsageError as error:
        error.help = "--to safetensors gives a folder for transformers, --to gguf a file for llama.cpp"
        raise


def _is_ours(config: Mapping[str, Any]) -> bool:
    return per_layer.is_per_layer(config) and config.get("model_type") != decilm.MODEL_TYPE


def _member(parent: Checkpoint, name: str) -> Form:
    """Return a member of a nested family: leading slices of the parent."""
    file = parent.folder / members.FILE if parent.folder is not None else None
    if file is None or not file.is_file():
        raise UsageError(
            "E289", f"{parent.label} is no nested family: it has no {members.FILE}", where=Where(parent.label),
            help="a family is made with: surgeon prune MODEL --target-speedup 1.3,1.6 --nested",
        )  # fmt: skip
    check_link(file, allowed_roots(file.parent))
    family = members.read_members(read_bytes(file))
    structure = structure_of(parent)
    member = members.named(family, name)
    view: Any = PrunedView(parent, structure, member.cut(structure))
    return Form(view, {}, OF_PARENT, unchecked=True)


def _check_class(view: Checkpoint) -> None:
    """Refuse tensors that are not exactly those of the model's class (E325).

    The class is built without data; where the library is not installed, reading back is all there is.
    """
    from surgeon.verify.readers import available

    if available():
        return
    import torch

    from surgeon.deploy.build import build, check_complete

    assert view.config is not None
    model = build(view.config, dtype=torch.float32, device="meta")
    wanted = {name: tuple(tensor.shape) for name, tensor in model.named_parameters()}
    wanted |= {
        name: tuple(tensor.shape)
        for name, tensor in model.state_dict().items()
        if name in dict(model.named_buffers())
    }
    held = {name: info.shape for name, info in view.tensors.items()}
    spare = {name for name in model.state_dict() if name not in wanted}  # the second name of a tied parameter
    check_complete(
        {
            "missing_keys": wanted.keys() - held.keys(),
            "unexpected_keys": {n for n in held.keys() - wanted.keys() - spare if not n.endswith("rotary_emb.inv_freq")},
            "mismatched_keys": {n for n in wanted.keys() & held.keys() if wanted[n] != held[n]},
        },
        Path(view.label),
    )  # fmt: skip


# ---- folders ----------------------------------------------------------------------------------------


def folder_plan(source: Source, request: ExportRequest, form: Form, title: str) -> Plan:
    """Return the plan that writes a form as a folder, or as one file when it has no config."""
    derived = Derived(
        view=form.view, recipe=request.recipe(), method="member" if request.member else "export", title=title,
        parameters={name: value for name, value in (("to", request.to), ("member", request.member), ("dtype", request.dtype)) if value},
        companions=form.added, notices=tuple(_reasons(form.view.config)), command=request.command(source.key),
    )  # fmt: skip
    plan = plan_of(
        source, {"": derived}, verb="export", dtype=request.dtype, notes=_notes(form.view),
        max_shard_bytes=request.max_shard_size, allow_nonfinite=request.allow_nonfinite,
    )  # fmt: skip
    model = plan.models[""]
    kept = tuple(c for c in model.companions if c.name not in form.dropped or c.name in form.added)
    return replace(plan, models={"": replace(model, companions=kept)})


def _folder(
    source: Source, request: ExportRequest, form: Form, where: Path, *, overwrite: bool, resume: bool, dry_run: bool,
    threads: int, memory_limit: int | None, progress: Tell | None, stop: threading.Event | None,
) -> dict[str, Any]:  # fmt: skip
    plan = folder_plan(source, request, form, where.name)
    outputs = plan.outputs()[""]
    found: dict[str, Any] = {
        "plan": {"id": plan.plan_id(), "tensors": len(outputs)},
        "output": {"bytes": sum(o.nbytes for o in outputs), "parameters": sum(o.elements for o in outputs),
                   "dtype_bytes": _by_type((o.dtype, o.nbytes) for o in outputs)},
    }  # fmt: skip
    inputs = locations(source)
    if dry_run:
        bare = form.view.config is None
        again = overwrite or _holds(
            where, plan.plan_id(), bare
        )  # the run would find that nothing is to be done
        staging.check_destination(where, inputs, overwrite=again, is_file=bare)
        check = preflight(plan, where, threads=threads, memory_limit=memory_limit)
        found["plan"] |= {"disk_bytes": check.estimate.disk_bytes, "disk_free_bytes": check.disk_free,
                          "memory_estimate_bytes": check.estimate.memory_bytes}  # fmt: skip
        return found
    outcome = execute(
        plan, where, threads=threads, overwrite=overwrite, resume=resume, memory_limit=memory_limit, stop=stop,
        progress=(lambda done, total: progress("writing", done, total)) if progress else None, input_paths=inputs,
    )  # fmt: skip
    files = outcome.manifests[""]["files"]
    found["output"] |= {
        "unchanged": outcome.unchanged,
        "sha256": {name: digest for name, digest in files.items() if name.endswith(".safetensors")},
        "shards": sum(name.endswith(".safetensors") for name in files),
    }
    return found


def _holds(where: Path, plan_id: str, bare: bool) -> bool:
    """Say whether a plan's result lies there already, by what its manifest says."""
    file = where.with_name(f"{where.name}.{MANIFEST}") if bare else where / MANIFEST
    try:
        return json.loads(file.read_bytes())["plan"] == plan_id
    except (OSError, ValueError, KeyError, TypeError):
        return False


def locations(source: Source) -> list[Path]:
    """Return the folders and files that are read, for the check that none is the output."""
    checkpoint = source.checkpoint
    folders = [checkpoint.folder, getattr(checkpoint, "adapter_folder", None)]
    return [*(path for path in folders if path is not None), *(header.file for header in checkpoint.headers)]


def _document(source: Source, request: ExportRequest, form: Form, where: Path) -> dict[str, Any]:
    tensors = source.checkpoint.tensors.values()
    return {
        "status": "ok", "to": request.to, "member": request.member,
        "model": {"name": source.key, "parameters": sum(i.elements for i in tensors), "bytes": sum(i.nbytes for i in tensors)},
        "output": {"path": str(where), "unchanged": False},
        "readers": [f"{one.runtime} ({one.form})" for one in _readers(form.view.config) if one.loads and one.form]
        if request.to != "gguf" else ["llama.cpp"],
        "notes": _notes(form.view), "warnings": [],
    }  # fmt: skip


def _notes(view: Checkpoint) -> list[str]:
    return [str(note) for note in getattr(view, "notes", ())]


def _readers(config: Mapping[str, Any] | None) -> list[runtimes.Reader]:
    """Return which programs load a result as it is, where that is known."""
    if config is None or per_layer.base_type(config) not in (*per_layer.FAMILIES, decilm.MODEL_TYPE):
        return []
    return [one for one in runtimes.readers(config) if not one.loads or one.form.startswith("folder")]


def _reasons(config: Mapping[str, Any] | None) -> list[str]:
    return [f"{one.runtime}: {printable(one.reason)}" for one in _readers(config) if one.reason and one.loads]


def _by_type(sizes: Any) -> dict[str, int]:
    found: dict[str, int] = {}
    for dtype, nbytes in sizes:
        found[dtype] = found.get(dtype, 0) + nbytes
    return found
