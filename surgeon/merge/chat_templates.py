"""Which chat template the merged model gets, as text.

Templates are programs in the Jinja language. They are copied as text and never rendered here
(fault G3): what a model's author wrote runs only in the software that serves the model.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from surgeon.errors import UsageError, close_matches
from surgeon.merge.tokenizer_files import dump_json

MAX_LITERAL = 1_000_000

_CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

_LLAMA3 = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)

_MISTRAL = (
    "{% if messages and messages[0]['role'] == 'system' %}"
    "{% set preamble = messages[0]['content'] + '\\n\\n' %}{% set turns = messages[1:] %}"
    "{% else %}{% set preamble = '' %}{% set turns = messages %}{% endif %}"
    "{{ bos_token }}"
    "{% for message in turns %}"
    "{% if message['role'] != ('user' if loop.index0 % 2 == 0 else 'assistant') %}"
    "{{ raise_exception('user and assistant messages must alternate, after at most one system message') }}"
    "{% endif %}"
    "{% if message['role'] == 'user' %}"
    "{{ ' [INST] ' + (preamble if loop.first else '') + message['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'] + eos_token }}{% endif %}"
    "{% endfor %}"
)

_ALPACA = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] | trim + '\\n\\n' }}"
    "{% elif message['role'] == 'user' %}{{ '### Instruction:\\n' + message['content'] | trim + '\\n\\n' }}"
    "{% elif message['role'] == 'user_context' %}{{ '### Input:\\n' + message['content'] | trim + '\\n\\n' }}"
    "{% elif message['role'] == 'assistant' %}"
    "{{ '### Response:\\n' + message['content'] | trim + '\\n\\n' }}"
    "{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Response:\\n' }}{% endif %}"
)

_EXAONE = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}{{ '[|system|][|endofturn|]\\n' }}{% endif %}"
    "{{ '[|' + message['role'] + '|]' + message['content'] }}"
    "{{ '\\n' if message['role'] == 'user' else '[|endofturn|]\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '[|assistant|]' }}{% endif %}"
)

BUILT_IN = {
    "alpaca": _ALPACA,
    "chatml": _CHATML,
    "exaone": _EXAONE,
    "llama3": _LLAMA3,
    "mistral": _MISTRAL,
}
"""Templates that a configuration may name."""


def choose_template(
    setting: str | None, templates: Sequence[tuple[str, str | None]], donor: str | None = None
) -> str | None:
    """Return the template text for the output, or None to leave the donor's files as they are.

    Args:
        setting: None; "auto" for the most frequent among the models (on a tie, the one whose
            model is listed first); "base" for the donor's; a built-in name; or Jinja text of at
            least 20 characters with a brace in it, as in mergekit.
        templates: (model label, its default template or None), in the order the models are listed.
        donor: label of the model whose tokenizer is used.

    Raises:
        UsageError: E242 an unknown name, or text that is no template.
    """
    if setting is None:
        return None
    if setting == "auto":
        return _most_frequent(templates)
    if setting == "base":
        return next((text for label, text in templates if label == donor), None)
    if setting in BUILT_IN:
        return BUILT_IN[setting]
    if len(setting) > MAX_LITERAL:
        raise UsageError(
            "E242",
            f"a chat template of {len(setting):,} characters is too long",
            help="give a file with Jinja text",
        )
    if len(setting) >= 20 and "{" in setting:
        return setting
    shown = setting if len(setting) <= 40 else setting[:40] + "..."
    raise UsageError(
        "E242",
        f"unknown chat template {shown!r}",
        help=close_matches(setting, [*BUILT_IN, "auto", "base"])
        or f"auto, base, {', '.join(sorted(BUILT_IN))}, a file, or Jinja text of at least 20 characters",
    )


def _most_frequent(templates: Sequence[tuple[str, str | None]]) -> str | None:
    votes: dict[str, list[str]] = {}
    for _, text in templates:
        if text and text.strip():
            votes.setdefault(text.strip(), []).append(text)
    if not votes:
        return None
    return max(votes.values(), key=len)[0]  # max keeps the first of equals, and dicts keep the order


def template_files(
    template: str, tokenizer_config: bytes | None, legacy: bytes | None = None
) -> dict[str, bytes]:
    """Return the files that give a model this template in every form a loader may look for.

    Newer loaders read chat_template.jinja, older ones only tokenizer_config.json; both get the
    same text. Named templates in a list ("tool_use", ...) keep their text.

    Args:
        template: the text.
        tokenizer_config: content of the output's tokenizer_config.json, or None.
        legacy: content of the donor's chat_template.json (processors), or None.
    """
    files = {"chat_template.jinja": template.encode("utf-8")}
    for name, content in (("tokenizer_config.json", tokenizer_config), ("chat_template.json", legacy)):
        if content is None:
            continue
        document = json.loads(content)
        named = document.get("chat_template")
        if isinstance(named, list):
            others = [e for e in named if isinstance(e, dict) and e.get("name") != "default"]
            document["chat_template"] = [{"name": "default", "template": template}, *others]
        else:
            document["chat_template"] = template
        files[name] = dump_json(document)
    return files
