"""How long a stage took, and how long the stages after it will take.

`python -m stages repro` (what `make` runs) tells the stages in an environment variable which of them will run and how
long each took before. A stage that was started in another way knows nothing of the others, and says its own time only.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping

PLAN = "LOOPER_PLAN"
TRUSTED = 30.0  # seconds that are taken to have gone as planned, so that one short stage says little


def announce(seconds: Mapping[str, float]) -> dict[str, str]:
    """The environment that tells the stages what will run, in order, and how long each may take (seconds)."""
    return {PLAN: json.dumps({"started": time.time(), "seconds": dict(seconds)})}


def time_left(stage: str) -> str:
    """As "about 2 min left", at the pace of the stages up to this one; nothing when it is not known."""
    plan = json.loads(os.environ.get(PLAN, "{}"))
    expected: dict[str, float] = plan.get("seconds", {})
    names = list(expected)
    if stage not in names or stage == names[-1]:
        return ""
    place = names.index(stage) + 1
    done, rest = (sum(expected[name] for name in part) for part in (names[:place], names[place:]))
    pace = (TRUSTED + time.time() - plan["started"]) / (TRUSTED + done)
    return f"about {words(rest * pace)} left"


def words(seconds: float) -> str:
    """A duration to read: 14 s, 3 min, 1.5 h."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
