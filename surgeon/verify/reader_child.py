"""Runs in a process of its own: loads a model with stock transformers and says what happened.

Started by `surgeon.verify.readers` as a plain file, so that nothing of this program is imported
beside the reader. The request is one JSON object on standard input; the answer is one JSON
object in the file the request names, rewritten after every stage, so that a crash shows how far
it came. Code that a model brings along is never run; where the request says so, this program's own
copy of that code, which the caller found equal, takes its place.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import sys
from typing import Any

TEXTS = (
    "Hello, world!",
    "The quick brown fox jumps over the lazy dog.",
    "2 + 2 = 4, and 3 * 7 = 21.",
    "def add(a, b):\n    return a + b\n",
    "  leading and trailing blanks  ",
    "tabs\tand\nnew lines",
    "UPPER lower MiXeD",
    "don't stop; it's \"quoted\"",
    "price: $1,234.56 (20% off)",
    "https://example.org/path?query=1&other=2#part",
    "na\u00efve caf\u00e9 \u00fcber stra\u00dfe",
    "\u041f\u0440\u0438\u0432\u0435\u0442, \u043c\u0438\u0440",
    "\u4f60\u597d\uff0c\u4e16\u754c",
    "\u3053\u3093\u306b\u3061\u306f",
    "\u0645\u0631\u062d\u0628\u0627",
    "\U0001f642 \U0001f680",
    "\\frac{a}{b} \\times \\sqrt{x^2}",
    '{"key": [1, 2, {"nested": null}]}',
    "a",
    "word " * 30,
)
NEW_TOKENS = 16
PROMPT = 8
TIE = 1e-4
"""Two logits closer than this share of the largest one may swap places between two ways of computing them."""
TIE_16 = 0.05
"""The same for a quantized model, which runs in its own 16-bit type."""


class Child:
    """The stages, in order; each adds to ``answer``."""

    def __init__(self, request: dict[str, Any]) -> None:
        self.request = request
        self.answer: dict[str, Any] = {
            "stage": "start",
            "checks": {},
            "failures": [],
            "warnings": [],
            "unable": None,
        }
        self.theirs: Any = None
        self.their_rows = 0

    def save(self) -> None:
        temporary = f"{self.request['answer']}.part"
        with open(temporary, "w", encoding="utf-8") as stream:
            json.dump(self.answer, stream)
        os.replace(temporary, self.request["answer"])

    def stage(self, name: str) -> None:
        self.answer["stage"] = name
        self.save()

    def fail(self, check: str, message: str) -> None:
        self.answer["failures"].append({"check": check, "message": message})

    def run(self) -> None:
        self.stage("importing transformers")
        try:
            import torch
            import transformers
        except ImportError as error:
            self.answer["unable"] = f"{error.name or 'torch'} is not installed"
            self.save()
            return
        transformers.logging.set_verbosity_error()
        torch.manual_seed(0)
        torch.set_num_threads(self.request["threads"])
        self.answer["versions"] = {"torch": str(torch.__version__), "transformers": transformers.__version__}
        package = (self.request.get("quantized") or {}).get("package")
        if package:
            self.answer["versions"][package] = importlib.metadata.version(package)
        try:
            compared = self.request.get("quantized") and self.request["against"]
            if not compared or self.ask_other():
                model = self.load(self.request["path"])
                if model is not None:
                    self.use(model)
        except MemoryError:
            self.answer["unable"] = "the memory limit was reached"
        except RuntimeError as error:
            if "alloc" not in str(error):
                raise
            self.answer["unable"] = "the memory limit was reached"
        self.answer["stage"] = "done"
        self.save()

    def load(self, path: str, quiet: bool = False) -> Any:
        """Load a model; None when a failure was recorded."""
        import transformers

        self.stage("loading the config")
        own = self.request.get("own_code", {}).get(path)
        try:
            if own is not None:
                kind = packaged_class(**own)
                config = kind.config_class.from_pretrained(path)
            else:
                config = transformers.AutoConfig.from_pretrained(path, trust_remote_code=False)
                kind = auto_class(config)
        except Exception as error:
            if "trust_remote_code" in str(error):
                self.answer["unable"] = "the model needs its own code, which is not run"
            else:
                self.fail("load", f"transformers cannot read config.json: {one_line(error)}")
            return None
        self.stage(f"loading the weights with {kind.__name__}")
        try:
            model, info = kind.from_pretrained(
                path, config=config, dtype="auto", output_loading_info=True, trust_remote_code=False,
                local_files_only=True,
            )  # fmt: skip
        except MemoryError:
            raise
        except Exception as error:
            if "alloc" in str(error) and isinstance(error, RuntimeError):
                raise
            if isinstance(error, ImportError):
                self.answer["unable"] = one_line(error)
            else:
                self.fail("load", f"transformers cannot load the model: {one_line(error)}")
            return None
        model.eval()
        if quiet:
            return model
        self.answer["dtype"] = str(model.dtype).removeprefix("torch.")
        for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs", "conversion_errors"):
            found = info.get(key) or ()
            shown = sorted(str(f) for f in found)
            if shown:
                words = key.replace("_keys", " tensors").replace("_", " ").replace("msgs", "messages")
                self.fail(
                    "load", f"{len(shown)} {words}: {', '.join(shown[:3])}{', ...' if len(shown) > 3 else ''}"
                )
        self.counted(model, config)
        self.answer["checks"]["load"] = {
            "class": type(model).__name__,
            "parameters": self.answer.get("parameters"),
        }
        if self.request.get("quantized"):
            self.count_quantized(model)
        return model

    def count_quantized(self, model: Any) -> None:
        """Compare the number of modules that hold quantized weights with what the files hold."""
        found = beside().quantized_modules(model)
        count, least = sum(found.values()), self.request["quantized"]["least"]
        self.answer["checks"]["load"]["quantized"] = {"modules": count, "classes": found, "expected": least}
        if count < least:
            self.fail(
                "load",
                f"{count:,} modules are quantized in memory, the files hold {least:,} quantized matrices",
            )

    def counted(self, model: Any, config: Any) -> None:
        """Compare the parameter count and types with what the files hold."""
        import torch

        tensors = list(model.state_dict(keep_vars=True).items())
        meta = [name for name, tensor in tensors if tensor.is_meta]
        if meta:
            self.fail("load", f"{len(meta)} tensors were never filled: {', '.join(meta[:3])}")
            return
        unique = {(t.data_ptr(), t.numel()): t for _, t in tensors if t.numel()}
        count = sum(t.numel() for t in unique.values())
        self.answer["parameters"] = count
        expected = self.request.get("parameters")
        if expected is not None and count != expected:
            self.fail("load", f"the loaded model has {count:,} parameters, the files hold {expected:,}")
        declared = self.request.get("dtype")
        if declared is None:
            return
        wanted = getattr(torch, declared)
        kept = [str(m) for m in (getattr(model, "_keep_in_fp32_modules", None) or ())]
        odd = [
            n for n, p in model.named_parameters()
            if p.is_floating_point() and p.dtype != wanted and not any(k in n for k in kept)
        ]  # fmt: skip
        if odd:
            self.fail("load", f"{len(odd)} parameters are not {declared} as declared, the first is {odd[0]}")

    def use(self, model: Any) -> None:
        import torch

        path = self.request["path"]
        if self.request["generate"]:
            self.tokenizer(path, model)
        if not self.request["generate"] and not self.request["against"] and not self.request.get("samples"):
            return
        if self.request.get("quantized"):
            with torch.no_grad():
                self.use_quantized(model)
            return
        self.stage("converting to float32")
        model = model.float()
        if self.request["generate"]:
            generates = type(model).__name__.endswith(("ForCausalLM", "LMHeadModel"))
            with torch.no_grad():
                if generates:
                    self.generate(model)
                else:
                    self.forward(model)
        if self.request["against"]:
            self.against(model)

    def use_quantized(self, model: Any) -> None:
        """Compare and use a quantized model; its matrices decoded come first, see `quantized_child.decoded`."""
        samples, ids = self.request.get("samples") or (), None
        mine = None
        if samples or self.request["against"]:
            with beside().decoded(model) as precision:
                self.answer["precision"] = precision
                for number, sample in enumerate(samples):
                    self.stage(f"running sample {number + 1}")
                    self.keep(model, sample, f"decoded-{number}.npy")
                if self.request["against"]:
                    self.stage("running the model")
                    ids = fixed_ids(model, 2, 32, self.request["vocabulary"])
                    mine = first_output(model, ids)
        for number, sample in enumerate(samples):
            self.stage(f"running sample {number + 1} as it is")
            self.keep(model, sample, f"as-run-{number}.npy")
        if mine is not None:
            self.stage("running the model as it is")
            as_run = first_output(model, ids)
            if self.compare(mine, self.theirs, self.their_rows == embedding_rows(model)):
                width = min(mine.shape[-1], self.theirs.shape[-1])
                apart = distance(as_run[..., :width], self.theirs[..., :width])
                self.answer["checks"]["against"] |= {"as_run": apart, "precision": self.answer["precision"]}
        if self.request["generate"]:
            if type(model).__name__.endswith(("ForCausalLM", "LMHeadModel")):
                self.generate(model, TIE_16)
            else:
                self.forward(model)

    def keep(self, model: Any, ids: list[int], name: str) -> None:
        """Write the logits (or last hidden states) of one sample, float32 [tokens, n]."""
        import numpy as np
        import torch

        output = first_output(model, torch.tensor([ids]))[0].float().numpy()
        np.save(os.path.join(self.request["outputs"], name), output)

    def ask_other(self) -> bool:
        """Run the model that a quantized one is compared with, in float32 where it holds plain numbers, before that is
        loaded: auto-round changes how its process loads mixtures of experts. False when a failure was recorded."""
        import torch

        other = self.load_other()
        if other is None:
            return False
        if not getattr(other, "is_quantized", False):
            other = other.float()
        self.stage("running the other model")
        with torch.no_grad():
            self.theirs = first_output(other, fixed_ids(other, 2, 32, self.request["vocabulary"]))
        self.their_rows = embedding_rows(other)
        return True

    def load_other(self) -> Any:
        """Load the model that is compared with; None when a failure was recorded."""
        other = self.load(self.request["against"], quiet=True)
        if other is None:
            for failure in self.answer["failures"]:
                failure["message"] = failure["message"].replace("the model", "the other model")
        return other

    def generate(self, model: Any, tie: float = TIE) -> None:
        """Greedy tokens with the cache must equal those without."""
        import torch

        self.stage("generating with a cache")
        ids = fixed_ids(model, 1, PROMPT)
        options = {
            "attention_mask": torch.ones_like(ids), "do_sample": False, "num_beams": 1, "max_new_tokens": NEW_TOKENS,
            "min_new_tokens": NEW_TOKENS, "pad_token_id": 0,
        }  # fmt: skip
        try:
            cached = model.generate(ids, use_cache=True, **options)[0, PROMPT:].tolist()
            self.stage("generating without a cache")
            plain = model.generate(ids, use_cache=False, **options)[0, PROMPT:].tolist()
        except Exception as error:
            if isinstance(error, MemoryError) or "alloc" in str(error):
                raise
            self.fail("generate", f"generation failed: {one_line(error)}")
            return
        self.answer["checks"]["generate"] = {"tokens": len(plain), "distinct": len(set(plain))}
        if cached != plain:
            at = next(i for i, (a, b) in enumerate(zip(cached, plain, strict=True)) if a != b)
            before = torch.cat([ids, torch.tensor([plain[:at]], dtype=ids.dtype)], dim=1)
            logits = model(input_ids=before, use_cache=False).logits[0, -1]
            gap = float((logits[plain[at]] - logits[cached[at]]).abs() / logits.abs().max())
            if gap > tie:
                self.fail(
                    "generate",
                    f"token {at + 1} differs with and without the cache: {cached[at]} / {plain[at]}",
                )
            else:
                self.answer["warnings"].append(
                    f"token {at + 1} is a tie between {cached[at]} and {plain[at]}"
                )
        if len(set(plain)) == 1:
            self.answer["warnings"].append(f"greedy generation repeats token {plain[0]} only")

    def forward(self, model: Any) -> None:
        """One pass of a model that does not generate: every output must be finite."""
        self.stage("running a forward pass")
        try:
            output = first_output(model, fixed_ids(model, 2, 32))
        except Exception as error:
            if isinstance(error, MemoryError) or "alloc" in str(error):
                raise
            self.fail("generate", f"the forward pass failed: {one_line(error)}")
            return
        bad = int((~output.isfinite()).sum())
        if bad:
            self.fail("generate", f"the forward pass gives {bad:,} non-finite values")
        self.answer["checks"]["forward"] = {"shape": list(output.shape)}

    def tokenizer(self, path: str, model: Any) -> None:
        if not self.request["has_tokenizer"]:
            self.answer["checks"]["tokenizer"] = None
            return
        import transformers

        self.stage("loading the tokenizer")
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(
                path, trust_remote_code=False, local_files_only=True
            )
        except Exception as error:
            if "trust_remote_code" in str(error):
                self.answer["warnings"].append("the tokenizer needs its own code, which is not run")
            else:
                self.fail("tokenizer", f"transformers cannot load the tokenizer: {one_line(error)}")
            return
        rows = model.get_input_embeddings().weight.shape[0]
        if len(tokenizer) > rows:
            self.fail(
                "tokenizer", f"the tokenizer has {len(tokenizer):,} tokens, the embedding {rows:,} rows"
            )
        exact, odd = 0, []
        for text in TEXTS:
            ids = tokenizer.encode(text, add_special_tokens=False)
            back = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
            exact += back == text
            # A tokenizer may normalise (case, blanks); what it made of the text must then be stable.
            if back != text and tokenizer.encode(back, add_special_tokens=False) != ids:
                odd.append(text)
        if odd:
            self.fail(
                "tokenizer",
                f"{len(odd)} of {len(TEXTS)} texts change in a round trip, the first is {odd[0][:40]!r}",
            )
        self.answer["checks"]["tokenizer"] = {"texts": len(TEXTS), "exact": exact}
        self.template(tokenizer)

    def template(self, tokenizer: Any) -> None:
        if not getattr(tokenizer, "chat_template", None):
            return
        self.stage("rendering the chat template")
        marker = "What is the capital of France?"
        turns = [{"role": "user", "content": marker}, {"role": "assistant", "content": "Paris."},
                 {"role": "user", "content": "And of Italy?"}]  # fmt: skip
        try:
            text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        except Exception as error:
            self.fail("chat template", f"the chat template cannot be rendered: {one_line(error)}")
            return
        if marker not in text or "And of Italy?" not in text:
            self.fail("chat template", "the rendered chat template lacks what the user said")
        self.answer["checks"]["chat template"] = {"characters": len(text)}

    def against(self, model: Any) -> None:
        """Compare logits (or last hidden states) with another model on the same random tokens."""
        import torch

        rows = model.get_input_embeddings().weight.shape[0]
        self.stage("running the model")
        with torch.no_grad():
            mine = first_output(model, fixed_ids(model, 2, 32, self.request["vocabulary"]))
        del model
        other = self.load_other()
        if other is None:
            return
        if not getattr(other, "is_quantized", False):
            other = other.float()
        self.stage("running the other model")
        with torch.no_grad():
            theirs = first_output(other, fixed_ids(other, 2, 32, self.request["vocabulary"]))
        self.compare(mine, theirs, rows == embedding_rows(other))

    def compare(self, mine: Any, theirs: Any, same_rows: bool) -> bool:
        """Add the figures of a comparison; False when a failure was recorded."""
        width = min(mine.shape[-1], theirs.shape[-1])
        if mine.shape[:-1] != theirs.shape[:-1] or (mine.shape[-1] != theirs.shape[-1] and same_rows):
            self.fail("against", f"outputs have shapes {list(mine.shape)} and {list(theirs.shape)}")
            return False
        mine, theirs = mine[..., :width].double(), theirs[..., :width].double()
        if not (bool(mine.isfinite().all()) and bool(theirs.isfinite().all())):
            self.fail("against", "one of the models gives non-finite outputs")
            return False
        agree = (mine.argmax(-1) == theirs.argmax(-1)).double().mean().item()
        self.answer["checks"]["against"] = {
            "max_difference": (mine - theirs).abs().max().item(), "largest": theirs.abs().max().item(),
            "relative": distance(mine, theirs), "top1_agreement": agree,
            "positions": int(mine.shape[0] * mine.shape[1]),
        }  # fmt: skip
        return True


def distance(one: Any, other: Any) -> float:
    """Return the norm of a difference by that of the second."""
    one, other = one.double(), other.double()
    return ((one - other).norm() / other.norm()).item() if other.norm() > 0 else 0.0


def embedding_rows(model: Any) -> int:
    return model.get_input_embeddings().weight.shape[0]


def beside() -> Any:
    """Return the module of questions to quantized models that lies beside this file."""
    import importlib.util

    name = "surgeon_quantized_child"
    if name not in sys.modules:
        place = os.path.join(os.path.dirname(os.path.abspath(__file__)), "quantized_child.py")
        spec = importlib.util.spec_from_file_location(name, place)
        assert spec is not None and spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def packaged_class(folder: str, module: str, name: str) -> Any:
    """Return a model class of this program's own: ``module`` of the package in ``folder``."""
    import importlib
    import types

    package = types.ModuleType("surgeon_modeling")
    package.__path__ = [folder]
    sys.modules.setdefault("surgeon_modeling", package)
    return getattr(importlib.import_module(f"surgeon_modeling.{module}"), name)


def auto_class(config: Any) -> Any:
    """Return the auto class for the model class that config.json names."""
    import transformers

    named = (getattr(config, "architectures", None) or [""])[0]
    endings = (
        (("ForCausalLM", "LMHeadModel"), "AutoModelForCausalLM"),
        (("ForMaskedLM",), "AutoModelForMaskedLM"),
        (("ForSequenceClassification",), "AutoModelForSequenceClassification"),
        (("ForTokenClassification",), "AutoModelForTokenClassification"),
        (("ForQuestionAnswering",), "AutoModelForQuestionAnswering"),
        (("ForConditionalGeneration",), "AutoModelForImageTextToText"),
    )
    for suffixes, name in endings:
        if named.endswith(suffixes):
            chosen = getattr(transformers, name)
            if type(config) in chosen._model_mapping:
                return chosen
            if name == "AutoModelForImageTextToText":
                return transformers.AutoModelForSeq2SeqLM
            return chosen
    return transformers.AutoModel


def fixed_ids(model: Any, batch: int, length: int, limit: int | None = None) -> Any:
    """Return seeded token ids inside the vocabulary (and a given limit)."""
    import torch

    rows = model.get_input_embeddings().weight.shape[0]
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, min(rows, limit or rows), (batch, length), generator=generator)


def first_output(model: Any, ids: Any) -> Any:
    """Return logits, or the last hidden state."""
    more = {"decoder_input_ids": ids} if getattr(model.config, "is_encoder_decoder", False) else {}
    output = model(input_ids=ids, **more)
    return output.logits if "logits" in output else output[0]


def one_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines)}"[:300]


def limit_memory(limit: int | None) -> None:
    if limit:
        with contextlib.suppress(ImportError, ValueError, OSError):
            import resource

            resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


def main() -> int:
    request = json.load(sys.stdin)
    limit_memory(request.get("memory_limit"))
    child = Child(request)
    try:
        child.run()
    except BaseException as error:
        child.fail(child.answer["stage"], f"{child.answer['stage']} failed: {one_line(error)}")
        child.answer["stage"] = "done"
        child.save()
        if not isinstance(error, Exception):
            raise
    return 0


if __name__ == "__main__":
    sys.exit(main())
