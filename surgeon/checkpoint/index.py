"""Which weight files of a folder make up the model, and what they hold.

Precedence, documented once: an index (``*.safetensors.index.json``) wins, else the single
file. When a folder has both and the single file is not part of the index, nobody can know
which one is the model: that is refused unless the caller chooses (``weights``).

Codes: E301 missing, E302 incomplete, E305.. elsewhere, E309 index contradicts the shards,
E310 ambiguous weights, E336 link out of the model, E331 pickle only, E332 adapter, E333 GGUF.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from surgeon.checkpoint.companions import allowed_roots, check_link
from surgeon.checkpoint.header import Header, TensorInfo, printable, read_header
from surgeon.checkpoint.strict_json import read_json_object
from surgeon.errors import InputError, Where, raise_all

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
_ADAPTER_FILES = {"adapter_model.safetensors", "adapters.safetensors"}
_OTHER_FORMATS = (".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack")
_OTHER_COPIES = re.compile(r"(^consolidated|\.fp16\.|\.fp32\.|\.bf16\.|_fp16|_fp32)", re.IGNORECASE)


@dataclass(frozen=True)
class Weights:
    """The weight files of one model."""

    headers: tuple[Header, ...]
    tensors: dict[str, TensorInfo]
    index_file: Path | None
    notes: tuple[str, ...]


def read_folder(
    folder: Path, *, weights: str = "auto", ignore_unlisted: bool = False, repo: str | None = None
) -> Weights:
    """Find and read the headers of a model folder's weight files.

    Args:
        folder: existing folder.
        weights: "auto", or "index" / "single" to choose when both exist.
        ignore_unlisted: tensors that a shard holds but the index does not list are skipped
            instead of refused.
        repo: hub id, for the download command in messages.

    Raises:
        InputError: see the module's codes.
    """
    indices = sorted(p for p in folder.iterdir() if p.name.endswith(".safetensors.index.json"))
    files = sorted(p for p in folder.iterdir() if p.name.endswith(".safetensors"))
    candidates = [p for p in files if p.name not in _ADAPTER_FILES]
    notes: list[str] = []
    if candidates:
        aside = [p.name for p in files if p.name in _ADAPTER_FILES]
        aside += sorted(p.name for p in folder.iterdir() if p.name.endswith(_OTHER_FORMATS))
        notes.extend(f"ignoring {printable(name)} beside the model's own weights" for name in aside)
    index = _choose_index(folder, indices, notes)
    if index is not None and weights != "single":
        return _from_index(folder, index, candidates, weights, ignore_unlisted, repo, notes)
    if index is not None:
        notes.append(f"using the single file, not {index.name}")
    single = _choose_single(folder, candidates, notes, chosen=weights == "single")
    check_link(single, allowed_roots(folder))
    header = read_header(single)
    return Weights((header,), header.tensors, None, tuple(notes))


def _choose_index(folder: Path, indices: list[Path], notes: list[str]) -> Path | None:
    if not indices:
        return None
    named = [p for p in indices if p.name == INDEX_NAME]
    if named or len(indices) == 1:
        chosen = named[0] if named else indices[0]
        notes.extend(f"ignoring the second index {p.name}" for p in indices if p != chosen)
        return chosen
    raise InputError(
        "E310",
        f"{folder} has several indices: {', '.join(p.name for p in indices)}",
        where=Where(str(folder)),
        help=f"keep one, or name it {INDEX_NAME}",
    )


def _choose_single(folder: Path, candidates: list[Path], notes: list[str], chosen: bool) -> Path:
    named = [p for p in candidates if p.name == SINGLE_NAME]
    if named:
        others = [p for p in candidates if p.name != SINGLE_NAME]
        _note_copies(others, notes)
        shards = [p for p in others if re.search(r"-\d{5}-of-\d{5}\.safetensors$", p.name)]
        if shards and not chosen:
            raise InputError(
                "E310",
                f"{folder} has {SINGLE_NAME} and shards without an index ({shards[0].name}, ...)",
                where=Where(str(folder)),
                help="remove whichever is stale",
            )
        return named[0]
    plain = [p for p in candidates if not _OTHER_COPIES.search(p.name)]
    if len(plain) == 1:
        notes.append(f"weights are in {plain[0].name}")
        return plain[0]
    if len(plain) > 1:
        raise InputError(
            "E302",
            f"{folder} has {len(plain)} weight files but no {INDEX_NAME}",
            where=Where(str(folder)),
            help="fetch the index, or give one file as the model",
        )
    raise _no_weights(folder)


def _note_copies(others: list[Path], notes: list[str]) -> None:
    notes.extend(f"ignoring {printable(p.name)} beside the model's own weights" for p in others)


def _no_weights(folder: Path) -> InputError:
    names = {p.name for p in folder.iterdir()}
    if "adapter_config.json" in names:
        return InputError(
            "E332",
            f"{folder} is a LoRA adapter, not a model",
            where=Where(str(folder)),
            help=f"write BASE+ADAPTER, for example ./base+{folder}",
        )
    gguf = sorted(n for n in names if n.endswith(".gguf"))
    if gguf:
        return InputError(
            "E333",
            f"{folder} holds GGUF weights ({gguf[0]})",
            where=Where(str(folder)),
            help="use the safetensors checkpoint it was converted from",
        )
    pickles = sorted(n for n in names if n.endswith((".bin", ".pt", ".pth", ".ckpt", ".pkl")))
    if pickles:
        return InputError(
            "E331",
            f"{folder} has only {pickles[0]}; pickle files can run code",
            where=Where(str(folder)),
            help=f"convert it once, with torch's weights-only loader: surgeon export {folder} --allow-pickle",
        )
    return InputError(
        "E301",
        f"{folder} has no safetensors weights",
        where=Where(str(folder)),
        help="a model folder holds model.safetensors, or shards with model.safetensors.index.json",
    )


def plain_file_name(value: object) -> bool:
    return (
        isinstance(value, str)
        and bool(value)
        and value not in {".", ".."}
        and not re.search(r'[/\\\x00-\x1f\x7f:<>"|?*]', value)
    )


def _from_index(
    folder: Path,
    index: Path,
    candidates: list[Path],
    weights: str,
    ignore_unlisted: bool,
    repo: str | None,
    notes: list[str],
) -> Weights:
    check_link(index, allowed_roots(folder))
    content = read_json_object(index)
    weight_map = content.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(
            "E309",
            f"{index.name} has no weight_map",
            where=Where(str(index)),
            help="the index is damaged; fetch it again",
        )
    bad = sorted({repr(v) for v in weight_map.values() if not plain_file_name(v)})
    if bad:
        raise InputError(
            "E309",
            f"{index.name} points outside its folder or at no file name: {bad[0]:.100}",
            where=Where(str(index)),
            help="every value of weight_map must be the plain name of a file beside the index",
        )
    shards = sorted(set(weight_map.values()))
    strays = [p for p in candidates if p.name not in shards]
    rivals = [
        p for p in strays if p.name == SINGLE_NAME or re.search(r"-\d{5}-of-\d{5}\.safetensors$", p.name)
    ]
    if rivals and weights == "auto":
        raise InputError(
            "E310",
            f"{folder} has an index and also {rivals[0].name}, which the index does not use",
            where=Where(str(folder)),
            help="remove the stale one, or choose with --weights index (or --weights single)",
        )
    _note_copies(strays, notes)
    missing = [s for s in shards if not (folder / s).exists()]
    if missing:
        lost = sum(1 for v in weight_map.values() if v in set(missing))
        source = repo or "ORG/NAME"
        raise InputError(
            "E302",
            f"{folder} is incomplete: {', '.join(missing[:3])}{' ...' if len(missing) > 3 else ''} "
            f"{'is' if len(missing) == 1 else 'are'} missing ({lost} tensors)",
            where=Where(str(index)),
            help="fetch the missing shards with: hf download "
            + source
            + "".join(f' --include "{m}"' for m in missing[:3]),
        )
    roots = allowed_roots(folder)
    for shard in shards:
        check_link(folder / shard, roots)
    headers = tuple(read_header(folder / s) for s in shards)
    tensors: dict[str, TensorInfo] = {}
    findings: list[InputError] = []
    for shard, header in zip(shards, headers, strict=True):
        for name, info in header.tensors.items():
            listed = weight_map.get(name)
            if name in tensors:
                first = tensors[name].file.name
                findings.append(
                    InputError(
                        "E309",
                        f'two shards hold "{printable(name)}": {first} and {shard}',
                        where=Where(str(index)),
                        help="readers disagree about which copy counts; fetch the model again",
                    )
                )
            elif listed is None:
                if not ignore_unlisted:
                    findings.append(
                        InputError(
                            "E309",
                            f'{shard} holds "{printable(name)}", which the index does not list',
                            where=Where(str(index)),
                            help="--ignore-unlisted leaves such tensors out",
                        )
                    )
            else:
                tensors[name] = info
    for name, shard in weight_map.items():
        if name not in tensors:
            findings.append(
                InputError(
                    "E309",
                    f'the index lists "{printable(name)}" in {shard}, which does not hold it',
                    where=Where(str(index)),
                    help="index and shards are from different versions; fetch the model again",
                )
            )
        elif tensors[name].file.name != shard:
            findings.append(
                InputError(
                    "E309",
                    f'the index puts "{printable(name)}" in {shard}, it is in {tensors[name].file.name}',
                    where=Where(str(index)),
                    help="index and shards are from different versions; fetch the model again",
                )
            )
    raise_all(findings)
    return Weights(headers, tensors, index, tuple(notes))
