"""An expanded checkpoint is the base, deeper: same bytes, same logits, in stock transformers."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from llama_pro_fast.digests import combined_digest
from llama_pro_fast.expansion.manifest import Manifest
from llama_pro_fast.expansion.plan import ExpansionPlan
from llama_pro_fast.expansion.proof import prove_identity
from llama_pro_fast.expansion.rewrite import block_tensor_name, split_name
from llama_pro_fast.hf.folder import INDEX_FILE, SINGLE_FILE, PretrainedFolder

from .conftest import save_tokenizer, tensor_bytes

BIASED = {"attention_bias": True, "mlp_bias": True}


def stock_logits(folder: PretrainedFolder) -> torch.Tensor:
    """Logits of stock transformers, which must find every tensor it wants and no other."""
    model, info = AutoModelForCausalLM.from_pretrained(folder.path, dtype="auto", output_loading_info=True)
    assert not any(info.values()), info
    input_ids = torch.randint(80, (2, 33), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model.eval()(input_ids).logits


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("shard_size", "config"),
    [
        ("1GB", BIASED),
        ("6KB", BIASED),
        ("6KB", {"tie_word_embeddings": True}),
        ("1GB", {"num_key_value_heads": 4, "attention_bias": True}),
        ("1GB", {"num_key_value_heads": 1, "mlp_bias": True, "num_hidden_layers": 5}),
    ],
    ids=["biases", "sharded", "tied", "attention-bias", "mlp-bias-uneven"],
)
def test_logits_of_stock_transformers_are_the_bases(make_base, expand, dtype, shard_size, config):
    base = make_base(dtype=dtype, shard_size=shard_size, **config)
    expanded = expand(base)
    before, after = stock_logits(base), stock_logits(expanded)
    assert expanded.config.num_hidden_layers == base.config.num_hidden_layers + 2
    assert before.dtype == after.dtype == dtype
    assert torch.isfinite(before).all()
    assert torch.equal(before, after)


def test_every_tensor_is_the_bases_or_a_copy_or_zero_even_where_numbers_share_a_prefix(make_base, expand):
    base = make_base(num_hidden_layers=13, **BIASED)
    plan = ExpansionPlan.from_after(13, [1, 3, 12], 2)
    expanded = expand(base, plan)
    seen = set()
    for name in base.entries:
        if split_name(name) is None:
            assert tensor_bytes(expanded, name) == tensor_bytes(base, name)
            seen.add(name)
    for index, (source, new) in enumerate(zip(plan.sources, plan.is_new, strict=True)):
        for name in base.entries:
            if name.startswith(f"model.layers.{source}."):
                rest = name.removeprefix(f"model.layers.{source}.")
                ours = block_tensor_name(index, rest)
                seen.add(ours)
                original = tensor_bytes(base, name)
                zeroed = new and ("o_proj" in rest or "down_proj" in rest)
                assert tensor_bytes(expanded, ours) == (bytes(len(original)) if zeroed else original)
    assert seen == set(expanded.entries)


def test_names_are_split_at_the_whole_number():
    assert split_name("model.layers.12.mlp.up_proj.weight") == (12, "mlp.up_proj.weight")
    assert split_name("model.layers.2") is None
    assert split_name("model.layers_2.1.weight") is None
    assert split_name("model.norm.weight") is None


def test_shards_keep_their_names_and_new_blocks_lie_with_what_they_copy(make_base, expand):
    base = make_base(shard_size="6KB", dtype=torch.bfloat16)
    plan = ExpansionPlan.from_groups(4, 2)
    expanded = expand(base, plan)
    assert len(base.files) > 2
    assert expanded.files == base.files
    for name, entry in expanded.entries.items():
        split = split_name(name)
        source = name if split is None else block_tensor_name(plan.sources[split[0]], split[1])
        assert (entry.file, entry.dtype) == (base.entries[source].file, "BF16")
    index = json.loads((expanded.path / INDEX_FILE).read_text())
    assert index["weight_map"] == {name: entry.file for name, entry in expanded.entries.items()}
    assert index["metadata"]["total_size"] == sum(entry.num_bytes for entry in expanded.entries.values())
    for file in expanded.files:
        with safe_open(expanded.path / file, framework="pt") as shard:
            assert shard.metadata() == {"format": "pt"}


def test_a_single_file_stays_single(make_base, expand):
    expanded = expand(make_base())
    assert expanded.files == [SINGLE_FILE]
    assert not (expanded.path / INDEX_FILE).exists()


def test_a_second_generation(make_base, expand):
    base = make_base(**BIASED)
    first = expand(base, name="first")
    second = expand(first, ExpansionPlan.from_after(6, [0, 2]), name="second")
    manifest = Manifest.from_config(second.raw_config)
    assert [model.name for model in manifest.generations] == ["base", "first"]
    assert [model.digest for model in manifest.generations] == [
        combined_digest({name: folder.digest(name) for name in folder.entries}) for folder in (base, first)
    ]
    assert manifest.trained_blocks == (1, 4)
    assert [(block.index, block.copy_of, block.generation) for block in manifest.new_blocks] == [
        (1, 0, 2),
        (3, 1, 1),
        (4, 2, 2),
        (7, 3, 1),
    ]
    assert torch.equal(stock_logits(base), stock_logits(second))


def test_config_lists_grow_and_everything_else_stays(make_base, expand):
    extra = {
        "eos_token_id": [1, 2, 3, 4],
        "layer_types": ["full_attention"] * 4,
        "marks_per_layer": [0, 1, 2, 3],
        "_name_or_path": "org/parent",
    }
    base = make_base(extra_config=extra)
    expanded = expand(base, ExpansionPlan.from_after(4, [1]))
    changed = {"num_hidden_layers", "layer_types", "marks_per_layer", "_name_or_path", "block_expansion"}
    assert expanded.raw_config["layer_types"] == ["full_attention"] * 5
    assert expanded.raw_config["marks_per_layer"] == [0, 1, 1, 2, 3]
    assert "_name_or_path" not in expanded.raw_config
    assert Manifest.from_config(expanded.raw_config).base.name == "base"
    for key, value in base.raw_config.items():
        assert key in changed or expanded.raw_config[key] == value
    assert expanded.raw_config.keys() - base.raw_config.keys() == {"block_expansion", "rope_theta"}


def test_companions_come_along_and_the_proof_reads_text(make_base, expand):
    base = make_base(vocab_size=300)
    save_tokenizer(base.path)
    (base.path / "LICENSE.txt").write_text("terms")
    (base.path / "optimizer.pt").write_text("not part of the model")
    expanded = expand(base)
    assert (expanded.path / "LICENSE.txt").read_text() == "terms"
    assert not (expanded.path / "optimizer.pt").exists()
    assert AutoTokenizer.from_pretrained(expanded.path)("naïve")["input_ids"] == base.tokenizer()("naïve")["input_ids"]
    assert prove_identity(base, expanded).random_ids is None


def test_rotary_frequencies_of_old_checkpoints_are_copied(make_base, expand):
    base = make_base()
    add_tensor(base, "model.layers.3.self_attn.rotary_emb.inv_freq", torch.arange(2.0))
    base = PretrainedFolder(base.path)
    expanded = expand(base)
    for index in (4, 5):
        name = f"model.layers.{index}.self_attn.rotary_emb.inv_freq"
        assert torch.equal(expanded.tensor(name), torch.arange(2.0))


def add_tensor(folder: PretrainedFolder, name: str, tensor: torch.Tensor) -> None:
    from safetensors.torch import load_file, save_file

    path = folder.path / SINGLE_FILE
    save_file(load_file(path) | {name: tensor}, path, {"format": "pt"})
