"""What a tool prints, on a screen of some width."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from typing import Any

import pytest


def printed(main: Callable[..., None], *args: Any, width: int = 80, **options: Any) -> str:
    """The output of a tool's `main`; no line is longer than the screen is wide."""
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as stream:
        patch.setenv("COLUMNS", str(width))
        main(*args, **options)
    text = stream.getvalue()
    assert max(map(len, text.splitlines())) <= width
    return text


def words(text: str) -> str:
    """The text with single spaces only, so that line ends and columns do not matter."""
    return " ".join(text.split())
