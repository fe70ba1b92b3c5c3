"""Several merges in one mergekit file: documents that use each other's results by name."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from surgeon.cli.output import Output
from surgeon.merge.request import MergeRequest
from surgeon.merge.spec import MergeSpec, ModelRef, TokenizerSpec


def run_documents(
    out: Output, specs: list[MergeSpec], request: MergeRequest, settings: Any
) -> dict[str, Any]:
    """Run the documents in dependency order.

    The unnamed document's result goes to the output; named ones lie in ``OUTPUT.work/NAME``,
    or in ``OUTPUT/NAME`` when every document has a name. A finished one is verified and not
    made again.
    """
    from surgeon import api
    from surgeon.cli.merge import finish
    from surgeon.recipe.mergekit_yaml import in_order

    final = Path(settings.output or "merged")
    has_final = any(spec.name is None for spec in specs)
    place = final.with_name(f"{final.name}.work") if has_final else final
    results = {spec.name: place / spec.name for spec in specs if spec.name}
    documents: list[dict[str, Any]] = []
    for spec in in_order(specs):
        target = final if spec.name is None else results[spec.name]
        out.note(f"document {spec.name or '(final)'} -> {target}")
        waiting = [
            str(ref) for ref in spec.models() if ref.path in results and not results[ref.path].exists()
        ]
        if settings.dry_run and waiting:
            out.note(
                f"it uses {', '.join(waiting)}, which a dry run does not make: it cannot be planned further"
            )
            documents.append({"name": spec.name, "status": "dry-run", "waits_for": waiting})
            continue
        written = target
        if not settings.dry_run:
            target.parent.mkdir(parents=True, exist_ok=True)
        elif not target.parent.exists():
            # A dry run makes no folders: space and rights are those of the nearest place that exists.
            written = place.with_name(f"{place.name}.{spec.name}")
        planned = api.plan_spec(_resolved(spec, results), request, title=spec.name or final.name)
        document = finish(out, planned, replace(settings, output=str(written)), request.strict)
        if settings.dry_run:
            document["output"] = {"path": str(target)}
        documents.append({"name": spec.name, **document})
    return {**documents[-1], "documents": documents}


def _resolved(spec: MergeSpec, results: dict[str, Path]) -> MergeSpec:
    """Replace names of other documents by the folders of their results."""

    def ref(model: ModelRef | None) -> Any:
        if model is None or model.path not in results:
            return model
        return replace(model, path=str(results[model.path]))

    tokenizer = spec.tokenizer
    if isinstance(tokenizer, TokenizerSpec):
        source = tokenizer.source if isinstance(tokenizer.source, str) else ref(tokenizer.source)
        tokens = {t: replace(s, model=ref(s.model)) for t, s in tokenizer.tokens.items()}
        tokenizer = replace(tokenizer, source=source, tokens=tokens)
    modules = tuple(
        replace(
            module,
            slices=tuple(
                replace(
                    piece,
                    base_model=ref(piece.base_model),
                    sources=tuple(replace(s, model=ref(s.model)) for s in piece.sources),
                )
                for piece in module.slices
            ),
        )
        for module in spec.modules
    )
    return replace(spec, modules=modules, base_model=ref(spec.base_model), tokenizer=tokenizer,
                   text_from=ref(spec.text_from))  # fmt: skip
