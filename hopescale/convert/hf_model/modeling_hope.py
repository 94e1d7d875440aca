"""Hope, Hope-Attention and Transformers trained by hopescale, for transformers; hopescale is not needed."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from .attention_hope import HopeAttention
from .columns_hope import Columns, Norm, RowPosition, State
from .configuration_hope import HopeConfig
from .linear_hope import HopeLinearAttention
from .memory_hope import HopeSelfModifying
from .titans_hope import HopeTitans
from .ttt_hope import HopeTtt

VOCAB_MULTIPLE = 128  # rows of the embedding are padded to a multiple of this
LOSS_ARGUMENTS = ("num_items_in_batch", "ignore_index", "shift_labels")


class HopeCache:
    """State of a model between calls: the tensors of each block by name, batch first.

    Attributes:
        layers: One dict per block; empty before the first token.
        real: `[B, columns]`, which of the columns read so far were tokens and not padding.
    """

    is_compileable = False
    is_croppable = False

    def __init__(self, layers: list[State], real: Tensor):
        self.layers, self.real = layers, real

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the columns read so far, padding included."""
        return self.real.shape[1]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let row `i` continue row `beam_idx[i]`."""
        self.real = self.real[beam_idx]
        self.layers = [{name: tensor[beam_idx] for name, tensor in layer.items()} for layer in self.layers]


class HopeLevel(nn.Module):
    """A gated MLP, with a norm in front if it stands in a chain."""

    def __init__(self, width: int, d_ff: int, norm_eps: float | None):
        super().__init__()
        self.norm = None if norm_eps is None else Norm(width, eps=norm_eps)
        self.gate, self.up = (nn.Linear(width, d_ff, bias=False) for _ in range(2))
        self.down = nn.Linear(d_ff, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the level's addition to the residual stream."""
        x = x if self.norm is None else self.norm(x)
        return self.down(F.silu(self.gate(x)) * self.up(x))


class HopeContinuumMemory(nn.Module):
    """The levels of a block, fast to slow: a chain, or side by side with learned weights."""

    def __init__(self, model: SimpleNamespace, number: int):
        super().__init__()
        levels = sorted(model.cms.levels.items(), key=lambda item: (item[1]["update_every_steps"], item[0]))
        if model.cms.placement == "depth":
            levels = [levels[number * len(levels) // model.num_layers]]
        self.chained = model.cms.variant == "sequential"
        eps = model.norm_eps if self.chained else None
        self.levels = nn.ModuleDict({name: HopeLevel(model.d_model, level["d_ff"], eps) for name, level in levels})
        if not self.chained:
            self.norm, self.mix = Norm(model.d_model, eps=model.norm_eps), nn.Parameter(torch.ones(len(levels)))

    def forward(self, x: Tensor) -> Tensor:
        """Return the residual stream `[B, T, N]` with the additions of the levels."""
        if self.chained:
            flat = x.flatten(0, 1)
            for level in self.levels.values():
                flat = flat + level(flat)
            return flat.view(x.shape)
        shared, weights = self.norm(x), self.mix.to(x.dtype)
        return x + sum(weight * level(shared) for weight, level in zip(weights, self.levels.values(), strict=True))


MIXERS = {
    "attention": HopeAttention,
    "linear_attention": HopeLinearAttention,
    "self_modifying": HopeSelfModifying,
    "titans": HopeTitans,
    "ttt": HopeTtt,
}


class HopeBlock(nn.Module):
    """`x <- x + mixer(norm(x))`, then `x <- cms(x)`."""

    def __init__(self, model: SimpleNamespace, number: int):
        super().__init__()
        dim = model.head_dim or model.d_model // model.num_heads
        self.norm = Norm(model.d_model, eps=model.norm_eps)
        mixer = model.mixers[model.pattern[number % len(model.pattern)]]
        self.mixer = MIXERS[mixer.kind](model, mixer, dim)
        self.cms = HopeContinuumMemory(model, number)

    def forward(self, x: Tensor, state: State, columns: Columns) -> tuple[Tensor, State]:
        """Map the residual stream to itself, and return the mixer's state."""
        y, state = self.mixer(self.norm(x), state, columns)
        return self.cms(x + y), state


class HopeForCausalLM(PreTrainedModel, GenerationMixin):
    """A language model that carries its state as `past_key_values`. Padding may stand on either side."""

    config_class = HopeConfig
    _supports_sdpa = True
    _is_stateful = True
    _no_split_modules = ("HopeBlock",)
    supports_gradient_checkpointing = True
    _keep_in_fp32_modules_strict = (
        *("norm.weight", "norm.bias", "cms.mix", "mixer.persistent"),
        *(f"{mixer}.{part}" for mixer in ("mixer", "mixer.memory") for part in ("gates", "conv", "banks")),
    )

    def __init__(self, config: HopeConfig):
        super().__init__(config)
        model = _namespace(config.hope)
        model.pattern = model.pattern or list(model.mixers)
        rows, self.gradient_checkpointing = _rows(model.vocab_size), False
        self.period = math.lcm(*(_period(mixer) for mixer in model.mixers.values()))
        self.embedding = nn.Embedding(rows, model.d_model)
        self.blocks = nn.ModuleDict({str(number): HopeBlock(model, number) for number in range(model.num_layers)})
        multiplier = 1.0 if model.transfer is None else model.transfer.base_width / model.d_model
        self.norm = Norm(model.d_model, eps=model.norm_eps, multiplier=multiplier)
        self.head = None if model.tie_embeddings else nn.Linear(model.d_model, rows, bias=False)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Leave weights as they are: all of them come from a file."""

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

    def get_input_embeddings(self) -> nn.Embedding:
        """Return the token embedding."""
        return self.embedding

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Replace the token embedding."""
        self.embedding = value

    def get_output_embeddings(self) -> nn.Linear | None:
        """Return the head; None where the embedding is the head too."""
        return self.head

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        """Replace the head."""
        self.head = new_embeddings

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Embedding:
        """Make room for tokens, or drop the last ones; return the embedding.

        Its rows stay a multiple of `VOCAB_MULTIPLE`, of which logits have as many as there are tokens. New tokens begin
        as the mean of the others, or at 0 without `mean_resizing`.
        """
        before = self.config.vocab_size
        count, multiple = new_num_tokens or before, pad_to_multiple_of or 1
        count = -(-count // multiple) * multiple
        super().resize_token_embeddings(_rows(count), mean_resizing=False)
        with torch.no_grad():
            for module in filter(None, (self.embedding, self.head)):
                known = module.weight[: min(before, count)]
                module.weight[len(known) :] = 0
                if mean_resizing:
                    module.weight[len(known) : count] = known.mean(0)
        self.config.vocab_size, self.config.hope = count, {**self.config.hope, "vocab_size": count}
        return self.embedding

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: HopeCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        position_ids: Tensor | None = None,
        output_attentions: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Read tokens `[B, T]` and predict the next one after each; logits `[B, T, V]`, or the last `logits_to_keep`.

        Args:
            input_ids: Tokens; or give their embeddings `[B, T, N]` as `inputs_embeds`.
            attention_mask: Zeros at padding, `[B, past + T]`; it may surround a row's tokens but not part them.
            past_key_values: State that an earlier call has returned.
            inputs_embeds: Embeddings in place of tokens.
            labels: Tokens for the loss, of each column its own; -100 does not count.
            use_cache: Whether to return the state; left out, it is returned unless activations are recomputed.
            logits_to_keep: Number of last columns to predict after; 0 is all.
            output_hidden_states: Whether to return the stream before each block and after the last norm.
            return_dict: Whether to return an object with names rather than a tuple.
            position_ids: Positions, which can only be those that the mask gives.
            output_attentions: False or None: memories have no such weights.
            **kwargs: Arguments of the loss function, with labels.

        Raises:
            TypeError: If an argument is unknown.
            ValueError: If padding parts tokens, or positions or weights are asked for that there are not.
        """
        self._refuse(kwargs, labels, output_attentions)
        x = self.embedding(input_ids) if inputs_embeds is None else inputs_embeds
        columns = self._columns(x, attention_mask, past_key_values, position_ids)
        states = past_key_values.layers if past_key_values is not None else [{}] * len(self.blocks)
        keeps = output_hidden_states if output_hidden_states is not None else self.config.output_hidden_states
        layers, hidden, recompute = [], [], self.gradient_checkpointing and self.training
        for block, state in zip(self.blocks.values(), states, strict=True):
            hidden.append(x)
            run = partial(self._gradient_checkpointing_func, block) if recompute else block
            x, state = run(x, state, columns)
            layers.append(state)
        x = self.norm(x if keeps else x[:, -logits_to_keep:])
        hidden, x = [*hidden, x], x[:, -logits_to_keep:]
        logits = F.linear(x, self.embedding.weight if self.head is None else self.head.weight)
        logits = logits[..., : self.config.vocab_size]
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        keeps_state = not recompute if use_cache is None else use_cache
        result = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=HopeCache(layers, columns.real) if keeps_state else None,
            hidden_states=tuple(hidden) if keeps else None,
        )
        as_object = return_dict if return_dict is not None else self.config.return_dict
        return result if as_object else result.to_tuple()

    def _refuse(self, kwargs: dict[str, Any], labels: Tensor | None, output_attentions: bool | None) -> None:
        """Refuse arguments that would be without effect."""
        known = ("cache_position", *(LOSS_ARGUMENTS if labels is not None else ()))  # the state knows its columns
        if unknown := [name for name, value in kwargs.items() if name not in known and value is not None]:
            raise TypeError(f"HopeForCausalLM.forward knows no argument {', '.join(unknown)}")
        if output_attentions:
            raise ValueError("output_attentions: this model has no attention weights to return")

    def _columns(self, x: Tensor, mask: Tensor | None, cache: HopeCache | None, positions: Tensor | None) -> Columns:
        """Say which columns are tokens; of a whole call only this waits for the device."""
        batch, tokens = x.shape[:2]
        now = x.new_ones(batch, tokens, dtype=torch.bool) if mask is None else mask[:, -tokens:].bool()
        past = now[:, :0] if cache is None else cache.real
        given = now[:, :0] if positions is None else positions[..., -tokens:].expand(batch, -1)
        host = torch.cat([past.sum(-1, keepdim=True), now, given], dim=1).cpu()
        before, on_host, given = host[:, 0], host[:, 1 : 1 + tokens].bool(), host[:, 1 + tokens :]
        _check_positions(given, before, on_host)
        counts, groups = before.tolist(), list(self._groups(on_host, before))
        padded = not on_host.all() or any(count < past.shape[1] for count in counts)
        return Columns(torch.cat([past, now], dim=1), RowPosition(counts), groups, padded)

    def _groups(self, now: Tensor, before: Tensor) -> Iterator[tuple[Tensor, slice]]:
        """Group rows with tokens in the same columns and, of more than one token, at the same place of a chunk."""
        if now.shape[1] == 1 and now.all():
            yield torch.arange(len(now)), slice(0, 1)
            return
        count, first = now.sum(-1), now.int().argmax(-1)
        place = before % self.period * (count > 1)
        keys, member = torch.stack([first, count, place], dim=1).unique(dim=0, return_inverse=True)
        for number, (start, length, _) in enumerate(keys.tolist()):
            rows = (member == number).nonzero()[:, 0]
            if not now[rows, start : start + length].all():
                raise ValueError("attention_mask has a gap: padding may surround a row's tokens, but not part them")
            if length:
                yield rows, slice(start, start + length)


def _rows(tokens: int) -> int:
    """Return the rows of an embedding of so many tokens."""
    return -(-tokens // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


def _check_positions(given: Tensor, before: Tensor, now: Tensor) -> None:
    """Refuse positions other than those that count the tokens, as those of texts packed into a row."""
    if (columns := given.shape[1]) == 0:
        return
    counted = (before[:, None] + now.cumsum(-1) - 1)[:, -columns:]
    if bool(((given != counted) & now[:, -columns:]).any()):
        message = "position_ids are not those that attention_mask gives: texts packed into a row are one text"
        raise ValueError(f"{message}; give each a row of its own")


def _period(mixer: SimpleNamespace) -> int:
    """Return the tokens after which it no longer matters to a mixer where a call begins."""
    if mixer.kind == "self_modifying":
        far = 1 if mixer.far is None else mixer.far.chunk_size
        return math.lcm(mixer.projection_chunk_size or mixer.chunk_size, mixer.reset_every or 1, far)
    return mixer.chunk_size if mixer.kind in ("titans", "ttt") else 1


def _namespace(section: dict[str, Any]) -> SimpleNamespace:
    """Turn a config section and the sections below it, but no level, into attributes; mixers stay a dict of these."""
    inner = {name: _namespace(value) for name, value in section.items() if isinstance(value, dict) and name != "levels"}
    if "mixers" in inner:
        inner["mixers"] = vars(inner["mixers"])
    return SimpleNamespace(**{**section, **inner})
