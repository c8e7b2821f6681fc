"""The word tokenizer."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from omega_qvla_core.errors import ConfigError, InstructionError
from omega_qvla_core.processing.prompt.tokenizer import WordTokenizer, state_tokens

TEXTS = ("Touch the red cube", "lift the green cube")


@pytest.fixture
def tokenizer() -> WordTokenizer:
    return WordTokenizer.from_texts(TEXTS)


def test_words_follow_the_begin_token_and_padding_is_masked(tokenizer):
    tokens, mask = tokenizer.encode("lift the red cube", 8)
    assert tokens.dtype == np.int64
    assert [tokenizer.vocabulary[index] for index in tokens] == ["<bos>", "lift", "the", "red", "cube"] + ["<pad>"] * 3
    assert mask.tolist() == [True] * 5 + [False] * 3


@pytest.mark.parametrize("text", ["LIFT the, red... cube!", " lift\tthe\nred cube ", "lift-the_red 2 cube"])
def test_case_and_everything_but_letters_do_not_matter(tokenizer, text):
    np.testing.assert_array_equal(tokenizer.encode(text, 8)[0], tokenizer.encode("lift the red cube", 8)[0])


def test_an_unknown_word_among_known_ones_is_marked(tokenizer):
    tokens, _ = tokenizer.encode("lift the purple cube", 8)
    assert tokenizer.vocabulary[tokens[3]] == "<unk>"
    assert tokenizer.unknown_words("lift the purple cube") == ("purple",)


@pytest.mark.parametrize("text", ["", "   ", "123 !?"])
def test_an_empty_instruction_is_refused(tokenizer, text):
    with pytest.raises(InstructionError, match="is empty"):
        tokenizer.encode(text, 8)


def test_an_instruction_of_unknown_words_lists_the_known_ones(tokenizer):
    with pytest.raises(InstructionError, match="known words: cube, green, lift, red, the, touch"):
        tokenizer.encode("saisis le bloc", 8)


def test_too_long_an_instruction_states_the_limit_and_is_never_cut(tokenizer):
    tokenizer.encode("lift the red cube", 5)
    with pytest.raises(InstructionError, match="has 4 words, the policy's prompt holds 3"):
        tokenizer.encode("lift the red cube", 4)


def test_state_bins_follow_the_words():
    tokenizer = WordTokenizer.from_texts(TEXTS, state_bins=True)
    suffix = state_tokens(np.array([-2.0, -1.0, 0.0, 0.999, 1.0, 7.0]))
    assert suffix == ["<s0>", "<s0>", "<s128>", "<s255>", "<s255>", "<s255>"]
    tokens, mask = tokenizer.encode("lift", 10, suffix)
    assert [tokenizer.vocabulary[index] for index in tokens[mask]] == ["<bos>", "lift", *suffix]
    assert "<s0>" not in tokenizer.words
    with pytest.raises(InstructionError, match="prompt holds 1"):
        tokenizer.encode("lift the", 8, suffix)


@given(st.text(max_size=40))
def test_any_text_gives_ids_of_the_vocabulary_or_a_clear_error(text):
    tokenizer = WordTokenizer.from_texts(TEXTS)
    try:
        tokens, mask = tokenizer.encode(text, 6)
    except InstructionError:
        return
    assert mask.any()
    assert ((tokens >= 0) & (tokens < len(tokenizer.vocabulary))).all()


def test_json_keeps_the_ids(tokenizer):
    again = WordTokenizer.from_json(json.loads(json.dumps(tokenizer.to_json())))
    assert again.vocabulary == tokenizer.vocabulary


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocabulary": ["<pad>", "<bos>", "<unk>", "a"]}, "it must start with"),
        ({"vocabulary": ["<pad>", "<unk>", "<bos>", "a", "a"]}, "holds 'a' twice"),
        ({"vocabulary": ["<pad>", "<unk>", "<bos>"]}, "holds no words"),
        ({"vocabulary": "abc"}, "vocabulary must be a list of strings"),
        ({"kind": "bpe"}, "of kind 'bpe'"),
        ({"schema_version": 9}, "schema_version 9"),
        ({"vocab": []}, "unknown key 'vocab'; did you mean 'vocabulary'"),
    ],
)
def test_a_bad_file_is_refused(tokenizer, change, message):
    with pytest.raises(ConfigError) as caught:
        WordTokenizer.from_json({**tokenizer.to_json(), **change})
    assert message in str(caught.value)
