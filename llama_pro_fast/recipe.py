"""From a command line and YAML files to a checked :class:`RunConfig`, and back to the ``config.yaml`` of a run.

jsonargparse does the parsing; its messages, which span many lines, become one here.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import difflib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml

from llama_pro_fast.cli import PROGRAM
from llama_pro_fast.config import RunConfig, Source, options
from llama_pro_fast.errors import UserError
from llama_pro_fast.resume import CONFIG_NAME, stored_config

RECIPES = Path(__file__).parent / "recipes"
FLAGS = ("config", "resume", "from_step", "overwrite")  # of the command line only
TEXTS = ("data.domain", "data.general")
OF_PLAN = ("gpu", "price", "json")  # beside all of the others


@dataclass(frozen=True)
class Request:
    """What a command line asks for.

    Attributes:
        config: the recipe; with ``resume`` the stored one, and what may change as the command line has it.
        resume, overwrite: what to do about a folder that holds a run already.
        auto: whether to start or go on was left to what is there.
        from_step: the checkpoint to go on from; None for the last.
        own: the verb's own options by name.
    """

    config: RunConfig
    resume: bool
    overwrite: bool
    auto: bool
    from_step: int | None
    own: dict[str, Any]


def new_parser(verb: str, description: str) -> Any:
    """A jsonargparse parser of ``llama-pro-fast VERB``; the text under each field of config.py is the option's help."""
    # Imported here: benches build a RunConfig in Python and run where jsonargparse is not installed.
    from jsonargparse import ArgumentParser, set_parsing_settings

    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    return ArgumentParser(prog=f"{PROGRAM} {verb}", description=description, exit_on_error=False, allow_abbrev=False)


def parse(
    argv: list[str],
    *,
    verb: str = "train",
    description: str = "Train the new blocks of an expanded model (or expand a base first), evaluate, export, report.",
    own: Mapping[str, dict[str, Any]] = MappingProxyType({}),
    takes: Mapping[str, str | None] | None = None,
) -> Request:
    """Read a command line of ``train``, or of a verb that takes the same options.

    With ``--resume`` the configuration is the stored one, with what may change as the command line has it.

    Args:
        own: the verb's own options, by name, and what argparse is told of them; arguments are in capitals.
        takes: of the options of ``train`` those that mean something to the verb, with their help where it is another.
            The others are refused on the command line; a recipe may hold them. By default all, and what a run is told
            beside them (``resume``, ``from_step``, ``overwrite``).

    Raises:
        UserError: unknown key, wrong type, unreadable recipe.
    """
    parser = new_parser(verb, description)
    parser.add_argument(
        "--config",
        action="config",
        help="A YAML recipe with the same keys, or the name of one in the package "
        f"({', '.join(packaged_recipes())}); later options win.",
    )
    if takes is None:
        _add_flags(parser)
    for name, settings in own.items():
        parser.add_argument(name if name.isupper() else f"--{name}", **settings)
    parser.add_class_arguments(RunConfig, nested_key=None)
    if takes is not None:
        _leave(parser, takes, argv)

    _check_no_source_keys(argv)
    argv = list(_with_recipe_paths(argv))
    for option, following in pairwise([*argv, ""]):
        if option == "--config":
            _check_recipe(Path(following))
    with one_line_errors([*FLAGS, *own, *_keys()] if takes is None else ["config", *own, *takes]):
        given = parser.parse_args(argv, defaults=False)
        full = parser.instantiate(parser.parse_args(argv))
    config = RunConfig(**{f.name: full[f.name] for f in dataclasses.fields(RunConfig)})
    _check_no_list(config)
    config = absolute(config)
    if takes is not None:
        return Request(config, False, False, False, None, {name: full[name] for name in own})
    auto, resume, overwrite = full["resume"] == "auto", full["resume"] is not None, bool(full["overwrite"])
    if auto and not (config.output and (Path(config.output) / CONFIG_NAME).exists()):
        resume = False
    if resume or (auto and overwrite):
        config = stored_config(config, [key for key, _ in _flatten(given.as_dict())], overwrite=overwrite)
    if full["from_step"] is not None and not resume:
        there = f"there is no run in {config.output} yet" if auto else "give --resume too"
        raise UserError(f"--from_step: says where to go on from; {there}")
    return Request(config, resume, overwrite, auto, full["from_step"], {name: full[name] for name in own})


def _add_flags(parser: Any) -> None:
    parser.add_argument(
        "--resume",
        nargs="?",
        const="yes",
        choices=("yes", "auto"),
        help="Go on with the run in `output`, from its last checkpoint; `auto` starts it where there is none yet.",
    )
    parser.add_argument("--from_step", type=int, help="With --resume: go on from the checkpoint of this step instead.")
    parser.add_argument("--overwrite", action="store_true", help="Delete what is in `output` first.")


def _leave(parser: Any, takes: Mapping[str, str | None], argv: Sequence[str]) -> None:
    """Hide the options of ``train`` that are not taken, and refuse them on the command line."""
    known = {prefix for key in _keys() for prefix in (key, key.partition(".")[0])}
    for action in parser._actions:
        if action.dest in takes:
            action.help = takes[action.dest] or action.help
        elif action.dest.removesuffix(".help") in known:
            action.help = argparse.SUPPRESS
    for part in argv:
        key = part.removeprefix("--").partition("=")[0]
        if part.startswith("--") and key in known and key not in takes:
            raise UserError(f"--{key}: means nothing here; leave it out (`{parser.prog} --help` lists what does)")


@contextlib.contextmanager
def one_line_errors(known: Sequence[str]) -> Iterator[None]:
    """Turn jsonargparse's errors into one line.

    Args:
        known: the options there are, to name the nearest one.

    Raises:
        UserError: in place of an ArgumentError.
    """
    try:
        yield
    except argparse.ArgumentError as error:
        raise UserError(_one_line(str(error), known)) from error


def packaged_recipes() -> list[str]:
    """Names of the recipes in the package, for `--config`."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def _with_recipe_paths(argv: list[str]) -> Iterator[str]:
    """The command line with `--config=X` as `--config X`, and names of packaged recipes as their files.

    A file of that name in the current folder wins.
    """
    is_value = False
    for part in argv:
        if part.startswith("--config="):
            yield "--config"
            part, is_value = part.partition("=")[2], True
        if is_value and not Path(part).is_file() and part in packaged_recipes():
            part = str(RECIPES / f"{part}.yaml")
        yield part
        is_value = part == "--config"


def _check_recipe(path: Path) -> None:
    """A recipe's keys, before the parser sees them: here the file's name and the nearest right key are at hand."""
    try:
        recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(
            f"--config: there is no file {path}; give a YAML recipe, or one of {', '.join(packaged_recipes())}"
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--config {path}: cannot be read ({error}); give a YAML recipe") from error
    except yaml.YAMLError as error:
        raise UserError(f"--config {path}: not YAML: {_one_line(str(error))}") from error
    if not isinstance(recipe, dict):
        raise UserError(f"--config {path}: not a recipe (keys and values); see the README for one")
    for key, value in _flatten(recipe):
        if key not in _keys():
            raise UserError(f"--config {path}: {_unknown(key, _keys())}")
        if key in TEXTS and isinstance(value, list):
            _check_sources(f"--config {path}: {key}", value)


def _check_sources(where: str, rows: list[Any]) -> None:
    fields = [f.name for f in dataclasses.fields(Source)]
    for row in rows:
        for name in row if isinstance(row, dict) else [str(row)]:
            if name not in fields or not isinstance(row, dict) or "path" not in row:
                raise UserError(f"{where}: a source has {', '.join(fields)} (path at least), got {row}")


def _check_no_source_keys(argv: Sequence[str]) -> None:
    """Refuse a key of a source as an option of its own: which source would be meant?"""
    for word in argv:
        if found := re.match(r"--(data\.(?:domain|general))\.(\w+)", word):
            option, key = found.groups()
            raise UserError(f'--{option}.{key}: belongs to a source: --{option} "[{{path: FILE, {key}: ...}}]"')


def _check_no_list(config: RunConfig) -> None:
    """Refuse what is meant as a list of sources and is none: to the parser any text is a path."""
    for key in TEXTS:
        value = getattr(config.data, key.removeprefix("data."))
        if not isinstance(value, str) or not value.lstrip().startswith(("[{", "{")) or os.path.exists(value):
            continue
        try:
            rows = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise UserError(f"--{key}: {value} is no list of sources: {_one_line(str(error))}") from error
        if not isinstance(rows, list):
            raise UserError(f"--{key}: {value} is no list of sources: put it into [ ]")
        _check_sources(f"--{key}", rows)
        raise UserError(
            f"--{key}: {value}: a value is not of its kind: weights and shares are numbers, the rest is text"
        )


def absolute(config: RunConfig) -> RunConfig:
    """The configuration with the paths that exist here made absolute, so that a run can be resumed from anywhere."""

    def local(path: str | None) -> str | None:
        if not path:  # an empty one is not the folder we are in
            return path
        expanded = os.path.expanduser(path)
        return os.path.abspath(expanded) if os.path.exists(expanded) else path

    def sources(value: str | list[Source] | None) -> str | list[Source] | None:
        if isinstance(value, list):
            return [dataclasses.replace(source, path=local(source.path)) for source in value]
        return local(value)

    cache = config.data.cache
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, path=local(config.model.path)),
        data=dataclasses.replace(
            config.data,
            domain=sources(config.data.domain),
            general=sources(config.data.general),
            cache=cache and os.path.abspath(os.path.expanduser(cache)),
        ),
        output=config.output and os.path.abspath(os.path.expanduser(config.output)),
    )


def _flatten(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _keys() -> list[str]:
    return [key for key, _, _ in options(RunConfig())]


def _one_line(message: str, known: Sequence[str] = ()) -> str:
    """jsonargparse's message as one line naming the key, what was given and what is expected."""
    if unknown := re.search(r"Group '([\w.]+)' does not accept option '([\w.]+)'", message):
        return _unknown(f"{unknown[1]}.{unknown[2]}", known)
    if unknown := re.search(r"(?:unrecognized arguments|Unrecognized arguments): (\S+)", message):
        return _unknown(unknown[1].lstrip("-").split("=")[0], known)
    if unknown := re.search(r"[Kk]ey [\"']([\w.]+)[\"'] is not expected|No action for key \"([\w.]+)\"", message):
        return _unknown(unknown[1] or unknown[2], known)
    if section := re.search(r'Parser key "(\w+)": Unable to load config', message):
        keys = [name for name in known if name.startswith(f"{section[1]}.")]
        return f"--{section[1]} is a section; give one of its keys: {', '.join(f'--{name}' for name in keys)}"
    key = re.search(r'Parser key "([\w.]+)"', message)
    given = re.search(r"Given value: (.*)|[Gg]ot value: (.*)|File does not exist: (.*)", message)
    if key and given:
        value = next(group for group in given.groups() if group is not None)
        if given[3] is not None:
            return f"--{key[1]}: there is no file {value}; give a YAML recipe"
        kinds = re.findall(r"Expected a <class '(\w+)'>|Expected a[n]? (typing\.Literal\[.*?\])", message)
        names = [a or b.removeprefix("typing.Literal").strip("[]") for a, b in kinds if a != "NoneType"]
        return f"--{key[1]}: {value!r} is not {' or '.join(dict.fromkeys(names)) or 'of the expected type'}"
    return re.sub(r"\s+", " ", message).strip()


def _unknown(key: str, known: Sequence[str]) -> str:
    if key in OF_PLAN:
        return f"there is no option {key} here, only on the command line of `{PROGRAM} plan`; leave it out"
    last = key.rpartition(".")[2].replace("-", "_")
    close = [name for name in known if name.rpartition(".")[2] == last]
    close += [name for name in known if name.rpartition(".")[2].startswith(last)]
    close += difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    close.sort(key=lambda name: not name.startswith("train."))  # of several, what most mean
    hint = f"did you mean {close[0]}?" if close else "`--help` lists them"
    return f"there is no option or recipe key {key}; {hint}"
