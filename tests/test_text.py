"""Prompts to conditionings."""
import warnings
from dataclasses import replace

import pytest
import tiny
import torch
from transformers import CLIPTextModel, CLIPTokenizer

import ldm
from ldm.text import JoinedText, without_last_layers


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


@pytest.mark.parametrize("skipped", [0, 1, 2])
def test_clip_skip_is_an_earlier_state_after_the_final_norm_and_stays_so_in_a_file(folder, tmp_path, skipped):
    """As diffusers' encode_prompt(clip_skip=…) has it, which fails with transformers of today."""
    pipe     = ldm.load(folder, device="cpu")
    model    = CLIPTextModel.from_pretrained(folder / "text_encoder")
    tokens   = pipe.text.tokenizer("a cat", padding="max_length", max_length=77, return_tensors="pt")
    states   = model(tokens.input_ids, output_hidden_states=True).hidden_states
    expected = getattr(model, "text_model", model).final_layer_norm(states[-(skipped + 1)])
    whole    = pipe.text(["a cat"]).context
    shorter = replace(pipe, text=without_last_layers(pipe.text, skipped))
    torch.testing.assert_close(shorter.text(["a cat"]).context, expected)
    assert torch.equal(pipe.text(["a cat"]).context, whole)                      # the one it was made from
    assert skipped == 0 or (expected - whole).abs().max() > .01
    weights = {p.data_ptr() for p in pipe.text.model.parameters()}
    assert {p.data_ptr() for p in shorter.text.model.parameters()} <= weights
    shorter.save(tmp_path / "shorter")
    again = ldm.load(tmp_path / "shorter", device="cpu")
    torch.testing.assert_close(again.text(["a cat"]).context, expected)


def test_clip_skip_is_refused_where_it_means_nothing(text):
    for count in (3, -1):
        with pytest.raises(ValueError, match=f"3 layers: from 0 to 2 of them can be left out, not {count}"):
            without_last_layers(text, count)
    penultimate = replace(text, penultimate=True)
    for of_xl in (penultimate, JoinedText(penultimate, penultimate)):             # the refiner's, the base's
        with pytest.raises(ValueError, match="XL already reads the last layer but one"):
            without_last_layers(of_xl, 1)
