"""Texts that the model writes while it is trained."""

from __future__ import annotations

import torch

from hopescale.common.errors import ConfigError
from hopescale.config.layout import Layout
from hopescale.config.schema import RunConfig
from hopescale.data.tokenizer import Tokenizer
from hopescale.infer.generate import generate, prefill
from hopescale.infer.sampling import Sampling
from hopescale.infer.text import decode_stream, encode_prompt
from hopescale.models import Model


class SampleWriter:
    """The prompts of `log.samples`, which a model goes on with greedily: no random number is drawn.

    Args:
        config: Config of the run.
        layout: Degrees of parallelism.
        tokenizer: Tokenizer of the data, if it has one.

    Raises:
        ConfigError: If a prompt is no text of the data, or no rank holds the whole model.
    """

    def __init__(self, config: RunConfig, layout: Layout, tokenizer: Tokenizer | None):
        self._prompts, self._most, self._tokenizer = config.log.samples, config.log.sample_tokens, tokenizer
        size = config.model.vocab_size
        self._ids = [encode_prompt(prompt, tokenizer, size, key="log.samples") for prompt in self._prompts]
        if self._prompts and layout.tp * layout.pp > 1:
            degrees = f"parallel.tp is {layout.tp} and parallel.pp is {layout.pp}"
            raise ConfigError(f"log.samples needs a rank that holds the whole model, but {degrees}", "leave it empty")

    def write(self, model: Model) -> dict[str, str]:
        """Return each prompt with its continuation by the model, by the names `sample/0`, `sample/1` and so on."""
        device = next(model.parameters()).device
        texts = {}
        for number, (prompt, ids) in enumerate(zip(self._prompts, self._ids, strict=True)):
            reading = prefill(model, torch.tensor([ids], device=device))
            end = None if self._tokenizer is None else self._tokenizer.eos_id
            how = {"max_tokens": self._most, "sampling": Sampling(), "generator": torch.Generator(), "end": end}
            tokens = (int(step.token[0]) for step in generate(model, reading, **how))
            between = "" if self._tokenizer is not None else " "
            texts[f"sample/{number}"] = prompt + between + "".join(decode_stream(tokens, self._tokenizer)).rstrip(" ")
        return texts
