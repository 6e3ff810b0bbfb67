"""The proof catches every way in which an expanded checkpoint could differ from its base."""

from __future__ import annotations

import json
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from llama_pro_fast.errors import UserError
from llama_pro_fast.expansion import proof as proving
from llama_pro_fast.expansion.manifest import Manifest
from llama_pro_fast.expansion.plan import ExpansionPlan
from llama_pro_fast.expansion.proof import IdentityError, expand_and_prove, prove_identity
from llama_pro_fast.hf.folder import SINGLE_FILE, PretrainedFolder

from .conftest import edit_config, overwrite, tensor_bytes

# Four blocks in two groups: ooXooX. New: 2 (copy of 1) and 5 (copy of 3).


@pytest.fixture
def base(make_base) -> PretrainedFolder:
    return make_base(attention_bias=True, mlp_bias=True)


@pytest.fixture
def expanded(base, expand) -> PretrainedFolder:
    return expand(base)


def test_the_proof_counts_what_it_compared(base, expanded):
    proof = prove_identity(base, expanded)
    assert proof.old_tensors == len(base.entries)
    assert proof.zeroed_tensors == 2 * 4
    assert proof.copied_tensors + proof.zeroed_tensors + proof.old_tensors == len(expanded.entries)
    assert proof.new_blocks == 2
    assert proof.dtype == torch.float32
    assert proof.max_logit_difference == 0.0
    assert proof.logits_skipped is None
    assert "no tokenizer" in proof.random_ids


def test_a_model_too_large_to_load_is_proved_block_by_block(base, expanded, monkeypatch):
    monkeypatch.setattr(proving, "available_memory", lambda: 1000)
    proof = prove_identity(base, expanded)
    assert proof.max_logit_difference is None
    assert "memory" in proof.logits_skipped
    assert proof.new_blocks == 2


@pytest.mark.parametrize(
    "name",
    [
        "model.embed_tokens.weight",
        "lm_head.weight",
        "model.norm.weight",
        "model.layers.0.input_layernorm.weight",
        "model.layers.1.self_attn.o_proj.weight",
        "model.layers.4.mlp.down_proj.bias",
        "model.layers.2.self_attn.q_proj.weight",
        "model.layers.5.post_attention_layernorm.weight",
    ],
)
def test_one_flipped_bit_is_caught(base, expanded, name):
    first = tensor_bytes(expanded, name)[0]
    overwrite(expanded, name, bytes([first ^ 1]))
    with pytest.raises(IdentityError, match=name):
        prove_identity(base, expanded)


@pytest.mark.parametrize("module", ["self_attn.o_proj", "mlp.down_proj"])
@pytest.mark.parametrize("kind", ["weight", "bias"])
def test_a_projection_that_is_not_zero_is_caught(base, expanded, module, kind):
    overwrite(expanded, f"model.layers.5.{module}.{kind}", struct.pack("<f", 1e-30))
    with pytest.raises(IdentityError, match=f"layers.5.{module}.{kind}.*not zero"):
        prove_identity(base, expanded)


def test_zeros_in_the_wrong_block_are_caught(base, expanded):
    name = "model.layers.1.self_attn.o_proj.weight"
    overwrite(expanded, name, bytes(expanded.entries[name].num_bytes))
    with pytest.raises(IdentityError, match=r"layers\.1\.self_attn"):
        prove_identity(base, expanded)


def edit_row(folder: PretrainedFolder, number: int, **changes) -> PretrainedFolder:
    manifest = folder.raw_config["block_expansion"]
    manifest["new_blocks"][number] |= changes
    edit_config(folder.path, block_expansion=manifest)
    return PretrainedFolder(folder.path)


@pytest.mark.parametrize("changes", [{"index": 1}, {"copy_of": 0}, {"zeroed": ["mlp.down_proj"]}, {"zeroed": []}])
def test_a_manifest_that_names_the_wrong_block_is_caught(base, expanded, changes):
    with pytest.raises(IdentityError):
        prove_identity(base, edit_row(expanded, 0, **changes))


def test_a_block_that_is_no_identity_is_caught_though_its_files_agree(base, expanded):
    original = tensor_bytes(base, "model.layers.1.mlp.down_proj.bias")
    for kind in ("weight", "bias"):
        original = tensor_bytes(base, f"model.layers.1.mlp.down_proj.{kind}")
        overwrite(expanded, f"model.layers.2.mlp.down_proj.{kind}", original)
    with pytest.raises(IdentityError, match="block 2: its output is not its input"):
        prove_identity(base, edit_row(expanded, 0, zeroed=["self_attn.o_proj"]))


@pytest.mark.parametrize("extra", [True, False])
def test_a_tensor_too_many_or_too_few_is_caught(base, expanded, extra):
    path = expanded.path / SINGLE_FILE
    tensors = load_file(path)
    if extra:
        tensors["model.layers.6.mlp.up_proj.weight"] = torch.zeros(2)
    else:
        del tensors["model.layers.5.mlp.up_proj.weight"]
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(IdentityError, match="one tensor too many" if extra else "missing"):
        prove_identity(base, PretrainedFolder(expanded.path))


def test_another_dtype_is_caught(base, expanded):
    path = expanded.path / SINGLE_FILE
    tensors = load_file(path)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].bfloat16()
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(IdentityError, match="another type or shape"):
        prove_identity(base, PretrainedFolder(expanded.path))


def test_another_setting_in_the_config_is_caught(base, expanded):
    edit_config(expanded.path, rms_norm_eps=1e-5)
    with pytest.raises(IdentityError, match="rms_norm_eps"):
        prove_identity(base, PretrainedFolder(expanded.path))


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("qwen2", {"layer_types": ["full_attention"] * 6}),
        ("qwen2", {"layer_types": ["full_attention"] * 4 + ["sliding_attention"] * 2}),
        ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 77.0}}),  # where the base names none
    ],
)
def test_a_block_that_attends_to_something_else_is_caught(family, changes, make_base, expand):
    """No text of the proof is longer than a window; the logits of a short one are equal all the same."""
    sliding = {"use_sliding_window": True, "sliding_window": 60, "max_window_layers": 2} if family == "qwen2" else {}
    base = make_base(name="another", family=family, **sliding)
    if family == "llama":
        path = base.path / "config.json"
        path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "rope_parameters"}))
        base = PretrainedFolder(base.path)
    expanded = expand(base, name="another expanded")
    edit_config(expanded.path, **changes)
    with pytest.raises(IdentityError, match=r"is not described as the base.s|rotation .* is not the base.s"):
        prove_identity(base, PretrainedFolder(expanded.path))


def test_another_base_is_caught(base, expanded):
    manifest = expanded.raw_config["block_expansion"]
    for row in (manifest["base"], *manifest["generations"]):
        row["digest"] = "sha256:0"
    edit_config(expanded.path, block_expansion=manifest)
    with pytest.raises(IdentityError, match="another digest"):
        prove_identity(base, PretrainedFolder(expanded.path))


def test_an_unexpanded_model_is_refused(base):
    assert Manifest.from_config(base.raw_config) is None
    with pytest.raises(IdentityError, match="not an expanded model"):
        prove_identity(base, base)


def test_logits_that_differ_are_caught(base, expanded, monkeypatch):
    logits = proving._logits
    monkeypatch.setattr(
        proving,
        "_logits",
        lambda folder, *how: [x + (1e-6 if folder is expanded else 0) for x in logits(folder, *how)],
    )
    with pytest.raises(IdentityError, match="Δlogit"):
        prove_identity(base, expanded)


def test_a_base_that_overflows_is_told_from_a_bad_expansion(base, tmp_path):
    # Finite weights, and a product of two of them that is not.
    for name in ("o_proj", "v_proj"):
        overwrite(base, f"model.layers.0.self_attn.{name}.weight", struct.pack("<f", 3e38) * 64)
    with pytest.raises(UserError, match=r"what block 0 computes is not finite in torch\.float32"):
        expand_and_prove(PretrainedFolder(base.path), tmp_path / "out", ExpansionPlan.from_groups(4, 2))
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize(
    ("limit", "unlimited", "usage", "inactive"),
    [
        ("memory.max", "max", "memory.current", "inactive_file"),
        ("memory/memory.limit_in_bytes", 2**63 - 4096, "memory/memory.usage_in_bytes", "total_inactive_file"),
    ],
    ids=["v2", "v1"],
)
def test_what_a_limited_group_has_taken_is_not_available(tmp_path, limit, unlimited, usage, inactive):
    """Containers are limited so; pages of files not in use count as free, since the kernel gives them back."""
    mib = 2**20
    (tmp_path / limit).parent.mkdir(exist_ok=True)
    (tmp_path / usage).write_text(f"{700 * mib}\n")
    (tmp_path / limit).with_name("memory.stat").write_text(f"rss {500 * mib}\n{inactive} {200 * mib}\n")
    (tmp_path / limit).write_text(f"{unlimited}\n")
    assert proving.available_memory(tmp_path) > 600 * mib, "this machine has too little memory for the test"
    (tmp_path / limit).write_text(f"{1000 * mib}\n")
    assert proving.available_memory(tmp_path) == 500 * mib
