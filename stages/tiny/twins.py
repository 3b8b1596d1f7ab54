"""The twins of generated problems: exact ones, because the generator knows how each problem was made.

`stages/regime_w/changed.py` makes the twins of all other questions, from their worked solutions.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

from stages.regime_w.changed import Change, ChangeCounts
from stages.tiny.problems import Split, problems

_NUMBER = re.compile(r"\d+")


def generated_twins(
    ids: Sequence[str], split: Split, split_seed: int, change: Change, seed: int, counts: ChangeCounts
) -> Iterator[dict[str, Any]]:
    """The twins of the generated problems with these ids, as `changed_rows` makes them of other questions.

    An id ends in the problem's place in its split, as in `platinum-00003`; `split_seed` is the seed of the split.
    """
    places = {int(identity.rpartition("-")[2]): identity for identity in ids}
    for place, problem in enumerate(islice(problems(split, split_seed), max(places, default=-1) + 1)):
        if place not in places:
            continue
        identity = places[place]
        counts.questions += 1
        made: dict[int, dict[str, Any]] = {}  # by the place of the changed number, one twin each
        for twin in problem.twins(random.Random(f"{seed}/{identity}")):
            numbers = zip(_NUMBER.finditer(problem.question), _NUMBER.findall(twin.question), strict=True)
            at, old, new = next((n, a, b) for n, (a, b) in enumerate(numbers) if a[0] != b)
            made.setdefault(
                at,
                {
                    "id": f"{identity}~{at + 1}",
                    "of": identity,
                    "question": twin.question,
                    "gold": str(twin.result),
                    "change": {"start": old.start(), "from": old[0], "to": new},
                },
            )
            if change == "one":
                break
        yield from made.values()
        counts.twins += len(made)
        if made:
            counts.with_twin += 1
        else:
            counts.refused["no_value" if problem.candidates() else "twice"] += 1
