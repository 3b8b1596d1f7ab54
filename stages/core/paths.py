"""Where the pipeline's checkpoints lie."""

from __future__ import annotations

from pathlib import Path

BASE = Path("checkpoints/base")
SFT_ADAPTER = Path("checkpoints/sft_lora")
DPO_ADAPTER = Path("checkpoints/dpo_coherence_lora")
ADAPTERS = {"base": None, "sft": SFT_ADAPTER, "dpo": DPO_ADAPTER}  # by policy
