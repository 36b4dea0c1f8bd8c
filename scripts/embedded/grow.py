"""A U-Net for pictures of twice the size, around one that is trained.

What the small one has learned about layout, words and shapes stands on its levels, which become the inner
ones of the large one. The new outer level begins as a pass-through: the way down hands on the mean of every
four latent pixels, the way up hands back the small one's answer at twice the size. `widen` gives this level,
which alone sees the details, twice the channels; training then adds them.
"""

import re
from dataclasses import replace

import torch
from torch import Tensor

from ldm.models import UNet


@torch.no_grad()
def grow(small: UNet) -> UNet:
    """A U-Net with one more level outside, of the width of the first one and without attention."""
    old   = small.config
    new   = UNet(replace(old, channels=(old.channels[0], *old.channels), depth=(0, *old.depth),
                         heads=(old.heads[0], *old.heads)))
    for name, p in small.state_dict().items():
        name = re.sub(r"^down_blocks\.(\d+)", lambda found: f"down_blocks.{int(found[1]) + 1}", name)
        new.get_parameter(name).copy_(p)
    down, up = new.down_blocks[0], new.up_blocks[-1]
    identity = torch.eye(old.channels[0])
    for block in (*down.resnets, *up.resnets):                      # nothing beside their shortcuts
        block.conv2.weight.zero_()
        block.conv2.bias.zero_()
    for block in up.resnets:                                        # of (from below, skip): the first half
        block.conv_shortcut.weight.copy_(torch.cat([identity, 0 * identity], 1)[:, :, None, None])
        block.conv_shortcut.bias.zero_()
    mean, same = torch.zeros(3, 3), torch.zeros(3, 3)
    mean[1:, 1:], same[1, 1] = 1 / 4, 1
    for conv, kernel in ((down.downsamplers[0].conv, mean), (new.up_blocks[-2].upsamplers[0].conv, same)):
        conv.weight.copy_(identity[:, :, None, None] * kernel)
        conv.bias.zero_()
    return new


@torch.no_grad()
def widen(unet: UNet) -> UNet:
    """A U-Net whose outer level has twice the channels: each beside its copy (Net2WiderNet, Chen et al.
    2016), so that every group of a GroupNorm keeps its statistics.

    What reads a channel reads both copies, with two weights whose sum is the old one, but whose difference is
    random: so the copies learn different things. The answers are those of before, but for two norms on the
    way up, the first that see the wider skips of this level and of its downsampling beside channels from
    below, which have no copies: there the groups begin and end elsewhere.
    """
    old   = unet.config
    new   = UNet(replace(old, channels=(2 * old.channels[0], *old.channels[1:])))
    width = old.channels[0]
    state = unet.state_dict()
    if old.channels[1] == width:                                        # now its input has another width
        state["down_blocks.1.resnets.0.conv_shortcut.weight"] = torch.eye(width)[:, :, None, None]
        state["down_blocks.1.resnets.0.conv_shortcut.bias"] = torch.zeros(width)

    def copies(tensor: Tensor, dim: int, more: int) -> Tensor:
        """The last `more` channels twice; before them stand those that come from below."""
        head, tail = tensor.split([tensor.shape[dim] - more, more], dim)
        return torch.cat([head, tail.repeat_interleave(2, dim)], dim)

    for name, parameter in new.named_parameters():
        tensor = copies(state[name], 0, len(parameter) - len(state[name]))
        if name == "time_embedding.linear_1.weight":
            # Of the frequencies of `timestep_embedding(t, 2 * width)` the even ones are those of before.
            parameter.zero_()
            parameter[:, ::2] = tensor
            continue
        if parameter.ndim > 1 and (more := parameter.shape[1] - tensor.shape[1]):
            half   = tensor[:, -more:] / 2
            noise  = torch.randn_like(half) * half.std()
            both   = torch.stack([half + noise, half - noise], 2).flatten(1, 2)
            tensor = torch.cat([tensor[:, :-more], both], 1)
        parameter.copy_(tensor)
    return new
