"""The language model: embedding, blocks, head."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from hopescale.config.model_shape import by_period, padded_vocab_size
from hopescale.config.schema import LevelConfig, ModelConfig
from hopescale.config.transfer import base_width, logit_multiplier
from hopescale.models.block import Block
from hopescale.models.handover import Handover
from hopescale.models.init import initialize
from hopescale.models.norm import StreamNorm
from hopescale.models.state import ModelState
from hopescale.ops.backends import Backend, KernelPrecision, Recompute
from hopescale.ops.documents import Documents
from hopescale.ops.vectors import linear
from hopescale.parallel.layers import ColumnLinear, Embedding
from hopescale.parallel.mesh import Mesh
from hopescale.parallel.regions import gather_tokens

INITIAL_LOGIT_STD = 0.25
_LEVEL = re.compile(r"blocks\.(?P<block>\d+)\.cms\.levels\.(?P<name>[^.]+)\.")


class Model(nn.Module):
    """Hope, Hope-Attention or a Transformer, as the config says, or a slice of it; weights float32 and initialised.

    A slice holds consecutive blocks under the names they have in the whole model. The one that begins the model holds
    the embedding, the one that ends it the final norm and the head, which if tied is a copy of the embedding.

    Args:
        config: Sizes and switches, checked by `hopescale.config.check`.
        seed: Seed of the initial weights; each depends on it, name and place alone. None sets no weights.
        mesh: Ranks of the run, and this process among them; None is a process of its own.
        blocks: Numbers of the blocks to hold, from 0; None is all.
        recompute: Activations computed again in the backward pass instead of kept; as `train.recompute`.
        compiled: Whether the chunk loop of memories is compiled; as `train.compile`.
        backend: Code that runs memories; as `train.backend`.
        kernel_precision: Operands of its products; as `train.kernel_precision`.

    Attributes:
        is_first: Whether this slice begins the model.
        is_last: Whether this slice ends the model.
        num_params: Number of parameters that this process holds.

    Raises:
        ValueError: If `blocks` are not consecutive blocks of the model.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        seed: int | None = 0,
        mesh: Mesh | None = None,
        blocks: range | None = None,
        recompute: Recompute = "none",
        compiled: bool = False,
        backend: Backend = "auto",
        kernel_precision: KernelPrecision = "auto",
    ):
        super().__init__()
        mesh = mesh or Mesh.alone()
        blocks = range(config.num_layers) if blocks is None else blocks
        if not blocks or blocks.step != 1 or blocks.start < 0 or blocks.stop > config.num_layers:
            raise ValueError(f"{blocks} are not consecutive blocks of a model of {config.num_layers}")
        self.config, self.mesh = config, mesh
        self.is_first, self.is_last = blocks.start == 0, blocks.stop == config.num_layers
        padded = padded_vocab_size(config)
        self.embedding = self.norm = self.head = None
        if self.is_first or (self.is_last and config.tie_embeddings):
            self.embedding = Embedding(padded, config.d_model, std=config.init_std, mesh=mesh)
        how = (recompute, compiled, backend, kernel_precision)
        self.blocks = nn.ModuleDict({str(n): Block(config, n, mesh, *how) for n in blocks})
        if self.is_last:
            # Logits of a fresh model stay near zero at any width, so that its loss starts at ln(vocabulary).
            scale = min(1.0, INITIAL_LOGIT_STD / (config.init_std * base_width(config) ** 0.5))
            factors = {"scale": scale, "multiplier": logit_multiplier(config)}
            self.norm = StreamNorm(config.d_model, eps=config.norm_eps, mesh=mesh, backend=backend, **factors)
            if not config.tie_embeddings:
                shared = {"mesh": mesh, "shared_input": True, "sizes": ()}
                self.head = ColumnLinear(config.d_model, padded, std=config.init_std, **shared)
        if seed is not None:
            initialize(self, seed, mesh)
        self.num_params = sum(parameter.numel() for parameter in self.parameters())

    def initial_state(self, batch: int) -> ModelState:
        """Return the state before the first token, for `batch` sequences."""
        return ModelState(tuple(block.mixer.initial_state(batch) for block in self.blocks.values()))

    def forward(
        self,
        tokens: Tensor | None,
        state: ModelState | None = None,
        *,
        hidden: Tensor | None = None,
        document_ids: Tensor | None = None,
        begun: Tensor | None = None,
        probe: dict[str, Tensor] | None = None,
        last_only: bool = False,
        levels: Mapping[str, Tensor] | None = None,
        handover: Handover | None = None,
    ) -> tuple[Tensor, ModelState]:
        """Read tokens and predict the next one after each.

        Args:
            tokens: `[B, T]`, int64; read by the slice that begins the model only.
            state: State that an earlier call returned; None begins anew.
            hidden: Output `[T, B, N]` of the slice before; None for the slice that begins the model.
            document_ids: `[B, T]`, used if the model mixes `within_documents`; the host reads them, best on the CPU.
            begun: Tokens in earlier pieces, `[B, 1]` on the CPU, of the document that each sequence begins with here.
                None where sequences are whole.
            probe: Dict to be filled with `memory/<layer>/<statistic>`.
            last_only: Whether to predict after the last token alone, as generation needs.
            levels: Weights that each sequence has for itself, `[B, *shape]`, by the names of parameters: all those of
                the levels that follow the text; None reads with the model's own.
            handover: Exchange of states with the ranks that hold the pieces of the sequence around these tokens, in
                place of `state`.

        Returns:
            This rank's share of the logits, `[B, T, V / tp]` or `[B, 1, V / tp]` if `last_only`, with `-inf` for the
            entries of the padding; from a slice that does not end the model, `hidden` for the next. And the state after
            the last token, of these blocks. Under sequence parallelism `hidden` is this rank's `[T / tp, B, N]`.

        Raises:
            ValueError: If `hidden` is given where tokens are read, or the reverse; if tokens cannot be split evenly
                (sequence parallel).
        """
        x = self._enter(tokens, hidden)
        within = self.config.within_documents and document_ids is not None
        documents = Documents.of(document_ids, x.device, begun) if within else None
        states = []
        for index, (number, block) in enumerate(self.blocks.items()):
            stats: dict[str, Tensor] | None = None if probe is None else {}
            layer, kept_apart = None if state is None else state.layers[index], documents
            if handover is not None:
                x, layer = handover.enter(x, block.mixer, int(number))
                kept_apart = documents or handover.sequences(x, block.mixer)
            x, layer = block(x, layer, kept_apart, stats, levels and _of_block(levels, number))
            if handover is not None:
                x = handover.leave(x, layer, block.mixer, int(number))
            states.append(layer)
            if probe is not None:
                probe |= {f"memory/{number}/{name}": value for name, value in stats.items()}
        # What goes to another rank must be contiguous.
        output = self._logits(x, last_only).transpose(0, 1) if self.is_last else x.contiguous()
        return output, ModelState(tuple(states))

    def _enter(self, tokens: Tensor | None, hidden: Tensor | None) -> Tensor:
        """Return the residual stream before the first block held here."""
        if not self.is_first:
            if hidden is None:
                raise ValueError("hidden is missing: this slice does not begin the model")
            return hidden
        if tokens is None or hidden is not None:
            raise ValueError("the slice that begins the model reads tokens, and no hidden")
        ranks = self.mesh.tp_group.size()
        if self.mesh.sequence_parallel and tokens.shape[1] % ranks:
            raise ValueError(f"sequence parallel: {tokens.shape[1]} tokens cannot be split evenly over {ranks} ranks")
        return self.embedding(tokens)

    def _logits(self, x: Tensor, last_only: bool) -> Tensor:
        x = gather_tokens(self.norm(x)[1], self.mesh)
        x = x[-1:] if last_only else x
        logits = linear(x, self.embedding.weight) if self.head is None else self.head(x)
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

    def block_of(self, parameter_name: str) -> int:
        """Return the number of the block that a parameter of a level belongs to."""
        return int(_LEVEL.match(parameter_name)["block"])

    def levels(self) -> list[tuple[str, LevelConfig]]:
        """Return the levels of the continuum memory system, fast to slow."""
        return by_period(self.config.cms.levels)


def _of_block(levels: Mapping[str, Tensor], number: str) -> dict[str, dict[str, Tensor]]:
    """Return the weights of a block's levels, by level and by their names in it."""
    found: dict[str, dict[str, Tensor]] = {}
    for name, weight in levels.items():
        match = _LEVEL.match(name)
        if match["block"] == number:
            found.setdefault(match["name"], {})[name[match.end() :]] = weight
    return found


def level_of(parameter_name: str) -> str | None:
    """Return the name of the level a parameter belongs to; None if it is updated every step."""
    match = _LEVEL.match(parameter_name)
    return match["name"] if match else None
