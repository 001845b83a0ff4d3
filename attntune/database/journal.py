"""An append-only file of records, one JSON object a line, that no crash and no second writer can spoil.

A record is one ``write`` of one line, flushed to the disk, under a file lock (``<name>.lock`` beside the journal). A
process killed in the middle of it leaves at most a torn last line: reading skips it with a warning, and the next
append removes it first, so that no record is ever glued to it. What :meth:`Journal.append` returned from is kept.
"""

from __future__ import annotations

import contextlib
import json
import os
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

from filelock import FileLock, Timeout

from attntune.database.record import TuningRecord
from attntune.errors import DatabaseError

_LOCK_TIMEOUT_SECS = 60.0


class Journal:
    """The journal at ``path``; a file that does not exist is an empty journal."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._lock = FileLock(f"{self.path}.lock", timeout=_LOCK_TIMEOUT_SECS)

    def append(self, record: TuningRecord) -> None:
        """Add one record; when this returns, it is on the disk.

        Raises:
            DatabaseError: the file cannot be written or locked; then nothing was added.
        """
        self.extend([record])

    def extend(self, records: Sequence[TuningRecord]) -> None:
        """Add several records in one write: a crash keeps a whole number of them."""
        if not records:
            return
        data = b"".join(_line(record) for record in records)
        with self._locked("write"):
            fd = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                end = self._repair(fd)
                try:
                    _write_all(fd, data)
                    os.fsync(fd)
                except OSError:
                    os.ftruncate(fd, end)
                    raise
            finally:
                os.close(fd)
            if end == 0:
                _sync_folder(self.path.parent)

    def load(self, *, strict: bool = True) -> list[TuningRecord]:
        """Every record, in the order written; a line repeated to the byte counts once.

        Args:
            strict: raise at a malformed line; otherwise skip it with a warning. A torn last line is skipped with a
                warning in any case.

        Raises:
            DatabaseError: naming the file, the line and what was expected.
        """
        data = self._read()
        if _torn(data):
            # Perhaps another process is writing it just now: look again when it has finished.
            with contextlib.suppress(DatabaseError), self._locked("read"):
                data = self._read()
        records: list[TuningRecord] = []
        seen: set[bytes] = set()
        lines = data.split(b"\n")
        for number, line in enumerate(lines, 1):
            if not line.strip() or line in seen:
                continue
            seen.add(line)
            try:
                records.append(_parse(line))
            except DatabaseError as error:
                message = f"{self.path}, line {number}: {error}"
                if number == len(lines):
                    message += "; it was cut off while being written, so it is skipped, and the next append removes it"
                elif strict:
                    raise DatabaseError(f"{message}; remove the line, or read the journal with strict=False") from None
                else:
                    message += "; skipped"
                warnings.warn(message, stacklevel=2)
        return records

    def _read(self) -> bytes:
        try:
            return self.path.read_bytes()
        except FileNotFoundError:
            return b""
        except OSError as error:
            raise DatabaseError(f"cannot read the tuning database {self.path}: {error}") from None

    def _repair(self, fd: int) -> int:
        """Terminate a whole last line that lacks its newline, remove a torn one; where the next record goes."""
        end = os.fstat(fd).st_size
        if end == 0 or os.pread(fd, 1, end - 1) == b"\n":
            return end
        start = _last_line_start(fd, end)
        tail = os.pread(fd, end - start, start)
        try:
            _parse(tail)
        except DatabaseError:
            warnings.warn(f"{self.path}: removed a last line that was cut off while being written", stacklevel=4)
            os.ftruncate(fd, start)
            return start
        _write_all(fd, b"\n")
        return end + 1

    @contextlib.contextmanager
    def _locked(self, purpose: str) -> Iterator[None]:
        try:
            with self._lock:
                yield
        except Timeout:
            raise DatabaseError(
                f"cannot {purpose} the tuning database {self.path}: another process held {self._lock.lock_file} "
                f"for {_LOCK_TIMEOUT_SECS:g} s"
            ) from None
        except OSError as error:
            raise DatabaseError(f"cannot {purpose} the tuning database {self.path}: {error}") from None


def _line(record: TuningRecord) -> bytes:
    return json.dumps(record.to_json(), separators=(",", ":"), allow_nan=True).encode() + b"\n"


def _parse(line: bytes) -> TuningRecord:
    try:
        fields = json.loads(line)
    except ValueError as error:  # JSON or UTF-8
        raise DatabaseError(f"expected a tuning record as one JSON object, got {_shown(line)} ({error})") from None
    return TuningRecord.from_json(fields)


def _shown(line: bytes) -> str:
    text = line.decode(errors="replace")
    return repr(text if len(text) <= 60 else f"{text[:57]}...")


def _torn(data: bytes) -> bool:
    return bool(data) and not data.endswith(b"\n")


def _last_line_start(fd: int, end: int) -> int:
    """Offset just behind the last newline."""
    step = 64 * 1024
    while end > 0:
        start = max(0, end - step)
        found = os.pread(fd, end - start, start).rfind(b"\n")
        if found >= 0:
            return start + found + 1
        end = start
    return 0


def _write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def _sync_folder(folder: Path) -> None:
    """Make a new name in ``folder`` survive a power failure, where the system can."""
    with contextlib.suppress(OSError):
        fd = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
