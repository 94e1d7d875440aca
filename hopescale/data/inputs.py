"""Files to read documents from: below folders and addresses, and in a folder saved by `datasets`."""

from __future__ import annotations

import json
import lzma
import os
import tarfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import PurePosixPath
from typing import Any, NamedTuple

import fsspec

from hopescale.common.errors import ConfigError, DataError

HUB = "hub:"
"""What begins the name of a data set of the Hugging Face hub: `hub:OWNER/NAME[/CONFIG][:SPLIT]`."""
_EXTRAS = {"s3": "s3", "hub": "datasets"}
_MOST_NAMED = 5


class TextFile(NamedTuple):
    """One input file: its file system, its path there, its name in messages, and its size in bytes.

    Of a data set of the hub there is no file system and no size.
    """

    filesystem: fsspec.AbstractFileSystem | None
    path: str
    name: str
    size: int


def find_files(name: str, patterns: tuple[str, ...], exclude: tuple[str, ...]) -> list[TextFile]:
    """List the files of an input.

    Args:
        name: A file, a folder, an address, or a data set of the hub.
        patterns: Shell patterns that a file of a folder must match one of, if there are any.
        exclude: Shell patterns that no file of a folder may match.

    Raises:
        DataError: If it is missing, has no such file, or holds a link to a file that does not exist.
    """
    if name.startswith(HUB):
        return [TextFile(None, name.removeprefix(HUB), name, 0)]
    with reading(name):
        filesystem, path = fsspec.url_to_fs(name)
        if filesystem.isfile(path):
            return [TextFile(filesystem, path, name, filesystem.size(path) or 0)]
        if not filesystem.exists(path):
            raise DataError(f"input {name} does not exist", hint="check the path; relative paths start where you are")
        found = {file.path: file for file in _files_below(filesystem, path)}
        whole = {place for place, file in found.items() if file.size is not None}
        kept = _without_notes(filesystem, sorted(whole))
        below = [(file, file[len(path) :].lstrip("/")) for file in sorted([*kept, *(found.keys() - whole)])]
    visible = [(file, rest) for file, rest in below if not is_hidden(rest)]
    chosen = [(file, rest) for file, rest in visible if not patterns or matches(rest, patterns)]
    matching = [(file, rest) for file, rest in chosen if not matches(rest, exclude)]
    if not matching:
        looked = f"{len(visible)} files, none matches {' or '.join(patterns)}" if patterns else "no files"
        looked = f"all {len(chosen)} files are left out by --exclude" if chosen else looked
        raise DataError(f"nothing to read in folder {name}: {looked}", hint="check the folder and the patterns")
    if broken := [rest for file, rest in matching if found[file].size is None]:
        more = f" and {len(broken) - _MOST_NAMED} more" if len(broken) > _MOST_NAMED else ""
        message = f"folder {name} holds links to files that do not exist: {', '.join(broken[:_MOST_NAMED])}{more}"
        raise DataError(message, "mend or remove them, or leave them out: --exclude PATTERN")
    once = _once([found[file] for file, _ in matching])
    return [
        TextFile(filesystem, f, f"{name.rstrip('/')}/{rest}", found[f].size or 0) for f, rest in matching if f in once
    ]


class _Found(NamedTuple):
    """A file below a folder: its path, its size in bytes (None if it is a broken link), whether a link leads to it."""

    path: str
    size: int | None
    is_linked: bool


def _once(files: list[_Found]) -> set[str]:
    """Choose one path of each file that links give several, its own before others."""
    if not any(file.is_linked for file in files):
        return {file.path for file in files}
    chosen: dict[str, str] = {}
    for file in sorted(files, key=lambda file: (file.is_linked, file.path)):
        chosen.setdefault(os.path.realpath(file.path), file.path)
    return set(chosen.values())


def _files_below(
    filesystem: fsspec.AbstractFileSystem, folder: str, within: frozenset[str] = frozenset()
) -> Iterator[_Found]:
    """List the files of a folder, and the files and folders that it links to, without going in circles.

    Yields:
        Each, with its own size rather than that of a link.
    """
    is_linked = bool(within)
    within |= {os.path.realpath(folder)}
    for path, info in filesystem.find(folder, detail=True).items():
        if info.get("islink") and filesystem.isdir(path):
            if os.path.realpath(path) not in within:
                yield from _files_below(filesystem, path, within)
        elif info.get("islink") and not filesystem.exists(path):
            yield _Found(path, None, True)
        elif info.get("islink") and filesystem.isfile(path):
            yield _Found(path, filesystem.size(path) or 0, True)
        elif info.get("type") == "other" and filesystem.exists(path):
            raise DataError(f"{path} is neither a file nor a folder", hint="leave it out of the folder")
        else:
            yield _Found(path, info.get("size") or 0, is_linked)


def _without_notes(filesystem: fsspec.AbstractFileSystem, paths: list[str]) -> list[str]:
    """Leave out the files that `datasets` writes beside the tables of a folder that it saves, and its caches.

    Raises:
        DataError: If such a folder holds a choice of rows, which its tables do not show.
    """
    below = set(paths)
    kept: dict[str, set[str]] = {}
    for path in paths:
        folder, _, name = path.rpartition("/")
        if name == "state.json" and f"{folder}/dataset_info.json" in below:
            state: dict[str, Any] = json.loads(filesystem.cat_file(path))
            if state.get("_indices_data_files"):
                message = f"{folder} holds a choice of rows of a data set, which is not read"
                raise DataError(message, "save it anew: dataset.flatten_indices().save_to_disk(FOLDER)")
            kept[folder] = {f"{folder}/{file['filename']}" for file in state["_data_files"]}
    parents = {folder.rpartition("/")[0] for folder in kept}
    left_out = {f"{folder}/dataset_dict.json" for folder in parents}
    return [p for p in paths if p not in left_out and p in kept.get(p.rpartition("/")[0], below)]


def is_hidden(path: str) -> bool:
    """Tell whether a path, or a folder of it, begins with a point."""
    return any(part.startswith(".") for part in PurePosixPath(path).parts)


def matches(path: str, patterns: tuple[str, ...]) -> bool:
    """Tell whether a path or its last part matches any shell pattern."""
    name = PurePosixPath(path).name
    return any(fnmatch(name, pattern) or fnmatch(path, pattern) for pattern in patterns)


def hub_rows(address: str, name: str) -> Iterator[dict[str, Any]]:
    """Read the rows of a data set of the Hugging Face hub as they come: `OWNER/NAME[/CONFIG][:SPLIT]`.

    Raises:
        DataError: If the package `datasets` is missing, or the address is none.
    """
    try:
        import datasets
    except ImportError:
        message = f"{name}: a data set of the hub, which needs the package datasets"
        raise DataError(message, "pip install 'hopescale[datasets]'") from None
    path, _, split = address.partition(":")
    parts = path.split("/")
    if not 2 <= len(parts) <= 3 or not all(parts):
        raise DataError(f"{name} is no data set of the hub", "write hub:OWNER/NAME, hub:OWNER/NAME/CONFIG:SPLIT")
    config = parts[2] if len(parts) == 3 else None
    yield from datasets.load_dataset("/".join(parts[:2]), config, split=split or "train", streaming=True)


@contextmanager
def reading(name: str) -> Iterator[None]:
    """Turn errors of an input into one message; packages for addresses have exceptions of their own.

    Raises:
        DataError: If anything goes wrong; names the input and the extra that it may need.
    """
    try:
        yield
    except (DataError, ConfigError):
        raise
    except ImportError as error:
        extra = _EXTRAS.get(name.partition(":")[0])
        hint = f"pip install 'hopescale[{extra}]'" if extra else "install the package for this kind of address"
        raise DataError(f"cannot read {name}: {error}", hint) from error
    except Exception as error:
        own = isinstance(error, (OSError, EOFError, zlib.error, lzma.LZMAError, tarfile.TarError, ValueError))
        if not own and "://" not in name and not name.startswith(HUB):
            raise
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise DataError(f"cannot read {name}: {reason}", hint="check the address, the permissions, the file") from error
