"""The plan of one model made from one other: a view's tensors, the source's companions, a model card.

Pruning and editing decide what a checkpoint looks like through a view; what is left to say is which
tensors are stored bytes and which are computed, and what lies beside the weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from surgeon import __version__
from surgeon.checkpoint.checkpoint import Checkpoint
from surgeon.checkpoint.companions import find_companions, licence_files
from surgeon.checkpoint.dtypes import CODES, CONFIG_NAMES, DTYPES
from surgeon.checkpoint.strict_json import read_bytes
from surgeon.copying import Cast, Copy
from surgeon.formats.dequantized import permissions
from surgeon.output.modelcard import (
    CardData,
    CardSource,
    card_languages,
    card_licence,
    hub_id,
    model_card,
    read_card,
)
from surgeon.plan import Companion, OutputModel, OutputTensor, Plan, Task, TensorRef, WorkItem


@dataclass(frozen=True)
class Source:
    """The model something is made from; where a model is named, it stands for its path.

    Attributes:
        key: its name without path; enters the plan id and the manifest.
        checkpoint: the model as stored.
        path: how the user named it.
        repo, commit: where on the hub it comes from, or None.
    """

    key: str
    checkpoint: Checkpoint
    path: str
    repo: str | None = None
    commit: str | None = None

    def __str__(self) -> str:
        return self.path

    def __fspath__(self) -> str:
        return self.path


@dataclass(frozen=True)
class Derived:
    """One model to be written.

    Attributes:
        view: gives every tensor of the result, and its config.
        recipe: the resolved request as plain data without paths; goes to the manifest.
        method: e.g. "ziplm".
        parameters: what the card shows.
        title: name of the model, for the card.
        companions: files that replace or join those of the source, by name.
        notices: facts a user must know; for the card.
        command: the command that repeats the run, without paths.
        relation: hub value of ``base_model_relation``.
        tags: of the card, beside those of verb and method.
        packages: what stock transformers needs beside itself to load the model.
        parameters_in_all: of the model, where stored tensors do not say it.
        vllm: whether vLLM loads the result, as far as is known.
    """

    view: Checkpoint
    recipe: Mapping[str, Any]
    method: str
    parameters: Mapping[str, Any]
    title: str
    companions: Mapping[str, bytes] = field(default_factory=dict)
    notices: tuple[str, ...] = ()
    command: str | None = None
    relation: str = "finetune"
    tags: tuple[str, ...] = ()
    packages: tuple[str, ...] = ()
    parameters_in_all: int | None = None
    vllm: bool = True


def plan_of(
    source: Source,
    results: Mapping[str, Derived],
    *,
    verb: str,
    dtype: str | None = None,
    seed: int = 0,
    notes: Iterable[str] = (),
    warnings: Iterable[str] = (),
    max_shard_bytes: int = 5_000_000_000,
    allow_nonfinite: bool = False,
) -> Plan:
    """Return the plan that writes one model, or a family of them, made from ``source``.

    Args:
        source: the model the card and the companions come from.
        results: "" -> the only result, or name -> member.
        verb: "prune", "edit" or "export".
        dtype: "float32", "float16" or "bfloat16" for written floats; None keeps each tensor's.
    """
    code = CODES[dtype] if dtype else None
    inputs: dict[str, Checkpoint] = {}
    items: list[WorkItem] = []
    models: dict[str, OutputModel] = {}
    for name, result in results.items():
        key = f"{source.key} -> {name}" if name else source.key
        inputs[key] = result.view
        made = [_item(key, result.view, tensor, name, code) for tensor in result.view.tensors]
        items.extend(made)
        outputs = [task.outputs[0] for item in made for task in item.tasks]
        models[name] = _model(source, name, result, outputs, verb, seed, code)
    recipe = dict(next(iter(results.values())).recipe) if set(results) == {""} else {
        "verb": verb, "members": {name: dict(result.recipe) for name, result in results.items()},
    }  # fmt: skip
    recipe["models"] = {key: {"repo": source.repo, "commit": source.commit} for key in inputs}
    recipe |= _permission(source)
    return Plan(
        verb=verb, inputs=inputs, items=tuple(items), models=models, recipe=recipe, seed=seed,
        notes=tuple(dict.fromkeys(notes)), warnings=tuple(dict.fromkeys(warnings)),
        max_shard_bytes=max_shard_bytes, allow_nonfinite=allow_nonfinite,
    )  # fmt: skip


def _permission(source: Source) -> dict[str, Any]:
    """Return what a recipe says of a source that is read dequantized."""
    decoded = permissions(source.checkpoint)
    return {"dequantize": {source.key: decoded}} if decoded else {}


def _item(key: str, view: Checkpoint, tensor: str, model: str, code: str | None) -> WorkItem:
    info = view.tensors[tensor]
    stored = getattr(view, "stored_dtype", lambda name: view.tensors[name].dtype)(tensor)
    target = code if code and DTYPES[stored].family == "float" else stored
    computed = getattr(view, "computed", lambda name: False)(tensor)
    same = target == info.dtype and not computed
    output = OutputTensor(tensor, target, info.shape, model)
    return WorkItem((TensorRef(key, tensor),), (Task(Copy() if same else Cast(), (output,)),))


def _model(
    source: Source, name: str, result: Derived, outputs: list[OutputTensor], verb: str, seed: int, code: str | None
) -> OutputModel:  # fmt: skip
    config = dict(result.view.config or {}) if result.view.config is not None else None
    recipe = {**result.recipe, **_permission(source)}
    if config is None:
        return OutputModel(name, None, (), recipe)
    config.pop("_name_or_path", None)
    if code:
        keys = [key for key in ("dtype", "torch_dtype") if key in config]
        for key in keys or ["torch_dtype"]:
            config[key] = CONFIG_NAMES[code]
    files = companions_of(source.checkpoint.folder, source.key)
    files.update(result.companions)
    card = _card(source, name, result, outputs, verb, seed, config)
    files["README.md"] = card.encode()
    content = tuple(Companion(file, files[file]) for file in sorted(files))
    return OutputModel(name, config, content, recipe)


def companions_of(folder: Path | None, key: str) -> dict[str, bytes]:
    """Return the files that belong to a model beside weights, config and card, by name."""
    if folder is None:
        return {}
    files = {file.name: read_bytes(file.source, 256_000_000) for file in find_companions(folder).files}
    files.update({file.name: read_bytes(file.source) for file in licence_files([(key, folder)])})
    files.pop("README.md", None)
    return files


def _card(source: Source, name: str, result: Derived, outputs: list[OutputTensor], verb: str, seed: int, config: Mapping[str, Any]) -> str:  # fmt: skip
    checkpoint = source.checkpoint
    card = read_card(checkpoint.folder)
    codes = sorted({o.dtype for o in outputs if DTYPES[o.dtype].family == "float"})
    is_decoder = any("CausalLM" in str(a) or "LMHead" in str(a) for a in config.get("architectures") or [])
    return model_card(
        CardData(
            title=f"{result.title} ({name})" if name else result.title,
            method=result.method,
            verb=verb,
            remote_code="auto_map" in config,
            sources=(
                CardSource(
                    name=source.key,
                    hub_id=hub_id(source.path, is_local=source.repo is None, config=checkpoint.config,
                                  folder=checkpoint.folder),
                    role="source", licence=card_licence(card), languages=card_languages(card),
                ),
            ),
            parameters=result.parameters,
            command=result.command,
            seed=None,
            parameter_count=result.parameters_in_all or sum(o.elements for o in outputs),
            weight_bytes=sum(o.nbytes for o in outputs),
            dtype=", ".join(CONFIG_NAMES.get(c, c) for c in codes),
            pipeline_tag="text-generation" if is_decoder else card.get("pipeline_tag"),
            relation=result.relation,
            tags=result.tags,
            packages=result.packages,
            vllm=result.vllm,
            licence_files=tuple(c.name for c in licence_files([(source.key, checkpoint.folder)])) if checkpoint.folder else (),
            notices=result.notices,
            version=__version__,
        )
    )  # fmt: skip
