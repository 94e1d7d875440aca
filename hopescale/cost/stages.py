"""Which blocks each stage of a pipeline holds, from the config alone. Imports no torch."""

from __future__ import annotations

from dataclasses import replace

from hopescale.config.schema import ModelConfig
from hopescale.cost.flops import flops_per_token


def cut_blocks(model: ModelConfig, seq_len: int, num_stages: int) -> list[range]:
    """Cut the blocks into consecutive stages whose dearest costs least.

    Counted are the operations of the blocks and, on the last stage, of the head; looking up the embedding costs none.
    Of equally good cuts, the last stage takes the fewest blocks; the others differ by one at most, earlier ones more.

    Args:
        model: Its blocks all cost the same.
        seq_len: Tokens per sequence, which decide what a mixer costs.
        num_stages: Stages in all.

    Returns:
        Numbers of each stage's blocks, at least one.

    Raises:
        ValueError: If there are more stages than blocks.
    """
    if not 1 <= num_stages <= model.num_layers:
        raise ValueError(f"a model of {model.num_layers} blocks cannot be cut into {num_stages} stages")
    if num_stages == 1:
        return [range(model.num_layers)]
    head = flops_per_token(replace(model, num_layers=0), seq_len)
    block = flops_per_token(replace(model, num_layers=1), seq_len) - head
    others = num_stages - 1

    def dearest(last: int) -> int:
        most = -(-(model.num_layers - last) // others)
        return max(most * block, last * block + head)

    last = min(range(1, model.num_layers - others + 1), key=dearest)
    each, more = divmod(model.num_layers - last, others)
    sizes = [each + (stage < more) for stage in range(others)] + [last]
    return [range(sum(sizes[:stage]), sum(sizes[: stage + 1])) for stage in range(num_stages)]


def slices_of_rank(model: ModelConfig, seq_len: int, pp: int, virtual_stages: int, rank: int) -> list[range]:
    """Return the blocks of each slice that pipeline rank `rank` of `pp` holds: slice `k` lives on rank `k % pp`.

    Raises:
        ValueError: If there are more slices than blocks.
    """
    return cut_blocks(model, seq_len, pp * virtual_stages)[rank::pp]
