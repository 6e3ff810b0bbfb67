"""What is written for readers that know only the older keys of the rotation leaves it what transformers reads."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from llama_pro_fast.hf.config import read_config, rope_of, with_older_rope_keys

SCALED = {"factor": 4.0, "original_max_position_embeddings": 64}
KINDS = {
    "default": {},
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 4.0},
    "llama3": {**SCALED, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "yarn": {**SCALED, "beta_fast": 16.0, "attention_factor": 1.5},
    "longrope": {**SCALED, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4},
}


def rewritten(folder, raw: dict) -> tuple[dict, object, object]:
    """``raw`` with the older keys, and what transformers reads without and with them."""
    folder.mkdir(exist_ok=True)
    path = folder / "config.json"
    path.write_text(json.dumps(raw))
    before = read_config(path)[1]
    written = with_older_rope_keys(raw, before)
    path.write_text(json.dumps(written))
    after = read_config(path)[1]
    assert with_older_rope_keys(written, after) == written, "a second expansion would change it again"
    return written, before, after


def config_with(family: str = "llama", **rope) -> dict:
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "head_dim": 8, "max_position_embeddings": 256}
    config = AutoConfig.for_model(family, **sizes, num_hidden_layers=2, num_key_value_heads=2).to_diff_dict()
    architecture = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}[family]
    config |= {"architectures": [f"{architecture}ForCausalLM"], "model_type": family}
    return {key: value for key, value in config.items() if "rope" not in key} | rope


def assert_same_angles(before, after) -> None:
    assert rope_of(before) == rope_of(after)
    for length in (32, 200):  # within what the scaled kinds were pretrained for, and beyond it
        positions = torch.arange(length)[None]
        ours, theirs = (LlamaRotaryEmbedding(config)(torch.zeros(1), positions) for config in (before, after))
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("kind", KINDS)
def test_transformers_reads_the_same_rotation(kind, family, tmp_path):
    rope = {"rope_type": kind, "rope_theta": 100_000.0, **KINDS[kind]}
    raw = config_with(family, rope_parameters=rope)
    written, before, after = rewritten(tmp_path / "model", raw)
    assert_same_angles(before, after)
    assert written["rope_theta"] == 100_000.0
    assert written["rope_parameters"] == rope
    assert {key: written[key] for key in raw} == raw
    if kind == "default":
        assert "rope_scaling" not in written
    else:
        assert written["rope_scaling"] == {"rope_type": kind, "type": kind, **KINDS[kind]}
    assert written.get("original_max_position_embeddings") == (64 if kind == "longrope" else None)


LINEAR = {"rope_type": "linear", "factor": 2.0}


@pytest.mark.parametrize(
    ("keys", "added"),
    [
        ({"rope_theta": 5e5}, {}),
        ({"rope_theta": 5e5, "rope_scaling": None}, {}),
        ({"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}}, {}),
        ({"rope_theta": 5e5, "rope_scaling": LINEAR}, {}),
        ({"rope_scaling": LINEAR}, {"rope_theta": 10_000.0}),
        ({}, {"rope_theta": 10_000.0}),
        ({"rope_theta": 5e5, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, {}),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5, "partial_rotary_factor": 1.0}},
         {"rope_theta": 5e5}),
    ],
)  # fmt: skip
def test_what_is_there_stays_and_only_what_is_missing_comes(keys, added, tmp_path):
    raw = config_with(**keys)
    written, before, after = rewritten(tmp_path / "model", raw)
    assert_same_angles(before, after)
    assert written == raw | added


@pytest.mark.parametrize(
    ("keys", "used"),
    [
        # theta of rope_parameters goes before that beside it,
        (
            {"rope_theta": 7.0, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
            {"rope_type": "default", "rope_theta": 5e5},
        ),
        # rope_scaling before all of rope_parameters, its theta included,
        (
            {"rope_scaling": LINEAR, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
            {"rope_theta": 10_000.0, **LINEAR},
        ),
        (
            {"rope_theta": 7.0, "rope_scaling": LINEAR, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
            {"rope_theta": 7.0, **LINEAR},
        ),
        # and a theta in rope_scaling before that beside it.
        ({"rope_theta": 7.0, "rope_scaling": {**LINEAR, "rope_theta": 9.0}}, {"rope_theta": 9.0, **LINEAR}),
    ],
)
def test_where_keys_contradict_each_other_all_say_what_transformers_uses(keys, used, tmp_path):
    written, before, after = rewritten(tmp_path / "model", config_with(**keys))
    assert_same_angles(before, after)
    assert rope_of(before) == used
    assert written["rope_theta"] == used["rope_theta"]
    if "rope_parameters" in keys:
        assert written["rope_parameters"] == used


def test_an_expanded_model_and_one_expanded_again_say_it_both_ways(make_base, expand):
    rope = {"rope_type": "llama3", "rope_theta": 500.0, **KINDS["llama3"], "original_max_position_embeddings": 16}
    base = make_base(rope_parameters=rope)
    assert "rope_theta" not in base.raw_config
    one = expand(base, name="one")
    two = expand(one, name="two")
    for folder in (one, two):
        assert folder.raw_config["rope_theta"] == 500.0
        assert folder.raw_config["rope_scaling"]["type"] == "llama3"
        assert_same_angles(base.config, folder.config)
