"""A pack that is written piece by piece: one safetensors file per finished unit, merged at the end without loading any.

Finished units survive a kill: a file appears under its name only when it is whole.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from omega_qvla_core.errors import PackError
from omega_qvla_core.strict_json import write_json
from omega_qvla_core.whole_file import write_whole

STATE_FILE = "state.json"

_CHUNK = 16 << 20
_LENGTH_BYTES = 8
_TYPES = {
    "U8": (torch.uint8, 1),
    "I8": (torch.int8, 1),
    "I16": (torch.int16, 2),
    "I32": (torch.int32, 4),
    "F16": (torch.float16, 2),
    "BF16": (torch.bfloat16, 2),
    "F32": (torch.float32, 4),
}


def claim_folder(folder: Path, state: Mapping[str, Any]) -> None:
    """Make a folder for units, or take over one whose units were made with the same state.

    Args:
        folder: Of the units.
        state: All that decides what the units hold; JSON.

    Raises:
        PackError: The folder holds units of another state, or units and no readable state.
    """
    path = folder / STATE_FILE
    folder.mkdir(parents=True, exist_ok=True)
    if path.is_file():
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise PackError(f"{path} cannot be read ({error}); delete {folder} and run again") from error
        if found != json.loads(json.dumps(state)):
            raise PackError(
                f"{folder} holds units of another recipe, checkpoint, robot setup or calibration; delete it or give "
                "another folder"
            )
        return
    if next(folder.glob("*.safetensors"), None) is not None:
        raise PackError(f"{folder} holds units and no {STATE_FILE} that tells what of; delete it and run again")
    write_whole(path, lambda partial: write_json(partial, state))


def remove_folder(folder: Path) -> None:
    """Remove a folder of units; a kill meanwhile leaves nothing under its name."""
    gone = folder.with_name(f"{folder.name}.done")
    shutil.rmtree(gone, ignore_errors=True)
    folder.rename(gone)
    shutil.rmtree(gone)


def write_unit(path: Path, tensors: Mapping[str, Tensor], info: Mapping[str, Any]) -> None:
    """Write one unit; it is on the disk before it has its name."""

    def write(partial: Path) -> None:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial, {"info": json.dumps(info)})
        with partial.open("rb") as file:
            os.fsync(file.fileno())

    write_whole(path, write)


def read_info(path: Path) -> dict[str, Any] | None:
    """What ``write_unit`` was told about a unit; None if the file is missing or damaged."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return json.loads((file.metadata() or {})["info"])
    except (SafetensorError, OSError, KeyError, json.JSONDecodeError):
        return None


@dataclass(frozen=True)
class _Place:
    """Where the bytes of a tensor lie."""

    file: Path
    start: int
    size: int
    dtype: str
    shape: tuple[int, ...]


def merge_units(paths: Sequence[Path], target: Path, metadata: Mapping[str, str]) -> None:
    """Put all units into one safetensors file, copying bytes; adds ``content_sha256`` to its metadata.

    Args:
        paths: Of the units.
        target: Of the pack; it appears when it is whole.
        metadata: Of the pack.

    Raises:
        PackError: A unit is damaged.
    """
    places = dict(place for path in paths for place in _places(path))
    # Wide types first, as safetensors itself writes them: every tensor then starts at a multiple of its type's size.
    order = sorted(places, key=lambda name: (-_TYPES[places[name].dtype][1], name))
    header: dict[str, Any] = {"__metadata__": {**metadata, "content_sha256": _content_hash(places)}}
    offset = 0
    for name in order:
        place = places[name]
        header[name] = {
            "dtype": place.dtype,
            "shape": list(place.shape),
            "data_offsets": [offset, offset + place.size],
        }
        offset += place.size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % _LENGTH_BYTES)

    def write(partial: Path) -> None:
        with partial.open("wb") as out:
            out.write(len(text).to_bytes(_LENGTH_BYTES, "little") + text)
            for name in order:
                for chunk in _chunks(places[name]):
                    out.write(chunk)
            out.flush()
            os.fsync(out.fileno())

    write_whole(target, write)


def _content_hash(places: Mapping[str, _Place]) -> str:
    """The same as ``tensors_hash`` of all tensors, without loading them."""
    digest = hashlib.sha256()
    for name in sorted(places):
        place = places[name]
        digest.update(f"{name}|{_TYPES[place.dtype][0]}|{place.shape}|".encode())
        for chunk in _chunks(place):
            digest.update(chunk)
    return digest.hexdigest()


def _places(path: Path) -> Iterator[tuple[str, _Place]]:
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
            header = json.loads(file.read(length))
        for name, entry in header.items():
            if name != "__metadata__":
                start, end = entry["data_offsets"]
                place = _Place(path, _LENGTH_BYTES + length + start, end - start, entry["dtype"], tuple(entry["shape"]))
                yield name, place
    except (OSError, ValueError, KeyError, MemoryError) as error:
        raise PackError(f"{path} is damaged ({error}); delete it and run again: the other units are kept") from error


def _chunks(place: _Place) -> Iterator[bytes]:
    with place.file.open("rb") as file:
        file.seek(place.start)
        left = place.size
        while left:
            chunk = _read(file, min(left, _CHUNK), place)
            left -= len(chunk)
            yield chunk


def _read(file: BinaryIO, count: int, place: _Place) -> bytes:
    chunk = file.read(count)
    if not chunk:
        raise PackError(f"{place.file} is shorter than its header says; delete it and run again")
    return chunk
