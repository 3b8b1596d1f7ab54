"""Where everything lies. Each path of the pipeline is written down here only."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]  # of this project; all paths below are relative to it
# The project that this one is a copy of, while DVC runs a queued experiment in .dvc/tmp/exps/<folder>; else itself.
HOME = ROOT.parents[3] if ROOT.parts[-4:-1] == (".dvc", "tmp", "exps") else ROOT

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
ROLLOUTS = Path("data/rollouts")  # <round>.jsonl
SCORED = Path("data/regime_w_rollouts")  # <round>.jsonl
PAIRS = Path("data/coherence_preferences")  # <round>.jsonl
PLATINUM_EVAL = Path("data/platinum_eval")  # <policy>.jsonl: the answers of each policy
VOTES = Path("data/votes")  # <policy>.jsonl: what the samples of each question elected
TESTS_EVAL = Path("data/tests_eval")  # <policy>.jsonl: the same for the other test sets

# Checkpoints
SHIPPED = ROOT / "stages/tiny/base"  # the base model that lies in this repository
BASE = Path("checkpoints/base")
SFT_ADAPTER = Path("checkpoints/sft_lora")
DPO_ADAPTERS = Path("checkpoints/dpo_coherence_lora")  # <round>/

# Metrics
METRICS = Path("metrics")
DATA_METRICS = METRICS / "data.json"
REGIME_W_METRICS = METRICS / "regime_w"  # <round>.json
PREFERENCE_METRICS = METRICS / "preference"  # <round>.json
PLATINUM_METRICS = METRICS / "platinum"  # <policy>.json: the few figures that `dvc metrics show` prints
PLATINUM_DETAILS = METRICS / "platinum_details"  # <policy>.json: all figures
VOTE_METRICS = METRICS / "vote"  # <policy>.json: the few figures that `dvc metrics show` prints
VOTE_DETAILS = METRICS / "vote_details"  # <policy>.json: all figures
HEADLINE = METRICS / "headline.json"
HEADLINE_PLOT = METRICS / "headline.csv"
COMPARISON = METRICS / "comparison.json"
CURVES = METRICS / "curves"  # <round>.csv, <round>_selection.csv
SFT_CURVE = CURVES / "sft.csv"
SFT_SELECTION = CURVES / "sft_selection.csv"
KEPT = METRICS / "kept"  # <policy>.json: which step of its training is kept, and by which test
REGIME_W_PLOTS = METRICS / "plots/regime_w"  # <round>/
POLICY_PLOT = METRICS / "plots/policies.csv"
PAGE = Path("report.html")

# Rounds of rollouts, pairs and DPO (`rounds` in params.yaml). The last one is always called so.
LAST_ROUND = "dpo"


@dataclass(frozen=True)
class RoundPaths:
    """What the stages of one round write."""

    round: str

    @property
    def rollouts(self) -> Path:
        """Trajectories, as drawn."""
        return ROLLOUTS / f"{self.round}.jsonl"

    @property
    def scored(self) -> Path:
        """Trajectories with their signals and rewards."""
        return SCORED / f"{self.round}.jsonl"

    @property
    def pairs(self) -> Path:
        """Preference pairs."""
        return PAIRS / f"{self.round}.jsonl"

    @property
    def adapter(self) -> Path:
        """The adapter that DPO trained: a policy of the round's name."""
        return DPO_ADAPTERS / self.round

    @property
    def regime_w(self) -> Path:
        """Figures of the scored trajectories."""
        return REGIME_W_METRICS / f"{self.round}.json"

    @property
    def plots(self) -> Path:
        """The folder of their plot data."""
        return REGIME_W_PLOTS / self.round

    @property
    def preference(self) -> Path:
        """How many pairs were made, and why not more."""
        return PREFERENCE_METRICS / f"{self.round}.json"

    @property
    def curve(self) -> Path:
        """The trainer's log."""
        return CURVES / f"{self.round}.csv"

    @property
    def selection(self) -> Path:
        """What each step answered on validation."""
        return CURVES / f"{self.round}_selection.csv"

    @property
    def kept(self) -> Path:
        """Which step is kept, and by which test."""
        return KEPT / f"{self.round}.json"


LAST = RoundPaths(LAST_ROUND)
