"""A run that is killed again and again, in every phase, and goes on each time by the one command it was started with.

    pytest tests/training/test_faults.py --kills 60

The phase is the one that the run has noted in its lock, read after the kill: so it is where the process ended.
"""

from __future__ import annotations

import json
import random
import time
from collections import Counter
from pathlib import Path

import forked
import pytest
import yaml

from llama_pro_fast.resume import to_dict
from llama_pro_fast.runs.checkpoint import complete_checkpoints, verified
from llama_pro_fast.runs.marker import step_of
from llama_pro_fast.runs.metrics import read_metrics
from llama_pro_fast.runs.run_folder import is_complete, phase_of
from llama_pro_fast.training.run import run_training

PHASES = {
    "start": ("starting", "checking", "loading"),
    "tokenising": ("tokenising",),
    "expansion": ("expanding",),
    "steps": ("training",),
    "evaluation": ("evaluating",),
    "save": ("saving",),
    "marker": ("completing",),
    "export": ("exporting",),
    "report": ("reporting",),
}
"""The phases of the report in the last line, and what the run calls them."""

ORDER = [
    ("starting", 0.02),
    ("tokenising", 0.02),
    ("expanding", 0.1),
    ("training", 0.02),
    ("checking", 0.05),
    ("evaluating", 0.02),
    ("saving", 0.05),
    ("loading", 0.05),
    ("completing", 0.01),
    ("exporting", 0.05),
    ("reporting", 0.1),
]
"""Where one run is killed, one after the other, in the order in which it comes to them, resumed in between; each time
after a random wait of at most so many seconds, which is about as long as the phase takes."""


def figures(run: Path) -> list[tuple]:
    """What a run measured, without what a clock says."""
    keep = ("kind", "step", "source", "loss", "base_loss", "kl", "grad_norm", "lr", "source_tokens")
    return [tuple(str(row.get(k)) for k in keep) for row in read_metrics(run) if row["kind"] in ("train", "eval")]


def killed_in(noted: str, longest: float, words: list[str], run: Path, screen: Path, chance: random.Random) -> str:
    """Start the run and kill it when it has noted ``noted``; the phase it ended in, none if it came to its end."""
    (run / ".lock").unlink(missing_ok=True)  # what the process before has noted
    process = forked.start(forked.typed, words, screen=screen)
    while process.is_alive():
        if phase_of(run) == noted:
            time.sleep(chance.uniform(0, longest))
            process.kill()
            process.join()
            ended_in = phase_of(run)
            return next((name for name, names in PHASES.items() if ended_in in names), "")
        time.sleep(0.0003)
    process.join()
    assert process.exitcode == 0, screen.read_text()
    return ""


@pytest.mark.slow
def test_a_run_killed_in_every_phase_is_the_uninterrupted_one(config_at, base_of, tmp_path, request):
    wanted, chance = request.config.getoption("--kills"), random.Random(0)
    base = base_of(hidden_size=192, intermediate_size=384)  # so that a save takes a while
    settings = {
        "model": {"path": str(base)},
        "train": {"steps": 12, "checkpoint_every": 2, "log_every": 2},
        "eval": {"every": 4, "tokens": 256},
    }
    run_training(config_at(tmp_path / "whole", **settings))
    weights, expected = (tmp_path / "whole/export/model.safetensors").read_bytes(), figures(tmp_path / "whole")
    kills, survived, equal = Counter(), 0, 0

    def enough() -> bool:
        # Each phase too: with 60 kills at least five times.
        each = wanted // 12 or int(wanted >= len(PHASES))
        return kills.total() >= wanted and min(kills[name] for name in PHASES) >= each

    while not enough():
        trial = tmp_path / f"trial-{kills.total()}"
        trial.mkdir()
        run, screen = trial / "run", trial / "screen.txt"
        config = config_at(run, **settings, data={"cache": str(trial / "cache")})
        recipe = trial / "recipe.yaml"
        recipe.write_text(yaml.safe_dump({k: v for k, v in to_dict(config).items() if v is not None}))
        words = ["python", "-m", "llama_pro_fast.train", "--config", str(recipe), "--resume", "auto"]
        in_this, last = 0, 0
        for noted, longest in ORDER:
            if enough():
                break
            if found := killed_in(noted, longest, words, run, screen, chance):
                kills[found] += 1
                in_this += 1
            complete = complete_checkpoints(run)
            assert not complete or verified(complete[-1])
            newest = step_of(complete[-1]) if complete else 0
            assert newest >= last, "the newest checkpoint was lost"
            last = newest
        process = forked.start(forked.typed, words, screen=screen)
        process.join()
        assert process.exitcode == 0, screen.read_text()
        assert is_complete(run)
        survived += in_this
        assert figures(run) == expected
        assert (run / "export/model.safetensors").read_bytes() == weights
        equal += in_this
        assert json.loads((run / "report/summary.json").read_text())["steps"] == 12
        assert not [path for path in run.rglob("*") if path.suffix in (".partial", ".new", ".old")]
    request.config.stash[forked.KILLS] = (
        f"kills {kills.total()}: {', '.join(f'{name} {kills[name]}' for name in PHASES)}; survived {survived}, "
        f"bit-equal {equal}"
    )
