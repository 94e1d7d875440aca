"""Levels that follow the text they read: their weights take a step on its next-token loss, each at its own period.

The continuum memory system in context (Nested Learning, 7.1, 9.1). Each sequence of a batch has weights of its own.
With `W_l` the weights of level `l`, of period `P_l` and rate `r_l`, and `L_t` the loss of what is predicted after
token `t`, a step at the end of a period, where `n` of its predictions count, is

    W_l <- W_l - r_l / n * sum_(t in the period) dL_t / dW_l                                 Eq. 71, with a mean

Gradients end where the text was cut: at each step of any level, and every `PREFILL_TOKENS`. The state that a piece
begins with is a constant of it. A prediction has seen steps on earlier tokens alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from hopescale.infer.adaptation import Adaptation
from hopescale.infer.generate import PREFILL_TOKENS
from hopescale.models import Model, ModelState, level_of
from hopescale.parallel.layers import IGNORED_TARGET, cross_entropy_sum


class InContextReader:
    """A model that reads sequences side by side, while levels follow each of them. The model's weights are frozen.

    With rates of 0 alone the model reads as ever, bit for bit.

    Args:
        model: Model, whole or this tensor-parallel rank's part of it.
        adaptation: Levels and their cadences, of this model.
        batch: Sequences.
        context: Tokens after which the model's state begins anew, while levels go on; None carries it for ever.

    Attributes:
        weights: Weights of the levels that follow, `[B, *shape]` by the names of parameters, float32 at least.
        state: State of the model after the tokens read so far; None at the beginning of a context.
        position: Tokens read.
    """

    def __init__(self, model: Model, adaptation: Adaptation, batch: int, context: int | None = None):
        self.model, self.adaptation = model.requires_grad_(False), adaptation
        self.batch, self.context = batch, context
        self._levels = adaptation.moving()
        self._members = {name: list[str]() for name in self._levels}
        self._trained: dict[str, Tensor] = {}
        for name, parameter in model.named_parameters():
            if (level := level_of(name)) in self._levels:
                self._members[level].append(name)
                self._trained[name] = parameter.detach().to(torch.promote_types(parameter.dtype, torch.float32))
        self.begin()

    def begin(self) -> None:
        """Begin anew, with the trained weights and an empty state."""
        self.state: ModelState | None = None
        self.position = 0
        each = {name: weight.expand(self.batch, *weight.shape) for name, weight in self._trained.items()}
        self.weights = {name: weight.clone() for name, weight in each.items()}
        self._sums = {name: torch.zeros_like(weight) for name, weight in self.weights.items()}
        device = next(self.model.parameters()).device
        self._counts = {level: torch.zeros(self.batch, dtype=torch.int64, device=device) for level in self._levels}

    def read(self, tokens: Tensor, targets: Tensor) -> Iterator[Tensor]:
        """Read tokens, and yield the logits after them, piece by piece; take the steps that are due.

        Args:
            tokens: Ids `[B, T]`, on the model's device.
            targets: The id after each token, `IGNORED_TARGET` where levels must not learn. Shape `[B, T]`, int64.

        Yields:
            This rank's share of the logits of a piece, `[B, t, V / tp]`.
        """
        while tokens.shape[1]:
            size = min(self._until_border(), tokens.shape[1])
            yield self._read(tokens[:, :size], targets[:, :size])
            tokens, targets = tokens[:, size:], targets[:, size:]

    def _until_border(self) -> int:
        periods = [PREFILL_TOKENS, *(level.period for level in self._levels.values())]
        periods += [] if self.context is None else [self.context]
        return min(period - self.position % period for period in periods)

    def _read(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Read a piece that ends at a border, or before the next one."""
        if self._levels:
            logits, gradients = self._gradients(tokens, targets)
            for name, gradient in gradients.items():
                self._sums[name] += gradient
            counted = (targets != IGNORED_TARGET).sum(1)
            for level in self._levels:
                self._counts[level] += counted
        else:
            with torch.no_grad():
                logits, self.state = self.model(tokens, self.state)
        self.position += tokens.shape[1]
        if self.context is not None and self.position % self.context == 0:
            self.state = None
        self._step()
        return logits

    def _gradients(self, tokens: Tensor, targets: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return logits, and the gradient of each sequence's summed loss with respect to its own weights."""
        with torch.enable_grad():
            weights = {name: weight.detach().requires_grad_() for name, weight in self.weights.items()}
            logits, state = self.model(tokens, self.state, levels=weights)
            loss = cross_entropy_sum(logits, targets, self.model.mesh)
            found = torch.autograd.grad(loss, list(weights.values()))
        self.state = _constant(state)
        return logits.detach(), dict(zip(weights, found, strict=True))

    def _step(self) -> None:
        """Let the levels step whose period ends here, and with `nested` all faster ones return."""
        due = [level for level, cadence in self._levels.items() if self.position % cadence.period == 0]
        for level in due:
            counts = self._counts[level].clamp(min=1)
            for name in self._members[level]:
                weight, sums = self.weights[name], self._sums[name]
                scale = self._levels[level].rate / counts.to(weight.dtype)
                self.weights[name] = weight - scale.view(-1, *[1] * (weight.dim() - 1)) * sums
                sums.zero_()
            self._counts[level].zero_()
        if self.adaptation.nested:
            for level in due[:-1]:  # levels are fast to slow; of those that are due, the slowest alone has learned
                for name in self._members[level]:
                    self.weights[name] = self._trained[name].expand_as(self.weights[name]).clone()

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors that are needed to continue, besides `weights`, `state` and `position`."""
        return {f"sums/{name}": sums for name, sums in self._sums.items()} | {
            f"counts/{level}": counts for level, counts in self._counts.items()
        }

    def splits(self) -> dict[str, int]:
        """Return along which dimension tensors are split over tensor-parallel ranks, by the names of `weights` and
        `tensors`; nothing of what every rank holds whole.
        """
        if self.model.mesh.tp_group.size() == 1:
            return {}
        dims = {name: p.spec.partition_dim for name, p in self.model.named_parameters() if name in self.weights}
        # Sequences come first.
        found = {name: dim + 1 for name, dim in dims.items() if dim is not None}
        return found | {f"sums/{name}": dim for name, dim in found.items()}

    def go_on(
        self, weights: Mapping[str, Tensor], rest: Mapping[str, Tensor], state: ModelState | None, position: int
    ) -> None:
        """Continue from the tensors of another reader of the same model and adaptation."""
        self.weights, self.state, self.position = dict(weights), state, position
        self._sums = {name: rest[f"sums/{name}"].clone() for name in self._sums}
        self._counts = {level: rest[f"counts/{level}"].clone() for level in self._counts}


def _constant(state: ModelState) -> ModelState:
    """Return a state through which no gradient flows."""
    layers = (layer.with_named({n: tensor.detach() for n, tensor in layer.named().items()}) for layer in state.layers)
    return ModelState(tuple(layers))
