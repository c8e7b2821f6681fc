"""The safetensors files of a checkpoint, known by their headers before a single weight is read.

One ``model.safetensors``, or shards with ``model.safetensors.index.json``. Everything that can be wrong with them is
found here: pickles, truncated files, shards that are missing or belong to another checkpoint.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from omega_qvla_core.errors import CheckpointError
from omega_qvla_core.strict_json import read_json

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

PICKLE_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle")
ELEMENT_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1,
}  # fmt: skip
FLOATS = ("F64", "F32", "F16", "BF16")

# The start of a zip archive (torch.save) and of pickle protocols 2 to 5.
_PICKLE_STARTS = (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
_SHARD_NAME = re.compile(r"^.+-(\d+)-of-(\d+)\.safetensors$")


@dataclass(frozen=True)
class StoredTensor:
    """One tensor as a header describes it.

    Attributes:
        file: The file it lies in.
        dtype: safetensors' name, such as ``BF16``.
        shape: Its shape.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        """Number of elements."""
        count = 1
        for size in self.shape:
            count *= size
        return count

    @property
    def bytes(self) -> int:
        """Bytes in the file."""
        return self.elements * ELEMENT_BYTES.get(self.dtype, 0)


@dataclass(frozen=True)
class WeightFiles:
    """All tensors of a checkpoint by name, from the headers.

    Attributes:
        source: The single file, or the index.
        files: In the order in which they are read.
        tensors: Name -> where it is.
    """

    source: Path
    files: tuple[Path, ...]
    tensors: Mapping[str, StoredTensor]

    @property
    def bytes_on_disk(self) -> int:
        """Size of all files."""
        return sum(path.stat().st_size for path in self.files)

    def read(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor, file by file, so that no more than one file is open at a time.

        Raises:
            CheckpointError: If a file was damaged or exchanged since the headers were read.
        """
        for path in self.files:
            with open_safetensors(path) as file:
                for name, stored in self.tensors.items():
                    if stored.file == path:
                        yield name, file.get_tensor(name)


def find_weights(folder: Path) -> WeightFiles:
    """Read the headers of a folder's weights.

    Raises:
        CheckpointError: If there are none, a file is a pickle, truncated or missing, or shards do not belong together.
    """
    single, index = folder / SINGLE_FILE, folder / INDEX_FILE
    if single.is_file() and index.is_file():
        raise CheckpointError(
            f"{folder} holds both {SINGLE_FILE} and {INDEX_FILE}; keep the one that belongs to config.json"
        )
    if index.is_file():
        return _read_index(index)
    if not single.is_file():
        raise CheckpointError(_missing_message(folder))
    return WeightFiles(single, (single,), read_header(single))


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Names, types and shapes of one file; no weight is read.

    Raises:
        CheckpointError: If it is a pickle or not a whole safetensors file.
    """
    refuse_pickle(path)
    with open_safetensors(path) as file:
        found = {}
        for name in file.keys():  # noqa: SIM118 - not a dict
            stored = file.get_slice(name)
            found[name] = StoredTensor(path, str(stored.get_dtype()), tuple(stored.get_shape()))
    return found


@contextmanager
def open_safetensors(path: Path) -> Iterator[Any]:
    """``safe_open`` on the CPU, whose errors name the file and the remedy."""
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} is not a whole safetensors file ({error}); fetch it again, or compare its size with the source's"
        ) from error


def refuse_pickle(path: Path) -> None:
    """Refuse a pickle, whatever its name.

    Raises:
        CheckpointError: If the file starts like one.
    """
    with path.open("rb") as file:
        start = file.read(2)
    if start in _PICKLE_STARTS:
        raise CheckpointError(f"{path} holds a pickle; pickles run code when loaded, convert it to safetensors")


def _missing_message(folder: Path) -> str:
    pickles = sorted(item.name for item in folder.iterdir() if item.suffix in PICKLE_SUFFIXES)
    if pickles:
        return (
            f"{folder / SINGLE_FILE} is missing; {pickles[0]} beside it is a pickle, which runs code when loaded and "
            f"is never read. Convert it to {SINGLE_FILE}"
        )
    shards = sorted(item.name for item in folder.glob("*.safetensors"))
    if shards:
        return f"{folder / INDEX_FILE} is missing; without it nobody knows whether {shards[0]} is complete. Fetch it"
    return (
        f"{folder / SINGLE_FILE} is missing; a checkpoint folder holds its weights there, or in shards listed by "
        f"{INDEX_FILE}; fetch the whole checkpoint"
    )


def _read_index(index: Path) -> WeightFiles:
    data = read_json(index, "the list of shards")
    places = data.get("weight_map") if isinstance(data, dict) else None
    if not isinstance(places, dict) or not places:
        raise CheckpointError(f"{index}: weight_map is missing or empty; fetch it again")
    names = sorted({str(place) for place in places.values()})
    for name in names:
        # A file beside the index, never one elsewhere.
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise CheckpointError(f"{index}: weight_map names {name!r}, which is not a .safetensors file beside it")
    _check_shard_names(index, names)
    tensors: dict[str, StoredTensor] = {}
    for name in names:
        path = index.parent / name
        if not path.is_file():
            raise CheckpointError(f"{path} is missing, but {index.name} lists it; fetch it")
        listed = {tensor for tensor, place in places.items() if place == name}
        found = read_header(path)
        different = sorted(listed ^ set(found))
        if different:
            state = "lacks" if different[0] in listed else "has the unlisted"
            raise CheckpointError(
                f"{path} {state} tensor {different[0]} ({len(different)} differ from {index.name}): shards of two "
                "checkpoints are mixed; fetch all files of one"
            )
        tensors.update(found)
    _check_total(index, data, tensors)
    return WeightFiles(index, tuple(index.parent / name for name in names), tensors)


def _check_shard_names(index: Path, names: list[str]) -> None:
    """``model-00001-of-00003.safetensors``: all must be of as many."""
    counts = {match.group(2): name for name in names if (match := _SHARD_NAME.match(name))}
    if len(counts) > 1:
        first, second = list(counts.values())[:2]
        raise CheckpointError(f"{index}: weight_map mixes {first} with {second}; fetch all files of one checkpoint")


def _check_total(index: Path, data: dict[str, Any], tensors: Mapping[str, StoredTensor]) -> None:
    metadata = data.get("metadata")
    total = metadata.get("total_size") if isinstance(metadata, dict) else None
    found = sum(tensor.bytes for tensor in tensors.values())
    if isinstance(total, int) and total != found:
        raise CheckpointError(
            f"{index}: metadata.total_size is {total}, the shards hold {found} bytes: shards of two checkpoints are "
            "mixed, or one was converted; fetch all files of one checkpoint"
        )
