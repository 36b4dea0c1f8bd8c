"""A U-Net for pictures of twice the size, around one that is trained.

What the small one has learned about layout, words and shapes stands on its levels, which become the inner
ones of the large one. The new outer level begins as a pass-through: the way down hands on the mean of every
four latent pixels, the way up hands back the small one's answer at twice the size. Training then adds the
details.
"""

import re
from dataclasses import replace

import torch

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
