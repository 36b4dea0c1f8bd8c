"""The networks: torch only. Nothing here knows that diffusion exists, and nothing here reads files.

Every module carries the parameter names of Hugging Face's diffusers, so that a checkpoint loads with
`strict=True` and no mapping between names.
"""
from .tiny_vae import TinyVAE, TinyVAEConfig
from .unet import UNet, UNetConfig
from .vae import VAE, VAEConfig

__all__ = ["VAE", "TinyVAE", "TinyVAEConfig", "UNet", "UNetConfig", "VAEConfig"]
