"""bench/memory.py's comparison: its law, and a contestant of each kind measured in the small."""

from __future__ import annotations

import copy
from fractions import Fraction

import memory
import miniature
import pytest
from child import in_child


@pytest.fixture(scope="module")
def measured():
    """The smallest there is, 10 layers, each in a process of its own."""
    small = miniature.miniature(1, device="cpu", groups=2)
    names = ("ours", "HF SDPA", "HF SDPA, trained layers checkpointed")
    return small, {name: in_child("cpu", miniature.measure, memory.CONTESTANTS[name], small) for name in names}


def test_a_miniature_keeps_what_the_shapes_say(measured):
    small, rows = measured
    k, config = small.k, small.config
    H, I, N = config.hidden_size, config.intermediate_size, config.num_attention_heads
    a_token = {name: row["kept a token"] for name, row in rows.items()}
    ours = 2 * (2 * H + 4) + 8 * H + 4 * N + 4 * I
    assert a_token["ours"] == {"prefix": 0, "lowest trained": ours, "frozen": ours, "trained": ours}
    # 131,720 at k = 64, of which lse and the norms' rstd do not shrink.
    frozen = Fraction(131_720 - 136, 64) * k + 136
    assert a_token["HF SDPA"]["frozen"] == frozen
    assert a_token["HF SDPA"]["prefix"] == 0
    assert a_token["HF SDPA"]["trained"] > a_token["HF SDPA"]["lowest trained"] > frozen
    checkpointed = {"prefix": 0, "lowest trained": 2 * H, "frozen": frozen, "trained": 2 * H}
    assert a_token["HF SDPA, trained layers checkpointed"] == checkpointed


def test_ours_makes_the_work_that_is_needed_and_hugging_face_a_product_more(measured):
    small, rows = measured
    needed = miniature.needed_work(small)
    assert rows["ours"]["work"] == needed
    # With a norm that trains, autograd wants the gradient of the lowest trained layer's q, k and v products' input.
    qkv = 2 * small.micro_batch * small.seq * 3 * small.config.hidden_size**2
    assert rows["HF SDPA"]["work"] == needed | {"products": needed["products"] + qkv}


def test_the_parts_make_the_peak(measured):
    small, rows = measured
    row = memory.make_row("ours", memory.flat(rows["ours"], small.k), small)
    assert sum(row["parts_bytes"].values()) == row["peak_bytes"] == rows["ours"]["peak"]
    assert all(size > 0 for size in row["parts_bytes"].values())
    assert row["extra_work"] == 0
    assert {kind: row[f"{kind}_flop"] for kind in rows["ours"]["work"]} == rows["ours"]["work"]


def lawful(k: int) -> dict:
    """As measured, with a peak of 7 + 5k + 3k²."""
    return {
        "peak": 7 + 5 * k + 3 * k * k,
        "entry": {"frozen weights": 4 * k * k},
        "kept a token": {"frozen": Fraction(2 * k + 1)},
        "kept besides": {"frozen": Fraction(0)},
        "work": {"products": 9 * k**3},
    }


def test_the_law_is_exact():
    full = memory.at_full_size({k: lawful(k) for k in memory.KS})
    assert full == memory.flat(lawful(miniature.FULL), miniature.FULL)


@pytest.mark.parametrize(
    "where", [("peak",), ("entry", "frozen weights"), ("kept a token", "frozen"), ("work", "products")]
)
@pytest.mark.parametrize("k", memory.KS)
def test_one_byte_off_breaks_it(where, k):
    by_k = {at: copy.deepcopy(lawful(at)) for at in memory.KS}
    *path, last = where
    at = by_k[k]
    for key in path:
        at = at[key]
    at[last] += 1
    with pytest.raises(ValueError, match="NOT LAWFUL"):
        memory.at_full_size(by_k)


def test_a_run_that_breaks_the_law_ends_with_1_and_one_that_fails_is_a_row(monkeypatch, tmp_path, capsys):
    def pretend(device, function, *arguments):
        if function is memory.provenance:
            return {"device": "none"}
        build, small = arguments
        if build is memory.CONTESTANTS["HF eager"]:
            return {"error": "OutOfMemoryError: 10 GiB"}
        classes = ("prefix", "lowest trained", "frozen", "trained")
        found = lawful(small.k) | {
            "peak": 10**8 * small.k**2,
            "kept a token": dict.fromkeys(classes, 1 if small.k < 4 else broken),
            "kept besides": dict.fromkeys(classes, 0),
            "entry": dict.fromkeys(("frozen weights", "masters", "copies", "gradients", "moments"), 2**20 * small.k),
            "work": {"products": 2**32 * small.k**3, "attention": 2**30 * small.k**3},
        }
        return found

    monkeypatch.setattr(memory, "in_child", pretend)
    paths = ["--out", str(tmp_path / "memory.json"), "--picture", str(tmp_path / "memory.png")]
    broken = 1
    assert memory.main(["--device", "cpu", *paths]) == 0
    said = capsys.readouterr().out
    assert "HF eager: OutOfMemoryError: 10 GiB" in said
    assert "HF SDPA + Liger: not run: Liger's kernels need a GPU" in said
    assert max(len(line) for line in said.splitlines() if not line.startswith("written to")) <= 120
    assert (tmp_path / "memory.png").stat().st_size > 10_000
    assert memory.main(["--draw", *paths]) == 0
    broken = 2
    assert memory.main(["--device", "cpu", *paths]) == 1
    assert "NOT LAWFUL: kept a token: prefix at k = 4 is 2, and 1 by k = [1, 2, 3]" in capsys.readouterr().out


def test_the_full_size_is_llama_2_7b():
    config = miniature.miniature(miniature.FULL, device="cpu").config
    assert (config.hidden_size, config.intermediate_size, config.head_dim) == (4096, 11_008, 128)
    assert (config.num_hidden_layers, config.vocab_size, config.max_position_embeddings) == (40, 32_000, 4096)
