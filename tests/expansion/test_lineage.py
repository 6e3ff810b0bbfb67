"""Which of the models that an expanded one was made from are still in it: by digests, whatever the manifest says."""

from __future__ import annotations

import copy
import json
import shutil
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from llama_pro_fast.errors import UserError
from llama_pro_fast.expansion.lineage import difference, intact_bases, model_identity
from llama_pro_fast.expansion.plan import ExpansionPlan
from llama_pro_fast.hf.folder import SINGLE_FILE, PretrainedFolder

from .conftest import edit_config, overwrite, tensor_bytes

FIRST = ExpansionPlan.from_groups(4, 2)  # ooXooX
SECOND = ExpansionPlan.from_after(6, [0, 2])  # oXooXooo: new 1 and 4, older 3 and 7
THIRD = ExpansionPlan.from_after(8, [7])  # oooooooo X: new 8


def add_noise(folder: PretrainedFolder, *blocks: int) -> PretrainedFolder:
    """As if these blocks had trained (again)."""
    for name in folder.entries:
        if any(name.startswith(f"model.layers.{block}.") for block in blocks):
            flipped = bytes(byte ^ 1 for byte in tensor_bytes(folder, name)[:1])
            overwrite(folder, name, flipped)
    return PretrainedFolder(folder.path)


def edit_manifest(folder: PretrainedFolder, **rows) -> PretrainedFolder:
    """``index_2=1`` changes where the row of block 2 says that it stands."""
    manifest = copy.deepcopy(folder.raw_config["block_expansion"])
    by_index = {row["index"]: row for row in manifest["new_blocks"]}
    for name, value in rows.items():
        key, index = name.rsplit("_", 1)
        by_index[int(index)][key] = value
    edit_config(folder.path, block_expansion=manifest)
    return PretrainedFolder(folder.path)


@pytest.mark.parametrize(
    "kind",
    [
        {},
        {"shard_size": "8KB"},
        {"dtype": torch.bfloat16},
        {"tie_word_embeddings": True},
        {"family": "qwen2"},
    ],
    ids=str,
)
def test_the_base_of_new_blocks_that_trained_is_intact(kind, make_base, expand):
    expanded = expand(make_base(**kind), FIRST)
    assert intact_bases(expanded) == (True,)
    assert intact_bases(add_noise(expanded, 2, 5)) == (True,)


def test_a_model_that_was_never_expanded_has_no_base(make_base):
    assert intact_bases(make_base()) == ()


def test_of_several_generations_each_has_its_own_answer(make_base, expand):
    one = add_noise(expand(make_base(), FIRST, "one"), 2, 5)
    two = add_noise(expand(one, SECOND, "two"), 1, 4)
    assert intact_bases(two) == (True, True)
    three = expand(two, THIRD, "three")
    assert intact_bases(three) == (True, True, True)
    assert intact_bases(add_noise(three, 8)) == (True, True, True)
    assert intact_bases(add_noise(three, 4)) == (True, True, False)
    assert intact_bases(add_noise(three, 7)) == (True, False, False)
    assert intact_bases(add_noise(three, 0)) == (False, False, False)


@pytest.mark.parametrize(
    "name",
    ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight", "model.layers.4.self_attn.q_proj.weight"],
)
def test_one_number_in_one_frozen_tensor_is_enough(name, make_base, expand):
    expanded = expand(make_base(), FIRST)
    overwrite(expanded, name, struct.pack("<f", 1.25))
    assert intact_bases(PretrainedFolder(expanded.path)) == (False,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_tuned_whole_elsewhere_is_told_apart(dtype, make_base, expand, tmp_path):
    expanded = expand(make_base(), FIRST)
    model = AutoModelForCausalLM.from_pretrained(expanded.path)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    model.to(dtype).save_pretrained(tmp_path / "tuned")
    tuned = PretrainedFolder(tmp_path / "tuned")
    assert tuned.raw_config["block_expansion"] == expanded.raw_config["block_expansion"]
    assert intact_bases(tuned) == (False,)


@pytest.mark.parametrize("stored", [False, True], ids=["head not stored", "head stored"])
def test_saved_anew_by_transformers_it_is_the_same(stored, make_base, expand, tmp_path):
    """Which writes other shards, and of a tied head nothing."""
    base = make_base(tie_word_embeddings=True)
    if stored:
        tensors = load_file(base.path / SINGLE_FILE)
        head = {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}
        save_file(tensors | head, base.path / SINGLE_FILE, {"format": "pt"})
        base = PretrainedFolder(base.path)
    expanded = expand(base, FIRST)
    assert ("lm_head.weight" in expanded.entries) == stored
    AutoModelForCausalLM.from_pretrained(expanded.path).save_pretrained(tmp_path / "anew", max_shard_size="8KB")
    anew = PretrainedFolder(tmp_path / "anew")
    assert "lm_head.weight" not in anew.entries
    assert intact_bases(anew) == (True,)
    overwrite(anew, "model.embed_tokens.weight", struct.pack("<f", 1.25))
    assert intact_bases(PretrainedFolder(anew.path)) == (False,)


def test_rotary_frequencies_that_old_files_store_are_part_of_it(make_base, expand):
    base = make_base()
    tensors = load_file(base.path / SINGLE_FILE)
    more = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.arange(2.0) + i for i in range(4)}
    save_file(tensors | more, base.path / SINGLE_FILE, {"format": "pt"})
    assert intact_bases(add_noise(expand(PretrainedFolder(base.path), FIRST), 2, 5)) == (True,)


@pytest.mark.parametrize("rows", [{"index_2": 1}, {"index_5": 4}, {"index_2": 0, "index_5": 3}], ids=str)
@pytest.mark.parametrize("trained", [False, True])
def test_an_index_edited_in_the_manifest_is_found(rows, trained, make_base, expand):
    expanded = expand(make_base(), FIRST)
    if trained:
        add_noise(expanded, 2, 5)
    assert intact_bases(edit_manifest(expanded, **rows)) == (False,)


def test_generations_traded_in_the_manifest_are_found(make_base, expand):
    two = expand(add_noise(expand(make_base(), FIRST, "one"), 2, 5), SECOND, "two")
    traded = edit_manifest(two, generation_1=1, copy_of_1=0, generation_3=2, copy_of_3=2)
    # All new blocks are still the new ones; which of them came last is not.
    assert intact_bases(traded) == (True, False)


def test_blocks_renumbered_in_the_files_are_found(make_base, expand):
    expanded = expand(make_base(), FIRST)
    path = expanded.path / SINGLE_FILE
    swap = {"0": "1", "1": "0"}
    renamed = {}
    for name, tensor in load_file(path).items():
        parts = name.split(".")
        if parts[1] == "layers":
            parts[2] = swap.get(parts[2], parts[2])
        renamed[".".join(parts)] = tensor
    save_file(renamed, path, {"format": "pt"})
    assert intact_bases(PretrainedFolder(expanded.path)) == (False,)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda row: row.pop("digest"), "'digest'"),
        (lambda row: row.update(digest=None), "no text"),
        (lambda row: row.update(digest=5), "no text"),
        (lambda row: row.update(name=["a"]), "no text"),
    ],
)
def test_a_manifest_without_a_digest_is_refused(change, message, make_base, expand):
    expanded = expand(make_base(), FIRST)
    manifest = copy.deepcopy(expanded.raw_config["block_expansion"])
    for row in (manifest["base"], *manifest["generations"]):
        change(row)
    edit_config(expanded.path, block_expansion=manifest)
    with pytest.raises(UserError, match="block_expansion") as caught:
        intact_bases(PretrainedFolder(expanded.path))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


# -- the same model as before ---------------------------------------------------------------------------------------


def identity_after(folder: PretrainedFolder, change=lambda config: None):
    """As JSON gives it back, of a folder whose config.json was changed."""
    path = folder.path / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))
    return json.loads(json.dumps(model_identity(PretrainedFolder(folder.path))))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda c: c["rope_parameters"].update(rope_theta=500000.0),
            "rope_parameters.rope_theta was 10000.0 and is 500000.0 in config.json",
        ),
        (lambda c: c.update(rope_theta=5e5), "rope_theta was 10000.0 and is 500000.0 in config.json"),
        (lambda c: c.update(rms_norm_eps=1e-5), "rms_norm_eps was 1e-06 and is 1e-05 in config.json"),
        (lambda c: c.pop("hidden_act"), 'hidden_act was "silu" and is gone from config.json'),
        (lambda c: c.update(extra=[1]), "extra was not there and is [1] in config.json"),
        (
            lambda c: c["block_expansion"]["new_blocks"][0].update(index=1),
            "block_expansion.new_blocks.0.index was 2 and is 1 in config.json",
        ),
        (lambda c: c.update(dtype="bfloat16"), 'dtype was "float32" and is "bfloat16" in config.json'),
        (lambda c: c.update(rms_norm_eps=float("nan")), "rms_norm_eps was 1e-06 and is NaN in config.json"),
    ],
)
def test_what_has_changed_in_the_config_is_named(change, said, make_base, expand):
    expanded = expand(make_base(), FIRST)
    then = identity_after(expanded)
    assert difference(then, identity_after(expanded)) is None
    now = identity_after(expanded, change)
    assert difference(then, now) == said
    assert difference(now, identity_after(expanded)) is None


def test_who_wrote_the_config_and_how_is_no_difference(make_base, expand, tmp_path):
    expanded = expand(make_base(), FIRST)
    then = identity_after(expanded)

    def rewritten(config):
        config.update(transformers_version="9.9", _name_or_path="elsewhere", rope_theta=10000)
        config["bos_token_id"] = config.pop("bos_token_id")  # another order

    moved = Path(shutil.copytree(expanded.path, tmp_path / "moved"))
    assert difference(then, identity_after(PretrainedFolder(moved), rewritten)) is None


def test_other_weights_are_a_difference(make_base, expand):
    expanded = expand(make_base(), FIRST)
    then = identity_after(expanded)
    assert "weights" in difference(then, identity_after(add_noise(expanded, 5)))


def test_a_long_value_is_cut(make_base):
    base = make_base()
    said = difference(identity_after(base), identity_after(base, lambda c: c.update(extra=list(range(1000)))))
    assert len(said) < 200
    assert "\n" not in said
