"""Models at full size with random weights; not run by default: pytest -m full_size"""
import resource
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


@pytest.mark.full_size
def test_sdxl_base_and_refiner_take_a_step_at_1024_pixels_in_24_gib(tmp_path):
    import full_size
    full_size.write_xl(tmp_path)
    latents = full_size.xl(tmp_path)
    assert latents.shape == (1, 4, 128, 128)                    # and finite, or it would have raised
    assert 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 24 * 2**30
    for file in tmp_path.iterdir():
        file.unlink()                                           # 13 GB, which pytest would keep
