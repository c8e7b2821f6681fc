"""Reading a bag: which topics it has, which of them a contract means, and its messages in recorded order.

Messages are decoded with the definitions of the ROS release that this package was written for, never with those inside
the file: their fields are then the ones that the node reads, and nothing in a strange file is parsed as a definition.
"""

from __future__ import annotations

import difflib
import struct
from collections.abc import Collection, Iterator, Mapping
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import apsw
from rosbags.rosbag2 import Reader, ReaderError
from rosbags.serde import SerdeError
from rosbags.typesys import Stores, get_typestore

from omega_qvla_core.errors import RecordingError

STORAGE_SUFFIXES = (".mcap", ".db3")
_DAMAGED = (
    ReaderError,
    SerdeError,
    apsw.Error,
    struct.error,
    OSError,
    ValueError,  # includes UnicodeDecodeError
    # The library reads a record's kind with ord() and headers by unpacking; at the end of a cut file both see nothing.
    TypeError,
    AssertionError,
    KeyError,
    IndexError,
)
"""What reading a damaged file raises in the library."""
DRY_RUN = "/dry_run/"
"""What the node would have commanded; never meant by a contract's topic."""
TYPES = get_typestore(Stores.ROS2_KILTED)
"""Definitions of the standard messages; those used here have been the same since Humble."""

_ENCAPSULATIONS = {b"\x00\x00": "deserialize_cdr_be", b"\x00\x01": "deserialize_cdr_le"}
_CDR_HEADER_BYTES = 4


def decode(data: bytes, msgtype: str) -> Any:
    """A serialized message (CDR) as an object with the ROS message's fields.

    As ``Typestore.deserialize_cdr``, which refuses bytes behind the end of a message. ROS's own ``serialize_message``
    leaves some: Fast CDR sets aside the alignment of every empty sequence, such as a joint state's efforts.

    Raises:
        SerdeError: The type is not known, or the data are damaged.
    """
    name = _ENCAPSULATIONS.get(bytes(data[:2]))
    if name is None or len(data) < _CDR_HEADER_BYTES:
        raise SerdeError(f"{msgtype} is not in CDR encapsulation")
    definition = TYPES.get_msgdef(msgtype)
    message, _ = getattr(definition, name)(data[_CDR_HEADER_BYTES:], 0, definition.cls, TYPES)
    return message


@dataclass(frozen=True)
class TopicSummary:
    """One topic of a bag: its message type, such as ``sensor_msgs/msg/Image``, and how many messages it has."""

    name: str
    msgtype: str
    count: int


@dataclass(frozen=True)
class BagMessage:
    """One message.

    Attributes:
        topic: Topic as it was recorded, with its namespace.
        log_ns: When the recorder received it, in ns of the recorder's clock.
        message: The decoded message; its fields are those of the ROS message.
    """

    topic: str
    log_ns: int
    message: Any


class Bag(AbstractContextManager["Bag"]):
    """A bag that is open for reading; use it with ``with``.

    Args:
        path: Folder of a bag, or one of its files (``.mcap``, ``.db3``).

    Attributes:
        path: See above.
        topics: Topic -> summary.

    Raises:
        RecordingError: There is no bag, or it is damaged or cut off; the message says what to do.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self._reader = self._open(_storage_path(self.path))
        self.topics = {
            topic: TopicSummary(topic, info.msgtype or "several types", info.msgcount)
            for topic, info in self._reader.topics.items()
        }

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        with suppress(*_DAMAGED):
            self._reader.close()

    @property
    def start_ns(self) -> int:
        """Receive time of the first message; 0 in an empty bag."""
        return int(self._reader.start_time) if self._reader.message_count else 0

    @property
    def duration_s(self) -> float:
        """Seconds from the first to the last message."""
        return float(self._reader.duration) * 1e-9

    def count(self, topics: Collection[str]) -> int:
        """Messages of some topics."""
        return sum(self.topics[topic].count for topic in topics)

    def messages(self, topics: Collection[str]) -> Iterator[BagMessage]:
        """Decoded messages of some topics in the order in which they were received.

        Raises:
            RecordingError: The bag is damaged.
        """
        connections = [connection for connection in self._reader.connections if connection.topic in topics]
        if not connections:
            return
        try:
            for connection, log_ns, data in self._reader.messages(connections):
                yield BagMessage(connection.topic, log_ns, decode(data, connection.msgtype))
        except _DAMAGED as error:
            raise self._damaged(error) from error

    def require(self, topic: str, msgtype: str, where: str) -> str:
        """The topic, if it is there with the right type and at least one message.

        Args:
            topic: Full name.
            msgtype: Such as ``sensor_msgs/msg/Image``.
            where: Who needs it, for the message.

        Raises:
            RecordingError: It is not; lists what is there, the nearest name first.
        """
        found = self.topics.get(topic)
        if found is None:
            near = difflib.get_close_matches(topic, self.topics, n=1, cutoff=0.0)
            hint = f"; the nearest is {near[0]!r}" if near else ""
            raise RecordingError(
                f"{self.path} has no topic {topic!r}, which {where} needs{hint}. Recorded: {self.listing()}. "
                "If it was recorded under another name, give --namespace or --remap"
            )
        if found.msgtype != msgtype:
            raise RecordingError(f"{self.path}: {topic!r} is of type {found.msgtype}, {where} needs {msgtype}")
        if not found.count:
            raise RecordingError(f"{self.path}: {topic!r} was recorded without a single message; {where} needs it")
        return topic

    def listing(self) -> str:
        """All topics with their number of messages, in one line."""
        return ", ".join(f"{topic.name} ({topic.count})" for topic in self.topics.values()) or "nothing at all"

    def _open(self, storage: Path) -> Reader:
        try:
            reader = Reader(storage)
            reader.open()
        except _DAMAGED as error:
            raise self._damaged(error) from error
        return reader

    def _damaged(self, error: BaseException) -> RecordingError:
        return RecordingError(
            f"{self.path} cannot be read as a bag ({error}); if the recorder was killed or the disk was full, "
            f"`omega-qvla-ros repair {self.path}` keeps what is whole in it"
        )


def is_bag(path: Path) -> bool:
    """Whether this looks like a bag: a folder with one's files, or one of them."""
    if path.is_dir():
        return (path / "metadata.yaml").is_file() or bool(storage_files(path))
    return path.suffix in STORAGE_SUFFIXES


def storage_files(folder: Path) -> list[Path]:
    """Files with messages in a folder."""
    return sorted(path for path in folder.iterdir() if path.suffix in STORAGE_SUFFIXES)


def resolve_topic(
    bag: Bag, name: str, msgtype: str, where: str, namespace: str = "", remaps: Mapping[str, str] | None = None
) -> str:
    """The recorded topic that a contract's relative topic means.

    Args:
        bag: Where to look.
        name: Topic of the contract, such as ``front/image_raw``.
        msgtype: Its type.
        where: Who needs it, for messages.
        namespace: Namespace of the robot. Empty: the topic without one, else the only topic that ends in this name.
        remaps: Contract's topic -> recorded topic, for topics that were remapped in launch.

    Raises:
        RecordingError: It is not there, or is there in several namespaces.
    """
    if remaps and name in remaps:
        return bag.require(_absolute(remaps[name], ""), msgtype, where)
    if namespace or name.startswith("/") or _absolute(name, "") in bag.topics:
        return bag.require(_absolute(name, namespace), msgtype, where)
    ending = [
        topic
        for topic, found in bag.topics.items()
        if topic.endswith(f"/{name}") and found.msgtype == msgtype and DRY_RUN not in topic
    ]
    if len(ending) > 1:
        raise RecordingError(
            f"{bag.path} has {name!r} in several namespaces ({', '.join(ending)}); say which with --namespace"
        )
    return bag.require(ending[0] if ending else _absolute(name, ""), msgtype, where)


def _absolute(name: str, namespace: str) -> str:
    if name.startswith("/"):
        return name
    prefix = f"/{namespace.strip('/')}" if namespace.strip("/") else ""
    return f"{prefix}/{name}"


def _storage_path(path: Path) -> Path:
    if not path.exists():
        raise RecordingError(f"{path} does not exist; give the folder of a bag, or its .mcap or .db3 file")
    if path.suffix == ".bag":
        raise RecordingError(f"{path} is a ROS 1 bag; convert it with `rosbags-convert --src {path} --dst NEW_FOLDER`")
    if not is_bag(path):
        raise RecordingError(f"{path} is no bag: a folder with metadata.yaml, or a .mcap or .db3 file is needed")
    if path.is_file() or (path / "metadata.yaml").is_file():
        return path
    files = storage_files(path)
    if len(files) > 1:
        raise RecordingError(f"{path} has {len(files)} files and no metadata.yaml; run `ros2 bag reindex {path}`")
    return files[0]
