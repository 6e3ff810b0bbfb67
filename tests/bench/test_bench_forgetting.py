"""What bench/forgetting.py does next, what it makes of its rows, and what the texts are made of."""

from __future__ import annotations

import base64
import gzip
import json

import pytest
import transformers
from forgetting import METHODS, REPLAY, Asked, best_rate, cost, gain_and_forgotten, summary, wanted
from forgetting_texts import DOMAIN, GENERAL, PAGES, write_texts

BASE = {"method": "base", "loss": dict.fromkeys((*DOMAIN, *GENERAL), 3.0)}


def row(asked: Asked, gain: float, forgotten: float) -> dict:
    losses = dict.fromkeys(DOMAIN, 3.0 - gain) | dict.fromkeys(GENERAL, 3.0 + forgotten)
    return vars(asked) | {"loss": losses}


def test_rates_are_swept_before_anything_rests_on_the_best_one():
    names = ["expansion", "full"]
    rows, order = [BASE], []
    while missing := [a for a in wanted(rows, names) if not any(a.is_row(each) for each in rows[1:])]:
        asked = missing[0]
        order.append(asked)
        # The largest rate gains most and forgets more than that: the middle one is the best.
        place = METHODS[asked.method].rates.index(asked.rate)
        rows.append(row(asked, gain=0.1 * place, forgotten=(0.0, 0.01, 0.2)[place]))
    sweep = order[: 2 * 3]
    assert {(a.replay, a.seed, a.scale) for a in sweep} == {(REPLAY, 0, 1.0)}
    assert [a.method for a in sweep] == names * 3
    for name in names:
        assert best_rate(rows, name) == METHODS[name].rates[1]
        rest = [a for a in order[6:] if a.method == name]
        assert {a.rate for a in rest} == {METHODS[name].rates[1]}
        assert [(a.replay, a.seed, a.scale) for a in rest] == [
            *((REPLAY, seed, 1.0) for seed in (1, 2)),
            (0.0, 0, 1.0),
            *((REPLAY, 0, scale) for scale in (0.25, 0.5, 0.75)),
        ]
    assert len(set(order)) == len(order)


def test_a_table_has_means_over_seeds():
    rows = [BASE, *(row(Asked("full", 1e-4, seed=seed), 0.1 * seed, 0.02) for seed in range(3))]
    assert gain_and_forgotten(rows, rows[2]) == pytest.approx((0.1, 0.02))
    base = transformers.AutoConfig.for_model("llama", num_hidden_layers=30, hidden_size=576, intermediate_size=1536,
                                             num_attention_heads=9, num_key_value_heads=3, vocab_size=49152,
                                             tie_word_embeddings=True)  # fmt: skip
    (line,) = summary(rows, base)
    assert line[-2:] == ("0.86", "0.27")  # of 135 M parameters 6 and 2 FLOPs, and attention
    serve = {name: cost(method, base)[1] / cost(METHODS["full"], base)[1] for name, method in METHODS.items()}
    assert {name for name, ratio in serve.items() if ratio > 1} == {n for n, m in METHODS.items() if m.expand.wanted}
    train = {name: cost(method, base)[0] for name, method in METHODS.items()}
    assert train["blocks"] < train["upper"] < train["expansion"] < train["taught"] < train["full"]
    assert line[:6] == ("full fine-tuning", "0.0001", "0.2", "1", "+0.100 ± 0.100", "+0.020 ± 0.000")


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
