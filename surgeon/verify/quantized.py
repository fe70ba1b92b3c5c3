"""Checks of a model that is stored quantized: every module as config.json says, and the whole as its family wants it.

Three things are compared, each from headers and JSON alone, but for the shapes that packed matrices store as data:
what config.json says of every module with the tensors that module has (E478, E479); the tensors that are left over with
nothing (E480); and the plain model that is decoded from it with the record of its family, as for any plain model.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from surgeon import architectures
from surgeon.checkpoint.checkpoint import Checkpoint
from surgeon.checkpoint.dtypes import DTYPES
from surgeon.checkpoint.header import TensorInfo, printable
from surgeon.errors import InputError, SurgeonError, Where
from surgeon.formats import auto_round
from surgeon.formats.declared import declarations
from surgeon.formats.dequantized import DequantizedView, dequantized, scheme_of
from surgeon.formats.storage import Declarations, Said, Shape, Storage
from surgeon.formats.stored_layout import PART, Part, parts
from surgeon.traits import part_of, text_section

UNREAD = "E445"
"""Code of models in a form that is not read here."""


@dataclass
class Found:
    """What was found out about a quantized model.

    Attributes:
        errors: what is wrong with it.
        notes: what could not be checked.
        plain: the model that is decoded from it, None where it cannot be read.
        modules: how many modules were compared with config.json.
    """

    errors: list[SurgeonError] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    plain: DequantizedView | None = None
    modules: int = 0


def check(checkpoint: Checkpoint) -> Found:
    """Compare a quantized model with what its config.json says of it; findings are returned, not raised.

    Args:
        checkpoint: a model whose config.json has a quantization_config.
    """
    found = Found()
    config = scheme_of(checkpoint.config)
    modules = _modules(checkpoint)
    try:
        said = declarations(config, modules.keys())
    except InputError as error:
        found.errors.append(error)
        return found
    method = printable(str(config.get("quant_method")))[:40]
    if said is None:
        found.notes.append(
            f"{method} does not say of every module how it is stored; only what is stored was checked"
        )
    else:
        found.errors += _compared(checkpoint, modules, said)
        found.modules = len(modules)
    if found.errors:
        return found
    try:
        found.plain = dequantized(checkpoint)
    except InputError as error:
        if error.code == UNREAD and (said is None or error.where is None or error.where.tensor is None):
            found.notes.append(f"packed values were not compared with config.json: {error.message}")
        else:
            found.errors.append(error)
    return found


# ---- modules ----------------------------------------------------------------------------------------


def _modules(checkpoint: Checkpoint) -> dict[str, dict[str, TensorInfo]]:
    """Return module -> its tensors by the rest of their names, of every module that may be a quantized one."""
    found: dict[str, dict[str, TensorInfo]] = defaultdict(dict)
    for name, info in checkpoint.tensors.items():
        match = PART.match(name)
        if match:
            found[match["module"]][match["part"]] = info
        elif name.endswith(".weight") and (len(info.shape) == 2 or DTYPES[info.dtype].family != "float"):
            found[name.removesuffix(".weight")]["weight"] = info
    return dict(found)


def _expected(checkpoint: Checkpoint, modules: Mapping[str, object]) -> dict[str, Shape]:
    """Return module, under its name in the files -> [out, in], of every matrix the record of the family asks for."""
    config = checkpoint.config or {}
    record = architectures.get(config.get("model_type"))
    if record is None:
        return {}
    renames = scheme_of(config).get("quant_method") == "auto-round"
    family = text_section(config).get("model_type") if renames else None
    best: dict[str, Shape] = {}
    most = -1
    try:
        for layout in record.layouts(config):
            wanted = {
                auto_round.stored_name(name.removesuffix(".weight"), family): spec.shape
                for name, spec in layout.tensors.items()
                if name.endswith(".weight")
                and spec.shape is not None
                and len(spec.shape) == 2
                and not spec.optional
            }
            shared = sum(module in modules for module in wanted)
            if shared > most:
                best, most = wanted, shared
    except InputError:  # the record itself cannot be read from config.json, which is reported elsewhere
        return {}
    return best


def _compared(
    checkpoint: Checkpoint, modules: Mapping[str, Mapping[str, TensorInfo]], said: Declarations
) -> Iterator[SurgeonError]:
    expected = _expected(checkpoint, modules)
    for module, held in modules.items():
        yield from _module(checkpoint, module, held, said.of(module), expected.get(module))
    for module, shape in expected.items():
        if module not in modules and part_of(f"{module}.weight") not in (
            "norm",
            "embedding",
            "router",
            "head",
        ):
            words = said.of(module).storage
            how = f"as {words.words}" if words else "plain"
            yield InputError("E478", f"{printable(module)} {list(shape)} is missing; config.json says that it is stored {how}",
                             where=Where(checkpoint.label, tensor=printable(module)), help="a shard is missing, or a conversion left it out")  # fmt: skip


def _module(
    checkpoint: Checkpoint, module: str, held: Mapping[str, TensorInfo], said: Said, shape: Shape | None
) -> Iterator[SurgeonError]:
    """Compare one module's tensors with what is said of it."""
    where = Where(checkpoint.label, tensor=printable(module))
    plain = held.get("weight")
    is_plain = plain is not None and DTYPES[plain.dtype].family == "float"
    packed = sorted(part for part in held if part != "weight")
    if is_plain and not packed and plain is not None and plain.dtype in ("F32", "F16", "BF16", "F64"):
        if said.storage is not None and said.certain:
            yield InputError("E479", f"{printable(module)} is stored as plain {plain.dtype}; config.json says {said.storage.words}",
                             where=where, help="readers look for its packed values: name it in the list of modules that are kept, "
                             "or quantize it")  # fmt: skip
        return
    if said.storage is None:
        if said.certain and (packed or not is_plain):
            what = ", ".join(packed) or f"weight of type {plain.dtype if plain else ''}"
            yield InputError("E479", f"{printable(module)} is stored quantized ({what}); config.json says that it is not",
                             where=where, help="readers look for its plain weight: take it off the list of modules that are kept, "
                             "or store it plain")  # fmt: skip
        return
    whole = shape or _plain_shape(checkpoint, module, held, said.storage)
    if whole is None:
        yield InputError("E478", f"{printable(module)} has {', '.join(sorted(held))}; config.json says {said.storage.words}",
                         where=where, help="its packed values are missing, or it is stored in another way")  # fmt: skip
        return
    wanted = parts(module, said.storage, whole)
    if wanted is None:  # a form nothing is known of: its reader refuses it
        return
    yield from _parts(checkpoint, module, held, said.storage, wanted)
    yield from _stored_shape(checkpoint, module, held, whole)


def _parts(
    checkpoint: Checkpoint, module: str, held: Mapping[str, TensorInfo], storage: Storage, wanted: list[Part]
) -> Iterator[SurgeonError]:
    names = {part.name for part in wanted}
    for part in wanted:
        info = held.get(part.name.removeprefix(f"{module}."))
        where = Where(checkpoint.label, tensor=printable(part.name))
        if info is None:
            if not part.optional:
                yield InputError("E478", f"{printable(part.name)} is missing; {printable(module)} is said to be stored in {storage.words}",
                                 where=where, help="a shard is missing, or a conversion left it out")  # fmt: skip
            continue
        if info.dtype not in part.dtypes:
            yield InputError("E478", f"{printable(part.name)} is of type {info.dtype}; {storage.words} has {' or '.join(sorted(part.dtypes))}",
                             where=where, help="the module is stored in another way than config.json says")  # fmt: skip
        elif part.shapes and info.shape not in part.shapes:
            yield InputError("E478", f"{printable(part.name)} has shape {list(info.shape)}; {storage.words} has {list(part.shapes[0])}",
                             where=where, help="the module is stored in another way than config.json says")  # fmt: skip
    for rest in sorted(held):
        name = f"{module}.{rest}"
        if name not in names:
            yield InputError("E480", f"{printable(name)} is left over: {storage.words} has no such tensor",
                             where=Where(checkpoint.label, tensor=printable(name)),
                             help="the module is stored in another way than config.json says, or twice")  # fmt: skip


def _plain_shape(
    checkpoint: Checkpoint, module: str, held: Mapping[str, TensorInfo], storage: Storage
) -> Shape | None:
    """Return [out, in] of a module of which no record speaks, from the payload it should have; None without one."""
    if storage.form == "pack-quantized":
        return _numbers(checkpoint, module, held)
    if storage.form in ("gptq", "awq"):
        payload, scales = held.get("qweight"), held.get("scales")
        if payload is None or scales is None or len(payload.shape) != 2 or len(scales.shape) != 2:
            return None
        inputs = payload.shape[0] * 32 // storage.bits if storage.form == "gptq" else payload.shape[0]
        return scales.shape[1], inputs
    if storage.form.endswith("fp4-pack-quantized"):
        payload = held.get("weight_packed")
        return (
            (payload.shape[0], 2 * payload.shape[1])
            if payload is not None and len(payload.shape) == 2
            else None
        )
    payload = held.get("weight")
    if payload is None:
        return None
    return payload.shape if len(payload.shape) == 2 else (0, 0)


def _numbers(checkpoint: Checkpoint, module: str, held: Mapping[str, TensorInfo]) -> Shape | None:
    """Return the plain shape that a module stores as data."""
    info = held.get("weight_shape")
    if info is None or info.shape != (2,) or info.dtype not in ("I64", "I32"):
        return None
    rows, columns = (int(n) for n in checkpoint.read(f"{module}.weight_shape", 0, 2))
    return rows, columns


def _stored_shape(
    checkpoint: Checkpoint, module: str, held: Mapping[str, TensorInfo], shape: Shape
) -> Iterator[SurgeonError]:
    """Refuse a plain shape, stored as data, that is not the one config.json asks for."""
    found = _numbers(checkpoint, module, held)
    if found is not None and found != tuple(shape):
        name = f"{module}.weight_shape"
        yield InputError("E478", f"{printable(name)} says {list(found)}; config.json says {list(shape)}",
                         where=Where(checkpoint.label, tensor=printable(name)), help="the weights and config.json do not belong together")  # fmt: skip
