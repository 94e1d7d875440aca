"""Processes, and the layers that split over them."""

import warnings

with warnings.catch_warnings():
    # Transformer Engine and Apex are optional; Megatron announces each missing one at import.
    warnings.filterwarnings("ignore", message="Transformer Engine and Apex are not installed")
    import megatron.core  # noqa: F401 - imported here first, quietly
