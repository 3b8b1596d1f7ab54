"""Renders report.html from its facts."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

TEMPLATES = Path(__file__).resolve().parent


def render(facts: Mapping[str, Any]) -> str:
    """The page as text, from `page_facts`."""

    def as_json(value: Any) -> Markup:
        # \/ is the same JSON as a slash, and can neither end the script element nor look like an address.
        text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
        return Markup(text.replace("/", "\\/").replace("<", "\\u003c"))

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "as_json": as_json,
        "svg": Markup,
        "breakable": lambda v: escape(v).replace("_", Markup("_<wbr>")),  # long names break at underscores
        "percent": lambda v: "–" if v is None else f"{100 * v:.1f} %",
        "points": lambda v: f"{100 * v:+.1f}",
        "p": lambda v: f"{v:.2g}" if v >= 0.0001 else "< 0.0001",
        "keep": lambda v: re.sub(r"(?<=\bp) ([=<]) ", "\u00a0\\1\u00a0", v),  # a p-value stays on one line
    }
    return environment.get_template("report.html.j2").render(facts) + "\n"
