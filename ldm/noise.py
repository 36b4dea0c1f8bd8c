"""Random numbers keyed by (seed, k): the k-th standard normal draw of one picture, in whatever batch.

Each picture has its own generator on the CPU, so its noise depends neither on the device, nor on the batch
it is in, nor on its place there. In text to image k = 0 is the start, and 1, 2, … are the draws of a
stochastic scheduler, one for each step; a task that begins with a picture draws its latents first. This is
the stream that diffusers draws from when it is given a list of CPU generators.
"""
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Noise = Callable[[int], Tensor]     # k → (N, C, h, w)


def seeded(seeds: Sequence[int], shape: tuple[int, ...], device: torch.device | str = "cpu") -> Noise:
    """A function k → noise (N, *shape), float32 on `device`, for N seeds (integers in [0, 2⁶⁴)).

    It is pure: the same k always gives the same numbers. Asking in rising order costs nothing; going back
    replays the stream from its start. (PyTorch's CPU generator rounds the same float32 numbers when asked for
    float16, so a diffusers run in float16 starts from this noise too; except for the last 16 numbers of
    a picture where h·w of its latents is no multiple of 4.)
    """
    generators: list[torch.Generator] = []
    drawn = 0

    def noise(k: int) -> Tensor:
        nonlocal drawn, generators
        if not generators or k < drawn:
            generators, drawn = [torch.Generator().manual_seed(seed) for seed in seeds], 0
        for _ in range(drawn, k + 1):                       # the same whatever PyTorch's defaults are set to
            numbers = [torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")
                       for generator in generators]
        drawn = k + 1
        return torch.stack(numbers).to(device)
    return noise
