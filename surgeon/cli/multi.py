"""Several merges in one mergekit file, printed as they are made."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from surgeon.cli.output import Output
from surgeon.merge.request import MergeRequest
from surgeon.merge.spec import MergeSpec
from surgeon.python import mergekit


def run_documents(
    out: Output, specs: list[MergeSpec], request: MergeRequest, settings: Any
) -> dict[str, Any]:
    """Run the documents in dependency order; see `surgeon.python.mergekit.run_documents`."""
    from surgeon import api
    from surgeon.cli.merge import finish

    final = Path(settings.output or "merged")

    def make(spec: MergeSpec, place: Path) -> dict[str, Any]:
        planned = api.plan_spec(spec, request, title=spec.name or final.name)
        return finish(out, planned, replace(settings, output=str(place)), request.strict)

    return mergekit.run_documents(specs, final, make, dry_run=settings.dry_run, say=out.note)
