"""ldm: latent diffusion written to be read. Text to image on Hugging Face weights, every part by hand.

    import ldm
    ldm.sample("a red circle on a blue background")[0].save("circle.png")

The names below load on first use, so that `import ldm` itself loads neither torch nor transformers.
"""
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import fast, guidance, images, models, schedulers, training
    from .denoiser import Conditioning, Denoiser
    from .noise_schedule import NoiseSchedule
    from .pipeline import Pipeline, load, load_vae
    from .sampling import img2img, inpaint, sample
    from .sizes import Sizes
    from .weights.account import inspect

__version__ = "0.1.0"
__all__ = [
    "Conditioning", "Denoiser", "NoiseSchedule", "Pipeline", "Sizes",
    "fast", "guidance", "images", "img2img", "inpaint", "inspect", "load", "load_vae", "models", "sample",
    "schedulers", "training",
]

_MODULE_OF = {
    "Conditioning":  "denoiser",
    "Denoiser":      "denoiser",
    "NoiseSchedule": "noise_schedule",
    "Pipeline":      "pipeline",
    "Sizes":         "sizes",
    "img2img":       "sampling",
    "inpaint":       "sampling",
    "inspect":       "weights.account",
    "load":          "pipeline",
    "load_vae":      "pipeline",
    "sample":        "sampling",
}


def __getattr__(name: str) -> Any:
    """A public name on its first use (PEP 562): import its module, then keep the name here."""
    if name not in __all__:
        raise AttributeError(f"module 'ldm' has no attribute {name!r}; "
                             f"its public names are {', '.join(__all__)}")
    module          = import_module(f"ldm.{_MODULE_OF.get(name, name)}")
    globals()[name] = getattr(module, name) if name in _MODULE_OF else module
    return globals()[name]


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
