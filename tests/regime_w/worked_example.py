"""The worked example of docs/regime-w.md."""

from __future__ import annotations

QUESTION = "Ann has 3 bags of 4 apples and eats 2. How many apples are left?"
TEXTS = [
    "<<3*4=12>>12 <<12-2=10>>10\n#### 10",
    "<<4*3=12>>12 <<12-2=10>>10\n#### 10",
    "<<4+4+4=12>>12 <<12-2=10>>10\n#### 10",
    "<<3+4=7>>7 <<7-2=5>>5\n#### 5",
]
