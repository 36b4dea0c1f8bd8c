"""CLIP text encoders and tokenizers from a folder, whichever version of transformers wrote it."""
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from ldm.weights import load_part, load_tokenizer, read_part

CONFIG = {"vocab_size": 60, "hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 3,
          "num_attention_heads": 4, "projection_dim": 16, "max_position_embeddings": 77,
          "bos_token_id": 58, "eos_token_id": 59, "pad_token_id": 1}
TOKENS = torch.tensor([[58, 5, 6, 7, 59] + [59] * 72, [58, 9, 59] + [59] * 74])         # (2, 77)


def load_text_encoder(folder, *, variant=None, **options):
    return load_part("text_encoder", read_part(folder, variant), **options)


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
def test_a_config_chooses_no_kernels(tmp_path, key):
    """transformers would fetch "someone/kernel" from the hub, and run it."""
    model = CLIPTextModel(CLIPTextConfig(**CONFIG))
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: "someone/kernel"}))
    loaded = load_text_encoder(tmp_path)
    assert loaded.config._attn_implementation in ("sdpa", "eager")
    with torch.no_grad():
        torch.testing.assert_close(loaded(TOKENS)[0], model.eval()(TOKENS)[0])


@pytest.fixture(scope="module", params=[CLIPTextModel, CLIPTextModelWithProjection],
                ids=lambda kind: kind.__name__)
def written(request, tmp_path_factory):
    """(the model, the folder that the installed transformers wrote of it)"""
    torch.manual_seed(0)
    model  = request.param(CLIPTextConfig(**CONFIG)).eval()
    folder = tmp_path_factory.mktemp("text_encoder")
    model.save_pretrained(folder)
    return model, folder


def rewritten(folder, to, change):
    """A copy of a text encoder's folder with other tensors."""
    (to / "config.json").write_text((folder / "config.json").read_text())
    state = change(load_file(folder / "model.safetensors"))
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, to / "model.safetensors")
    return to


def with_prefix(state):
    return {name if name.startswith(("text_model.", "text_projection.")) else f"text_model.{name}": tensor
            for name, tensor in state.items()}


def with_position_ids(dtype):
    ids = torch.arange(77, dtype=dtype)[None]
    return lambda state: {**with_prefix(state), "text_model.embeddings.position_ids": ids}


def without_prefix(state):
    return {name.removeprefix("text_model."): tensor for name, tensor in state.items()}


@torch.no_grad()
def assert_equal_outputs(model, oracle):
    assert type(model) is type(oracle)
    ours, theirs = (m(TOKENS, output_hidden_states=True) for m in (model, oracle))
    assert len(ours.hidden_states) == 4
    for a, b in zip(ours.hidden_states, theirs.hidden_states, strict=True):
        assert torch.equal(a, b)
    assert torch.equal(ours.last_hidden_state, theirs.last_hidden_state)
    pooled = "text_embeds" if hasattr(theirs, "text_embeds") else "pooler_output"
    assert torch.equal(ours[pooled], theirs[pooled])


@pytest.mark.parametrize("change", [lambda state: state, with_prefix, without_prefix,
                                    with_position_ids(torch.int64), with_position_ids(torch.float32)],
                         ids=["as written", "text_model.", "no prefix", "position_ids", "float position_ids"])
def test_every_tensor_reaches_the_model(written, tmp_path, change):
    oracle, folder = written
    model = load_text_encoder(rewritten(folder, tmp_path, change))
    assert model.state_dict().keys() == oracle.state_dict().keys()
    assert all(torch.equal(tensor, oracle.state_dict()[name]) for name, tensor in model.state_dict().items())
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert_equal_outputs(model, oracle)


def test_variant_shards_bin_and_dtype(written, tmp_path):
    oracle, _ = written
    oracle.save_pretrained(tmp_path, variant="fp16", max_shard_size="20KB")
    assert len(list(tmp_path.glob("model.fp16-*.safetensors"))) > 1
    assert_equal_outputs(load_text_encoder(tmp_path, variant="fp16"), oracle)
    for file in tmp_path.glob("model*"):
        file.unlink()
    torch.save(with_position_ids(torch.int64)(oracle.state_dict()), tmp_path / "pytorch_model.bin")
    assert_equal_outputs(load_text_encoder(tmp_path), oracle)
    half = load_text_encoder(tmp_path, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    assert {buffer.dtype for buffer in half.buffers()} <= {torch.int64}


def test_tensors_that_are_missing_or_too_many(written, tmp_path):
    _, folder = written
    rewritten(folder, tmp_path, lambda state: {
        "unknown.weight": torch.ones(1),
        **{k: v for k, v in state.items() if "final_layer_norm" not in k}})
    with pytest.raises(ValueError,
                       match=r"2 missing from the file: .*final_layer_norm\.weight.*\n"
                             r"  1 unknown to the model: unknown\.weight\n"
                             "The file looks like a CLIP text encoder of width 32, the model like"):
        load_text_encoder(tmp_path)


def test_gradients_flow_to_the_embeddings(written, tmp_path):
    """The parts stay differentiable: textual inversion needs the
    gradient with respect to a token's embedding."""
    _, folder = written
    model  = load_text_encoder(folder)
    weight = model.get_input_embeddings().weight.requires_grad_(True)
    model(TOKENS)[0].square().sum().backward()
    assert weight.grad[5].abs().sum() > 0


def old_config(folder, **changes):
    """A config.json as version 4 of transformers wrote it for Stable Diffusion 1.5, at our sizes."""
    config = {"_name_or_path": "openai/clip-vit-large-patch14", "architectures": ["CLIPTextModel"],
              "attention_dropout": 0.0, "bos_token_id": 0, "dropout": 0.0, "eos_token_id": 2,
              "hidden_act": "quick_gelu", "initializer_factor": 1.0, "initializer_range": 0.02,
              "layer_norm_eps": 1e-05, "model_type": "clip_text_model", "pad_token_id": 1,
              "torch_dtype": "float32", "transformers_version": "4.22.0.dev0",
              **{k: v for k, v in CONFIG.items() if not k.endswith("token_id")}, **changes}
    (folder / "config.json").write_text(json.dumps(config))


def test_an_old_config(tmp_path):
    torch.manual_seed(0)
    oracle = CLIPTextModel(CLIPTextConfig(**{**CONFIG, "bos_token_id": 0, "eos_token_id": 2})).eval()
    oracle.save_pretrained(tmp_path)
    old_config(tmp_path)
    model = load_text_encoder(rewritten(tmp_path, tmp_path, with_position_ids(torch.int64)))
    assert_equal_outputs(model, oracle)
    assert model.config.eos_token_id == 2
    old_config(tmp_path, architectures=None)
    assert_equal_outputs(load_text_encoder(tmp_path), oracle)
    old_config(tmp_path, architectures=["T5EncoderModel"])
    with pytest.raises(ValueError,
                       match=r"config\.json of .* describes a T5EncoderModel; it can be a CLIPTextModel or"):
        load_text_encoder(tmp_path)


# -- tokenizers ----------------------------------------------------------------------------------------------
VOCABULARY = ["!", "a", "b", "c", "a</w>", "b</w>", "c</w>", "ab</w>", "<|startoftext|>", "<|endoftext|>"]
END        = {"__type": "AddedToken", "content": "<|endoftext|>", "lstrip": False, "normalized": True,
              "rstrip": False, "single_word": False}
PROMPT     = {"text": "AB  c", "padding": "max_length", "max_length": 8, "truncation": True}


def write_tokenizer(folder, pad=None):
    """The four files that version 4 of transformers wrote; `pad` as in special_tokens_map.json."""
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(VOCABULARY)}))
    (folder / "merges.txt").write_text("#version: 0.2\na b</w>\n")
    (folder / "tokenizer_config.json").write_text(json.dumps(
        {"add_prefix_space": False, "bos_token": {**END, "content": "<|startoftext|>"}, "eos_token": END,
         "errors": "replace", "do_lower_case": True, "model_max_length": 77, "pad_token": "<|endoftext|>",
         "unk_token": END, "name_or_path": "openai/clip-vit-large-patch14",
         "tokenizer_class": "CLIPTokenizer"}))
    if pad:
        (folder / "special_tokens_map.json").write_text(json.dumps({"pad_token": pad}))
    return folder


@pytest.mark.parametrize(("pad", "padding"), [(None, 9), ("<|endoftext|>", 9), ("!", 0)])
def test_tokenizer_without_network(tmp_path, no_network, pad, padding):
    """Stable Diffusion 2 pads with "!", which only its special_tokens_map.json says."""
    tokenizer = load_tokenizer(write_tokenizer(tmp_path, pad))
    assert tokenizer.model_max_length == 77
    assert tokenizer(**PROMPT).input_ids == [8, 7, 6, 9] + [padding] * 4


def test_tokenizer_as_the_installed_transformers_writes_it(tmp_path, no_network):
    (tmp_path / "old").mkdir()
    CLIPTokenizer.from_pretrained(write_tokenizer(tmp_path / "old", "!")).save_pretrained(tmp_path / "new")
    tokenizer = load_tokenizer(tmp_path / "new")
    assert tokenizer.model_max_length == 77
    assert tokenizer(**PROMPT).input_ids == [8, 7, 6, 9, 0, 0, 0, 0]


@pytest.mark.parametrize("lost", ["vocab.json", "merges.txt"])
def test_tokenizer_with_missing_files(tmp_path, lost):
    write_tokenizer(tmp_path)
    (tmp_path / lost).unlink()
    with pytest.raises(FileNotFoundError, match=lost.replace(".", r"\.")):
        load_tokenizer(tmp_path)


def test_tokenizer_with_damaged_files(tmp_path):
    write_tokenizer(tmp_path)
    (tmp_path / "merges.txt").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n")
    with pytest.raises(ValueError, match=r"merges\.txt is not the file itself but a Git LFS pointer"):
        load_tokenizer(tmp_path)
    (tmp_path / "merges.txt").write_text("")
    with pytest.raises(ValueError, match=r"merges\.txt is empty: download it again"):
        load_tokenizer(tmp_path)
    (tmp_path / "vocab.json").write_text('{"a": 1')
    with pytest.raises(ValueError, match=r"vocab\.json \(7 bytes\) is truncated"):
        load_tokenizer(tmp_path)
