"""Bytes of memories that the Triton kernels run, as `ops.self_modifying.triton` allocates them. Imports no torch."""

from __future__ import annotations

from hopescale.config.execution import memory_shape
from hopescale.config.model_shape import head_dim, memory_banks, memory_dim, num_pieces
from hopescale.config.schema import ModelConfig, SelfModifyingConfig
from hopescale.cost.micro_batch import Activations, MicroBatch
from hopescale.cost.parameter import FP32
from hopescale.ops.backends import select
from hopescale.ops.limits import BLOCK, KERNEL_KEEPS, KERNEL_PIECE, KERNEL_PROGRAMS

FORWARD_MATRICES, BACKWARD_MATRICES, LAYER_MATRICES = 9, 25, 3
"""Matrices of a piece's tokens in the scratch memory of a program, forward (and replayed) and backward, where each
first layer that is moved by itself has some of its own."""
TABLES, ROWS, SHIFT = 15, 28, 32
"""Tables and rows of numbers of a piece beside them, and numbers that every second chunk lies further behind."""


def runs_kernels(model: ModelConfig, mixer: SelfModifyingConfig, micro: MicroBatch, recompute: str) -> bool:
    """Tell whether the kernels run memories without a far one, on a GPU that is suitable."""
    return micro.kernels and select("triton", memory_shape(model, mixer), recompute=recompute).backend == "triton"


def packed_size(model: ModelConfig, mixer: SelfModifyingConfig) -> int:
    """Count the numbers of a head's packed weights; the one column of a gate memory is padded to `BLOCK`."""
    dim, hidden = head_dim(model), memory_dim(model, mixer)
    names = [name for bank in memory_banks(mixer).values() for name in bank]
    gates = len({"eta", "alpha"} & set(names))
    outputs = (len(names) - gates) * dim + gates * BLOCK
    return dim * outputs if hidden is None else hidden * (dim * len(names) + outputs)


def scratch_shape(model: ModelConfig, mixer: SelfModifyingConfig) -> tuple[int, int]:
    """Return the width of matrices in scratch memory, and how many first layers have theirs on the way back.

    Linear gate memories lie side by side, as one layer.
    """
    dim, hidden = head_dim(model), memory_dim(model, mixer)
    names = {name for bank in memory_banks(mixer).values() for name in bank}
    gates = len({"eta", "alpha"} & names)
    width = BLOCK * max(1, gates) if hidden is None else hidden
    return max(dim, width), len(names) - gates + (min(1, gates) if hidden is None else gates)


def scratch_size(rows: int, width: int, matrices: int) -> int:
    """Count the numbers of a program's scratch memory, for pieces of `rows` tokens and matrices of a width."""
    return SHIFT + ROWS * rows + TABLES * rows * rows + matrices * rows * width


def kernel_activations(model: ModelConfig, mixer: SelfModifyingConfig, micro: MicroBatch) -> Activations:
    """Count memories without the streams that enter them, and without a far one.

    The workspace is that of the way back: the states of all chunks, and what replays them or, later, gradients. The
    gradient of the answers takes the place of the answers.
    """
    heads, dim, rates = model.num_heads / micro.tp, head_dim(model), 1 + mixer.momentum
    documents, chunk = micro.batch * num_pieces(mixer, micro.seq_len), mixer.chunk_size
    tokens = min(mixer.reset_every or micro.seq_len, micro.seq_len)
    programs, longest = documents * heads, min(chunk, tokens)
    rows, cut = _rows(chunk), chunk > _rows(chunk)
    width, layers = scratch_shape(model, mixer)
    state = packed_size(model, mixer) * rates
    first = heads * _starts(mixer, micro) * state * FP32
    kept = heads * max(1, micro.tokens // (KERNEL_KEEPS * chunk)) * state * micro.kept_itemsize
    replayed = heads * (micro.tokens // chunk + documents) * state * micro.kept_itemsize
    side = -(-tokens // (KERNEL_KEEPS * chunk))
    at_once = min(programs, max(1, KERNEL_PROGRAMS // side)) * side
    replay = at_once * _forward_program(model, mixer)
    matrices = BACKWARD_MATRICES + LAYER_MATRICES * layers
    back = min(programs, KERNEL_PROGRAMS) * scratch_size(rows, width, matrices) * FP32
    back += cut * programs * max(1, -(-longest // rows) - 1) * state * micro.kept_itemsize
    back += 3 * micro.tokens * heads * dim * FP32 + programs * state * (1 + 1 / rates) * FP32
    gate = mixer.gate * micro.tokens * heads * dim * micro.itemsize
    return Activations(first, kept, gate + replayed + max(replay, back))


def forward_workspace(model: ModelConfig, mixer: SelfModifyingConfig, micro: MicroBatch) -> float:
    """Count the memory of the programs that run memories forward."""
    programs = micro.batch * num_pieces(mixer, micro.seq_len) * model.num_heads / micro.tp
    return min(programs, KERNEL_PROGRAMS) * _forward_program(model, mixer)


def _forward_program(model: ModelConfig, mixer: SelfModifyingConfig) -> float:
    """Count the memory of a program that goes forward over chunks: states, and scratch."""
    rows = _rows(mixer.chunk_size)
    state, (width, _) = packed_size(model, mixer) * (1 + mixer.momentum), scratch_shape(model, mixer)
    return ((1 + (mixer.chunk_size > rows)) * state + scratch_size(rows, width, FORWARD_MATRICES)) * FP32


def _rows(chunk: int) -> int:
    """Return the tokens of a piece of a chunk of so many."""
    return max(16, min(KERNEL_PIECE, 1 << (chunk - 1).bit_length()))


def _starts(mixer: SelfModifyingConfig, micro: MicroBatch) -> int:
    """Count the packed weights that sequences begin with: one for each where they are not those that are learned."""
    alone = mixer.reset_every is not None and mixer.reset_every >= micro.seq_len
    return micro.batch if micro.carried or alone else 1
