"""From text to token ids with the model's own tokenizer, and where the answer begins.

Tokenizers come from transformers, from the local folder only, and never with a model's own code.

Where the answer begins: the whole is tokenised at once, because a tokenizer may join the end of
the prompt and the start of the answer in one token. The first token of the answer is the first
one that reaches beyond the end of the prompt; such a joined token counts as answer. It is found
by character offsets where the tokenizer gives them. A special token that swallows the blanks
after it has offsets that reach too far; it stays with the prompt when the prompt alone ends with
it too. Without offsets the answer begins after the longest common prefix of the prompt's own
tokens and the whole's, which is never too late and rarely a token early.
"""

from __future__ import annotations

import datetime
import importlib.util
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from surgeon.calibrate.fields import CLOSE, OPEN
from surgeon.checkpoint.vocabulary import has_tokenizer
from surgeon.errors import EnvironmentFault, InputError, Where

INSTALL = 'pip install "model-surgeon[run]"'
_MARK = "SURGEON-ANSWER-MARK"
_DATE = datetime.date(2024, 7, 26)
"""What templates that write today's date get: the same text must give the same tokens tomorrow."""
_TODAY = re.compile(r"""strftime_now\(\s*(["'])([^"'\\]*)\1\s*\)""")
_MARGIN = 64
_CHARACTERS_PER_TOKEN = 32


class Encoder:
    """A tokenizer with its chat template."""

    def __init__(self, tokenizer: Any, template: bool) -> None:
        self.tokenizer = tokenizer
        self.template = template and bool(getattr(tokenizer, "chat_template", None))
        self.special = frozenset(int(i) for i in tokenizer.all_special_ids)
        self.thinks = self.template and OPEN in str(tokenizer.chat_template)
        self.thinks = self.thinks or OPEN in tokenizer.get_added_vocab()

    @property
    def eos(self) -> int | None:
        return self.tokenizer.eos_token_id

    def text(self, text: str, limit: int | None = None) -> np.ndarray:
        """Return ids, int64 [T], of running text with the special tokens the tokenizer adds.

        Args:
            limit: how many tokens matter. Of a much longer text only a first part is tokenised;
                more than ``limit`` ids are returned then all the same.
        """
        if limit is not None and len(text) > (limit + _MARGIN) * _CHARACTERS_PER_TOKEN:
            ids = self.text(text[: (limit + _MARGIN) * _CHARACTERS_PER_TOKEN])
            if len(ids) > limit + _MARGIN:
                return ids
        return np.asarray(self.tokenizer(text)["input_ids"], dtype=np.int64)

    def exchange(
        self, history: Sequence[dict[str, str]], answer: str | None, thinking: str = ""
    ) -> tuple[np.ndarray, int]:
        """Return the ids of a conversation and the index of the first token of its answer.

        Args:
            history: messages before the answer.
            answer: the last reply; None makes everything text (index 0).
            thinking: what comes before the reply and counts as a part of it.
        """
        if answer is not None and thinking:
            marked = f"{OPEN}\n{thinking}\n{CLOSE}" if self.thinks else thinking
            answer = f"{marked}\n\n{answer}"
        if not self.template:
            before, after = _plain(history, answer)
            return self._joined(before, after, special=True)
        if answer is None:
            return self._joined("", self._render(list(history), False), special=False)
        before, answer, suffix = self._prompted(list(history), answer)
        return self._joined(before, answer + suffix, special=False)

    def _prompted(self, history: list[dict[str, str]], answer: str) -> tuple[str, str, str]:
        """Return the text before the answer, the answer, and what the template puts after it.

        An answer is never passed through the template, since many templates drop its thinking:
        the template is rendered with a mark in its place. An answer with thinking continues the
        generation prompt instead, as the model would have written it.
        """
        whole = self._render([*history, {"role": "assistant", "content": _MARK}], False)
        before, mark, suffix = whole.rpartition(_MARK)
        if not mark or _MARK in before:
            before, suffix = self._render(history, True), self.tokenizer.eos_token or ""
        if CLOSE in answer:
            before = self._render(history, True)
            opened = before.rstrip().endswith(OPEN)
            if opened and answer.lstrip().startswith(OPEN):
                answer = answer.lstrip()[len(OPEN) :]
                answer = answer.lstrip("\n") if before.endswith("\n") else answer
            elif not opened and OPEN not in answer:
                answer = f"{OPEN}\n{answer}"
        return before, answer, suffix

    def _render(self, messages: list[dict[str, str]], prompt: bool) -> str:
        return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)

    def _joined(self, before: str, after: str, *, special: bool) -> tuple[np.ndarray, int]:
        fast = bool(self.tokenizer.is_fast)
        whole = self.tokenizer(before + after, add_special_tokens=special, return_offsets_mapping=fast)
        ids = np.asarray(whole["input_ids"], dtype=np.int64)
        if not before:
            return ids, 0
        alone = self.tokenizer(before, add_special_tokens=special)["input_ids"]
        shared = common_prefix(alone, whole["input_ids"])
        if not fast:
            return ids, shared
        reach = (i for i, (_, end) in enumerate(whole["offset_mapping"]) if end > len(before))
        start = next(reach, len(ids))
        while (
            start < shared and int(ids[start]) in self.special and ids[start] != self.tokenizer.unk_token_id
        ):
            start += 1
        return ids, start


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """Return how many leading ids two sequences share."""
    count = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        count += 1
    return count


def _plain(history: Sequence[dict[str, str]], answer: str | None) -> tuple[str, str]:
    """Return (text before the answer, answer) without a template: parts on lines of their own."""
    before = ""
    for message in history:
        before = _glue(before, message["content"])
    if answer is None:
        return "", before
    whole = _glue(before, answer)
    return whole[: len(whole) - len(answer)], answer


def _glue(before: str, after: str) -> str:
    """Join two texts; where neither brings white space, they go on two lines."""
    if not before or before[-1].isspace() or after[:1].isspace():
        return before + after
    return f"{before}\n{after}"


def load_encoder(folder: Path, *, template: bool = True) -> Encoder:
    """Load the tokenizer of a model folder.

    Raises:
        InputError: E375 there is none, or it cannot be loaded without its own code.
        EnvironmentFault: E512 transformers is missing.
    """
    folder = Path(folder)
    if not folder.is_dir() or not has_tokenizer(folder):
        raise InputError("E375", f"{folder} has no tokenizer; text cannot be turned into tokens",
                         where=Where(str(folder)), help="copy tokenizer.json and tokenizer_config.json of the model into it")  # fmt: skip
    if importlib.util.find_spec("transformers") is None:
        raise EnvironmentFault("E512", "transformers is not installed; its tokenizers turn calibration text into tokens",
                               help=INSTALL)  # fmt: skip
    from transformers import AutoTokenizer

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        )
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise InputError("E375", f"the tokenizer of {folder} cannot be loaded: {reason}", where=Where(str(folder)),
                         help="write a tokenizer.json with save_pretrained; a tokenizer's own code is never run") from error  # fmt: skip
    # Texts are cut here, with the count recorded; the library's own limit would only print a warning.
    tokenizer.model_max_length = int(1e30)
    tokenizer.chat_template = _dated(getattr(tokenizer, "chat_template", None))
    return Encoder(tokenizer, template)


def _dated(template: Any) -> Any:
    """Put a fixed date into a chat template, or into each of several by name."""
    if isinstance(template, dict):
        return {name: _dated(text) for name, text in template.items()}
    if not isinstance(template, str):
        return template
    return _TODAY.sub(lambda call: f"{call[1]}{_DATE.strftime(call[2])}{call[1]}", template)
