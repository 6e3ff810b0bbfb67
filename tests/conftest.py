from __future__ import annotations

import gc
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

from llama_pro_fast.hf.folder import PretrainedFolder

BENCHES = Path(__file__).parent / "bench"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The benches are for maintainers, and many of their tests start one as a process: all count as slow."""
    for item in items:
        if item.path.is_relative_to(BENCHES):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="module")
def nothing_old_to_collect() -> None:
    """For modules that collect garbage before each count: what there is by now is looked through once and not again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _no_progress_bars() -> None:
    """Tests read what our own code writes to stderr."""
    transformers.utils.logging.disable_progress_bar()


@pytest.fixture
def make_base(tmp_path: Path) -> Callable[..., PretrainedFolder]:
    """A tiny checkpoint on disk, a Llama unless said otherwise. Every weight, norm and bias is random: transformers
    starts biases at zero and norms at one, and a test on those could pass by luck."""

    def make(
        *, dtype=torch.float32, shard_size="1GB", name="base", family="llama", extra_config=None, **config
    ) -> PretrainedFolder:
        settings = {
            "vocab_size": 80,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 64,
        }
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **(settings | config)))
        generator = torch.Generator().manual_seed(len(list(model.parameters())))
        for parameter in model.parameters():
            with torch.no_grad():
                parameter.normal_(std=0.3, generator=generator)
        folder = tmp_path / name
        model.to(dtype).save_pretrained(folder, max_shard_size=shard_size)
        if extra_config:
            path = folder / "config.json"
            path.write_text(json.dumps(json.loads(path.read_text()) | extra_config))
        return PretrainedFolder(folder)

    return make
