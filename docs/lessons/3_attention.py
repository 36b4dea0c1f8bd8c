"""Lesson 3. Which word looks where.    python docs/lessons/3_attention.py

In cross-attention every place of the picture asks every word how much it matters. A hook on the modules named
`attn2` computes these shares again and keeps them. Writes attention.png.
"""
import torch
from PIL import Image

import ldm
from ldm import images

pipe   = ldm.load(device="cpu")
prompt = "a red square above a blue circle"
words  = pipe.text.tokenizer.tokenize(prompt)
cells  = pipe.defaults.height // 16                             # the side of the feature maps that we look at
shares = []


def keep(module, arguments, output):
    x, context = arguments                                       # (N, L, C) places, (N, S, D) words
    if x.shape[1] != cells**2:
        return
    q, k = (y.unflatten(-1, (module.heads, -1)).transpose(1, 2)
            for y in (module.to_q(x), module.to_k(context)))
    weights = (q @ k.transpose(-1, -2) / q.shape[-1]**0.5).softmax(-1)                    # (N, H, L, S)
    shares.append(weights[-1].mean(0))                       # of the prompt, not of the empty text; all heads


for name, module in pipe.unet.named_modules():
    if name.endswith("attn2"):
        module.register_forward_hook(keep)
picture, = ldm.sample(prompt, pipe, steps=12)

maps  = torch.stack(shares).mean(0)                              # over steps and layers
cards = [picture]
for i, word in enumerate(words, start=1):                        # token 0 marks the start
    heat = maps[:, i].reshape(cells, cells)
    print(f"{word.removesuffix('</w>'):8} {heat.mean():.3f} of the attention, most of it at "
          f"{divmod(int(heat.argmax()), cells)} (row, column) of {cells} × {cells}")
    grey = Image.fromarray((heat / heat.max() * 255).byte().numpy()).convert("RGB")
    cards.append(grey.resize(picture.size, Image.Resampling.NEAREST))
images.grid(cards, columns=len(cards)).save("attention.png")
