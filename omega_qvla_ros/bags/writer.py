"""Writing a bag so that what was written stays readable: after Ctrl-C, on a full disk, after a kill.

A bag that was closed properly is complete. One that was not is mended (``salvage``) where it stands.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from rosbags.interfaces import Connection, Qos, QosDurability, QosHistory, QosLiveliness, QosReliability, QosTime
from rosbags.rosbag2 import StoragePlugin, Writer, WriterError
from rosbags.rosbag2.storage_mcap import McapWriter
from rosbags.rosbag2.storage_sqlite3 import Sqlite3Writer

from omega_qvla_core.errors import RecordingError
from omega_qvla_ros.bags.reader import TYPES
from omega_qvla_ros.bags.salvage import mend

STORAGES = {"mcap": StoragePlugin.MCAP, "sqlite3": StoragePlugin.SQLITE3}
_FOREVER = QosTime(2**31 - 1, 2**32 - 1)
"""How ROS 2 writes a duration without limit."""
_FAILED = (OSError, sqlite3.Error, WriterError, ValueError)


@dataclass(frozen=True)
class RecordedTopic:
    """One topic to record.

    Attributes:
        name: Full name.
        msgtype: Such as ``sensor_msgs/msg/Image``.
        reliable: Offered reliability that a player of the bag is told.
        transient_local: Offered durability that a player of the bag is told.
    """

    name: str
    msgtype: str
    reliable: bool = False
    transient_local: bool = False

    def qos(self) -> Qos:
        """The profile as bags hold it."""
        return Qos(
            QosHistory.KEEP_LAST,
            10,
            QosReliability.RELIABLE if self.reliable else QosReliability.BEST_EFFORT,
            QosDurability.TRANSIENT_LOCAL if self.transient_local else QosDurability.VOLATILE,
            _FOREVER,
            _FOREVER,
            QosLiveliness.AUTOMATIC,
            _FOREVER,
            False,
        )


class BagWriter:
    """One bag being written, by one thread.

    Args:
        folder: Must not exist; its parents are made.
        topics: What will be written.
        storage: ``mcap`` or ``sqlite3``.

    Raises:
        RecordingError: The folder exists or cannot be made, or a type is not known.
    """

    def __init__(self, folder: Path, topics: Sequence[RecordedTopic], storage: str = "mcap") -> None:
        self.folder = folder
        try:
            self._writer = Writer(folder, version=Writer.VERSION_LATEST, storage_plugin=STORAGES[storage])
            self._writer.open()
            self._connections = [self._connect(topic) for topic in topics]
        except _FAILED as error:
            raise RecordingError(f"the bag {folder} cannot be made: {error}") from error
        self.checkpoint()

    def _connect(self, topic: RecordedTopic) -> Connection:
        return self._writer.add_connection(
            topic.name, topic.msgtype, typestore=TYPES, offered_qos_profiles=[topic.qos()]
        )

    def write(self, topic: int, log_ns: int, data: bytes) -> None:
        """Append one message.

        Args:
            topic: Its index in ``topics``.
            log_ns: When it was received.
            data: Serialized message (CDR).

        Raises:
            RecordingError: It could not be written; call ``abandon``.
        """
        with _named(self.folder):
            self._writer.write(self._connections[topic], log_ns, data)

    def checkpoint(self) -> None:
        """Bring everything so far into the file: a kill later on loses only what comes after.

        Raises:
            RecordingError: It could not be written; call ``abandon``.
        """
        storage = self._writer.storage
        with _named(self.folder):
            if isinstance(storage, McapWriter):
                if storage.chunk.msgs:
                    storage.close_chunk()
                storage.bio.flush()
            elif isinstance(storage, Sqlite3Writer):
                storage.conn.commit()

    def close(self) -> None:
        """Write the index and ``metadata.yaml``.

        Raises:
            RecordingError: They could not be written; call ``abandon``.
        """
        with _named(self.folder):
            self._writer.close()

    def abandon(self) -> None:
        """After an error: close the file and keep what is whole in it. Raises nothing."""
        storage = self._writer.storage
        with suppress(*_FAILED):
            if isinstance(storage, McapWriter):
                storage.bio.close()
            else:
                self._writer.abort()
        with suppress(OSError, RecordingError):
            mend(self.folder)


class _named:
    """Turns the library's errors into one that names the bag."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if isinstance(error, _FAILED):
            raise RecordingError(f"the bag {self._folder} cannot be written: {error}") from error
