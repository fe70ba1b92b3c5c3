"""``surgeon quantize``, from a request to a published model, and the document about it."""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surgeon.calibrate import quality
from surgeon.calibrate.activation_gradients import spilled_bytes
from surgeon.checkpoint.checkpoint import Checkpoint, open_path
from surgeon.checkpoint.strict_json import read_json_object
from surgeon.deploy import export_gguf
from surgeon.derive import Derived, Source, plan_of
from surgeon.errors import InputError, SurgeonError, UsageError
from surgeon.execute import Outcome, execute
from surgeon.formats.dequantized import dequantized
from surgeon.output.manifest import MANIFEST
from surgeon.output.places import check_places, enough_disk, inputs_of, locked, same_result
from surgeon.plan import Plan
from surgeon.quantize import decide, expert_menu, gguf_file, wishes
from surgeon.quantize.decide import PLAN_FILE, Decision
from surgeon.quantize.request import QuantizeRequest
from surgeon.quantize.scheme_names import by_name, parse
from surgeon.quantize.sequential import Finished, quantize_layers
from surgeon.quantize.session import Say, Schemes, Session, Tell
from surgeon.quantize.sizes import bits_of, file_bytes, matrix_bytes, others, word
from surgeon.quantize.view import QuantizedView
from surgeon.system import peak_memory, physical_cores
from surgeon.verify.static import verify_path

NOT_RUNNABLE = ("E375", "E380", "E381", "E382")
"""Codes of models that cannot be run here: no tokenizer, no class."""


@dataclass
class Made:
    """A quantized model before it is published."""

    session: Session
    decision: Decision
    finished: Finished
    view: QuantizedView
    derived: Derived
    quality: dict[str, Any]
    reading: dict[str, Any]
    remarks: list[str]


def quantize(
    request: QuantizeRequest,
    source: Source,
    destination: Path,
    *,
    overwrite: bool = False,
    resume: bool = True,
    dry_run: bool = False,
    progress: Tell | None = None,
    say: Say | None = None,
    stop: threading.Event | None = None,
) -> dict[str, Any]:
    """Quantize a model and publish the result when its reader was seen to load it.

    Args:
        request: a checked request.
        source: the model.
        destination: folder of the result.
        overwrite: replace an earlier result.
        resume: take up what an interrupted run left.
        dry_run: only say what would be done, or refuse as the run would.
        progress: called with (what is being done, done, total).
        say: called with one sentence at a time.

    Returns:
        The document ``surgeon quantize --json`` prints.

    Raises:
        UsageError: E216, E217, E221, E231 the request; E462 a target out of reach.
        InputError: what forms refuse; E311 a quantized source; E482, E483 the result is not read as it is meant.
    """
    started = time.perf_counter()
    destination = destination.absolute()
    say = say or (lambda _: None)
    request = _resolved(request, say)
    session = Session(
        source, request, request.work_folder(destination), progress or (lambda *_: None), say, stop
    )
    _ = session.checkpoint, session.linear, session.form
    if request.allocation == "pmq" or request.drop_experts:
        if not any(m.routed for m in session.linear.matrices):
            option = "--drop-experts" if request.drop_experts else "--allocation pmq"
            raise UsageError("E217", f"{option} is about experts, and {source.key} has none that can be quantized",
                             help="leave it out: a target chooses a width for every matrix")  # fmt: skip
        expert_menu.check(session)
    named = _named(session)
    document = _document(session, destination)
    if not session.form.folder:
        export_gguf.check_place(destination)
        _ = session.gguf_sizes  # refuses what llama.cpp has no graph or no words for
    same = _unchanged(session, destination) if resume else None
    if same is not None:
        return {**document, **same, "seconds": _since(started)}
    inputs = inputs_of(source)
    check_places(session.work, destination, inputs, overwrite=overwrite, is_file=not session.form.folder)
    needs = enough_disk(_disk_bytes(session), destination, session.work)
    if dry_run:
        return {
            **document,
            **_rehearsed(session, needs, named, document["output"]),
            "seconds": _since(started),
        }
    with locked(session):
        if not resume:
            shutil.rmtree(session.work, ignore_errors=True)
        if session.form.folder:
            made = _make(session, destination.name)
            found = _as_folder(made, destination, inputs, overwrite=overwrite, resume=resume)
        else:
            found = _as_file(session, destination, overwrite=overwrite)
        if not request.work:
            shutil.rmtree(session.work, ignore_errors=True)
    if not request.work:
        with suppress(OSError):  # other things may lie there: steps of a recipe
            session.work.parent.rmdir()
    return {**document, **found, "seconds": _since(started), "peak_memory_bytes": peak_memory()}


def _named(session: Session) -> Schemes | None:
    """Return the schemes that need no text to be known, and refuse files that do not fit; None where a target decides."""
    request = session.request
    if request.plan is not None:
        return decide.planned(session, Path(request.plan).expanduser()).schemes
    if request.target is None:
        return wishes.assigned(session)
    decide.check_given(session)
    return None


def _resolved(request: QuantizeRequest, say: Say) -> QuantizeRequest:
    """Return the request with its method: GPTQ where fewer than eight bits are asked for, else rounding."""
    if request.method is not None:
        return request
    if request.target is not None:
        low = request.format != "bitsandbytes"
    elif request.plan is not None:
        low = any(
            scheme is not None and scheme.kind == "int" and scheme.bits < 8
            for scheme in _schemes_in(Path(request.plan))
        )
    else:
        asked = [parse(text, request.format, group_size=request.group_size, symmetric=request.symmetric).scheme
                 for _, text in request.wishes]  # fmt: skip
        low = any(scheme is not None and scheme.kind == "int" and scheme.bits < 8 for scheme in asked)
    method = "gptq" if low else "rtn"
    say(
        f"--method {method}: "
        + ("widths under 8 bits" if low else "nothing under 8 bits, so rounding to nearest needs no text")
    )
    return request.model_copy(update={"method": method})


def _schemes_in(plan: Path) -> list[Any]:
    try:
        place = plan.expanduser() / PLAN_FILE if plan.expanduser().is_dir() else plan.expanduser()
        return [by_name(text) for text in read_json_object(place)["matrices"].values() if text != "kept"]
    except (OSError, KeyError, AttributeError, SurgeonError):
        return []  # it is refused when it is read


# ---- making it ------------------------------------------------------------------------------------


@dataclass
class Solved:
    """Layers of a model as they are stored, and what they came from."""

    session: Session
    decision: Decision
    working: Checkpoint
    finished: Finished
    remarks: list[str]


def _solve(session: Session) -> Solved:
    """Return all layers, quantized as was decided."""
    if session.needs_text:
        _ = session.texts
    if session.request.drop_experts:
        from surgeon.quantize.dropping import dropped

        session, decision = dropped(session)
    else:
        decision = decide.decide(session, lambda schemes: _divergence(session, schemes))
    working, scaling = _scaled(session, decision.schemes)
    finished = _layers(session, decision.schemes, working)
    return Solved(session, decision, working, finished, [*decision.remarks, *scaling, *_facts(finished)])


def _make(session: Session, title: str) -> Made:
    """Return the quantized model: decided, its layers made, written, read by its real reader, its quality measured."""
    solved = _solve(session)
    session, decision, finished, remarks = solved.session, solved.decision, solved.finished, solved.remarks
    view = _view(session, decision.schemes, finished, solved.working)
    derived = _derived(session, decision, finished, view, title)
    found = _quality(session, dequantized(view), remarks)
    reading = _read_back(session, derived, view)
    if reading.get("notice"):
        remarks.append(reading["notice"])
    return Made(session, decision, finished, view, derived, found, reading, remarks)


def _as_file(session: Session, where: Path, *, overwrite: bool) -> dict[str, Any]:
    """Write one GGUF file and return the part of the document about it."""
    solved = _solve(session)
    found = _quality(session, gguf_file.dequantized(solved.working, solved.finished), solved.remarks)
    written = gguf_file.write(session, solved.working, solved.finished, where, overwrite=overwrite)
    reading = gguf_file.reading(written["check"])
    notes = [reading["notice"]] if reading.get("notice") else []
    output = {
        "path": str(where), "bytes": written["output"]["bytes"], "bits": bits_of(session, solved.decision.schemes),
        "parameters": sum(info.elements for info in session.checkpoint.tensors.values()), "unchanged": False, "shards": 1,
        "sha256": written["output"]["sha256"],
    }  # fmt: skip
    return {
        **_about(session, solved.decision, solved.finished), "output": output, "plan": {"id": None}, "quality": found,
        "metrics": _metrics(found), "reading": reading, "remarks": [*solved.remarks, *written["notes"], *notes],
    }  # fmt: skip


def _as_folder(
    made: Made, destination: Path, inputs: list[Path], *, overwrite: bool, resume: bool
) -> dict[str, Any]:
    """Publish a folder and return the part of the document about it."""
    outcome, plan_id = _publish(made.session, made, destination, inputs, overwrite=overwrite, resume=resume)
    return {**_published(made.session, made, outcome), "plan": {"id": plan_id}}


def _scaled(session: Session, schemes: Schemes) -> tuple[Checkpoint, list[str]]:
    """Return the model whose matrices are quantized, and what is said of its scaling."""
    if session.request.method not in ("awq", "awq-gptq"):
        return session.checkpoint, []
    from surgeon.quantize import awq

    view, record = awq.scaled(
        session.checkpoint, session.linear.layers, schemes, session.texts.statistics, session.settings,
        session.work / "scales", scale_dtype=session.form.scale_dtype, stop=session.stop,
        progress=lambda done, total: session.tell("scaling", done, total),
    )  # fmt: skip
    scaled = [site for site in record["sites"] if site["exponent"]]
    said = [f"{len(scaled)} of {len(record['sites'])} places were scaled"]
    said += [
        f"{count} places cannot be scaled: {reason}"
        for reason, count in Counter(s["reason"] for s in record["skipped"]).items()
    ]
    return view, said


def _layers(session: Session, schemes: Schemes, working: Checkpoint | None = None) -> Finished:
    """Return the files of all layers for some schemes; what an earlier run made of them is taken up."""
    layers = session.linear.layers
    head = session.linear.head
    if head is not None and schemes.get(head.tensor) is not None:
        layers = (*layers, (head,))
    said = {name: word(scheme) for name, scheme in sorted(schemes.items())}
    name = hashlib.sha256(json.dumps(said).encode()).hexdigest()[:16]
    samples = session.texts.statistics if session.options.method == "gptq" else ()
    return quantize_layers(
        working or session.checkpoint, layers, schemes, session.form, samples, session.settings, session.options,
        session.work / f"layers-{name}", progress=session.tell, stop=session.stop,
    )  # fmt: skip


def _view(
    session: Session, schemes: Schemes, finished: Finished, working: Checkpoint | None = None
) -> QuantizedView:
    code = session.dtype if session.request.dtype else None
    return QuantizedView(
        working or session.checkpoint, finished.files, schemes, others(session, schemes), session.form, code
    )


def _divergence(session: Session, schemes: Schemes) -> float:
    """Return KL(source || quantized) on the search text, for a target divergence."""
    wishes.check(session, schemes)
    finished = _layers(session, schemes)
    if session.form.folder:
        view: Checkpoint = dequantized(_view(session, schemes, finished))
    else:
        view = gguf_file.dequantized(session.checkpoint, finished)
    found = quality.compare(session.judge, view, session.texts.search, session.plain_settings,
                            decoder=session.decoder, stop=session.stop)  # fmt: skip
    return float(found["kl"] if session.decoder else found["nmse"])


def _quality(session: Session, meant: Checkpoint, remarks: list[str]) -> dict[str, Any]:
    """Return quality on held-out text before and after; a remark where the model cannot be run here."""
    session.tell("measuring quality", 0, 1)
    try:
        return quality.compare(
            session.judge, meant, session.texts.held_out, session.plain_settings,
            decoder=session.decoder, reference=session.reference, stop=session.stop,
        )  # fmt: skip
    except InputError as error:
        if session.needs_text or error.code not in NOT_RUNNABLE:
            raise
        remarks.append(f"not run here ({error.message}): its quality was not measured")
        return {}


def _read_back(session: Session, derived: Derived, view: QuantizedView) -> dict[str, Any]:
    """Write a candidate, load it with its real reader, and compare with what it was meant to be."""
    from surgeon.deploy import quantized_check

    session.tell("checking the result", 0, 1)
    folder = session.work / "candidate"
    shutil.rmtree(folder, ignore_errors=True)
    execute(_plan(session, derived), folder, threads=session.request.threads or physical_cores(),
            memory_limit=session.request.memory_limit, resume=False, stop=session.stop)  # fmt: skip
    return quantized_check.check(
        folder, dequantized(view), session.texts.held_out if "texts" in vars(session) else (), session.settings,
        memory_limit=session.request.memory_limit, stop=session.stop,
    )  # fmt: skip


def _publish(
    session: Session, made: Made, destination: Path, inputs: list[Path], *, overwrite: bool, resume: bool
) -> tuple[Outcome, str]:
    plan = _plan(session, made.derived)
    shutil.rmtree(session.work / "candidate", ignore_errors=True)
    outcome = execute(
        plan, destination, threads=session.request.threads or physical_cores(), overwrite=overwrite, resume=resume,
        memory_limit=session.request.memory_limit, stop=session.stop, input_paths=inputs,
        progress=lambda done, total: session.tell("writing", done, total),
    )  # fmt: skip
    return outcome, plan.plan_id()


def _plan(session: Session, derived: Derived) -> Plan:
    request = session.request
    return plan_of(session.source, {"": derived}, verb="quantize", seed=request.seed, warnings=session.warnings,
                   max_shard_bytes=request.max_shard_size)  # fmt: skip


def _derived(
    session: Session, decision: Decision, finished: Finished, view: QuantizedView, title: str
) -> Derived:
    request, form = session.request, session.form
    bits = bits_of(session, decision.schemes)
    widths = sorted({scheme.bits for scheme in decision.schemes.values() if scheme is not None})
    return Derived(
        view=view, recipe=_recipe(session, decision), method=str(request.method), title=title,
        parameters={"format": form.name, "schemes": counted_words(decision.schemes), "bits per weight": round(bits, 3)},
        companions={PLAN_FILE: decide.plan_document(session, decision, finished.records)},
        notices=tuple(_notices(session)), command=command(session), relation="quantized",
        tags=(form.name, *(f"{width}-bit" for width in widths)),
        packages=() if form.package is None else (form.package,),
        vllm=form.reader.runtime == "vllm",
        parameters_in_all=sum(info.elements for info in session.checkpoint.tensors.values()),
    )  # fmt: skip


def _notices(session: Session) -> list[str]:
    reader = session.form.reader
    said = [f"Written for {reader.runtime}."]
    if session.form.name == "compressed-tensors" and reader.runtime == "transformers":
        said.append(
            "transformers unpacks the weights to 16 bits when the model first runs: the file is small, memory is not."
        )
    if session.form.name == "compressed-tensors" and reader.runtime == "vllm":
        said.append(
            "transformers may refuse it or read it wrongly where experts differ by layer; its rules were read in vLLM's source, not run."
        )
    return said


def _recipe(session: Session, decision: Decision) -> dict[str, Any]:
    """Return the resolved request and what was decided, without paths, times or places."""
    said = {name: word(scheme) for name, scheme in sorted(decision.schemes.items())}
    return {
        "verb": "quantize", **session.asked,
        "schemes": counted(decision.schemes), "assignment": hashlib.sha256(json.dumps(said).encode()).hexdigest(),
    }  # fmt: skip


# ---- words and figures ----------------------------------------------------------------------------


def counted(schemes: Schemes) -> dict[str, int]:
    """Return name of a scheme -> matrices."""
    found: dict[str, int] = {}
    for scheme in schemes.values():
        found[word(scheme)] = found.get(word(scheme), 0) + 1
    return dict(sorted(found.items()))


def counted_words(schemes: Schemes) -> str:
    """Return `counted` in one line."""
    return ", ".join(f"{name} x {count}" for name, count in counted(schemes).items())


def _facts(finished: Finished) -> list[str]:
    """Return what a user must know of how matrices were quantized."""
    said = []
    for key, words in (
        ("fallback", "could not be quantized by GPTQ and were rounded to nearest"),
        ("escalated", "needed more damping than was asked for"),
    ):
        names = [record["label"] for record in finished.records if record.get(key)]
        if names:
            said.append(f"{len(names)} matrices {words}, {names[0]} first")
    unseen = [r["label"] for r in finished.records if r.get("tokens") == 0 and r.get("routed")]
    if unseen:
        said.append(
            f"{len(unseen)} matrices of experts saw no token and were rounded to nearest, {unseen[0]} first"
        )
    drawn = [r for r in finished.records if r.get("shrinkage")]
    if drawn:
        said.append(
            f"{len(drawn)} matrices saw few tokens: their second moments were drawn to the diagonal (held-out tokens decide how far)"
        )
    return said


def _table(session: Session, decision: Decision) -> list[dict[str, Any]]:
    """Return one row a scheme: matrices, parameters, bytes, bits."""
    rows: dict[str, dict[str, Any]] = {}
    for name, scheme in decision.schemes.items():
        info = session.checkpoint.tensors[name]
        row = rows.setdefault(
            word(scheme), {"scheme": word(scheme), "matrices": 0, "parameters": 0, "bytes": 0}
        )
        row["matrices"] += 1
        row["parameters"] += info.elements
        row["bytes"] += matrix_bytes(session, name, tuple(info.shape), scheme)[0]
    for row in rows.values():
        row["bits"] = 8 * row["bytes"] / row["parameters"]
    return sorted(rows.values(), key=lambda row: row["bits"])


def _document(session: Session, destination: Path) -> dict[str, Any]:
    tensors = session.checkpoint.tensors.values()
    request = session.request
    return {
        "status": "ok", "output": {"path": str(destination)}, "method": request.method, "format": session.form.name,
        "runtime": session.form.reader.runtime, "target": None if request.target is None else dict([request.target]),
        "model": {"name": session.source.key, "parameters": sum(i.elements for i in tensors),
                  "bytes": sum(i.nbytes for i in tensors)},
        "schemes": [], "metrics": {}, "gates": [], "warnings": [], "remarks": [],
    }  # fmt: skip


def _disk_bytes(session: Session) -> dict[str, int]:
    """Return the bytes a run needs at most: the result; layers, a candidate, activations between layers."""
    stored = sum(session.stored(name)[1] for name in session.checkpoint.tensors)
    bits = session.request.target
    if bits is not None and bits[0] == "size":
        stored = min(stored, int(bits[1]))
    work = 2 * stored
    if session.needs_text:
        config = session.checkpoint.config or {}
        tokens = session.texts.record["statistics"]["tokens"]
        work += spilled_bytes(2, tokens, int(config.get("hidden_size", 0)), session.settings.dtype)
    return {"results": stored, "work": work}


def _rehearsed(
    session: Session, needs: dict[str, int], named: Schemes | None, output: dict[str, Any]
) -> dict[str, Any]:
    """Return what a dry run adds: exact sizes where schemes were named, the range where a target decides."""
    texts = session.texts if session.needs_text else None
    found: dict[str, Any] = {
        "status": "dry-run", "needs": needs, "calibration": None if texts is None else texts.record,
        "warnings": list(dict.fromkeys(session.warnings)),
    }  # fmt: skip
    if named is not None:
        found["schemes"] = _table(session, Decision(named))
        found["output"] = {**output, "bytes": file_bytes(session, named), "bits": bits_of(session, named)}
        return found
    menu = decide.schemes_of_menu(session) if session.request.target else []
    found["menu"] = [word(scheme) for scheme in menu]
    return found


def _about(session: Session, decision: Decision, finished: Finished) -> dict[str, Any]:
    """Return the parts of a document that say what was decided and what it cost."""
    allocation = decision.allocation
    errors = [record["error"] for record in finished.records if record.get("error") is not None]
    predicted = None if allocation is None else allocation.loss
    return {
        "schemes": _table(session, decision),
        "allocation": None if allocation is None else {
            "sensitivity": decision.sensitivities.kind if decision.sensitivities else None,
            "predicted_loss": predicted, "status": allocation.status, "gap": allocation.gap,
            "greedy_gap": allocation.greedy_gap, "alternative": allocation.alternative,
            "tried": [{"bytes": size, "kl": kl} for size, kl in decision.tried],
        },
        "loss": {"predicted": predicted, "remeasured": sum(errors) if errors else None},
        "calibration": session.texts.record if session.needs_text else None,
        "warnings": list(dict.fromkeys(session.warnings)),
    }  # fmt: skip


def _metrics(found: dict[str, Any]) -> dict[str, Any]:
    return {name: found[name] for name in ("perplexity", "kl", "top1", "cosine", "nmse") if name in found}


def _published(session: Session, made: Made, outcome: Outcome) -> dict[str, Any]:
    manifest, folder = outcome.manifests[""], outcome.path
    return {
        **_about(session, made.decision, made.finished),
        "output": {
            "path": str(folder), "bytes": sum(file.stat().st_size for file in folder.glob("*.safetensors")),
            "bits": bits_of(session, made.decision.schemes), "parameters": made.derived.parameters_in_all,
            "unchanged": outcome.unchanged, "shards": len(list(folder.glob("*.safetensors"))),
            "sha256": {n: d for n, d in manifest["files"].items() if n.endswith(".safetensors")},
        },
        "metrics": _metrics(made.quality), "quality": made.quality, "reading": made.reading, "remarks": made.remarks,
    }  # fmt: skip


def _unchanged(session: Session, destination: Path) -> dict[str, Any] | None:
    """Return what is said when the destination already holds what is asked for, verified."""
    if not session.form.folder:
        return gguf_file.unchanged(session, destination)
    try:
        manifest = json.loads((destination / MANIFEST).read_bytes())
        if manifest["recipe"].get("verb") != "quantize" or not same_result(session, manifest):
            return None
        if verify_path(destination, hashes=True).errors:
            return None
        held = open_path(destination, str(destination))
        held.close()
        size = sum(file.stat().st_size for file in destination.glob("*.safetensors"))
        return {"output": {"path": str(destination), "bytes": size, "unchanged": True}}
    except (OSError, ValueError, KeyError, TypeError, SurgeonError):
        return None


SILENT = frozenset({"model", "method", "scheme", "work", "threads", "memory_limit", "device", "offline", "max_shard_size",
                    "calibration", "sensitivities", "plan", "target_bits", "target_size", "target_kl"})  # fmt: skip


def command(session: Session) -> str:
    """Return the command that repeats the run, without paths."""
    request = session.request
    words = ["surgeon quantize", session.source.key, f"--method {request.method}"]
    words += [f"--scheme '{text}'" for text in request.scheme]
    if request.target is not None:
        words.append(f"--target-{request.target[0]} {request.target[1]:.12g}")
    if request.plan is not None:
        words.append(f"--plan {PLAN_FILE}")
    for name, info in QuantizeRequest.model_fields.items():
        value = getattr(request, name)
        if name in SILENT or value == info.default:
            continue
        option = f"--{name.replace('_', '-')}"
        if name == "symmetric":
            words.append("--asymmetric")
        elif isinstance(value, bool):
            words.append(option if value else f"--no-{name.replace('_', '-')}")
        elif isinstance(value, tuple):
            words += (
                [f"{option} '{one}'" for one in value]
                if name == "ignore"
                else [f"{option} {','.join(map(str, value))}"]
            )
        else:
            words.append(f"{option} {value}")
    if request.calibration:
        words.append("--calibration TEXT")
    return " ".join([*words, "-o OUT"])


def _since(started: float) -> float:
    return round(time.perf_counter() - started, 3)
