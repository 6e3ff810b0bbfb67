from __future__ import annotations

from pathlib import Path

import pytest
from preparing_in_a_process import a_tokenizer
from preparing_texts import TEXTS, Made, write_rows
from transformers import PreTrainedTokenizerFast


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return a_tokenizer(model_max_length=4)


@pytest.fixture
def cache(tmp_path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def rows(tmp_path) -> Path:
    return write_rows(tmp_path / "rows.jsonl", TEXTS)


@pytest.fixture
def made(monkeypatch) -> Made:
    return Made(monkeypatch)
