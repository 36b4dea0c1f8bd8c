"""What ldm.fast makes gives what it was made from gives, to rounding; the judge is diffusers."""
import gc
import weakref
from copy import copy, deepcopy
from dataclasses import replace

import numpy as np
import pytest
import torch
from oracles import TINY_UNETS, TINY_VAES, relative, unet_inputs, unet_pair, vae_pair
from peak import Peak
from tiny import their_pictures, write
from torch import nn

import ldm
from ldm import fast
from ldm.fast import kernels, visits
from ldm.models.layers import Attention, ResBlock, TransformerBlock

DTYPES = [pytest.param(torch.float64, 1e-10, id="float64"), pytest.param(torch.float32, 1e-5, id="float32")]
EXACT  = {"prompt_once": fast.prompt_once, "in_place": fast.in_place, "packed": fast.packed,
          "channels_last": fast.channels_last, "unfused": fast.unfused}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture
def pipe(folder):
    return ldm.load(folder, device="cpu")


@pytest.fixture
def pack_all(monkeypatch):
    """Tiny convolutions are packed too, and tiny attention is made in parts: some heads, or rows of one."""
    monkeypatch.setattr(kernels, "WIDE", 1)
    monkeypatch.setattr(kernels, "SCORES", 1000)


def inputs(config: dict, dtype: torch.dtype = torch.float32) -> tuple[dict, dict]:
    return unet_inputs(config, dtype, (8, 16))


# ── Trees ───────────────────────────────────────────────────────────────────────────────────────────────────

def test_rebuilt_and_replaced_share_tensors_and_leave_the_old_tree_alone():
    old = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2), nn.SiLU()))
    new = fast.rebuilt(old, lambda part: nn.ReLU() if isinstance(part, nn.SiLU) else None)
    assert isinstance(new[1][1], nn.ReLU)
    assert isinstance(old[1][1], nn.SiLU)
    assert all(a is b for a, b in zip(old.parameters(), new.parameters(), strict=True))
    new = fast.replaced(old, "1.0", nn.Identity())
    assert isinstance(new[1][0], nn.Identity)
    assert isinstance(old[1][0], nn.Linear)
    assert new[0] is old[0]


def test_a_part_that_stands_in_two_places_stays_one_part():
    shared = nn.Linear(2, 2)
    old = nn.ModuleDict({"one": nn.Sequential(shared, nn.SiLU()), "two": nn.ModuleList([shared])})
    for new in (fast.rebuilt(old, lambda part: None), visits.moved(old, torch.device("cpu"))):
        assert new["one"][0] is new["two"][0]
        assert new["one"][0] is not shared
    new = fast.rebuilt(old, lambda part: copy(part) if isinstance(part, nn.Linear) else None)
    assert new["one"][0] is new["two"][0]


# ── U-Net ───────────────────────────────────────────────────────────────────────────────────────────────────

@torch.no_grad()
@pytest.mark.parametrize("family", TINY_UNETS)
def test_a_faster_unet_equals_diffusers(family, pack_all):
    theirs, ours = unet_pair(TINY_UNETS[family], torch.float32)
    before = {key: tensor.clone() for key, tensor in ours.state_dict().items()}
    their_inputs, our_inputs = inputs(TINY_UNETS[family])
    wanted = theirs(**their_inputs).sample
    for name, function in EXACT.items():
        quick = function(ours)
        for _ in range(2):                                              # the second call has its memory
            assert relative(quick(**our_inputs), wanted) < 1e-5, name
        assert relative(ours(**our_inputs), wanted) < 1e-5, f"{name} changed its argument"
    assert all(torch.equal(before[key], tensor) for key, tensor in ours.state_dict().items())


@torch.no_grad()
@pytest.mark.parametrize("width", [320, 1280])
def test_the_blocks_of_sd15_at_their_own_width(width):
    torch.manual_seed(0)
    resnet      = ResBlock(width, width, None, 32, 1e-5)
    transformer = TransformerBlock(width, 768, 8)
    x, tokens, context = torch.randn(1, width, 4, 4), torch.randn(1, 16, width), torch.randn(1, 77, 768)
    quick = fast.packed(resnet)
    assert isinstance(quick.conv1, kernels.PackedConv) == (width == 1280)
    assert relative(quick(x), resnet(x)) < 1e-5
    assert relative(fast.in_place(transformer)(tokens, context), transformer(tokens, context)) < 1e-6


@torch.no_grad()
def test_in_place_takes_less_memory():
    _, unet = unet_pair(TINY_UNETS["SD 1.5"], torch.float32)
    given   = unet_inputs(TINY_UNETS["SD 1.5"], torch.float32, (32, 32))[1]
    with Peak() as plain:
        unet(**given)
    with Peak() as lean:
        fast.in_place(unet)(**given)
    assert lean.bytes < 0.9 * plain.bytes


@torch.no_grad()
def test_what_cannot_be_packed_stays_as_it_is(pack_all, monkeypatch):
    def kind(network: nn.Module) -> type:
        return type(fast.packed(nn.Sequential(network))[0])
    conv = nn.Conv2d(4, 4, 3, padding=1)
    assert kind(conv) is kernels.PackedConv
    assert kind(nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular")) is nn.Conv2d
    assert kind(nn.Conv2d(4, 4, 3, padding=1, dtype=torch.float64)) is nn.Conv2d
    for owner, name in ((torch.ops, "mkldnn"), (torch._C, "_nn")):
        with monkeypatch.context() as patch:        # a PyTorch without the private operators
            patch.setattr(owner, name, object())
            assert kind(conv) is nn.Conv2d, name


def test_peak_counts_what_is_made_and_no_view_of_what_was_there():
    linear, x = nn.Linear(64, 32, bias=False), torch.randn(16, 64)
    with torch.no_grad(), Peak() as peak:
        linear(x)                                   # looks at the weight transposed
    assert peak.bytes == 16 * 32 * 4


def test_the_prompt_is_projected_once():
    _, unet = unet_pair(TINY_UNETS["SD 1.5"], torch.float32)
    once, given = fast.prompt_once(unet), inputs(TINY_UNETS["SD 1.5"])[1]
    calls = []
    for layer in once.questions:
        layer.register_forward_hook(lambda *_: calls.append(1))
    count = len(once.questions)
    assert count == 2 * sum(isinstance(part, TransformerBlock) for part in unet.modules())
    with torch.no_grad():
        for _ in range(3):
            once(**given)
        assert len(calls) == count
        other = {**given, "context": given["context"].flip(0)}
        once(**other)                                               # two in turn: both are remembered
        once(**given)
        assert len(calls) == 2 * count
        given["context"].mul_(2)
        changed = once(**given)
        assert len(calls) == 3 * count
        assert relative(changed, unet(**given)) < 1e-6
        next(iter(once.questions)).weight.mul_(2)                   # as after the merge of an adapter
        assert relative(once(**given), unet(**given)) < 1e-6
    with torch.inference_mode():
        once(**given)
    given["x"].requires_grad_()
    once(**given).sum().backward()                                  # nothing of the inference mode is in it
    assert given["x"].grad is not None


def test_a_prompt_is_forgotten_with_its_context():
    _, unet = unet_pair(TINY_UNETS["SD 1.5"], torch.float32)
    once, given = fast.prompt_once(unet), inputs(TINY_UNETS["SD 1.5"])[1]
    with torch.inference_mode():
        once(**given)
    assert len(once.known) == 1
    del given
    gc.collect()
    assert len(once.known) == 0


@pytest.mark.parametrize("name", ["prompt_once", "in_place", "channels_last", "unfused"])
def test_gradients_are_the_same_as_often_as_wanted(name):
    _, unet = unet_pair(TINY_UNETS["SD 1.5"], torch.float64)
    quick, given = EXACT[name](unet), inputs(TINY_UNETS["SD 1.5"], torch.float64)[1]
    wanted_for   = [given["x"].requires_grad_(), given["context"].requires_grad_(), *unet.parameters()]
    wanted = torch.autograd.grad(unet(**given).square().sum(), wanted_for)
    if name == "channels_last":                                     # it has parameters of its own
        wanted_for[2:] = quick.parameters()
    for _ in range(2):
        found = torch.autograd.grad(quick(**given).square().sum(), wanted_for)
        assert np.max([*map(relative, found, wanted)]) < 1e-10


def test_a_compiled_network_cannot_be_rebuilt_and_is_left_alone(pipe):
    _, unet  = unet_pair(TINY_UNETS["SD 1.5"], torch.float32)
    compiled = torch.compile(unet, backend="eager")
    for build in (fast.in_place, fast.channels_last):
        with pytest.raises(TypeError, match=r"before torch\.compile"):
            build(compiled)
    quick = fast.optimize(pipe, compile=True)
    for layerwise in (False, True):
        with pytest.raises(TypeError, match=r"before torch\.compile"):
            fast.offload(quick, "cpu", layerwise=layerwise).decode(torch.zeros(1, 4, 2, 2))
    with pytest.raises(TypeError, match=r"before torch\.compile"):
        fast.channels_last(quick.vae)
    assert unet.time_embedding is not None


def test_what_remembers_is_not_recorded():
    _, unet = unet_pair(TINY_UNETS["SD 1.5"], torch.float32)
    for remembering in (fast.prompt_once(unet), fast.deep_cache(unet)):
        with pytest.raises(ValueError, match=r"record the network inside, prompt_once\(unet, graphed\)"):
            fast.graphed(remembering)
    assert fast.graphed(unet).config is unet.config
    fast.prompt_once(unet, fast.graphed)


def test_a_recording_is_of_one_network(monkeypatch):
    """A tree that was rebuilt shares the dictionary of recordings; but not those of another network. A
    recording computes with what its own inputs hold by then."""
    class Graph:
        def __init__(self, network, inputs, output):
            self.parts = network, inputs, output

        def replay(self):
            network, inputs, output = self.parts
            output.copy_(network(*inputs))

    def record(self, leaves, tree):
        inputs = [leaf.clone() for leaf in leaves]
        output = torch.full_like(self.network(*inputs), torch.nan)
        return Graph(self.network, inputs, output), inputs, output
    monkeypatch.setattr(kernels.Graphed, "_record", record)
    one = fast.graphed(nn.Sequential(nn.Linear(3, 3)))
    two = fast.rebuilt(one, lambda part: nn.Linear(3, 3) if isinstance(part, nn.Linear) else None)
    with torch.no_grad():
        for graphed in (one, two, one):
            x = torch.rand(2, 3)
            assert torch.equal(graphed(x), graphed.network(x))
        assert not torch.equal(one(x), two(x))
    assert len(one.records) == 2


def test_answers_to_one_prompt_are_of_one_network():
    _, unet = unet_pair(TINY_UNETS["SD 1.5"], torch.float32)
    given   = inputs(TINY_UNETS["SD 1.5"])[1]
    once    = fast.prompt_once(unet)
    other   = fast.rebuilt(once, lambda part: None)
    other.questions = deepcopy(once.questions)
    for question in other.questions:
        question.weight.data.mul_(2)
    with torch.inference_mode():
        given = {name: value.clone() for name, value in given.items()}
        assert relative(other(**given), once(**given)) > 1e-3


def test_what_gives_no_gradients_says_so(pack_all):
    _, unet = unet_pair(TINY_UNETS["SD 1.5"], torch.float32)
    given = inputs(TINY_UNETS["SD 1.5"])[1]
    given["x"].requires_grad_()
    with pytest.raises(RuntimeError, match=r"fast\.packed"):
        fast.packed(unet)(**given)
    with pytest.raises(RuntimeError, match=r"fast\.graphed"):
        fast.graphed(unet)(**given)                     # before it asks for a GPU
    _, vae = vae_pair(TINY_VAES["SD 1.5"], torch.float32)
    for call, shape in ((fast.tiled(vae).encode, (1, 3, 16, 16)), (fast.tiled(vae).decode, (1, 4, 2, 2))):
        with pytest.raises(RuntimeError, match=r"fast\.tiled"):
            call(torch.zeros(shape, requires_grad=True))


# ── Fewer evaluations ───────────────────────────────────────────────────────────────────────────────────────

@torch.no_grad()
@pytest.mark.parametrize("family", ["SD 1.5", "SD 1.5 LCM", "SDXL base"])
@pytest.mark.parametrize("layers", [0, 1, 2])
def test_deep_cache_renews_the_outermost_layers_only(family, layers):
    config = TINY_UNETS[family]
    theirs, ours = unet_pair(config, torch.float64)
    their_inputs, given = inputs(config, torch.float64)
    wanted = theirs(**their_inputs).sample
    cached = fast.deep_cache(ours, every=3, layers=layers)
    deep, outer = [], []
    ours.mid_block.resnets[0].register_forward_hook(lambda *_: deep.append(1))
    ours.conv_in.register_forward_hook(lambda *_: outer.append(1))
    found = [cached(**given) for _ in range(4)]                 # as nothing changes, what is old is right
    assert all(relative(one, wanted) < 1e-10 for one in found)
    assert (len(deep), len(outer)) == (2, 4)
    nearby = {**given, "x": given["x"] + 0.01}
    change = (ours(**nearby) - wanted).abs().max()
    error  = (cached(**nearby) - ours(**nearby)).abs().max()
    assert 0 < error < change


@torch.no_grad()
@pytest.mark.parametrize("name", ["in_place", "packed", "channels_last", "unfused"])
def test_what_is_exact_goes_around_deep_cache_too(name, pack_all):
    _, ours = unet_pair(TINY_UNETS["SD 1.5"], torch.float32)
    given   = inputs(TINY_UNETS["SD 1.5"])[1]
    cached, twin = fast.deep_cache(ours, every=3), EXACT[name](fast.deep_cache(ours, every=3))
    for step in range(4):                               # whole, remembered, remembered, whole
        now = {**given, "x": given["x"] + 0.1 * step}
        assert relative(twin(**now), cached(**now)) < 1e-5


def test_deep_cache_visits_too(pipe):
    cached = replace(pipe, unet=fast.deep_cache(pipe.unet))
    wanted = ldm.sample(model=cached, **CALL)
    assert np.array_equal(ldm.sample(model=fast.offload(cached, "cpu"), **CALL), wanted)


def test_what_cannot_move_is_not_offloaded(pipe, pack_all):
    for make in (fast.packed, fast.graphed):
        with pytest.raises(ValueError, match=r"cannot move: give offload a pipeline"):
            fast.offload(replace(pipe, unet=make(pipe.unet)), "cpu")


@torch.no_grad()
def test_deep_cache_knows_runs_and_contexts_apart():
    _, ours = unet_pair(TINY_UNETS["SD 1.5"], torch.float64)
    given   = inputs(TINY_UNETS["SD 1.5"], torch.float64)[1]
    cached  = fast.deep_cache(ours, every=5)
    other   = {**given, "context": given["context"].flip(0)}
    for one in (given, other, given, other):
        assert relative(cached(**one), ours(**one)) < 1e-10
    again = {**given, "x": given["x"].flip(0), "t": given["t"] + 100}       # noisier than the last: a new run
    assert relative(cached(**again), ours(**again)) < 1e-10
    wide  = {**given, "x": given["x"].flip(0).repeat(1, 1, 1, 2)}
    assert relative(cached(**wide), ours(**wide)) < 1e-10
    assert relative(fast.deep_cache(ours, every=1)(**wide), ours(**wide)) < 1e-10
    with pytest.raises(ValueError, match="layers from 0 to the 2"):
        fast.deep_cache(ours, layers=3)


# ── Autoencoder ─────────────────────────────────────────────────────────────────────────────────────────────

@torch.no_grad()
@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize("family", TINY_VAES)
def test_strips_leave_no_trace(family, dtype, tolerance):
    """Against diffusers' whole picture, whose upper half is dark and whose lower one is bright noise."""
    theirs, ours = vae_pair(TINY_VAES[family], dtype)
    factor, shift = theirs.config.scaling_factor, theirs.config.shift_factor or 0
    generator = torch.Generator().manual_seed(0)
    pictures  = torch.rand(2, 3, 40, 24, generator=generator, dtype=torch.float64).to(dtype)
    shape     = (2, ours.config.latent_channels, 5, 3)
    latents   = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    pictures[:, :, :20] = -1
    latents[:, :, :2]   = -3
    posterior = theirs.encode(pictures).latent_dist
    decoded   = theirs.decode(latents / factor + shift).sample
    for rows in (1, 3, 8, 1000):
        tiled     = fast.tiled(ours, rows)
        mean, std = tiled.encode(pictures)
        assert relative(mean, (posterior.mean - shift) * factor) < tolerance, rows
        assert relative(std, posterior.std * factor) < tolerance, rows
        assert relative(tiled.decode(latents), decoded) < tolerance, rows
    assert relative(ours.decode(latents), decoded) < tolerance


@torch.no_grad()
def test_strips_halve_the_memory():
    _, vae = vae_pair(TINY_VAES["SD 1.5"], torch.float32)
    tiled  = fast.tiled(vae, 4)

    def peak(function, argument) -> int:
        with Peak() as peak:
            function(argument)
        return peak.bytes
    latents, pictures = torch.randn(1, 4, 16, 16), torch.randn(1, 3, 128, 128)
    top = 128 * 128 * TINY_VAES["SD 1.5"]["block_out_channels"][0] * 4          # a map of the highest level
    assert peak(vae.decode, latents) >= 6 * top
    assert peak(tiled.decode, latents) < 3.5 * top
    assert peak(vae.encode, pictures) >= 3 * top
    assert peak(tiled.encode, pictures) < 2.5 * top


def test_tiled_says_what_it_cannot_do():
    _, vae = vae_pair(TINY_VAES["SD 1.5"], torch.float32)
    with pytest.raises(ValueError, match="rows is 0"):
        fast.tiled(vae, 0)
    with pytest.raises(TypeError, match="Identity"):
        fast.tiled(nn.Identity())


# ── Pipelines ───────────────────────────────────────────────────────────────────────────────────────────────

PROMPTS = {"prompt": "a red cat", "negative_prompt": "bad", "height": 64, "width": 72}
CALL    = {**PROMPTS, "steps": 4, "seed": [5, 9], "num_images": 2, "output_type": "np"}


@pytest.fixture(scope="module")
def pictures(folder):
    return their_pictures(folder, "pndm", [5, 9], num_inference_steps=4, **PROMPTS)


def test_an_optimized_pipeline_makes_the_pictures_of_diffusers(pipe, pictures, pack_all):
    quick = fast.optimize(pipe)
    assert {kernels.PackedConv, kernels._InPlaceGEGLU} <= {type(part) for part in quick.unet.modules()}
    assert np.abs(ldm.sample(model=quick, **CALL) - pictures).max() < 1e-4
    assert np.abs(ldm.sample(model=pipe, **CALL) - pictures).max() < 1e-4
    with pytest.raises(TypeError, match="a PromptOnce"):
        fast.optimize(quick)


@pytest.mark.parametrize("cpu", [{"avx512_bf16": True}, {"avx512_bf16": True, "amx_bf16": True}, {}])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_attention_is_unfused_in_bfloat16_where_the_fused_one_is_slow(folder, dtype, cpu, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: cpu, raising=False)
    pipe  = fast.optimize(ldm.load(folder, device="cpu", dtype=dtype))
    kinds = {type(part) for part in pipe.unet.modules() if isinstance(part, Attention)}
    slow  = dtype == "bfloat16" and cpu == {"avx512_bf16": True}
    assert kinds == {kernels.UnfusedAttention if slow else Attention}


def test_an_optimized_pipeline_has_its_channels_last(pipe):
    quick = fast.optimize(pipe)
    for before, after in ((pipe.unet, quick.unet), (pipe.vae, quick.vae)):
        wide = [[part.weight for part in network.modules() if getattr(part, "kernel_size", 0) == (3, 3)]
                for network in (before, after)]
        assert len(wide[0]) == len(wide[1]) > 10
        assert not any(weight.is_contiguous(memory_format=torch.channels_last) for weight in wide[0])
        assert all(weight.is_contiguous(memory_format=torch.channels_last) for weight in wide[1])


@torch.no_grad()
@pytest.mark.parametrize("shape", [(2, 64, 8, 8), (1, 64, 33, 7)])
def test_norms_with_the_channels_last_know_small_variances(shape):
    """PyTorch's own err by .01 and more here, where means are a hundred standard deviations and more."""
    torch.manual_seed(0)
    norm = nn.GroupNorm(8, 64)
    x    = torch.randn(shape) + 100 * torch.arange(1, 9).repeat_interleave(8)[:, None, None]
    x    = x.contiguous(memory_format=torch.channels_last)
    quick, wanted = fast.channels_last(nn.Sequential(norm)), deepcopy(norm).double()(x.double())
    assert relative(quick(x), wanted) < 1e-5
    assert quick(x).is_contiguous(memory_format=torch.channels_last)


@torch.no_grad()
@pytest.mark.parametrize("sharpness", [1, 3, 6])
def test_unfused_attention_in_bfloat16_errs_little_more_than_fused(sharpness):
    """Against float64. The scores have standard deviations of .3, 3 and 12: in the last, few keys decide."""
    torch.manual_seed(0)
    fused = Attention(64, 64, 2).to(torch.bfloat16)
    fused.to_q.weight *= sharpness
    fused.to_k.weight *= sharpness
    x      = torch.randn(8, 256, 64).to(torch.bfloat16)
    wanted = deepcopy(fused).double()(x.double())
    errors = [(network(x) - wanted).square().mean().sqrt()
              for network in (fast.unfused(nn.Sequential(fused)), fused)]
    assert errors[0] < 2 * errors[1] < .02 * wanted.std()


@torch.no_grad()
def test_a_network_in_bfloat16_is_as_near_to_float32_with_unfused_attention():
    """The embedded one, trained, at three levels of noise."""
    exact, rough = (ldm.load(device="cpu", dtype=dtype) for dtype in ("float32", "bfloat16"))
    given   = exact.condition(["a red circle above a blue square"], 256, 256).context
    x       = torch.randn(1, 4, 32, 32, generator=torch.Generator().manual_seed(0))
    quick   = fast.unfused(rough.unet)
    for t in (100., 500., 900.):
        wanted = exact.unet(x, torch.tensor(t), given)
        errors = [(unet(x.bfloat16(), torch.tensor(t), given.bfloat16()) - wanted).square().mean().sqrt()
                  for unet in (quick, rough.unet)]
        assert errors[0] < 1.1 * errors[1] < .1


def test_a_tiled_pipeline_makes_the_pictures_of_diffusers(pipe, pictures):
    tiled = replace(pipe, vae=fast.tiled(pipe.vae, 8))
    assert np.abs(ldm.sample(model=tiled, **CALL) - pictures).max() < 1e-4


@pytest.mark.parametrize(("family", "layerwise"), [("SD 1.5", False), ("SD 1.5", True), ("SDXL base", False)])
def test_visitors_make_the_same_pictures_one_at_a_time(family, layerwise, tmp_path, monkeypatch):
    pipe   = ldm.load(write(tmp_path / "model", family), device="cpu")
    wanted = ldm.sample(model=pipe, **CALL)
    arrivals, admit = [], visits.Room.admit

    def noted(room, part):
        if part is not room.host:
            arrivals.append(type(part).__name__)
        return admit(room, part)
    monkeypatch.setattr(visits.Room, "admit", noted)
    assert np.array_equal(ldm.sample(model=fast.offload(pipe, "cpu", layerwise=layerwise), **CALL), wanted)
    if layerwise:
        layers = sum(bool(part._parameters) for part in pipe.unet.modules())
        calls  = CALL["steps"] + (family == "SD 1.5")               # PNDM makes one more
        assert len(arrivals) >= 0.9 * calls * layers
        assert not {"UNet", "ResBlock", "TransformerBlock"} & {*arrivals}
    else:
        assert arrivals == ["ModuleList", "UNet", *["Conv2d", "Decoder"] * 2]       # two pictures


def test_one_guest_is_gone_before_the_next_comes(pipe, monkeypatch):
    room  = visits.Room(torch.device("cpu"))
    first = weakref.ref(room.admit(pipe.unet))
    assert room.admit(pipe.unet) is first()
    moved = visits.moved

    def checked(module, device):
        gc.collect()
        assert first() is None
        return moved(module, device)
    monkeypatch.setattr(visits, "moved", checked)
    assert room.admit(pipe.unet.conv_in) is not pipe.unet.conv_in


# ── CUDA ────────────────────────────────────────────────────────────────────────────────────────────────────

@pytest.mark.gpu
def test_a_recorded_network_repeats_itself(folder):
    pipe   = ldm.load(folder, device="cuda", dtype="float32")
    wanted = ldm.sample(model=pipe, **CALL)
    quick  = fast.optimize(pipe)
    for _ in range(2):
        assert np.abs(ldm.sample(model=quick, **CALL) - wanted).max() < 1e-3
    tall = {**CALL, "height": 128}                                  # a second recording beside the first
    assert np.abs(ldm.sample(model=quick, **tall) - ldm.sample(model=pipe, **tall)).max() < 1e-3
    with pytest.raises(ValueError, match="CUDA graph"):
        fast.offload(quick, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("layerwise", [False, True])
def test_a_visit_to_the_gpu_leaves_nothing_there(folder, pipe, layerwise):
    wanted   = ldm.sample(model=pipe, **CALL)
    ldm.sample(model=fast.offload(pipe, "cuda"), **CALL)        # libraries keep their workspaces
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before   = torch.cuda.memory_allocated()
    visiting = fast.offload(pipe, "cuda", layerwise=layerwise)
    assert np.abs(ldm.sample(model=visiting, **CALL) - wanted).max() < 1e-3
    assert all(tensor.device.type == "cpu" for tensor in pipe.unet.parameters())
    del visiting
    gc.collect()
    assert torch.cuda.memory_allocated() == before


@pytest.mark.gpu
@torch.no_grad()
def test_strips_stored_on_the_cpu():
    _, vae  = vae_pair(TINY_VAES["SD 1.5"], torch.float32)
    vae     = vae.cuda()
    latents = torch.randn(1, 4, 8, 8, device="cuda")
    tiled   = fast.tiled(vae, 8, store="cpu")
    assert relative(tiled.decode(latents), vae.decode(latents)) < 1e-4
    pictures = torch.randn(1, 3, 64, 64, device="cuda")
    assert relative(tiled.encode(pictures)[0], vae.encode(pictures)[0]) < 1e-4
