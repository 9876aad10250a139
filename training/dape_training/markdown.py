"""Tables in Markdown, and putting them into a page between the marks of a section."""

from __future__ import annotations

import re
from collections.abc import Sequence


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table with the first column to the left and the others to the right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def fill(page: str, section: str, content: str) -> str:
    """Return a page with new content between `<!-- section:begin -->` and `<!-- section:end -->`.

    Raises:
        ValueError: the page has no such section.
    """
    begin, end = f"<!-- {section}:begin -->", f"<!-- {section}:end -->"
    filled, count = re.subn(f"{begin}.*?{end}", lambda _: f"{begin}\n{content}\n{end}", page, flags=re.DOTALL)
    if count != 1:
        raise ValueError(f"expected one section {section!r} in the page, found {count}")
    return filled
