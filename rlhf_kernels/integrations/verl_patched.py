"""Calls `rlhf_kernels.integrations.verl.patch()`: for verl's `external_lib`, which names a module to import."""

from .verl import patch

patch()
