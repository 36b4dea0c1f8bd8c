"""Weights: from the name of a model to its modules.

    find.py     the folder of a name, from the disk or the Hub      read.py   the files in it, safely
    sources.py  a folder or a single checkpoint file                detect.py what such a file holds
    names.py    old tensor names to ours                            load.py   modules filled, strictly
    pickles.py  old checkpoints as data                             save.py   and back to a folder
"""
from .detect import LIGHTNING, TURBO
from .find import find, find_vae
from .load import Part, load_module, load_part, load_tokenizer, vae_config
from .names import rename_clip, rename_ldm_unet, rename_ldm_vae, rename_open_clip, rename_taesd
from .read import read_json, read_tensors, read_weights, weight_files
from .save import model_index, new_folder, write_json, write_network, write_text_encoder, write_tokenizer
from .sources import File, Folder, open_source, open_vae, read_part

__all__ = ["LIGHTNING", "TURBO", "File", "Folder", "Part", "find", "find_vae", "load_module", "load_part",
           "load_tokenizer", "model_index", "new_folder", "open_source", "open_vae", "read_json",
           "read_part", "read_tensors", "read_weights", "rename_clip", "rename_ldm_unet", "rename_ldm_vae",
           "rename_open_clip", "rename_taesd", "vae_config", "weight_files",
           "write_json", "write_network", "write_text_encoder", "write_tokenizer"]
