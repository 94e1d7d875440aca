"""A model cut over pipeline stages, run by Megatron's schedules. Slow to import, so done where there is a pipeline."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from hopescale.config.schema import ModelConfig
from hopescale.data.loader import Batch
from hopescale.engine.segments import Mean, Probe, Segments
from hopescale.models import Model
from hopescale.parallel import quiet_imports

with quiet_imports():
    from megatron.core.enums import ModelType
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.transformer.transformer_config import TransformerConfig


class _Stage(nn.Module):
    """A slice of the model as Megatron's schedules expect it: it is handed its input by `set_input_tensor`."""

    model_type = ModelType.encoder_or_decoder

    def __init__(self, model: Model, config: TransformerConfig, segments: Segments):
        super().__init__()
        self.model, self.config, self.segments = model, config, segments
        self.received: Tensor | None = None

    def set_input_tensor(self, tensors: list[Tensor | None]) -> None:
        """Take what the stage before has sent; None on the first."""
        self.received = tensors[0]

    def forward(self, batch: Batch, probe: Probe | None) -> Tensor:
        """Return hidden values `[T, B, N]`, or the summed cross-entropy after the last block."""
        received, self.received = self.received, None
        return self.segments.run(self.model, batch, received, probe)


class Pipeline:
    """The model cut over the ranks of `pp_group`: 1F1B, or interleaved where a rank holds several slices.

    Args:
        slices: This rank's slices of the model, in order.
        seq_len: Tokens per sequence, of all ranks that share it.
        dtype: Type of the residual stream.
        segments: Pieces in which micro batches are run.
        device: Device to which batches are moved.
    """

    def __init__(
        self, slices: Sequence[Model], seq_len: int, dtype: torch.dtype, segments: Segments, device: torch.device
    ):
        self.mesh, self.seq_len, self.segments, self.device = slices[0].mesh, seq_len, segments, device
        model = slices[0].config
        with warnings.catch_warnings():
            # Of settings that concern Megatron's own layers.
            warnings.simplefilter("ignore", UserWarning)
            config = self._config(model, dtype)
        self.stages = [_Stage(model, config, segments) for model in slices]
        self.run = get_forward_backward_func(
            config.pipeline_model_parallel_size, config.virtual_pipeline_model_parallel_size
        )

    def _config(self, model: ModelConfig, dtype: torch.dtype) -> TransformerConfig:
        return TransformerConfig(
            num_layers=self.mesh.pp_group.size() * self.mesh.virtual_stages,  # the cut is ours
            hidden_size=model.d_model,
            num_attention_heads=model.num_heads,
            tensor_model_parallel_size=self.mesh.tp_group.size(),
            pipeline_model_parallel_size=self.mesh.pp_group.size(),
            context_parallel_size=self.mesh.cp_group.size(),
            virtual_pipeline_model_parallel_size=self.mesh.virtual_stages if self.mesh.virtual_stages > 1 else None,
            sequence_parallel=self.mesh.sequence_parallel,
            pipeline_dtype=dtype,
            params_dtype=dtype,
            calculate_per_token_loss=True,  # the loss is already a mean over the targets of all ranks
            # Both silently gave wrong gradients: memory reused before gloo has sent it, and pairs out of order at pp=2.
            deallocate_pipeline_outputs=False,
            batch_p2p_comm=False,
            use_cpu_initialization=True,
        )

    def train(self, batches: Sequence[Batch], mean: Mean, probe: Probe | None) -> Tensor:
        """Run forward and backward, micro batches overlapping over the stages."""
        return self._passes(batches, mean, probe, forward_only=False)

    @torch.no_grad()
    def evaluate(self, batches: Sequence[Batch]) -> Tensor:
        """Run forward."""
        return self._passes(batches, lambda total: total, None, forward_only=True)

    def _passes(self, batches: Sequence[Batch], mean: Mean, probe: Probe | None, *, forward_only: bool) -> Tensor:
        one_token = torch.ones((), dtype=torch.int, device=self.device)

        def step(iterator: Iterator[tuple[int, Batch]], stage: _Stage) -> tuple[Tensor, Callable]:
            index, batch = next(iterator)
            batch = batch.to(self.device)

            def loss(total: Tensor) -> tuple[Tensor, Tensor, Tensor]:
                value = mean(total)
                return value, one_token, value.detach()

            return stage(batch, probe if index == 0 else None), loss

        losses = self.run(
            forward_step_func=step,
            data_iterator=[iter(list(enumerate(batches))) for _ in self.stages],
            model=list(self.stages),
            num_microbatches=len(batches),
            seq_length=self.seq_len,
            micro_batch_size=len(batches[0].tokens),
            forward_only=forward_only,
        )
        self.segments.settle()
        return sum(losses, torch.zeros((), device=self.device))
