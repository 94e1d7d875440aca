"""The lines that a run shows on the console. Pure text, which the caller prints."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from hopescale.common.units import format_bytes, format_duration

_SHOWN: dict[str, Callable[[float], str]] = {
    "loss": lambda nats: f"loss {nats:.4f}",
    "grad_norm": lambda norm: f"grad {_short(norm)}",
    "lr": lambda rate: f"lr {_scientific(rate)}",
    "device_memory/peak_gib": lambda gib: f"mem {format_bytes(gib * 2**30)}",
    "tps": lambda tokens: f"tps {tokens:,.0f}",
    "mfu": lambda fraction: f"mfu {fraction:.1%}",
    "eta_s": lambda seconds: f"eta {format_duration(seconds)}",
}


def format_step(step: int, total_steps: int, values: Mapping[str, float], due: Sequence[str] = ()) -> str:
    """Write the line of a logged step, leaving out unknown numbers.

    Args:
        step: Optimizer steps done.
        total_steps: Steps of the whole run.
        values: Metrics by their names, with the learning rate as `lr` and the seconds until the last step as `eta_s`.
        due: Names of the levels updated at this step.
    """
    parts = [f"step {step}/{total_steps}", *(show(values[name]) for name, show in _SHOWN.items() if name in values)]
    if due:
        parts.append(f"due {','.join(due)}")
    return "  ".join(parts)


def format_validation(
    step: int, total_steps: int, name: str, *, loss: float, bits_per_byte: float | None = None
) -> str:
    """Write the line of a validation: `step 100/300  val/text  loss 3.2101  1.4430 bits/byte`."""
    line = f"step {step}/{total_steps}  val/{name}  loss {loss:.4f}"
    return line if bits_per_byte is None else f"{line}  {bits_per_byte:.4f} bits/byte"


def format_sample(step: int, total_steps: int, name: str, text: str, *, most: int = 200) -> str:
    """Write the line of a sample, in quotes and cut: `step 100/300  sample/0  'Once upon a time'`."""
    shown = text if len(text) <= most else f"{text[:most]}..."
    return f"step {step}/{total_steps}  {name}  {shown!r}"


def _short(value: float) -> str:
    return _scientific(value) if value and not 0.005 <= abs(value) < 1e5 else f"{value:.2f}"


def _scientific(value: float) -> str:
    mantissa, _, exponent = f"{value:.1e}".partition("e")
    return f"{mantissa}e{int(exponent)}" if exponent else mantissa
