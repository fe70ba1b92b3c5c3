"""Reports over results of eval, of runs and of single commands: one page, Markdown tables, or the plots alone.

    results = surgeon.report.load(["long.json", "merged.json"])
    surgeon.report.write(results, "report.html")

The package can be called: `surgeon.api.report`.

`surgeon.report.run_page.render` returns the page about one run as text.

Standard library only, PNG excepted (matplotlib, imported when asked for). Equal results give equal bytes.
"""

from __future__ import annotations

from surgeon.callable_package import make_callable
from surgeon.report.documents import SCHEMAS, load, validate
from surgeon.report.writing import FORMATS, check_place, format_of, render, write

__all__ = ["FORMATS", "SCHEMAS", "check_place", "format_of", "load", "render", "validate", "write"]

make_callable(__name__)
