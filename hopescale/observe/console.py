"""The lines a run shows on the console. Pure text; whoever calls prints it."""

from __future__ import annotations

from collections.abc import Sequence

from hopescale.common.units import format_bytes, format_duration


def format_step(
    step: int,
    total_steps: int,
    *,
    loss: float,
    grad_norm: float | None = None,
    lr: float | None = None,
    memory_gib: float | None = None,
    tps: float | None = None,
    mfu: float | None = None,
    eta_s: float | None = None,
    due: Sequence[str] = (),
) -> str:
    """Write the line of a logged step, leaving out what is None or empty; values are as in `METRICS`.

    `eta_s` are the seconds until the last step, `due` the names of the levels updated at this one.
    """
    parts = [
        f"step {step}/{total_steps}",
        f"loss {loss:.4f}",
        None if grad_norm is None else f"grad {_short(grad_norm)}",
        None if lr is None else f"lr {_scientific(lr)}",
        None if memory_gib is None else f"mem {format_bytes(memory_gib * 2**30)}",
        None if tps is None else f"tps {tps:,.0f}",
        None if mfu is None else f"mfu {mfu:.1%}",
        None if eta_s is None else f"eta {format_duration(eta_s)}",
        f"due {','.join(due)}" if due else None,
    ]
    return "  ".join(part for part in parts if part is not None)


def format_validation(
    step: int, total_steps: int, name: str, *, loss: float, bits_per_byte: float | None = None
) -> str:
    """Write the line of a validation: `step 100/300  val/text  loss 3.2101  1.4430 bits/byte`."""
    line = f"step {step}/{total_steps}  val/{name}  loss {loss:.4f}"
    return line if bits_per_byte is None else f"{line}  {bits_per_byte:.4f} bits/byte"


def _short(value: float) -> str:
    return _scientific(value) if value and not 0.005 <= abs(value) < 1e5 else f"{value:.2f}"


def _scientific(value: float) -> str:
    mantissa, _, exponent = f"{value:.1e}".partition("e")
    return f"{mantissa}e{int(exponent)}" if exponent else mantissa
