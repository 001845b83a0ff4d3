"""Models from and to other formats."""

from __future__ import annotations

from attntune.interop.onnx_export import export_onnx, read_metadata, tuning_metadata
from attntune.interop.onnx_verify import Parity, verify_onnx
from attntune.interop.reference import evaluate, sample_inputs

__all__ = ["Parity", "evaluate", "export_onnx", "read_metadata", "sample_inputs", "tuning_metadata", "verify_onnx"]
