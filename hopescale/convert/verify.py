"""Whether a folder of transformers answers as a checkpoint does: logits of held-out text, then of generated tokens."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.generation.streamers import BaseStreamer
from transformers.utils import logging

from hopescale.checkpoint.load import first_line
from hopescale.checkpoint.manifest import EXPORT, read_manifest
from hopescale.common.errors import CheckpointError, HopescaleError
from hopescale.config.schema import RunConfig
from hopescale.convert.hf import Progress, check_files, unheard
from hopescale.convert.mapping import layer_names
from hopescale.convert.stacking import read_source, require_config
from hopescale.data.loader import open_data
from hopescale.infer.generate import prefill
from hopescale.infer.level_state import put_levels
from hopescale.infer.load import LoadedModel, load_model
from hopescale.models import Model
from hopescale.ops.device import DTYPES

LIMITS = {"fp32": 1e-4, "bf16": 2e-2}
"""Largest difference of logits by precision, as a part of the largest logit where that is above 1."""
ROWS, TOKENS, PROMPT, GREEDY = 2, 256, 32, 64
"""Sequences compared, their length at most, tokens of the prompt, and tokens generated from it."""


@dataclass(frozen=True)
class Verified:
    """Result of a comparison; `text` names the tokens that were read, `greedy` describes the generated ones."""

    text: str
    num_tokens: int
    difference: float
    """Largest difference of two logits, as the limit counts it."""
    limit: float
    greedy: str

    def lines(self) -> list[str]:
        """Say it to a person."""
        return [
            f"logits: largest difference {self.difference:.1e} (limit {self.limit:g}) over {self.num_tokens} tokens of "
            f"{self.text}",
            f"greedy: {self.greedy}",
        ]


def verify_folder(folder: Path, checkpoint: Path, levels: Path | None = None, progress: Progress = unheard) -> Verified:
    """Compare a folder of transformers, an export or the source of a stacked model, with a checkpoint.

    Both models are held in memory; an export in the checkpoint's precision, any other folder in float32. The weights of
    an export are compared with their SHA-256 first. `levels` are put in the place of the checkpoint's.
    `progress` hears of the tokens that both models generate.

    Raises:
        CheckpointError: If the folder is damaged or cannot be loaded, or its answers differ; names the first layer that
            does.
    """
    if (folder / EXPORT).exists():
        check_files(folder, read_manifest(folder, EXPORT), ".safetensors")
    loaded = load_model(checkpoint, torch.device("cpu"))
    if levels is not None:
        put_levels(levels, loaded)
    precision = loaded.config.train.precision
    if (folder / EXPORT).exists():
        dtype = DTYPES[precision]
        theirs = load_transformers(folder, dtype, trust_remote_code=True)
        return compare(loaded, theirs, LIMITS[precision], str(folder), progress)
    # Families round in other places than we do: what is compared is the function, on the weights that both hold.
    theirs, _ = load_transformers(folder, torch.float32, trust_remote_code=False), loaded.model.float()
    rounded = precision == "bf16" and read_source(folder).get("dtype") != "bfloat16"
    return compare(loaded, theirs, LIMITS["bf16" if rounded else "fp32"], str(folder), progress)


def load_transformers(folder: Path, dtype: torch.dtype, *, trust_remote_code: bool) -> nn.Module:
    """Load a folder through `AutoModelForCausalLM`, perhaps with code that it brings, as exports do.

    Raises:
        CheckpointError: If transformers refuses it, or weights are missing.
    """
    require_config(folder)
    logging.disable_progress_bar()
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            str(folder),
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            local_files_only=True,
            output_loading_info=True,
        )
    except Exception as error:  # the code that an export brings may fail in any way
        raise CheckpointError(f"transformers cannot load {folder}: {first_line(error)}") from error
    if report["missing_keys"]:
        raise CheckpointError(f"{folder} does not hold {', '.join(sorted(report['missing_keys'])[:6])}")
    return model.eval()


@torch.no_grad()
def compare(
    loaded: LoadedModel, theirs: nn.Module, limit: float, origin: str, progress: Progress = unheard
) -> Verified:
    """Compare a model of transformers with a checkpoint's; messages call its folder `origin`.

    Raises:
        CheckpointError: If they differ by more than the limit.
    """
    config, ours = loaded.config, loaded.model
    vocab = config.model.vocab_size
    if (their_vocab := getattr(theirs.config, "vocab_size", None)) != vocab:
        raise CheckpointError(f"{origin} has a vocabulary of {their_vocab}, {loaded.folder} one of {vocab}")
    tokens, text = held_out(config)
    expected = ours(tokens)[0][..., :vocab]
    actual = theirs(input_ids=tokens, use_cache=False).logits
    difference = _difference(actual, expected)
    if not difference <= limit:
        layer = _first_difference(ours, theirs, tokens, limit)
        message = f"{origin} does not answer as {loaded.folder} does: logits differ by {difference:.2e}, "
        raise CheckpointError(f"{message}the limit is {limit:g}; the first layer to differ is {layer}")
    greedy = _compare_greedy(loaded, theirs, tokens[:1, :PROMPT], limit, origin, progress)
    return Verified(text, tokens.numel(), difference, limit, greedy)


def _compare_greedy(
    loaded: LoadedModel, theirs: nn.Module, prompt: Tensor, limit: float, origin: str, progress: Progress
) -> str:
    """Generate from a prompt with both, and compare the logits of every token and the token that each takes.

    Logits that differ by `d` can order two tokens otherwise if these are less than `2 d` apart: there both go on with
    the checkpoint's token.

    Raises:
        CheckpointError: If logits differ, or tokens that are further apart.
    """
    tokens, expected = _greedy(loaded, prompt, progress)
    theirs.generation_config.eos_token_id = None
    options = {"do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    place, ties = 0, 0
    while place < GREEDY:
        context = torch.cat([prompt, torch.tensor([tokens[:place]], dtype=prompt.dtype)], dim=1)
        # Without a mask, transformers takes end-of-text tokens of the prompt for padding.
        mask = torch.ones_like(context)
        counted = _TokenListener(progress, GREEDY + place)
        output = theirs.generate(
            context, attention_mask=mask, max_new_tokens=GREEDY - place, streamer=counted, **options
        )
        for token, found in zip(output.sequences[0, context.shape[1] :].tolist(), output.logits, strict=True):
            own, wanted = tokens[place], expected[place]
            message = f"{origin} does not generate what {loaded.folder} does: "
            difference = _difference(found[0], wanted)
            if not difference <= limit:
                message += f"logits of token {place + 1} differ by {difference:.2e}, the limit is {limit:g}; "
                raise CheckpointError(f"{message}those of a whole text are right, so its cache is not")
            place += 1
            if token != own:
                ties += 1
                if wanted[own] - wanted[token] > 2 * (found[0].double() - wanted).abs().max():
                    message += f"token {place} is {token}, not {own}; "
                    raise CheckpointError(f"{message}its logits are right, so its generation settings are not")
                break
    if not ties:
        return f"{GREEDY} of {GREEDY} tokens equal"
    return f"{GREEDY - ties} of {GREEDY} tokens equal, {ties} where two are equally likely but for rounding"


class _TokenListener(BaseStreamer):
    """Tells of tokens as transformers generates them, the first of which is the prompt."""

    def __init__(self, progress: Progress, done: int):
        self._progress, self._done = progress, done - 1

    def put(self, value: Tensor) -> None:
        self._done += 1
        self._progress("comparing", self._done, 2 * GREEDY)

    def end(self) -> None:
        """Take the end, after which nothing is to be told."""


def _greedy(loaded: LoadedModel, prompt: Tensor, progress: Progress) -> tuple[list[int], list[Tensor]]:
    """Return the likeliest tokens after a prompt `[1, T]`, one after the other, and the logits `[V]` of each."""
    reading, tokens, logits = prefill(loaded.model, prompt), [], []
    for _ in range(GREEDY):
        logits.append(reading.logits[0, : loaded.config.model.vocab_size].double())
        tokens.append(int(logits[-1].argmax()))
        reading = prefill(loaded.model, torch.tensor([tokens[-1:]]), reading.state)
        progress("comparing", len(tokens), 2 * GREEDY)
    return tokens, logits


def _difference(found: Tensor, expected: Tensor) -> float:
    """Return the largest difference, as a part of the largest expected value where that is above 1; nan counts."""
    scale = max(1.0, float(expected.float().abs().max()))
    return float((found.float() - expected.float()).abs().max()) / scale


def held_out(config: RunConfig) -> tuple[Tensor, str]:
    """Return tokens `[B, T]` of a run's held-out data and their description; random tokens if it cannot be read."""
    length = min(TOKENS, config.train.seq_len)
    try:
        original = replace(config.data, staged=None)  # copies are on the disks of other machines
        data = open_data(original, seq_len=config.train.seq_len, vocab_size=config.model.vocab_size)
        name = data.validation_sets[0]
        batch = next(iter(data.validation(name, ROWS * config.train.seq_len, ROWS)))
        return batch.tokens[:, :length], f"held-out text of {name}"
    except (HopescaleError, IndexError):
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(config.model.vocab_size, (ROWS, TOKENS), generator=generator)
        return tokens, "random tokens, as there is no held-out text to be read"


def _first_difference(ours: Model, theirs: nn.Module, tokens: Tensor, limit: float) -> str:
    """Run both models again and name our first layer whose output differs from its counterpart's."""
    names = layer_names(ours.config, theirs.config.model_type)
    with _outputs(ours, names) as expected, _outputs(theirs, names.values()) as actual:
        ours(tokens)
        theirs(input_ids=tokens, use_cache=False)
    for own, other in names.items():
        if not _difference(actual[other], expected[own].transpose(0, 1)) <= limit:
            return own if own == other else f"{own} ({other})"
    return "the head"


@contextmanager
def _outputs(model: nn.Module, names: Iterable[str]) -> Iterator[Mapping[str, Tensor]]:
    """Collect the outputs of modules while the block runs."""
    outputs: dict[str, Tensor] = {}

    def keep(name: str, module: nn.Module, args: Any, output: Any) -> None:
        outputs[name] = output[0] if isinstance(output, tuple) else output

    handles = [model.get_submodule(name).register_forward_hook(partial(keep, name)) for name in names]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()
