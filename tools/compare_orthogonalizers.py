"""Print how near the methods of `optim.muon.orthogonalize` come to the polar factor, and what they cost."""

from __future__ import annotations

import argparse

import torch
from torch import Tensor

from hopescale.config.schema.optim import MuonConfig
from hopescale.cost.updates import orthogonal_flops
from hopescale.optim.muon import orthogonal

METHODS = (("newton_schulz", 5), ("newton_schulz", 4), ("polar_express", 5), ("polar_express", 4), ("polar_express", 3))
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def main() -> None:
    """Print a row per method and precision, and of each spectrum the distance from the polar factor."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--ratio", type=int, default=1, help="columns per row")
    arguments = parser.parse_args()
    rows, columns = arguments.rows, arguments.rows * arguments.ratio
    matrices = spectra(rows, columns)
    print(f"{'method':<18}{'type':<6}{'FLOPs / rows^3':>15}" + "".join(f"{name:>16}" for name in matrices))
    for method, steps in METHODS:
        for name, dtype in DTYPES.items():
            settings = MuonConfig(orthogonalize=method, ns_steps=steps, ns_dtype=name)
            cost = orthogonal_flops(rows, columns, settings) / rows**3
            found = orthogonal([*matrices.values()], method, ns_steps=steps, ns_dtype=dtype)
            errors = [error(y, x) for y, x in zip(found, matrices.values(), strict=True)]
            print(f"{method:<14}{steps:<4}{name:<6}{cost:>15.0f}" + "".join(f"{each:>16.3f}" for each in errors))


def spectra(rows: int, columns: int) -> dict[str, Tensor]:
    """Return matrices in float64: a random one, and some whose singular values fall off."""
    torch.manual_seed(0)
    noise = torch.randn(rows, columns, dtype=torch.float64)
    u, _, v = torch.linalg.svd(noise, full_matrices=False)
    index = torch.arange(1, rows + 1, dtype=torch.float64)
    values = {"1 / sqrt(i)": index**-0.5, "1 / i": 1 / index, "1 to 1e-3": torch.logspace(0, -3, rows).double()}
    return {"random": noise} | {name: u @ torch.diag(each) @ v for name, each in values.items()}


def error(found: Tensor, x: Tensor) -> float:
    """Return the distance of `found` from the polar factor of `x`, as a part of the factor's norm."""
    u, _, v = torch.linalg.svd(x, full_matrices=False)
    return float((found - u @ v).norm() / (u @ v).norm())


if __name__ == "__main__":
    main()
