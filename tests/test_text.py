"""Prompts to conditionings."""
import warnings

import pytest
import tiny
import torch
from transformers import CLIPTextModel, CLIPTokenizer

import ldm


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.write(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def text(folder):
    return ldm.load(folder, device="cpu").text


def test_context_is_the_last_hidden_state_of_transformers(folder, text):
    prompts   = ["a red cat", ""]
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    model     = CLIPTextModel.from_pretrained(folder / "text_encoder")
    tokens    = tokenizer(prompts, padding="max_length", max_length=77, return_tensors="pt").input_ids
    expected  = model(tokens).last_hidden_state
    context   = text(prompts).context
    assert context.shape == (2, 77, 24)
    torch.testing.assert_close(context, expected)
    assert (context[0] - context[1]).abs().max() > 0.1


def test_a_prompt_that_just_fits_is_not_warned_of(text):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert text(["a " * 75]).context.shape == (1, 77, 24)


def test_a_long_prompt_is_warned_of_once_and_the_words_left_out_are_named(text):
    long = "a " * 75 + "cat in the hat"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        conditioning = text([long, long, "short"])
    assert len(caught) == 1
    assert "77 tokens" in str(caught[0].message)
    assert "'cat in the hat'" in str(caught[0].message).replace("c a t", "cat").replace("i n", "in").replace(
        "t h e", "the").replace("h a t", "hat")
    torch.testing.assert_close(conditioning.context[0], text(["a " * 75]).context[0])
