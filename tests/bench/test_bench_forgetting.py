"""What bench/forgetting.py does next, what it makes of its rows, and what the texts are made of."""

from __future__ import annotations

import base64
import gzip
import json

import pytest
import transformers
from forgetting import gflop_per_token
from forgetting_rows import FAST, METHODS, REPLAY, Asked, best_rate, draw, gain_and_forgotten, markdown, summary, wanted
from forgetting_texts import DOMAIN, GENERAL, PAGES, write_texts

BASE = {"method": "base", "loss": dict.fromkeys((*DOMAIN, *GENERAL), 3.0)}


def row(asked: Asked, gain: float, forgotten: float) -> dict:
    losses = dict.fromkeys(DOMAIN, 3.0 - gain) | dict.fromkeys(GENERAL, 3.0 + forgotten)
    return vars(asked) | {"loss": losses, "gflop": {"train": 0.86, "serve": 0.27}}


def test_runs_come_in_the_order_of_their_worth():
    names = ["expansion", "full", "muon"]
    rows, order = [BASE], []
    while missing := [a for a in wanted(rows, names) if not any(a.is_row(each) for each in rows[1:])]:
        asked = missing[0]
        order.append(asked)
        # The largest rate gains most and forgets more than that: the middle one is the best.
        place = sorted({*METHODS[asked.method].rates, FAST}).index(asked.rate)
        rows.append(row(asked, gain=0.1 * place, forgotten=(0.0, 0.01, 0.2, 0.4)[place]))
    middle = {name: sorted(METHODS[name].rates)[1] for name in names}
    assert {name: best_rate(rows, name) for name in names} == middle
    first, sweep, rest = order[:3], order[3:7], order[7:]
    assert {a.method: a.rate for a in first} == middle
    assert {(a.method, a.rate) for a in sweep} | {*middle.items()} == {
        *((name, rate) for name in names[:2] for rate in METHODS[name].rates),
        ("muon", middle["muon"]),
    }
    fast = [a for a in rest if a.rate == FAST and a.method == "expansion"]
    assert fast == [Asked("expansion", FAST, 0.0, n, by) for n in range(3) for by in (1.0, 0.25, 0.5, 0.75)]
    rest = [a for a in rest if a not in fast]
    assert [(a.method, a.replay, a.seed, a.scale) for a in rest] == [
        *((name, REPLAY, seed, 1.0) for seed in (1, 2) for name in names[:2]),
        *((name, 0.0, 0, 1.0) for name in names[:2]),
        *(("expansion", 0.0, seed, scale) for seed in range(3) for scale in (1.0, 0.75) if (seed, scale) != (0, 1.0)),
        *((name, REPLAY, 0, scale) for name in names[:2] for scale in (0.25, 0.5, 0.75)),
        *[("muon", REPLAY, 0, 1.0)] * 2,
    ]
    assert all(a.rate == middle[a.method] for a in rest[:-2])
    assert len(set(order)) == len(order)


def test_a_table_has_means_over_seeds(tmp_path):
    seeds = [row(Asked("full", 1e-4, seed=seed), 0.1 * seed, 0.02) for seed in range(3)]
    rows = [BASE, *seeds, row(Asked("full", 1e-4, scale=0.5), 0.05, 0.0)]
    assert gain_and_forgotten(rows, rows[2]) == pytest.approx((0.1, 0.02))
    half, whole = sorted(summary(rows), key=lambda line: line[3])
    assert whole[:6] == ["full fine-tuning", "0.0001", "0.2", "1", "+0.100 ± 0.248", "+0.020 ± 0.000"]  # 4.303 / √3
    assert half[3:6] == ["0.5", "+0.050", "+0.000"]
    assert whole[6:] == ["-0.100"] * 2 + ["+0.020"] * 3 + ["0.86", "0.27"]


def test_methods_are_told_apart_where_the_seeds_agree(tmp_path):
    rows = [BASE]
    for name, gains in {"expansion": (0.2, 0.3, 0.1), "full": (0.25, 0.36, 0.16), "lora-70": (0.3, 0.1, 0.2)}.items():
        for rate in METHODS[name].rates:
            rows += [row(Asked(name, rate, seed=0), gains[0] - 1000 * abs(rate - METHODS[name].rates[0]), 0.0)]
        rows += [row(Asked(name, METHODS[name].rates[0], seed=seed), gains[seed], 0.02) for seed in (2, 1)]
    rows.append(row(Asked("full", METHODS["full"].rates[0], replay=0.0), 0.5, 0.1))
    rows.append(row(Asked("expansion", METHODS["expansion"].rates[0], replay=0.0), 0.3, 0.1))
    gained = {line.split(" | ")[0]: line.split(" | ")[3] for line in markdown(rows).splitlines()[2:]}
    assert gained == {
        "| new blocks": "+0.200 ± 0.248",
        "| full fine-tuning": "+0.257 ± 0.249 (more)",
        "| LoRA, rank 70": "+0.200 ± 0.248 (tie)",
        "| new blocks, no replay": "+0.300",
        "| full fine-tuning, no replay": "+0.500",
    }
    draw(rows, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000


def test_the_work_of_a_token():
    base = transformers.AutoConfig.for_model("llama", num_hidden_layers=30, hidden_size=576, intermediate_size=1536,
                                             num_attention_heads=9, num_key_value_heads=3, vocab_size=49152,
                                             tie_word_embeddings=True)  # fmt: skip
    work = {name: gflop_per_token(method, base) for name, method in METHODS.items()}
    # Of 135 M parameters 6 and 2 FLOPs, and attention.
    assert work["full"] == {"train": pytest.approx(0.86, abs=5e-3), "serve": pytest.approx(0.27, abs=5e-3)}
    dearer = {name for name in work if work[name]["serve"] > work["full"]["serve"]}
    assert dearer == {name for name, method in METHODS.items() if method.expand.wanted}
    order = ["blocks", "upper", "expansion", "taught", "full"]
    assert sorted(order, key=lambda name: work[name]["train"]) == order


def test_texts_are_split_by_page_and_free_of_markup(tmp_path):
    def put(path: str, content: bytes) -> None:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(content)

    words = "Zeigt alle Dateien, auch die verborgenen. " * 5
    for number in range(60):
        page = f'.\\" a comment\n.TH X 1\n.SH NAME\n\\fBpage{number}\\fP \\- {words}\n.PP\nMehr:\n.B \\-\\-all\n'
        put(PAGES["man"].replace("man?", "man1").replace("*", f"page{number}.1"), gzip.compress(page.encode()))
    html = f"<html><head><title>no</title></head><body><h1>Titel</h1><p>{words}</p><script>no</script></body></html>"
    for what in ("handbook", "reference"):
        put(PAGES[what].replace("*", "one"), html.encode())
    put("usr/share/games/fortunes/wise", f"{words}\n%\n{words.upper()}\n%\n".encode())
    put("usr/share/games/fortunes/wise.dat", b"")

    def number(value: int) -> str:
        return base64.b64encode(value.to_bytes(3)).decode()

    for name in ("jargon", "devil"):
        entry = f"{name}\n {words}".encode()
        put(f"usr/share/dictd/{name}.dict.dz", gzip.compress(b"head" + entry))
        index = f"00databaseinfo\tA\tE\n{name}\t{number(4)}\t{number(len(entry))}\n"
        put(f"usr/share/dictd/{name}.index", index.encode())
    write_texts(tmp_path, tmp_path / "texts")

    def rows(name: str) -> list[str]:
        return [json.loads(line)["text"] for line in (tmp_path / "texts" / f"{name}.jsonl").open(encoding="utf-8")]

    learned, held_out = rows("german"), rows("german-pages")
    assert len(learned) + len(held_out) == 61
    assert held_out
    assert not {*learned} & {*held_out}
    page = next(text for text in learned if text.startswith("NAME"))
    assert page.split("\n") == ["NAME", f"{page.split()[1]} - {words.strip()}", "Mehr: --all"]
    assert rows("german-manual") == [f"Titel\n\n{words.strip()}"]
    assert rows("quotations") == [words.strip(), words.strip().upper()]
    assert rows("devil") == [f"devil\n {words.strip()}"]
    assert len(rows("python")) > 10


def test_a_package_that_is_missing_is_named(tmp_path):
    with pytest.raises(SystemExit, match="man/de"):
        write_texts(tmp_path, tmp_path / "texts")
