"""Runs in a process of its own: llama.cpp answers requests, one JSON object a line, on standard input and output.

Started by `surgeon.deploy.llama_cpp` as a plain file. llama.cpp aborts on files its graphs cannot compute, and
that must not take the caller along.
"""

from __future__ import annotations

import json
import os
import sys
import urllib.request
from typing import Any


def open_server(path: str, context: int, threads: int) -> Any:
    """Load a file for exact arithmetic: float32 cache, no flash attention, no reuse of earlier prompts."""
    import xllamacpp

    library: Any = xllamacpp
    settings = library.CommonParams()
    settings.model.path = path
    settings.n_ctx = context
    settings.n_parallel = 1
    settings.warmup = False
    settings.cache_prompt = False
    settings.n_gpu_layers = 0
    settings.no_extra_bufts = True  # repacked weights (AMX) crash on some processors
    settings.cpuparams.n_threads = threads
    settings.cpuparams_batch.n_threads = threads
    settings.cache_type_k = settings.cache_type_v = library.ggml_type.GGML_TYPE_F32
    settings.flash_attn_type = library.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    return library.Server(settings)


def logprobs(server: Any, tokens: list[int], vocabulary: int, force: int) -> dict[str, Any]:
    """Return log-probabilities of the next token [vocabulary].

    ``force`` is what gets sampled: probabilities are those before sampling, but the server withholds them when
    the sampled token is an incomplete character.
    """
    answer = server.handle_completions(
        {"prompt": tokens, "max_tokens": 1, "n_predict": 1, "temperature": 0.0, "logprobs": vocabulary,
         "n_probs": vocabulary, "logit_bias": [[force, 1e6]], "cache_prompt": False}
    )  # fmt: skip
    if "choices" not in answer:
        return {"error": str(answer.get("error", answer))[:300]}
    entries = ((answer["choices"][0].get("logprobs") or {}).get("content") or [{}])[0].get(
        "top_logprobs"
    ) or []
    found = {int(entry["id"]): float(entry["logprob"]) for entry in entries}
    if len(found) != vocabulary:
        return {"error": f"the server gave {len(found)} of {vocabulary} probabilities"}
    return {"logprobs": [found[token] for token in range(vocabulary)]}


def tokenize(server: Any, text: str) -> dict[str, Any]:
    return _posted(server, "tokenize", {"content": text, "add_special": True, "parse_special": False})


def generate(server: Any, tokens: list[int], count: int) -> dict[str, Any]:
    """Return the tokens that follow, each the most probable one; what was computed for earlier ones is kept."""
    return _posted(server, "completion", {"prompt": tokens, "n_predict": count, "temperature": 0.0, "return_tokens": True,
                                          "cache_prompt": False})  # fmt: skip


def _posted(server: Any, place: str, body: dict[str, Any]) -> dict[str, Any]:
    """Return the tokens that the server answers with."""
    request = urllib.request.Request(
        f"{server.listening_address}/{place}", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(request, timeout=30) as answer:
        return {"tokens": json.load(answer)["tokens"]}


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what the library prints goes to the log
    server: Any = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if request["do"] == "open":
                server = None
                server = open_server(request["path"], request["context"], request["threads"])
                answer: dict[str, Any] = {"ok": True}
            elif request["do"] == "logprobs":
                answer = logprobs(server, request["tokens"], request["vocabulary"], request["force"])
            elif request["do"] == "generate":
                answer = generate(server, request["tokens"], request["count"])
            else:
                answer = tokenize(server, request["text"])
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {str(error)[:300]}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
