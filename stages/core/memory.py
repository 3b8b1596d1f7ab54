"""How much memory a stage needs, estimated from the model's shape, and the batch that fits."""

from __future__ import annotations

from typing import Any

from stages.core.params import Dpo, Hardware, Sft

CPU_ROWS = 512  # rows a CPU generates at once


def generation_batch(model: Any, hardware: Hardware) -> int:
    """Rows generated at once."""
    return CPU_ROWS if hardware.generation_batch == "auto" else hardware.generation_batch


def training_rows(model: Any, spec: Sft | Dpo, hardware: Hardware) -> int:
    """Rows a process may take at once in training."""
    return spec.batch if hardware.per_device_batch == "auto" else hardware.per_device_batch
