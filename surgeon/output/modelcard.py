"""The model card (README.md) of a produced model, as a pure function of what was done.

Names that come with a model are untrusted: they are escaped for Markdown, HTML and terminals,
and the front matter is written by a YAML emitter. Local paths never appear: a source is shown
by its hub id where one is known, else by the last part of its path.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from surgeon.checkpoint.header import printable

_HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*")
_MAX_FRONT_MATTER = 200_000


class _Loader(yaml.SafeLoader):
    """Safe loader in which scalars stay text (``no`` is a language) and ``<<`` does not expand."""


_Loader.yaml_implicit_resolvers = {
    letter: [(tag, pattern) for tag, pattern in resolvers if tag.endswith(":null")]
    for letter, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


@dataclass(frozen=True)
class Licence:
    """A source's licence as its card states it; every field may be unknown (None)."""

    id: str | None = None
    name: str | None = None
    link: str | None = None

    def __str__(self) -> str:
        if self.id is None:
            return "unknown"
        return f"{self.id} ({self.name})" if self.id == "other" and self.name else self.id


@dataclass(frozen=True)
class CardSource:
    """One input as the card shows it.

    Attributes:
        name: text for tables; a hub id or a short name, never a path.
        hub_id: "org/name" or None.
        role: "base", "input", "tokenizer", ...
        licence: what its card says.
        parameters: this input's own parameters, e.g. {"weight": 0.6}.
        languages: the card's language codes.
    """

    name: str
    hub_id: str | None = None
    role: str = "input"
    licence: Licence = Licence()
    parameters: Mapping[str, Any] | None = None
    languages: tuple[str, ...] = ()


@dataclass(frozen=True)
class CardData:
    """Everything a model card says.

    Attributes:
        title: name of the model.
        method: e.g. "ties".
        sources: the inputs in the order given.
        parameters: global parameters of the method.
        recipe: the recipe or mergekit file as executed, free of paths; shown in a code block.
        recipe_file: the name under which the recipe lies in the folder, or None.
        command: the command that repeats the run, free of paths, or None.
        seed: shown when the method draws random numbers; None = it does not.
        parameter_count, weight_bytes, dtype: size of the result.
        vocabulary: one sentence per decision about tokens and chat template.
        pipeline_tag: e.g. "text-generation", or None.
        relation: hub value of ``base_model_relation``.
        tags: further tags.
        licence_files: names of the licence and notice files in the folder.
        notices: further facts a user must know (dropped tensors, changed context length, ...).
        version: program version.
        verb: "merge", "prune", "edit", "quantize" or "export".
        remote_code: the folder needs the code files that lie in it.
        packages: what stock transformers needs beside itself.
        vllm: vLLM loads it, too.
    """

    title: str
    method: str
    sources: tuple[CardSource, ...]
    parameters: Mapping[str, Any] | None = None
    recipe: str | None = None
    recipe_file: str | None = None
    command: str | None = None
    seed: int | None = None
    parameter_count: int | None = None
    weight_bytes: int | None = None
    dtype: str | None = None
    vocabulary: tuple[str, ...] = ()
    pipeline_tag: str | None = "text-generation"
    relation: str = "merge"
    tags: tuple[str, ...] = ()
    licence_files: tuple[str, ...] = ()
    notices: tuple[str, ...] = ()
    version: str | None = None
    verb: str = "merge"
    remote_code: bool = False
    packages: tuple[str, ...] = ()
    vllm: bool = True


def read_front_matter(text: str) -> dict[str, Any]:
    """Return the YAML front matter of a model card; {} when there is none or it is broken.

    Cards are written by hand and often malformed; a merge must not fail over one.
    """
    text = text.removeprefix("\ufeff").replace("\r\n", "\n")
    found = re.match(r"---[ \t]*\n(.*?)\n---[ \t]*(?:\n|\Z)", text[:_MAX_FRONT_MATTER], re.S)
    if found is None:
        return {}
    try:
        value = yaml.load(found[1], Loader=_Loader)  # a SafeLoader with fewer types
    except (yaml.YAMLError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def read_card(folder: Path | None) -> dict[str, Any]:
    """Return the front matter of the README.md in a model folder; {} when there is none."""
    from surgeon.checkpoint.companions import allowed_roots, check_link
    from surgeon.checkpoint.strict_json import read_bytes
    from surgeon.errors import SurgeonError

    path = None if folder is None else Path(folder) / "README.md"
    if path is None or not path.is_file():
        return {}
    try:
        check_link(path, allowed_roots(path.parent))
        return read_front_matter(read_bytes(path, 4_000_000).decode("utf-8", "replace"))
    except SurgeonError:
        return {}


def looks_like_hub_id(text: object) -> bool:
    """Tell whether text has the form org/name that a hub id must have."""
    return (
        isinstance(text, str)
        and len(text) <= 96
        and _HUB_ID.fullmatch(text) is not None
        and ".." not in text
        and "--" not in text
        and not text.endswith((".git", ".", "-"))
    )


def hub_id(
    reference: str | None,
    *,
    is_local: bool,
    config: Mapping[str, Any] | None = None,
    folder: Path | None = None,
) -> str | None:
    """Return the hub id of a source, or None when it is not known.

    A downloaded model's reference is its id; a folder inside the hub cache carries it in its
    path; for other folders config.json's ``_name_or_path`` counts when it has the form of an id.

    Args:
        reference: as the user wrote it, without adapter, revision or prefix.
        is_local: whether it was read from a local path.
    """
    if not is_local and looks_like_hub_id(reference):
        return reference
    if folder is not None:
        for part in Path(folder).absolute().parts:
            if part.startswith("models--") and part.count("--") == 2:
                candidate = part.removeprefix("models--").replace("--", "/")
                if looks_like_hub_id(candidate):
                    return candidate
    written = (config or {}).get("_name_or_path")
    if looks_like_hub_id(written) and not str(written).startswith(
        ("models/", "checkpoints/", "output/", "outputs/")
    ):
        return str(written)
    return None


def short_name(reference: str) -> str:
    """Return the part of a reference that may be shown: a hub id as it is, of a path the last part."""
    if looks_like_hub_id(reference):
        return reference
    return re.split(r"[/\\]", reference.rstrip("/\\"))[-1] or "model"


def card_licence(card: Mapping[str, Any]) -> Licence:
    """Return the licence a source card states."""

    def text(key: str) -> str | None:
        value = card.get(key)
        if isinstance(value, list) and value:
            value = value[0]
        return str(value).strip()[:200] or None if isinstance(value, (str, int, float)) else None

    identifier = text("license")
    return Licence(identifier.lower() if identifier else None, text("license_name"), text("license_link"))


def card_languages(card: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the language codes a source card lists."""
    value = card.get("language")
    values = value if isinstance(value, list) else [value]
    return tuple(v for v in values if isinstance(v, str) and re.fullmatch(r"[a-z]{2,3}(-[A-Za-z]+)?", v))


def merged_licence(sources: Sequence[CardSource]) -> tuple[dict[str, str], tuple[str, ...]]:
    """Return the front matter's licence keys for models merged together, and warnings.

    One licence shared by all is kept. Different ones, or some unknown beside known ones, give
    ``license: other``: the terms of every source apply. When none is known nothing is claimed.
    """
    found = list(dict.fromkeys(s.licence for s in sources))
    known = [licence for licence in found if licence.id is not None]
    if not known:
        return {}, ("the licence of the inputs is not known; the model card states none",)
    same = len({(x.id, x.name if x.id == "other" else None) for x in found}) == 1
    if same:
        first = known[0]
        keys = {"license": str(first.id)}
        if first.id == "other" and first.name:
            keys["license_name"] = first.name
        if first.id == "other" and first.link:
            keys["license_link"] = _public_link(first.link, sources)
        return {key: value for key, value in keys.items() if value}, ()
    listed = ", ".join(f"{s.name}: {s.licence}" for s in sources)
    name = "-and-".join(re.sub(r"[^a-z0-9.-]+", "-", str(x.name or x.id).lower()) for x in known)[:90]
    if len(known) < len(found):
        name += "-and-unknown"
    return {"license": "other", "license_name": name}, (
        f"the inputs have different licences ({printable(listed)}); the model card says license: other and the "
        "terms of all of them apply",
    )


def _public_link(link: str, sources: Sequence[CardSource]) -> str:
    if link.startswith("https://"):
        return link
    ids = [s.hub_id for s in sources if s.hub_id]
    plain = re.fullmatch(r"[A-Za-z0-9._-]+", link)
    return f"https://huggingface.co/{ids[0]}/blob/main/{link}" if ids and plain else ""


def model_card(data: CardData) -> str:
    """Return the text of README.md: YAML front matter and Markdown body; ends with a newline."""
    parts = [
        "---\n" + _front_matter(data) + "---",
        f"# {_text(data.title)}",
        _summary(data),
        "## What was done",
        _steps(data),
        _details(data),
        "## Use",
        _snippets(data),
        "## Limitations",
        _limitations(data),
        "## Reproduce",
        _reproduction(data),
        "## Licence",
        _licence_text(data),
    ]
    return "\n\n".join(part.strip("\n") for part in parts if part) + "\n"


def _front_matter(data: CardData) -> str:
    keys: dict[str, Any] = dict(merged_licence(data.sources)[0])
    keys["library_name"] = "transformers"
    if data.pipeline_tag:
        keys["pipeline_tag"] = data.pipeline_tag
    ids = list(dict.fromkeys(s.hub_id for s in data.sources if looks_like_hub_id(s.hub_id)))
    if ids:
        keys["base_model"] = ids
        keys["base_model_relation"] = data.relation
    languages = list(dict.fromkeys(language for s in data.sources for language in s.languages))
    if languages:
        keys["language"] = languages
    tags = ["surgeon", data.verb, data.method.replace("_", "-"), *data.tags]
    keys["tags"] = list(dict.fromkeys(tags))
    keys = {
        k: [printable(v) for v in value] if isinstance(value, list) else printable(value)
        for k, value in keys.items()
    }
    return yaml.safe_dump(keys, sort_keys=False, allow_unicode=True, default_flow_style=False, width=1000)


def _summary(data: CardData) -> str:
    names = ", ".join(_linked(s) for s in data.sources)
    size = []
    if data.parameter_count is not None:
        size.append(f"{data.parameter_count:,} parameters")
    if data.dtype:
        size.append(_text(data.dtype))
    if data.weight_bytes is not None:
        size.append(f"{data.weight_bytes:,} bytes of weights")
    sentence = {
        "merge": f"A merge of {len(data.sources)} models ({names}) with the method {_code(data.method)}.",
        "prune": f"A smaller model cut from {names} with the method {_code(data.method)}.",
        "edit": f"{names} with its weights edited by the method {_code(data.method)}.",
        "quantize": f"{names} quantized with the method {_code(data.method)}.",
        "export": f"A member of the nested family {names}."
        if data.method == "member"
        else f"{names} in another form.",
    }[data.verb]
    return sentence + (f"\n\n{', '.join(size)}." if size else "")


def _steps(data: CardData) -> str:
    rows = ["| input | role | parameters |", "|---|---|---|"]
    for s in data.sources:
        rows.append(f"| {_linked(s)} | {_text(s.role)} | {_parameters(s.parameters)} |")
    rows.append(f"| all | method {_code(data.method)} | {_parameters(data.parameters)} |")
    return "\n".join(rows)


def _details(data: CardData) -> str:
    lines = [*data.vocabulary, *data.notices]
    if data.seed is not None:
        lines.append(f"Random numbers are drawn with seed {data.seed}.")
    return "\n".join(f"- {_text(line)}" for line in lines)


def _snippets(data: CardData) -> str:
    auto = "AutoModelForCausalLM" if data.pipeline_tag in (None, "text-generation") else "AutoModel"
    lead, argument = "Loads in stock transformers; nothing else needs to be installed.", ""
    if data.packages:
        lead = f"Loads in stock transformers with:\n\n```sh\npip install {' '.join(data.packages)}\n```"
    if data.remote_code:
        lead = (
            "Its layers differ in size, which no stock class describes: the modelling code lies in this folder, and "
            "transformers asks for your consent to run it."
        )
        argument = ", trust_remote_code=True"
    text = (
        f"{lead}\n\n"
        "```python\n"
        f"from transformers import {auto}, AutoTokenizer\n\n"
        'path = "."  # this folder, or the id under which it is published\n'
        "tokenizer = AutoTokenizer.from_pretrained(path)\n"
        f'model = {auto}.from_pretrained(path, dtype="auto"{argument})\n'
        "```"
    )
    if data.remote_code or auto == "AutoModel" or not data.vllm:
        return text
    return text + "\n\nWith vLLM:\n\n```sh\nvllm serve .\n```"


def _limitations(data: CardData) -> str:
    if data.verb != "merge":
        done = {
            "prune": "pruned",
            "edit": "edited",
            "quantize": "quantized",
            "export": "pruned" if data.method == "member" else "converted",
        }[data.verb]
        return (
            f"A {done} model has been computed, not trained: evaluate it on your task before use. It has the limitations "
            f"and biases of its source; knowledge the evaluation does not ask for may be lost, and safety training may "
            "not survive."
        )
    return (
        "A merged model has been computed, not trained: evaluate it on your task before use. It inherits the "
        "limitations and biases of every input, and safety training of an input may not survive. Answers can be "
        "longer or shorter than those of any input."
    )


def _reproduction(data: CardData) -> str:
    parts = []
    if data.version:
        parts.append(f"Made with surgeon {_text(data.version)} (package `model-surgeon`).")
    if data.command:
        parts.append(_fenced(data.command, "sh"))
    if data.recipe:
        where = f" (in {_code(data.recipe_file)})" if data.recipe_file else ""
        parts.append(f"Configuration{where}:\n\n" + _fenced(data.recipe, "yaml"))
    parts.append(
        "`surgeon.json` holds the digests of every input and output file; `sha256sum -c SHA256SUMS` checks them."
    )
    return "\n\n".join(parts)


def _licence_text(data: CardData) -> str:
    keys, _ = merged_licence(data.sources)
    rows = "\n".join(f"- {_linked(s)}: {_text(str(s.licence))}" for s in data.sources)
    if not keys:
        lead = "The licences of the inputs could not be determined from their cards. Find them out before you publish."
    elif "license_name" in keys and len({s.licence for s in data.sources}) > 1:
        lead = (
            "The inputs have different licences. The terms of all of them apply to this model, the strictest "
            "included; check that they allow what you intend."
        )
    else:
        lead = "The inputs share one licence, which applies to this model too."
    if any(str(s.licence.id).startswith("llama") for s in data.sources):
        lead += ' Llama community licences ask that names of derived models begin with "Llama".'
    files = ""
    if data.licence_files:
        files = (
            "\n\nTheir texts and notices are in "
            + ", ".join(_code(name) for name in data.licence_files)
            + "."
        )
    return f"{lead}\n\n{rows}{files}"


def _linked(source: CardSource) -> str:
    if looks_like_hub_id(source.hub_id):
        return f"[{_text(str(source.hub_id))}](https://huggingface.co/{source.hub_id})"
    return _text(source.name)


def _parameters(values: Mapping[str, Any] | None) -> str:
    if not values:
        return "-"
    return ", ".join(f"{_text(key)} {_text(_short(value))}" for key, value in values.items())


def _short(value: Any) -> str:
    text = repr(value) if isinstance(value, str) else str(value)
    return text if len(text) <= 120 else text[:117] + "..."


def _text(value: str) -> str:
    """Escape untrusted text for one line of Markdown: no markup, HTML, table borders or control characters."""
    value = printable(value)
    value = value.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]|~!])", r"\\\1", value)


def _code(value: str) -> str:
    """Return untrusted text as inline code that cannot end early."""
    value = printable(value).replace("|", "¦")
    longest = max((len(run) for run in re.findall(r"`+", value)), default=0)
    fence = "`" * (longest + 1)
    return f"{fence} {value} {fence}" if longest else f"`{value}`"


def _fenced(text: str, language: str) -> str:
    """Return untrusted text as a code block that cannot end early; control characters are escaped."""
    lines = [
        printable(line.replace("\t", "    ")) for line in text.replace("\r\n", "\n").rstrip("\n").split("\n")
    ]
    longest = max((len(run) for line in lines for run in re.findall(r"`+", line)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n" + "\n".join(lines) + f"\n{fence}"
