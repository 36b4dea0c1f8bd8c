"""Pictures: what is read of every kind, sizes, conversions, grids, parameters that survive in the PNG."""
import os

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin

from ldm import images

# ── In ──────────────────────────────────────────────────────────────────────────────────────────────────────

def photo(width: int = 11, height: int = 7, bands: int = 3) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, bands), dtype=np.uint8)
    return Image.fromarray(pixels.squeeze(), {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}[bands])


def read_one(picture) -> np.ndarray:
    """(H, W, 3), float32."""
    tensor, = images.read(picture)
    assert tensor.dtype == torch.float32
    return tensor.permute(1, 2, 0).numpy()


def same(picture, expected: np.ndarray, levels: float = 0.01) -> None:
    """Equal, to a part of one of 256 levels."""
    assert read_one(picture).shape == (*expected.shape[:2], 3)
    np.testing.assert_allclose(read_one(picture), np.broadcast_to(expected, read_one(picture).shape),
                               rtol=0, atol=levels / 255)


@pytest.mark.parametrize("mode", ["RGB", "L", "1", "P", "CMYK", "YCbCr", "HSV", "RGBX"])
def test_opaque_modes_are_those_of_pillow(mode):
    picture = photo().convert(mode)
    same(picture, np.asarray(picture.convert("RGB")) / 255)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "RGBa"])
def test_transparency_is_laid_on_white(mode):
    """Pillow composes in whole levels, so it is off by half of one; premultiplied colours by more."""
    picture  = photo(bands=4).convert("LA" if mode == "PA" else "RGBA").convert(mode)
    straight = picture.convert("RGBA")
    white    = Image.new("RGBA", picture.size, "white")
    same(picture, np.asarray(Image.alpha_composite(white, straight).convert("RGB")) / 255, levels=1.01)


@pytest.mark.parametrize("mode", ["P", "L", "RGB"])
def test_a_transparent_colour_is_white(mode, tmp_path):
    """Files may name one colour that is transparent."""
    picture = Image.new("RGB", (4, 2), "red").convert(mode)
    picture.paste(Image.new("RGB", (2, 2), "blue").convert(mode), (0, 0))
    which   = picture.getpixel((0, 0))
    picture.save(tmp_path / "a.png", transparency=which)
    found   = read_one(tmp_path / "a.png")
    np.testing.assert_array_equal(found[:, :2], 1)
    np.testing.assert_array_equal(found[:, 2:] * 255, np.asarray(picture.convert("RGB"))[:, 2:])


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_sixteen_bits(format, tmp_path):
    levels = np.array([[0, 1, 300], [40000, 65534, 65535]], dtype=np.uint16)
    Image.fromarray(levels).save(tmp_path / "a", format=format)
    same(tmp_path / "a", levels[..., None] / 65535)
    same(Image.fromarray(levels.astype(np.int32)), levels[..., None] / 65535)       # as older Pillows open it
    same(Image.fromarray(levels.astype(np.float32) / 65535), levels[..., None] / 65535)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_rotation_of_a_photo_is_applied(orientation, format, tmp_path):
    """The eight orientations of EXIF: 0th row and column of the file are the named sides of the picture."""
    turned = {1: lambda x: x,                  2: lambda x: x[:, ::-1],           # top left, top right
              3: lambda x: x[::-1, ::-1],      4: lambda x: x[::-1],              # bottom right, bottom left
              5: lambda x: x.swapaxes(0, 1),   6: lambda x: np.rot90(x, -1),      # left top, right top
              7: lambda x: np.rot90(x, 2).swapaxes(0, 1),                         # right bottom
              8: lambda x: np.rot90(x, 1)}[orientation]                           # left bottom
    picture = Image.new("RGB", (32, 16), "black")
    picture.paste("white", (0, 0, 16, 8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 100} if format in ("JPEG", "WEBP") else {}
    picture.save(tmp_path / "a", format=format, exif=exif, **options)
    same(tmp_path / "a", turned(np.asarray(picture)) / 255, levels=30)


def test_an_animation_gives_its_first_picture(tmp_path):
    first, second = (Image.new("RGB", (4, 4), colour) for colour in ("red", "blue"))
    first.save(tmp_path / "a.gif", save_all=True, append_images=[second])
    same(tmp_path / "a.gif", np.asarray(first) / 255)


def test_arrays_and_tensors():
    pixels = np.asarray(photo())
    floats = pixels / 255
    planes = torch.from_numpy(floats).permute(2, 0, 1)
    for picture in (pixels, floats, floats.astype(np.float32), floats[None], pixels.astype(np.uint16) * 257,
                    planes, planes[None], torch.from_numpy(pixels.copy()).permute(2, 0, 1),
                    planes.clone().requires_grad_()):
        same(picture, floats)
    same(planes.bfloat16(), floats, levels=0.6)
    same(pixels[..., 0], floats[..., :1])                                       # (H, W)
    same(pixels[..., :1], floats[..., :1])
    same(pixels[..., 0] > 99, (pixels[..., :1] > 99).astype(float))
    rgba = np.asarray(photo(bands=4)) / 255
    same(rgba, rgba[..., :3] * rgba[..., 3:] + 1 - rgba[..., 3:])
    assert [picture.shape for picture in images.read([photo(4, 5), [floats], np.stack([pixels] * 2)])] == [
        (3, 5, 4), *[(3, 7, 11)] * 3]


def test_floats_may_be_beyond_their_range_by_rounding():
    picture = torch.tensor([-1e-6, .5, 1 + 1e-6]).expand(3, 2, 3)
    assert images.read(picture)[0][0, 0].tolist() == [0, .5, 1]


def test_an_opened_picture_whose_file_is_cut_off_is_named(tmp_path):
    photo(64, 64).save(tmp_path / "whole.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:700])
    with pytest.raises(ValueError, match="truncated"):
        images.read(Image.open(tmp_path / "cut.jpg"))


def test_what_is_read_does_not_share_its_memory():
    array = np.zeros((2, 2, 3), dtype=np.float32)
    picture, = images.read(array)
    picture += 1
    assert array.max() == 0


@pytest.mark.parametrize(("picture", "error", "words"), [
    (3,                                     TypeError,  "got int"),
    (None,                                  TypeError,  "got NoneType"),
    ([],                                    ValueError, "no picture: the list is empty"),
    (np.zeros((3, 8, 9)),                   ValueError, r"\(H, W, C\).* got \(3, 8, 9\)"),
    (np.zeros(8),                           ValueError, r"got \(8,\)"),
    (np.zeros((0, 8, 3)),                   ValueError, r"got \(0, 8, 3\)"),
    (torch.zeros(8, 9, 3),                  ValueError, r"\(C, H, W\).* got \(8, 9, 3\)"),
    (torch.zeros(8, 9),                     ValueError, r"got \(8, 9\)"),
    (np.zeros((8, 9, 3), dtype=np.int64),   ValueError, "unsigned whole numbers; got int64"),
    (np.full((8, 9, 3), 255.0),             ValueError, r"in \[0, 1\]; got 255 … 255"),
    (torch.full((3, 8, 9), -1.0),           ValueError, "got -1 … -1"),
    (np.full((8, 9, 3), np.nan),            ValueError, "got nan"),
    (Image.new("I", (4, 4), 70000),         ValueError, r"in \[0, 1\]"),
    (Image.new("La", (4, 4)),               ValueError, "mode La into RGB"),
])
def test_what_is_no_picture(picture, error, words):
    with pytest.raises(error, match=words):
        images.read(picture)


# ── Sizes ───────────────────────────────────────────────────────────────────────────────────────────────────

def smooth(size: tuple[int, int]) -> Image.Image:
    """Of middle colours, since Pillow clips between its two passes."""
    small = np.random.default_rng(0).integers(64, 192, (5, 5, 3), dtype=np.uint8)
    return Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)


@pytest.mark.parametrize(("size", "height", "width", "scaled", "expected"), [   # sizes are (width, height)
    ((75, 70),   None, None, (75, 70),   (72, 64)),
    ((72, 64),   None, None, (72, 64),   (72, 64)),
    ((300, 100), 64,   64,   (192, 64),  (64, 64)),
    ((300, 100), 32,   None, (96, 32),   (96, 32)),
    ((100, 300), 32,   None, (11, 32),   (8, 32)),
    ((300, 100), None, 64,   (64, 21),   (64, 16)),
    ((40, 40),   80,   120,  (120, 120), (120, 80)),
])
def test_fit_scales_and_cuts_out_the_middle(size, height, width, scaled, expected):
    picture = smooth(size)
    found   = images.fit(images.read(picture), height, width, 8)
    left, top = ((a - b) // 2 for a, b in zip(scaled, expected, strict=True))
    judge   = picture.resize(scaled, Image.Resampling.BICUBIC)
    judge   = judge.crop((left, top, left + expected[0], top + expected[1]))
    same(found, np.asarray(judge) / 255, levels=1.1)


@pytest.mark.parametrize("size", [(24, 40), (90, 31), (16, 16)])
def test_resize_is_pillows_bicubic(size):
    picture = smooth((61, 47))
    found   = images.resize(images.read(picture)[0][None], size)
    same(found, np.asarray(picture.resize(size[::-1], Image.Resampling.BICUBIC)) / 255, levels=1.1)


def test_resize_stays_within_black_and_white():
    """Bicubic interpolation overshoots at an edge."""
    edge = torch.zeros(1, 3, 8, 8)
    edge[..., 4:] = 1
    found = images.resize(edge, (24, 24))
    assert (found.min(), found.max()) == (0, 1)


def test_fit_refuses_different_sizes_and_tiny_pictures():
    pictures = images.read([photo(16, 24), photo(24, 24)])
    with pytest.raises(ValueError, match=r"here are 2 of \(width, height\) = \[\(16, 24\), \(24, 24\)\]"):
        images.fit(pictures, None, None, 8)
    assert images.fit(pictures, 16, 16, 8).shape == (2, 3, 16, 16)
    with pytest.raises(ValueError, match="16 × 7 pixels is too small; it takes 8 × 8"):
        images.fit(images.read(photo(16, 7)), None, None, 8)


# ── Out ─────────────────────────────────────────────────────────────────────────────────────────────────────

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


def test_parameters_may_name_a_file_whose_name_is_no_text(tmp_path):
    found = {"image": os.fsdecode(b"caf\xe9.png"), "prompt": "ein Stern über 東京"}
    images.save_png(Image.new("RGB", (4, 4)), tmp_path / "picture.png", found)
    assert images.read_parameters(tmp_path / "picture.png") == found


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
