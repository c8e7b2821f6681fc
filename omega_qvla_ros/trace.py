"""A trace: every chunk of a run with what it was planned on and what became of it, one JSON object per line.

The first line describes the run (``TraceHeader``), every other line is a ``ChunkRecord``. Values that are not finite
are ``null``. The writer has a bounded queue and a thread of its own: a slow or full disk costs lines, never control
periods.
"""

from __future__ import annotations

import json
import logging
import math
import queue
import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from omega_qvla_core.errors import OmegaQVLAError, RecordingError
from omega_qvla_core.strict_json import dataclass_from_json

log = logging.getLogger(__name__)

FORMAT = "omega-qvla-trace-1"
MAX_QUEUED = 256
"""Chunks that wait for the disk: almost a minute at 5 chunks per second."""
MAX_BYTES = 1024**3
"""About a day at 5 chunks of 16 steps and 7 joints per second."""
MAX_LINE_BYTES = 16 * 1024**2
"""A line that is longer is no chunk; 1000 steps of 50 joints take 1 MB."""
CLOSE_TIMEOUT_S = 2.0

Outcome = Literal["placed", "dropped", "rejected", "failed", "abandoned"]


@dataclass(frozen=True)
class TraceHeader:
    """What holds for a whole run.

    Attributes:
        robot: Name of the contract.
        joints: Joint names in contract order, the order of ``ChunkRecord.positions``.
        policy: Name of the checkpoint.
        quantization: Its recipe, ``none`` for an unquantized one.
        action_names: Order of ``ChunkRecord.actions``.
        period_s: Time between two steps.
        first_action_delay_s: Time from the observation to step 0.
    """

    robot: str
    joints: tuple[str, ...]
    policy: str
    quantization: str
    action_names: tuple[str, ...]
    period_s: float
    first_action_delay_s: float


@dataclass(frozen=True)
class ChunkRecord:
    """One inference.

    Attributes:
        time_ns: When its result was judged, in ns of the node's clock.
        sequence: Number of the inference.
        epoch: Count of resets, holds and other breaks before it.
        task: Count of instructions before it.
        instruction: What the arm was told.
        observation_ns: Newest stamp in the observation; the chunk's time line starts here.
        image_stamps_ns: Camera key -> stamp of its image.
        positions: ``[joints]`` measured positions of the observation, in contract order, rad and m.
        noise_seed: Seed of the start noise.
        latency_s: Wall time of the inference.
        age_s: Age of the observation when the result was judged.
        outcome: ``placed`` in the commanded motion; ``dropped`` as late or void; ``rejected`` by the guard; ``failed``
            with an error; ``abandoned`` because it hung.
        reason: Why it was not placed.
        skipped_steps: Steps that had passed already.
        clamped: Position, speed and other values that the guard limited.
        actions: ``[steps][action entries]`` as the policy gave them, in the checkpoint's order and units.
    """

    time_ns: int
    sequence: int
    epoch: int
    task: int
    instruction: str
    observation_ns: int
    image_stamps_ns: dict[str, int]
    positions: tuple[float, ...]
    noise_seed: int
    latency_s: float
    age_s: float
    outcome: Outcome
    reason: str = ""
    skipped_steps: int = 0
    clamped: int = 0
    actions: tuple[tuple[float, ...], ...] = ()

    def chunk(self) -> np.ndarray:
        """``actions`` as float64 ``[steps, action entries]``."""
        return np.array(self.actions, dtype=np.float64)


class ChunkTrace:
    """Writes a trace in the background. ``write`` never waits and never raises.

    Args:
        path: File; one that exists is kept, and a number is put behind this one's name.
        header: What holds for the run.
        max_bytes: Writing ends at this size.

    Attributes:
        path: The file that is written.
        written: Chunks in the file.
        dropped: Chunks that came while the queue was full or after writing had ended.
        error: Why writing ended, None while all is well.

    Raises:
        RecordingError: The file cannot be made.
    """

    def __init__(self, path: Path, header: TraceHeader, max_bytes: int = MAX_BYTES) -> None:
        self.path = _unused(path.expanduser())
        self.written = 0
        self.dropped = 0
        self.error: str | None = None
        self._left = max_bytes
        self._queue: queue.Queue[ChunkRecord | None] = queue.Queue(MAX_QUEUED)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # Unbuffered, so that a line that cannot be written fails here and not at the end.
            self._file = self.path.open("xb", buffering=0)
            self._put_line({"format": FORMAT, **asdict(header)})
        except OSError as error:
            raise RecordingError(f"the trace {self.path} cannot be made: {error}") from error
        self._thread = threading.Thread(target=self._run, name="trace", daemon=True)
        self._thread.start()

    def write(self, record: ChunkRecord) -> None:
        """Hand over one chunk."""
        if self.error is None:
            try:
                self._queue.put_nowait(record)
                return
            except queue.Full:
                pass
        self.dropped += 1

    def close(self) -> None:
        """Write what waits and close the file."""
        try:
            self._queue.put_nowait(None)
        except queue.Full:
            log.warning("the trace %s lacks its last chunks: the disk does not take them", self.path)
            return
        self._thread.join(CLOSE_TIMEOUT_S)

    def _run(self) -> None:
        while True:
            record = self._queue.get()
            if record is None:
                break
            if self.error is not None:
                self.dropped += 1
                continue
            try:
                self._put_line(asdict(record))
                self.written += 1
            except (OSError, RecordingError) as error:
                self.error = f"the trace {self.path} ends after {self.written} chunks: {error}"
                log.error("%s", self.error)
        self._file.close()

    def _put_line(self, value: dict[str, Any]) -> None:
        line = json.dumps(_without_nan(value), ensure_ascii=False, allow_nan=False).encode() + b"\n"
        if len(line) > self._left:
            raise RecordingError("it has reached its largest size")
        self._left -= len(line)
        self._file.write(line)


@dataclass(frozen=True)
class Trace:
    """A trace that was read. ``cut_lines``: lines at the end that were not whole."""

    path: Path
    header: TraceHeader
    records: tuple[ChunkRecord, ...] = field(repr=False)
    cut_lines: int = 0


def read_trace(path: Path) -> Trace:
    """Read a trace. A last line that is cut off, as after a kill, is left out and counted.

    Raises:
        RecordingError: No trace, of another format, or damaged; the message names the line.
    """
    if not path.is_file():
        raise RecordingError(f"{path} does not exist; the policy node writes a trace when trace_file is set")
    records: list[ChunkRecord] = []
    header: TraceHeader | None = None
    with path.open("rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(MAX_LINE_BYTES), b""), 1):
            if not line.endswith(b"\n"):
                if header is None or len(line) >= MAX_LINE_BYTES:
                    raise RecordingError(f"{path}:{number}: no whole line of a trace; is it one?")
                return Trace(path, header, tuple(records), 1)
            value = _line(path, number, line)
            if header is None:
                header = _header(path, value)
            else:
                records.append(_record(value, f"{path}:{number}"))
    if header is None:
        raise RecordingError(f"{path} is empty")
    return Trace(path, header, tuple(records))


def _line(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise RecordingError(f"{path}:{number} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise RecordingError(f"{path}:{number} is no JSON object")
    return value


def _header(path: Path, value: dict[str, Any]) -> TraceHeader:
    if value.pop("format", None) != FORMAT:
        raise RecordingError(f"{path} is not a trace of the format {FORMAT!r}")
    return _read(TraceHeader, value, f"{path}:1")


def _record(value: dict[str, Any], where: str) -> ChunkRecord:
    actions = _rows(value.pop("actions", []), f"{where}.actions")
    (positions,) = _rows([value.pop("positions", [])], f"{where}.positions") or ((),)
    stamps = value.get("image_stamps_ns")
    if not isinstance(stamps, dict) or not all(isinstance(stamp, int) for stamp in stamps.values()):
        raise RecordingError(f"{where}.image_stamps_ns must map camera keys to nanoseconds")
    return _read(ChunkRecord, {**value, "actions": actions, "positions": positions}, where)


def _rows(value: object, where: str) -> tuple[tuple[float, ...], ...]:
    """Rows of numbers, all of one length; ``null`` is NaN."""
    try:
        rows = np.array(value, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise RecordingError(f"{where} are no rows of numbers: {error}") from error
    if rows.ndim != 2 and rows.size:
        raise RecordingError(f"{where} are no rows of numbers")
    return tuple(map(tuple, rows.tolist())) if rows.ndim == 2 else ()


def _read(kind: type, value: dict[str, Any], where: str) -> Any:
    readers = {name: (lambda found, _: found) for name in ("actions", "positions", "image_stamps_ns") if name in value}
    try:
        return dataclass_from_json(kind, value, where, readers)
    except OmegaQVLAError as error:
        raise RecordingError(str(error)) from error


def rows(values: np.ndarray | Sequence[Sequence[float]]) -> tuple[tuple[float, ...], ...]:
    """An array ``[steps, entries]`` as a record holds it."""
    array = np.asarray(values, dtype=np.float64)
    # A policy may give any shape; the record of a refused chunk must not be what fails.
    return tuple(map(tuple, (array if array.ndim == 2 else array.reshape(1, -1)).tolist()))


def _without_nan(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(item) for item in value]
    return value


def _unused(path: Path) -> Path:
    found, number = path, 1
    while found.exists():
        found = path.with_name(f"{path.stem}_{number}{path.suffix}")
        number += 1
    return found
