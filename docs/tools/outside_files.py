"""A hook of mkdocs: files of the repository that pages link to, such as results and examples, come along.

On a code host a link `../benchmarks/results/kernels.json` leads out of docs/. On the site there is nothing
above the pages, so the file is copied to `benchmarks/results/kernels.json`, and the link leads there.
"""

from __future__ import annotations

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

OUTSIDE = re.compile(r"\]\(\.\./(?P<path>[^)#]+)\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add what the pages link to; a missing file is left out, so that its link is reported."""
    root = Path(config.docs_dir).parent
    for page in files.documentation_pages():
        for link in OUTSIDE.finditer(page.content_string):
            path = link["path"]
            if files.get_file_from_path(path) is None and (root / path).is_file():
                files.append(File.generated(config, path, abs_src_path=str(root / path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:  # noqa: ARG001
    """Let links lead to the copies."""
    return OUTSIDE.sub(lambda link: f"]({link['path']})", markdown)
