"""llama.cpp in a process of its own, through the wheel xllamacpp: what a GGUF file really computes.

with LlamaCpp(path) as runtime:
    runtime.logprobs([1, 5, 9], vocabulary=32000)
    runtime.tokens("some text")
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from surgeon.checkpoint.header import printable
from surgeon.errors import EnvironmentFault, InputError, Where

CHILD = Path(__file__).with_name("llama_child.py")
TIMEOUT = 600.0
SAMPLED = 0
"""The token that is sampled where nobody looks at it; any one that is a whole character will do."""


def installed() -> bool:
    """Say whether llama.cpp can be asked here."""
    return importlib.util.find_spec("xllamacpp") is not None


class LlamaCpp:
    """A GGUF file loaded by llama.cpp on the CPU, with a float32 cache and without flash attention.

    Args:
        path: the file.
        context: tokens it must hold.
        threads: how many compute.

    Raises (constructor):
        EnvironmentFault: E512 xllamacpp is not installed.
        InputError: E328 llama.cpp refuses the file, or died of it.
    """

    def __init__(self, path: Path, *, context: int = 512, threads: int = 1) -> None:
        if not installed():
            raise EnvironmentFault("E512", "xllamacpp is not installed; it runs GGUF files",
                                   help='pip install "model-surgeon[gguf]"') from None  # fmt: skip
        self.path = path
        self._log: Any = tempfile.TemporaryFile()  # noqa: SIM115 - closed in close()
        self._child = subprocess.Popen(
            [sys.executable, "-I", str(CHILD)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env={**os.environ, "GGML_NO_BACKTRACE": "1"},  # it would start a debugger to print one
        )
        try:
            self._ask({"do": "open", "path": str(path.resolve()), "context": context, "threads": threads})
        except BaseException:
            self.close()
            raise

    def logprobs(self, tokens: Sequence[int], vocabulary: int, *, sampled: int = SAMPLED) -> np.ndarray:
        """Return log-probabilities of the token after ``tokens`` [vocabulary], float64."""
        answer = self._ask({"do": "logprobs", "tokens": [int(token) for token in tokens], "vocabulary": vocabulary, "force": sampled})  # fmt: skip
        return np.asarray(answer["logprobs"], dtype=np.float64)

    def generate(self, tokens: Sequence[int], count: int) -> list[int]:
        """Return the next tokens, each the most probable one, computed with the cache: ``count``, fewer where the text ends."""
        return [int(token) for token in self._ask({"do": "generate", "tokens": [int(token) for token in tokens], "count": count})["tokens"]]  # fmt: skip

    def tokens(self, text: str) -> list[int]:
        """Return the token ids of a text, with the special tokens the file says are put around it."""
        return [int(token) for token in self._ask({"do": "tokens", "text": text})["tokens"]]

    def close(self) -> None:
        for pipe in (self._child.stdin, self._child.stdout):
            if pipe is not None:
                pipe.close()
        try:
            self._child.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()
        self._log.close()

    def __enter__(self) -> LlamaCpp:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self._child.stdin is not None and self._child.stdout is not None
        try:
            self._child.stdin.write(json.dumps(request) + "\n")
            self._child.stdin.flush()
            line = self._child.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise self._refused(f"the process died with {self._child.wait()}")
        answer = json.loads(line)
        if "error" in answer:
            raise self._refused(answer["error"])
        return answer

    def _refused(self, reason: str) -> InputError:
        self._log.seek(0)
        lines = self._log.read().decode("utf-8", "replace").splitlines()
        said = [line for line in lines if "error" in line.lower() or "GGML_ASSERT" in line]
        return InputError("E328", f"llama.cpp cannot use {printable(self.path.name)}: {printable(' '.join([reason, *said[:2]])[:400])}",
                          where=Where(str(self.path)), help="pip install --upgrade xllamacpp if its llama.cpp is older than the model; else make the file again")  # fmt: skip


def differing_texts(runtime: LlamaCpp, tokenizer: Any, texts: Sequence[str]) -> list[str]:
    """Return the texts that llama.cpp and a transformers tokenizer turn into different token ids."""
    return [
        text
        for text in texts
        if runtime.tokens(text) != list(tokenizer.encode(text, split_special_tokens=True))
    ]
