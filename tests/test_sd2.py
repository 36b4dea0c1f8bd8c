"""Stable Diffusion 2.x: OpenCLIP's text, linear projections, v-prediction, and attention beyond float16."""
import math

import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import ldm
from ldm.models.layers import Attention


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """2.1 and 2.1-base differ in what the network was trained to tell."""
    root = tmp_path_factory.mktemp("models")
    return {prediction: tiny.write(root / prediction, "SD 2.1", prediction=prediction)
            for prediction in ("v_prediction", "epsilon")}


@pytest.mark.parametrize("prediction", ["v_prediction", "epsilon"])
@pytest.mark.parametrize("name", ["ddim", "euler", "heun", "dpmpp_2m"])
def test_same_picture_as_diffusers(folders, name, prediction):
    assert tiny.picture_difference(folders[prediction], name, steps=4) < 1e-4


def test_the_model_is_what_its_files_say(folders):
    pipe = ldm.load(folders["v_prediction"], device="cpu")
    assert pipe.prediction == "v_prediction"
    assert pipe.unet.config.linear_projection
    assert pipe.unet.config.heads == (2, 4, 8, 8)
    assert pipe.text.model.config.hidden_act == "gelu"
    assert pipe.text.tokenizer.pad_token_id == 0
    assert pipe.defaults == ldm.pipeline.Defaults("ddim", 50, 7.5, 64, 64)


def test_text_is_that_of_diffusers(folders):
    folder = folders["epsilon"]
    with torch.inference_mode():
        expected, _ = tiny.theirs(folder).encode_prompt(["a red cat", ""], "cpu", 1, False)
        found = ldm.load(folder, device="cpu").text(["a red cat", ""])
    torch.testing.assert_close(found.context, expected)
    assert found.vector is None


# ── Attention in float16 ────────────────────────────────────────────────────────────────────────────────────

CPU  = [("cpu", SDPBackend.MATH), ("cpu", SDPBackend.FLASH_ATTENTION)]
CUDA = [pytest.param("cuda", backend, marks=pytest.mark.gpu)
        for backend in (SDPBackend.MATH, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION,
                        SDPBackend.CUDNN_ATTENTION)]


@pytest.mark.parametrize("size", [512, 4096])           # QKᵀ/√64 is 32768, and 2²¹: too large even so
@pytest.mark.parametrize(("device", "backend"), [*CPU, *CUDA], ids=str)
def test_attention_does_not_overflow(device, backend, size):
    """64 positions, each of which finds itself: q = k = size·identity, and the answer is its own value."""
    module = Attention(64, 64, heads=1)
    for layer, factor in ((module.to_q, size), (module.to_k, size), (module.to_v, 1), (module.to_out[0], 1)):
        layer.weight.data = factor * torch.eye(64)
    module.to_out[0].bias.data.zero_()
    x = torch.eye(64)[None]
    with torch.inference_mode():
        q = module.to_q(x).half()
        overflows = (q @ q.transpose(1, 2) / math.sqrt(64)).softmax(dim=-1)               # the bare formula
        with sdpa_kernel(backend):
            found = module.to(device, torch.float16)(x.to(device, torch.float16)).cpu()
    assert overflows.isnan().any()
    torch.testing.assert_close(found.float(), x, rtol=0, atol=1e-3)


@pytest.mark.parametrize(("device", "backend"), [*CPU, *CUDA], ids=str)
def test_attention_in_float16_is_right_where_numbers_are_large(device, backend):
    """Random q and k with products up to 8·10⁵, against float64 on the same numbers."""
    generator = torch.Generator().manual_seed(0)
    q, k, v   = (scale * torch.randn(2, 4, 80, 64, generator=generator) for scale in (150, 150, 1))
    q, k, v   = (y.to(device, torch.float16) for y in (q, k, v))
    with sdpa_kernel(backend):
        found = F.scaled_dot_product_attention(q, k, v)
    assert (q.float() @ k.float().transpose(2, 3)).abs().max() > 5e5
    expected = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=2e-3)


def test_a_model_in_float16_gives_nearly_the_same_picture(folders):
    full, half = (ldm.sample("a cat", ldm.load(folders["v_prediction"], device="cpu", dtype=dtype), steps=3,
                             spacing="trailing", guidance_scale=2.0, output_type="np")
                  for dtype in ("float32", "float16"))
    assert 0 < np.abs(full - half).mean() < 5e-3


def test_no_black_picture_where_products_exceed_float16(folders):
    pipe, products = ldm.load(folders["v_prediction"], device="cpu", dtype="float16"), []

    def watch(module, inputs):
        x = inputs[0]
        c = x if len(inputs) == 1 else inputs[1]
        q, k = (layer(y).float().unflatten(-1, (module.heads, -1)).transpose(1, 2)
                for layer, y in ((module.to_q, x), (module.to_k, c)))
        products.append((q @ k.transpose(2, 3)).abs().max().item())

    for module in pipe.unet.modules():
        if isinstance(module, Attention):
            module.to_q.weight.data *= 1000
            module.to_k.weight.data *= 1000
            module.register_forward_pre_hook(watch)
    picture = ldm.sample("a cat", pipe, steps=2, spacing="trailing", output_type="np")
    assert max(products) > 1e6
    assert picture.std() > 0.01
