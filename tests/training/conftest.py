from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import forked
import pytest
import torch
import yaml
from stopping import stop_in_step
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from llama_pro_fast.cli import run_entry_point
from llama_pro_fast.config import (
    DataConfig,
    EvalConfig,
    ExpandConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    StopConfig,
    TrainConfig,
)
from llama_pro_fast.evaluation import export_check
from llama_pro_fast.reporting import dial, summary
from llama_pro_fast.runs.checkpoint import complete_checkpoints
from llama_pro_fast.train import main as train_main
from llama_pro_fast.training.run import run_training
from llama_pro_fast.training.signals import Stopped

TEXT = "the block copies its input until training moves it away from that and only new blocks learn, others stay"
WORDS = TEXT.replace(",", "").split()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if said := config.stash.get(forked.KILLS, None):
        terminalreporter.write_line(said)


@pytest.fixture(scope="session")
def texts(tmp_path_factory) -> Path:
    """A folder with domain.jsonl and general.txt files of pseudo text."""
    folder = tmp_path_factory.mktemp("texts")
    generator = torch.Generator().manual_seed(0)

    def sentence(length: int) -> str:
        return " ".join(WORDS[i] for i in torch.randint(len(WORDS), (length,), generator=generator))

    with open(folder / "domain.jsonl", "w") as file:
        for n in range(120):
            file.write(json.dumps({"text": f"{n}: {sentence(5 + n % 40)}."}) + "\n")
    (folder / "general").mkdir()
    for n in range(60):
        (folder / "general" / f"{n}.txt").write_text(f"Letter {n}. {sentence(30)}!")
    return folder


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(WORDS * 20, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="session")
def base(tmp_path_factory, tokenizer) -> Path:
    """A tiny base with a tokenizer, stored in bf16 like most."""
    return write_base(tmp_path_factory.mktemp("base") / "tiny", tokenizer, torch.bfloat16)


@pytest.fixture(scope="session")
def base_at(tokenizer) -> Callable[..., Path]:
    """``base_at(folder)``: a base like that, of another family or config."""
    return lambda folder, **config: write_base(folder, tokenizer, torch.bfloat16, **config)


@pytest.fixture
def base_of(tmp_path, base_at) -> Callable[..., Path]:
    """The same in a folder of its own."""
    return lambda **config: base_at(tmp_path / "base", **config)


def write_base(folder: Path, tokenizer, dtype: torch.dtype, *, family: str = "llama", **config) -> Path:
    settings = {
        "vocab_size": 320,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **(settings | config)))
    for name, parameter in model.named_parameters():
        with torch.no_grad():
            parameter.normal_(std=0.1).add_(1.0 if "norm" in name else 0.0)
    model.to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def config_at(base, texts, tmp_path_factory) -> Callable[..., RunConfig]:
    """``config_at(output, **sections)``: a run of 6 steps in a second; ``section={"key": value}`` changes it."""

    def make(output: Path | str, **changes) -> RunConfig:
        sections = {
            "model": {"path": str(base)},
            "expand": {"groups": 2},
            "data": {
                "domain": str(texts / "domain.jsonl"),
                "general": str(texts / "general"),
                "held_out": 0.1,
                "cache": str(tmp_path_factory.getbasetemp() / "token-cache"),
            },
            "optim": {"lr": 1e-2, "warmup_steps": 1},
            "train": {
                "device": "cpu",
                "steps": 6,
                "seq_len": 32,
                "batch_size": 4,
                "micro_batch_size": 2,
                "log_every": 1,
                "threads": 1,
            },
            "eval": {"every": 3, "tokens": 256},
            "stop": {},
        }
        for name, values in changes.items():
            sections[name] = sections[name] | values
        sections["train"].setdefault("checkpoint_every", 2)
        return RunConfig(
            model=ModelConfig(**sections["model"]),
            expand=ExpandConfig(**sections["expand"]),
            data=DataConfig(**sections["data"]),
            optim=OptimConfig(**sections["optim"]),
            train=TrainConfig(**sections["train"]),
            eval=EvalConfig(**sections["eval"]),
            stop=StopConfig(**sections["stop"]),
            output=str(output),
        )

    return make


@pytest.fixture
def make_config(config_at, tmp_path) -> Callable[..., RunConfig]:
    """The same, into ``tmp_path / "run"`` unless an output is given."""
    return lambda *, output=tmp_path / "run", **changes: config_at(output, **changes)


@pytest.fixture(scope="session")
def finished(config_at, tmp_path_factory) -> Path:
    """A finished run of 6 steps that many tests look at and none changes."""
    run = tmp_path_factory.mktemp("finished") / "run"
    run_training(config_at(run))
    return run


@pytest.fixture
def made(finished, tmp_path):
    """``made(name, rows, **changes)``: the folder of a run that has no more than these rows; ``section={…}`` changes
    its configuration."""

    def make(name: str, rows=(), **changes) -> Path:
        folder = tmp_path / name
        folder.mkdir(parents=True)
        config = yaml.safe_load((finished / "config.yaml").read_text())
        for section, values in changes.items():
            config[section] |= values
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return folder

    return make


@pytest.fixture
def a_run(finished, tmp_path) -> Path:
    """A copy of it in ``tmp_path / "run"``, which the test may damage or overwrite."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


@pytest.fixture
def read_back() -> None:
    """For runs that read their export back; see below."""


@pytest.fixture(autouse=True)
def _short_end(request, monkeypatch) -> None:
    """But for ``finished``, no run draws its curves, and without ``read_back`` none reads its export back: together
    more than half of its time."""
    for where, name in ((summary, "draw_loss"), (summary, "write_page"), (dial, "png")):
        monkeypatch.setattr(where, name, lambda *_, **__: None)
    if "read_back" not in request.fixturenames:
        monkeypatch.setattr(export_check, "available_memory", lambda: 0)


@pytest.fixture
def stopped_at_2(monkeypatch):
    """A run that was stopped in its third step, and so saved its second."""

    def run(config: RunConfig) -> None:
        with monkeypatch.context() as patch:
            stop_in_step(3, patch)
            with pytest.raises(Stopped):
                run_training(config)

    return run


@pytest.fixture
def cli(capfd):
    """Call a verb as its entry point does: (exit code, stdout, stderr); ``cli.refused`` checks such an outcome."""

    def call(main, *argv) -> tuple[int, str, str]:
        code = run_entry_point(main, [str(a) for a in argv])
        captured = capfd.readouterr()
        return code, captured.out, captured.err

    call.refused = assert_refused
    return call


def assert_refused(code: int, err: str, *fragments: str) -> None:
    lines = [line for line in err.splitlines() if line.strip()]
    assert code == 2, err
    assert len(lines) == 1, err
    assert lines[0].startswith("llama-pro-fast: error: "), err
    for fragment in fragments:
        assert str(fragment) in lines[0], f"{fragment!r} is not in: {lines[0]}"


@pytest.fixture
def refused(cli, base, texts, tmp_path, tmp_path_factory):
    """Call ``train`` with good options, changed by the ones given, and check how it refuses."""

    def run(*fragments: str, **changes) -> str:
        options = {
            "model.path": base,
            "expand.groups": 2,
            "data.domain": texts / "domain.jsonl",
            "data.general": texts / "general",
            "data.held_out": 0.1,
            "data.cache": tmp_path_factory.getbasetemp() / "token-cache",
            "optim.lr": 1e-2,
            "train.steps": 2,
            "train.seq_len": 32,
            "train.batch_size": 2,
            "train.threads": 1,
            "train.device": "cpu",
            "eval.tokens": 64,
            "output": tmp_path / "run",
        }
        options |= {key.replace("__", "."): value for key, value in changes.items()}
        argv = [part for key, value in options.items() if value is not None for part in (f"--{key}", str(value))]
        code, _, err = cli(train_main, *argv)
        assert_refused(code, err, *fragments)
        assert not complete_checkpoints(tmp_path / "run")
        assert not (tmp_path / "run" / "export").exists()
        return err

    return run


@pytest.fixture
def copy_of(tmp_path):
    """A copy of a folder that a test may damage."""

    def copy(folder: Path, name: str = "copy") -> Path:
        return Path(shutil.copytree(folder, tmp_path / name))

    return copy
