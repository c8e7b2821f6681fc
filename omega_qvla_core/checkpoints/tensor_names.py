"""Names in official files -> names of our models: prefixes, tied tables, and tensors that nothing reads."""

from __future__ import annotations

from collections.abc import Iterable

from omega_qvla_core.errors import CheckpointError
from omega_qvla_core.models.gr00t_n15 import LEROBOT_PREFIX, LM_HEAD, TOKEN_TABLE, UNUSED_PREFIXES
from omega_qvla_core.models.pi05 import TIED_KEYS, UNUSED_KEYS

_PREFIXES = {"pi05": "model.", "gr00t_n15": LEROBOT_PREFIX}

# LeRobot's files may carry the time MLP under the name that it had in Pi 0.
_PI05_RENAMED = {"action_time_mlp_in.": "time_mlp_in.", "action_time_mlp_out.": "time_mlp_out."}


def model_names(file_names: Iterable[str], family: str, source: object) -> dict[str, str]:
    """Name in our model -> name in the files, for every tensor that the model reads.

    Args:
        file_names: All names in the files.
        family: Key of ``FAMILY_TITLES``.
        source: File or folder, for messages.

    Raises:
        CheckpointError: If two tensors of the files stand for the same one.
    """
    prefix, plain = _PREFIXES[family], {}
    for file_name in file_names:
        name = file_name.removeprefix(prefix)
        if family == "pi05":
            for old, new in _PI05_RENAMED.items():
                name = name.replace(old, new) if name.startswith(old) else name
        if name in plain:
            raise CheckpointError(f"{source}: {plain[name]} and {file_name} are the same tensor; keep one of them")
        plain[name] = file_name
    return _pi05(plain) if family == "pi05" else _gr00t(plain)


def _pi05(plain: dict[str, str]) -> dict[str, str]:
    """The token table stands under either of two names; of both, the embedding counts: it is the one that is read."""
    kept = {name: file_name for name, file_name in plain.items() if name not in UNUSED_KEYS}
    for other, name in TIED_KEYS.items():
        if other in kept:
            kept[name] = kept.pop(other)
    return kept


def _gr00t(plain: dict[str, str]) -> dict[str, str]:
    """The output head is never read, unless it is all that is left of a tied pair: then it holds the token table."""
    kept = {name: file_name for name, file_name in plain.items() if not name.startswith(UNUSED_PREFIXES)}
    if LM_HEAD in plain:
        kept.setdefault(TOKEN_TABLE, plain[LM_HEAD])
    return kept
