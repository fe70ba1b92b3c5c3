"""One evaluation, from a request to the result document; the entry for the command line and for recipes.

Order: everything that can be refused from options and data alone, then the baseline, then the
model, then comparison and gates. Replies are kept on disk as they are made (`replies`), so a run
that was interrupted continues and ends with the same numbers.
"""

from __future__ import annotations

import contextlib
import gc
import math
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgeon.checkpoint.header import printable
from surgeon.errors import Interrupted, UsageError
from surgeon.evaluate import gates, metrics
from surgeon.evaluate.gates import Gate
from surgeon.evaluate.intervals import noise_points
from surgeon.evaluate.metrics import Outcomes
from surgeon.evaluate.model import (
    Described,
    Loaded,
    describe,
    find,
    load,
    refuse_encoder,
    resolve_device,
    resolve_dtype,
)
from surgeon.evaluate.questions import QuestionSet, read_questions
from surgeon.evaluate.request import EvalRequest, build
from surgeon.evaluate.results import check_output, outcomes_of, per_question, read_result, recorded, save
from surgeon.system import physical_cores

if TYPE_CHECKING:
    from surgeon.evaluate.texts import Texts

__all__ = ["EvalRequest", "build", "evaluate", "save"]

Progress = Callable[[str, int, int], None]
"""Called with (what is being done, done, total)."""

MANY_CAPPED = 0.05
FEW_QUESTIONS = 100
MOST_ROWS = 256
SCHEMA = 1
_COMPARED = ("samples_per_question", "temperature", "top_p", "top_k", "max_new_tokens", "template")


@dataclass
class _Measured:
    """What one model gave."""

    described: Described
    outcomes: Outcomes | None = None
    metrics: dict[str, Any] = field(default_factory=dict)
    groups: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    timing: dict[str, float] = field(default_factory=dict)


def evaluate(
    request: EvalRequest, progress: Progress | None = None, stop: threading.Event | None = None
) -> dict[str, Any]:
    """Evaluate a model and return the result document; nothing is printed, and no result file written.

    Raises:
        SurgeonError: see the modules; a failed gate is not raised, it is in the document.
    """
    return _Evaluation(request, progress, stop).run()


class _Evaluation:
    """The state of one run; `run` is the whole story."""

    def __init__(self, request: EvalRequest, progress: Progress | None, stop: threading.Event | None) -> None:
        self.request, self.progress, self.stop = request, progress, stop
        self.warnings: list[str] = []
        self.notes: list[str] = []
        self.limited = False
        self.device = self.dtype = ""
        self.rows = 0
        self.texts: dict[tuple[str, str], Texts] = {}
        self.cap = f"--max-new-tokens {request.max_new_tokens}"

    def run(self) -> dict[str, Any]:
        request, began = self.request, time.monotonic()
        parsed = request.checked()
        check_output(request)
        if request.tasks:
            from surgeon.evaluate import harness

            harness.require()
        questions = self._questions()
        domains = tuple(sorted({q.domain for q in questions.questions if q.domain})) if questions else ()
        gates.check_metrics(parsed, request.metric_names(domains), open_ended=bool(request.tasks))
        self._limit(parsed, bool(questions and questions.limited) or bool(request.tasks and request.limit))
        model = self._describe(request.model)
        given = self._baseline_document(questions)
        other = self._describe(request.baseline) if request.baseline and given is None else None
        reference = self._describe(request.kl) if request.kl else None
        if questions or request.tasks or request.perplexity:
            for speaking in (m for m in (model, other) if m is not None):
                refuse_encoder(speaking)
        self._place([m for m in (model, other, reference) if m is not None])
        with _threads(request.threads):
            self._texts(parsed, model, reference)
            before = self._measure(other, questions, "baseline") if other is not None else given
            measured = self._measure(model, questions, "")
            referred = self._divergence(measured, reference, parsed) if reference is not None else {}
        document = self._document(measured, questions, began)
        document["baseline"] = self._compared(measured, before) if before is not None else None
        document["gates"] = self._decide(parsed, document, referred)
        if not all(gate["passed"] for gate in document["gates"]):
            document["status"] = "gate-failed"
        document["seconds"] = round(time.monotonic() - began, 3)
        return document

    # ---- before any model runs -----------------------------------------------------------------

    def _questions(self) -> QuestionSet | None:
        request = self.request
        if not request.questions:
            return None
        found = read_questions(
            request.questions, match=request.match, answers=not request.length, limit=request.limit, offline=request.offline
        )  # fmt: skip
        self.notes.extend(found.notes)
        return found

    def _limit(self, parsed: list[Gate], limited: bool) -> None:
        """Note that a limit left data out; a gate over part of the data is refused (fault J8)."""
        self.limited = self.limited or limited
        if limited and parsed and not self.request.gate_limited:
            raise UsageError("E227", f"--limit {self.request.limit} leaves data out, and gates over part of the data are not decided",
                             help="leave out --limit, or accept it: --gate-limited")  # fmt: skip

    def _place(self, models: list[Described]) -> None:
        request = self.request
        self.device = resolve_device(request.device)
        self.dtype = resolve_dtype(request.dtype, self.device, models, request.memory_limit)
        if request.dtype == "auto" and self.device == "cpu" and not (request.questions or request.tasks):
            self.dtype = "float32"  # one layer at a time fits whatever the model's size

    def _texts(self, parsed: list[Gate], model: Described, reference: Described | None) -> None:
        """Read the texts of perplexity and KL now: what is wrong with them is known before hours of work."""
        if reference is not None:
            from surgeon.evaluate.divergence import check_vocabularies

            check_vocabularies(model, reference)
        for source in dict.fromkeys(s for s in (self.request.perplexity, self._kl_text()) if s):
            texts = self._text(source, model)
            self._limit(parsed, texts.limited)
            self.warnings.extend(texts.warnings)

    def _text(self, source: str, model: Described) -> Texts:
        """Return a source as this model's tokens."""
        from surgeon.calibrate.tokens import load_encoder
        from surgeon.evaluate.texts import load_texts

        request = self.request
        key = (source, model.sha256)
        if key not in self.texts:
            self.texts[key] = load_texts(
                source, model, load_encoder(model.path, template=request.template), sequence_length=request.sequence_length,
                limit=request.limit, seed=request.seed, offline=request.offline,
            )  # fmt: skip
        return self.texts[key]

    def _kl_text(self) -> str | None:
        from surgeon.evaluate.texts import SHIPPED

        return (self.request.text or SHIPPED) if self.request.kl else None

    def _describe(self, reference: str) -> Described:
        found = describe(find(reference, offline=self.request.offline), dequantize=self.request.dequantize)
        self.notes.extend(f"{found.name}: {note}" for note in found.decoded)
        return found

    # ---- one model -----------------------------------------------------------------------------

    def _measure(self, model: Described, questions: QuestionSet | None, role: str) -> _Measured:
        request, measured = self.request, _Measured(model)
        if questions is not None or request.tasks:
            with self._timed(measured, "load"):
                self._tell(role, "loading", 0, 1)
                loaded = load(
                    model, device=self.device, dtype=self.dtype, template=request.template, memory_limit=request.memory_limit
                )  # fmt: skip
            self.notes.extend(loaded.notes)
            if not loaded.stop_ids:
                self.warnings.append(
                    f"{model.name} names no end-of-sequence token: every reply runs into the limit"
                )
            if questions is not None:
                with self._timed(measured, "generate"):
                    self._ask(measured, loaded, questions, role)
            if request.tasks:
                from surgeon.evaluate import harness

                with self._timed(measured, "tasks"):
                    self._tell(role, "tasks", 0, 1)
                    # Their prompts are of unknown length: no more at once than lm-eval's users usually choose.
                    rows = 32 if request.batch_size == "auto" else request.batch_size
                    measured.metrics |= harness.run_tasks(
                        loaded, request.tasks, include_path=request.include_path, limit=request.limit, batch_size=rows,
                        seed=request.seed, offline=request.offline,
                    )  # fmt: skip
            del loaded
            gc.collect()
        if request.perplexity:
            with self._timed(measured, "perplexity"):
                measured.metrics["perplexity"] = self._perplexity(model, role, measured.data)
        return measured

    def _ask(self, measured: _Measured, loaded: Loaded, questions: QuestionSet, role: str) -> None:
        from surgeon.evaluate.answering import ask

        found = ask(
            self.request, measured.described, loaded, questions.questions, role=role, device=self.device, dtype=self.dtype,
            tell=self._step(role, "replies"), stop=self.stop,
        )  # fmt: skip
        measured.outcomes, self.rows = found.outcomes, found.rows
        if not role and 0 < loaded.context <= self.request.max_new_tokens:
            self.cap = f"the model's length of {loaded.context:,} tokens"
        self.notes.extend(found.notes)
        self._summarise(measured)

    def _summarise(self, measured: _Measured) -> None:
        """Turn outcomes into metrics, over all questions and by domain."""
        if measured.outcomes is not None:
            options: Any = {"seed": self.request.seed, "pass_at": self.request.pass_at}
            measured.metrics |= metrics.measure(measured.outcomes, **options)
            measured.groups = metrics.by_domain(measured.outcomes, **options)

    def _perplexity(self, model: Described, role: str, data: dict[str, Any]) -> dict[str, Any]:
        from surgeon.evaluate import perplexity
        from surgeon.evaluate.model import open_stored

        texts = self._text(str(self.request.perplexity), model)
        data["perplexity"] = texts.record
        checkpoint = open_stored(model)
        try:
            losses = perplexity.token_losses(
                checkpoint, texts.passages, self._settings(), progress=self._step(role, "perplexity"), stop=self.stop
            )  # fmt: skip
        finally:
            checkpoint.close()
        return perplexity.perplexity(losses, seed=self.request.seed)

    def _divergence(self, measured: _Measured, reference: Described, parsed: list[Gate]) -> dict[str, float]:
        """Add kl and top1_agreement; return the reference's own metrics that gates ask for."""
        from surgeon.evaluate import divergence
        from surgeon.evaluate.model import open_stored

        request, model = self.request, measured.described
        texts = self._text(str(self._kl_text()), model)
        measured.data["kl"] = {**texts.record, "reference": reference.plain()}
        with contextlib.ExitStack() as stack:
            first, second = open_stored(model), open_stored(reference)
            stack.callback(first.close)
            stack.callback(second.close)
            with self._timed(measured, "kl"):
                found = divergence.divergence(
                    first, second, texts.passages, self._settings(), progress=self._step("", "divergence"), stop=self.stop
                )  # fmt: skip
        measured.metrics |= divergence.metrics(found, seed=request.seed)
        if request.perplexity and any("ref" in g.names and g.metric == "perplexity" for g in parsed):
            own = self._perplexity(reference, "reference", {})
            return {"perplexity": own["value"]}
        return {}

    def _settings(self) -> Any:
        from surgeon.calibrate.settings import Settings

        return Settings(device=self.device, dtype=self.dtype, memory_limit=self.request.memory_limit)

    # ---- comparison and document ---------------------------------------------------------------

    def _baseline_document(self, questions: QuestionSet | None) -> _Measured | None:
        """Read --baseline RESULT.json; None when it is a model."""
        given = self.request.baseline
        path = Path(given).expanduser() if given else None
        if path is None or not (path.is_file() and path.suffix == ".json"):
            return None
        content = read_result(path)
        described = recorded(content.get("model") or {}, path)
        measured = _Measured(
            described, metrics=dict(content["metrics"]), data=dict(content.get("data") or {})
        )
        if questions is not None:
            theirs = content.get("settings") or {}
            ours = self._plain_settings()
            changed = [k for k in _COMPARED if theirs.get(k) != ours.get(k)]
            if changed:
                shown = ", ".join(f"{k} {theirs.get(k)} there, {ours.get(k)} here" for k in changed[:3])
                raise UsageError("E229", f"the baseline {printable(path.name)} was measured with other settings: {shown}",
                                 help="repeat its settings, or give the baseline's model")  # fmt: skip
            measured.outcomes = outcomes_of(content.get("per_question"), questions, self.request.length, path)
            measured.metrics |= metrics.measure(
                measured.outcomes, seed=self.request.seed, pass_at=self.request.pass_at
            )
        return measured

    def _compared(self, ours: _Measured, theirs: _Measured) -> dict[str, Any]:
        """Return the baseline's part of the document."""
        paired: dict[str, Any] = {}
        if ours.outcomes is not None and theirs.outcomes is not None:
            paired = metrics.paired(ours.outcomes, theirs.outcomes, seed=self.request.seed)
        texts = [m.data["perplexity"].get("ids_sha256") for m in (ours, theirs) if "perplexity" in m.data]
        if len(set(texts)) > 1:
            self.warnings.append(
                "the two models split the text into different tokens: their perplexities are not comparable"
            )
        found = {**theirs.described.plain(), "metrics": theirs.metrics, "paired": paired}
        found |= {"groups": {"domain": theirs.groups}} if theirs.groups else {}
        return found | ({"timing": theirs.timing} if theirs.timing else {})

    def _plain_settings(self) -> dict[str, Any]:
        request = self.request
        found: dict[str, Any] = {"seed": request.seed, "limit": request.limit, "limited": self.limited,
                                 "dtype": self.dtype, "device": self.device}  # fmt: skip
        if request.questions:
            found |= {
                "samples_per_question": request.samples, **request.sampling, "max_new_tokens": request.max_new_tokens,
                "batch_size": self.rows or request.batch_size, "template": request.template, "match": request.match or "auto",
                "judged": not request.length, "reflection_words": list(request.reflection_words or metrics.REFLECTION_WORDS),
            }  # fmt: skip
        if request.perplexity or request.kl:
            found["sequence_length"] = request.sequence_length
        if request.tasks:
            found |= {"tasks": list(request.tasks), "template": request.template}
        return found

    def _document(self, measured: _Measured, questions: QuestionSet | None, began: float) -> dict[str, Any]:
        self._remark(measured)
        data = {**(questions.record if questions else {}), **measured.data}
        if questions is None:
            first = next(iter(measured.data.values()), {"name": ", ".join(self.request.tasks)})
            data = {**{k: first[k] for k in ("name", "sha256") if k in first}, **data}
        document = {
            "schema": SCHEMA, "command": "eval", "status": "ok", "model": measured.described.plain(),
            "settings": self._plain_settings(), "data": data, "metrics": measured.metrics,
            "groups": {"domain": measured.groups} if measured.groups else {}, "baseline": None, "gates": [],
            "warnings": self.warnings, "notes": self.notes, "timing": measured.timing,
        }  # fmt: skip
        if measured.outcomes is not None and questions is not None:
            document["per_question"] = per_question(measured.outcomes, questions)
        return document

    def _remark(self, measured: _Measured) -> None:
        """Say what the numbers cannot: limits, loops, noise."""
        found = measured.metrics
        if self.limited:
            self.warnings.append(f"limited run: --limit {self.request.limit} left data out")
        if (found.get("cap_rate", {}).get("value") or 0.0) > MANY_CAPPED:
            self.warnings.append(
                f"{found['cap_rate']['value']:.1%} of the replies hit the length limit: loops, or {self.cap} is too low"
            )
        accuracy = found.get("accuracy")
        if accuracy and accuracy["value"] is not None and accuracy["n"] < FEW_QUESTIONS:
            points = noise_points(accuracy["value"], accuracy["n"])
            self.warnings.append(
                f"{accuracy['n']} questions: differences in accuracy below ±{points:.0f} points are noise unless paired"
            )

    def _decide(
        self, parsed: list[Gate], document: dict[str, Any], referred: dict[str, float]
    ) -> list[dict[str, Any]]:
        baseline = document["baseline"] or {}
        decided = []
        for gate in parsed:
            before = _value(baseline.get("metrics") or {}, baseline.get("groups") or {}, gate.metric)
            names = {"baseline": _number(before), "ref": _number(referred.get(gate.metric, before))}
            decided.append(gate.decide(_value(document["metrics"], document["groups"], gate.metric), names))
        return decided

    # ---- telling -------------------------------------------------------------------------------

    def _tell(self, role: str, what: str, done: int, total: int) -> None:
        if self.progress is not None:
            self.progress(f"{role} {what}".strip(), done, total)

    def _step(self, role: str, what: str) -> Callable[[int, int], None]:
        return lambda done, total: self._tell(role, what, done, total)

    @contextlib.contextmanager
    def _timed(self, measured: _Measured, name: str) -> Iterator[None]:
        began = time.monotonic()
        try:
            yield
        except Interrupted as error:
            if self.request.questions and self.request.reply_file() is None:
                error.help = (
                    "-o RESULT.json or --samples-out FILE.jsonl keeps replies, so that a run can continue"
                )
            raise
        finally:
            measured.timing[name] = round(time.monotonic() - began, 3)


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _value(found: dict[str, Any], groups: dict[str, Any], metric: str) -> float | None:
    """Return a metric's value, or a domain's (DOMAIN_METRIC)."""
    if metric in found:
        return found[metric]["value"]
    for domain, own in (groups.get("domain") or {}).items():
        if metric.startswith(f"{domain}_") and metric[len(domain) + 1 :] in own:
            return own[metric[len(domain) + 1 :]]["value"]
    return None


@contextlib.contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """Let torch use so many threads meanwhile; default: the physical cores."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count or physical_cores())
    try:
        yield
    finally:
        torch.set_num_threads(before)
