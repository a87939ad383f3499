"""Data -> one HTML file: the template, style and scripts of `assets`, and the data as JSON. Imports no torch.

Nothing of a run becomes markup: the scripts put the data in by `textContent`, and the policy of the page lets no other
script run and nothing be fetched.
"""

import base64
import hashlib
import html
import json
import re
from importlib.resources import files
from typing import Any

__all__ = ["plain", "render"]

SCRIPTS = ("d3.min.js", "plot.min.js", "elements.js", "charts.js", "gates.js", "overview.js", "run.js", "main.js")
DIGITS = 6  # significant, of the numbers in a page


def render(data: dict[str, Any]) -> str:
    """The page about `build.page_data`, complete in itself."""
    assets = files(__package__) / "assets"
    texts = {name: (assets / name).read_text(encoding="utf-8") for name in ("page.html", "page.css", *SCRIPTS)}
    scripts = [texts[name].strip() for name in SCRIPTS]
    hashes = " ".join(f"'sha256-{_digest(script)}'" for script in scripts)
    # Charts set their own styles. Pictures are inside the page.
    policy = (
        f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
    parts = {
        "@TITLE@": html.escape(data["title"]),
        "@POLICY@": policy,
        "@STYLE@": texts["page.css"],
        "@DATA@": _json(data),
        "@SCRIPTS@": "\n".join(f"<script>{script}</script>" for script in scripts),
    }
    # In one pass: what is put in is not searched.
    page = re.sub("@[A-Z]+@", lambda found: parts[found[0]], texts["page.html"])
    return page.encode("utf-8", errors="replace").decode()  # names of files need not be text


def _json(data: Any) -> str:
    """JSON that can stand inside a script element: no `<` in it ends the element or opens a comment."""
    text = json.dumps(plain(data), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c")


def plain(value: Any) -> Any:
    """A value as JSON can hold it: numbers of few digits, None for NaN and Inf."""
    if isinstance(value, dict):
        return {str(key): plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(one) for one in value]
    if isinstance(value, float):
        if value != value or abs(value) == float("inf"):
            return None
        if 10**DIGITS <= abs(value) < 2**53:
            return round(value)
        return int(value) if value.is_integer() and abs(value) < 2**53 else float(f"{value:.{DIGITS}g}")
    return value if isinstance(value, (str, int, bool, type(None))) else str(value)


def _digest(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
