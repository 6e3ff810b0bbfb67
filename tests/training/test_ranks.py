"""Several processes make one run: the same numbers, what ends one of them ends all, and it goes on with any number."""

from __future__ import annotations

import math
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import ranked
import torch
import yaml
from ranked import Asked
from safetensors.torch import load_file
from stopping import stop_in_step

from llama_pro_fast.cli import main
from llama_pro_fast.config import RunConfig
from llama_pro_fast.errors import UserError
from llama_pro_fast.ranks import joined
from llama_pro_fast.recipe import parse
from llama_pro_fast.resume import load_config, to_dict
from llama_pro_fast.runs.checkpoint import complete_checkpoints, load, stored_tensors
from llama_pro_fast.runs.metrics import read_metrics
from llama_pro_fast.training.run import run_training
from llama_pro_fast.training.signals import Stopped

ROUNDING, OF_WEIGHTS = 2e-5, 1e-4
"""Relative, of losses and of weights at the end: other sums in another order."""
STEPS = 10


def rows(run: Path, kind: str) -> list[dict]:
    return [row for row in read_metrics(run) if row["kind"] == kind]


def figures(run: Path) -> list[tuple]:
    """Every training and evaluation row, in order, without what a clock says."""
    keep = ("kind", "step", "source", "loss", "kl", "base_loss", "grad_norm", "lr", "skipped", "source_tokens")
    return [tuple(str(row.get(key)) for key in keep) for row in read_metrics(run) if row["kind"] in ("train", "eval")]


def weights(run: Path) -> dict[str, torch.Tensor]:
    """Of the last checkpoint, whole."""
    folder = complete_checkpoints(run)[-1]
    stored = {name: each for name, each in stored_tensors(folder).items() if name.startswith("model.")}
    found = {name: torch.empty_like(each, device="cpu") for name, each in stored.items()}
    load(folder, found)
    return found


def assert_close(run: Path, other: Path, of_weights: float = OF_WEIGHTS) -> None:
    """Equal within rounding, in weights and curves."""
    ours, theirs = weights(run), weights(other)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        error = (tensor - theirs[name]).norm() / theirs[name].norm()
        assert error < of_weights, f"{name}: {error}"
    for kind in ("train", "eval"):
        pairs = list(zip(rows(run, kind), rows(other, kind), strict=True))
        assert pairs
        for a, b in pairs:
            assert a["loss"] == pytest.approx(b["loss"], rel=ROUNDING), (a, b)
            assert (a["step"], a.get("source"), a.get("source_tokens")) == (
                b["step"], b.get("source"), b.get("source_tokens"),
            )  # fmt: skip


@pytest.fixture(scope="module")
def taught(config_at, base_at, tmp_path_factory):
    """``taught(output)``: a run with replay and the base as teacher; ``family`` names that of another base."""
    folder = tmp_path_factory.mktemp("families")

    def make(output: Path, family: str = "llama", **changes) -> RunConfig:
        sections = {"train": {"kl_weight": 1.0, "micro_batch_size": 1, "steps": STEPS}, "data": {"replay": 0.25}}
        if family != "llama":
            if not (folder / family).exists():
                base_at(folder / family, family=family, **FAMILIES[family])
            sections["model"] = {"path": str(folder / family)}
        return config_at(
            output, **{name: sections.get(name, {}) | changes.get(name, {}) for name in sections | changes}
        )

    return make


FAMILIES = {
    "qwen3": {"head_dim": 12, "tie_word_embeddings": True},
    "mistral": {"sliding_window": 16},
    "qwen2": {},
}
RUNS = {
    "plain": {},
    "qwen3, sharded": {"family": "qwen3", "train": {"sharding": "trained"}},
    "mistral, sharded, recomputed": {"family": "mistral", "train": {"sharding": "trained", "recompute": "block"}},
    "qwen2": {"family": "qwen2"},
    "all": {
        "train": {"parameters": "all", "kl_weight": 0.0},
        "expand": {"groups": None},
        "data": {"replay": 0.0},
    },
    "muon": {"optim": {"name": "muon", "lr": 1e-2}},
    "sharded": {"train": {"sharding": "trained"}},
    "sharded, all": {
        "train": {"parameters": "all", "kl_weight": 0.0, "sharding": "trained"},
        "expand": {"groups": None},
        "data": {"replay": 0.0},
    },
}


@pytest.fixture(scope="module")
def made(taught, config_at, tmp_path_factory):
    """Runs of two ranks, made one after the other, and what came of each: (folder, outcomes)."""
    folder = tmp_path_factory.mktemp("ranks")
    asked = {name: Asked(taught(folder / name, **changes)) for name, changes in RUNS.items()}
    asked["again"] = Asked(taught(folder / "again"))
    asked["stopped"] = Asked(taught(folder / "stopped"), fault="asked to stop")
    sharded = {"train": {"sharding": "trained"}}
    asked["sharded, stopped"] = Asked(taught(folder / "sharded, stopped", **sharded), fault="asked to stop")
    asked["poisoned"] = Asked(config_at(folder / "poisoned"), fault="poisoned")
    asked["miscomputes"] = Asked(taught(folder / "miscomputes"), fault="miscomputes")
    asked["elsewhere"] = Asked(taught(folder / "elsewhere", **sharded), fault="elsewhere")
    asked["odd"] = Asked(taught(folder / "odd", train={"batch_size": 3}))
    asked["differ"] = Asked(
        taught(folder / "differ"), others={1: taught(folder / "differ", optim={"lr": 2e-2, "warmup_steps": 1})}
    )
    outcomes = ranked.make(list(asked.values()), count=2, folder=folder)
    for name, outcome in zip(asked, outcomes, strict=True):
        if name in (*RUNS, "again"):
            assert [each["error"] for each in outcome] == [None, None], name
    return folder, dict(zip(asked, outcomes, strict=True))


@pytest.mark.parametrize("name", RUNS)
def test_two_ranks_make_the_run_of_one(name, made, taught, tmp_path):
    folder, _ = made
    run_training(taught(tmp_path / "run", **RUNS[name]))
    # Muon makes more of rounding: a small matrix's small singular values count as much as its large ones.
    assert_close(folder / name, tmp_path / "run", OF_WEIGHTS if name != "muon" else 10 * OF_WEIGHTS)
    assert load_config(folder / name).train.ranks == 2
    if "all" not in name:
        exported = load_file(folder / name / "export" / "model.safetensors")
        for key, tensor in load_file(folder / name / "expanded" / "model.safetensors").items():
            assert torch.equal(exported[key], tensor) == (".layers.2." not in key and ".layers.5." not in key), key


def test_two_ranks_repeat_bit_for_bit(made):
    folder, _ = made
    assert figures(folder / "again") == figures(folder / "plain")
    again, plain = weights(folder / "again"), weights(folder / "plain")
    assert all(torch.equal(again[name], plain[name]) for name in plain)


def test_gradients_are_added_up_once_a_step(made):
    """Each trained tensor, the losses and the KL of its micro-batches, and for each text measured its sums."""
    folder, outcomes = made
    measured = len(rows(folder / "plain", "eval"))
    assert [each["reduced"] for each in outcomes["plain"]] == [
        STEPS * (len(weights(folder / "plain")) + 2) + measured
    ] * 2


@pytest.mark.parametrize(("name", "whole"), [("stopped", "plain"), ("sharded, stopped", "sharded")])
def test_a_signal_to_one_stops_all_and_the_run_goes_on_bit_for_bit(name, whole, made, tmp_path):
    folder, outcomes = made
    assert [each["stopped"] for each in outcomes[name]] == [signal.SIGTERM] * 2
    run = tmp_path / "run"
    shutil.copytree(folder / name, run)
    assert complete_checkpoints(run)[-1].name == "step-000002"
    ranked.make([Asked(run)], count=2, folder=tmp_path)
    assert figures(run) == figures(folder / whole)
    assert all(torch.equal(tensor, weights(folder / whole)[name]) for name, tensor in weights(run).items())


def test_of_what_is_sharded_each_rank_writes_its_half(made):
    folder, _ = made
    sizes = {}
    for file in complete_checkpoints(folder / "sharded")[-1].glob("*.safetensors"):
        rank = file.name.split("-")[1]
        sizes[rank] = sizes.get(rank, 0) + sum(each.numel() for each in load_file(file).values())
    parameters = sum(each.numel() for each in weights(folder / "sharded").values())
    assert len(sizes) == 2
    assert min(sizes.values()) > 3 * parameters / 2 * 0.99


def test_a_bad_step_of_one_is_everybodys(made):
    folder, outcomes = made
    assert [each["error"] for each in outcomes["poisoned"]] == [None, None]
    (skipped,) = rows(folder / "poisoned", "skipped")
    assert (skipped["step"], skipped["loss"]) == (3, "nan")
    losses = [row["loss"] for row in rows(folder / "poisoned", "train")]
    assert losses[2] is None
    assert all(math.isfinite(loss) for n, loss in enumerate(losses) if n != 2)


def test_a_rank_whose_weights_drift_is_found_at_a_checkpoint(made):
    folder, outcomes = made
    kinds, texts = zip(*(each["error"] for each in outcomes["miscomputes"]), strict=True)
    assert kinds == ("UserError", "ToldElsewhere")
    assert texts[0].startswith("rank 1 has another model.")
    assert texts[0] == texts[1]
    assert not complete_checkpoints(folder / "miscomputes")


def test_a_rank_that_writes_elsewhere_completes_no_checkpoint(made):
    folder, outcomes = made
    kinds, texts = zip(*(each["error"] for each in outcomes["elsewhere"]), strict=True)
    assert kinds == ("UserError", "ToldElsewhere")
    assert "which rank 1 has written, is not there for rank 0; give an --output that all machines share" in texts[0]
    assert not complete_checkpoints(folder / "elsewhere")


def test_a_run_that_goes_on_is_changed_by_nothing_that_is_refused(made, tmp_path):
    """A text that one rank alone lacks. And a micro-batch for one rank, given again for two, is made as small again."""
    folder, _ = made
    for name in ("refused", "goes on"):
        shutil.copytree(folder / "stopped", tmp_path / name)

    def content() -> dict[Path, bytes]:
        files = [path for path in (tmp_path / "refused").rglob("*") if path.is_file() and path.name != ".lock"]
        return {path: path.read_bytes() for path in files}

    before = content()
    asked = [
        Asked(tmp_path / "refused", fault="other text", options=["--train.steps", "12"]),
        Asked(tmp_path / "goes on", options=["--train.micro_batch_size", "4"]),
    ]
    refused, gone_on = ranked.make(asked, count=2, folder=tmp_path)
    assert [kind for kind, _ in (each["error"] for each in refused)] == ["UserError", "ToldElsewhere"]
    assert content() == before
    assert [each["error"] for each in gone_on] == [None, None]
    assert load_config(tmp_path / "goes on").train.micro_batch_size == 2


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("odd", "--train.batch_size 3: 2 processes cannot share it evenly; give a multiple of 2"),
        ("differ", "--optim.lr: rank 1 was given 0.02 and rank 0 0.01; give all the same"),
    ],
)
def test_what_cannot_be_is_refused_once_and_leaves_nothing(name, words, made):
    folder, outcomes = made
    kinds, texts = zip(*(each["error"] for each in outcomes[name]), strict=True)
    assert kinds == ("UserError", "ToldElsewhere")
    assert words in texts[0]
    assert not (folder / name).exists()


@pytest.mark.parametrize(("name", "whole"), [("stopped", "plain"), ("sharded, stopped", "sharded")])
def test_a_run_goes_on_with_another_number_of_ranks(name, whole, made, tmp_path, capsys):
    """2 -> 1; the order of the text and the curve are kept, and it is said that bits are not."""
    folder, _ = made
    run = tmp_path / "run"
    shutil.copytree(folder / name, run)
    run_training(parse(["--output", str(run), "--resume"]).config, resume=True)
    assert "changed: train.ranks 2 -> 1; from here on it is equal within rounding" in capsys.readouterr().out
    assert_close(run, folder / whole)


@pytest.mark.slow
@pytest.mark.parametrize(("sharding", "fault"), [("replicate", "killed"), ("trained", "killed in backward")])
def test_a_rank_that_is_killed_ends_the_others_and_four_go_on(sharding, fault, made, taught, tmp_path):
    folder, _ = made
    run, screens = tmp_path / "run", [tmp_path / f"rank-{number}.txt" for number in range(2)]
    config = taught(run, train={"sharding": sharding})
    processes = ranked.start(ranked.trained, config, fault, count=2, screens=screens)
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [2, -signal.SIGKILL]
    said = screens[0].read_text()
    assert said.count("error: rank 0: another process of this run has ended") == 1, said
    assert "Traceback" not in said
    assert "go on with --resume" in said
    assert complete_checkpoints(run)[-1].name == "step-000002"
    ranked.make([Asked(run)], count=4, folder=tmp_path)
    assert_close(run, folder / "plain")
    assert load_config(run).train.sharding == sharding
    assert ("train.ranks", 4) in [(change.key, change.after) for change in load_config(run).history]


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["replicate", "trained"])
def test_two_ranks_then_one_then_four(sharding, made, taught, tmp_path):
    """Each is asked to stop in its third step."""
    folder, _ = made
    run = tmp_path / "run"
    ranked.make([Asked(taught(run, train={"sharding": sharding}), fault="asked to stop")], count=2, folder=tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        stop_in_step(3, patch)
        with pytest.raises(Stopped):
            run_training(parse(["--output", str(run), "--resume"]).config, resume=True)
    assert complete_checkpoints(run)[-1].name == "step-000004"
    ranked.make([Asked(run)], count=4, folder=tmp_path)
    assert_close(run, folder / "plain")
    changes = [(change.step, change.after) for change in load_config(run).history if change.key == "train.ranks"]
    assert changes == [(2, 1), (4, 4)]


@pytest.mark.slow
def test_where_the_first_rank_is_killed_the_second_says_so(taught, tmp_path):
    screens = [tmp_path / f"rank-{number}.txt" for number in range(3)]
    config = taught(tmp_path / "run", train={"batch_size": 6})
    processes = ranked.start(ranked.trained, config, "first killed", count=3, screens=screens)
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [-signal.SIGKILL, 2, 2]
    assert [screen.read_text().count("another process of this run has ended") for screen in screens] == [0, 1, 0]


@pytest.mark.slow
def test_the_same_processes_make_a_second_run(taught, tmp_path):
    screens = [tmp_path / f"rank-{number}.txt" for number in range(2)]
    configs = [taught(tmp_path / name, train={"steps": 1}) for name in ("one", "two")]
    processes = ranked.start(ranked.twice, *configs, count=2, screens=screens)
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0], screens[0].read_text()
    assert figures(tmp_path / "one") == figures(tmp_path / "two")


@pytest.mark.slow
def test_a_full_disk_is_told_once_and_ends_all(taught, tmp_path):
    """Of the one rank that writes."""
    run, screens = tmp_path / "run", [tmp_path / f"rank-{number}.txt" for number in range(2)]
    processes = ranked.start(ranked.trained, taught(run), "disk full", count=2, screens=screens)
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [2, 2]
    said = "".join(screen.read_text() for screen in screens)
    assert said.count("error: ") == 1, said
    assert "step-000002: cannot be written: No space left on device" in said
    assert not complete_checkpoints(run)


@pytest.mark.slow
def test_a_bug_on_one_rank_ends_all_and_is_shown(taught, tmp_path):
    screens = [tmp_path / f"rank-{number}.txt" for number in range(2)]
    processes = ranked.start(ranked.trained, taught(tmp_path / "run"), "bug", count=2, screens=screens)
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [2, 1]
    assert "IndexError: list index out of range" in screens[1].read_text()


def test_a_run_that_was_killed_before_its_model_was_made_goes_on_with_another_number_of_ranks(taught, tmp_path):
    """Its config.yaml is there, with the micro-batch of one rank, and nothing else."""
    run = tmp_path / "run"
    run_training(taught(run, train={"batch_size": 6, "micro_batch_size": None, "steps": 1}))
    for path in run.iterdir():
        if path.name != "config.yaml":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert load_config(run).train.micro_batch_size == 6
    (outcome,) = ranked.make([Asked(run)], count=2, folder=tmp_path)
    assert [each["error"] for each in outcome] == [None, None]
    assert load_config(run).train.micro_batch_size == 3


def test_a_launch_that_cannot_be_is_one_line(monkeypatch, capfd):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with (
        pytest.raises(UserError, match="WORLD_SIZE is 2 and not set: RANK, MASTER_ADDR"),
        joined(),
    ):
        pass
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "1")
    for number in ("2", "-1"):
        monkeypatch.setenv("RANK", number)
        with pytest.raises(UserError, match=f"RANK is {number}, not one of 2"), joined():
            pass
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        for name, value in {"RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": taken.getsockname()[1]}.items():
            monkeypatch.setenv(name, str(value))
        with pytest.raises(UserError, match=r"cannot join the others at 127\.0\.0\.1:.*is the port free"), joined():
            pass
    assert main(["report", "run"]) == 2
    assert capfd.readouterr().err == (
        "llama-pro-fast: error: only `train` shares its work among processes; start this verb by itself, not by "
        "torchrun\n"
    )


@pytest.mark.slow
def test_torchrun_makes_a_run(taught, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({k: v for k, v in to_dict(taught(tmp_path / "run")).items() if v is not None}))
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "llama_pro_fast.train"]
    found = subprocess.run([sys.executable, *words, "--config", recipe], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert found.stdout.count("step 10/10") == 1
    assert "on each of 2 ranks 2 micro-batches of 1" in " ".join(found.stdout.replace("│", "").split())
