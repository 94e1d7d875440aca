"""The whole of a run: what it reads, how it proceeds, how it is split over ranks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from hopescale.config.schema.model import ModelConfig
from hopescale.config.schema.optim import OptimConfig
from hopescale.config.schema.ranges import Count, CountOrAuto, CountOrZero, Fraction, NumberRange, Positive, Seed
from hopescale.config.schema.suite import SuiteConfig
from hopescale.ops.backends import Backend, KernelPrecision, Recompute


@dataclass(frozen=True)
class SyntheticConfig:
    """A generated data set: needs no files and no tokenizer. Sample `i` is a pure function of (seed, split, i)."""

    task: Literal["copy", "recall", "markov"] = "markov"
    """`copy`: random symbols, a marker, the same symbols. `recall`: key-value pairs, then keys whose values must be
    named. `markov`: text of a random second-order chain, whose entropy is known."""
    num_symbols: Annotated[int, NumberRange("[2, inf)")] = 24
    """Symbols of the task; `model.vocab_size` must be at least this plus two markers. At most 128 for `markov`."""
    num_samples: Count = 100_000
    """Training sequences per epoch."""


@dataclass(frozen=True)
class SourceConfig:
    """One data set of the mixture: a folder written by `hopescale data prepare`, a synthetic one, or a suite's task."""

    path: str | None = None
    """Folder with `index.json`, relative to the working directory; `~` is the home folder. A run may change it as long
    as the content stays the same. Either this, `synthetic` or `suite`."""
    synthetic: SyntheticConfig | None = None
    """Settings of a generated data set. Either this, `path` or `suite`."""
    suite: SuiteConfig | None = None
    """Settings of a generated task with known answers (`docs/suites.md`). Either this, `path` or `synthetic`."""
    weight: Positive = 1.0
    """Share of the training sequences, relative to the other sources' weights; exact to within 1/4096 of the whole,
    which is also the smallest share."""


@dataclass(frozen=True)
class DataConfig:
    """The training mixture."""

    sources: dict[str, SourceConfig | None] = field(default_factory=dict)
    """Data sets by name; `null` removes one that a base recipe defines. Names appear in `val/<name>/loss`."""
    seed: Seed = 0
    """Seed of the sample order and of synthetic data; independent of the model's seed."""
    max_epochs: Count = 1
    """How often a source may be read at most, each time in another order; a run that needs more is refused before it
    starts."""
    staged: str | None = None
    """Folder on each node's own disk with copies of the data sets, made by `hopescale node stage` and read in place of
    `path`; null reads from `path`. Variables as in `$TMPDIR` are filled in on the node. A run may change it at any
    time: the data is the same."""
    cache: str | None = None
    """Folder in which what was read of sources on an object store (`path: s3://bucket/data`) is kept, up to their whole
    size; null keeps the last 64 MiB of each in memory. Variables as in `$TMPDIR` are filled in. No effect on sources
    that are folders."""
    prefetch: CountOrZero = 2
    """Batches prepared ahead in a background thread; 0 prepares them in the training loop. No effect on order."""


@dataclass(frozen=True)
class ValidationConfig:
    """Loss on held-out text."""

    every: Count | None = 100
    """Steps between two validations; null is never. The last step always validates unless this is null."""
    tokens: Count = 65_536
    """Tokens read per source and validation, from the start of its held-out split; at least one sequence."""


@dataclass(frozen=True)
class MemoryCheckpointConfig:
    """Checkpoints in the memory of the nodes, from which a start after a failure continues."""

    every: Count | None = None
    """Steps between two of them, fewer than `checkpoint.every`; null keeps none. Each takes the time of a copy, and up
    to four times the state of a node's ranks in its memory while it is made."""
    folder: str = "/dev/shm"
    """Folder in memory, on every node, that outlives a rank's process. Only with `every`."""


@dataclass(frozen=True)
class CheckpointConfig:
    """When the state of the run is saved and what is kept. The last step and a stop are always saved."""

    every: Count | None = 100
    """Steps between two checkpoints; null saves only at the end and on a stop."""
    keep_last: Count = 2
    """Newest checkpoints kept, at least 1."""
    keep_every: Count | None = None
    """Checkpoints at multiples of this step are kept for ever; null keeps none beyond `keep_last`."""
    keep_at: Annotated[tuple[int, ...], NumberRange("[1, inf)")] = ()
    """Steps after which the state is saved as well, and kept for ever: other runs may branch off there."""
    async_save: bool = True
    """Whether files are written in the background while training goes on."""
    mirror: str | None = None
    """Address of the run's own on an object store (`s3://bucket/runs/mine`) to which every checkpoint is copied, and
    from which a run folder without a complete one continues; null keeps them in the run folder alone."""
    memory: MemoryCheckpointConfig = field(default_factory=MemoryCheckpointConfig)
    """Checkpoints in the memory of the nodes."""


@dataclass(frozen=True)
class LogConfig:
    """What is recorded."""

    every: Count = 10
    """Steps between two console lines and full records in `metrics.jsonl` and TensorBoard. The last step is always
    recorded, and so are validations and the steps that update a slow level."""
    trackers: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = ("tensorboard",)
    """Views that show the metrics. `tensorboard`: files in `tb/` of the run folder. `wandb`: Weights & Biases
    (`hopescale[wandb]`). `mlflow`: the server that `MLFLOW_TRACKING_URI` names (`hopescale[mlflow]`)."""
    samples: tuple[str, ...] = ()
    """Prompts that the model goes on with greedily at each validation, into `samples.jsonl` and the trackers. Without a
    tokenizer a prompt is numbers, as in "3 1 4". The first rank writes; it must hold the whole model (not with
    `parallel.tp`, `parallel.pp` or `parallel.zero: 3`)."""
    sample_tokens: Count = 40
    """Most tokens of a sample. Only with `samples`."""


@dataclass(frozen=True)
class RecoveryConfig:
    """What follows a bad step: its loss or gradient is not finite, or a spike by `loss_spike` or `norm_spike`."""

    skips: CountOrZero = 3
    """Bad steps in a row that are skipped: they change no weight, what slow levels have gathered until then is dropped,
    and the next step reads the next batch. With 0 the first bad step is one too many."""
    then: Literal["stop", "lower_rate", "other_data"] = "stop"
    """What one bad step too many does. `stop`: the run ends as diverged. The others go back to the newest checkpoint
    from before these steps, and end the run where there is none: `lower_rate` multiplies all learning rates by
    `rate_factor` from there on, `other_data` goes on with the batches behind the last bad one."""
    rate_factor: Fraction = 0.5
    """Factor on all learning rates each time the run goes back. Only with `then: lower_rate`."""
    max_returns: Count = 3
    """Times that a run goes back; after these it ends as diverged. Not with `then: stop`."""


@dataclass(frozen=True)
class TrainConfig:
    """The training loop."""

    steps: Count = 1000
    """Optimizer steps of the whole run; the learning rate's horizon."""
    seq_len: Count = 1024
    """Tokens per sequence."""
    micro_batch_size: CountOrAuto = 1
    """Sequences per forward pass. `auto`: the most with which a step fits the device by its plan (`hopescale plan`),
    of those that divide the batch; it is chosen when a run starts, and kept from its checkpoints while it fits."""
    global_batch_tokens: Count = 16_384
    """Tokens per optimizer step; a multiple of `seq_len * micro_batch_size`. Gradient accumulation is derived."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Type of weights and activations. With bf16 the optimizer keeps fp32 master weights; memories are fp32 always."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; `auto` takes CUDA where there is one."""
    recompute: Recompute = "chunks"
    """Activations computed again in the backward pass instead of kept. `chunks`: of memories only the state at the
    start of every chunk is kept (attention has no chunks and keeps what it makes). `reverse`: of most chunks only what
    they wrote, from which these states are found again on the way back; where a mixer's `chunk_size` is well below
    the head dim. `memory`: of a mixer only its input. `block`: only the input of every block."""
    segments: Count = 1
    """Pieces, one after the other, into which a rank's tokens of a sequence are cut; what the model carries is handed
    from each to the next, so that nothing changes but rounding. Of all but the last only that is kept: their
    activations are computed again, one piece at a time. They divide `seq_len / parallel.cp` into whole chunks of
    memories."""
    compile: bool = False
    """Whether the chunk loop of memories is compiled (`torch.compile`): faster, after minutes for the first step. Needs
    a C++ compiler on CPU, Triton on CUDA. Only with a mixer of kind `self_modifying`, and not with
    `model.within_documents` or `reset_every`."""
    backend: Backend = "auto"
    """What trains memories: torch's operations in a loop over chunks, one operation written in C++ (on a CPU; needs a
    C++ compiler) or in Triton (on an NVIDIA GPU), or `auto`: the operation where it can run. It computes chunks again
    in the backward pass, also with `recompute: none`. Changes rounding, memory and speed only."""
    kernel_precision: KernelPrecision = "auto"
    """Operands of the matrix products in the Triton kernels, whose sums and states are float32 always. `tf32x3`: three
    TF32 products for each, as exact as float32. `tf32`: one, good to three digits. `bf16`: one, with operands rounded
    as `precision: bf16` rounds activations, and by count a fifth of the instructions of `tf32x3` or less, in heads of
    64 a seventh. `auto`: `bf16` with `precision: bf16`, else `tf32x3`."""
    replica_check_every: Count | None = 100
    """Steps between two comparisons of the weights over data-parallel ranks, which must be bit-equal; null is never.
    With `parallel.zero` of 3 there is nothing to compare, with `parallel.shard_weights` the shares of all nodes."""
    seed: Seed = 0
    """Seed of the initial weights and of every generator."""
    loss_spike: Positive | None = 3.0
    """Nats above the mean of the last 32 losses from which on a step is bad; null looks only for NaN and infinity."""
    norm_spike: Annotated[float, NumberRange("(1, inf)")] | None = None
    """The same for the gradient norm, as a factor on the mean of the last 32; null looks only for NaN and infinity."""
    recovery: RecoveryConfig = field(default_factory=RecoveryConfig)
    """What follows a bad step."""
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    """Held-out loss."""


@dataclass(frozen=True)
class ParallelConfig:
    """Degrees of the four axes, whose product is the number of ranks. At most one may be null: what remains."""

    dp: Count | None = None
    """Data parallel: replicas that read different sequences of a step."""
    tp: Count | None = 1
    """Tensor parallel: ranks that share every layer. Divides heads, level widths and the padded vocabulary."""
    pp: Count | None = 1
    """Pipeline parallel: stages that hold consecutive blocks."""
    cp: Count = 1
    """Context parallel: ranks that share the tokens of each sequence. Each hands what the model carries on to the next
    one, layer by layer. Gradients are summed over `dp * cp` ranks, which also share what `zero` shards. Not with `zero`
    of 2 or 3."""
    virtual_stages: Count = 1
    """Slices of the model each pipeline rank holds; above 1 the schedule is interleaved. Needs `pp` of 2 or more."""
    sequence_parallel: bool = False
    """Whether activations between layers are split over tensor-parallel ranks along the tokens. Needs `tp` of 2 or
    more, and a `train.seq_len` it divides."""
    zero: Annotated[int, NumberRange("[0, 3]")] = 0
    """What data-parallel ranks share out, by DeepSpeed from 2 on: 0 nothing, 1 optimizer state and fp32 masters, 2
    gradients too, 3 weights too. 1 and above need `dp * cp` of 2 or more; 2 and 3 need `pp` and `cp` of 1."""
    shard: Literal["none", "all", "node"] | None = None
    """The same by tiers of the network; null goes by `zero`. `none` and `all` are `zero` of 0 and 1. `node`: as `all`,
    but gradients are summed inside a node at every step, and between nodes when they are due; sums that wait are shared
    out over the ranks of a node. Not with `zero` of 2 or 3, whose place it takes."""
    ranks_per_node: Count = 8
    """Ranks of a node. Only with `shard: node`, which needs two nodes or more, each with two replicas or more."""
    shard_weights: bool = False
    """Whether replicas of a node share out the weights of blocks too: a block's are gathered inside the node before it
    runs, forward and backward, and freed after. Only with `shard: node`, and `tp`, `pp` and `cp` of 1."""
    timeout_s: Count = 300
    """Seconds a rank waits for the others in one exchange before the run ends as hung."""
    first_step_timeout_s: Count = 1800
    """The same until the end of the first step, which compiles and warms up; not below `timeout_s`."""

    @property
    def shares_weights(self) -> bool:
        """Whether replicas of a node share out the weights of blocks."""
        return self.shard_weights and self.shard == "node"

    @property
    def stage(self) -> int:
        """The ZeRO stage that `zero` or `shard` asks for."""
        return self.zero if self.shard is None else int(self.shard != "none")


@dataclass(frozen=True)
class RunConfig:
    """A recipe after its bases and overrides have been applied."""

    name: str = "run"
    """Name of the run; its folder is `runs/<name>` unless `--run-dir` says otherwise."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """The model."""
    data: DataConfig = field(default_factory=DataConfig)
    """The data."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """The optimizer."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """The loop."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """How it is split over ranks."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """The checkpoints."""
    log: LogConfig = field(default_factory=LogConfig)
    """The records."""
