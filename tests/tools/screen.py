"""What a tool prints, on a screen of some width."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from typing import Any

from stages.tools.show import new_console


def printed(
    main: Callable[..., None], *args: Any, width: int = 80, colour: bool = False, **options: Any
) -> str:
    """The output of a tool's `main`; no line is longer than the screen is wide."""
    stream = io.StringIO()
    system = "standard" if colour else None
    console = new_console(file=stream, width=width, force_terminal=colour, color_system=system)
    main(*args, console=console, **options)
    text = stream.getvalue()
    lines = re.sub(r"\x1b\[[0-9;]*m", "", text).splitlines()
    assert max(map(len, lines)) <= width
    return text


def words(text: str) -> str:
    """The text with single spaces only, so that line ends and columns do not matter."""
    return " ".join(text.split())
