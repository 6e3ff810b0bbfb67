"""What config.json says of an expansion, and what is refused when it says it wrongly."""

from __future__ import annotations

import copy

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_pro_fast.errors import UserError
from llama_pro_fast.expansion.manifest import ZEROED, Manifest, ModelId, NewBlock
from llama_pro_fast.expansion.plan import ExpansionPlan
from llama_pro_fast.expansion.rewrite import expanded_config

FIRST = ExpansionPlan.from_groups(4, 2)  # ooXooX
SECOND = ExpansionPlan.from_after(6, [0, 2])  # oXooXooo; the first generation moves from 2 and 5 to 3 and 7
ORIGINAL = ModelId("base", "sha256:0", 4)
EXPANDED = ModelId("expanded", "sha256:1", 6)


def twice_expanded() -> Manifest:
    return Manifest.of_expansion(Manifest.of_expansion(None, ORIGINAL, FIRST), EXPANDED, SECOND)


def config_of(manifest: Manifest, num_layers: int) -> dict:
    return {"num_hidden_layers": num_layers, "block_expansion": manifest.to_config()}


def test_the_first_generation():
    manifest = Manifest.of_expansion(None, ORIGINAL, FIRST)
    assert manifest.base == ORIGINAL
    assert manifest.generations == (ORIGINAL,)
    assert manifest.new_blocks == (NewBlock(2, 1, ZEROED, 1), NewBlock(5, 3, ZEROED, 1))
    assert manifest.trained_blocks == (2, 5)


def test_a_second_generation_moves_the_first_and_freezes_it():
    manifest = twice_expanded()
    assert SECOND.trained.strip == ".XooXooo"
    assert manifest.base == ORIGINAL
    assert manifest.generations == (ORIGINAL, EXPANDED)
    assert manifest.new_blocks == (
        NewBlock(1, 0, ZEROED, 2),
        NewBlock(3, 1, ZEROED, 1),
        NewBlock(4, 2, ZEROED, 2),
        NewBlock(7, 3, ZEROED, 1),
    )
    assert manifest.trained_blocks == (1, 4)


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(1, 4), st.integers(1, 2)), min_size=1, max_size=4))
def test_any_chain_of_generations_survives_the_config(chain):
    depth, config, manifest = 8, {"num_hidden_layers": 8}, None
    for groups, copies in chain:
        plan = ExpansionPlan.from_groups(depth, groups, copies)
        manifest = Manifest.of_expansion(manifest, ModelId(f"m{depth}", "sha256:", depth), plan)
        config, depth = expanded_config(config, plan, manifest), plan.num_layers
        assert Manifest.from_config(config) == manifest
        assert manifest.trained_blocks == plan.new_indices
    assert manifest.base.num_hidden_layers == 8
    assert len(manifest.new_blocks) == depth - 8


def test_a_model_that_was_never_expanded_has_none():
    assert Manifest.from_config({"num_hidden_layers": 4}) is None


def broken(path: str, value) -> dict:
    config = copy.deepcopy(config_of(twice_expanded(), 8))
    *parents, last = path.split(".")
    place = config["block_expansion"]
    for key in parents:
        place = place[int(key)] if key.isdigit() else place[key]
    if value is None:
        del place[last]
    else:
        place[last] = value
    return config


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("format_version", 2, "format version 2"),
        ("format_version", None, "no format_version"),
        ("base", None, "lacks base"),
        ("new_blocks", None, "lacks new_blocks"),
        ("base.digest", None, "'digest'"),
        ("new_blocks.0.copy_of", None, "'copy_of'"),
        ("new_blocks.0.zeroed", None, "lacks zeroed"),
        ("new_blocks.0.index", 8, "names block 8 and the model has 8"),
        ("new_blocks.0.index", -1, "names block -1"),
        ("new_blocks.0.index", "4", "no whole number"),
        ("new_blocks.0.index", 3, "names block 3 twice"),
        ("new_blocks.0.generation", 3, "in a generation, 3"),
        ("new_blocks.0.generation", 0, "in a generation, 0"),
        ("new_blocks.0.generation", 1, "does not add up"),
        ("new_blocks.1.copy_of", 4, "copies 4, which its base did not have"),
        ("new_blocks", [], "names no new block"),
        ("base.name", "another", "not the first generation's"),
        ("new_blocks", 3, "block_expansion"),
        ("scale", [1.0], "1 scales for 2 generations"),
        ("scale", [1.0, "half"], "a scale that is no number"),
        ("scale", [1.0, float("nan")], "a scale that is no number"),
    ],
)
def test_a_manifest_that_contradicts_itself_is_refused(path, value, message):
    with pytest.raises(UserError, match="block_expansion") as caught:
        Manifest.from_config(broken(path, value))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_only_lists_with_one_entry_per_layer_grow():
    config = {
        "num_hidden_layers": 2,
        "eos_token_id": [1, 2],
        "layer_types": ["full_attention", "sliding_attention"],
        "no_rope_layers": [1, 0],
        "layers_of_interest": [0],
        "_name_or_path": "org/base",
        "rope_theta": 1e4,
    }
    plan = ExpansionPlan.from_after(2, [0], 1)
    manifest = Manifest.of_expansion(None, ModelId("b", "sha256:", 2), plan)
    expanded = expanded_config(config, plan, manifest)
    assert expanded.pop("block_expansion") == manifest.to_config()
    assert expanded == {
        "num_hidden_layers": 3,
        "eos_token_id": [1, 2],
        "layer_types": ["full_attention", "full_attention", "sliding_attention"],
        "no_rope_layers": [1, 1, 0],
        "layers_of_interest": [0],
        "rope_theta": 1e4,
    }
