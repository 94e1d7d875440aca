"""Generation from a carried state against recomputing the whole context for every token."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hopescale.config.schema import AttentionConfig, LevelConfig, ModelConfig, SelfModifyingConfig
from hopescale.config.schema.model import CmsConfig
from hopescale.infer import generate as module
from hopescale.infer.generate import generate, prefill, threads_with_work
from hopescale.infer.sampling import Sampling
from hopescale.models import Model
from tests.support.greedy import margins

VOCAB, CHUNK = 32, 8
LEVELS = {"fast": LevelConfig(d_ff=16), "slow": LevelConfig(d_ff=16, update_every_steps=2)}
HOPE = SelfModifyingConfig(chunk_size=CHUNK)
CMS = {"cms": CmsConfig(levels=LEVELS)}
ARCHITECTURES = {
    "hope": {"mixers": {"hope": HOPE}, **CMS},
    "hybrid": {"mixers": {"hope": HOPE, "local": AttentionConfig(window=9)}, "pattern": ("hope", "local")} | CMS,
    "hope_attention": {"mixers": {"attention": AttentionConfig()}, **CMS},
    "transformer": {"mixers": {"attention": AttentionConfig()}, "cms": CmsConfig(levels={"mlp": LevelConfig(d_ff=16)})},
    "sliding window": {"mixers": {"attention": AttentionConfig(window=9)}, **CMS},
}


def make_model(name: str) -> Model:
    """An untied head, as a fresh model with a tied one repeats its last token whatever stood before."""
    sizes = {"vocab_size": VOCAB, "d_model": 16, "num_layers": 2, "num_heads": 2, "tie_embeddings": False}
    return Model(ModelConfig(**sizes, **ARCHITECTURES[name]), seed=3).eval()


@pytest.fixture(scope="module")
def models() -> dict[str, Model]:
    return {name: make_model(name) for name in ARCHITECTURES}


def make_prompt(length: int, batch: int = 1) -> Tensor:
    return torch.randint(VOCAB, (batch, length), generator=torch.Generator().manual_seed(length))


def continued(model: Model, prompt: Tensor, count: int, sampling: Sampling | None = None, **options) -> list[Tensor]:
    """Return the generated tokens `[B, count]` as a list of columns."""
    steps = generate(
        model,
        prefill(model, prompt),
        max_tokens=count,
        sampling=sampling or Sampling(),
        generator=torch.Generator().manual_seed(options.pop("seed", 0)),
        **options,
    )
    return [step.token for step in steps]


@torch.no_grad()
def recomputed(model: Model, prompt: Tensor, count: int) -> list[Tensor]:
    """Generate from the whole context; each token leads the next by far more than two ways through a model differ."""
    context = prompt
    for _ in range(count):
        logits = model(context)[0][:, -1]
        assert (margins(logits) > 1e-8).all()
        context = torch.cat([context, logits.argmax(-1, keepdim=True)], dim=1)
    return list(context[:, prompt.shape[1] :].unbind(1))


@pytest.mark.parametrize("length", [1, 7, 8, 19, 33])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_carried_state_equals_full_recomputation_under_greedy(models, name: str, length: int):
    """Prompts that end within a chunk, at its end and beyond; the continuation crosses two more boundaries.

    In float64, where logits of the two ways differ by 1e-12 and no two tokens are equally likely.
    """
    prompt, model = make_prompt(length, batch=2), make_model(name).double()
    found, expected = continued(model, prompt, 19), recomputed(model, prompt, 19)
    assert torch.equal(torch.stack(found), torch.stack(expected))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_continuation_depends_on_the_context(models, name: str):
    """Else the test above would show little."""
    prompts = [torch.cat([make_prompt(length), make_prompt(1)], dim=1) for length in (2, 13, 20, 33)]
    texts = {tuple(int(token) for token in continued(models[name], prompt, 12)) for prompt in prompts}
    assert len(texts) == 4 and sum(len(set(text)) > 2 for text in texts) > 1


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_long_prompt_is_read_in_parts(models, name: str, monkeypatch: pytest.MonkeyPatch):
    prompt = make_prompt(37)
    whole, state = prefill(models[name], prompt)
    monkeypatch.setattr(module, "PREFILL_TOKENS", 11)
    told: list[int] = []
    parts, again = prefill(models[name], prompt, on_read=told.append)
    assert state.position == again.position == 37 and told == [11, 11, 11, 4]
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-5)
    more, _ = prefill(models[name], make_prompt(5), again)
    expected, _ = models[name](torch.cat([prompt, make_prompt(5)], dim=1))
    torch.testing.assert_close(more, expected[:, -1], rtol=1e-4, atol=1e-5)


def test_prefill_predicts_the_token_after_the_context(models):
    logits, state = prefill(models["hope"], make_prompt(9, batch=3))
    assert logits.shape[0] == 3 and state.position == 9
    torch.testing.assert_close(logits, models["hope"](make_prompt(9, batch=3))[0][:, -1], rtol=1e-4, atol=1e-5)


def watched(model: Model, prompt: Tensor, count: int) -> tuple[list[int], list[int]]:
    """Return the tokens read by each call of the model after the prompt, and the entries of the state after each."""
    read, entries = [], []

    def note(_, args, output):
        read.append(args[0].shape[1])
        entries.append(sum(tensor.numel() for layer in output[1].layers for tensor in layer.named().values()))

    handle = model.register_forward_hook(note)
    try:
        continued(model, prompt, count)
    finally:
        handle.remove()
    assert read[0] == prompt.shape[1]
    return read[1:], entries


def test_the_cost_of_a_token_does_not_depend_on_the_context(models):
    short, state_of_short = watched(models["hope"], make_prompt(3), 20)
    long, state_of_long = watched(models["hope"], make_prompt(90), 20)
    assert set(short) == set(long) == {1}
    assert len(set(state_of_short + state_of_long)) == 1


def test_only_attention_keeps_what_it_has_read(models):
    read, entries = watched(models["transformer"], make_prompt(3), 20)
    assert set(read) == {1}
    growth = {later - earlier for earlier, later in zip(entries, entries[1:], strict=False)}
    assert growth == {2 * 2 * 16}  # keys and values of two layers
    _, entries = watched(models["sliding window"], make_prompt(3), 20)
    assert max(entries) == entries[-1] == 9 * 2 * 2 * 16


def test_generation_ends_before_the_end_token(models):
    prompt = make_prompt(9)
    tokens = [int(token) for token in continued(models["hope"], prompt, 20)]
    end = next(token for token in tokens if token != tokens[0])
    until = [int(token) for token in continued(models["hope"], prompt, 20, end=end)]
    assert until == tokens[: tokens.index(end)]
    unused = next(token for token in range(VOCAB) if token not in tokens)
    assert [int(token) for token in continued(models["hope"], prompt, 20, end=unused)] == tokens


def test_each_step_carries_the_state_before_its_token(models):
    model, prompt = models["hope"], make_prompt(5)
    steps = list(
        generate(model, prefill(model, prompt), max_tokens=3, sampling=Sampling(), generator=torch.Generator())
    )
    assert [step.state.position for step in steps] == [5, 6, 7]
    with torch.no_grad():
        logits, _ = model(steps[1].token[:, None], steps[1].state)
    assert int(logits[:, -1].argmax()) == int(steps[2].token)


def test_the_seed_decides_what_is_drawn(models):
    first, again, other = (
        torch.stack(continued(models["hope"], make_prompt(4), 16, Sampling(1.0, top_k=20), seed=seed))
        for seed in (1, 1, 2)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_nothing_is_kept_for_a_backward_pass(models):
    model = models["hope"]
    reading = prefill(model, make_prompt(3))
    for step in generate(model, reading, max_tokens=2, sampling=Sampling(), generator=torch.Generator()):
        tensors = [tensor for layer in step.state.layers for tensor in layer.named().values()]
        assert not any(tensor.requires_grad for tensor in tensors)
    assert torch.is_grad_enabled()


def test_low_precision_models_generate():
    model = make_model("hope").to_precision(torch.bfloat16)
    assert len(continued(model, make_prompt(11), 9)) == 9


def test_threads_are_as_many_as_have_work():
    assert [threads_with_work(4 * 2**20, tokens, 8) for tokens in (1, 16, 64, 2048)] == [1, 2, 8, 8]
    assert threads_with_work(2**30, 1, 4) == 4 and threads_with_work(1, 1, 8) == 1


def test_a_small_model_reads_on_one_thread_and_leaves_the_number_as_it_was(monkeypatch: pytest.MonkeyPatch):
    model, seen = make_model("hope"), []
    before = torch.get_num_threads()
    original = type(model).forward

    def forward(*args, **options):
        seen.append(torch.get_num_threads())
        return original(*args, **options)

    monkeypatch.setattr(type(model), "forward", forward)
    torch.set_num_threads(2)
    try:
        prefill(model, torch.ones(1, 3, dtype=torch.long))
        assert (seen, torch.get_num_threads()) == ([1], 2)
    finally:
        torch.set_num_threads(before)
