# SPDX-License-Identifier: Apache-2.0
"""MkDocs hooks: pages link to files as they lie in the repository, and the site gets copies of those it shows."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
COPIES = {
    "csrc/README.md": "decode-kernel.md",
    **{f"benchmarks/results/{path.name}": f"results/{path.name}" for path in (ROOT / "benchmarks/results").iterdir()},
}
"""Path in the repository -> in the site."""
_TARGET = re.compile(r"(?<=\]\()([^)#\s]+)")


def on_files(files: Files, config: Any) -> Files:
    for source, target in COPIES.items():
        files.append(File.generated(config, target, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """The links of a page to what is copied, as they are in the site."""
    folder = (ROOT / page.file.abs_src_path).parent

    def in_site(match: re.Match[str]) -> str:
        target = os.path.relpath(os.path.normpath(folder / match[1]), ROOT)
        return COPIES.get(target, match[1])

    return _TARGET.sub(in_site, markdown)
