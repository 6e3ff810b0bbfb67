"""Every family, from a checkpoint on disk to a deeper one that stock transformers loads: read, expanded, trained,
exported, and the same function in both."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from llama_pro_fast.errors import UserError
from llama_pro_fast.hf.families import FAMILIES, block_spec
from llama_pro_fast.hf.folder import PretrainedFolder
from llama_pro_fast.hf.loading import load_model
from llama_pro_fast.model.batch import PackedBatch
from llama_pro_fast.training.run import run_training

SLIDING = {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 2}
GROUPS = {"groups": 2}
ACROSS = {"groups": None, "after": "1,3", "copies": 2}  # ooXXooXX, from 0 1 0 1 2 3 2 3
TABLE = {  # family and config, the expansion, and what the blocks of the expanded model must see
    "llama": ({"family": "llama"}, GROUPS, [None] * 6),
    "llama, biases": ({"family": "llama", "attention_bias": True, "mlp_bias": True}, GROUPS, [None] * 6),
    "mistral": ({"family": "mistral", "sliding_window": None}, GROUPS, [None] * 6),
    "mistral, window": ({"family": "mistral", "sliding_window": 6}, GROUPS, [6] * 6),
    "qwen2": ({"family": "qwen2", "tie_word_embeddings": True}, GROUPS, [None] * 6),
    "qwen2, windows": ({"family": "qwen2"} | SLIDING, GROUPS, [None] * 3 + [6] * 3),
    "qwen3": ({"family": "qwen3", "head_dim": 16}, GROUPS, [None] * 6),
    "qwen3, windows": (
        {"family": "qwen3", "head_dim": 16, "attention_bias": True} | SLIDING,
        GROUPS,
        [None] * 3 + [6] * 3,
    ),
    "qwen3, a window from block 1 on, copies of both kinds": (
        {"family": "qwen3", "head_dim": 16} | SLIDING | {"max_window_layers": 1},
        ACROSS,
        [None, 6, None, 6, 6, 6, 6, 6],
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", TABLE)
@pytest.mark.usefixtures("read_back")
def test_loads_expands_trains_exports_and_reloads(name, base_of, make_config, tmp_path):
    config, expand, windows = TABLE[name]
    base = base_of(**config)
    as_old_checkpoints_have_it(base)
    run_training(make_config(model={"path": str(base)}, expand=expand))
    run = tmp_path / "run"

    original, expanded, exported = (PretrainedFolder(path) for path in (base, run / "expanded", run / "export"))
    assert [block_spec(exported.config, index).window for index in range(len(windows))] == windows
    assert expanded.raw_config.get("layer_types") == exported.raw_config.get("layer_types")
    changed = {name for name in expanded.entries if expanded.digest(name) != exported.digest(name)}
    new = tuple(f"model.layers.{index}." for index in ((2, 5) if expand is GROUPS else (2, 3, 6, 7)))
    assert changed == {name for name in expanded.entries if name.startswith(new)}
    summary = json.loads((run / "report" / "summary.json").read_text())
    assert summary["export_check"]["equal"] == summary["export_check"]["compared"] > 0

    documents = [list(range(3, 27)), [5, 9, 2]]
    batch, logits = PackedBatch.from_documents(documents), {}
    for folder in (original, expanded, exported):
        model = AutoModelForCausalLM.from_pretrained(folder.path, dtype=torch.float32, attn_implementation="eager")
        assert type(model).__name__ == FAMILIES[config["family"]].architecture
        with torch.no_grad():
            theirs = torch.cat([model(torch.tensor([document])).logits[0] for document in documents])
            ours = load_model(folder, attention="reference", max_length=32).logits(batch)
        assert (ours - theirs).norm() / theirs.norm() < 1e-5
        logits[folder] = theirs
    assert torch.equal(logits[original], logits[expanded])
    assert not torch.allclose(logits[expanded], logits[exported], atol=1e-3)


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def as_old_checkpoints_have_it(folder):
    """Without `layer_types`: published Qwen2.5 and Qwen3 leave them to `max_window_layers`."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config.pop("layer_types", None)
    path.write_text(json.dumps(config))


def test_a_rule_on_the_blocks_number_follows_the_blocks(base_of, make_config, tmp_path):
    """Older readers know `max_window_layers` only: it moves with the first block that has a window."""
    base = base_of(family="qwen2", **SLIDING)
    run_training(make_config(model={"path": str(base)}, train={"steps": 1}))
    config = json.loads((tmp_path / "run" / "expanded" / "config.json").read_text())
    assert config["layer_types"] == ["full_attention"] * 3 + ["sliding_attention"] * 3
    assert config["max_window_layers"] == 3


@pytest.mark.slow
def test_a_window_shorter_than_the_sequences_chooses_the_backend(base_of, make_config, tmp_path):
    base = base_of(family="mistral", sliding_window=16)
    for seq_len, attention in ((16, "cpu_flash"), (32, "reference")):
        config = make_config(
            model={"path": str(base)}, train={"steps": 1, "seq_len": seq_len}, output=str(tmp_path / str(seq_len))
        )
        run_training(config)
        assert f"attention: {attention}" in (tmp_path / str(seq_len) / "config.yaml").read_text()


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": "gemma2", "architectures": ["Gemma2ForCausalLM"]},
        {"architectures": ["LlamaForSequenceClassification"]},
        {"model_type": "qwen2"},
        {"model_type": ["llama"]},
        {"architectures": 3},
        {"architectures": None},
    ],
)
def test_an_unknown_family_is_refused_with_the_list(changes, base_of):
    base = base_of()
    edit_config(base, **changes)
    with pytest.raises(UserError) as caught:
        PretrainedFolder(base)
    for family, row in FAMILIES.items():
        assert f"{row.architecture} ({family})" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("family", "changes", "words"),
    [
        (
            "qwen3",
            {"layer_types": ["full_attention", "chunked_attention"] * 2},
            "block 1 is chunked_attention, which is",
        ),
        ("qwen2", {"layer_types": ["sliding_attention"] * 4}, "block 0 is sliding_attention and there is no window"),
        ("qwen2", {"layer_types": ["full_attention"] * 3}, "(4) must be equal to the number of `layer_types` (3)"),
        ("mistral", {"layer_types": None}, "takes this mistral for a ministral, which is not supported; remove"),
        ("mistral", {"sliding_window": 0}, "sliding_window 0: a query sees itself, so at least 1"),
        ("qwen2", {"rope_parameters": {"rope_type": "mrope", "rope_theta": 1e4}}, "rope_type mrope is not supported"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "default", "rope_theta": None}},
            "rope_theta None is not a number above 0",
        ),
        (
            "llama",
            {
                "rope_parameters": {
                    "rope_type": "linear",
                    "factor": 2.0,
                    "rope_theta": 1e4,
                    "partial_rotary_factor": 0.5,
                }
            },
            "partial_rotary_factor 0.5 is not supported",
        ),
        ("llama", {"hidden_act": "gelu"}, "hidden_act gelu is not supported"),
    ],
)
def test_what_a_config_says_and_the_block_has_not_is_refused(family, changes, words, base_of):
    base = base_of(family=family)
    edit_config(base, **changes)
    with pytest.raises(UserError) as caught:
        PretrainedFolder(base)
    assert words in str(caught.value)
    assert str(base / "config.json") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_null_and_an_alias_are_no_reason_to_refuse(base_of):
    base = base_of()
    edit_config(base, quantization_config=None, hidden_act="swish")
    PretrainedFolder(base)
