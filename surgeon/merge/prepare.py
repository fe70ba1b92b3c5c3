"""From models on disk to a complete Plan: opening, vocabulary, tensors, companions, model card."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from surgeon import __version__
from surgeon.checkpoint.adapter import AdapterView
from surgeon.checkpoint.checkpoint import Checkpoint, open_path
from surgeon.checkpoint.companions import (
    GENERATION_FILE,
    TEMPLATE_FILES,
    check_token_ids,
    find_companions,
    licence_files,
    read_chat_templates,
    read_generation_config,
)
from surgeon.checkpoint.dtypes import CODES, CONFIG_NAMES, DTYPES
from surgeon.checkpoint.header import printable
from surgeon.checkpoint.source import Located, locate
from surgeon.checkpoint.strict_json import read_bytes
from surgeon.errors import InputError, SurgeonError, UsageError, Where, raise_all
from surgeon.formats.dequantized import permissions, permitted
from surgeon.merge import align
from surgeon.merge.aligned_rows import VocabularyPlan
from surgeon.merge.aligned_view import align_models
from surgeon.merge.chat_templates import choose_template, template_files
from surgeon.merge.context import context_edits
from surgeon.merge.layer_scores import LayerScores, read_layer_scores
from surgeon.merge.measured import Measured
from surgeon.merge.methods import catalogue
from surgeon.merge.planner import Draft, Findings, Options, assemble, draft
from surgeon.merge.roles import read_role, suspicious_roles
from surgeon.merge.spec import MergeSpec, ModelRef, TokenizerSpec
from surgeon.merge.token_ids import apply_config_edits
from surgeon.merge.tokenizer_files import dump_json
from surgeon.merge.vocabulary import Participant, plan_vocabulary, read_optional_vocabulary
from surgeon.output.modelcard import (
    CardData,
    CardSource,
    card_languages,
    card_licence,
    hub_id,
    merged_licence,
    model_card,
    read_card,
    short_name,
)
from surgeon.plan import Companion, OutputModel, Plan


@dataclass(frozen=True)
class Opening:
    """How models are found and opened."""

    offline: bool = False
    weights: str = "auto"
    config: str | None = None
    ignore_unlisted: bool = False
    allow_pickle: bool = False
    dequantize: bool = False


@dataclass(frozen=True)
class Texts:
    """Who gives tokenizer, template, generation settings and context length.

    Attributes:
        donor: model whose text side is taken; None = the structure donor.
        tokenizer: explicit tokenizer model (--tokenizer); wins over ``donor``.
        chat_template: --chat-template; wins over the spec's.
        title: name of the output, for the model card.
    """

    donor: ModelRef | None = None
    tokenizer: ModelRef | None = None
    chat_template: str | None = None
    title: str = "merged"


@dataclass(frozen=True)
class OpenModel:
    ref: ModelRef
    key: str
    located: Located
    adapter: Located | None
    checkpoint: Checkpoint


def open_models(refs: list[ModelRef], opening: Opening) -> dict[ModelRef, OpenModel]:
    """Open every model; all that fail are reported together."""
    opened: dict[ModelRef, OpenModel] = {}
    errors: list[SurgeonError] = []
    taken: set[str] = set()
    config = Path(opening.config) if opening.config else None
    for ref in refs:
        try:
            located = locate(ref.path, ref.revision, ref.subfolder, offline=opening.offline)
            checkpoint: Checkpoint = open_path(
                located.path, str(replace(ref, adapter=None, adapter_revision=None)), config_file=config,
                weights=opening.weights, ignore_unlisted=opening.ignore_unlisted,
                allow_pickle=opening.allow_pickle, repo=located.repo,
            )  # fmt: skip
            checkpoint = permitted(checkpoint, opening.dequantize)  # an adapter is folded into plain numbers
            adapter = None
            if ref.adapter:
                adapter = locate(ref.adapter, ref.adapter_revision, offline=opening.offline)
                checkpoint = AdapterView(checkpoint, adapter.path, str(ref))
        except SurgeonError as error:
            errors.append(error)
            continue
        opened[ref] = OpenModel(ref, _key(ref, located, taken), located, adapter, checkpoint)
    raise_all(errors)
    return opened


def _key(ref: ModelRef, located: Located, taken: set[str]) -> str:
    """Return a short name without local path, unique in this run; it enters the plan id and the manifest."""
    name = located.repo or short_name(str(located.path.resolve() if ref.path in {".", ".."} else ref.path))
    if ref.subfolder:
        name += f"/{ref.subfolder}"
    if ref.adapter:
        name += f"+{short_name(ref.adapter)}"
    key, number = name, 1
    while key in taken:
        number += 1
        key = f"{name}#{number}"
    taken.add(key)
    return key


def prepare(
    spec: MergeSpec,
    options: Options,
    opening: Opening,
    texts: Texts,
    pair: tuple[ModelRef, ModelRef] | None = None,
    measured: Measured | None = None,
) -> Plan:
    """Open everything and plan a merge; reads headers, configs and tokenizers only.

    Args:
        spec: what to merge.
        options: see `Options`; ``structure`` may be None.
        opening, texts: see there.
        pair: (structure, text donor) of a long/short pair whose base was implied.
        measured: what `surgeon.merge.measure` found for adjustments that need it; without it the plan
            is right in everything but their values (a dry run).

    Raises:
        SurgeonError: everything that can be known before weights are read, together.
    """
    refs = spec.models()
    models = open_models(refs, opening)
    findings = Findings()
    for model in models.values():
        findings.notes.extend(
            f"{model.checkpoint.label}: {n}" for n in getattr(model.checkpoint, "notes", ())
        )
    findings.warnings.extend(swapped_base(spec, models) or _suspicious(spec, models))
    structure = options.structure or (pair[0] if pair else None) or spec.base_model or refs[0]
    if spec.text_from is not None:
        if spec.text_from not in models:
            raise UsageError(
                "E232", f"text_from {spec.text_from} is not among the models", help="name one of them"
            )
        pair = (structure, spec.text_from)
    options = replace(
        options, structure=structure, refuse_positions=options.refuse_positions or pair is not None,
        reference=reference_model(spec) if spec.adjust.active else None,
    )  # fmt: skip
    text_ref = pair[1] if pair else structure
    opened = {ref: m.checkpoint for ref, m in models.items()}
    # Each model by itself first: a missing embedding must not be reported as a vocabulary that differs.
    align.check_inputs(
        {m.key: m.checkpoint for m in models.values()}, findings, arithmetic=spec.method != "passthrough"
    )
    raise_all(findings.errors)
    keys = {ref: m.key for ref, m in models.items()}
    vocabulary, text_folder, text_label = None, None, ""
    if opened[structure].config is not None:
        if spec.method != "passthrough" or spec.tokenizer is not None:
            vocabulary, giver = _vocabulary(spec, options, models, text_ref, texts, opening, findings)
            text_folder, text_label = giver
            if vocabulary is not None:
                opened = _align(spec, models, opened, vocabulary, findings)
        else:
            text_folder, text_label = opened[text_ref].folder, opened[text_ref].label
    opened, options = adjusted(spec, keys, opened, options, measured, findings)
    plan_draft = draft(spec, opened, keys, options, findings)
    recipe = {**describe(spec, models, options, measured), "allow_pickle": opening.allow_pickle}
    decoded = {m.key: found for m in models.values() if (found := permissions(m.checkpoint))}
    if decoded:
        recipe["dequantize"] = decoded
    points = list(options.points) or [""]
    outputs: dict[str, OutputModel] = {}
    if plan_draft.config is None:
        outputs = {key: OutputModel(key, None, (), recipe) for key in points}
    else:
        folder = _Folder(
            plan_draft, models, vocabulary, text_ref, text_folder, text_label, texts, pair is not None
        )
        first = points[0]
        align.check_result(
            folder.config,
            {
                o.name: (o.dtype, o.shape)
                for item in plan_draft.items for task in item.tasks for o in task.outputs if o.model == first
            },
        )  # fmt: skip
        shared = folder.companions()
        for key in points:
            here = {**recipe, "point": dict(options.points.get(key, {}))} if key else recipe
            card = folder.card(key, options.points.get(key, {}))
            outputs[key] = OutputModel(
                key, folder.config, (*shared, Companion("README.md", card.encode())), here
            )
    return assemble(plan_draft, outputs, recipe)


def reference_model(spec: MergeSpec) -> ModelRef:
    """Return the model that adjustments measure task vectors from: the base, or the last of exactly two.

    Raises:
        UsageError: E232 it is not clear which one that is.
    """
    models = spec.models()
    if spec.base_model is not None:
        return spec.base_model
    if len(models) == 2 and spec.precision == "float32":
        return models[-1]
    raise UsageError("E232", f"{', '.join(spec.adjust.active)} needs a base: the task vectors start there",
                     help="--base MODEL (base_model in YAML)")  # fmt: skip


def adjusted(
    spec: MergeSpec, keys: Mapping[ModelRef, str], opened: Mapping[ModelRef, Checkpoint], options: Options,
    measured: Measured | None, findings: Findings,
) -> tuple[Mapping[ModelRef, Checkpoint], Options]:  # fmt: skip
    """Put the adjustments that act on task vectors in front of the models, and AIM's into the options."""
    adjust, reference = spec.adjust, options.reference
    if reference is None:
        return opened, options
    scores = dict(measured.scores) if measured is not None else {}
    brought = read_layer_scores(Path(adjust.layer_scores)) if adjust.layer_scores else {}
    unknown = [name for name in brought if name not in keys.values()]
    if unknown:
        raise InputError("E355", f'the layer scores name "{printable(unknown[0])}", which is not merged here',
                         where=Where(str(adjust.layer_scores)), help=f"the models are {', '.join(keys.values())}")  # fmt: skip
    if brought.keys() == {keys[reference]}:
        findings.warnings.append(
            f"the layer scores are those of the base {keys[reference]}; it has no task vector"
        )
    views = dict(opened)
    for ref, checkpoint in opened.items():
        factors = [s[keys[ref]] for s in (scores, brought) if keys[ref] in s]
        if ref == reference or not (factors or adjust.delta_rank):
            continue
        from surgeon.merge.delta_view import DeltaView

        base = opened[reference]
        views[ref] = DeltaView(
            checkpoint, base, rank=adjust.delta_rank, factor=_product(factors) if factors else None,
            label=checkpoint.label,
        )  # fmt: skip
    importance = measured.importance if measured is not None else None
    if measured is not None:
        findings.notes.extend(measured.notes)
    elif adjust.measured:
        findings.notes.append(f"{', '.join(adjust.measured)} will be measured on the models before the merge")
    return views, replace(options, importance=importance)


def _product(scores: list[LayerScores]):
    def factor(name: str) -> float:
        found = 1.0
        for entry in scores:
            found *= entry.factor(name)
        return found

    return factor


def _suspicious(spec: MergeSpec, models: Mapping[ModelRef, OpenModel]) -> list[str]:
    """Warn when the base of a task-vector merge looks like the long model (dler's base is, by definition)."""
    method = catalogue(spec.method)
    if spec.base_model is None or method.base != "required" or "lambda" not in method.table:
        return []
    others = [read_role(m.checkpoint) for ref, m in models.items() if ref != spec.base_model]
    return suspicious_roles(read_role(models[spec.base_model].checkpoint), others)


def swapped_base(spec: MergeSpec, models: Mapping[ModelRef, OpenModel]) -> list[str]:
    """Warn when the base's own card says that it was made from one of the other models."""
    if spec.base_model is None or catalogue(spec.method).base != "required":
        return []
    base = models[spec.base_model]
    stated = read_card(base.checkpoint.folder).get("base_model")
    parents = {str(p) for p in (stated if isinstance(stated, list) else [stated]) if p}
    written = (base.checkpoint.config or {}).get("_name_or_path")
    if isinstance(written, str) and written:
        parents.add(written)
    for ref, model in models.items():
        names = {model.key, ref.path, str(model.located.repo)}
        if ref != spec.base_model and parents & names:
            return [
                f"{base.checkpoint.label} is the base here, but says that it was made from {model.checkpoint.label}: "
                "the two may be swapped"
            ]
    return []


def _vocabulary(spec, options, models, text_ref, texts, opening, findings):
    """Plan the vocabulary; return it with (folder, label) of the tokenizer's donor."""
    participants = []
    base = spec.base_model
    for ref, model in models.items():
        checkpoint = model.checkpoint
        folder = checkpoint.folder
        participants.append(
            Participant(
                key=model.key, label=checkpoint.label, rows=align.vocabulary_rows(checkpoint),
                vocabulary=read_optional_vocabulary(folder), ref=ref, config=checkpoint.config,
                generation_config=read_generation_config(folder) if folder else None,
            )
        )  # fmt: skip
    folders = {m.key: (m.checkpoint.folder, m.checkpoint.label) for m in models.values()}
    donor_key = models[text_ref].key
    if texts.tokenizer is not None:
        if texts.tokenizer in models:
            donor_key = models[texts.tokenizer].key
        else:
            located = locate(texts.tokenizer.path, texts.tokenizer.revision, offline=opening.offline)
            donor_key = f"tokenizer:{short_name(texts.tokenizer.path)}"
            folders[donor_key] = (located.path, located.label)
            participants.append(
                Participant(key=donor_key, label=located.label, rows=0, vocabulary=read_optional_vocabulary(located.path),
                            ref=texts.tokenizer, merged=False)
            )  # fmt: skip
    if not any(p.rows for p in participants) or not any(p.vocabulary for p in participants):
        return None, folders[donor_key]
    plan = plan_vocabulary(
        participants, spec.tokenizer, base=models[base].key if base is not None else None, donor=donor_key,
        quirks=options.quirks,
    )  # fmt: skip
    findings.notes.extend(plan.notices)
    findings.warnings.extend(plan.warnings)
    return plan, folders.get(plan.donor or donor_key, folders[donor_key])


def _align(spec, models, opened, plan: VocabularyPlan, findings) -> dict[ModelRef, Checkpoint]:
    names: dict[str, list[str]] = {}
    for ref, model in models.items():
        rows = align.vocabulary_rows(opened[ref])
        names[model.key] = [
            n for n in opened[ref].tensors if align.is_vocabulary_tensor(n, opened[ref], rows)
        ]
    rounding = CODES.get(spec.dtype or "", "F32") if spec.precision == "mergekit" else "F32"
    if spec.precision == "mergekit" and spec.dtype is None:
        codes = {opened[r].tensors[n].dtype for r, m in models.items() for n in names[m.key]}
        rounding = codes.pop() if len(codes) == 1 else "F32"
    views = align_models({m.key: opened[ref] for ref, m in models.items()}, plan, names, rounding)
    return {ref: views[m.key] for ref, m in models.items()}


def describe(
    spec: MergeSpec, models: Mapping[ModelRef, OpenModel], options: Options, measured: Measured | None = None
) -> dict[str, Any]:
    """Return the resolved request as plain data without paths: what the manifest records."""

    def name(ref: ModelRef | None) -> str | None:
        return None if ref is None else models[ref].key if ref in models else short_name(ref.path)

    def source(s) -> dict[str, Any]:
        entry: dict[str, Any] = {"model": name(s.model)}
        if s.layer_range is not None:
            entry["layer_range"] = list(s.layer_range)
        if s.parameters:
            entry["parameters"] = s.parameters
        return entry

    modules = []
    for module in spec.modules:
        slices = []
        for piece in module.slices:
            entry: dict[str, Any] = {"sources": [source(s) for s in piece.sources]}
            if piece.base_model is not None:
                entry["base_model"] = name(piece.base_model)
            if piece.parameters:
                entry["parameters"] = piece.parameters
            slices.append(entry)
        modules.append({"name": module.name, "slices": slices, "parameters": module.parameters})
    tokenizer = None
    if isinstance(spec.tokenizer, TokenizerSpec):
        given = spec.tokenizer
        tokenizer = {
            "source": given.source if isinstance(given.source, str) else name(given.source),
            "tokens": {
                t: {
                    "kind": s.kind,
                    "model": name(s.model),
                    "token": s.token,
                    "token_id": s.token_id,
                    "force": s.force,
                }
                for t, s in given.tokens.items()
            },
            "pad_to_multiple_of": given.pad_to_multiple_of,
        }
    extra: dict[str, Any] = {}
    if spec.adjust.active:
        extra["adjust"] = {**spec.adjust.as_data(), "reference": name(options.reference)}
        extra["measured"] = measured.record if measured is not None else None
    if spec.text_from is not None:
        extra["text_from"] = name(spec.text_from)
    return {
        **extra,
        "verb": "merge", "method": spec.method, "base_model": name(spec.base_model), "modules": modules,
        "parameters": spec.parameters, "dtype": spec.dtype, "out_dtype": spec.out_dtype, "precision": spec.precision,
        "tokenizer": tokenizer, "chat_template": spec.chat_template, "structure": name(options.structure),
        "ignore": list(options.ignore), "dense": list(options.dense),
        "layers": list(options.layers) if options.layers else None,
        "sweep": {k: dict(v) for k, v in options.points.items()}, "seed": options.seed,
        "mergekit_quirks": options.quirks, "allow_nonfinite": options.allow_nonfinite,
        "models": {
            m.key: {"repo": m.located.repo, "commit": m.located.commit} for m in models.values()
        },
    }  # fmt: skip


class _Folder:
    """Chooses everything that lies beside the weights."""

    def __init__(
        self, plan_draft: Draft, models, vocabulary: VocabularyPlan | None, text_ref, text_folder, text_label, texts: Texts,
        is_pair: bool,
    ) -> None:  # fmt: skip
        self.draft = plan_draft
        self.spec = plan_draft.spec
        self.models: dict[ModelRef, OpenModel] = models
        self.vocabulary = vocabulary
        self.texts = texts
        self.notes = plan_draft.findings.notes
        self.warnings = plan_draft.findings.warnings
        # Bare files with --config have no folder, hence no companions.
        self.structure_folder: Path | None = models[plan_draft.structure].checkpoint.folder
        self.text_folder: Path | None = text_folder or self.structure_folder
        self.text_label = text_label
        self.generation_ref = text_ref
        self.is_pair = is_pair
        self.config = self._config(models[text_ref].checkpoint if is_pair else None)
        self._licence_names: tuple[str, ...] = ()

    def _config(self, context_donor: Checkpoint | None) -> dict[str, Any]:
        config = dict(self.draft.config or {})
        config.pop("_name_or_path", None)
        if self.vocabulary is not None:
            config = apply_config_edits(config, self.vocabulary.config_edits)
        if context_donor is not None and context_donor.config is not None:
            edits = context_edits(config, context_donor.config)
            config = apply_config_edits(config, edits)
            self.notes += [f"{k} {align.short(v)} from {context_donor.label}" for k, v in edits.items()]
        codes = {
            o.dtype for item in self.draft.items for task in item.tasks for o in task.outputs
            if DTYPES[o.dtype].family == "float" and len(o.shape) > 1
        }  # fmt: skip
        if len(codes) == 1:
            name = CONFIG_NAMES[codes.pop()]
            keys = [k for k in ("dtype", "torch_dtype") if k in config]
            for key in keys or ["torch_dtype"]:
                config[key] = name
            section = align.text_section(config)
            if section is not config:
                path = next(k for k in config if config[k] is section)
                edits = {f"{path}.{key}": name for key in ("dtype", "torch_dtype") if key in section}
                config = apply_config_edits(config, edits)
        return config

    def companions(self) -> tuple[Companion, ...]:
        """Return the files to write, sorted by name; generated ones included, the card excluded."""
        files: dict[str, bytes] = {}
        if self.structure_folder is not None:
            for companion in find_companions(self.structure_folder).files:
                kinds = {"tokenizer", "chat-template", "licence"}
                if companion.kind not in kinds and companion.name != GENERATION_FILE:
                    files[companion.name] = read_bytes(companion.source, 256_000_000)
        text = find_companions(self.text_folder) if self.text_folder is not None else None
        for companion in text.of_kind("tokenizer", "chat-template") if text is not None else ():
            files[companion.name] = read_bytes(companion.source, 256_000_000)
        if self.vocabulary is not None:
            for name in self.vocabulary.drop_files:
                files.pop(name, None)
            files.update(self.vocabulary.files)
        self._generation(files)
        self._template(files)
        licences = licence_files(
            [(m.key, m.checkpoint.folder) for m in self._donor_first() if m.checkpoint.folder is not None]
        )
        self._licence_names = tuple(c.name for c in licences)
        for companion in licences:
            files[companion.name] = read_bytes(companion.source)
        if self.spec.source_text is not None:
            files["mergekit_config.yml"] = self._without_paths(self.spec.source_text).encode()
        if self.vocabulary is not None or any(n.startswith("tokenizer") for n in files):
            missing = text.missing if text is not None else ()
            lacking = [m for m in missing if m in {"tokenizer", "generation_config.json", "chat template"}]
            if lacking and GENERATION_FILE in files:
                lacking = [m for m in lacking if m != GENERATION_FILE]
            if lacking:
                self.notes.append(
                    f"{self.text_label} has no {', '.join(lacking)}; the output has none either"
                )
        return tuple(Companion(name, files[name]) for name in sorted(files))

    def _donor_first(self) -> list[OpenModel]:
        donor = self.models[self.draft.structure]
        return [donor, *[m for m in self.models.values() if m is not donor]]

    def _generation(self, files: dict[str, bytes]) -> None:
        for ref in (self.generation_ref, self.draft.structure):
            folder = self.models[ref].checkpoint.folder
            content = read_generation_config(folder) if folder is not None else None
            if content is None or folder is None:
                continue
            raw = read_bytes(folder / GENERATION_FILE)
            if self.vocabulary is not None and self.vocabulary.generation_edits:
                content = apply_config_edits(content, self.vocabulary.generation_edits)
                raw = dump_json(content)
            rows = align.vocabulary_rows(self.models[self.draft.structure].checkpoint)
            if self.vocabulary is not None:
                rows = self.vocabulary.rows
            if rows:
                check_token_ids(content, rows, file=GENERATION_FILE)
            files[GENERATION_FILE] = raw
            if ref != self.generation_ref:
                self.notes.append(
                    f"{GENERATION_FILE} from {self.models[ref].checkpoint.label}; {self.text_label} has none"
                )
            return

    def _template(self, files: dict[str, bytes]) -> None:
        setting = self.texts.chat_template or self.spec.chat_template
        templates = []
        for model in self.models.values():
            folder = model.checkpoint.folder
            templates.append((model.key, read_chat_templates(folder).default if folder else None))
        different = {t for _, t in templates if t}
        if setting is None:
            if len(different) > 1:
                self.notes.append(f"the chat templates differ; the output has the one of {self.text_label}")
            return
        if self.texts.chat_template and Path(setting).is_file():
            text: str | None = read_bytes(Path(setting), 1_000_000).decode("utf-8")
        else:
            donor = next(
                (m.key for m in self.models.values() if m.checkpoint.folder == self.text_folder), None
            )
            base = self.models[self.spec.base_model].key if self.spec.base_model is not None else donor
            text = choose_template(setting, templates, base)
        if text is None:
            self.warnings.append("no model has a chat template; the output has none")
            return
        for name in list(files):
            if name in TEMPLATE_FILES:
                legacy = files.pop(name) if name == "chat_template.json" else None
                files.pop(name, None)
                if legacy is not None:
                    files["chat_template.json"] = legacy
        files.update(
            template_files(text, files.get("tokenizer_config.json"), files.get("chat_template.json"))
        )

    def _without_paths(self, text: str) -> str:
        """Replace local paths by model names in the recipe that is published."""
        for ref, model in sorted(self.models.items(), key=lambda p: -len(p[0].path)):
            for path, name in ((ref.path, model.key), (ref.adapter, short_name(ref.adapter or ""))):
                if path and ("/" in path or "\\" in path) and model.located.repo is None:
                    text = re.sub(re.escape(path) + r"(?=$|[\s'\"@+,}\]])", name, text)
        return text

    def card(self, point_name: str, point: Mapping[str, float]) -> str:
        """Return the model card of one output."""
        draft_ = self.draft
        sources = []
        for model in self._sources_in_order():
            checkpoint = model.checkpoint
            card = read_card(checkpoint.folder)
            own = next(
                (
                    s.parameters
                    for m in self.spec.modules
                    for p in m.slices
                    for s in p.sources
                    if s.model == model.ref
                ),
                {},
            )
            own = {k: point.get(k, v) for k, v in own.items()}
            sources.append(
                CardSource(
                    name=model.key,
                    hub_id=hub_id(model.ref.path, is_local=model.located.repo is None, config=checkpoint.config,
                                  folder=checkpoint.folder),
                    role="base" if model.ref == self.spec.base_model else "input",
                    licence=card_licence(card), parameters=own, languages=card_languages(card),
                )
            )  # fmt: skip
        for warning in merged_licence(sources)[1]:
            if warning not in self.warnings:
                self.warnings.append(warning)
        outputs = [o for item in draft_.items for t in item.tasks for o in t.outputs if o.model == point_name]
        codes = sorted({o.dtype for o in outputs if DTYPES[o.dtype].family == "float"})
        method = catalogue(self.spec.method)
        is_decoder = any("CausalLM" in str(a) for a in self.config.get("architectures") or [])
        return model_card(
            CardData(
                title=f"{self.texts.title} ({point_name})" if point_name else self.texts.title,
                method=method.name.replace("_", "-"),
                sources=tuple(sources),
                parameters={
                    **{k: v for k, v in self.spec.parameters.items() if v is not None and k != "int8_mask"},
                    **{k: v for k, v in point.items() if k in self.spec.parameters},
                },
                recipe=self._without_paths(self.spec.source_text) if self.spec.source_text else None,
                recipe_file="mergekit_config.yml" if self.spec.source_text else None,
                command=self._command(point),
                seed=draft_.options.seed if method.random else None,
                parameter_count=sum(o.elements for o in outputs),
                weight_bytes=sum(o.nbytes for o in outputs),
                dtype=", ".join(CONFIG_NAMES.get(c, c) for c in codes),
                pipeline_tag="text-generation" if is_decoder else None,
                licence_files=self._licence_names,
                version=__version__,
            )
        )

    def _command(self, point: Mapping[str, float]) -> str | None:
        """Return the command that repeats the run; a mergekit file is its own recipe."""
        if self.spec.source_text is not None:
            return None
        method = catalogue(self.spec.method)
        sources = self.spec.modules[0].slices[0].sources
        base = self.spec.base_model
        words = [
            "surgeon merge",
            *(self.models[s.model].key for s in sources if s.model != base or method.base == "ignored"),
        ]
        if (
            self.is_pair and base is not None
        ):  # the implied base decides more than the arithmetic: keep it implied
            words.append(self.models[base].key)
        elif base is not None and method.base != "ignored":
            words.append(f"--base {self.models[base].key}")
        words.append(f"--method {method.name.replace('_', '-')}")
        for parameter in method.parameters:
            name = parameter.name
            if parameter.inert:
                continue
            if parameter.per_model:
                given = [point.get(name, s.parameters[name]) for s in sources if name in s.parameters]
                if given:
                    words.append(f"--param {name}={','.join(f'{v:g}' for v in given)}")
            elif self.spec.parameters.get(name) is not None:
                words.append(f"--param {name}={point.get(name, self.spec.parameters[name])}")
        for given in self.spec.adjust.active:
            value = point.get(given, getattr(self.spec.adjust, given))
            option = given.replace("_", "-")
            words.append(f"--{option}" if value is True else f"--{option} {value}")
        if self.draft.options.seed:
            words.append(f"--seed {self.draft.options.seed}")
        return " ".join([*words, "-o OUT"])

    def _sources_in_order(self) -> list[OpenModel]:
        return list(self.models.values())
