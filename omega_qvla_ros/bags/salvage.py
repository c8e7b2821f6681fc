"""Mending a bag whose recorder did not get to close it: killed, or the disk full.

MCAP: the file is a row of records, each with its length in front. What comes after the last whole record is cut off,
and the end that a reader looks for is appended; it says that there is no index, so readers go through the records. That
takes 50 bytes. Format: the MCAP specification, version 0.

sqlite3: opening the database rolls back the transaction that was not finished.
"""

from __future__ import annotations

import sqlite3
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from omega_qvla_core.errors import RecordingError
from omega_qvla_ros.bags.reader import is_bag, storage_files

_MAGIC = b"\x89MCAP0\r\n"
_HEADER_BYTES = 9
"""One byte for the kind of a record, eight for its length."""
_DATA_END, _FOOTER = 0x0F, 0x02
_KINDS = range(0x01, 0x10)
_END = (
    struct.pack("<BQI", _DATA_END, 4, 0)  # checksum 0: none
    + struct.pack("<BQQQI", _FOOTER, 20, 0, 0, 0)  # no summary, no offsets, no checksum
    + _MAGIC
)

_JOURNAL_MAGIC = b"\xd9\xd5\x05\xf9\x20\xa1\x63\xd7"


@dataclass(frozen=True)
class Mended:
    """What was done to one file.

    Attributes:
        path: The file.
        kept_bytes: Bytes of it that are kept.
        cut_bytes: Bytes that were cut off behind them.
        was_whole: There was nothing to mend: the file is as it was.
    """

    path: Path
    kept_bytes: int
    cut_bytes: int
    was_whole: bool


def mend(path: Path) -> list[Mended]:
    """Make the files of a bag readable again, in place.

    Args:
        path: Folder of a bag, or one of its files.

    Raises:
        RecordingError: There is no bag, or nothing in it can be kept.
    """
    if not path.exists() or not is_bag(path):
        raise RecordingError(f"{path} is no bag: a folder with .mcap or .db3 files, or one of them is needed")
    files = [path] if path.is_file() else storage_files(path)
    if not files:
        raise RecordingError(f"{path} has no .mcap and no .db3 file")
    return [_mend_mcap(file) if file.suffix == ".mcap" else _mend_sqlite3(file) for file in files]


def _mend_mcap(path: Path) -> Mended:
    size = path.stat().st_size
    try:
        with path.open("r+b") as file:
            end, complete = _last_whole_record(file, path, size)
            if not complete:
                file.truncate(end)
                file.seek(end)
                file.write(_END)
    except OSError as error:
        raise RecordingError(f"{path} cannot be mended: {error}") from error
    return Mended(path, end, size - end, complete)


def _last_whole_record(file: BinaryIO, path: Path, size: int) -> tuple[int, bool]:
    """Where the last whole record before the file's end ends, and whether the file has its own proper end."""
    if file.read(len(_MAGIC)) != _MAGIC:
        raise RecordingError(f"{path} is no MCAP file; nothing can be kept")
    position = len(_MAGIC)
    while True:
        file.seek(position)
        head = file.read(_HEADER_BYTES)
        if len(head) < _HEADER_BYTES:
            return position, False
        kind, length = struct.unpack("<BQ", head)
        after = position + _HEADER_BYTES + length
        if kind not in _KINDS or after > size:
            return position, False
        if kind == _FOOTER:
            file.seek(after)
            return (size, True) if file.read(len(_MAGIC)) == _MAGIC else (position, False)
        if kind == _DATA_END:
            # What follows is the index: whole only if the footer comes, else it goes.
            file.seek(-(len(_MAGIC)), 2)
            return (size, True) if file.read() == _MAGIC else (position, False)
        position = after


def _waits_for_rollback(path: Path) -> bool:
    """Whether a transaction was written to the database in part; sqlite3 clears the journal's head afterwards."""
    journal = path.with_name(path.name + "-journal")
    if not journal.is_file():
        return False
    with journal.open("rb") as file:
        return file.read(len(_JOURNAL_MAGIC)) == _JOURNAL_MAGIC


def _mend_sqlite3(path: Path) -> Mended:
    size = path.stat().st_size
    try:
        was_whole = not _waits_for_rollback(path)
        connection = sqlite3.connect(f"file:{path}?mode=rw", uri=True)
        try:
            (found,) = connection.execute("PRAGMA quick_check(1)").fetchone()
            if found != "ok":
                raise RecordingError(f"{path} is damaged beyond the last transaction: {found}")
        finally:
            connection.close()
    except (OSError, sqlite3.Error) as error:
        raise RecordingError(f"{path} cannot be mended: {error}") from error
    kept = path.stat().st_size
    return Mended(path, kept, max(size - kept, 0), was_whole)
