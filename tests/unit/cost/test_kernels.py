"""The bytes that a plan counts for the Triton kernels are those of their own settings."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch

from hopescale.config.load import load_recipe
from hopescale.config.model_shape import head_dim
from hopescale.cost import kernels
from hopescale.models.self_modifying import SelfModifying
from hopescale.ops.self_modifying import Streams
from hopescale.parallel.mesh import Mesh

pytestmark = pytest.mark.skipif(
    find_spec("triton") is None, reason="triton is not installed (it exists for Linux only)"
)


@pytest.mark.parametrize(
    "mixer", ["memory: mlp", "memory: linear", "memory: linear, adaptive: []", "memory_dim: 32, query: memory"]
)
def test_weights_and_scratch_memory_are_as_large_as_the_kernels_have_them(mixer: str):
    from hopescale.ops.self_modifying.triton import scratch
    from hopescale.ops.self_modifying.triton.kernel_config import KernelConfig

    model = load_recipe("debug", [f"model.mixers.hope={{{mixer}}}"]).config.model
    x = torch.zeros(1, 2, 32, head_dim(model))
    spec = SelfModifying(model, model.mixers["hope"], out_std=1.0, mesh=Mesh.alone()).spec
    config = KernelConfig.of(Streams(x, x, x, *3 * [x[..., 0]]), spec, "bf16")
    assert kernels.packed_size(model, model.mixers["hope"]) == config.size
    sizes = (kernels.TABLES, kernels.ROWS, kernels.SHIFT, kernels.FORWARD_MATRICES, kernels.BACKWARD_MATRICES)
    theirs = (scratch.TABLES, scratch.ROWS, scratch.SHIFT, scratch.FORWARD_MATRICES, scratch.BACKWARD_MATRICES)
    assert sizes == tuple(each.value for each in theirs)
    width, layers = kernels.scratch_shape(model, model.mixers["hope"])
    assert (config.rows * width, kernels.LAYER_MATRICES * layers) == (config.matrix, config.layer_matrices)
