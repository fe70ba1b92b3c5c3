"""Text from results, made safe to show: names come from other people's files."""

from __future__ import annotations

import html
import re


def visible(text: object) -> str:
    """Return text on one line with control characters, lone surrogates and direction marks spelled out.

    XML forbids most of them, a lone surrogate cannot be encoded, and a right-to-left override would let a
    name show as another one.
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def escaped(text: object) -> str:
    """Return text for HTML and XML, inside elements and attributes alike."""
    return html.escape(visible(text), quote=True)


_MARKDOWN = re.compile(
    r"[\\`*_\[\]<>&|~@#$]|(?<=:)/(?=/)|(?<=www)\.|^[-+](?= )|(?<=^\d)[.)](?= |$)", re.IGNORECASE
)


def in_markdown(text: object) -> str:
    """Return text for Markdown, tables included: no markup, no mention, no reference, no link comes of it."""
    return _MARKDOWN.sub(lambda found: f"&#{ord(found[0])};", visible(text))
