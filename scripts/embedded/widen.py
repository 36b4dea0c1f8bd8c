"""A wider U-Net that begins with what a narrow one has learned (Net2Net, Chen et al. 2016).

    python scripts/embedded/widen.py FOLDER/unet.pt 64 128 192

takes the U-Net of the model in the package (or of --model), gives its levels so many channels, and writes a
checkpoint from which `train.py unet` goes on, with these channels in `CONFIG`.

Some channels are doubled: the copy has the same value, and who reads both gets a share of each, drawn at
random so that the two part ways in training. Convolutions, linear layers, activations and attention then do
what they did. So do norms where all levels are doubled; otherwise a group weighs some of its channels twice,
and the answer changes by some hundredths, which training repairs in its first steps.
"""
import argparse
import re
from dataclasses import replace
from pathlib import Path

import torch
from common import save
from torch import Tensor
from train_unet import new_optimiser

import ldm
from ldm.models import UNet, UNetConfig
from ldm.training import EMA


def widen(old: UNet, channels: tuple[int, ...], seed: int = 0) -> UNet:
    """A U-Net with `channels` per level, each from one to two times what the old level has; the first, which
    is also the number of the time's Fourier features, just once or twice.

    Raises:
        ValueError: the channels are others.
    """
    pairs = list(zip(old.config.channels, channels, strict=False))
    if len(old.config.channels) != len(channels) or not all(a <= b <= 2 * a for a, b in pairs) \
            or channels[0] not in (pairs[0][0], 2 * pairs[0][0]):
        raise ValueError(f"channels are {channels}; levels of {old.config.channels} can become up to twice "
                         f"as wide, the first exactly twice or not at all.")
    new       = UNet(replace(old.config, channels=channels))
    generator = torch.Generator().manual_seed(seed)
    copies    = {level: copies_of(a, b) for level, (a, b) in enumerate(pairs)}
    copies   |= {TIME: copies_of(4 * pairs[0][0], 4 * pairs[0][1])}
    weights   = {}
    for name, tensor in old.state_dict().items():
        rows, columns = axes(name, old.config)
        if rows:
            tensor = tensor[repeated(rows, copies, len(tensor))]
        if name == "time_embedding.linear_1.weight":
            tensor = of_finer_features(tensor, channels[0])
        elif columns and tensor.ndim > 1:
            tensor = shared(tensor, columns, copies, generator)
        if name.endswith("to_q.weight"):                    # keeps q·k/√d, in which a pair counts twice
            each   = copies[rows[0]]
            tensor = tensor * ((len(tensor) / len(each)) ** .5 / each.repeat_interleave(each))[:, None]
        weights[name] = tensor
    new.load_state_dict(weights)
    return new


TIME = -1             # beside the numbers of the levels: the width of the time embedding


def copies_of(a: int, b: int) -> Tensor:
    """How often each of `a` channels appears among `b`: once or twice, spread evenly."""
    return (torch.arange(a + 1) * b // a).diff()


def axes(name: str, config: UNetConfig) -> tuple[list[int], list[int]]:
    """The levels of a weight's rows, and of its columns; none where nothing grows.

    Two levels, where a feature map and a skip lie side by side.
    """
    last = len(config.channels) - 1
    if name.startswith("time_embedding"):
        return [TIME], [TIME]
    if name.startswith(("conv_in", "conv_norm_out")):
        return [0], []
    if name.startswith("conv_out"):
        return [], [0]
    block = re.match(r"(down|up)_blocks\.(\d+)\.resnets\.(\d+)\.(norm1|conv1|conv_shortcut)", name)
    found = re.match(r"(down|up)_blocks\.(\d+)", name)
    level = last if not found else int(found[2]) if found[1] == "down" else last - int(found[2])
    reads = [level]
    if block and block[1] == "down" and block[3] == "0":
        reads = [max(level - 1, 0)]
    elif block and block[1] == "up":
        reads = [min(level + 1, last) if block[3] == "0" else level,
                 max(level - 1, 0) if int(block[3]) == config.layers else level]
    if block and block[4] == "norm1":
        return reads, []
    if "time_emb_proj" in name:
        return [level], [TIME]
    return [level], [] if "attn2.to_k" in name or "attn2.to_v" in name else reads


def repeated(levels: list[int], copies: dict[int, Tensor], length: int) -> Tensor:
    """The old channel that each new one is; of `length` old ones, in GEGLU a multiple of the level's."""
    each = torch.cat([copies[level] for level in levels])
    each = each.repeat(length // len(each))
    return torch.arange(length).repeat_interleave(each)


def shared(tensor: Tensor, levels: list[int], copies: dict[int, Tensor],
           generator: torch.Generator) -> Tensor:
    """Columns for all copies; those of a pair add up to the old one."""
    index  = repeated(levels, copies, tensor.shape[1])
    twin   = index.diff() == 0
    first, second = torch.nn.functional.pad(twin, (0, 1)), torch.nn.functional.pad(twin, (1, 0))
    share  = .2 + .6 * torch.rand(len(tensor), len(index), generator=generator)
    share  = torch.where(first, share, torch.where(second, 1 - share.roll(1, dims=1), 1.0))
    return tensor[:, index] * share.view(*share.shape, *[1] * (tensor.ndim - 2))


def of_finer_features(tensor: Tensor, width: int) -> Tensor:
    """The first layer of the time's MLP, for `width` Fourier features: among twice as many wavelengths, each
    old one is every second."""
    result = tensor.new_zeros(len(tensor), width)
    result[:, ::width // tensor.shape[1]] = tensor
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="is written")
    parser.add_argument("channels", type=int, nargs="+")
    parser.add_argument("--model", help="a folder; default: the embedded model")
    args = parser.parse_args()
    unet = widen(ldm.load(args.model, device="cpu").unet, tuple(args.channels))
    state = {"unet": unet, "ema": EMA(unet), "optimiser": new_optimiser(unet)}
    save({name: holder.state_dict() for name, holder in state.items()} | {"step": 0, "seconds": 0.0},
         args.checkpoint)


if __name__ == "__main__":
    main()
