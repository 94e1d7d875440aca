"""How a run proceeds: steps, batches, validation, checkpoints, records."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from hopescale.config.schema.ranges import Count, Positive, Seed
from hopescale.ops.backends import Backend, Recompute


@dataclass(frozen=True)
class ValidationConfig:
    """Loss on held-out text."""

    every: Count | None = 100
    """Steps between two validations; null is never. The last step always validates unless this is null."""
    tokens: Count = 65_536
    """Tokens read per source and validation, from the start of its held-out split; at least one batch."""


@dataclass(frozen=True)
class CheckpointConfig:
    """When the state of the run is saved and what is kept. The last step and a stop are always saved."""

    every: Count | None = 100
    """Steps between two checkpoints; null saves only at the end and on a stop."""
    keep_last: Count = 2
    """Newest checkpoints kept, at least 1."""
    keep_every: Count | None = None
    """Checkpoints at multiples of this step are kept for ever; null keeps none beyond `keep_last`."""
    async_save: bool = True
    """Whether files are written in the background while training goes on."""


@dataclass(frozen=True)
class LogConfig:
    """What is recorded."""

    every: Count = 10
    """Steps between two console lines and full records in `metrics.jsonl` and TensorBoard. The last step is always
    recorded, and so are validations and the steps that update a slow level."""
    tensorboard: bool = True
    """Whether a TensorBoard view is written to `tb/`."""


@dataclass(frozen=True)
class TrainConfig:
    """The training loop."""

    steps: Count = 1000
    """Optimizer steps of the whole run; the learning rate's horizon."""
    seq_len: Count = 1024
    """Tokens per sequence."""
    micro_batch_size: Count = 1
    """Sequences per forward pass."""
    global_batch_tokens: Count = 16_384
    """Tokens per optimizer step; a multiple of `seq_len * micro_batch_size`. Gradient accumulation is derived."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Type of weights and activations. With bf16 the optimizer keeps fp32 master weights; memories are fp32 always."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; `auto` takes CUDA where there is one."""
    recompute: Recompute = "chunks"
    """Activations computed again in the backward pass instead of kept. `chunks`: of memories only the state at the
    start of every chunk is kept (attention has no chunks and keeps what it makes). `reverse`: of most chunks only what
    they wrote, from which these states are found again on the way back; where `model.self_modifying.chunk_size` is well
    below the head dim. `memory`: of a mixer only its input. `block`: only the input of every block."""
    compile: bool = False
    """Whether the chunk loop of memories is compiled (`torch.compile`): faster, after minutes for the first step. Needs
    a C++ compiler on CPU, Triton on CUDA. Only with `model.mixer: self_modifying`. `backend: auto` is `torch` then."""
    backend: Backend = "auto"
    """What trains memories: torch's operations in a loop over chunks, one operation written in C++ (on a CPU; needs a
    C++ compiler) or in Triton (on an NVIDIA GPU), or `auto`: the operation where it can run. It computes chunks again
    in the backward pass, also with `recompute: none`. Changes rounding, memory and speed only."""
    replica_check_every: Count | None = 100
    """Steps between two comparisons of the weights over data-parallel ranks, which must be bit-equal; null is never.
    With `parallel.zero` of 3 there is nothing to compare."""
    seed: Seed = 0
    """Seed of the initial weights and of every generator."""
    loss_spike: Positive | None = 3.0
    """Nats above the mean of the last 32 losses at which the run stops as diverged; null only stops at NaN."""
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    """Held-out loss."""
