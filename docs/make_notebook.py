"""Write the notebooks from their pages, such as docs/fastai.ipynb: `python docs/make_notebook.py`. A test compares."""

import json
import re
from pathlib import Path

DOCS = Path(__file__).parent
PAGES = ("compress", "fastai")


def cell(kind: str, number: int, text: str) -> dict:
    lines = text.strip("\n").splitlines(keepends=True)
    extra = {"execution_count": None, "outputs": []} if kind == "code" else {}
    return {"cell_type": kind, "id": f"cell-{number}", "metadata": {}, "source": lines, **extra}


def notebook(page: str) -> str:
    """A notebook's JSON: a page's Python blocks are its code cells, the text between them the others."""
    page = re.sub(r" \[(\w+\.ipynb)\]\(\1\) is this page as a notebook\.", "", page)
    parts = re.split(r"```python\n(.*?)```\n", page, flags=re.S)
    cells = [cell("code" if i % 2 else "markdown", i, part) for i, part in enumerate(parts) if part.strip()]
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    content = {"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    for name in PAGES:
        (DOCS / f"{name}.ipynb").write_text(notebook((DOCS / f"{name}.md").read_text()))
