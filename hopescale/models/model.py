"""The language model: embedding, blocks, head."""

from __future__ import annotations

import re

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hopescale.config.plan import padded_vocab_size
from hopescale.config.schema import LevelConfig, ModelConfig
from hopescale.models.block import Block
from hopescale.models.cms import by_period
from hopescale.models.init import initialize
from hopescale.models.norm import RMSNorm
from hopescale.models.state import ModelState
from hopescale.parallel.layers import ColumnLinear, Embedding, share_with_ranks
from hopescale.parallel.mesh import Mesh

INITIAL_LOGIT_STD = 0.25
_LEVEL = re.compile(r"blocks\.\d+\.cms\.levels\.(?P<name>[^.]+)\.")


class Model(nn.Module):
    """Hope, Hope-Attention or a Transformer, as the config says; weights float32 and initialised.

    Args:
        config: Sizes and switches, checked by `hopescale.config.check`.
        seed: Of the initial weights; each depends only on the seed and the parameter's name.
        mesh: Where this process stands; None is a process of its own.
    """

    def __init__(self, config: ModelConfig, *, seed: int = 0, mesh: Mesh | None = None):
        super().__init__()
        mesh = mesh or Mesh.alone()
        self.config, self.mesh = config, mesh
        padded = padded_vocab_size(config)
        self.embedding = Embedding(padded, config.d_model, std=config.init_std, mesh=mesh)
        self.blocks = nn.ModuleList(Block(config, mesh) for _ in range(config.num_layers))
        # Logits of a fresh model stay near zero at any width, so that its loss starts at ln(vocabulary).
        scale = min(1.0, INITIAL_LOGIT_STD / (config.init_std * config.d_model**0.5))
        self.norm = RMSNorm(config.d_model, eps=config.norm_eps, scale=scale)
        self.head = None
        if not config.tie_embeddings:
            self.head = ColumnLinear(config.d_model, padded, std=config.init_std, mesh=mesh)
        initialize(self, seed, mesh)

    def initial_state(self, batch: int) -> ModelState:
        """Return the state before the first token, for `batch` sequences."""
        return ModelState(tuple(block.mixer.initial_state(batch) for block in self.blocks))

    def forward(
        self,
        tokens: Tensor,
        state: ModelState | None = None,
        *,
        document_ids: Tensor | None = None,
        probe: dict[str, Tensor] | None = None,
        last_only: bool = False,
    ) -> tuple[Tensor, ModelState]:
        """Read tokens and predict the next one after each.

        Args:
            tokens: `[B, T]`, int64.
            state: What an earlier call returned; None begins anew.
            document_ids: `[B, T]`, for attention `within_documents`.
            probe: Filled with `memory/<layer>/<statistic>` scalars if given.
            last_only: Whether to predict after the last token alone, as generation needs.

        Returns:
            This rank's share of the logits, `[B, T, V / tp]` or `[B, 1, V / tp]` if `last_only`, with `-inf` for the
            entries of the padding; and the state after the last token.
        """
        x = self.embedding(tokens).transpose(0, 1)  # [T, B, N]
        states = []
        for index, block in enumerate(self.blocks):
            seen: dict[str, Tensor] | None = None if probe is None else {}
            x, layer = block(x, None if state is None else state.layers[index], document_ids, seen)
            states.append(layer)
            if probe is not None:
                probe |= {f"memory/{index}/{name}": value for name, value in seen.items()}
        x = x[-1:] if last_only else x
        return self._logits(self.norm(x)).transpose(0, 1), ModelState(tuple(states))

    def _logits(self, x: Tensor) -> Tensor:
        if self.head is not None:
            logits = self.head(x)
        else:
            logits = F.linear(share_with_ranks(x, self.mesh), self.embedding.weight)
        if padded_vocab_size(self.config) == self.config.vocab_size:
            return logits
        first = self.mesh.tp_group.rank() * logits.shape[-1]
        padding = torch.arange(first, first + logits.shape[-1], device=logits.device) >= self.config.vocab_size
        return logits.masked_fill(padding, float("-inf"))

    def to_precision(self, dtype: torch.dtype) -> Model:
        """Cast weights to `dtype`, all but gates, norms and memories, which stay float32. In place; returns self."""
        for parameter in self.parameters():
            if not parameter.spec.keep_fp32:
                parameter.data = parameter.data.to(dtype)
        return self

    def level_parameters(self) -> dict[str, list[str]]:
        """Return the parameter names of each level, fast to slow."""
        members: dict[str, list[str]] = {name: [] for name, _ in self.levels()}
        for name, _ in self.named_parameters():
            if (level := level_of(name)) is not None:
                members[level].append(name)
        return members

    def levels(self) -> list[tuple[str, LevelConfig]]:
        """Return the levels of the continuum memory system, fast to slow."""
        return by_period(self.config.cms.levels)


def level_of(parameter_name: str) -> str | None:
    """Return the name of the level a parameter belongs to; None if it is updated every step."""
    match = _LEVEL.match(parameter_name)
    return match["name"] if match else None
