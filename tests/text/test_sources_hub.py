"""Data sets of the hub: the files of a subset and a split, from a cache made by hand, or from a hub in pretence."""

from __future__ import annotations

import contextlib
import hashlib
import json
from pathlib import Path

import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub import constants
from hypothesis import given, settings
from hypothesis import strategies as st
from reading import refusal, resolved, texts, write

from llama_pro_fast.errors import UserError
from llama_pro_fast.text.hub import choose_files, read_configs

TWO_SUBSETS = """---
license: mit
configs:
- config_name: en
  data_files:
  - split: train
    path: en/train-*
  - split: test
    path: en/test.jsonl
- config_name: de
  default: {default}
  data_files:
  - split: train
    path: [de/a.csv, "de/b/**"]
  - split: validation
    path: de/dev.csv
---
# A data set
"""


def parquet(*rows: str) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"text": list(rows)}), sink)
    return sink.getvalue().to_pybytes()


def two_subsets(default: bool = False) -> dict[str, bytes]:
    return {
        "README.md": TWO_SUBSETS.format(default=str(default).lower()).encode(),
        ".gitattributes": b"x",
        "en/train-00000-of-00002.parquet": parquet("one"),
        "en/train-00001-of-00002.parquet": parquet("two"),
        "en/test.jsonl": b'{"text": "three"}\n',
        "de/a.csv": b"text\neins\n",
        "de/b/c/d.csv": b"text\nzwei\n",
        "de/dev.csv": b"text\ndrei\n",
        "LICENSE": b"x",
    }


SHA = "5b1d2c3e4f5061728394a5b6c7d8e9f001122334"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The hub's cache, and a way to put files into it, laid out as the hub's client does."""
    root = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(root))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)

    def fill(repository: str, files: dict[str, bytes], sha: str = SHA) -> Path:
        folder = root / f"datasets--{repository.replace('/', '--')}"
        write(folder / "refs" / "main", sha)
        for name, content in files.items():
            blob = write(folder / "blobs" / hashlib.sha256(content).hexdigest(), content)
            link = folder / "snapshots" / sha / name
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(blob)
        return folder / "snapshots" / sha

    return fill


def test_subset_and_split_are_found_in_the_cache(cache):
    cache("org/name", two_subsets())
    assert texts("org/name", subset="en") == ["one", "two"]
    assert texts("org/name", subset="en", split="test") == ["three"]
    assert texts("org/name", subset="de") == ["eins", "zwei"]
    assert texts("org/name", subset="de", split="validation") == ["drei"]
    source = resolved("org/name", subset="en")
    assert source.name == "name-en"
    assert source.describe_not_read() == (
        "LICENSE, README.md, de/a.csv, de/b/c/d.csv, de/dev.csv (another subset), en/test.jsonl (split test)"
    ).replace("de/a.csv, de/b/c/d.csv, de/dev.csv", "3 .csv")
    assert [file.name for file in source.files] == [
        "en/train-00000-of-00002.parquet",
        "en/train-00001-of-00002.parquet",
    ]


def test_the_default_subset_needs_no_name(cache):
    cache("org/name", two_subsets(default=True))
    assert texts("org/name") == ["eins", "zwei"]
    assert resolved("org/name").name == "name"


def test_a_subset_or_split_that_is_not_there_is_refused_with_those_that_are(cache):
    cache("org/name", two_subsets())
    assert "org/name: several subsets, en, de: name one of them with `subset:`" in refusal("org/name")
    assert "no subset 'fr' among en, de" in refusal("org/name", subset="fr")
    assert "no split 'validation' among test, train" in refusal("org/name", subset="en", split="validation")
    cache("org/plain", {"a.jsonl": b'{"text": "a"}\n'})
    assert "no subset 'en'" in refusal("org/plain", subset="en")


def test_without_a_card_the_names_tell_the_splits(cache):
    files = {f"data/{s}-00000-of-00001.parquet": parquet(s) for s in ("train", "test")}
    cache("org/name", files | {"dataset_infos.json": b'{"default": {}}', "README.md": b"no front matter"})
    assert texts("org/name") == ["train"]
    assert texts("org/name", split="test") == ["test"]
    cache("org/one", {"anything.jsonl.gz": b""})
    assert [file.name for file in resolved("org/one").files] == ["anything.jsonl.gz"]


def test_a_copy_of_a_part_serves_that_part(cache):
    """Only what is wanted is downloaded, so the cache holds one split and the card speaks of all."""
    files = two_subsets()
    cache("org/name", {name: files[name] for name in ("README.md", "de/a.csv", "de/b/c/d.csv")})
    assert texts("org/name", subset="de") == ["eins", "zwei"]
    assert "none of the files" in refusal("org/name", subset="en")


def test_a_clone_and_a_folder_of_the_cache_are_read_like_the_data_set(cache, tmp_path):
    snapshot = cache("org/name", two_subsets())
    assert texts(snapshot, subset="en", split="test") == ["three"]
    for name, content in two_subsets().items():
        write(tmp_path / "clone" / name, content)
    assert texts("clone", subset="de") == ["eins", "zwei"]
    assert "several subsets" in refusal("clone")


def test_a_data_sets_own_folder_in_the_cache_stands_for_its_newest_snapshot(cache, tmp_path):
    cache("org/name", {"en/train-00000-of-00001.parquet": parquet("old")}, sha="0" * 40)
    cache("org/name", two_subsets())
    folder = tmp_path / "hub" / "datasets--org--name"
    assert texts(folder, subset="en") == ["one", "two"]
    assert "several subsets, en, de" in refusal(folder)


def test_what_lies_here_comes_before_the_hub(cache, tmp_path):
    cache("org/name", {"a.jsonl": b'{"text": "hub"}\n'})
    assert texts("org/name") == ["hub"]
    write(tmp_path / "org" / "name" / "a.jsonl", [{"text": "here"}])
    assert texts("org/name") == ["here"]


def test_a_script_and_what_is_not_in_the_cache_give_their_reason(cache):
    cache("org/scripted", {"scripted.py": b"import datasets", "README.md": b"x"})
    assert "org/scripted: made by the script scripted.py, which is not run" in refusal("org/scripted")
    cache("org/tools", {"tools.py": b"x", "data.jsonl": b'{"text": "a"}\n'})
    assert texts("org/tools") == ["a"]
    message = refusal("org/unknown")
    assert "org/unknown: no such file or folder" in message
    assert "not in the cache: the hub is switched off by HF_HUB_OFFLINE" in message


@pytest.mark.parametrize("name", ["a/b/c", "org/name.jsonl", "/org/name", "~/name", "org/na me", "name", "./org/name"])
def test_other_paths_are_no_data_sets(cache, name):
    assert "no such file or folder: give a" in refusal(name)


# A hub in pretence


class Hub:
    """Answers as the hub's client does; what is downloaded lands in a folder."""

    def __init__(self, folder: Path, files: dict[str, bytes]) -> None:
        self.folder, self.files = folder, files

    def dataset_info(self, repository):
        assert repository == "org/name"
        siblings = [type("File", (), {"rfilename": name}) for name in self.files]
        return type("Info", (), {"siblings": siblings})

    def hf_hub_download(self, repository, name, *, repo_type):
        assert (repository, repo_type) == ("org/name", "dataset")
        return str(write(self.folder / name, self.files[name]))

    def snapshot_download(self, repository, *, repo_type, allow_patterns=None, local_files_only=False):
        if local_files_only:
            raise FileNotFoundError("no snapshot")
        for name in huggingface_hub.utils.filter_repo_objects(self.files, allow_patterns=allow_patterns):
            write(self.folder / name, self.files[name])
        return str(self.folder)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)

    def pretend(files: dict[str, bytes]) -> Hub:
        made = Hub(tmp_path / "downloaded", files)
        monkeypatch.setattr(huggingface_hub, "HfApi", lambda: made)
        monkeypatch.setattr(huggingface_hub, "hf_hub_download", made.hf_hub_download)
        monkeypatch.setattr(huggingface_hub, "snapshot_download", made.snapshot_download)
        return made

    return pretend


def test_only_the_files_of_the_subset_and_split_are_downloaded(hub):
    made = hub(two_subsets() | {"en/train-[odd]*.parquet": parquet("odd"), "en/train-o.parquet": b"not wanted"})
    assert texts("org/name", subset="en", split="test") == ["three"]
    names = sorted(path.relative_to(made.folder).as_posix() for path in made.folder.rglob("*") if path.is_file())
    assert names == ["README.md", "en/test.jsonl"]
    assert "(another subset)" in resolved("org/name", subset="en").describe_not_read()


def error_of(kind: type[Exception]) -> Exception:
    return kind.__new__(kind, "Client error.\nSecond line")  # its own making wants an answer of a server


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (
            error_of(huggingface_hub.errors.RepositoryNotFoundError),
            ["no such data set on the hub", "hf auth login"],
        ),
        (error_of(huggingface_hub.errors.GatedRepoError), ["gated", "https://huggingface.co/datasets/org/name"]),
        (ConnectionError("Name or service not known\nmore"), ["the hub cannot be reached (Name or service not known)"]),
    ],
)
def test_what_the_hub_refuses_is_said_in_one_line(hub, monkeypatch, error, words):
    made = hub({})

    def refuse(repository):
        raise error

    monkeypatch.setattr(made, "dataset_info", refuse, raising=False)
    message = refusal("org/name")
    assert message.startswith("org/name: ")
    assert all(word in message for word in words), message


def test_without_a_network_the_cache_serves(cache, monkeypatch):
    cache("org/name", {"a.jsonl": b'{"text": "cached"}\n'})
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)

    def unreachable(self, repository):
        raise ConnectionError("Name or service not known")

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", unreachable)
    assert texts("org/name") == ["cached"]


# The same files as `datasets` would take


CARDS = [
    "data_files: data/*.csv",
    "data_files: [data/train-0.csv, en/*.csv]",
    "data_files: [{split: train, path: 'data/train-*'}, {split: test, path: 'data/test*'}]",
    "data_files: [{split: train, path: 'en/**'}, {split: test, path: [data/test-0.csv, data/dev.csv]}]",
    "data_files: [{split: train, path: '**/train-?.csv'}]",
    "data_files: [{split: train, path: 'data/train-[01].csv'}]",
    "data_dir: en",
    "data_dir: data",
]
NAMES = [
    *("data/train-0.csv", "data/train-1.csv", "data/test-0.csv", "data/dev.csv", "en/train-0.csv"),
    *("en/deep/train-2.csv", "en/test.csv", "README.md", "LICENSE"),
]


@pytest.mark.parametrize("card", [*CARDS, None])
def test_the_files_are_those_that_datasets_takes(tmp_path, card):
    import datasets

    names = NAMES if card is not None else ["data/train-0.csv", "data/train-1.csv", "data/test-0.csv", "README.md"]
    for name in names:
        write(tmp_path / "repository" / name, "text\nx\n")
    front = f"---\nconfigs:\n- config_name: some\n  {card}\n---\n" if card else ""
    write(tmp_path / "repository" / "README.md", front)
    builder = datasets.load_dataset_builder(str(tmp_path / "repository"), cache_dir=str(tmp_path / "cache"))
    root = (tmp_path / "repository").resolve().as_posix() + "/"
    theirs = {
        str(split): sorted(f.removeprefix(root) for f in files) for split, files in builder.config.data_files.items()
    }
    configs = read_configs(tmp_path / "repository" / "README.md")
    ours = {split: sorted(choose_files(names, configs, None, split, "x").names) for split in theirs}
    assert ours == theirs


ODD = [None, 1, "x", [1], {"a": 1}, [{"config_name": 1}]] + [
    [{"config_name": "x", "data_files": files}] for files in (1, [1], [{"split": "a"}], [{"path": 3}], "a/**b", "[", {})
]


@settings(max_examples=50)
@given(
    st.text(alphabet="-\n: {}[]configs_name", max_size=60),
    st.sampled_from(ODD),
)
def test_no_card_is_a_crash(tmp_path_factory, text, configs):
    path = tmp_path_factory.getbasetemp() / "README.md"
    for content in (text, f"---\n{text}\n---\n", f"---\n{json.dumps({'configs': configs})}\n---\n"):
        write(path, content)
        assert isinstance(read_configs(path), dict)
        with contextlib.suppress(UserError):
            choose_files(["a.jsonl"], read_configs(path), None, None, "x")
