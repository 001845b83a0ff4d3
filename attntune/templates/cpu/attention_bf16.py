"""bfloat16 attention on CPUs with AVX512-BF16."""

from __future__ import annotations

from typing import Any

from attntune.ops.workload import Workload
from attntune.search.space import Config
from attntune.target import Target
from attntune.templates.cpu import bf16
from attntune.templates.cpu.attention import AttentionCPU, _attention
from attntune.templates.cpu.attention_bf16_kernel import AttentionBf16Kernel


class AttentionBf16CPU(AttentionCPU):
    """Fused attention with both products on pairs of bfloat16, softmax and sums in float32."""

    def supports(self, workload: Workload, target: Target) -> bool:
        """Every variant in bfloat16 with an even head."""
        w = _attention(workload)
        return w.dtype == "bfloat16" and w.head_dim % 2 == 0 and bf16.available(target)

    def schedule(self, workload: Workload, target: Target, config: Config) -> Any:
        """See the module's description."""
        import tvm

        return tvm.IRModule({"main": AttentionBf16Kernel(_attention(workload), target, config).function()})
