"""A journal loses nothing it acknowledged and opens whatever happened to its writers."""

import json
import os
import random
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
from records import record

from attntune.database.journal import Journal
from attntune.errors import DatabaseError

HERE = Path(__file__).parent

WRITER = """
import sys
sys.path[:0] = sys.argv[3:]
from records import record
from attntune.database.journal import Journal
journal, name = Journal(sys.argv[1]), sys.argv[2]
samples = tuple(i / 7 for i in range(1, 1500))
i = 0
while True:
    journal.append(record(secs=samples, message=f"{name}:{i}"))
    print(f"{name}:{i}", flush=True)
    i += 1
"""


def start_writer(path, name):
    command = [sys.executable, "-W", "ignore", "-c", WRITER, str(path), name, str(HERE), str(HERE.parents[1])]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def messages(path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return [r.message for r in Journal(path).load()]


def kill_after(writer, secs):
    """What the writer had acknowledged when it was killed."""
    time.sleep(secs)
    writer.send_signal(signal.SIGKILL)
    out, _ = writer.communicate()
    return [line for line in out.split("\n")[:-1] if line]


def test_round_trip(tmp_path):
    journal = Journal(tmp_path / "t.jsonl")
    assert journal.load() == []
    written = [record(tile, (tile / 10,)) for tile in (1, 2, 4)]
    journal.append(written[0])
    journal.extend(written[1:])
    assert journal.load() == written
    assert Journal(tmp_path / "t.jsonl").load() == written


def test_repeated_lines_count_once(tmp_path):
    journal = Journal(tmp_path / "t.jsonl")
    journal.append(record(1))
    journal.append(record(2))
    journal.append(record(1))
    assert journal.load() == [record(1), record(2)]


def test_last_line_torn_at_any_byte(tmp_path):
    path = tmp_path / "t.jsonl"
    Journal(path).extend([record(1), record(2)])
    whole = path.read_bytes()
    first = whole.index(b"\n") + 1
    for cut in [*range(first + 1, len(whole) - 1, 7), len(whole) - 2]:
        path.write_bytes(whole[:cut])
        with pytest.warns(UserWarning, match=r"t\.jsonl, line 2: .*cut off"):
            assert Journal(path).load() == [record(1)]
        with pytest.warns(UserWarning, match="removed a last line"):
            Journal(path).append(record(4))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert Journal(path).load() == [record(1), record(4)]


def test_a_whole_line_that_only_lacks_its_newline_is_kept(tmp_path):
    path = tmp_path / "t.jsonl"
    Journal(path).extend([record(1), record(2)])
    path.write_bytes(path.read_bytes()[:-1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert Journal(path).load() == [record(1), record(2)]
        Journal(path).append(record(4))
        assert Journal(path).load() == [record(1), record(2), record(4)]


def test_a_file_that_is_one_torn_line(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_bytes(b'{"workload": "x' + b"y" * 200_000)
    with pytest.warns(UserWarning, match="line 1"):
        assert Journal(path).load() == []
    with pytest.warns(UserWarning, match="removed"):
        Journal(path).append(record(1))
    assert Journal(path).load() == [record(1)]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (b"not json", "expected a tuning record as one JSON object, got 'not json'"),
        (b"[1, 2]", "expected a record to be a JSON object, got list"),
        (b"\xff\xfe", "expected a tuning record as one JSON object"),
        (json.dumps({**record().to_json(), "schema": 7}).encode(), "schema 2 or older, got schema 7"),
    ],
)
def test_malformed_middle_line(tmp_path, line, expected):
    path = tmp_path / "t.jsonl"
    Journal(path).append(record(1))
    path.write_bytes(path.read_bytes() + line + b"\n")
    Journal(path).append(record(2))
    with pytest.raises(DatabaseError, match="line 2") as caught:
        Journal(path).load()
    assert expected in str(caught.value)
    assert str(path) in str(caught.value)
    with pytest.warns(UserWarning, match="line 2"):
        assert Journal(path).load(strict=False) == [record(1), record(2)]


def test_unwritable_place_is_a_clear_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DatabaseError, match="cannot write the tuning database"):
        Journal(tmp_path / "file" / "t.jsonl").append(record())
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(DatabaseError, match="cannot read the tuning database"):
        Journal(tmp_path / "folder.jsonl").load()


def test_failed_write_adds_nothing(tmp_path, monkeypatch):
    path = tmp_path / "t.jsonl"
    Journal(path).append(record(1))
    before = path.read_bytes()
    write = os.write

    def full_disk(fd, data):
        if len(data) > 100:
            return write(fd, bytes(data[:50]))
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        calls = iter((full_disk, lambda fd, data: (_ for _ in ()).throw(OSError(28, "No space left on device"))))
        patch.setattr(os, "write", lambda fd, data: next(calls)(fd, data))
        with pytest.raises(DatabaseError, match="No space left"):
            Journal(path).append(record(2))
    assert path.read_bytes() == before


def test_several_processes_write_at_once(tmp_path):
    path = tmp_path / "t.jsonl"
    writers = [start_writer(path, f"w{i}") for i in range(4)]
    for writer in writers:
        writer.stdout.readline()
    time.sleep(0.5)
    acknowledged = [f"w{i}:0" for i in range(4)]
    for writer in writers:
        acknowledged += kill_after(writer, 0)
    found = messages(path)
    assert set(acknowledged) <= set(found)
    assert len(found) == len(set(found))
    for i in range(4):
        numbers = [int(m.split(":")[1]) for m in found if m.startswith(f"w{i}:")]
        assert numbers == list(range(len(numbers)))


def test_killed_writers_lose_nothing_acknowledged(tmp_path):
    path = tmp_path / "t.jsonl"
    rng = random.Random(0)
    acknowledged = []
    for attempt in range(8):
        pair = [start_writer(path, f"{attempt}{side}") for side in "ab"]
        for writer in pair:
            acknowledged.append(writer.stdout.readline().strip())
        for writer in pair:
            acknowledged += kill_after(writer, rng.uniform(0, 0.05))
        found = messages(path)
        assert set(acknowledged) <= set(found)
        assert len(found) == len(set(found))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        Journal(path).append(record(message="end"))
    assert set(messages(path)) == {*found, "end"}
