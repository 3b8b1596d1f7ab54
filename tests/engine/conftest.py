"""A small policy for all tests of engines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.policy import make_policy


@pytest.fixture(scope="session")
def policy_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with `base` and `adapter`, as the stages save them."""
    return tmp_path_factory.mktemp("policy")


@pytest.fixture(scope="session")
def model(policy_folder: Path) -> Any:
    """The small random policy, its adapter unmerged."""
    return make_policy(policy_folder)
