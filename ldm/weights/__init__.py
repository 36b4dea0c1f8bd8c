"""Weights: find.py finds the folder, read.py reads its files, names.py mends names, load.py fills modules."""
from .find import find
from .load import load_module, load_text_encoder, load_tokenizer
from .names import rename_clip, rename_old_vae_attention
from .read import read_json, read_tensors, weight_files

__all__ = ["find", "load_module", "load_text_encoder", "load_tokenizer", "read_json", "read_tensors",
           "rename_clip", "rename_old_vae_attention", "weight_files"]
