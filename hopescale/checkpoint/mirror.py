"""Copies of a run's checkpoints on an object store: sent after every save, fetched where the run folder has none."""

from __future__ import annotations

import logging
import re
import shutil
import uuid
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from hopescale.checkpoint.manifest import (
    MANIFEST,
    POINTER,
    Manifest,
    checkpoint_folders,
    file_problems,
    folder_name,
    incomplete_because,
    read_manifest,
    step_of,
)
from hopescale.common.disk import replace_text
from hopescale.common.errors import CheckpointError
from hopescale.common.object_store import ObjectStore, install_hint

logger = logging.getLogger(__name__)

RUN_ID = "run"
"""File with the id of a run, at its address and in its `checkpoints/`."""
_NAME = re.compile(r"step-\d{8,}")


class Mirror:
    """The checkpoints of one run at an address, as they lie in its `checkpoints/`.

    A manifest is sent after the files that it names, and the pointer `latest` after that, so that what is there is
    whole. The file `run` holds the id of the run whose copies these are, which its own folder keeps too.

    Args:
        address: Address of the folder.

    Raises:
        CheckpointError: If the package for this kind of address is missing, or the address is none.
    """

    def __init__(self, address: str):
        self.address = address
        try:
            self._store = ObjectStore(address)
        except (ImportError, ValueError) as error:
            hint = install_hint(address)
            raise CheckpointError(f"cannot reach checkpoint.mirror {address}: {error}", hint) from error

    def send(self, folder: Path, *, keep_last: int, keep_every: int | None, keep_at: Collection[int] = ()) -> None:
        """Send a complete checkpoint, then remove older ones as `checkpoint` of the config has it.

        A failure is logged as a warning: the run has its checkpoint, and the next save sends another.
        """
        try:
            files = sorted(folder.iterdir(), key=lambda file: (file.name == MANIFEST, file.name))
            for file in files:
                self._store.upload(file, f"{folder.name}/{file.name}")
            self._store.write(POINTER, f"{folder.name}\n".encode())
            steps = [step for step in self._steps() if step <= step_of(folder) and step not in keep_at]
            for step in steps[:-keep_last]:
                if keep_every is None or step % keep_every:
                    self._store.remove(folder_name(step))
        except OSError as error:
            logger.warning("cannot send %s to %s: %s", folder.name, self.address, error.strerror or error)

    def _steps(self) -> list[int]:
        return sorted(step_of(Path(name)) for name in self._store.names() if _NAME.fullmatch(name))

    def begin(
        self,
        root: Path,
        *,
        keep_last: int,
        keep_every: int | None,
        keep_at: Collection[int] = (),
        branch: str | None = None,
    ) -> Path | None:
        """Make the address this run's own, fetch what its `checkpoints/` folder lacks, send what the store lacks.

        `branch` is the id of a run that branches off another, as of `claim`.

        Returns:
            The folder that was fetched; None if there was no need to.

        Raises:
            CheckpointError: If the copies are another run's, the store does not answer, or what it holds is damaged.
        """
        self.claim(root, adopts=True, branch=branch)
        fetched = self.fetch(root)
        if fetched is None and (latest := self._torn(root)) is not None:
            logger.warning("%s is not whole at %s: it is sent again", latest.name, self.address)
            self.send(latest, keep_last=keep_last, keep_every=keep_every, keep_at=keep_at)
        return fetched

    def claim(self, root: Path, *, adopts: bool = False, branch: str | None = None) -> None:
        """Make the address this run's own.

        Args:
            root: Folder `checkpoints/` of the run, which is made if it is missing.
            adopts: Whether a folder without checkpoints becomes that of the run whose copies are there.
            branch: Id of a run that branches off another, which adopts nothing but its own copies; None for others,
                whose id is drawn.

        Raises:
            CheckpointError: If the copies are another run's, or the store does not answer.
        """
        with self._reached():
            own, found = self._owners(root, adopts=adopts, branch=branch)
            id = found or own or branch or uuid.uuid4().hex
            if own is None:
                root.mkdir(parents=True, exist_ok=True)
                replace_text(root / RUN_ID, f"{id}\n")
            if found is None:
                self._store.write(RUN_ID, f"{id}\n".encode())

    def check(self, root: Path, *, adopts: bool = False, branch: str | None = None) -> Path | None:
        """Refuse what `claim` refuses, with its arguments. Writes nothing.

        Returns:
            The folder that `begin` would fetch; None if it would fetch none.

        Raises:
            CheckpointError: If the copies are another run's, or the store does not answer.
        """
        with self._reached():
            self._owners(root, adopts=adopts, branch=branch)
            name = self._missing(root) if adopts else None
            return None if name is None else root / name

    def _owners(self, root: Path, *, adopts: bool, branch: str | None) -> tuple[str | None, str | None]:
        """Return what `_ids` does, without the id of another start that saved nothing at the address.

        Raises:
            CheckpointError: If the copies are another run's.
        """
        own, found = self._ids(root)
        known = own or branch
        is_branch = own is None and branch is not None
        if is_branch and found != branch:
            if POINTER in self._store.names():
                raise self._foreign(is_branch=True)
            found = None
        if found is not None and found != known and (known is not None or not adopts or _has_complete(root)):
            raise self._foreign(is_branch=is_branch)
        return own, found

    def check_unused(self, root: Path) -> None:
        """Refuse an address that cannot be a new run's. Writes nothing.

        Raises:
            CheckpointError: If there are checkpoints, or it is another run's, or the store does not answer.
        """
        with self._reached():
            own, found = self._ids(root)
            if found is not None and found != own:
                raise self._foreign()
            if POINTER in self._store.names():
                hint = "name another address, or leave --resume out to continue that run"
                raise CheckpointError(f"checkpoint.mirror {self.address} already holds checkpoints", hint)

    def manifest(self, name: str) -> Manifest:
        """Return the manifest of a copy.

        Raises:
            CheckpointError: If there is none, it cannot be read, or the store does not answer.
        """
        with self._reached(), TemporaryDirectory() as folder:
            self._store.download(f"{name}/{MANIFEST}", Path(folder) / MANIFEST)
            try:
                return read_manifest(Path(folder))
            except CheckpointError as error:
                raise CheckpointError(f"{self.address}/{name}/{MANIFEST} is damaged", "remove it there") from error

    def _ids(self, root: Path) -> tuple[str | None, str | None]:
        """Return the id of the run of a folder and that of the address, as far as there are any."""
        kept = root / RUN_ID
        own = kept.read_text(encoding="utf-8").strip() if kept.exists() else None
        return own, self._store.read(RUN_ID).decode().strip() if RUN_ID in self._store.names() else None

    def _foreign(self, *, is_branch: bool = False) -> CheckpointError:
        again = "--resume must without --branch-from" if is_branch else "--resume must"
        hint = f"name an address of its own, or checkpoint.mirror=null; {again} continues that run in a new folder"
        return CheckpointError(f"checkpoint.mirror {self.address} holds the checkpoints of another run", hint)

    @contextmanager
    def _reached(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            message = f"cannot reach checkpoint.mirror {self.address}: {error.strerror or error}"
            raise CheckpointError(message, "set checkpoint.mirror=null to go on without it") from error

    def _torn(self, root: Path) -> Path | None:
        """Return the folder's latest checkpoint if its copy is not whole: its pointer is what is sent last."""
        pointer = root / POINTER
        if not pointer.exists():
            return None
        name = pointer.read_text(encoding="utf-8").strip()
        if not _NAME.fullmatch(name) or incomplete_because(root / name) is not None:
            return None
        sent = self._store.read(POINTER).decode().strip() if POINTER in self._store.names() else None
        return None if sent == name else root / name

    def fetch(self, root: Path) -> Path | None:
        """Fetch the latest checkpoint into a `checkpoints/` folder that has no complete one.

        A folder that has one goes on from it, also if the mirror's is of a later step: that may belong to a course that
        the run has given up.

        Returns:
            The folder that was fetched; None if there was no need to.

        Raises:
            CheckpointError: If the store does not answer, or what it holds is damaged.
        """
        try:
            name = self._missing(root)
            if name is None:
                return None
            folder, partial = root / name, root / f".tmp-{name}"
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            for file in self._store.names(name):
                self._store.download(f"{name}/{file}", partial / file)
            if problems := file_problems(partial, read_manifest(partial).files, digests=True):
                raise CheckpointError(f"{self.address}/{name} is damaged: {'; '.join(problems)}", "remove it there")
            shutil.rmtree(folder, ignore_errors=True)
            partial.rename(folder)
            replace_text(root / POINTER, f"{name}\n")
        except OSError as error:
            message = f"cannot fetch a checkpoint from {self.address}: {error.strerror or error}"
            raise CheckpointError(message, "set checkpoint.mirror=null to go on without it") from error
        return folder

    def _missing(self, root: Path) -> str | None:
        """Return the name of the latest copy if a `checkpoints/` folder has no complete checkpoint."""
        if POINTER not in self._store.names():
            return None
        name = self._store.read(POINTER).decode().strip()
        return None if _has_complete(root) or not _NAME.fullmatch(name) else name


def _has_complete(root: Path) -> bool:
    return any(incomplete_because(folder) is None for folder in checkpoint_folders(root))
