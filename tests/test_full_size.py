"""Stable Diffusion 1.5 at full size with random weights; not run by default: pytest -m full_size"""
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[1] / "scripts"))


@pytest.mark.full_size
def test_a_picture_of_512_pixels_equals_diffusers(tmp_path):
    import full_size
    full_size.write(tmp_path)
    assert full_size.compare(tmp_path, "cpu", steps=2) < full_size.TOLERANCE["cpu"]
    assert full_size.ours(tmp_path, "cpu", full_size.DTYPE["cpu"], 1, width=768).shape == (1, 512, 768, 3)
