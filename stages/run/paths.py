"""Where everything lies, and what the policies are called. Each path of the pipeline is written down here only."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]  # of this project; all paths below are relative to it

# The pipeline
PIPELINE = Path("dvc.yaml")
LOCK = Path("dvc.lock")
PARAMS = Path("params.yaml")
PROFILES = Path("profiles")
WORK = Path(".work")  # progress of unfinished stages, and facts about finished ones; git and DVC ignore it

# Data
PROBLEMS = Path("data/gsm8k")
TRAIN = PROBLEMS / "train.jsonl"
VALID = PROBLEMS / "valid.jsonl"
PLATINUM = PROBLEMS / "platinum.jsonl"
CHANGED = PROBLEMS / "changed.jsonl"  # twins of Platinum's questions
TESTS = PROBLEMS / "tests.jsonl"  # the other test sets (`data.tests`), all in one
ROLLOUTS = Path("data/rollouts.jsonl")
SCORED = Path("data/regime_w_rollouts.jsonl")
PAIRS = Path("data/coherence_preferences.jsonl")
PLATINUM_EVAL = Path("data/platinum_eval")  # <policy>.jsonl: the answers of each policy
VOTES = Path("data/votes")  # <policy>.jsonl: what the samples of each question elected
TESTS_EVAL = Path("data/tests_eval")  # <policy>.jsonl: the same for the other test sets

# Checkpoints
SHIPPED = ROOT / "stages/tiny/base"  # the base model that lies in this repository
BASE = Path("checkpoints/base")
SFT_ADAPTER = Path("checkpoints/sft_lora")
DPO_ADAPTER = Path("checkpoints/dpo_coherence_lora")

# Metrics
METRICS = Path("metrics")
DATA_METRICS = METRICS / "data.json"
REGIME_W_METRICS = METRICS / "regime_w.json"
PREFERENCE_METRICS = METRICS / "preference.json"
PLATINUM_METRICS = METRICS / "platinum"  # <policy>.json: the few figures that `dvc metrics show` prints
PLATINUM_DETAILS = METRICS / "platinum_details"  # <policy>.json: all figures
VOTE_METRICS = METRICS / "vote"  # <policy>.json: the few figures that `dvc metrics show` prints
VOTE_DETAILS = METRICS / "vote_details"  # <policy>.json: all figures
HEADLINE = METRICS / "headline.json"
HEADLINE_PLOT = METRICS / "headline.csv"
COMPARISON = METRICS / "comparison.json"
CURVES = METRICS / "curves"
SFT_CURVE = CURVES / "sft.csv"
SFT_SELECTION = CURVES / "sft_selection.csv"
DPO_CURVE = CURVES / "dpo.csv"
DPO_SELECTION = CURVES / "dpo_selection.csv"
KEPT = METRICS / "kept"  # <policy>.json: which step of its training is kept, and by which test
REGIME_W_PLOTS = METRICS / "plots/regime_w"
POLICY_PLOT = METRICS / "plots/policies.csv"
PAGE = Path("report.html")

# The policies, in the order of the pipeline: name, how it is shown, the adapter on top of the base model
POLICIES = {"base": "base", "sft": "SFT", "dpo": "DPO"}
ADAPTERS: dict[str, Path | None] = {"base": None, "sft": SFT_ADAPTER, "dpo": DPO_ADAPTER}
