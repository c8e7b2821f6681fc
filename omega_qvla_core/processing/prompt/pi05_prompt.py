"""The text that Pi 0.5 reads, as openpi and LeRobot write it."""

from __future__ import annotations

import numpy as np

STATE_BINS = 256
_EDGES = np.linspace(-1, 1, STATE_BINS + 1)[:-1]


def clean_task(task: str) -> str:
    """Outer blanks off, then underscores and line ends to blanks: a trailing underscore stays as a blank."""
    return task.strip().replace("_", " ").replace("\n", " ")


def state_bins(normalized_state: np.ndarray) -> np.ndarray:
    """Bin of each entry: -1 below -1, 0 to 255 in steps of 1/128, 255 above."""
    return np.digitize(np.asarray(normalized_state), bins=_EDGES) - 1


def prompt_parts(task: str, normalized_state: np.ndarray | None) -> tuple[str, ...]:
    """Texts that are tokenized one by one and put in a row after the beginning-of-sentence token.

    Args:
        task: The instruction.
        normalized_state: ``[dims]``, before padding; None for checkpoints whose prompt holds no state (openpi's
            ``discrete_state_input=False``).
    """
    cleaned = clean_task(task)
    if normalized_state is None:
        # The line end is the "start of answer" token and is tokenized on its own.
        return cleaned, "\n"
    numbers = " ".join(str(value) for value in state_bins(normalized_state))
    return (f"Task: {cleaned}, State: {numbers};\nAction: ",)
