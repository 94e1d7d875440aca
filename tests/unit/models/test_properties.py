"""What every system of the recipes must be: causal, by rows, continuable, trainable in all parameters, by documents."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from hopescale.common.paths import shipped_folder
from hopescale.config.load import load_recipe
from hopescale.config.schema import AttentionConfig, FarMemoryConfig, MixerConfig, ModelConfig
from hopescale.models import Model

SYSTEMS = sorted(path.stem.removesuffix("_tiny") for path in shipped_folder("recipes").glob("*_tiny.yaml"))
PATTERNS = {"hope, sliding windows": ("hope", 7), "gated_deltanet, attention": ("gated_deltanet", None)}
FAR = {
    "hope, resets and a far memory": ("hope", {"reset_every": 16, "far": FarMemoryConfig(16, 0.1)}),
    "titans, resets and a far memory": ("titans", {"reset_every": 8, "far": FarMemoryConfig(24, 0.1)}),
}
"""Hierarchies as in TNT, of recipes with further settings."""
SIZES = {"num_heads": 2, "key_dim": 12, "value_dim": 10, "window": 7, "chunk_size": 8}
"""Sizes of mixers that have them; chunks and windows are shorter than the text, whose length they do not divide."""
TOKENS, WIDE = 45, torch.float64


def small(mixer: MixerConfig) -> MixerConfig:
    return replace(mixer, **{name: size for name, size in SIZES.items() if getattr(mixer, name, None) is not None})


def make_config(case: str) -> ModelConfig:
    (system, window), more = PATTERNS.get(case, (case, None)), {}
    if case in FAR:
        system, more = FAR[case]
    model = load_recipe(f"{system}_tiny").config.model
    if case in PATTERNS:
        (name,) = model.mixers
        model = replace(model, mixers=model.mixers | {"more": AttentionConfig(window=window)}, pattern=(name, "more"))
    levels = {name: replace(level, d_ff=24) for name, level in model.cms.levels.items()}
    sizes = {"vocab_size": 100, "d_model": 32, "num_layers": 2, "num_heads": 2, "tie_embeddings": False}
    mixers = {name: replace(small(mixer), **more) for name, mixer in model.mixers.items()}
    return replace(model, **sizes, mixers=mixers, cms=replace(model.cms, levels=levels), within_documents=True)


@pytest.fixture(scope="module", params=[*SYSTEMS, *PATTERNS, *FAR])
def model(request: pytest.FixtureRequest) -> Model:
    """A model in float64, away from its initial weights."""
    model, generator = Model(make_config(request.param), seed=1).to(WIDE), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator, dtype=WIDE)
    return model


@pytest.fixture(scope="module")
def tokens() -> Tensor:
    return torch.randint(0, 100, (2, TOKENS), generator=torch.Generator().manual_seed(2))


def same(found: Tensor, expected: Tensor, **how: float) -> None:
    torch.testing.assert_close(found[..., :100], expected[..., :100], **({"rtol": 1e-6, "atol": 1e-7} | how))


@torch.no_grad()
def test_no_token_sees_a_later_one(model: Model, tokens: Tensor):
    whole, other = model(tokens)[0], tokens.clone()
    for place in (1, 8, 30):
        other[:, place:] = tokens[:, place:].flip(1)
        changed = model(other)[0]
        same(changed[:, :place], whole[:, :place])
        assert (changed[:, place] - whole[:, place])[..., :100].abs().max() > 1e-6
        other = tokens.clone()


@torch.no_grad()
def test_rows_are_independent(model: Model, tokens: Tensor):
    whole = model(tokens)[0]
    for row in range(2):
        same(model(tokens[row : row + 1])[0], whole[row : row + 1])


@torch.no_grad()
@pytest.mark.parametrize("cuts", [(1,), (8, 9), (21, 22, 23, 24)])
def test_a_text_in_parts_equals_one_pass(model: Model, tokens: Tensor, cuts: tuple[int, ...]):
    state, parts = None, []
    for part in torch.tensor_split(tokens, cuts, dim=1):
        logits, state = model(part, state)
        parts.append(logits)
    same(torch.cat(parts, dim=1), model(tokens)[0])
    assert state.position == TOKENS


def gradients(model: Model, tokens: Tensor, weights: Tensor, ids: Tensor | None = None) -> dict[str, Tensor]:
    model.zero_grad()
    logits = model(tokens, document_ids=ids)[0][..., :100]
    (logits.log_softmax(-1) * weights).sum().backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    # Of a document within one far chunk nothing is read that far memories write.
    return {name: torch.zeros(()) if gradient is None else gradient for name, gradient in found.items()}


def test_every_parameter_is_trained(model: Model, tokens: Tensor):
    weights = torch.randn(2, TOKENS, 100, generator=torch.Generator().manual_seed(3), dtype=WIDE)
    for name, gradient in gradients(model, tokens, weights).items():
        assert gradient.abs().max() > 0, name


@pytest.mark.parametrize("lengths", [(13, 1, 8, 23), (1, 1, 43), (45,)])
def test_a_packed_window_equals_its_documents_apart(model: Model, tokens: Tensor, lengths: tuple[int, ...]):
    """Logits and the gradient of every parameter, though rows have documents of other lengths."""
    rows = (lengths, lengths[::-1])
    ids = torch.stack([torch.repeat_interleave(torch.arange(len(row)), torch.tensor(row)) for row in rows])
    weights = torch.randn(2, TOKENS, 100, generator=torch.Generator().manual_seed(3), dtype=WIDE)
    packed, logits = gradients(model, tokens, weights, ids), model(tokens, document_ids=ids)[0]
    apart: dict[str, Tensor] = {}
    for row, sizes in enumerate(rows):
        begin = 0
        for size in sizes:
            here = slice(begin, begin + size)
            text = tokens[row : row + 1, here]
            same(logits[row : row + 1, here], model(text)[0])
            for name, gradient in gradients(model, text, weights[row : row + 1, here]).items():
                apart[name] = apart.get(name, 0) + gradient
            begin += size
    for name, gradient in packed.items():
        error = (gradient - apart[name]).norm() / apart[name].norm().clamp_min(1e-12)
        assert error < 1e-6, name
