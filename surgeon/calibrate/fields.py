"""Which fields of a record are the prompt, the answer and the thinking.

Three shapes, in this order of precedence where a record has several:

    messages             [{"role": "user", "content": "..."}, ..., {"role": "assistant", ...}]
    prompt + response    also prompt + short + long, one of which is chosen
    text                 running text without an answer

Data sets that people bring have other names for the same things. These are understood when the
plain name is absent and only one of them is there:

    prompt     question, problem
    response   answer, solution, completion
    short      solution, answer
    long       deepseek_thinking_trajectory + deepseek_attempt (s1K-1.1), or else
               gemini_thinking_trajectory + gemini_attempt, or thinking_trajectories (the first) +
               attempt (s1K); of the two in s1K-1.1 DeepSeek's, which answers all the questions
    thinking   reasoning_content, reasoning

``thinking`` belongs to response and long, never to short. For a model that knows ``<think>`` (its
chat template has it, or its tokenizer has it as one token) it goes before the answer as
``<think>\\nTHINKING\\n</think>\\n\\nANSWER``, the form that DeepSeek-R1, QwQ and Qwen3 write; for any
other as ``THINKING\\n\\nANSWER``. For a model with other marks, write the response the way that model
does and leave ``thinking`` out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

ANSWERS = ("response", "short", "long")
"""Which field may hold the answer."""

_ALIASES = {
    "prompt": ("question", "problem"),
    "response": ("answer", "solution", "completion"),
    "short": ("solution", "answer"),
    "long": (),
    "thinking": ("reasoning_content", "reasoning"),
}
_TRAJECTORIES = (
    ("deepseek_thinking_trajectory", "deepseek_attempt"),
    ("gemini_thinking_trajectory", "gemini_attempt"),
    ("thinking_trajectories", "attempt"),
)
OPEN, CLOSE = "<think>", "</think>"


class Unfit(Exception):
    """A record that cannot be used, with the reason and a way out."""

    def __init__(self, reason: str, help: str = "") -> None:
        super().__init__(reason)
        self.reason = reason
        self.help = help or "a record has text, messages, or prompt and response"


@dataclass(frozen=True)
class Parts:
    """What a record says.

    Attributes:
        history: messages before the answer, [] for running text.
        answer: the answer; None for running text or messages without one.
        thinking: what belongs before the answer, "" when there is none.
        text: running text, "" otherwise.
        domain: the record's own domain, "" when it has none.
    """

    history: tuple[dict[str, str], ...]
    answer: str | None
    thinking: str
    text: str
    domain: str


def parts_of(values: Mapping[str, Any], answer: str = "response") -> Parts:
    """Return what a record says, with the answer that ``answer`` names.

    Raises:
        Unfit: a field is missing, of the wrong type, or ambiguous.
    """
    domain = _string(values, "domain") or ""
    if "messages" in values and answer == "response":
        history = _messages(values["messages"])
        if history[-1]["role"] == "assistant":
            said = history[-1]["content"]
            return Parts(history[:-1], said, _checked(_named(values, "thinking"), said), "", domain)
        return Parts(history, None, "", "", domain)
    prompt = _named(values, "prompt")
    if prompt is not None:
        user = ({"role": "user", "content": prompt},)
        said, thinking = _answer(values, answer)
        return Parts(user, said, _checked(thinking, said), "", domain)
    text = _string(values, "text")
    if answer != "response":
        raise Unfit(
            f'it has no prompt and "{answer}"',
            f"long-to-short data has prompt, short and long; {_has(values)}",
        )
    if text is None:
        raise Unfit(
            "it has neither text, messages nor prompt",
            f"a record has text, messages, or prompt and response; {_has(values)}",
        )
    return Parts((), None, "", text, domain)


def has_answer(values: Mapping[str, Any], answer: str) -> bool:
    """Tell whether a record has a prompt and the answer that ``answer`` names."""
    try:
        parts = parts_of(values, answer)
    except Unfit:
        return False
    return parts.answer is not None


def _has(values: Mapping[str, Any]) -> str:
    names = [str(name)[:40] for name in list(values)[:8]]
    return f"this one has {', '.join(names)}" if names else "this one is empty"


def _string(values: Mapping[str, Any], name: str) -> str | None:
    value = values.get(name)
    if value is not None and not isinstance(value, str):
        raise Unfit(f'"{name}" is {_kind(value)}, not a string')
    return value


def _kind(value: Any) -> str:
    return {dict: "an object", list: "a list", bool: "true or false"}.get(type(value), "a number")


def _named(values: Mapping[str, Any], role: str) -> str | None:
    """Return the string of a role by its plain name, or by the only alias there is."""
    if values.get(role) is not None:
        return _string(values, role)
    found = [name for name in _ALIASES[role] if values.get(name) is not None]
    if len(found) > 1:
        raise Unfit(f"{' and '.join(found)} could both be the {role}", f'name the one that is meant "{role}"')
    return _string(values, found[0]) if found else None


def _answer(values: Mapping[str, Any], answer: str) -> tuple[str, str | None]:
    """Return the chosen answer and the thinking before it."""
    said = _named(values, answer)
    if said is not None:
        return said, None if answer == "short" else _named(values, "thinking")
    if answer == "long":
        for thinking, attempt in _TRAJECTORIES:
            thought, final = values.get(thinking), values.get(attempt)
            if isinstance(thought, list) and thought:  # s1K keeps a list of one
                thought = thought[0]
            if isinstance(thought, str) and isinstance(final, str):
                return final, thought
    help = f"it needs the field {answer}; {_has(values)}"
    if answer == "response" and values.get("short") is not None and values.get("long") is not None:
        help = "it has short and long answers: say which one to use"
    raise Unfit(f"it has a prompt but no {answer}", help)


def _checked(thinking: str | None, answer: str) -> str:
    if thinking and CLOSE in answer:
        raise Unfit(f"its answer holds {CLOSE} and it has thinking besides", "leave one of the two out")
    return (thinking or "").strip()


def _messages(value: Any) -> tuple[dict[str, str], ...]:
    if not isinstance(value, (list, tuple)) or not value:
        raise Unfit("messages is not a list with at least one message")
    messages = []
    for number, message in enumerate(value, 1):
        if not isinstance(message, Mapping):
            raise Unfit(
                f"message {number} is {_kind(message) if not isinstance(message, str) else 'a string'}, not an object"
            )
        role, content = message.get("role"), message.get("content")
        if not isinstance(role, str) or not role:
            raise Unfit(f"message {number} has no role", 'a message is {"role": "user", "content": "..."}')
        if not isinstance(content, str):
            raise Unfit(
                f"the content of message {number} is not a string",
                'a message is {"role": "user", "content": "..."}',
            )
        messages.append({"role": role, "content": content})
    return tuple(messages)
