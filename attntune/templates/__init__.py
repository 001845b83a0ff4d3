"""HOW: schedule templates, one for each operator and kind of target, and a generic one for every other operator."""

from __future__ import annotations

import importlib

from attntune.errors import ScheduleError, TargetError
from attntune.ops.workload import Workload
from attntune.target import Target
from attntune.templates.cpu.additive_attention import AdditiveAttentionCPU
from attntune.templates.cpu.attention import AttentionCPU
from attntune.templates.cpu.attention_bf16 import AttentionBf16CPU
from attntune.templates.cpu.attention_decode import AttentionDecodeCPU
from attntune.templates.cpu.embedding_grouped import EmbeddingGroupedCPU
from attntune.templates.cpu.embedding_norm import EmbeddingNormCPU
from attntune.templates.cpu.generic import GenericCPU
from attntune.templates.cpu.head_norm import HeadNormCPU
from attntune.templates.cpu.layer_norm import LayerNormCPU
from attntune.templates.cpu.linear import LinearCPU
from attntune.templates.cpu.mean_pool import MeanPoolCPU
from attntune.templates.cpu.moves import EmbeddingCPU, KVAppendCPU, RopeCPU, SelectRowsCPU
from attntune.templates.cpu.patches import AddPositionsCPU, PatchifyCPU, PrependTokenCPU, UnfoldCPU
from attntune.templates.cpu.recurrent import GRUSequenceCPU, LSTMSequenceCPU
from attntune.templates.cpu.relative_bias import RelativeBiasCPU
from attntune.templates.cpu.rms_norm import RMSNormCPU
from attntune.templates.cpu.softmax import SoftmaxCPU
from attntune.templates.cpu.top_k import ArgMaxCPU, TopKCPU
from attntune.templates.cuda.additive_attention import AdditiveAttentionCUDA
from attntune.templates.cuda.attention import AttentionCUDA
from attntune.templates.cuda.attention_decode import AttentionDecodeCUDA
from attntune.templates.cuda.attention_hopper import AttentionHopper
from attntune.templates.cuda.generic import GenericCUDA
from attntune.templates.cuda.kv_append import KVAppendCUDA
from attntune.templates.cuda.linear import LinearCUDA
from attntune.templates.cuda.linear_hopper import LinearHopper
from attntune.templates.cuda.linear_split import LinearSplitCUDA
from attntune.templates.cuda.recurrent import GRUSequenceCUDA, LSTMSequenceCUDA
from attntune.templates.cuda.rows import EmbeddingNormCUDA, LayerNormCUDA, RMSNormCUDA, SoftmaxCUDA
from attntune.templates.template import Packing, ScheduleTemplate

#: Every template; of those for one operator and kind of target, the first that supports a workload schedules it. A new
#: template adds one line here.
REGISTRY: tuple[ScheduleTemplate, ...] = (
    AdditiveAttentionCPU(),
    AttentionDecodeCPU(),
    AttentionBf16CPU(),
    AttentionCPU(),
    AddPositionsCPU(),
    ArgMaxCPU(),
    EmbeddingCPU(),
    EmbeddingGroupedCPU(),
    EmbeddingNormCPU(),
    GRUSequenceCPU(),
    HeadNormCPU(),
    KVAppendCPU(),
    LSTMSequenceCPU(),
    LayerNormCPU(),
    LinearCPU(),
    MeanPoolCPU(),
    PatchifyCPU(),
    PrependTokenCPU(),
    RMSNormCPU(),
    RelativeBiasCPU(),
    RopeCPU(),
    SelectRowsCPU(),
    SoftmaxCPU(),
    TopKCPU(),
    UnfoldCPU(),
    AdditiveAttentionCUDA(),
    AttentionHopper(),
    AttentionDecodeCUDA(),
    AttentionCUDA(),
    EmbeddingNormCUDA(),
    GRUSequenceCUDA(),
    KVAppendCUDA(),
    LSTMSequenceCUDA(),
    LayerNormCUDA(),
    LinearHopper(),
    LinearSplitCUDA(),
    LinearCUDA(),
    RMSNormCUDA(),
    SoftmaxCUDA(),
)

#: By kind of target: what schedules an operator that has no template.
GENERIC: dict[str, ScheduleTemplate] = {"cpu": GenericCPU(), "cuda": GenericCUDA()}

__all__ = ["GENERIC", "REGISTRY", "Packing", "ScheduleTemplate", "load_template", "template_for"]


def template_for(workload: Workload, target: Target) -> ScheduleTemplate:
    """The first template that supports this workload on this target; the generic one where there is none.

    Raises:
        TargetError: when nothing schedules for this kind of target.
    """
    for template in REGISTRY:
        if (template.op, template.kind) == (workload.op, target.kind) and template.supports(workload, target):
            return template
    generic = GENERIC.get(target.kind)
    if generic is not None and generic.supports(workload, target):
        return generic
    raise TargetError(
        f"no template schedules {workload.op!r} for a target of kind {target.kind!r}; "
        f"expected a target of kind {sorted({template.kind for template in REGISTRY} | set(GENERIC))}"
    )


def load_template(name: str) -> ScheduleTemplate:
    """The template called ``module:Class``, as records and trials name it (``ScheduleTemplate.reference_name``).

    Raises:
        ScheduleError: when the module or class cannot be found, or is no schedule template.
    """
    module_name, separator, class_name = name.partition(":")
    if not separator:
        raise ScheduleError(f"expected a template as 'module:Class', got {name!r}")
    try:
        cls = importlib.import_module(module_name)
        for part in class_name.split("."):
            cls = getattr(cls, part)
    except (ImportError, AttributeError) as error:
        raise ScheduleError(f"cannot find template {name!r}: {error}") from None
    if not (isinstance(cls, type) and issubclass(cls, ScheduleTemplate)):
        raise ScheduleError(f"expected {name!r} to be a ScheduleTemplate, got {cls!r}")
    return cls()
