"""The chat text that GR00T N1.5 reads, as NVIDIA's Eagle processor writes it."""

from __future__ import annotations

IMAGE_TOKEN = "<IMG_CONTEXT>"
IMAGE_START, IMAGE_END = "<img>", "</img>"
PAD_TOKEN = "<|endoftext|>"
_SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
_ASSISTANT = "<|im_end|>\n<|im_start|>assistant\n"


def instruction_text(instruction: str, bracketed: bool) -> str:
    """The instruction as it stands in the prompt.

    Args:
        instruction: What the arm is told.
        bracketed: As NVIDIA's policy writes a single observation: the text of a list with one string, with brackets
            and quotes (double quotes if the text has an apostrophe). Training sees the bare text.
    """
    return str([instruction]) if bracketed else instruction


def chat_text(text: str, images: int) -> str:
    """The chat with one numbered place per image."""
    places = "".join(f"<image-{index}>" for index in range(1, images + 1))
    return f"{_SYSTEM}{places}{text}{_ASSISTANT}"


def expanded_chat(text: str, images: int, tokens_per_image: int) -> str:
    """The chat with every image's place filled by its tokens; this is what is tokenized."""
    places = "".join(
        f"<image {index}>{IMAGE_START}{IMAGE_TOKEN * tokens_per_image}{IMAGE_END}" for index in range(1, images + 1)
    )
    return f"{_SYSTEM}{places}{text}{_ASSISTANT}"
