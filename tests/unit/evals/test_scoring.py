"""Several texts at once against one at a time, and both against the whole text read anew for every token."""

from __future__ import annotations

import pytest
import torch

from hopescale.config.schema import AttentionConfig, LevelConfig, ModelConfig, SelfModifyingConfig
from hopescale.config.schema.model import CmsConfig
from hopescale.evals import scoring
from hopescale.evals.scoring import score, write
from hopescale.infer.sampling import Sampling
from hopescale.models import Model
from tests.support.greedy import margins

VOCAB = 32
LENGTHS = (2, 9, 30, 17, 3, 24)


@pytest.fixture(
    scope="module", params=[SelfModifyingConfig(chunk_size=8), AttentionConfig()], ids=lambda mixer: mixer.kind
)
def model(request) -> Model:
    levels = CmsConfig(levels={"fast": LevelConfig(d_ff=16), "slow": LevelConfig(d_ff=16, update_every_steps=2)})
    sizes = {"vocab_size": VOCAB, "d_model": 16, "num_layers": 2, "num_heads": 2, "tie_embeddings": False}
    model = Model(ModelConfig(**sizes, mixers={"mixer": request.param}, cms=levels), seed=3)
    return model.eval().double()  # no two tokens are equally likely but for rounding, see `naive_continuation`


def make_text(length: int) -> list[int]:
    return torch.randint(VOCAB, (length,), generator=torch.Generator().manual_seed(length)).tolist()


@torch.no_grad()
def naive_score(model: Model, text: list[int], count: int) -> tuple[float, bool]:
    total, greedy = 0.0, True
    for place in range(len(text) - count, len(text)):
        logits = model(torch.tensor([text[:place]]))[0][0, -1].double()
        total += float(logits.log_softmax(-1)[text[place]])
        greedy &= int(logits.argmax()) == text[place]
    return total, greedy


@torch.no_grad()
def naive_continuation(model: Model, text: list[int], count: int) -> list[int]:
    context = list(text)
    for _ in range(count):
        logits = model(torch.tensor([context]))[0][0, -1]
        assert margins(logits) > 1e-8
        context.append(int(logits.argmax()))
    return context[len(text) :]


def test_scores_together_equal_scores_alone(model: Model, monkeypatch: pytest.MonkeyPatch):
    """Rows of all lengths, read in parts that end within a chunk."""
    monkeypatch.setattr(scoring, "PREFILL_TOKENS", 11)
    texts = [make_text(length) for length in LENGTHS]
    texts.append(texts[3] + naive_continuation(model, texts[3], 4))
    counts = [1, 5, 12, 3, 2, 23, 4]
    together = score(model, texts, counts)
    alone = [score(model, [text], [count])[0] for text, count in zip(texts, counts, strict=True)]
    expected = [naive_score(model, text, count) for text, count in zip(texts, counts, strict=True)]
    for found in (together, alone):
        assert [total for total, _ in found] == pytest.approx([total for total, _ in expected], rel=1e-5)
        assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert together[-1][1] and not all(greedy for _, greedy in together)


def continued(model: Model, texts: list[list[int]], count: int, stop: int | None = None, **settings) -> list[list[int]]:
    settings = {"sampling": Sampling(), "seed": 0, **settings}
    return write(model, texts, max_tokens=count, ended=lambda written: written[-1] == stop, **settings)


def test_texts_written_together_equal_texts_written_alone(model: Model):
    texts = [make_text(length) for length in LENGTHS]
    expected = [naive_continuation(model, text, 10) for text in texts]
    assert continued(model, texts, 10) == expected
    assert [continued(model, [text], 10)[0] for text in texts] == expected
    assert len({tuple(text) for text in expected}) > 3


def test_each_text_ends_for_itself(model: Model):
    texts = [make_text(length) for length in LENGTHS]
    whole = continued(model, texts, 10)
    stop = next(token for token in whole[1] if token != whole[1][0])
    found = continued(model, texts, 10, stop)
    assert found == [row[: row.index(stop) + 1] if stop in row else row for row in whole]
    assert len(found[1]) < 10


def test_a_seed_repeats_what_is_drawn(model: Model):
    texts = [make_text(length) for length in LENGTHS]
    first, again, other = (continued(model, texts, 8, sampling=Sampling(2.0), seed=seed) for seed in (1, 1, 2))
    assert first == again != other
