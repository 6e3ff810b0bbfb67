"""Every family, from a checkpoint on disk to a deeper one that stock transformers loads: read, expanded, trained,
exported, and the same function in both."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from llama_pro_fast import train
from llama_pro_fast.batch import PackedBatch
from llama_pro_fast.errors import UserError
from llama_pro_fast.families import FAMILIES, BlockSpec
from llama_pro_fast.model import load_model
from llama_pro_fast.pretrained import PretrainedFolder

SLIDING = {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 2}
TABLE = {  # family and config, and what the blocks of the expanded model (ooXooX) must see
    "llama": ({"family": "llama"}, [None] * 6),
    "llama, biases": ({"family": "llama", "attention_bias": True, "mlp_bias": True}, [None] * 6),
    "mistral": ({"family": "mistral", "sliding_window": None}, [None] * 6),
    "mistral, window": ({"family": "mistral", "sliding_window": 6}, [6] * 6),
    "qwen2": ({"family": "qwen2", "tie_word_embeddings": True}, [None] * 6),
    "qwen2, windows": ({"family": "qwen2"} | SLIDING, [None, None, None, 6, 6, 6]),
    "qwen3": ({"family": "qwen3", "head_dim": 16}, [None] * 6),
    "qwen3, windows": ({"family": "qwen3", "head_dim": 16, "attention_bias": True} | SLIDING, [None] * 3 + [6] * 3),
}


@pytest.mark.parametrize("name", TABLE)
def test_loads_expands_trains_exports_and_reloads(name, base_of, make_config, tmp_path):
    config, windows = TABLE[name]
    base = base_of(**config)
    as_old_checkpoints_have_it(base)
    train.run(make_config(model={"path": str(base)}))
    run = tmp_path / "run"

    original, expanded, exported = (PretrainedFolder(path) for path in (base, run / "expanded", run / "export"))
    assert [BlockSpec.from_config(exported.config, index).window for index in range(6)] == windows
    assert expanded.raw_config.get("layer_types") == exported.raw_config.get("layer_types")
    changed = {name for name in expanded.entries if expanded.digest(name) != exported.digest(name)}
    assert changed == {name for name in expanded.entries if name.startswith(("model.layers.2.", "model.layers.5."))}
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


def as_old_checkpoints_have_it(folder):
    """Without `layer_types`: published Qwen2.5 and Qwen3 leave them to `max_window_layers`."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config.pop("layer_types", None)
    path.write_text(json.dumps(config))


def test_a_rule_on_the_blocks_number_follows_the_blocks(base_of, make_config, tmp_path):
    """Older readers know `max_window_layers` only: it moves with the first block that has a window."""
    base = base_of(family="qwen2", **SLIDING)
    train.run(make_config(model={"path": str(base)}, train={"steps": 1}))
    config = json.loads((tmp_path / "run" / "expanded" / "config.json").read_text())
    assert config["layer_types"] == ["full_attention"] * 3 + ["sliding_attention"] * 3
    assert config["max_window_layers"] == 3


def test_a_window_shorter_than_the_sequences_chooses_the_backend(base_of, make_config, tmp_path):
    base = base_of(family="mistral", sliding_window=16)
    for seq_len, attention in ((16, "cpu_flash"), (32, "reference")):
        config = make_config(
            model={"path": str(base)}, train={"steps": 1, "seq_len": seq_len}, output=str(tmp_path / str(seq_len))
        )
        train.run(config)
        assert f"attention: {attention}" in (tmp_path / str(seq_len) / "config.yaml").read_text()


def test_an_unknown_family_is_refused_with_the_list(base_of):
    base = base_of()
    path = base / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_type": "gemma2", "architectures": ["Gemma2X"]}))
    with pytest.raises(UserError) as caught:
        PretrainedFolder(base)
    for family, row in FAMILIES.items():
        assert f"{row.architecture} ({family})" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_unknown_kind_of_attention_is_refused(base_of):
    base = base_of(family="qwen3", head_dim=16)
    path = base / "config.json"
    config = json.loads(path.read_text())
    config["layer_types"] = ["full_attention", "chunked_attention"] * 2
    path.write_text(json.dumps(config))
    with pytest.raises(UserError, match="block 1 is chunked_attention, which is not supported"):
        PretrainedFolder(base)
