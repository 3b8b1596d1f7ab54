"""Hands the curves of a training to trackers that the user names: `LOOPER_TRACKERS=tensorboard`. By default to none.

It is an environment variable, not a parameter: to watch changes no result and reruns nothing. What a tracker writes
lies in `.work/trackers/`, also that of a queued experiment, whose own folder DVC deletes at its end.
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from stages.run.errors import UserError
from stages.run.paths import HOME, WORK

VARIABLE = "LOOPER_TRACKERS"
PACKAGES = {  # tracker: packages, one of which it needs
    "tensorboard": ("tensorboard", "tensorboardX"),
    "trackio": ("trackio",),
    "dvclive": ("dvclive",),
    "wandb": ("wandb",),
}


def named_trackers() -> list[str]:
    """The trackers that LOOPER_TRACKERS names. Raises UserError for one that is unknown or not installed."""
    named = os.environ.get(VARIABLE, "").replace(",", " ").split()
    for name in named:
        if name not in PACKAGES:
            raise UserError(f"{VARIABLE}: '{name}' is unknown; name some of {', '.join(PACKAGES)}")
        if not any(map(find_spec, PACKAGES[name])):
            raise UserError(f"{VARIABLE}: {name} is not installed; `pip install {PACKAGES[name][0]}`")
    return named


def tracker_callbacks(work: Path) -> list[Any]:
    """transformers' callback for each tracker that is named; of several processes the first one has them.

    `work` is the stage's scratch folder, `.work/<stage>/<fingerprint>`. A training that goes on after a kill has the
    same one, and so the same name.
    """
    from transformers.integrations import get_reporting_integration_callbacks

    if os.environ.get("RANK", "0") != "0":
        return []
    run = f"{work.parent.name}-{work.name[:8]}"
    places = {
        "TENSORBOARD_LOGGING_DIR": _folder("tensorboard") / run,
        "TRACKIO_DIR": _folder("trackio"),
        "WANDB_DIR": _folder("wandb"),
        "WANDB_NAME": run,
        "WANDB_PROJECT": HOME.name,
        "WANDB_ERROR_REPORTING": "false",
    }
    callbacks = []
    for name in named_trackers():
        _folder(name).mkdir(parents=True, exist_ok=True)  # wandb takes a temporary folder if there is none
        for variable, value in places.items():
            if variable.startswith(name.upper()):
                os.environ.setdefault(variable, str(value))
        (kind,) = get_reporting_integration_callbacks([name])
        if name == "dvclive":  # by default it writes into the working tree, and makes an experiment
            from dvclive import Live

            folder = _folder(name) / run
            live = Live(str(folder), resume=folder.exists(), dvcyaml=None, save_dvc_exp=False)
            callbacks.append(kind(live=live))
        else:
            callbacks.append(kind())
    return callbacks


def _folder(name: str) -> Path:
    return HOME / WORK / "trackers" / name
