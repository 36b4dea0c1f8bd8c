"""U-Net and autoencoder against diffusers': names, shapes, numbers; and what the configs accept."""
import math
from collections import Counter

import diffusers
import oracles
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ldm.models import VAE, TinyVAE, TinyVAEConfig, UNet, UNetConfig, VAEConfig
from ldm.models.layers import timestep_embedding
from ldm.weights.names import rename_taesd

PRECISION = [pytest.param(torch.float64, 1e-10, id="float64"),
             pytest.param(torch.float32, 1e-5,  id="float32")]


def shapes(module):
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


@pytest.mark.parametrize("family", oracles.UNETS)
def test_names_and_shapes_of_the_full_size_unets(family):
    config = oracles.UNETS[family]
    with torch.device("meta"):
        theirs = diffusers.UNet2DConditionModel.from_config(config)
        ours   = UNet(UNetConfig.from_hf(config))
    assert shapes(ours) == shapes(theirs)


def test_parameters_of_stable_diffusion():
    with torch.device("meta"):
        unet = UNet()
    assert sum(parameter.numel() for parameter in unet.parameters()) == 859_520_964     # "860M"
    assert UNetConfig.from_hf(oracles.UNETS["SD 1.5"]) == UNetConfig(sample_size=64)


@pytest.mark.parametrize("config", [oracles.SD_VAE, oracles.SDXL_VAE], ids=["SD", "SDXL"])
def test_names_and_shapes_of_the_full_size_vae(config):
    with torch.device("meta"):
        theirs = diffusers.AutoencoderKL.from_config(config)
        ours   = VAE(VAEConfig.from_hf(config))
    assert shapes(ours) == shapes(theirs)


@pytest.mark.parametrize("size", [(8, 16), (9, 13)], ids=["even", "odd"])     # (9, 13) is odd on every level
@pytest.mark.parametrize(("dtype", "tolerance"), PRECISION)
@pytest.mark.parametrize("family", oracles.TINY_UNETS)
def test_unet_equals_diffusers(family, dtype, tolerance, size):
    assert oracles.unet_difference(family, dtype, size) <= tolerance


@pytest.mark.parametrize("size", [(32, 32), (16, 40)], ids=["square", "wide"])
@pytest.mark.parametrize(("dtype", "tolerance"), PRECISION)
@pytest.mark.parametrize("family", oracles.TINY_VAES)
def test_vae_equals_diffusers(family, dtype, tolerance, size):
    for part, difference in oracles.vae_differences(family, dtype, size).items():
        assert difference <= tolerance, part


@pytest.mark.parametrize("fields", [
    pytest.param({}, id="SD"),
    pytest.param({"latent_channels": 16, "scaling_factor": 0.5}, id="16 channels, another scale"),
    pytest.param({"num_encoder_blocks": [1, 2, 1], "encoder_block_out_channels": [12] * 3,
                  "num_decoder_blocks": [2, 1, 1], "decoder_block_out_channels": [12] * 3}, id="3 levels"),
])
@pytest.mark.parametrize(("dtype", "tolerance"), PRECISION)
def test_tiny_vae_equals_diffusers(fields, dtype, tolerance):
    config = {**oracles.TINY_TAESD, **fields}
    for part, difference in oracles.taesd_differences(config, dtype, (16, 40)).items():
        assert difference <= tolerance, part


def test_names_shapes_and_defaults_of_the_full_size_tiny_vae():
    with torch.device("meta"):
        theirs = diffusers.AutoencoderTiny()
        ours   = TinyVAE()
    assert shapes(ours) == shapes(theirs)
    assert TinyVAEConfig() == TinyVAEConfig.from_hf(dict(theirs.config)) == TinyVAEConfig.from_hf({})
    assert (ours.config.downscale, ours.config.force_upcast) == (8, theirs.config.force_upcast)


def test_the_names_of_taesds_author():
    """His sequences of layers are diffusers', but for the clamp, which is the first of his decoder's."""
    theirs   = diffusers.AutoencoderTiny.from_config(oracles.TINY_TAESD)
    original = torch.nn.ModuleDict({"encoder": theirs.encoder.layers,
                                    "decoder": torch.nn.Sequential(torch.nn.Tanh(), *theirs.decoder.layers)})
    wanted   = theirs.state_dict()
    renamed  = rename_taesd(original.state_dict(), wanted)
    assert renamed.keys() == wanted.keys()
    assert all(torch.equal(renamed[name], wanted[name]) for name in wanted)
    assert rename_taesd(wanted, wanted) == wanted


@pytest.mark.parametrize("family", oracles.TINY_UNETS)
def test_unet_runs_the_kernels_of_diffusers_and_copies_no_more(family):
    """Whoever is faster on a CPU, it is not for the number of products or copies."""
    config = oracles.TINY_UNETS[family]
    theirs, ours = oracles.unet_pair(config, torch.float32)
    their_inputs, our_inputs = oracles.unet_inputs(config, torch.float32, (8, 8))
    counts = []
    for network, inputs in ((ours, our_inputs), (theirs, their_inputs)):
        with torch.no_grad(), Kernels() as kernels:
            network(**inputs)
        counts.append(kernels.count)
    for name in ("convolution", "addmm", "mm", "_scaled_dot_product_flash_attention_for_cpu",
                 "native_group_norm", "native_layer_norm", "gelu", "upsample_nearest2d"):
        assert counts[0][name] == counts[1][name] > 0, name
    copies = [sum(count[name] for name in ("clone", "copy_", "_to_copy", "cat")) for count in counts]
    assert copies[0] <= copies[1]


class Kernels(TorchDispatchMode):
    """Counts the operators that are called, by name."""

    def __init__(self):
        super().__init__()
        self.count = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count[function.overloadpacket.__name__] += 1
        return function(*args, **(kwargs or {}))


def test_the_parity_of_the_networks_can_fail():
    """A comparison that returns zero proves something only if it would see one changed number."""
    config = oracles.TINY_UNETS["SD 2.1"]
    theirs, ours = oracles.unet_pair(config, torch.float64)
    their_inputs, our_inputs = oracles.unet_inputs(config, torch.float64, (8, 8))
    with torch.no_grad():
        ours.mid_block.attentions[0].transformer_blocks[0].attn2.to_k.weight[0, 0] += 0.01
        assert oracles.relative(ours(**our_inputs), theirs(**their_inputs).sample) > 1e-9


def test_gradients_equal_diffusers():
    config = oracles.TINY_UNETS["SDXL base"]
    theirs, ours = oracles.unet_pair(config, torch.float64)
    their_inputs, our_inputs = oracles.unet_inputs(config, torch.float64, (8, 8), count=1)
    x, y = (inputs.detach().clone().requires_grad_() for inputs in (our_inputs["x"], their_inputs["sample"]))
    ours(**{**our_inputs, "x": x}).square().sum().backward()
    theirs(**{**their_inputs, "sample": y}).sample.square().sum().backward()
    assert x.grad.abs().max() > 1e-3
    assert oracles.relative(x.grad, y.grad) <= 1e-10
    gradients = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        assert parameter.grad is not None, name
        assert oracles.relative(parameter.grad, gradients[name].grad) <= 1e-10, name


def test_gradients_pass_the_vae():
    _, ours = oracles.vae_pair(oracles.TINY_VAES["SD 1.5"], torch.float64)
    pictures = torch.linspace(-1, 1, 3 * 16 * 16, dtype=torch.float64).view(1, 3, 16, 16).requires_grad_()
    mean, std = ours.encode(pictures)
    ours.decode(mean + std).sum().backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in ours.parameters())
    assert pictures.grad.abs().max() > 0


def test_a_time_for_all_or_one_for_each():
    _, unet = oracles.unet_pair(oracles.TINY_UNETS["SD 1.5"], torch.float64)
    _, inputs = oracles.unet_inputs(oracles.TINY_UNETS["SD 1.5"], torch.float64, (8, 8))
    with torch.no_grad():
        one  = unet(**{**inputs, "t": torch.tensor(500.0)})
        each = unet(**{**inputs, "t": torch.tensor([500.0, 20.0])})
    torch.testing.assert_close(one[0], each[0], rtol=0, atol=1e-12)
    assert (one[1] - each[1]).abs().max() > 1e-3


def test_timestep_embedding_is_the_formula():
    t, width = torch.tensor([0.0, 1.0, 999.5]), 6
    expected = [[wave(time / 10000 ** (i / 3)) for wave in (math.cos, math.sin) for i in range(3)]
                for time in t.tolist()]
    torch.testing.assert_close(timestep_embedding(t, width), torch.tensor(expected), rtol=0, atol=1e-4)


def test_latents_of_the_tiny_autoencoder_are_shifted_and_scaled():
    plain, shifted = TinyVAE(), TinyVAE(TinyVAEConfig(scaling_factor=0.5, shift_factor=2.0))
    shifted.load_state_dict(plain.state_dict())
    with torch.no_grad():
        (mean, _), (mean2, _) = (vae.encode(torch.zeros(1, 3, 16, 16)) for vae in (plain, shifted))
        torch.testing.assert_close(mean2, 0.5 * (mean - 2))
        torch.testing.assert_close(shifted.decode(mean2), plain.decode(mean))


def test_vae_latents_are_scaled_and_its_std_is_bounded():
    _, plain   = oracles.vae_pair(oracles.TINY_VAES["SD 1.5"], torch.float64)
    config     = {**oracles.TINY_VAES["SD 1.5"], "scaling_factor": 0.5, "shift_factor": 2.0}
    shifted    = VAE(VAEConfig.from_hf(config)).double()
    shifted.load_state_dict(plain.state_dict())
    pictures   = torch.zeros(1, 3, 16, 16, dtype=torch.float64)
    with torch.no_grad():
        (mean, std), (mean2, std2) = plain.encode(pictures), shifted.encode(pictures)
        torch.testing.assert_close(mean2, 0.5 * (mean / 0.18215 - 2))
        torch.testing.assert_close(std2, 0.5 * std / 0.18215)
        torch.testing.assert_close(shifted.decode(mean2), plain.decode(mean))
        plain.quant_conv.bias[4:] = 1e6                                # log variances beyond every bound
        assert plain.encode(pictures)[1].max().item() == pytest.approx(0.18215 * math.exp(10))


# ── Configs ─────────────────────────────────────────────────────────────────────────────────────────────────

BAD_UNET_FIELDS = {
    "act_fn": "gelu", "mid_block_type": "UNetMidBlock2D", "time_embedding_type": "fourier",
    "flip_sin_to_cos": False, "resnet_time_scale_shift": "scale_shift", "class_embed_type": "projection",
    "addition_embed_type": "image", "dual_cross_attention": True,
    "only_cross_attention": True, "freq_shift": 1, "encoder_hid_dim_type": "text_image_proj",
    "conv_in_kernel": 1, "num_class_embeds": 10, "downsample_padding": 0,
    "transformer_layers_per_block": [1, 2], "attention_head_dim": [5, 10],
    "layers_per_block": [2, 2, 2, 2], "cross_attention_dim": [768, 768, 768, 768],
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["AttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D"] * 4,
}


@pytest.mark.parametrize("field", BAD_UNET_FIELDS)
def test_unet_config_names_the_field_it_does_not_know(field):
    config = {**oracles.UNETS["SD 1.5"], field: BAD_UNET_FIELDS[field]}
    with pytest.raises(ValueError, match=rf"U-Net: config.json has .*{field} .*implemented"):
        UNetConfig.from_hf(config)


@pytest.mark.parametrize(("field", "value"), [
    ("act_fn", "relu"), ("latents_mean", [0.0] * 4),
    ("down_block_types", ["DownEncoderBlock2D"] * 3 + ["AttnDownEncoderBlock2D"]),
    ("up_block_types", ["AttnUpDecoderBlock2D"] * 4),
])
def test_vae_config_names_the_field_it_does_not_know(field, value):
    with pytest.raises(ValueError, match=rf"VAE: config.json has {field} .*implemented"):
        VAEConfig.from_hf({**oracles.SD_VAE, field: value})


@pytest.mark.parametrize(("field", "value"), [
    ("act_fn", "silu"), ("upsample_fn", "bilinear"), ("upsampling_scaling_factor", 4),
    ("encoder_block_out_channels", [64, 64, 64, 32]), ("decoder_block_out_channels", [32] * 4),
])
def test_tiny_vae_config_names_the_field_it_does_not_know(field, value):
    with pytest.raises(ValueError, match=rf"Tiny autoencoder: config.json has {field} .*implemented"):
        TinyVAEConfig.from_hf({field: value})


def test_tiny_vae_config_wants_as_many_levels_up_as_down():
    with pytest.raises(ValueError, match=r"encoder_blocks \(1, 3, 3, 3\) and decoder_blocks \(3, 3, 1\)"):
        TinyVAEConfig(decoder_blocks=(3, 3, 1))


@pytest.mark.parametrize(("change", "message"), [
    ({"channels": (30, 64, 64, 64)}, "30 channels cannot be divided into 32 groups"),
    ({"heads": (7, 8, 8, 8)}, "320 channels cannot be divided .* 7 heads"),
    ({"heads": (8, 8)}, "one entry per level"),
    ({"depth": (1,)}, "one entry per level"),
])
def test_unet_config_checks_its_numbers(change, message):
    with pytest.raises(ValueError, match=message):
        UNetConfig(**change)


@pytest.mark.parametrize("family", oracles.UNETS)
def test_null_is_default_and_unknown_fields_are_ignored(family):
    config = oracles.UNETS[family]
    fields = ("upcast_attention", "use_linear_projection", "act_fn", "norm_eps", "conv_in_kernel",
              "only_cross_attention")
    nulls  = {field: None for field in fields if config.get(field) is None}
    extra  = {"decay": 0.9999, "use_ema_warmup": False, "_name_or_path": "elsewhere"}
    assert UNetConfig.from_hf({**config, **nulls, **extra}) == UNetConfig.from_hf(config)


def test_a_unet_without_a_middle_is_refused_by_its_config():
    config = {"block_out_channels": (32, 64), "norm_num_groups": 8, "mid_block_type": None,
              "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
              "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D")}
    with torch.device("meta"):
        assert diffusers.UNet2DConditionModel(**config).mid_block is None          # what null means there
    with pytest.raises(ValueError, match="no middle block"):
        UNetConfig.from_hf(config)


def test_the_defaults_of_a_bare_unet_config_are_diffusers():
    with torch.device("meta"):
        theirs = diffusers.UNet2DConditionModel()
        ours   = UNet(UNetConfig.from_hf({}))
    assert shapes(ours) == shapes(theirs)


def test_the_defaults_of_a_bare_vae_config_are_diffusers():
    with torch.device("meta"):
        theirs = diffusers.AutoencoderKL(norm_num_groups=32)
        ours   = VAE(VAEConfig.from_hf({"shift_factor": None, "scaling_factor": None}))
    assert shapes(ours) == shapes(theirs)
    assert (ours.config.scaling_factor, ours.config.shift_factor) == (theirs.config.scaling_factor, 0)


def test_heads_as_a_number_or_a_list_or_by_their_proper_name():
    config = oracles.UNETS["SD 1.5"]
    assert UNetConfig.from_hf(config).heads == (8, 8, 8, 8)
    assert UNetConfig.from_hf({**config, "attention_head_dim": [8] * 4}) == UNetConfig.from_hf(config)
    assert UNetConfig.from_hf({**config, "num_attention_heads": [2, 4, 8, 8]}).heads == (2, 4, 8, 8)
    assert UNetConfig.from_hf(oracles.UNETS["SD 2.1"]).heads == (5, 10, 20, 20)


def test_the_size_of_old_files_and_of_oblong_ones():
    config = {**oracles.UNETS["SD 1.5"], "sample_size": 32}
    assert config["_diffusers_version"] == "0.6.0"
    assert UNetConfig.from_hf(config).sample_size == 64                 # as diffusers' pipelines correct it
    assert UNetConfig.from_hf({**config, "_diffusers_version": "0.10.0.dev0"}).sample_size == 32
    assert UNetConfig.from_hf({**config, "sample_size": 96}).sample_size == 96
    assert UNetConfig.from_hf({**config, "sample_size": [64, 96]}).sample_size == 96
    assert UNetConfig.from_hf({**config, "sample_size": None}).sample_size is None


def test_depth_counts_only_where_there_is_attention():
    base, refiner = (UNetConfig.from_hf(oracles.UNETS[family]) for family in ("SDXL base", "SDXL refiner"))
    assert (base.depth, base.mid_depth)       == ((0, 2, 10), 10)
    assert (refiner.depth, refiner.mid_depth) == ((0, 4, 4, 0), 4)


def test_sdxl_without_its_vector_says_so():
    _, unet = oracles.unet_pair(oracles.TINY_UNETS["SDXL base"], torch.float32)
    _, inputs = oracles.unet_inputs(oracles.TINY_UNETS["SDXL base"], torch.float32, (8, 8))
    pooled = inputs.pop("vector")[:, :5]                                         # without the sizes
    with pytest.raises(ValueError, match=r"needs vector: a tensor \(N, 68\), not None; Pipeline\.condition"):
        unet(**inputs)
    with pytest.raises(ValueError, match=r"needs vector: a tensor \(N, 68\), not \(2, 5\)"):
        unet(**inputs, vector=pooled)


def test_lcm_without_its_guidance_scale_says_so():
    _, unet = oracles.unet_pair(oracles.TINY_UNETS["SD 1.5 LCM"], torch.float32)
    _, inputs = oracles.unet_inputs(oracles.TINY_UNETS["SD 1.5 LCM"], torch.float32, (8, 8))
    del inputs["guidance"]
    with pytest.raises(ValueError, match=r"needs guidance: a tensor \(N,\)"):
        unet(**inputs)
