"""One pass over a stream while levels follow it: its losses, those of earlier parts now, and its progress."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hopescale.checkpoint.manifest import Manifest
from hopescale.common.errors import CheckpointError, ConfigError, DataError, HopescaleError
from hopescale.config.model_shape import sees_all
from hopescale.data.text import TextSource
from hopescale.infer.adaptation import Adaptation
from hopescale.infer.generate import PREFILL_TOKENS
from hopescale.infer.in_context import InContextReader
from hopescale.infer.level_state import LEVELS, READER, WEIGHTS, read_file, read_progress, write_levels
from hopescale.infer.load import LoadedModel
from hopescale.infer.state import identity_of, named_tensors, splits_of, state_of
from hopescale.parallel.layers import cross_entropy_sum
from hopescale.parallel.slices import join_slices, own_slice

Losses = list[float]


def read_stream(path: str, loaded: LoadedModel) -> list[np.ndarray]:
    """Read the documents of a file or a folder as ids.

    Each begins with the end-of-text token, as in training. For a model without a tokenizer a line is a document: ids in
    decimal, parted by spaces.

    Raises:
        DataError: If it is missing, damaged, or has no two tokens, or if ids of the vocabulary are expected and
            something else is given.
    """
    size, tokenizer = loaded.config.model.vocab_size, loaded.tokenizer
    texts = (document.text for document in TextSource((path,)).documents())
    if tokenizer is None:
        documents = [_ids(line, path, size) for text in texts for line in text.splitlines() if line.strip()]
    else:
        documents = [np.array([tokenizer.eos_id, *tokenizer.encode(text)]) for text in texts]
    if not any(len(ids) > 1 for ids in documents):
        raise DataError(f"{path} has no two tokens to follow", "give a file with more text")
    return documents


def _ids(line: str, path: str, size: int) -> np.ndarray:
    words = line.split()
    if wrong := [word for word in words if not word.isdecimal() or int(word) >= size]:
        message = f"{path} has {wrong[0]!r}, but this model has no tokenizer, and ids up to {size - 1}"
        raise DataError(message, "give a document a line, as ids parted by spaces")
    return np.array(words, np.int64)


class StreamPass:
    """A pass over a stream in `parts` equal parts, from its beginning or from where an earlier one has stopped.

    Tensor-parallel ranks that hold the parts of a model read the same stream; the first writes its state.

    Args:
        loaded: Model with the weights as they are trained.
        adaptation: Levels that follow, checked against the model.
        documents: Ids of the stream's documents. Where the model mixes within documents alone, memories and levels
            begin anew with each; else they are one text. Attention that sees all reads `train.seq_len` tokens at a
            time, while levels go on.
        parts: Parts of the stream, equal in predictions.
        probe_tokens: Predictions at the beginning of each part that are made again later, without its context.

    Attributes:
        read: Mean loss in nats of each part, or of its tokens read so far, while levels followed.
        trained: Mean loss of each finished part's probe with the trained weights.
        after: After each finished part, the loss of its probe and those before, with the levels as they then were.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        adaptation: Adaptation,
        documents: Sequence[np.ndarray],
        *,
        parts: int = 8,
        probe_tokens: int = 512,
    ):
        apart = loaded.config.model.within_documents
        self.loaded, self.adaptation, self.mesh = loaded, adaptation, loaded.model.mesh
        self.pieces = [ids for ids in (documents if apart else [np.concatenate(documents)]) if len(ids) > 1]
        self.size = sum(len(piece) - 1 for piece in self.pieces)
        if parts > self.size:
            message = f"--parts is {parts}, but the stream has {self.size} predictions"
            raise ConfigError(message, "take fewer parts, or a longer stream")
        self.edges = [round(self.size * number / parts) for number in range(parts + 1)]
        self.probe_tokens = probe_tokens
        grows = any(map(sees_all, loaded.config.model.mixers.values()))
        self.reader = InContextReader(loaded.model, adaptation, 1, loaded.config.train.seq_len if grows else None)
        self.device = next(loaded.model.parameters()).device
        self.piece = self.position = self._saved = 0
        self._sums, self.trained, self.after = [0.0] * parts, Losses(), list[Losses]()

    @property
    def read(self) -> Losses:
        """Mean loss in nats of each part that has begun, as far as it was read."""
        spans = zip(self._sums, self.edges, self.edges[1:], strict=False)
        return [total / (min(high, self.position) - low) for total, low, high in spans if low < self.position]

    def run(
        self,
        folder: Path | None = None,
        save_every: int = 1 << 16,
        report: Callable[[str], None] = lambda line: None,
        on_read: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        """Read the rest of the stream, and write the state into `folder`, every so many tokens and at the end.

        `report` hears a line after each part, `on_read` how many tokens are read, and how many there are.

        Raises:
            CheckpointError: If the state cannot be written.
            HopescaleError: If a loss is no finite number.
        """
        while self.piece < len(self.pieces):
            rest = torch.from_numpy(self.pieces[self.piece][self.reader.position :])[None].to(self.device)
            place = 1
            for logits in self.reader.read(rest[:, :-1], rest[:, 1:]):
                size = logits.shape[1]
                self._note(logits, rest[:, place : place + size])
                place += size
                on_read(self.position, self.size)
                self._probe(report)
                if folder is not None and self.position - self._saved >= save_every and place < rest.shape[1]:
                    self._save(folder)
            self.piece += 1
            if self.piece < len(self.pieces):
                self.reader.begin()
                if folder is not None and self.position - self._saved >= save_every:
                    self._save(folder)
        if folder is not None and self.position > self._saved:
            self._save(folder)

    def _note(self, logits: Tensor, targets: Tensor) -> None:
        """Add the losses of predictions to their parts."""
        begin, end = self.position, self.position + targets.shape[1]
        for part, (low, high) in enumerate(zip(self.edges, self.edges[1:], strict=False)):
            first, last = max(low, begin), min(high, end)
            if first < last:
                own = slice(first - begin, last - begin)
                self._sums[part] += float(cross_entropy_sum(logits[:, own], targets[:, own], self.mesh))
        if not math.isfinite(sum(self._sums)):
            message = f"the loss is no number after {end:,} of {self.size:,} tokens: a level's steps are too large"
            error = HopescaleError(message, "choose a lower --rate, or a longer period")
            error.repeated = not self.mesh.control.is_first
            raise error
        self.position = end

    def _probe(self, report: Callable[[str], None]) -> None:
        """Ask again, after each part that has ended, for the beginnings of all parts so far."""
        while len(self.after) < len(self._sums) and self.edges[len(self.after) + 1] <= self.position:
            number = len(self.after)
            self.trained.append(self._again(number, adapted=False))
            self.after.append([self._again(part, adapted=True) for part in range(number + 1)])
            report(f"{self.position:,} of {self.size:,} tokens: loss {self.read[number]:.4f} in part {number + 1}")

    @torch.no_grad()
    def _again(self, part: int, *, adapted: bool) -> float:
        """Read the beginning of a part as a text of its own, with the levels as they are now or as they are trained."""
        begin = self.edges[part]
        size = min(self.probe_tokens, self.edges[part + 1] - begin)
        levels, total = (self.reader.weights if adapted else None) or None, 0.0
        for ids in self._cut(begin, begin + size):
            text, state = torch.from_numpy(ids)[None].to(self.device), None
            pieces = (each.split(PREFILL_TOKENS, 1) for each in (text[:, :-1], text[:, 1:]))
            for tokens, targets in zip(*pieces, strict=True):
                logits, state = self.loaded.model(tokens, state, levels=levels)
                total += float(cross_entropy_sum(logits, targets, self.mesh))
        return total / size

    def _cut(self, begin: int, end: int) -> Iterator[np.ndarray]:
        """Yield the ids of predictions, apart where the model's state begins anew: at a piece, and after a context."""
        low, context = 0, self.reader.context or end - begin
        for piece in self.pieces:
            high = low + len(piece) - 1
            last = min(high, end)
            for first in range(max(low, begin), last, context):
                yield piece[first - low : min(first + context, last) - low + 1]
            low = high

    def _settings(self) -> dict[str, Any]:
        """Return all that another pass must share to go on from this one."""
        digest = hashlib.sha256()
        for piece in self.pieces:
            digest.update(len(piece).to_bytes(8, "little") + piece.tobytes())
        rest = {"parts": len(self._sums), "probe": self.probe_tokens}
        return {"stream": digest.hexdigest(), **self.adaptation.describe(), **rest}

    def _save(self, folder: Path) -> None:
        progress = {"tokens_read": self.position, "piece": self.piece, "place": self.reader.position}
        progress |= {"settings": self._settings(), "sums": self._sums, "trained": self.trained, "after": self.after}
        rest = self.reader.tensors()
        if (state := self.reader.state) is not None:
            progress["state_tokens"] = state.position
            rest |= {f"state/{name}": tensor for name, tensor in named_tensors(state).items()}
        weights, rest = (self._joined(tensors) for tensors in (self.reader.weights, rest))
        identity_of(self.loaded)  # all ranks take part, and the first alone writes
        self.mesh.control.broadcast_from_rank0(lambda: write_levels(folder, self.loaded, weights, rest, progress))
        self._saved = self.position

    @cached_property
    def _splits(self) -> dict[str, int]:
        """Along which dimension tensors in files are split over ranks, by name; nothing of what each holds whole."""
        of_state = {f"state/{name}": split for name, split in splits_of(self.loaded.model).items()}
        return self.reader.splits() | of_state

    def _joined(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the wholes of ranks' slices on the first rank, those that were split on the CPU."""
        result = {}
        for name, tensor in tensors.items():
            whole = join_slices(tensor, self._splits.get(name), self.mesh)
            if self.mesh.control.is_first:
                result[name] = tensor if whole is tensor else whole.cpu()
        return result

    def _own(self, folder: Path, manifest: Manifest, part: str) -> dict[str, Tensor]:
        """Read this rank's slices of a file of tensors. What is split is never whole on a device."""
        wholes = read_file(folder, manifest, part, torch.device("cpu") if self._splits else self.device)
        return {
            name: own_slice(whole, self._splits.get(name), self.mesh).to(self.device) for name, whole in wholes.items()
        }

    def go_on(self, folder: Path) -> None:
        """Continue from the state that an earlier pass has written into a folder, on any number of ranks.

        Raises:
            CheckpointError: If it is damaged, of another model, or of another stream or cadence.
        """
        identity_of(self.loaded)  # all ranks take part
        progress, weights, rest = self.mesh.control.all_ranks_or_raise(lambda: self._read(folder))
        state = None
        if (read := progress.get("state_tokens")) is not None:
            tensors = {name.removeprefix("state/"): each for name, each in rest.items()}
            state = state_of(tensors, self.loaded, 1, read)
        self.reader.go_on(weights, rest, state, progress["place"])
        self.piece, self.position = progress["piece"], progress["tokens_read"]
        self._saved, self._sums = self.position, list(progress["sums"])
        self.trained, self.after = list(progress["trained"]), [list(row) for row in progress["after"]]
        if self.position == self.size:
            self.piece = len(self.pieces)

    def _read(self, folder: Path) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Tensor]]:
        """Read progress and tensors of an earlier pass, and refuse those of another one."""
        manifest = read_progress(folder, self.loaded)
        progress, wanted = manifest.progress, self._settings()
        there = progress["settings"]
        if found := [name for name, value in wanted.items() if there.get(name) != value]:
            pairs = [f"{name} is {_short(wanted[name])}, but {_short(there.get(name))} there" for name in found]
            raise CheckpointError(
                f"{folder} holds another pass: {'; '.join(pairs)}", "choose another --out, or the same settings"
            )
        return progress, *(self._own(folder, manifest, part) for part in (WEIGHTS, READER))

    def table(self) -> Iterator[str]:
        """Return the measurements as a table, with a line for each part."""
        yield f"{'part':<6}{'tokens':>22}{'read':>10}{'trained':>10}{'then':>10}{'now':>10}"
        now = self.after[-1] if self.after else []
        for number, (loss, low, high) in enumerate(zip(self.read, self.edges, self.edges[1:], strict=False)):
            row = [loss, *(values[number] for values in (self.trained, [row[-1] for row in self.after], now))]
            span = f"{low:,} to {high - 1:,}"
            yield f"{number + 1:<6}{span:>22}" + "".join(f"{value:>10.4f}" for value in row)

    def report(self) -> dict[str, Any]:
        """Return all figures as JSON can carry them."""
        figures = {"read": self.read, "trained": self.trained, "after": self.after}
        return {"model": str(self.loaded.folder), "step": self.loaded.manifest.step, "edges": self.edges} | {
            **self._settings(),
            **figures,
        }


def has_pass(folder: Path) -> bool:
    """Tell whether a folder holds the state of a pass."""
    return (folder / LEVELS).is_file()


def _short(value: object) -> object:
    return value[:12] if isinstance(value, str) else value
