"""Tokenizers of public checkpoints, from local files only. Nothing is fetched and no code of a checkpoint is run."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Tokenizer

from omega_qvla_core.errors import CheckpointError, ConfigError

TOKENIZER_FILE = "tokenizer.json"
_BYTE_PAIR_FILES = ("vocab.json", "merges.txt")

SOURCES = {
    "pi05": f"fetch {TOKENIZER_FILE} of google/paligemma-3b-pt-224 (the whole PaliGemma family shares it)",
    "gr00t_n15": (
        f"fetch {TOKENIZER_FILE}, or vocab.json, merges.txt, added_tokens.json and tokenizer_config.json, of the Eagle "
        "backbone that comes with NVIDIA's GR00T N1.5 code (eagle2_hg_model)"
    ),
}
"""Family -> which files to fetch, for the message about a missing tokenizer."""

MAX_TOKENIZER_BYTES = 256 * 1024 * 1024
"""PaliGemma's has 17 MB."""


class TextTokenizer:
    """Text -> token ids, without the special tokens that templates add.

    Args:
        tokenizer: A loaded one.
        where: The file it came from, for messages.
    """

    def __init__(self, tokenizer: Tokenizer, where: str) -> None:
        self._tokenizer = tokenizer
        self._where = where
        # Limits of the file would cut or fill texts behind our back.
        tokenizer.no_truncation()
        tokenizer.no_padding()

    @property
    def vocab_size(self) -> int:
        """Ids that it can give, added tokens included."""
        return self._tokenizer.get_vocab_size(with_added_tokens=True)

    @property
    def largest_id(self) -> int:
        """Largest id that it can give."""
        return max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)

    def encode(self, text: str) -> list[int]:
        """Ids of a text; special tokens that are written in it count as such."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def token_id(self, token: str) -> int:
        """Id of one token.

        Raises:
            ConfigError: The vocabulary lacks it, so it is not the tokenizer of this model.
        """
        found = self._tokenizer.token_to_id(token)
        if found is None:
            raise ConfigError(f"{self._where} has no token {token!r}; it belongs to another model")
        return found

    def to_text(self) -> str:
        """Content of a ``tokenizer.json`` that gives the same tokenizer."""
        return self._tokenizer.to_str()

    @classmethod
    def from_text(cls, text: str, where: str) -> TextTokenizer:
        """Read the content of a ``tokenizer.json``.

        Raises:
            CheckpointError: If it is none; the message names ``where``.
        """
        try:
            found = cls(Tokenizer.from_str(text), where)
            # Some faults show in use only, such as an unknown-token that is not in the vocabulary.
            found.encode("pick up the red cube 0 \u00e9\u4e2d")
            return found
        except Exception as error:  # the library raises bare Exception for every kind of bad file
            raise CheckpointError(f"{where} is not a tokenizer ({error}); fetch it again") from error

    @classmethod
    def load(cls, path: Path, family: str) -> TextTokenizer:
        """Load from a file or folder.

        Args:
            path: A ``tokenizer.json``, or a folder with one, or with ``vocab.json`` and ``merges.txt``.
            family: Key of ``SOURCES``.

        Raises:
            CheckpointError: If there is none (the message says which files to fetch) or it cannot be read.
        """
        file = path if path.is_file() else path / TOKENIZER_FILE
        if file.is_file():
            if file.stat().st_size > MAX_TOKENIZER_BYTES:
                raise CheckpointError(f"{file} has {file.stat().st_size} bytes; that is no tokenizer")
            try:
                return cls.from_text(file.read_text(encoding="utf-8"), str(file))
            except UnicodeDecodeError as error:
                raise CheckpointError(f"{file} is not a tokenizer ({error}); fetch it again") from error
        if all((path / name).is_file() for name in _BYTE_PAIR_FILES):
            return cls(_byte_pair_tokenizer(path), str(path))
        found = sorted(item.name for item in path.glob("*.model")) if path.is_dir() else []
        hint = f"; {found[0]} is a SentencePiece model, which is not read" if found else ""
        raise CheckpointError(f"{path} holds no tokenizer{hint}; {SOURCES[family]} and put it there")


def _byte_pair_tokenizer(folder: Path) -> Tokenizer:
    """From ``vocab.json`` and ``merges.txt`` with the added tokens beside them."""
    from transformers import AutoTokenizer

    try:
        loaded = AutoTokenizer.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False, use_fast=True, tokenizer_type="qwen2"
        )
        return Tokenizer.from_str(loaded.backend_tokenizer.to_str())
    except (OSError, ValueError, KeyError, AttributeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{folder}: vocab.json and merges.txt give no tokenizer ({error})") from error
