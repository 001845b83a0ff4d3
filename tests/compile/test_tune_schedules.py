"""scripts/tune_schedules: the layers of well-known models as workloads that are tuned together."""

import dataclasses
import importlib.util
import sys
from collections import defaultdict
from pathlib import Path

import pytest

from attntune.models.precision import at_precision
from attntune.target import Target
from attntune.templates import template_for

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("tune_schedules", ROOT / "scripts" / "tune_schedules.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["tune_schedules"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["tune_schedules"]


def workloads(script, name, precision="float32"):
    architecture = script.ARCHITECTURES[name]
    model = at_precision(architecture.build(architecture.fields), precision)
    entries = [entry for entry, spec in model.entries.items() if not spec.on_request]
    return {workload for entry in entries for workload in model.workloads(architecture.shapes, entry)}


def test_a_described_layer_has_the_workloads_of_the_real_model(script):
    from attntune.models import bert

    real = bert.random_model(bert.PRESETS["minilm-l6"], "real")
    shapes = script.ARCHITECTURES["minilm-l6"].shapes
    assert workloads(script, "minilm-l6") == {
        workload for entry in ("forward", "embed") for workload in real.workloads(shapes, entry)
    }


@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_workloads_of_a_template_share_the_names_of_its_features(script, precision):
    """One cost model learns from all of them."""
    target = Target.parse("znver4,cores=2")
    names = defaultdict(set)
    for name in ("minilm-l6", "gpt2", "smollm2-135m", "vit-base", "whisper-tiny"):  # one of each kind
        for workload in workloads(script, name, precision):
            template = template_for(workload, target)
            config = template.default(workload, target)
            features = template.features(workload, target, config)
            words = [knob.name for knob in template.space(workload, target).knobs if isinstance(knob.values[0], str)]
            names[template.reference_name(), workload.op].add((*sorted(features), *words))
    assert len(names) > 10
    assert {place: found for place, found in names.items() if len(found) > 1} == {}


def test_what_won_a_search_is_written_and_what_was_there_stays(script, tmp_path):
    from attntune.database.journal import Journal

    there, searched, alone = Journal(ROOT / "schedules" / "znver4.jsonl").load()[:3]
    slower = dataclasses.replace(
        searched, config=searched.config.replace(lanes=8), is_default=False,
        run_secs=tuple(2 * secs for secs in searched.run_secs),
    )  # fmt: skip
    Journal(tmp_path / "znver4.jsonl").extend([there])
    Journal(tmp_path / "trials.jsonl").extend([slower, searched, alone])
    assert script.ship(tmp_path / "znver4.jsonl", tmp_path / "trials.jsonl") == 2
    assert sorted(Journal(tmp_path / "znver4.jsonl").load(), key=str) == sorted([there, searched], key=str)
