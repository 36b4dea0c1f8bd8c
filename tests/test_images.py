"""Pictures: values and shapes of the conversions, grids, and parameters that survive in the PNG."""
import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin

from ldm import images


def test_to_unit_maps_and_clips():
    x = torch.tensor([-3.0, -1.0, 0.0, 0.5, 1.0, 2.0], dtype=torch.bfloat16)
    assert images.to_unit(x).dtype == torch.float32
    assert images.to_unit(x).tolist() == [0, 0, 0.5, 0.75, 1, 1]


def test_to_numpy_moves_the_channels_last():
    x = torch.rand(2, 3, 4, 5, dtype=torch.float16, requires_grad=True)
    y = images.to_numpy(x)
    assert y.shape == (2, 4, 5, 3)
    assert y.dtype == np.float32
    assert y[1, 2, 3, 0] == x[1, 0, 2, 3].item()


def test_to_pil_rounds_to_the_nearest_level():
    levels = torch.tensor([0.0, 0.499 / 255, 0.501 / 255, 127.4 / 255, 127.6 / 255, 1.0])
    x      = levels.view(1, 1, 1, 6).expand(1, 3, 1, 6)
    image, = images.to_pil(x)
    assert image.mode == "RGB"
    assert np.asarray(image)[0, :, 0].tolist() == [0, 0, 1, 127, 128, 255]


def test_to_pil_keeps_colour_and_orientation():
    x = torch.zeros(1, 3, 2, 3)                              # red at the top right, height 2, width 3
    x[0, 0, 0, 2] = 1
    image, = images.to_pil(x)
    assert image.size == (3, 2)
    assert image.getpixel((2, 0)) == (255, 0, 0)
    assert image.getpixel((0, 1)) == (0, 0, 0)


def test_grid_places_pictures_in_rows():
    colours = ["red", "green", "blue", "yellow", "black"]
    sheet   = images.grid([Image.new("RGB", (10, 8), colour) for colour in colours])
    gap     = images.GAP
    assert sheet.size == (3 * 10 + 2 * gap, 2 * 8 + gap)     # five pictures: three columns, two rows
    for i, colour in enumerate(colours):
        corner = (i % 3 * (10 + gap), i // 3 * (8 + gap))
        tile   = sheet.crop((*corner, corner[0] + 10, corner[1] + 8))
        assert tile.getcolors() == [(80, Image.new("RGB", (1, 1), colour).getpixel((0, 0)))]
    assert sheet.getpixel((sheet.width - 1, sheet.height - 1)) == (255, 255, 255)      # the empty sixth place
    assert sheet.getpixel((11, 0)) == (255, 255, 255)                                  # a gap


@pytest.mark.parametrize(("number", "columns", "size"), [
    (1, None, (4, 4)), (4, None, (12, 12)), (3, 3, (20, 4)), (3, 1, (4, 20)),
])
def test_grid_columns(number, columns, size):
    assert images.grid([Image.new("RGB", (4, 4))] * number, columns).size == size


@pytest.mark.parametrize("sizes", [[], [(4, 4), (4, 5)]])
def test_grid_needs_pictures_of_one_size(sizes):
    with pytest.raises(ValueError, match="all of one size"):
        images.grid([Image.new("RGB", size) for size in sizes])


PARAMETERS = {"ldm": "0.1.0", "prompt": "ein Stern über 東京 \n\"quoted\"", "steps": 25,
              "guidance_scale": 3.5, "seed": 2**63, "model": None, "grid": True}


def test_parameters_survive_in_the_file(tmp_path):
    path  = tmp_path / "picture.png"
    image = Image.effect_noise((16, 16), 40).convert("RGB")
    images.save_png(image, path, PARAMETERS)
    assert images.read_parameters(path) == PARAMETERS
    assert Image.open(path).tobytes() == image.tobytes()


def write_chunk(path, text):
    info = PngImagePlugin.PngInfo()
    info.add_itxt(images.CHUNK, text)
    Image.new("RGB", (4, 4)).save(path, pnginfo=info)


def truncated_png(path):
    images.save_png(Image.effect_noise((64, 64), 40).convert("RGB"), path, PARAMETERS)
    path.write_bytes(path.read_bytes()[:600])


def foreign(format):
    return lambda path: Image.new("RGB", (4, 4)).save(path, format=format)


BAD_FILES = {
    "another program's": (foreign("PNG"),                                "carries no parameters"),
    "a JPEG":            (foreign("JPEG"),                               "carries no parameters"),
    "text":              (lambda path: path.write_text("hello"),         "cannot be read as a picture"),
    "empty":             (lambda path: path.write_bytes(b""),            "cannot be read as a picture"),
    "truncated":         (truncated_png,                                 "cannot be read as a picture"),
    "broken JSON":       (lambda path: write_chunk(path, '{"prompt": '), "damaged"),
    "no object":         (lambda path: write_chunk(path, "[1, 2]"),      "damaged: not a JSON object"),
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_a_bad_file_is_named_with_its_fault(kind, tmp_path):
    write, message = BAD_FILES[kind]
    path = tmp_path / "bad.png"
    write(path)
    with pytest.raises(ValueError, match=message) as caught:
        images.read_parameters(path)
    assert str(path) in str(caught.value)


def test_a_missing_file():
    with pytest.raises(FileNotFoundError):
        images.read_parameters("nowhere.png")
