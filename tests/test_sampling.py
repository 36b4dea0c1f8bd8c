"""ldm.sample from end to end: against diffusers, against itself, and with arguments that make no sense."""
import dataclasses
import functools
import warnings
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import PIL.Image
import pytest
import tiny
import torch

import ldm
from ldm.schedulers import SCHEDULERS

QUICK = {"steps": 3, "spacing": "trailing", "height": 64, "width": 64}


def pixels(*args, **kwargs) -> np.ndarray:
    return ldm.sample(*args, **{**QUICK, "output_type": "np", **kwargs})


@pytest.mark.parametrize("name", SCHEDULERS)
def test_same_seed_same_picture_as_diffusers(folder, name):
    assert tiny.picture_difference(folder, name) < 1e-4


@pytest.mark.parametrize("name", ["ddim", "euler", "euler_a", "heun", "dpmpp_2m"])
def test_same_picture_as_diffusers_with_v_prediction(tmp_path, name):
    assert tiny.picture_difference(tiny.write(tmp_path / "v", prediction="v_prediction"), name) < 1e-4


def test_same_picture_as_diffusers_with_rescaled_guidance(folder, pipe):
    ours   = pixels("a red cat", pipe, scheduler="ddim", spacing=None, steps=5, guidance_rescale=0.7, seed=3)
    theirs = tiny.their_pictures(folder, "ddim", [3], prompt="a red cat", num_inference_steps=5,
                                 guidance_rescale=0.7, height=64, width=64)
    assert np.abs(ours - theirs).max() < 1e-4


def test_default_scheduler_steps_and_size_come_from_the_model(folder, pipe):
    assert (pipe.defaults.scheduler, pipe.defaults.steps, pipe.defaults.guidance_scale) == ("pndm", 50, 7.5)
    states: list[int] = []
    ours = ldm.sample("a cat", pipe, output_type="np", callback=lambda step, x, x0: states.append(step))
    assert states == list(range(1, 51))
    assert ours.shape == (1, 64, 64, 3)
    assert np.abs(ours - tiny.their_pictures(folder, "pndm", [0], prompt="a cat")).max() < 1e-4


@pytest.mark.parametrize("name", ["pndm", "euler_a", "dpmpp_2m_sde"])
def test_a_picture_of_a_batch_is_the_same_alone(pipe, name):
    batch = pixels("a cat", pipe, scheduler=name, seed=4, num_images=3)
    for i in range(3):
        alone = pixels("a cat", pipe, scheduler=name, seed=4 + i)
        np.testing.assert_allclose(alone, batch[i:i + 1], atol=1e-5)
    turned = pixels("a cat", pipe, scheduler=name, seed=[6, 4], num_images=2)
    np.testing.assert_allclose(turned, batch[[2, 0]], atol=1e-5)
    assert np.abs(batch[0] - batch[1]).max() > 0.05


def test_lists_of_prompts_and_negative_prompts(pipe):
    both = pixels(["a cat", "the dog"], pipe, negative_prompt=["x", "yy"], num_images=2, seed=10)
    pairs = [("a cat", "x"), ("a cat", "x"), ("the dog", "yy"), ("the dog", "yy")]
    for i, (prompt, negative) in enumerate(pairs):
        alone = pixels(prompt, pipe, negative_prompt=negative, seed=10 + i)
        np.testing.assert_allclose(alone, both[i:i + 1], atol=1e-5)
    assert np.abs(pixels("the dog", pipe, negative_prompt="yy", seed=0)
                  - pixels("a cat", pipe, negative_prompt="x", seed=0)).max() > 1e-4


def test_output_types_show_the_same_picture(pipe):
    latent = pixels("a cat", pipe, output_type="latent")
    assert latent.shape == (1, 4, 8, 8)
    expected = (pipe.decode(latent) / 2 + 0.5).clamp(0, 1)
    assert torch.equal(pixels("a cat", pipe, output_type="pt"), expected)
    array = pixels("a cat", pipe)
    np.testing.assert_array_equal(array, expected.permute(0, 2, 3, 1).numpy())
    image, = pixels("a cat", pipe, output_type="pil")
    assert isinstance(image, PIL.Image.Image)
    np.testing.assert_array_equal(np.asarray(image), (array[0] * 255).round())


def test_callback_sees_the_state_and_the_estimate_of_each_step(pipe):
    seen: list[tuple[int, torch.Tensor, torch.Tensor]] = []
    latent = pixels("a cat", pipe, scheduler="dpmpp_2m", output_type="latent",
                    callback=lambda *args: seen.append(args))
    assert [step for step, _, _ in seen] == [1, 2, 3]
    assert torch.equal(seen[-1][1], latent)                         # the last step ends at σ = 0 …
    assert torch.equal(seen[-1][2], latent)                     # … where a step of first order is x₀ itself
    # The first step is of first order too: from the start towards x₀, by the ratio of the σ's.
    sigmas = pipe.schedule.sigmas(3, "trailing")
    start  = (1 + sigmas[0]**2) ** 0.5 * torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(seen[0][1], seen[0][2] + sigmas[1] / sigmas[0] * (start - seen[0][2]))


def test_latents_can_be_changed_and_learned_from(pipe):
    seen: list[torch.Tensor] = []
    latent = pixels("a cat", pipe, output_type="latent", callback=lambda step, x, x0: seen.append(x))
    weight = torch.ones((), requires_grad=True)
    (weight * latent).sum().backward()
    torch.testing.assert_close(weight.grad, latent.sum())
    assert not latent.requires_grad
    before = [x.clone() for x in (latent, seen[0])]
    torch.testing.assert_close([x.add_(1) for x in (latent, seen[0])], [x + 1 for x in before])


def test_a_callback_can_stop_the_run(pipe):
    def stop(step, x, x0):
        if step == 2:
            raise StopIteration("enough")
    with pytest.raises(StopIteration, match="enough"):
        pixels("a cat", pipe, callback=stop)


def test_scale_of_one_asks_neither_for_a_negative_prompt_nor_twice(pipe):
    texts, batches = [], []

    def text(prompts):
        texts.append(list(prompts))
        return pipe.text(prompts)

    def unet(x, *rest):
        batches.append(len(x))
        return pipe.unet(x, *rest)

    counting = dataclasses.replace(pipe, text=text, unet=unet)
    pixels("a cat", counting, guidance_scale=1, scheduler="euler")
    assert (texts, batches) == ([["a cat"]], [1, 1, 1])
    pixels("a cat", counting, guidance_scale=2, negative_prompt="b", scheduler="euler")
    assert (texts[1:], batches[3:]) == ([["a cat"], ["b"]], [2, 2, 2])


def test_guidance_interval_saves_calls_outside(pipe):
    batches = []

    def unet(x, *rest):
        batches.append(len(x))
        return pipe.unet(x, *rest)

    pixels("a cat", dataclasses.replace(pipe, unet=unet), sigmas=[10, 5, 1, 0], steps=None, spacing=None,
           scheduler="euler", guidance_interval=(2, 8))
    assert batches == [1, 2, 1]


def test_a_scheduler_of_ones_own(pipe):
    def my_euler(denoise, x, sigmas):
        for sigma, following in zip(sigmas, sigmas[1:], strict=False):
            x = x + (following - sigma) * (x - denoise(x, sigma)) / sigma
            yield x
    np.testing.assert_allclose(pixels("a cat", pipe, scheduler=my_euler),
                               pixels("a cat", pipe, scheduler=ldm.schedulers.euler), atol=1e-6)


def test_sigmas_and_timesteps_of_ones_own(pipe):
    times = [999, 500, 100]
    by_time  = pixels("a cat", pipe, timesteps=times, steps=None, spacing=None)
    by_sigma = pixels("a cat", pipe, sigmas=[*map(pipe.schedule.sigma, times), 0], steps=None, spacing=None)
    np.testing.assert_array_equal(by_time, by_sigma)
    assert np.abs(by_time - pixels("a cat", pipe)).max() > 1e-4


def test_options_reach_the_scheduler(pipe):
    plain = pixels("a cat", pipe, scheduler="ddim")
    zero, one = (pixels("a cat", pipe, scheduler="ddim", scheduler_options={"eta": eta})
                 for eta in (0.0, 1.0))
    np.testing.assert_array_equal(plain, zero)
    assert np.abs(plain - one).max() > 1e-3


@pytest.mark.parametrize("part", ["unet", "text"])
def test_text_encoder_and_unet_may_have_different_dtypes(folder, part):
    mixed = ldm.load(folder, device="cpu")
    (mixed.unet if part == "unet" else mixed.text.model).double()
    expected = pixels("a cat", ldm.load(folder, device="cpu"))
    np.testing.assert_allclose(pixels("a cat", mixed), expected, atol=1e-4)


def test_the_noise_of_the_steps_may_be_ones_own(pipe):
    taken = []
    def noise(i):
        taken.append(i)
        return torch.zeros(1, 4, 8, 8)
    still = pixels("a red cat", pipe, scheduler="ddim", scheduler_options={"eta": 1.0, "noise": noise})
    assert taken == [0, 1, 2]
    assert not np.allclose(still, pixels("a red cat", pipe, scheduler="ddim", scheduler_options={"eta": 1.0}))


def test_what_a_function_has_bound_stays_bound(pipe):
    def zeros(i):
        return torch.zeros(1, 4, 8, 8)
    bound = functools.partial(ldm.schedulers.euler_ancestral, noise=zeros)
    np.testing.assert_array_equal(
        pixels("a cat", pipe, scheduler=bound),
        pixels("a cat", pipe, scheduler=ldm.schedulers.euler_ancestral, scheduler_options={"noise": zeros}))


def test_integers_of_other_libraries_are_seeds(pipe):
    wanted = pixels("a cat", pipe, seed=[3, 4], num_images=2)
    for first in (np.int64(3), torch.tensor(3)):
        np.testing.assert_array_equal(pixels("a cat", pipe, seed=first, num_images=2), wanted)
    for both in (np.array([3, 4]), torch.tensor([3, 4])):
        np.testing.assert_array_equal(pixels("a cat", pipe, seed=both, num_images=2), wanted)


def test_any_multiple_of_eight_is_a_size(pipe):
    assert pixels("a cat", pipe, height=72, width=8).shape == (1, 72, 8, 3)


@pytest.mark.parametrize(("arguments", "error", "words"), [
    ({"height": 100},                            ValueError, "multiple of 8: take 96 or 104"),
    ({"width": 4},                               ValueError, "multiple of 8: take 8"),
    ({"height": -100},                           ValueError, r"multiple of 8: take 8\."),
    ({"height": 64.0},                           ValueError, r"64\.0; it is a whole number of pixels"),
    ({"seed": -1},                               ValueError, "seed is -1"),
    ({"seed": [1, 2]},                           ValueError, "one for each of the 1 pictures"),
    ({"seed": None},                             ValueError, "seed is None; give one integer"),
    ({"seed": 1.5},                              ValueError, "seed is 1.5; give one integer"),
    ({"prompt": 3},                              TypeError,  "prompt is a text, or a list of texts; got 3"),
    ({"negative_prompt": None},                  TypeError,  "negative_prompt is a text"),
    ({"prompt": []},                             ValueError, "empty list"),
    ({"prompt": "caf\udce9"},                    ValueError, r"prompt is not Unicode: 'caf\\udce9'"),
    ({"negative_prompt": ["a", "b"]},            ValueError, "2 negative prompts for 1 prompts"),
    ({"num_images": 0},                          ValueError, "num_images is 0"),
    ({"num_images": 2.0},                        ValueError, "num_images is 2.0; it is a whole number"),
    ({"scheduler": "nope"},                      ValueError, "no scheduler 'nope'; there are ddim"),
    ({"steps": 0},                               ValueError, "steps is 0"),
    ({"steps": 1001},                            ValueError, "the model knows 1000 times"),
    ({"spacing": "nope"},                        ValueError, "spacing is 'nope'; there are 'leading'"),
    ({"sigmas": [1, 0]},                         ValueError, "Give either steps"),
    ({"sigmas": [1, 2], "steps": None, "spacing": None}, ValueError, "falling"),
    ({"timesteps": [1, 2], "steps": None, "spacing": None}, ValueError, "timesteps must be falling"),
    ({"timesteps": [], "steps": None, "spacing": None}, ValueError, "timesteps must be falling"),
    ({"timesteps": np.array([9, 1]), "steps": None}, ValueError, "Give either steps"),
    ({"timesteps": [1000, 500], "steps": None, "spacing": None}, ValueError, "between 999 and 0"),
    ({"timesteps": [500, -5], "steps": None, "spacing": None}, ValueError, "between 999 and 0"),
    ({"guidance_rescale": 1.5},                  ValueError, "guidance_rescale is 1.5; it is a degree"),
    ({"guidance_interval": (5, 1)},              ValueError, r"guidance_interval is \(5, 1\); it is \(low"),
    ({"guidance_interval": 5},                   ValueError, "guidance_interval is 5; it is"),
    ({"scheduler": lambda denoise, x, sigmas: x}, TypeError, "returned a tensor; it is to be a generator"),
    ({"model": 5},                               TypeError,  "A model is a Pipeline, a folder, .* got int"),
    ({"output_type": "jpeg"},                    ValueError, "output_type is 'jpeg'"),
    ({"handover": 0},                            ValueError, "handover is 0; it is the first model's part"),
    ({"handover": 80},                           ValueError, "handover is 80"),
])
def test_arguments_that_make_no_sense(pipe, arguments, error, words):
    with pytest.raises(error, match=words):
        pixels(**{"prompt": "a cat", "model": pipe, **arguments})


def test_guidance_scale_zero_is_warned_of(pipe):
    with pytest.warns(UserWarning, match="which the cards of some models call 0.0, is 1 here") as seen:
        zero = pixels("a cat", pipe, negative_prompt="bad", guidance_scale=0)
    assert seen[0].filename == __file__
    np.testing.assert_allclose(zero, pixels("bad", pipe, guidance_scale=1), atol=1e-5)


@pytest.mark.parametrize("steps", [20, 50])
@pytest.mark.parametrize("schedule", ["its own", "zero SNR"])
def test_the_usual_start_with_leading_spacing_is_not_warned_of(pipe, steps, schedule):
    if schedule == "zero SNR":                  # its σ_max is 4096; but at 100 there is no picture to see
        pipe = replace(pipe, schedule=pipe.schedule.zero_terminal_snr(), prediction="v_prediction",
                       scheduler_config={})
    with warnings.catch_warnings(action="error"):
        pixels("a red cat", pipe, steps=steps, spacing="leading",
               scheduler=lambda denoise, x, sigmas: iter([x]))


@pytest.mark.parametrize("option", [{"negative_prompt": "bad"}, {"guidance_rescale": 0.5},
                                    {"guidance_interval": (1, 5)}, {"negative_sizes": ldm.Sizes()}])
def test_what_needs_guidance_is_warned_of_where_there_is_none(pipe, option):
    with pytest.warns(UserWarning, match="guidance_scale=1 is without guidance, so negative_prompt") as seen:
        pixels("a cat", pipe, guidance_scale=1, **option)
    assert [warning.filename for warning in seen] == [__file__]


def test_a_network_of_ones_own_may_have_a_config_of_its_own(pipe):
    def network(*inputs):
        return pipe.unet(*inputs)
    network.config = SimpleNamespace(in_channels=16)                            # of patches, say
    np.testing.assert_array_equal(pixels("a cat", replace(pipe, unet=network)), pixels("a cat", pipe))


@pytest.mark.parametrize("shown", [True, False])
def test_the_progress_bar_is_shown_where_it_is_asked_for(pipe, shown, capsys):
    pixels("a red cat", pipe, steps=2, progress=shown)
    assert ("2/2" in capsys.readouterr().err) == shown


def test_few_steps_with_leading_spacing_are_warned_of(pipe):
    with pytest.warns(UserWarning, match="starts at σ = 1.62 instead of 14.61"):
        pixels("a cat", pipe, steps=2, spacing="leading")


def test_an_inpainting_model_says_what_it_is(tmp_path):
    with pytest.raises(ValueError, match="9 input channels"):
        pixels("a cat", tiny.write(tmp_path / "inpaint", in_channels=9))


SHORT = {"CUDA":    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 7.00 GiB. GPU 0 has …"),
         "MPS":     RuntimeError("MPS backend out of memory (MPS allocated: …). Tried to allocate 7.00 GiB"),
         "Windows": RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 7.00 GiB."),
         "Linux":   None}                                       # its own words, see below


@pytest.mark.parametrize("name", SHORT)
def test_out_of_memory_comes_with_advice(pipe, name):
    def hungry(*_):
        raise SHORT[name] or torch.empty(2**50, dtype=torch.uint8)
    tried   = r"7\.00 GiB" if SHORT[name] else f"{2**50} bytes"
    weights = sum(weight.nbytes for weight in pipe.vae.parameters()) / 1e9
    maps    = 3 * 4 * pipe.vae.config.channels[1] * 64 * 72 / 1e9
    with pytest.raises(torch.OutOfMemoryError, match=(
            rf"2 picture\(s\) of 72 × 64 pixels in float32; tried to get {tried}\. .*fewer pictures in one.*"
            rf"bfloat16.*, {weights / 2:.3g} GB.*tiled.* {maps / 2:.3g} GB, not {maps:.3g} GB\.")):
        pixels("a cat", dataclasses.replace(pipe, unet=hungry), num_images=2, width=72)


def test_advice_where_there_is_a_gpu(folder, monkeypatch):
    half    = ldm.load(folder, device="cpu", dtype="float16")
    tiled   = dataclasses.replace(half, vae=ldm.fast.tiled(half.vae))
    weights = sum(weight.nbytes for weight in half.unet.parameters()) / 1e9
    monkeypatch.setattr(ldm.Pipeline, "device", torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1_500_000_000, 16_000_000_000))
    advice = ldm.run.advice(tiled, 1, 64, 64, SHORT["CUDA"])
    for words in ("in float16; tried to get 7.00 GiB; free are 1.5 GB of 16 GB. ", "a smaller picture",
                  f"ldm.fast.offload: one part on the device at a time, the largest {weights:.3g} GB."):
        assert words in advice
    assert "dtype=" not in advice                                               # it is half already
    assert "tiled" not in advice
    assert "tiled" in ldm.run.advice(half, 1, 64, 64, SHORT["CUDA"])


def test_other_errors_stay_as_they_are(pipe):
    def broken(*_):
        raise RuntimeError("shapes do not fit")
    with pytest.raises(RuntimeError, match=r"^shapes do not fit$"):
        pixels("a cat", dataclasses.replace(pipe, unet=broken))


def test_a_gradient_flows_through_a_whole_run_made_by_hand(pipe):
    cond, uncond = pipe.text(["a cat"]), pipe.text([""])
    context  = cond.context.detach().requires_grad_()
    denoiser = ldm.Denoiser(pipe.unet, pipe.schedule, pipe.prediction)
    denoise  = ldm.guidance.classifier_free(denoiser, ldm.Conditioning(context), uncond, 5.0)
    sigmas   = pipe.schedule.sigmas(3)
    noise    = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    start    = (sigmas[0] * noise).requires_grad_()
    *_, x    = ldm.schedulers.dpm_solver_pp(denoise, start, sigmas)
    for gradient in torch.autograd.grad(pipe.decode(x).square().mean(), [start, context]):
        assert gradient.isfinite().all()
        assert gradient.abs().max() > 0
