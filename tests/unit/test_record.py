"""What a record may hold, and that it survives being written."""

import json
import math

import pytest
from records import record

from attntune.database.record import Status, TuningRecord
from attntune.errors import DatabaseError
from attntune.ops import Softmax


def test_survives_json():
    before = record(secs=(0.5, 0.25, 1 / 3), final=True, is_default=True, max_abs_error=1e-7, message="")
    after = TuningRecord.from_json(json.loads(json.dumps(before.to_json())))
    assert after == before
    assert after.config["tile"] == 1
    assert after.status is Status.CORRECT


def test_older_records_without_newer_fields_are_read():
    fields = record().to_json()
    del fields["final"]
    assert TuningRecord.from_json(fields).final is False


@pytest.mark.parametrize("status", [s for s in Status if s is not Status.CORRECT])
def test_a_failed_trial_cannot_carry_times(status):
    with pytest.raises(DatabaseError, match="cannot carry times"):
        TuningRecord.from_json({**record().to_json(), "status": str(status)})
    assert record(status=status).median_secs == math.inf


def test_a_correct_trial_must_carry_times():
    with pytest.raises(DatabaseError, match="at least one sample"):
        record(secs=())


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"schema": 99}, "schema 2 or older, got schema 99"),
        ({"schema": None}, "got schema None"),
        ({"colour": 1}, r"unknown record fields \['colour'\]"),
        ({"status": "fine"}, "fine"),
        ({"run_secs": ["fast"]}, "malformed record"),
        ({"config": 3}, "malformed record"),
    ],
)
def test_malformed_fields_are_named(change, expected):
    with pytest.raises(DatabaseError, match=expected):
        TuningRecord.from_json({**record().to_json(), **change})


def test_missing_field_is_named():
    fields = record().to_json()
    del fields["config"]
    with pytest.raises(DatabaseError, match="lacks the field 'config'"):
        TuningRecord.from_json(fields)


def test_median_and_spread():
    assert record(secs=(3.0, 1.0, 2.0)).median_secs == 2.0
    assert record(secs=(3.0, 1.0)).spread_secs == 2.0
    assert record(secs=tuple(float(i) for i in range(1, 8))).spread_secs == pytest.approx(4.0)


def test_a_record_of_schema_1_keeps_its_workload():
    """Keys of schema 1 hold every field; today's leave out defaults."""
    fields = record().to_json()
    old = {"dtype": "float32", "features": 64, "op": "softmax", "rows": 8}
    read = TuningRecord.from_json({**fields, "workload": json.dumps(old, separators=(",", ":")), "schema": 1})
    assert read.workload == Softmax(8, 64).key()
    assert read.to_json()["schema"] == 2
    unknown = '{"op":"convolution","rows":1}'
    assert TuningRecord.from_json({**fields, "workload": unknown, "schema": 1}).workload == unknown
