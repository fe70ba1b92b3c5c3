"""Write the texts of all errors to messages.snapshot: `python tests/errors/update_snapshot.py`."""

from __future__ import annotations

from pathlib import Path

import error_sites

HERE = Path(__file__).resolve().parent
SNAPSHOT = HERE / "messages.snapshot"


def text() -> str:
    """Return the snapshot: one block for each site, sorted, without file and line, which may move."""
    return "\n\n".join(site.block for site in error_sites.sites()) + "\n"


def main() -> None:
    new = text()
    changed = not SNAPSHOT.exists() or SNAPSHOT.read_text("utf-8") != new
    SNAPSHOT.write_text(new, "utf-8")
    print(
        f"{SNAPSHOT.name}: {len(error_sites.sites())} sites, {'changed: read the diff' if changed else 'unchanged'}"
    )


if __name__ == "__main__":
    main()
