"""Log probabilities and generated text: several texts at once, of any length, without padding that enters a state.

Texts to be scored are filled up behind their last token, where nothing that counts can see it: a model is causal, and
its state is thrown away. Texts to be gone on with are all read from their first token on, the longer ones to their
end while the shorter ones are already written on: all rows of a state stand at the same place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hopescale.infer.generate import PREFILL_TOKENS, prefill
from hopescale.infer.sampling import Sampling, sample
from hopescale.models import Model
from hopescale.parallel.layers import IGNORED_TARGET

Scored = tuple[float, bool]
"""Log-probability in nats of some tokens together, and whether each was the likeliest."""


@torch.no_grad()
def score(model: Model, texts: Sequence[Sequence[int]], counts: Sequence[int]) -> list[Scored]:
    """Score the last tokens of texts, each given all before it; of each text so many as `counts` says."""
    device = next(model.parameters()).device
    width = max(map(len, texts)) - 1
    tokens = torch.zeros(len(texts), width, dtype=torch.int64)
    targets = torch.full_like(tokens, IGNORED_TARGET)
    for row, (text, count) in enumerate(zip(texts, counts, strict=True)):
        last = len(text) - 1
        tokens[row, :last] = torch.tensor(text[:-1])
        targets[row, last - count : last] = torch.tensor(text[len(text) - count :])
    total = torch.zeros(len(texts), dtype=torch.float64)
    greedy, state = torch.ones(len(texts), dtype=torch.bool), None
    for part, wanted in zip(tokens.split(PREFILL_TOKENS, 1), targets.split(PREFILL_TOKENS, 1), strict=True):
        logits, state = model(part.to(device), state)
        given, likeliest = (x.cpu() for x in _given(logits, wanted.to(device)))
        total += given.double().sum(1)
        greedy &= likeliest.all(1)
    return list(zip(total.tolist(), greedy.tolist(), strict=True))


def _given(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return the log-probability of each target, and whether it is the likeliest; 0 and True where none is."""
    counted = targets != IGNORED_TARGET
    chosen = logits.float().log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    return torch.where(counted, chosen, 0.0), (logits.argmax(-1) == targets) | ~counted


def write(
    model: Model,
    texts: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    sampling: Sampling,
    seed: int,
    ended: Callable[[list[int]], bool],
) -> list[list[int]]:
    """Go on with texts of at least one token, each until its end or for `max_tokens`.

    `ended` tells of the tokens written to a text whether the last of them ended it.
    """
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    place = min(map(len, texts))
    reading = prefill(model, torch.tensor([text[:place] for text in texts], device=device))
    written: list[list[int]] = [[] for _ in texts]
    unfinished = set(range(len(texts)))
    while True:
        following = sample(reading.logits, sampling, generator).tolist()
        for row, text in enumerate(texts):
            if place < len(text):
                following[row] = text[place]
            elif row in unfinished:
                written[row].append(following[row])
                if len(written[row]) == max_tokens or ended(written[row]):
                    unfinished.remove(row)
        if not unfinished:
            return written
        reading = prefill(model, torch.tensor(following, device=device)[:, None], reading.state)
        place += 1
