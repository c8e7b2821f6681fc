"""A small word-level tokenizer: one token per word of a closed vocabulary that is shipped with the policy."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from omega_qvla_core.errors import ConfigError, InstructionError
from omega_qvla_core.strict_json import check_keys

SCHEMA_VERSION = 1
PAD, UNKNOWN, BEGIN = "<pad>", "<unk>", "<bos>"
SPECIAL_TOKENS = (PAD, UNKNOWN, BEGIN)
STATE_BINS = 256
"""Bins of a normalised state entry in the prompt: [-1, 1) in steps of 1/128, as Pi 0.5 has them."""

_WORD = re.compile(r"[^\W\d_]+")


class WordTokenizer:
    """Lower-case words, split on everything that is not a letter.

    Args:
        vocabulary: Tokens in the order of their ids; the first three are ``<pad>``, ``<unk>`` and ``<bos>``. State
            bins, where there are any, are named ``<s0>`` to ``<s255>``.

    Raises:
        ConfigError: If a special token is not in its place or a token is there twice.
    """

    def __init__(self, vocabulary: Sequence[str]) -> None:
        self.vocabulary = tuple(vocabulary)
        if self.vocabulary[: len(SPECIAL_TOKENS)] != SPECIAL_TOKENS:
            raise ConfigError(
                f"tokenizer.vocabulary starts with {self.vocabulary[:3]}; it must start with {SPECIAL_TOKENS}"
            )
        self._ids = {token: index for index, token in enumerate(self.vocabulary)}
        if len(self._ids) != len(self.vocabulary):
            twice = next(token for token in self.vocabulary if self.vocabulary.count(token) > 1)
            raise ConfigError(f"tokenizer.vocabulary holds {twice!r} twice; each token must be unique")
        if not self.words:
            raise ConfigError("tokenizer.vocabulary holds no words; the policy could not be told anything")

    @classmethod
    def from_texts(cls, texts: Iterable[str], state_bins: bool = False) -> WordTokenizer:
        """The vocabulary of ``texts``, sorted, with state bins after it if asked for."""
        words = sorted({word for text in texts for word in split_words(text)})
        bins = [state_token(index) for index in range(STATE_BINS)] if state_bins else []
        return cls([*SPECIAL_TOKENS, *words, *bins])

    @property
    def words(self) -> tuple[str, ...]:
        """The known words, without special tokens and state bins."""
        return tuple(token for token in self.vocabulary if not token.startswith("<"))

    @property
    def has_state_bins(self) -> bool:
        """Whether the vocabulary holds all of ``<s0>`` to ``<s255>``."""
        return all(state_token(index) in self._ids for index in range(STATE_BINS))

    def encode(self, text: str, max_len: int, suffix: Sequence[str] = ()) -> tuple[np.ndarray, np.ndarray]:
        """Token ids of an instruction.

        Args:
            text: The instruction. A word that the vocabulary lacks becomes ``<unk>``.
            max_len: Length of the result.
            suffix: Tokens of the vocabulary that come after the words (state bins).

        Returns:
            int64 ids ``[max_len]`` (``<bos>``, words, suffix, then padding) and bool mask ``[max_len]``.

        Raises:
            InstructionError: If the text has no words, no word that is known, or more tokens than ``max_len``.
        """
        words = split_words(text)
        if not words:
            raise InstructionError(f"the instruction {text!r} is empty; tell the arm what to do in words")
        ids = [self._ids.get(word, self._ids[UNKNOWN]) for word in words]
        if all(index == self._ids[UNKNOWN] for index in ids):
            raise InstructionError(
                f"the policy knows no word of the instruction {text!r}; known words: {', '.join(self.words)}"
            )
        ids = [self._ids[BEGIN], *ids, *(self._ids[token] for token in suffix)]
        if len(ids) > max_len:
            limit = max_len - 1 - len(suffix)
            raise InstructionError(
                f"the instruction has {len(words)} words, the policy's prompt holds {limit}; shorten {text!r}"
            )
        tokens = np.zeros(max_len, dtype=np.int64)
        tokens[: len(ids)] = ids
        return tokens, np.arange(max_len) < len(ids)

    def unknown_words(self, text: str) -> tuple[str, ...]:
        """Words of ``text`` that the vocabulary lacks, for a warning to the person who typed them."""
        return tuple(word for word in split_words(text) if word not in self._ids)

    @classmethod
    def from_json(cls, data: object, where: str = "tokenizer.json") -> WordTokenizer:
        """Read ``tokenizer.json``; ConfigError names what is wrong."""
        values = check_keys(data, ("schema_version", "kind", "vocabulary"), (), where)
        if (values["schema_version"], values["kind"]) != (SCHEMA_VERSION, "words"):
            raise ConfigError(
                f"{where}: schema_version {values['schema_version']!r} of kind {values['kind']!r}; this release reads "
                f"schema_version {SCHEMA_VERSION} of kind 'words'"
            )
        vocabulary = values["vocabulary"]
        if not isinstance(vocabulary, list) or not all(isinstance(token, str) for token in vocabulary):
            raise ConfigError(f"{where}: vocabulary must be a list of strings")
        return cls(vocabulary)

    def to_json(self) -> dict[str, Any]:
        """What ``from_json`` reads back."""
        return {"schema_version": SCHEMA_VERSION, "kind": "words", "vocabulary": list(self.vocabulary)}


def split_words(text: str) -> list[str]:
    """Lower-case words of ``text``."""
    return _WORD.findall(text.lower())


def state_token(index: int) -> str:
    """Name of a state bin."""
    return f"<s{index}>"


def state_tokens(normalized_state: np.ndarray) -> list[str]:
    """State bins of a normalised state ``[dims]``: floor((x + 1) * 128), held within 0..255.

    Pi 0.5 prints -1 for values below -1; a word tokenizer has no such token, so they share the lowest bin.
    """
    bins = np.clip(np.floor((np.asarray(normalized_state) + 1.0) * (STATE_BINS / 2)), 0, STATE_BINS - 1)
    return [state_token(int(index)) for index in bins]
