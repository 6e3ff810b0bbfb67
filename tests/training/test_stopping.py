"""Signals: where a run can be left, what it saves, how the process ends, and that the run is the same afterwards."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from llama_pro_fast.data.corpus import Corpus
from llama_pro_fast.errors import UserError
from llama_pro_fast.model.decoder import Decoder
from llama_pro_fast.recipe import parse
from llama_pro_fast.resume import load_config
from llama_pro_fast.runs.checkpoint import complete_checkpoints
from llama_pro_fast.runs.marker import read_info
from llama_pro_fast.runs.metrics import read_metrics
from llama_pro_fast.train import main as train_main
from llama_pro_fast.training import export, loop
from llama_pro_fast.training.run import run_training
from llama_pro_fast.training.signals import SIGNALS, Stopped, StopSignals


def measured(run: Path) -> list[tuple]:
    """Every training and evaluation row, in order, without what a clock says."""
    keep = ("kind", "step", "source", "loss", "base_loss", "kl", "grad_norm", "lr", "skipped", "source_tokens")
    return [tuple(str(row.get(k)) for k in keep) for row in read_metrics(run) if row["kind"] in ("train", "eval")]


def weights(run: Path) -> bytes:
    return (run / "export" / "model.safetensors").read_bytes()


def nth_call(patch, owner, name: str, number: int, action) -> None:
    """``action()`` when ``owner.name`` is called for the ``number``-th time, before it runs."""
    original, calls = getattr(owner, name), []

    def counted(*arguments, **named):
        calls.append(1)
        if len(calls) == number:
            action()
        return original(*arguments, **named)

    patch.setattr(owner, name, counted)


def send(*numbers: int):
    return lambda: [os.kill(os.getpid(), number) for number in numbers]


def go_on(run: Path) -> None:
    run_training(parse(["--output", str(run), "--resume"]).config, resume=True)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_between_micro_batches_drops_the_step_that_is_begun(number, make_config, finished, tmp_path, capsys):
    """The seventh of a run of two micro-batches a step: three steps are done, and the fourth has begun."""
    with pytest.MonkeyPatch.context() as patch:
        nth_call(patch, Decoder, "loss", 7, send(number))
        with pytest.raises(Stopped) as stopped:
            run_training(make_config())
    run = tmp_path / "run"
    assert stopped.value.exit_code == 128 + number
    assert complete_checkpoints(run)[-1].name == "step-000003"
    said = capsys.readouterr().out
    assert f"stopped by {signal.Signals(number).name}, saved " in said
    assert f"llama-pro-fast train --output {run} --resume" in said
    if number == signal.SIGUSR1:
        go_on(run)
        assert measured(run) == measured(finished)
        assert weights(run) == weights(finished)


def test_a_signal_in_an_evaluation_stops_it_between_batches_and_it_is_made_again(make_config, finished, tmp_path):
    """At step 3 the domain is measured, the general text begun: its row is missing, and the domain's is not doubled."""
    run = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        nth_call(patch, Decoder, "compare", 1 + len(list(general_batches(finished))), send(signal.SIGTERM))
        with pytest.raises(Stopped):
            run_training(make_config())
    rows = [(row["step"], row["role"]) for row in read_metrics(run) if row["kind"] == "eval"]
    assert rows == [(0, "domain"), (0, "general"), (3, "domain")]
    info = read_info(complete_checkpoints(run)[-1])
    assert (info.progress.step, info.evaluated) == (3, False)
    go_on(run)
    assert measured(run) == measured(finished)
    assert weights(run) == weights(finished)


def general_batches(run: Path):
    """What one evaluation of the general text of the finished run compares."""
    (tokens,) = {row["tokens"] for row in read_metrics(run) if row["kind"] == "eval" and row["role"] == "general"}
    return range(-(-tokens // (2 * 32)))


def test_a_signal_before_the_first_step_leaves_a_run_that_starts_there(make_config, finished, tmp_path, capsys):
    with pytest.MonkeyPatch.context() as patch:
        nth_call(patch, Decoder, "compare", 2, send(signal.SIGTERM))
        with pytest.raises(Stopped):
            run_training(make_config())
    assert "before the first checkpoint; go on with" in capsys.readouterr().out
    assert not complete_checkpoints(tmp_path / "run")
    go_on(tmp_path / "run")
    assert measured(tmp_path / "run") == measured(finished)


@pytest.mark.parametrize(("owner", "name"), [(Corpus, "prepare"), (export, "write_header")])
def test_outside_the_loop_a_signal_ends_at_once_and_leaves_nothing_half(owner, name, make_config, tmp_path, cli):
    config = make_config()
    with pytest.MonkeyPatch.context() as patch:
        nth_call(patch, owner, name, 1, send(signal.SIGTERM))
        with pytest.raises(Stopped):
            run_training(config)
    run = tmp_path / "run"
    if name == "prepare":
        assert not run.exists()
    else:
        assert complete_checkpoints(run)[-1].name == "step-000006"
        assert not list(run.glob("export*"))
        go_on(run)
        assert (run / "export" / "model.safetensors").exists()


def test_a_second_ctrl_c_ends_at_once_and_a_repeated_signal_of_a_scheduler_does_not():
    with StopSignals() as signals, signals.patient():
        send(signal.SIGTERM, signal.SIGTERM, signal.SIGUSR1)()
        assert signals.requested == signal.SIGTERM
        with pytest.raises(KeyboardInterrupt) as caught:
            send(signal.SIGINT)()
        assert not isinstance(caught.value, Stopped)
        with pytest.raises(Stopped):
            signals.check()


def test_what_a_process_inherits_as_ignored_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignals() as signals:
            send(signal.SIGHUP)()
            assert signals.requested is None
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_handlers_are_given_back():
    before = [signal.getsignal(number) for number in SIGNALS]
    with StopSignals():
        assert [signal.getsignal(number) for number in SIGNALS] != before
    assert [signal.getsignal(number) for number in SIGNALS] == before


# -- one command that starts or goes on ---------------------------------------------------------------------------


@pytest.fixture
def command(base, texts, tmp_path, tmp_path_factory) -> list[str]:
    """All options of a run of six steps, and `--resume auto`."""
    options = {
        "model.path": base,
        "expand.groups": 2,
        "data.domain": texts / "domain.jsonl",
        "data.general": texts / "general",
        "data.held_out": 0.1,
        "data.cache": tmp_path_factory.getbasetemp() / "token-cache",
        "optim.lr": 1e-2,
        "optim.warmup_steps": 1,
        "train.steps": 6,
        "train.seq_len": 32,
        "train.batch_size": 4,
        "train.micro_batch_size": 2,
        "train.log_every": 1,
        "train.threads": 1,
        "train.device": "cpu",
        "eval.every": 3,
        "eval.tokens": 256,
        "output": tmp_path / "run",
        "resume": "auto",
    }
    return [part for key, value in options.items() for part in (f"--{key}", str(value))]


def test_one_command_starts_goes_on_and_knows_the_end(command, finished, tmp_path, cli):
    with pytest.MonkeyPatch.context() as patch:
        nth_call(patch, loop, "train_step", 3, send(signal.SIGUSR1))
        assert cli(train_main, *command)[0] == 128 + signal.SIGUSR1
    code, out, _ = cli(train_main, *command)
    assert (code, "resumed at step 2 of 6" in out) == (0, True)
    assert weights(tmp_path / "run") == weights(finished)
    code, out, _ = cli(train_main, *command)
    assert (code, out.strip()) == (0, f"{tmp_path / 'run'}: finished already")
    code, out, _ = cli(train_main, *command, "--train.steps", "7")
    assert (code, "resumed at step 6 of 7" in out) == (0, True)


def test_auto_starts_in_an_empty_folder_and_refuses_one_that_is_no_run(command, tmp_path, cli):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes").write_text("mine")
    code, _, err = cli(train_main, *command)
    cli.refused(code, err, "holds other files")
    (tmp_path / "run" / "notes").unlink()
    assert cli(train_main, *command)[0] == 0


def test_auto_and_overwrite_contradict_each_other(command, cli, a_run):
    code, _, err = cli(train_main, *command, "--overwrite")
    cli.refused(code, err, "contradict")


@pytest.mark.slow
def test_the_loop_of_the_docs_brings_a_run_to_its_end_through_kills(command, finished, tmp_path):
    """docs/long-runs.md's loop, as it stands there, over a command that is asked to stop once."""
    page = (Path(__file__).parents[2] / "docs" / "long-runs.md").read_text()
    (loop_text,) = re.findall(r"```sh\n(for .*?)```", page, re.DOTALL)
    driver = tmp_path / "driver.py"
    driver.write_text(
        "import os, signal, sys, pathlib\n"
        "from llama_pro_fast.cli import run_entry_point\n"
        "from llama_pro_fast.train import main\n"
        "from llama_pro_fast.training import loop\n"
        f"times = pathlib.Path({str(tmp_path / 'times')!r})\n"
        "calls = len(times.read_text()) if times.exists() else 0\n"
        "times.write_text('x' * (calls + 1))\n"
        "ends = [signal.SIGTERM]\n"
        "step, done = loop.train_step, []\n"
        "def ending(*arguments):\n"
        "    done.append(1)\n"
        "    if len(done) == 3 and calls < 1:\n"
        "        os.kill(os.getpid(), ends[calls])\n"
        "    return step(*arguments)\n"
        "loop.train_step = ending\n"
        "sys.exit(run_entry_point(main))\n"
    )
    script = re.sub(r"llama-pro-fast train .*? &&", lambda _: f'{sys.executable} {driver} "$@" &&', loop_text)
    assert script != loop_text
    script = re.sub(r"sleep \d+", "sleep 0", script)
    command = ["bash", "-c", script, "loop", *command, "--train.checkpoint_every", "1"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert (tmp_path / "times").read_text() == "xx"
    assert weights(tmp_path / "run") == weights(finished)
    # A mistake of the user's and Ctrl-C end the loop at once, a crash that comes again and again does in the end.
    for code, times in ((2, 1), (130, 1), (1, 50)):
        ending = re.sub(r"    \S+python\S* .*? && exit", f"    (echo again; exit {code}) && exit", script)
        ended = subprocess.run(["bash", "-c", ending], capture_output=True, text=True, check=False)
        assert (ended.returncode, ended.stdout.count("again")) == (code, times)


def test_a_bound_of_the_recipe_ends_a_run_saved_and_exported(make_config, tmp_path, cli):
    run = tmp_path / "run"
    summary = run_training(make_config(eval={"every": 1}, stop={"kl_above": 1e-9}))
    assert summary["steps"] == 1
    assert summary["ended"].startswith("stop.kl_above 1e-09: it is ")
    assert (run / "export" / "model.safetensors").exists()
    # It is finished, until the bound is raised.
    code, out, _ = cli(train_main, "--output", run, "--resume", "auto")
    assert (code, "finished already" in out) == (0, True)
    code, out, _ = cli(train_main, "--output", run, "--resume", "--train.steps", "7")
    assert (code, "the run has ended there by stop.kl_above" in out) == (0, True)
    # Another amount of text is measured once, and not again at each resume.
    for _ in range(2):
        assert cli(train_main, "--output", run, "--resume", "--eval.tokens", "128")[0] == 0
    firsts = [row["step"] for row in read_metrics(run) if row.get("first") and row["role"] == "general"]
    assert firsts == [0, 1]
    assert cli(train_main, "--output", run, "--resume", "--stop.kl_above", "null")[0] == 0
    assert load_config(run).stop.kl_above is None
    assert json.loads((run / "report" / "summary.json").read_text())["steps"] == 7


def test_a_bound_on_what_cannot_be_measured_is_refused(make_config, tmp_path):
    config = make_config(train={"parameters": "all"}, expand={"groups": None}, stop={"kl_above": 1.0})
    with pytest.raises(UserError, match=r"--stop.kl_above 1: nothing to hold against: all parameters train"):
        run_training(config)
    assert not (tmp_path / "run").exists()
