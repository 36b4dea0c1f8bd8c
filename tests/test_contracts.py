"""ldm/contracts.py: parts of different models are refused with one sentence; parts of one's own pass."""
import re
import warnings
from copy import deepcopy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import tiny
import torch

import ldm
from ldm.models import VAE, TinyVAE, TinyVAEConfig, UNet, UNetConfig, VAEConfig
from ldm.text import ClipText, JoinedText


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {family: ldm.load(tiny.write(folder / family.replace(" ", "-"), family), device="cpu")
            for family in tiny.FAMILIES}


def unet(like, **changes):
    return UNet(replace(like.unet.config, **changes))


def vae(**changes):
    return VAE(replace(VAEConfig(channels=(8, 8, 8, 8), groups=4), **changes))


def refused(pipeline, message, **parts):
    """`replace` fails with one sentence."""
    with pytest.raises(ValueError, match=message) as caught:
        replace(pipeline, **parts)
    assert re.fullmatch(r"[^\n]+[^.\n]\.", str(caught.value))


def test_every_family_and_the_embedded_model_are_in_order(pipelines):
    for pipeline in (*pipelines.values(), ldm.load(device="cpu")):
        assert replace(pipeline, name="checked again").name == "checked again"


def test_networks_on_different_devices(pipelines):
    one = pipelines["SD 1.5"]
    refused(one, "U-Net is on cpu, the autoencoder on meta; load both with the same device=",
            vae=deepcopy(one.vae).to("meta"))


def test_the_width_of_the_context(pipelines):
    one, xl, refiner = pipelines["SD 1.5"], pipelines["SDXL base"], pipelines["SDXL refiner"]
    refused(one, "text encoder gives states of width 24, but the U-Net reads a context of width 32; take ",
            unet=unet(one, context_dim=32))
    refused(xl, "text encoder gives states of width 16, but the U-Net reads a context of width 24",
            text=xl.text.second)
    refused(one, "text encoder gives states of width 48, but the U-Net reads a context of width 24",
            text=JoinedText(one.text, refiner.text))


def test_the_width_of_the_pooled_text(pipelines):
    xl, refiner = pipelines["SDXL base"], pipelines["SDXL refiner"]
    refused(xl, r"pooled text of width 0, but the U-Net reads one of width 20 \(Stable Diffusion XL\) or ",
            text=JoinedText(xl.text.second, xl.text.first))
    wider = xl.unet.config.vector_dim + 1
    refused(xl, "pooled text of width 20, but the U-Net reads one of width 21 ",
            unet=unet(xl, vector_dim=wider))
    refused(refiner, r"pooled text of width 20, .* \d+ \(Stable Diffusion XL\) or 21 \(its refiner\)",
            unet=unet(refiner, vector_dim=refiner.unet.config.vector_dim + 1))


def test_the_channels_of_the_latents(pipelines):
    one = pipelines["SD 1.5"]
    refused(one, "autoencoder has latents of 16 channels, but the U-Net takes 4, gives 4; take both",
            vae=vae(latent_channels=16))
    refused(one, "autoencoder has latents of 16 channels", vae=TinyVAE(TinyVAEConfig(latent_channels=16)))
    refused(one, "takes 3, gives 4", unet=unet(one, in_channels=3))
    for channels in (9, 8):                     # for inpainting and the like: `sample` says what they need
        assert replace(one, unet=unet(one, in_channels=channels)).unet.config.in_channels == channels


@pytest.mark.parametrize(("family", "scale", "message"), [
    ("SD 1.5",       0.13025, r"by 0\.13025, but the published U-Nets without .* scaled by 0\.18215\."),
    ("SD 2.1",       0.13025, r"by 0\.13025, but the published U-Nets without .* scaled by 0\.18215\."),
    ("SDXL base",    0.18215, r"by 0\.18215, but the published U-Nets with a .* scaled by 0\.13025\."),
    ("SDXL refiner", 0.18215, r"by 0\.18215, but the published U-Nets with a .*_factor=0\.13025\)\."),
])
def test_the_scale_of_the_latents_is_warned_of(pipelines, family, scale, message):
    """Not refused: a small U-Net of one's own may learn on XL's latents and need no vector."""
    pipeline = pipelines[family]
    with pytest.warns(UserWarning, match=message):
        replace(pipeline, vae=vae(scaling_factor=scale))
    right = {0.13025: 0.18215, 0.18215: 0.13025}[scale]
    with warnings.catch_warnings(action="error"):
        for factor in (right, 0.9):             # one of one's own may be anything
            assert replace(pipeline, vae=vae(scaling_factor=factor)).vae.config.scaling_factor == factor
        assert replace(pipeline, vae=TinyVAE()).vae.config.scaling_factor == 1


def test_the_prediction_and_the_schedule(pipelines):
    one, two = pipelines["SD 1.5"], pipelines["SD 2.1"]
    refused(one, "U-Net predicts 'epsilon', but the scheduler_config is for 'v_prediction'; make both",
            scheduler_config=two.scheduler_config)
    refused(two, "U-Net predicts 'epsilon', but the scheduler_config is for 'v_prediction'",
            prediction="epsilon")
    refused(one, "U-Net predicts 'epsilon', but the schedule ends in pure noise",
            schedule=one.schedule.zero_terminal_snr())
    assert replace(two, schedule=two.schedule.zero_terminal_snr()).prediction == "v_prediction"
    assert replace(two, prediction="sample", scheduler_config={}).prediction == "sample"
    ours = replace(two, unet=lambda x, t, context, vector: x, prediction="sample")    # the file is not its
    assert ours.prediction == "sample"
    refused(one, "'v-prediction'", prediction="v-prediction", scheduler_config={})


def test_parts_of_ones_own_are_taken_as_they_are(pipelines):
    one = pipelines["SD 1.5"]
    theirs = SimpleNamespace(config={"in_channels": 7, "cross_attention_dim": 3})       # of diffusers, say
    replace(one, unet=theirs, vae=vae(scaling_factor=0.13025, latent_channels=16))
    replace(one, text=lambda prompts: None, unet=unet(one, context_dim=1234))
    replace(one, vae=torch.nn.Identity())


def test_published_widths():
    """The full sizes of the published families, with each other and crosswise."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    def encoder(width, kind=CLIPTextModel):
        config = CLIPTextConfig(hidden_size=width, projection_dim=width, num_hidden_layers=1, vocab_size=8,
                                intermediate_size=8, num_attention_heads=8)
        with torch.device("meta"):
            return ClipText(None, kind(config), penultimate=width == 1280)
    large, huge, giant = encoder(768), encoder(1024), encoder(1280, CLIPTextModelWithProjection)
    texts = {"1": large, "2": huge, "XL": JoinedText(large, giant), "refiner": giant}
    small = {"channels": (32, 32), "depth": (1, 1), "heads": (8, 8)}
    unets = {"1":       UNetConfig(context_dim=768, **small),
             "2":       UNetConfig(context_dim=1024, linear_projection=True, **small),
             "XL":      UNetConfig(context_dim=2048, vector_dim=2816, vector_time_dim=256, **small),
             "refiner": UNetConfig(context_dim=1280, vector_dim=2560, vector_time_dim=256, **small)}
    for family, text in texts.items():
        for other, config in unets.items():
            with torch.device("meta"):
                network = UNet(config)
            parts = (text, network, vae(scaling_factor=0.13025 if config.vector_dim else 0.18215).to("meta"),
                     ldm.NoiseSchedule.scaled_linear())
            if family == other:
                ldm.Pipeline(*parts)
            else:
                with pytest.raises(ValueError, match="but the U-Net reads a context of width"):
                    ldm.Pipeline(*parts)
