"""Data sets of the Hugging Face hub: which files belong to a subset and a split, downloaded to the hub's cache.

A repository is a list of names and a README.md, whose `configs:` say which files are which subset and split; without
them names tell the split, as in any folder. So nothing but the files that are wanted is downloaded, and a copy in the
cache, or a clone given as a folder, is read like the repository.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from llama_pro_fast.errors import UserError
from llama_pro_fast.files import first_line
from llama_pro_fast.text.folders import (
    SIDE,
    UNKNOWN,
    Chosen,
    NotRead,
    choose,
    choose_split,
    format_of,
    is_hidden,
    is_side_file,
)
from llama_pro_fast.text.places import local_folder

CARD = "README.md"
ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")


def is_id(path: str) -> bool:
    """Whether ``path`` may be a data set's name, ``organisation/name``."""
    return ID.fullmatch(path) is not None and len(path) <= 96 and format_of(path) is None


def hub_folder(repository: str, subset: str | None, split: str | None) -> tuple[Path, Chosen]:
    """The data set's folder in the hub's cache, with the files of a subset and a split in it, and their names.

    Raises:
        UserError: there is no such data set, subset or split; or it cannot be reached and is not in the cache.
    """
    from huggingface_hub import HfApi, constants, errors, hf_hub_download, snapshot_download

    if constants.HF_HUB_OFFLINE:
        return _cached(repository, subset, split, "the hub is switched off by HF_HUB_OFFLINE")
    try:
        names = [file.rfilename for file in HfApi().dataset_info(repository).siblings or ()]
        _refuse_script(repository, names)
        configs = {}
        if CARD in names:
            configs = read_configs(Path(hf_hub_download(repository, CARD, repo_type="dataset")))
        chosen = choose_files(names, configs, subset, split, repository)
        patterns = [re.sub(r"([*?[])", r"[\1]", name) for name in (CARD, *chosen.names)]
        folder = snapshot_download(repository, repo_type="dataset", allow_patterns=patterns)
    except errors.GatedRepoError as error:
        page = f"https://huggingface.co/datasets/{repository}"
        raise UserError(f"{repository}: gated: accept its terms at {page}, then `hf auth login`") from error
    except errors.RepositoryNotFoundError as error:
        raise UserError(
            f"{repository}: no such file or folder, and no such data set on the hub (of a private one: `hf auth login`)"
        ) from error
    except UserError:
        raise
    except Exception as error:  # no network, in the words of several libraries
        return _cached(repository, subset, split, f"the hub cannot be reached ({first_line(error)})")
    return Path(folder), chosen


def snapshot_of(folder: Path) -> Path:
    """Of a data set's folder in the hub's cache (``datasets--org--name``) the newest snapshot; any other as it is."""
    reference = folder / "refs" / "main"
    if folder.name.startswith("datasets--") and reference.is_file():
        snapshot = folder / "snapshots" / reference.read_text().strip()
        return snapshot if snapshot.is_dir() else folder
    return folder


def _cached(repository: str, subset: str | None, split: str | None, reason: str) -> tuple[Path, Chosen]:
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(repository, repo_type="dataset", local_files_only=True))
    except Exception as error:
        raise UserError(
            f"{repository}: no such file or folder, and as a data set of the hub it is not in the cache: {reason}"
        ) from error
    names = local_folder(folder)
    _refuse_script(repository, names)
    return folder, choose_files(names, read_configs(folder / CARD), subset, split, repository)


def _refuse_script(repository: str, names: Sequence[str]) -> None:
    script = f"{repository.rpartition('/')[2]}.py"
    if script in names and not any(format_of(name) not in (None, "code", "txt") for name in names):
        raise UserError(f"{repository}: made by the script {script}, which is not run: give files, or another data set")


def read_configs(card: Path) -> dict[str, dict[str, Any]]:
    """The subsets that a data set's card describes, by name; none where it describes none, or is not there."""
    try:
        text = card.read_text(encoding="utf-8", errors="replace")
        front = yaml.safe_load(text.split("---", 2)[1]) if text.startswith("---") else None
        return {str(config["config_name"]): config for config in (front or {}).get("configs") or ()}
    except (OSError, IndexError, KeyError, AttributeError, TypeError, yaml.YAMLError):
        return {}


def choose_files(
    names: Sequence[str], configs: dict[str, dict[str, Any]], subset: str | None, split: str | None, where: str
) -> Chosen:
    """Of a data set's files those of a subset and a split.

    Args:
        names: of all files, relative to the data set.
        configs: as :func:`read_configs` found them.
        subset, split: those that are asked for; by default the only or default subset, and ``train``.

    Raises:
        UserError: there is no such subset or split, or it holds no text.
    """
    names = sorted(name for name in names if not is_hidden(name))
    if not configs:
        if subset is not None:
            raise UserError(f"{where}: no subset {subset!r}, it has only one: leave `subset:` out")
        return choose(names, split, where)
    config = configs[_subset(configs, subset, where)]
    inside = (config.get("data_dir") or "").strip("./")
    names_inside = [name for name in names if not inside or name.startswith(f"{inside}/")]
    outside = [NotRead(name, _why_outside(name)) for name in names if name not in set(names_inside)]
    if (listed := config.get("data_files")) is None:
        chosen = choose(names_inside, split, where)
        return chosen._replace(not_read=[*outside, *chosen.not_read])
    found = {}
    try:
        for of_split, pattern in _patterns(listed):
            matches = re.compile(_regex(f"{inside}/{pattern}" if inside else pattern))
            found |= {name: of_split for name in names if matches.fullmatch(name) and not is_side_file(name)}
    except (KeyError, TypeError, ValueError, re.error) as error:
        raise UserError(f"{where}: its README.md says `data_files: {listed}`, which names no files") from error
    unreadable = [NotRead(name, UNKNOWN) for name in found if format_of(name) is None]
    others = [NotRead(name, _why_outside(name)) for name in names if name not in found]
    found = {name: of_split for name, of_split in sorted(found.items()) if format_of(name) is not None}
    if not found:
        raise UserError(f"{where}: none of the files its README.md names for this subset is there and can be read")
    if split is None and set(found.values()) != {"train"}:
        split = "train"
    return choose_split(list(found), found, split, where, [*others, *unreadable])


def _subset(configs: dict[str, Any], subset: str | None, where: str) -> str:
    among = ", ".join(configs)
    if subset is not None:
        if subset not in configs:
            raise UserError(f"{where}: no subset {subset!r} among {among}: name one of them with `subset:`")
        return subset
    default = [name for name, config in configs.items() if config.get("default")]
    if not default and "default" in configs:
        default = ["default"]
    if len(default or configs) > 1:
        raise UserError(f"{where}: several subsets, {among}: name one of them with `subset:`")
    return next(iter(default or configs))


def _why_outside(name: str) -> str:
    return SIDE if is_side_file(name) else "another subset"


def _patterns(listed: str | list[Any]) -> Iterator[tuple[str, str]]:
    """(split, pattern) of `data_files`: one pattern, or a list of them, or of splits with theirs."""
    for entry in [listed] if isinstance(listed, str) else listed:
        split, patterns = ("train", entry) if isinstance(entry, str) else (entry["split"], entry["path"])
        for pattern in [patterns] if isinstance(patterns, str) else patterns:
            yield str(split), pattern


def _regex(pattern: str) -> str:
    from fsspec.utils import glob_translate

    return glob_translate(str(PurePosixPath(pattern.removeprefix("./"))))
