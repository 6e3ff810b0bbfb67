"""metrics.jsonl and the boards: damage is left out with a word, and no disk, board or service ends a run."""

from __future__ import annotations

import json
import resource
import sys
from contextlib import contextmanager
from types import SimpleNamespace

import pytest

from llama_pro_fast.runs import metrics
from llama_pro_fast.runs.metrics import MetricsWriter, read_metrics

ROWS = [{"kind": "train", "step": step, "loss": 1.5} for step in range(1, 6)]


@pytest.fixture
def said(monkeypatch) -> list[str]:
    lines = []
    monkeypatch.setattr(metrics, "say", lines.append)
    monkeypatch.setattr(metrics, "_warn", lines.append)
    return lines


def write_rows(run, lines: list[bytes]) -> None:
    (run / "metrics.jsonl").write_bytes(b"\n".join(lines) + b"\n")


@pytest.mark.parametrize(
    "damaged",
    [
        b"5",
        b"{}",
        b"null",
        b"\xff\xfe",
        b'{"kind": "train", "st',
        b'{"kind": "train", "step": 3, "loss": 1.5}}',
        b'"step": 3, "loss": 1.5}',
        b'{"kind": "train", "step": "3"}',
        b'{"kind": "train", "step": true}',
        b'{"kind": "train", "step": 3.5}',
        b'{"kind": 7, "step": 3}',
        b'{"step": 3}',
        b"\0" * 40,
        b"[" * 100_000,
        b'{"kind": "train", "step": ' + b"9" * 5000 + b"}",
    ],
)
def test_a_damaged_row_is_left_out_and_the_rows_around_stay(tmp_path, said, damaged):
    rows = [json.dumps(row).encode() for row in ROWS]
    write_rows(tmp_path, [*rows[:2], damaged, *rows[2:]])
    assert read_metrics(tmp_path) == ROWS
    assert said == [f"{tmp_path / 'metrics.jsonl'}: 1 damaged rows left out (line 3)"]


def test_a_row_cut_anywhere_is_left_out_whatever_follows(tmp_path, said):
    whole = json.dumps(ROWS[0]).encode()
    for length in range(1, len(whole)):
        write_rows(tmp_path, [whole, whole[:length], whole])
        assert read_metrics(tmp_path) == [ROWS[0], ROWS[0]]
        (tmp_path / "metrics.jsonl").write_bytes(whole + b"\n" + whole[:length])
        assert read_metrics(tmp_path) == [ROWS[0]]
    assert len(said) == 2 * (len(whole) - 1)


def test_a_warning_is_said_once(tmp_path, capfd):
    write_rows(tmp_path, [b"5"] * 8)
    for _ in range(3):
        read_metrics(tmp_path)
    assert capfd.readouterr().out.count("8 damaged rows left out (line 1, 2, 3, 4, 5, ...)") == 1


def test_no_file_has_no_rows_and_a_resumed_run_says_so(tmp_path, said):
    assert read_metrics(tmp_path) == []
    assert not said
    MetricsWriter(tmp_path, resumed_at=3).close()
    assert said == [f"{tmp_path / 'metrics.jsonl'}: is gone; its rows up to step 3 are lost"]


@pytest.mark.parametrize("evaluated", [True, False])
def test_a_resumed_run_keeps_the_rows_up_to_its_step(tmp_path, evaluated):
    writer = MetricsWriter(tmp_path)
    for step in (1, 2, 3):
        writer.write("train", step, loss=0.5)
        writer.write("eval", step, loss=0.25, source="text", first=True)
    writer.close()
    writer = MetricsWriter(tmp_path, resumed_at=2, evaluated=evaluated)
    writer.write("train", 3, loss=0.75)
    writer.close()
    expected = [("train", 1), ("eval", 1), ("train", 2), *([("eval", 2)] if evaluated else []), ("train", 3)]
    assert [(row["kind"], row["step"]) for row in read_metrics(tmp_path)] == expected
    assert read_metrics(tmp_path)[1]["first"] is True


def test_tensorboard_shows_the_figures_and_forgets_what_a_crash_undid(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    writer = MetricsWriter(tmp_path)
    for step in (1, 2, 3):
        writer.write("train", step, loss=float(step), tokens_per_second=None, source_tokens={"text": 7})
        writer.write("eval", step, source="text", loss=0.5, first=True)
    MetricsWriter(tmp_path, resumed_at=2).write("train", 3, loss=9.0)
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert sorted(board.Tags()["scalars"]) == ["eval/text/loss", "train/loss", "train/source_tokens/text"]
    assert [(event.step, event.value) for event in board.Scalars("train/loss")] == [(1, 1.0), (2, 2.0), (3, 9.0)]


@contextmanager
def files_of_at_most(size: int):
    """A real limit: a write that would pass it is cut short there, and the next one fails, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_rows_without_room_wait_and_no_half_row_stays(tmp_path, said):
    writer = MetricsWriter(tmp_path)
    writer.write("train", 1, loss=0.5)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    with files_of_at_most(len(before) + 10):
        for step in (2, 3):
            writer.write("train", step, loss=0.5)
            writer.sync()
            assert (tmp_path / "metrics.jsonl").read_bytes() == before
    writer.write("train", 4, loss=0.5)
    writer.close()
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3, 4]
    assert sorted(line.partition(":")[0].rpartition("/")[2] for line in said) == ["TensorBoard", "metrics.jsonl"]


def test_rows_that_found_no_room_to_the_end_are_counted(tmp_path, said):
    writer = MetricsWriter(tmp_path)
    with files_of_at_most(10):
        writer.write("train", 1, loss=0.5)
        writer.close()
    assert said[-1] == f"{tmp_path / 'metrics.jsonl'}: 1 rows could not be written"


@pytest.mark.parametrize("how", ["a file in the way", "fails later"])
def test_tensorboard_that_fails_is_off(tmp_path, said, how):
    if how == "a file in the way":
        (tmp_path / "tensorboard").write_text("")
    writer = MetricsWriter(tmp_path)
    if how == "fails later":
        writer.boards["TensorBoard"].file.close()
    for step in (1, 2):
        writer.write("train", step, loss=0.5)
    writer.close()
    assert len(read_metrics(tmp_path)) == 2
    assert len(said) == 1
    assert said[0].startswith("TensorBoard: off from here on (")


# Weights & Biases


class StandIn:
    """The part of the package wandb that is used; ``failing`` names a call that fails."""

    def __init__(self, failing: str | None = None) -> None:
        self.failing, self.begun, self.logged, self.finished = failing, [], [], 0
        self.Settings = SimpleNamespace

    def init(self, **options):
        self._call("init")
        self.begun.append(options)
        return self

    def define_metric(self, name, *, step_metric):
        assert (name, step_metric) == ("*", "step")

    def log(self, values):
        self._call("log")
        self.logged.append(values)

    def finish(self):
        self._call("finish")
        self.finished += 1

    def _call(self, name):
        if name == self.failing:
            raise RuntimeError("no network")


def test_wandb_gets_the_same_figures_and_one_run_a_folder(tmp_path, monkeypatch):
    wandb = StandIn()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    for resumed_at in (None, 1):
        writer = MetricsWriter(tmp_path, resumed_at=resumed_at, wandb="a project")
        writer.write("train", 1, loss=0.5, tokens_per_second=None)
        writer.write("eval", 1, source="text", loss=0.25, first=True)
        writer.close()
    assert wandb.logged == 2 * [{"step": 1, "train/loss": 0.5}, {"step": 1, "eval/text/loss": 0.25}]
    assert wandb.finished == 2
    first, second = wandb.begun
    assert first == second
    assert (first["project"], first["dir"], first["resume"]) == ("a project", str(tmp_path), "allow")
    assert first["id"]
    (tmp_path / "another").mkdir()
    MetricsWriter(tmp_path / "another", wandb="a project")
    assert wandb.begun[-1]["id"] != first["id"]


@pytest.mark.parametrize("failing", ["init", "log", "finish"])
def test_wandb_that_fails_is_off(tmp_path, monkeypatch, said, failing):
    monkeypatch.setitem(sys.modules, "wandb", StandIn(failing))
    writer = MetricsWriter(tmp_path, wandb="a project")
    for step in (1, 2):
        writer.write("train", step, loss=0.5)
    writer.close()
    assert len(read_metrics(tmp_path)) == 2
    assert len(said) == 1
    assert said[0].startswith("Weights & Biases: off from here on (no network)")


def test_wandb_that_is_not_installed_is_said_before_any_work(refused, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "wandb", None)
    refused("--train.wandb mine", "pip install wandb", train__wandb="mine")
    assert not (tmp_path / "run").exists()
