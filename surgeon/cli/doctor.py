"""``surgeon doctor``."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from surgeon.cli import options as o
from surgeon.cli.errors import run_command
from surgeon.cli.output import Output, size


def doctor(
    model: Annotated[
        str | None, typer.Option("--model", help="Say what can be done with this model here.")
    ] = None,
    offline: o.Offline = False,
    json_: o.Json = False,
    quiet: o.Quiet = False,
    verbose: o.Verbose = False,
) -> None:
    """Report on this machine, and on what can be done with a model here."""
    out = Output(json_, quiet, verbose)

    def work() -> dict[str, Any]:
        from surgeon.python import diagnosis

        document = diagnosis.doctor()
        _show(out, document)
        if model is not None:
            from surgeon import api

            summary = api.inspect(model, offline=offline).summary
            document["model"] = diagnosis.possibilities(summary, document["environment"])
            out.line()
            _show_model(out, document["model"])
        return document

    raise typer.Exit(run_command(out, "doctor", work))


def _show(out: Output, document: dict[str, Any]) -> None:
    e = document["environment"]
    out.line(f"surgeon   {e['surgeon']}   python {e['python']}   {e['system']}")
    out.line(f"cores     {e['cores']} ({e['logical_cores']} logical)")
    container = f"   container limit {size(e['cgroup_limit_bytes'])}" if e["cgroup_limit_bytes"] else ""
    total = (
        f"{size(e['memory_bytes'])}, {size(e['memory_free_bytes'] or 0)} free   " if e["memory_bytes"] else ""
    )
    out.line(f"memory    {total}used by default up to {size(e['memory_limit_bytes'])}{container}")
    out.line(f"disk      {size(e['disk_free_bytes'])} free in {e['folder']}")
    state = "" if e["hub_cache_exists"] else " (does not exist yet)"
    out.line(
        f"hub       {e['hub_cache']}{state}   {'offline (HF_HUB_OFFLINE)' if e['offline'] else 'online'}"
    )
    numba = document["numba"]
    if not numba["usable"]:
        text = f"not usable ({numba['reason']}): merges run in NumPy, slower"
    elif numba["cache"] is None:
        text = "usable, but its cache cannot be written: every run compiles again; set NUMBA_CACHE_DIR"
    else:
        text = f"usable, cache {numba['cache']}"
    out.line(f"numba     {text}")
    out.line()
    rows = [
        [p["name"], p["found"] or "missing", p["needed"], "ok" if p["ok"] else "too old" if p["found"] else "missing",
         p["purpose"] + ("" if p["ok"] else f"; pip install '{p['install']}'")]
        for p in document["packages"]
    ]  # fmt: skip
    out.table(["package", "found", "needed", "state", "for"], rows)
    for p in document["packages"]:
        if not p["ok"] and not p["optional"]:
            out.warning(f"{p['name']} {p['found'] or 'is missing'}: {p['needed']} or newer is needed")


def _show_model(out: Output, found: dict[str, Any]) -> None:
    record = "known family" if found["known_family"] else "no record of this family"
    out.line(f"{found['label']}   {size(found['bytes'])}   {found['family'] or 'unknown family'} ({record})")
    for row in found["abilities"]:
        out.line(f"  {'yes' if row['possible'] else 'no':<4} {row['what']:<18} {row['detail']}")
    if found["missing_beside"]:
        out.line(f"       missing beside the weights: {', '.join(found['missing_beside'])}")
