"""Several merges in one mergekit file: documents that use each other's results by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from surgeon.errors import UsageError, Where
from surgeon.merge.spec import MergeSpec, ModelRef, TokenizerSpec
from surgeon.python.progress import Say


def read(file: str, strict: bool = False) -> tuple[list[MergeSpec], list[str]]:
    """Return the merges of a mergekit file, and remarks about keys without effect.

    Raises:
        UsageError: what is wrong with the file; E220 remarks, where they are errors.
    """
    from surgeon.recipe import mergekit_yaml, yaml

    specs, remarks = mergekit_yaml.parse(yaml.read_text(Path(file)), file)
    if remarks and strict:
        raise UsageError("E220", f"strict: {remarks[0].message}", where=remarks[0].where or Where(file),
                         help="change what the warning names, or leave out strict")  # fmt: skip
    return specs, [str(remark) for remark in remarks]


def run_documents(
    specs: Sequence[MergeSpec],
    final: Path,
    run: Callable[[MergeSpec, Path], Mapping[str, Any]],
    *,
    dry_run: bool = False,
    say: Say | None = None,
) -> dict[str, Any]:
    """Run the documents in dependency order.

    The unnamed document's result goes to ``final``; named ones lie in ``FINAL.work/NAME``, or in
    ``FINAL/NAME`` when every document has a name. A finished one is verified and not made again.

    Args:
        run: makes one merge at a place and returns its document.
    """
    from surgeon.recipe.mergekit_yaml import in_order

    tell = say or (lambda _: None)
    has_final = any(spec.name is None for spec in specs)
    place = final.with_name(f"{final.name}.work") if has_final else final
    results = {spec.name: place / spec.name for spec in specs if spec.name}
    documents: list[dict[str, Any]] = []
    for spec in in_order(specs):
        target = final if spec.name is None else results[spec.name]
        tell(f"document {spec.name or '(final)'} -> {target}")
        waiting = [
            str(ref) for ref in spec.models() if ref.path in results and not results[ref.path].exists()
        ]
        if dry_run and waiting:
            tell(f"it uses {', '.join(waiting)}, which a dry run does not make: it cannot be planned further")
            documents.append({"name": spec.name, "status": "dry-run", "waits_for": waiting})
            continue
        written = target
        if not dry_run:
            target.parent.mkdir(parents=True, exist_ok=True)
        elif not target.parent.exists():
            # A dry run makes no folders: space and rights are those of the nearest place that exists.
            written = place.with_name(f"{place.name}.{spec.name}")
        document = dict(run(_resolved(spec, results), written))
        if dry_run:
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
