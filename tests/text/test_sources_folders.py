"""Which files of a folder are its text: told by their names, and what is left out is listed."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_pro_fast.errors import UserError
from llama_pro_fast.text.folders import choose, describe, format_of


def chosen(names: str, split: str | None = None) -> list[str]:
    return choose(names.split(), split, "folder").names


def refusal(names: str, split: str | None = None) -> str:
    with pytest.raises(UserError) as caught:
        chosen(names, split)
    return str(caught.value)


@pytest.mark.parametrize(
    ("names", "read"),
    [
        ("a.jsonl b.txt c.md d.json", "a.jsonl"),
        (
            "a.jsonl.gz b.csv c.tsv d.parquet e.arrow f.ndjson g.txt",
            "a.jsonl.gz b.csv c.tsv d.parquet e.arrow f.ndjson",
        ),
        ("data.csv main.py", "data.csv"),
        ("data.csv main.py util.py", "main.py util.py"),
        ("data.csv notes.txt more.txt", "data.csv"),
        ("a.json b.json c.txt", "a.json b.json"),
        ("a.json b.txt", "b.txt"),
        ("package.json tsconfig.json main.ts", "main.ts"),
        ("a.json", "a.json"),
        ("a.txt b.md c.rst d.py", "a.txt b.md c.rst d.py"),
        ("src/a.py test/b.py train.py docs/index.md", "docs/index.md src/a.py test/b.py train.py"),
        ("a.JSONL b.Txt", "a.JSONL"),
    ],
)
def test_a_folder_is_read_as_one_kind(names, read):
    assert chosen(names) == read.split()


SIDE = (
    "README README.md readme.txt LICENSE LICENSE.txt LICENSE-MIT LICENCE.md COPYING NOTICE NOTICE.txt CHANGELOG.md "
    "CITATION.cff CONTRIBUTING.rst requirements.txt requirements-dev.txt CMakeLists.txt robots.txt dataset_info.json "
    "dataset_infos.json dataset_dict.json state.json config.json tokenizer.json tokenizer_config.json vocab.txt "
    "vocab.json model.safetensors.index.json node_modules/a/index.js src/__pycache__/a.txt package.json"
)


@pytest.mark.parametrize("name", SIDE.split())
@pytest.mark.parametrize("beside", ["a.jsonl", "b/a.txt", "a.json"])
def test_side_files_are_not_read_and_are_listed(name, beside):
    for place in (name, f"deep/{name}"):
        found = choose([place, beside, "third.json" if beside.endswith("json") else beside], None, "folder")
        assert place not in found.names
        assert place in [entry.name for entry in found.not_read]


def test_what_only_begins_like_a_side_file_is_text():
    for name in ("readmission.txt", "licensees.txt", "license.py", "licenses.jsonl", "notice.parquet", "myconfig.json"):
        assert chosen(name) == [name]


def test_hidden_files_are_neither_read_nor_listed():
    found = choose([".a.txt", ".git/b.txt", "c/.d/e.txt", "f.txt"], None, "folder")
    assert (found.names, found.not_read) == (["f.txt"], [])


def test_what_is_not_read_is_told_in_a_line():
    names = "a.jsonl LICENSE.txt requirements.txt 1.png 2.png 3.png Makefile x.tar.gz y.txt z.txt train/no.bin"
    assert describe(choose(names.split(), None, "folder").not_read) == (
        "LICENSE.txt, requirements.txt, 3 .png, Makefile, train/no.bin, x.tar.gz, y.txt, z.txt (beside rows)"
    )
    assert describe([]) == ""


NAME = st.lists(st.sampled_from(["a", "train", "test", ".b", "README", "src", "dev"]), min_size=1, max_size=3)
ENDING = st.sampled_from([".jsonl", ".txt", ".json", ".py", ".gz", "", ".csv.gz", ".png", ".parquet"])


@settings(max_examples=150)
@given(st.sets(st.tuples(NAME, ENDING).map(lambda pair: "/".join(pair[0]) + pair[1]), min_size=1))
def test_every_file_that_is_not_hidden_is_read_or_listed_once(names):
    try:
        found = choose(names, None, "folder")
    except UserError:
        return
    told = [*found.names, *(entry.name for entry in found.not_read)]
    assert sorted(told) == sorted(name for name in names if not name.startswith(".") and "/." not in name)
    assert found.names
    assert all(format_of(name) for name in found.names)


# Splits


@pytest.mark.parametrize(
    ("names", "read"),
    [
        ("train.jsonl test.jsonl", "train.jsonl"),
        ("data/train.jsonl data/valid.jsonl", "data/train.jsonl"),
        ("data/train-00000-of-00002.parquet data/train-00001-of-00002.parquet data/test-00000-of-00001.parquet",
         "data/train-00000-of-00002.parquet data/train-00001-of-00002.parquet"),
        ("data/train-00000-of-00001-a09b74b3ef9c3b56.parquet data/test-00000-of-00001-b09b74b3ef9c3b56.parquet",
         "data/train-00000-of-00001-a09b74b3ef9c3b56.parquet"),
        ("train/data-00000-of-00001.arrow test/data-00000-of-00001.arrow", "train/data-00000-of-00001.arrow"),
        ("train/a.txt dev/b.txt", "train/a.txt"),
        ("wiki.train.txt wiki.test.txt wiki.valid.txt", "wiki.train.txt"),
        ("news_train.csv.gz news_dev.csv.gz", "news_train.csv.gz"),
        ("train.json eval.json", "train.json"),
        ("training.jsonl testing.jsonl", "training.jsonl"),
        ("part-0.jsonl part-1.jsonl test.jsonl val.jsonl", "part-0.jsonl part-1.jsonl"),
        # No split, or one that is all there is:
        ("train.jsonl", "train.jsonl"),
        ("test.jsonl", "test.jsonl"),
        ("train-0.jsonl train-1.jsonl extra.jsonl", "extra.jsonl train-0.jsonl train-1.jsonl"),
        ("web-dev.jsonl news.jsonl", "news.jsonl web-dev.jsonl"),
        ("train_stations.jsonl latest.jsonl", "latest.jsonl train_stations.jsonl"),
        ("testament.txt validity.txt trains.txt", "testament.txt trains.txt validity.txt"),
    ],
)  # fmt: skip
def test_a_folder_with_several_splits_gives_train(names, read):
    found = choose(names.split(), None, "folder")
    assert found.names == read.split()
    assert sorted(entry.name for entry in found.not_read) == sorted(set(names.split()) - set(read.split()))


@pytest.mark.parametrize(
    ("names", "split", "read"),
    [
        ("train.jsonl test.jsonl", "test", "test.jsonl"),
        ("train.jsonl valid.jsonl", "validation", "valid.jsonl"),
        ("train.jsonl validation.jsonl", "dev", "validation.jsonl"),
        ("train.jsonl eval.jsonl", "eval", "eval.jsonl"),
        ("test.jsonl", "test", "test.jsonl"),
        ("a/train.jsonl b/train.jsonl b/test.jsonl", "train", "a/train.jsonl b/train.jsonl"),
        ("train_sft-00000-of-00001.parquet test_sft-00000-of-00001.parquet", "train_sft",
         "train_sft-00000-of-00001.parquet"),
    ],
)  # fmt: skip
def test_a_split_is_given_by_its_name(names, split, read):
    assert chosen(names, split) == read.split()


def test_a_split_that_is_not_there_is_refused_with_those_that_are():
    assert refusal("train.jsonl test.jsonl", "dev").endswith(
        "no split 'dev' among test, train: name one of them with `split:`"
    )
    assert "no split 'train' among test, val" in refusal("test.jsonl val.jsonl")
    assert "no split 'test'" in refusal("a.jsonl b.jsonl", "test")
    assert "`split_by:`" in refusal("a.jsonl b.jsonl", "test")


def test_a_folder_without_text_says_what_is_there():
    message = refusal("a.png b.png c.png README.md")
    assert message.startswith("folder: the folder holds no file with text (README.md, 3 .png): put .jsonl")
