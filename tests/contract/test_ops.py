"""Contract of every operator in the registry: identity, definition, reference and cost."""

import numpy as np
import pytest
from operators import ROWS, WORKLOADS, call_arguments

from attntune.errors import WorkloadError
from attntune.ops import REGISTRY, operator, workload_from_key
from attntune.ops.workload import FLOAT_DTYPES


def test_every_operator_has_a_row():
    assert set(ROWS) == set(REGISTRY)


@pytest.mark.parametrize("workload", WORKLOADS, ids=str)
class TestWorkload:
    def test_key_round_trip(self, workload):
        again = workload_from_key(workload.key())
        assert again == workload
        assert hash(again) == hash(workload)
        assert again.key() == workload.key()
        assert isinstance(workload, REGISTRY[workload.op])

    def test_example_inputs_fit_their_specs_and_the_seed(self, workload):
        first, again, other = (workload.example_inputs(seed) for seed in (0, 0, 1))
        for spec, value in zip(workload.inputs(), first, strict=True):
            assert value.shape == spec.shape
            assert str(value.dtype) == spec.dtype
        assert all(a.tobytes() == b.tobytes() for a, b in zip(first, again, strict=True))
        sizes = [value.size for value in first if is_float(value)]
        if max(sizes) > 4:
            assert any(a.tobytes() != b.tobytes() for a, b in zip(first, other, strict=True))

    def test_the_reference_is_float64_of_the_stated_shapes_and_finite(self, workload):
        results = workload.reference(*workload.example_inputs())
        for spec, value in zip(workload.outputs(), results, strict=True):
            assert value.dtype == (np.float64 if spec.dtype in FLOAT_DTYPES else np.dtype(spec.dtype))
            assert value.shape == spec.shape
            if workload.op != "softmax" or workload.features > 1:
                assert np.isfinite(value).all()

    def test_the_reference_agrees_with_torch(self, workload):
        import torch

        inputs = workload.example_inputs(seed=3)
        tensors = [torch.from_numpy(v.astype(np.float64) if is_float(v) else v) for v in inputs]
        expected = ROWS[workload.op].oracle(workload, *tensors)
        expected = expected if isinstance(expected, tuple) else (expected,)
        for actual, wanted in zip(workload.reference(*inputs), expected, strict=True):
            np.testing.assert_allclose(actual, wanted.numpy(), rtol=1e-9, atol=1e-11)

    def test_the_expression_has_the_stated_operands(self, workload):
        tensors = workload.compute()
        specs = (*workload.inputs(), *workload.outputs())
        assert [tuple(int(extent) for extent in t.shape) for t in tensors] == [spec.shape for spec in specs]
        assert [str(t.dtype) for t in tensors] == [spec.dtype for spec in specs]

    def test_costs_and_tolerance_are_positive(self, workload):
        assert workload.flops() >= 0
        assert workload.bytes_moved() > 0
        rtol, atol = workload.tolerance()
        limit = 4e-3 if "bfloat16" in (getattr(workload, "dtype", ""), getattr(workload, "out_dtype", "")) else 1e-3
        assert 0 < rtol < limit
        assert 0 < atol < 1e-3


def is_float(values):
    """Whether an operand holds floats; NumPy calls bfloat16 a void type."""
    return values.dtype.kind == "f" or values.dtype.name == "bfloat16"


@pytest.mark.parametrize("op", sorted(REGISTRY))
class TestOperator:
    def test_a_models_call_gives_the_workload(self, op):
        attrs, arguments, expected = call_arguments(op)
        workload = REGISTRY[op].from_call(attrs, arguments)
        assert workload == expected
        flattened = [np.prod(argument.shape) for argument in arguments]
        assert flattened == [np.prod(spec.shape) for spec in workload.inputs()]

    def test_contradictory_fields_are_refused_with_the_operators_name(self, op):
        base = ROWS[op].workloads[0]
        for fields in ROWS[op].wrong:
            with pytest.raises(WorkloadError, match=op):
                base.replace(**fields)

    def test_bigger_work_costs_more(self, op):
        by_bytes = sorted(ROWS[op].workloads, key=lambda w: w.bytes_moved())
        assert by_bytes[0].flops() < by_bytes[-1].flops()

    def test_it_is_found_by_name(self, op):
        assert operator(op) is REGISTRY[op]


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("nonsense", "malformed workload key"),
        ("[1]", "malformed workload key"),
        ('{"rows": 1}', "malformed workload key"),
        ('{"op": "convolution"}', "unknown operator 'convolution'"),
        ('{"op": "softmax", "rows": 2}', "does not fit operator 'softmax'"),
        ('{"op": "softmax", "rows": 2, "features": 3, "depth": 1}', "does not fit operator 'softmax'"),
        ('{"op": "softmax", "rows": 2, "features": -3}', "expected features to be a positive integer"),
    ],
)
def test_a_bad_key_is_refused(key, message):
    with pytest.raises(WorkloadError, match=message):
        workload_from_key(key)
