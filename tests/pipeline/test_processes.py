"""Several processes on one host give what one gives: the same trajectories, adapters equal to rounding."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from safetensors.torch import load_file

from stages.core.records import read_json
from tests_pipeline import Project  # type: ignore[import-not-found]

pytestmark = pytest.mark.pipeline
