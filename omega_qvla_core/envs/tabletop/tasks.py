"""What the arm can be told: three kinds of task, three colours, several wordings of each."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from omega_qvla_core.errors import ConfigError

COLOURS = ("red", "green", "blue")
"""Colours of the cubes, in the order of every ``[3, ...]`` array of cube poses."""

KINDS = ("touch", "lift", "place")
"""Kinds of task, from easy to hard."""

STAGES = {
    "touch": ("none", "reached", "touched"),
    "lift": ("none", "reached", "grasped", "lifted"),
    "place": ("none", "reached", "grasped", "lifted", "placed"),
}
"""How far an episode came, in order, per kind of task."""

# All lower case and without punctuation; the first of each kind is the canonical one.
_WORDINGS = {
    "touch": (
        "touch the {colour} cube",
        "reach out and touch the {colour} cube",
        "tap the {colour} cube",
        "put the fingers on the {colour} cube",
        "make contact with the {colour} block",
        "touch the block that is {colour}",
    ),
    "lift": (
        "lift the {colour} cube",
        "raise the {colour} cube",
        "grasp the {colour} cube and lift it",
        "lift up the {colour} block",
        "take the {colour} cube and hold it up",
        "lift the cube that is {colour} off the table",
    ),
    "place": (
        "pick up the {colour} cube and place it on the plate",
        "put the {colour} cube on the plate",
        "place the {colour} block on the plate",
        "move the {colour} cube onto the plate",
        "take the {colour} cube and set it down on the plate",
        "bring the cube that is {colour} to the plate",
    ),
}

# Three times the mean number of control periods that the scripted expert needs without noise (14, 24, 46), rounded up.
_MAX_STEPS = {"touch": 60, "lift": 80, "place": 150}

# Separates the choice of wording from the choice of start poses, which use the same seed.
_WORDING_STREAM = 1


@dataclass(frozen=True)
class Task:
    """One instruction: what to do (``kind``) with which cube (``colour``).

    Raises:
        ConfigError: Unknown kind or colour.
    """

    kind: str
    colour: str

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ConfigError(f"task kind '{self.kind}' is unknown; choose one of {', '.join(KINDS)}")
        if self.colour not in COLOURS:
            raise ConfigError(f"cube colour '{self.colour}' is unknown; choose one of {', '.join(COLOURS)}")

    @classmethod
    def parse(cls, text: str) -> Task:
        """Reads ``"place:blue"``.

        Raises:
            ConfigError: The text is not ``kind:colour``.
        """
        kind, separator, colour = text.strip().partition(":")
        if not separator:
            raise ConfigError(f"task '{text}' is not of the form kind:colour; write for example place:blue")
        return cls(kind=kind.strip(), colour=colour.strip())

    def __str__(self) -> str:
        return f"{self.kind}:{self.colour}"

    @property
    def instruction(self) -> str:
        """The canonical wording."""
        return self.wordings[0]

    @property
    def wordings(self) -> tuple[str, ...]:
        """Every wording, the canonical one first."""
        return tuple(wording.format(colour=self.colour) for wording in _WORDINGS[self.kind])

    def wording(self, seed: int) -> str:
        """The wording of the episode with this seed, in training and in evaluation alike."""
        wordings = self.wordings
        return wordings[int(np.random.default_rng((seed, _WORDING_STREAM)).integers(len(wordings)))]

    @property
    def colour_index(self) -> int:
        """Index of the named cube in ``COLOURS``."""
        return COLOURS.index(self.colour)

    @property
    def stages(self) -> tuple[str, ...]:
        """Stages of this kind of task, in order."""
        return STAGES[self.kind]

    @property
    def max_steps(self) -> int:
        """Control periods after which an episode without success has failed."""
        return _MAX_STEPS[self.kind]


TASKS = tuple(Task(kind, colour) for kind in KINDS for colour in COLOURS)
"""All nine tasks; ``TASKS[seed % 9]`` gives each the same share of a range of seeds."""
