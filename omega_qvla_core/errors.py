"""Errors that a user of the library can cause.

Every message names the thing, the value that was found and the remedy. The command line prints the message alone
and exits with 1; a traceback is for bugs only.
"""


class OmegaQVLAError(Exception):
    """Base of all errors that a user's input can cause."""


class ConfigError(OmegaQVLAError):
    """A configuration (model, recipe, processing) has an unknown key, a missing key or a value out of range."""


class CheckpointError(OmegaQVLAError):
    """A checkpoint folder is missing, truncated, of the wrong family, or does not hold every tensor."""


class PackError(OmegaQVLAError):
    """A quantized pack is damaged, was made for another model, or for another number of denoise steps."""


class ObservationError(OmegaQVLAError):
    """An observation lacks a camera, has the wrong shape, or holds a value that is not finite."""


class InstructionError(ObservationError):
    """An instruction is empty or longer than the policy's prompt."""


class RecordingError(OmegaQVLAError):
    """A recording (bag, trace) is missing, cut off or damaged, lacks a topic, or cannot be written."""


class QuantizationError(OmegaQVLAError):
    """A layer cannot be quantized as the recipe asks; nothing falls back silently."""


class StepContextError(OmegaQVLAError):
    """A per-step quantized layer ran outside the denoise loop, or with another number of steps than calibrated."""


class EngineError(OmegaQVLAError):
    """A static engine does not take this model or these inputs; the model itself does."""
