"""Faults of a tokenizer that would train a worse model without an error."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import pytest
from tokenizers import Tokenizer, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from llama_pro_fast.hf.config import resolve
from llama_pro_fast.text.tokenizer_checks import warnings

CONFIG = SimpleNamespace(eos_token_id=1)


@pytest.fixture
def folder(tmp_path):
    shutil.copytree(resolve("builtin:prose-3m"), tmp_path / "base")
    return tmp_path / "base"


def test_a_sound_tokenizer_is_passed_over(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer("leaves settings behind", truncation=True, max_length=4)
    assert not list(warnings(tokenizer, folder, CONFIG))


def test_a_tokenizer_without_eos_is_named_with_the_configs(folder):
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    del settings["eos_token"]
    path.write_text(json.dumps(settings))
    (line,) = warnings(AutoTokenizer.from_pretrained(folder), folder, CONFIG)
    assert "names no EOS" in line
    assert "`eos_token`: '<|end_of_text|>'" in line


def test_another_pre_tokenizer_than_the_files_is_noticed(folder):
    other = Tokenizer.from_file(str(folder / "tokenizer.json"))
    other.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(), pre_tokenizers.ByteLevel()])
    loaded = PreTrainedTokenizerFast(tokenizer_object=other, eos_token="<|end_of_text|>")
    (line,) = warnings(loaded, folder, CONFIG)
    assert "other tokens" in line
    assert "PreTrainedTokenizerFast" in line
