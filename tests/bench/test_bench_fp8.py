"""Eight bits in backward, measured on the packaged base by bench/fp8.py: as accurate as is promised; and the bench."""

from __future__ import annotations

import argparse

import fp8
import pytest
import torch

from llama_pro_kernels import quantize_e4m3

WAYS = ("bf16", "backward", "e5m2", "forward too")


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """Gradients of the three new blocks of the packaged base after a few steps, in bf16 and in bf16 with eight bits."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fp8, "WAYS", {name: fp8.WAYS[name] for name in WAYS})
        patch.setattr(fp8, "SEQ_LEN", 64)
        options = argparse.Namespace(device="cpu", model="builtin:prose-3m", groups=3, steps=2)
        return fp8.gradients(options, tmp_path_factory.mktemp("gradients"))


@pytest.mark.slow
def test_gradients_of_new_blocks_point_where_float32s_do(measured):
    rows = {row["way"]: row for row in measured["rows"]}
    assert rows["backward"]["cosine"] >= 0.999
    assert rows["backward"]["least_cosine"][0] >= 0.999
    assert rows["bf16"]["error"] < rows["backward"]["error"] < 0.04
    assert len(rows["backward"]["tensors"]) == 3 * 6
    # With a bit of mantissa less.
    assert rows["backward"]["error"] < 0.7 * rows["e5m2"]["error"]
    # What is not built: the base itself moves.
    assert rows["forward too"]["error"] > 2 * rows["backward"]["error"]


@pytest.mark.slow
def test_errors_grow_with_the_frozen_blocks_above_and_stay_within_the_bound(measured):
    depth = measured["depth"]
    assert [row["frozen_above"] for row in depth] == [0, 2, 4]
    assert measured["within_bound"]
    top, *lower = depth
    assert top["backward"] == pytest.approx(top["bf16"], rel=0.01), "nothing frozen is above the top block"
    for row in lower:
        assert row["bf16"] < row["backward"] <= row["bound"] < 0.2
    assert [share > 0 for share in measured["branch_shares"]] == [False] * 3 + [True, True, False, True, True, False]


def test_what_is_imitated_is_the_rounding_of_the_op():
    x = torch.randn(5, 64) * torch.logspace(-6, 2, 5)[:, None]
    codes, scales = quantize_e4m3(x)
    assert torch.equal(fp8.Imitated().rounded(x, "row"), codes.float() * scales[:, None])
    whole, parts = (fp8.Imitated().rounded(x, over) for over in ("all", 16))
    errors = [((y - x).norm(dim=1) / x.norm(dim=1)).tolist() for y in (whole, parts)]
    assert errors[0][0] > 10 * errors[1][0], "of one scale for all, the smallest row is lost"


@pytest.mark.slow
def test_the_products_are_rows_and_the_sums_are_right(tmp_path):
    rows = {row["way"]: row for row in fp8.products(argparse.Namespace(device="cpu"), tmp_path)["rows"]}
    assert {"bf16", "e4m3 by row", "e4m3 by row, fast sums", "e4m3 by tensor", "cast apart"} <= rows.keys()
    for way in ("bf16", "e4m3 by row"):
        assert rows[way]["us"] > 0
        assert rows[way]["error"] < 2**-8
    assert rows["to float32"]["error"] < 2**-20
