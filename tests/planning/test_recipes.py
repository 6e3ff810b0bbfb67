"""Every packaged recipe for a real card is planned here: it fits, and its comment says what the plan says."""

from __future__ import annotations

import re

import pytest

from llama_pro_fast.plan import OWN, question_of
from llama_pro_fast.planning.devices import DEVICES, GIB
from llama_pro_fast.planning.job import recompute_text
from llama_pro_fast.planning.search import best_fit
from llama_pro_fast.recipe import RECIPES, packaged_recipes, parse

LOCAL = ("prose-3m", "quickstart")  # for any machine
PLANNED = re.compile(
    r"#   (?P<card>\S+) +(?P<gib>[\d.]+) GiB  (?P<micro>\d+) x (?P<seq>\d+) tokens at a time  "
    r"recompute (?P<recompute>\w+)  (?P<speed>[\d,]+) tokens/s  (?P<hours>[\d,]+) h"
)
ROWS = [
    (name, row.groupdict())
    for name in packaged_recipes()
    for row in PLANNED.finditer((RECIPES / f"{name}.yaml").read_text(encoding="utf-8"))
]


def planned(*argv):
    question = question_of(parse(list(argv), verb="plan", own=OWN))
    return question, best_fit(question)


@pytest.mark.parametrize(("name", "row"), ROWS, ids=[f"{name}-{row['card']}" for name, row in ROWS])
def test_a_recipe_is_planned_as_its_comment_says(name, row):
    question, found = planned("--config", name, "--gpu", row["card"])
    assert found is not None
    assert found.peak <= question.device.usable
    text = recompute_text(found.recompute, question.job.trained.first)
    assert row == {
        "card": row["card"],
        "gib": f"{found.peak / GIB:.1f}",
        "micro": str(found.micro_batch_size),
        "seq": str(question.job.seq_len),
        "recompute": "mixed" if "." in text else text,
        "speed": f"{1 / found.seconds:,.0f}",
        "hours": f"{question.tokens * found.seconds / 3600:,.0f}",
    }


def test_each_recipe_for_a_card_says_what_it_needs_and_where_its_rate_is_from():
    cards = {name: {row["card"] for other, row in ROWS if other == name} for name in packaged_recipes()}
    assert [name for name, found in cards.items() if not found] == list(LOCAL)
    assert {"h100", "h200"} <= cards["llama-3.1-8b"] | cards["llama-3.1-8b-h200"]
    assert "h100" in cards["qwen3-8b"]
    assert cards["llama-3.2-1b"] == {"4090"}
    for name in cards.keys() - set(LOCAL):
        text = (RECIPES / f"{name}.yaml").read_text(encoding="utf-8")
        assert re.search(r"arXiv|[\w-]+/[\w-]+", text), name
        assert "arm-up" in text, name


def test_eight_blocks_in_an_8b_model_do_not_fit_24_gb():
    """What the README says plainly."""
    question, found = planned("--config", "llama-3.1-8b", "--gpu", "4090")
    assert found is None
    assert question.job.num_trained > 1.7e9


def test_the_docs_show_every_recipe_as_planned():
    root = RECIPES.parent.parent
    page, readme = ((root / name).read_text(encoding="utf-8") for name in ("docs/results.md", "README.md"))
    shown = [line for line in readme.splitlines() if line.startswith("| `")]
    assert len(shown) == 3
    assert all(line in page for line in shown)
    for name, row in ROWS:
        cells = (
            f"{row['gib']} GiB | {row['micro']} x {row['seq']} | {row['recompute']} | {row['speed']} | {row['hours']} |"
        )
        assert f"| `{name}` | {DEVICES[row['card']].title} | {cells}" in page
