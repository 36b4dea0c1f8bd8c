"""The model inside the package: its files, and that it draws what it is asked for."""
import json
import sys
from dataclasses import replace
from pathlib import Path
from random import Random
from statistics import fmean

import pytest
import torch

import ldm

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts" / "embedded"))

import checker
import limits
import outlines
from world import COLOURS, SHAPES, Scene, Thing, render

FOLDER = Path(ldm.__file__).parent / "assets" / "shapes"


@pytest.fixture(scope="module")
def pipe():
    return ldm.load(device="cpu")


def test_the_folder_is_small_and_in_half_precision():
    from safetensors import safe_open
    files = [file for file in FOLDER.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) < 32e6
    weights = [file for file in files if file.suffix == ".safetensors"]
    assert sorted(file.parent.name for file in weights) == ["text_encoder", "unet", "vae"]
    for file in weights:
        with safe_open(file, "pt") as tensors:
            assert {tensors.get_slice(name).get_dtype() for name in tensors.keys()} == {"F16"}  # noqa: SIM118


def test_the_model_card_tells_how_the_weights_came_to_be():
    card = (FOLDER / "README.md").read_text()
    for word in ("## Training", "| U-Net |", "| text encoder |", "## Measured", "## Limits"):
        assert word in card


def test_defaults_come_from_the_folder(pipe):
    index = json.loads((FOLDER / "model_index.json").read_text())
    assert (pipe.defaults.steps, pipe.defaults.guidance_scale) == tuple(index["_ldm"].values())
    assert pipe.prediction == "v_prediction"
    size = json.loads((FOLDER / "vae" / "config.json").read_text())["sample_size"]
    assert (pipe.defaults.height, pipe.defaults.width) == (size, size)


TEXTS = ["a red circle", "", "Ein Bär läuft über die Straße", "赤い円 🔴", "x" * 500, "<|endoftext|>"]


@pytest.mark.parametrize("text", TEXTS)
def test_the_tokenizer_takes_any_text(pipe, text):
    length = pipe.text.max_tokens
    ids = pipe.text.tokenizer(text, padding="max_length", truncation=True, max_length=length).input_ids
    assert len(ids) == length
    assert ids[0] == pipe.text.tokenizer.bos_token_id
    assert pipe.text.tokenizer.eos_token_id in ids


def test_words_of_the_captions_are_single_tokens_and_others_survive_the_round_trip(pipe):
    tokenizer = pipe.text.tokenizer
    for word in ("red", "purple", "triangle", "above", "left", "background", "striped"):
        assert len(tokenizer(word, add_special_tokens=False).input_ids) == 1
    text = "a zebra, läuft 42 times!"
    back = tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids)
    assert back.replace(" ", "") == text.replace(" ", "")


def test_the_text_encoder_pools_at_the_end_of_the_text(pipe):
    tokenizer, model = pipe.text.tokenizer, pipe.text.model
    assert model.config.eos_token_id == tokenizer.eos_token_id
    ids = tokenizer("a red circle", padding="max_length", max_length=pipe.text.max_tokens,
                    return_tensors="pt").input_ids
    with torch.no_grad():
        out = model(ids)
    end = ids[0].tolist().index(tokenizer.eos_token_id)
    torch.testing.assert_close(out.pooler_output[0], out.last_hidden_state[0, end])


def test_it_draws_a_red_circle_on_a_blue_background(pipe):
    readings = [checker.read(image) for image in
                ldm.sample("a red circle on a blue background", pipe, num_images=4, progress=False)]
    right = [reading for reading in readings if reading.background == "blue" and
             [(thing.colour, thing.shape) for thing in reading.things] == [("red", "circle")]]
    assert len(right) >= 3, readings


def test_a_background_that_the_prompt_does_not_name_is_white(pipe):
    """As captions mean, but for white things; without offset noise in training hardly a picture was."""
    prompts = ["a red circle", "a blue square", "a yellow star above a green ring", "a black heart"]
    images  = ldm.sample(prompts, pipe, progress=False)
    assert [checker.read(image).background for image in images] == ["white"] * 4


def test_what_a_kind_of_prompts_leaves_unsaid_is_not_said():
    import evaluate
    prompts = {kind: [evaluate.prompt_for(scene, kind) for scene in evaluate.scenes_of(kind, 20, seed=1)]
               for kind in evaluate.KINDS}
    for kind, texts in prompts.items():
        silent = kind in ("one thing, background unsaid", "one thing, just named")
        assert all((" background" in text) != silent for text in texts)
        assert all((len(text.split()) == 3) == (kind == "one thing, just named") for text in texts)
        assert all((" and " in text) == ("order unsaid" in kind) for text in texts)
    white = evaluate.scenes_of("one thing, background unsaid", 20, seed=1)
    assert {scene.background for scene in white} == {"white"}


@pytest.mark.parametrize("kind", ["one thing", "one thing, unseen combination", "pair", "pair, unseen"])
def test_evaluate_counts_what_is_right_and_only_that(kind):
    import evaluate
    for scene in evaluate.scenes_of(kind, 5, seed=2):
        assert all(evaluate.judge(scene, checker.read(render(scene))).values())
        taken  = {scene.background, *(thing.colour for thing in scene.things)}
        other  = replace(scene, background=next(colour for colour in COLOURS if colour not in taken))
        wrong  = {"background"}
        if len(scene.things) == 2:                                      # the two have changed their places
            a, b  = scene.things
            other = replace(other, things=(replace(a, x=b.x, y=b.y), replace(b, x=a.x, y=a.y)))
            wrong.add("both and relation")
        found = evaluate.judge(scene, checker.read(render(other)))
        assert {name for name, right in found.items() if not right} == wrong
    for right, low, high in ((99, .9455, .9982), (0, 0, .0370), (50, .4038, .5962)):    # Wilson's, of 100
        assert evaluate.wilson(right, 100) == pytest.approx((low, high), abs=1e-4)


def test_an_outline_with_a_dent_is_not_right():
    import evaluate
    scene = Scene((Thing("red", "square", "large", "plain", (1, 1), .5, .5, .25),), "white")
    image = render(scene)
    image.paste((247, 247, 245), (134, 74, 170, 110))                          # a ninth of the square is gone
    found = evaluate.judge(scene, checker.read(image))
    assert {name for name, right in found.items() if not right} == {"outline"}


def test_diffusers_loads_the_folder_and_draws_the_same(pipe):
    import diffusers
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(FOLDER, safety_checker=None,
                                                               torch_dtype=torch.float32)
    theirs.set_progress_bar_config(disable=True)
    prompt = "a red circle on a blue background"
    scale, steps = pipe.defaults.guidance_scale, pipe.defaults.steps
    expected = theirs(prompt, num_inference_steps=steps, guidance_scale=scale, output_type="np",
                      generator=torch.Generator().manual_seed(5)).images
    found = ldm.sample(prompt, pipe, seed=5, output_type="np", progress=False)
    assert found.shape == expected.shape
    assert abs(torch.from_numpy(found) - torch.from_numpy(expected)).max() < 1e-3


def test_the_text_encoder_says_what_captions_of_unseen_combinations_say(pipe):
    reader = limits.trained_reader(pipe, count=500, steps=300)
    for things in (1, 2):
        scenes = limits.plain_scenes(Random(2), 200, things, unseen=True)
        assert limits.read_right(pipe, reader, scenes) > .95


def test_the_text_encoder_tells_the_first_thing_from_the_second(pipe):
    """Else no U-Net could know which of two things joined by "and" is on the left."""
    rng, pairs = Random(0), []
    while len(pairs) < 400:
        pairs.append([(rng.choice([*COLOURS]), rng.choice(SHAPES)) for _ in range(2)])
    context = pipe.text(["a {} {} and a {} {}".format(*first, *second) for first, second in pairs]).context
    shapes  = torch.cat([context[:, 3], context[:, 7]]).double()    # <start> a … SHAPE and a … SHAPE
    shapes  = torch.cat([shapes, torch.ones(800, 1)], dim=1)
    where   = torch.tensor([-1.] * 400 + [1.] * 400, dtype=torch.double)
    taught  = torch.arange(800) % 2 == 0
    linear  = torch.linalg.lstsq(shapes[taught], where[taught, None]).solution[:, 0]
    assert ((shapes[~taught] @ linear).sign() == where[~taught]).double().mean() > .98


def test_outlines_suffer_from_noise_and_a_wrong_shape_has_none(pipe, monkeypatch):
    from evaluate import scenes_of
    scenes = scenes_of("one thing", 6, seed=3)
    drawn, near, far = (outlines.likenesses(pipe, scenes, strength, 10) for strength in (None, 0., .6))
    assert min(near) >= outlines.CRISP
    assert fmean(near) == pytest.approx(.97, abs=.015)
    assert .8 < fmean(far) < fmean(near) < fmean(drawn) <= 1
    others = [replace(scene, things=tuple(replace(thing, shape="ring" if thing.shape == "cross" else "cross")
                                          for thing in scene.things)) for scene in scenes]
    monkeypatch.setattr(outlines, "render", lambda scene, size: render(others[scenes.index(scene)], size))
    assert outlines.likenesses(pipe, scenes, 0., 10) == [0] * 6


def test_outlines_are_counted_by_shape():
    scenes = [Scene((Thing("red", shape, "small", "plain", (1, 1), .5, .5, .1),), "white")
              for shape in ("star", "circle", "star")]
    table = outlines.by_shape({"0": [.95, .97, .85], "1": [.7, .9, .5]}, scenes)
    assert table.split("\n") == ["| right, and mean overlap | 0 | 1 |", "|---|---|---|",
                                 "| 1 × circle | 1, 0.970 | 1, 0.900 |", "| 2 × star | 1, 0.900 | 0, 0.600 |"]


@pytest.mark.parametrize("strength", [.8, 1., 1.2])
def test_the_autoencoder_keeps_what_the_checker_reads_also_where_latents_are_weak_or_strong(pipe, strength):
    from evaluate import scenes_of
    for kind in ("one thing", "pair"):
        assert limits.seen_right(pipe, scenes_of(kind, 10, seed=3), strength) >= .9
    assert limits.seen_right(pipe, scenes_of("one thing", 10, seed=3), 0.) < .1     # the factor is applied
