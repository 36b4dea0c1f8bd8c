"""ldm/weights/load.py and names.py: modules filled from files, strictly, and what the errors say."""
import json
import os
import re

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from ldm import weights
from ldm.models import VAE, UNet, UNetConfig, VAEConfig
from ldm.weights import read_json, read_weights, rename_clip, rename_ldm_vae


def load_module(build, folder, *, variant=None, **options):
    return weights.load_module(build, *read_weights(folder, variant), **options)


class Small(nn.Module):
    """A module with a saved buffer and an integer one."""
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 4)
        self.norm   = nn.BatchNorm1d(4)

    def forward(self, x):
        return self.norm(self.linear(x))


class WithFrequencies(Small):
    """The same, with a buffer that is never saved."""
    def __init__(self):
        super().__init__()
        self.register_buffer("frequencies", torch.arange(3.0), persistent=False)


@pytest.fixture
def small(tmp_path):
    module = Small()
    nn.init.normal_(module.norm.running_mean)
    save_file(module.state_dict(), tmp_path / "model.safetensors")
    return module.eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny SD-shaped U-Net and autoencoder, written by diffusers."""
    folder = tmp_path_factory.mktemp("pipeline")
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8, cross_attention_dim=24,
        attention_head_dim=2, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"))
    vae = diffusers.AutoencoderKL(
        block_out_channels=(16, 32), down_block_types=("DownEncoderBlock2D",) * 2, norm_num_groups=8,
        up_block_types=("UpDecoderBlock2D",) * 2)
    unet.save_pretrained(folder / "unet")
    unet.half().save_pretrained(folder / "unet", variant="fp16", max_shard_size="100KB")
    vae.save_pretrained(folder / "vae", safe_serialization=False)
    return folder


def unet_of(folder):
    return UNet(UNetConfig.from_hf(read_json(folder / "unet" / "config.json")))


def vae_of(folder):
    return VAE(VAEConfig.from_hf(read_json(folder / "vae" / "config.json")))


def assert_same(module, state):
    assert module.state_dict().keys() == state.keys()
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, state[name]), name


# -- what diffusers writes -----------------------------------------------------------------------------------
def test_unet_and_vae_written_by_diffusers(folder):
    unet = load_module(lambda: unet_of(folder), folder / "unet")
    assert_same(unet, load_file(folder / "unet" / "diffusion_pytorch_model.safetensors"))
    vae  = load_module(lambda: vae_of(folder), folder / "vae", rename=rename_ldm_vae)
    assert_same(vae, torch.load(folder / "vae" / "diffusion_pytorch_model.bin"))

    x, t, context = torch.randn(1, 4, 8, 8), torch.tensor([7]), torch.randn(1, 5, 24)
    oracle = diffusers.UNet2DConditionModel.from_pretrained(folder / "unet", low_cpu_mem_usage=False)
    with torch.no_grad():
        torch.testing.assert_close(unet(x, t, context), oracle(x, t, context).sample, atol=1e-5, rtol=1e-5)


def test_a_sharded_variant(folder):
    half = load_module(lambda: unet_of(folder), folder / "unet", variant="fp16")
    assert {parameter.dtype for parameter in half.parameters()} == {torch.float16}
    full = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    assert_same(half, {name: tensor.half() for name, tensor in full.items()})
    with pytest.warns(UserWarning, match="vae has no 'fp16' weights"):
        load_module(lambda: vae_of(folder), folder / "vae", variant="fp16")


@pytest.mark.parametrize("convolutions", [0, 1, 2])
def test_old_names_of_the_vae_attention(folder, tmp_path, convolutions):
    """Written by older versions of diffusers, and the same from convolutions of 1 (×1)."""
    new  = torch.load(folder / "vae" / "diffusion_pytorch_model.bin")
    swap = {"to_q.": "query.", "to_k.": "key.", "to_v.": "value.", "to_out.0.": "proj_attn."}
    old  = {}
    for name, tensor in new.items():
        if "mid_block.attentions" in name and "group_norm" not in name:
            if tensor.ndim == 2:
                tensor = tensor.reshape(*tensor.shape, *[1] * convolutions)
            name = re.sub("|".join(map(re.escape, swap)), lambda match: swap[match[0]], name)
        old[name] = tensor
    assert sum("proj_attn" in name for name in old) == 4            # weight and bias, in encoder and decoder
    save_file(old, tmp_path / "diffusion_pytorch_model.safetensors")
    assert_same(load_module(lambda: vae_of(folder), tmp_path, rename=rename_ldm_vae), new)
    with pytest.raises(ValueError,
                       match=r"16 missing from the file: encoder\.mid_block\.attentions\.0\.to_q\.weight"):
        load_module(lambda: vae_of(folder), tmp_path)


# -- a loaded module -----------------------------------------------------------------------------------------
def test_loaded_modules_are_real_frozen_and_in_evaluation_mode(tmp_path, small):
    module = load_module(Small, tmp_path)
    assert_same(module, small.state_dict())
    assert not module.training
    assert not any(parameter.requires_grad for parameter in module.parameters())
    assert isinstance(module.linear.weight, nn.Parameter)
    assert isinstance(module.norm.num_batches_tracked, torch.Tensor)
    assert not any(tensor.is_meta for tensor in (*module.parameters(), *module.buffers()))
    x = torch.randn(2, 3, requires_grad=True)
    module(x).square().sum().backward()                             # gradients with respect to inputs flow
    assert x.grad.abs().sum() > 0
    torch.testing.assert_close(module(x), small(x))


def test_a_loaded_module_can_be_trained_and_leaves_the_file_alone(tmp_path, small):
    module    = load_module(Small, tmp_path).requires_grad_(True).train()
    optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
    module(torch.randn(5, 3)).square().mean().backward()
    optimizer.step()
    assert not torch.equal(module.norm.weight, small.norm.weight)
    assert_same(load_module(Small, tmp_path), small.state_dict())
    save_file(module.state_dict(), tmp_path / "model.safetensors")  # safetensors replaces the file as a whole
    assert_same(load_module(Small, tmp_path), module.state_dict())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtype_of_floating_point_tensors_only(tmp_path, small, dtype):
    module = load_module(Small, tmp_path, dtype=dtype)
    assert module.linear.weight.dtype == module.norm.running_mean.dtype == dtype
    assert module.norm.num_batches_tracked.dtype == torch.int64
    assert torch.equal(module.linear.weight, small.linear.weight.to(dtype))


def test_build_runs_on_the_meta_device(tmp_path, small):
    seen = []

    def build():
        module = Small()
        seen.append(module.linear.weight.device.type)
        return module
    load_module(build, tmp_path)
    assert seen == ["meta"]
    assert torch.empty(1).device.type == "cpu"                      # and it was put back


def test_memory_peaks_near_the_weights(tmp_path):
    """64 tensors of 1 MB, float32 to float16: memory beside the mapped file grows by the
    result, 0.5 MB a tensor."""
    if not os.path.exists("/proc/self/status"):
        pytest.skip("needs /proc")
    save_file({f"{i}.weight": torch.ones(512, 512) for i in range(64)}, tmp_path / "model.safetensors")
    used = []

    class Watched(nn.Linear):
        def __setattr__(self, name, value):
            super().__setattr__(name, value)
            if isinstance(value, nn.Parameter) and not value.is_meta:
                used.append(anonymous())

    def anonymous() -> int:
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))

    def load():
        used.clear()
        return load_module(lambda: nn.Sequential(*(Watched(512, 512, bias=False) for _ in range(64))),
                           tmp_path, dtype=torch.float16)
    load()                                                          # whatever is loaded on first use
    before = anonymous()
    module = load()
    assert len(used) == 64
    assert max(used) - before < sum(p.nbytes for p in module.parameters()) + 6_000_000  # 34 MB and some slack


def test_buffers_that_are_never_saved_must_come_from_rename(tmp_path, small):
    with pytest.raises(ValueError, match="1 missing from the file: frequencies"):
        load_module(WithFrequencies, tmp_path)
    module = load_module(WithFrequencies, tmp_path, dtype=torch.float64,
                         rename=lambda state, wanted: {**state, "frequencies": torch.arange(3.0)})
    assert module.frequencies.tolist() == [0, 1, 2]
    assert "frequencies" in dict(module.named_buffers())
    assert "frequencies" not in module.state_dict()


# -- what does not fit ---------------------------------------------------------------------------------------
def error_of(build, folder, **options):
    with pytest.raises(ValueError, match="do not fit the model") as error:
        load_module(build, folder, **options)
    return str(error.value)


def test_one_error_for_everything_that_differs(tmp_path, small):
    state = small.state_dict()
    del state["norm.weight"], state["norm.bias"]
    state["extra"], state["linear.weight"] = torch.ones(1), torch.ones(4, 5)
    save_file(state, tmp_path / "model.safetensors")
    assert error_of(Small, tmp_path) == (
        f"The weights in {tmp_path / 'model.safetensors'} do not fit the model.\n"
        "  2 missing from the file: norm.weight, norm.bias\n"
        "  1 unknown to the model: extra\n"
        "  1 of another shape: linear.weight (4, 5), in the model (4, 3)\n"
        "The file looks like something unknown, the model like something unknown. "
        "Weights and configuration must come from the same model.")


def test_the_error_lists_at_most_eight_of_a_kind(tmp_path):
    save_file({f"t{i}": torch.ones(1) for i in range(20)}, tmp_path / "model.safetensors")
    message = error_of(Small, tmp_path)
    assert "20 unknown to the model: t0, t1, " in message
    line, = (line for line in message.splitlines() if "20 unknown to" in line)
    assert line.count(", ") == 7
    assert line.endswith(" …")


def test_the_error_says_what_each_side_looks_like(folder, tmp_path):
    inpainting = UNetConfig.from_hf({**read_json(folder / "unet" / "config.json"), "in_channels": 9})
    message = error_of(lambda: UNet(inpainting), folder / "unet")
    assert "conv_in.weight (16, 4, 3, 3), in the model (16, 9, 3, 3)" in message
    assert ("The file looks like a U-Net with 4 input channels, "
            "the model like a U-Net with 9 input channels") in message
    message = error_of(lambda: vae_of(folder), folder / "unet", variant="fp16")
    assert re.search(r"The weights in .*unet \(\d+ shards\) do not fit", message)
    assert ("looks like a U-Net with 4 input channels, "
            "the model like an autoencoder with 4 latent channels") in message


@pytest.mark.parametrize(("name", "kind"), [
    ("model.diffusion_model.input_blocks.0.0.weight",                "a single-file checkpoint in LDM names"),
    ("lora_unet_down_blocks_0_attentions_0_proj_in.lora_up.weight",  "a LoRA"),
    ("unet.down_blocks.0.to_q.lora_A.weight",                        "a LoRA"),
    ("controlnet_cond_embedding.conv_in.weight",                     "a ControlNet"),
    ("input_blocks.0.0.weight",                                      "a U-Net in LDM names"),
    ("decoder.mid.attn_1.q.weight",                                  "an autoencoder in LDM names"),
    ("vision_model.embeddings.class_embedding",                      "a CLIP with image encoder"),
    ("text_model.embeddings.token_embedding.weight",                 "a CLIP text encoder of width 2"),
    ("encoder.block.0.layer.0.SelfAttention.q.weight",               "a T5 text encoder"),
    ("transformer_blocks.0.attn.to_q.weight",                        "something unknown"),
])
def test_kinds_of_files(tmp_path, name, kind):
    save_file({name: torch.ones(3, 2)}, tmp_path / "model.safetensors")
    assert f"The file looks like {kind}, the model like" in error_of(Small, tmp_path)


def test_a_truncated_shard_is_named(folder, tmp_path):
    index = read_json(folder / "unet" / "diffusion_pytorch_model.safetensors.index.fp16.json")
    names = sorted(set(index["weight_map"].values()))
    assert len(names) > 1
    for name in names:
        (tmp_path / name).write_bytes((folder / "unet" / name).read_bytes())
    (tmp_path / "diffusion_pytorch_model.safetensors.index.fp16.json").write_text(json.dumps(index))
    full = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    assert_same(load_module(lambda: unet_of(folder), tmp_path, variant="fp16"),
                {name: tensor.half() for name, tensor in full.items()})
    (tmp_path / names[1]).write_bytes((tmp_path / names[1]).read_bytes()[:-100])
    with pytest.raises(ValueError, match=rf"{re.escape(names[1])} \([\d,]+ bytes\) is truncated"):
        load_module(lambda: unet_of(folder), tmp_path, variant="fp16")


# -- names ---------------------------------------------------------------------------------------------------
def test_rename_ldm_vae_touches_nothing_else():
    state = {"encoder.mid_block.attentions.0.group_norm.weight": torch.ones(4),
             "encoder.mid_block.attentions.0.to_q.weight": torch.ones(4, 4),
             "encoder.mid_block.resnets.0.conv1.weight": torch.ones(4, 4, 1, 1),
             "quant_conv.weight": torch.ones(8, 8, 1, 1)}
    renamed = rename_ldm_vae(state, {})
    assert {name: tensor.shape for name, tensor in renamed.items()} == \
        {name: t.shape for name, t in state.items()}


@pytest.mark.parametrize("stored", ["", "text_model."])
@pytest.mark.parametrize("model", ["", "text_model."])
def test_rename_clip_inserts_and_strips(stored, model):
    weight, ids = torch.ones(2, 3), torch.arange(5).float().reshape(1, 5)
    state  = {f"{stored}final_layer_norm.weight": weight, f"{stored}embeddings.position_ids": ids,
              "text_projection.weight": weight}
    wanted = {f"{model}final_layer_norm.weight": weight, "text_projection.weight": weight,
              f"{model}embeddings.position_ids": torch.empty(1, 5, device="meta")}
    renamed = rename_clip(state, wanted)
    assert renamed.keys() == wanted.keys()
    assert renamed[f"{model}embeddings.position_ids"].tolist() == [[0, 1, 2, 3, 4]]
    assert not renamed[f"{model}embeddings.position_ids"].is_floating_point()
    del wanted[f"{model}embeddings.position_ids"]
    assert rename_clip(state, wanted).keys() == wanted.keys()       # dropped where it is not wanted
