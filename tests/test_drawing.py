"""A drawn or photographed digit is framed as MNIST frames its digits; a bad file is named."""

import numpy as np
import pytest
from conftest import vae_helpers
from PIL import Image
from scipy import ndimage

ROWS, COLUMNS = np.indices([300, 360])  # of a sheet of paper


@pytest.fixture(scope="module")
def digit_images(small_arrays):
    """Return twenty real digits, two of each: float32 [20, 784] in [0, 1]."""
    images = []
    for digit in range(10):
        images.extend(small_arrays["x_test"][small_arrays["y_test"] == digit][:2])
    return np.reshape(images, [20, 784]) / np.float32(255)


def write_ink(image):
    """Write an image [784] on a sheet, as ink [300, 360] in [0, 1]."""
    sheet = np.zeros([300, 360])
    sheet[60:220, 90:250] = Image.fromarray(image.reshape(28, 28)).resize((160, 160))
    return sheet.clip(0, 1)


def add_noise(gray):
    return gray + 0.02 * np.random.default_rng(0).standard_normal(gray.shape)


def to_picture(gray):
    return Image.fromarray(np.uint8(255 * gray.clip(0, 1)))


def on_transparency(ink, color):
    picture = Image.new("RGBA", (360, 300), color)
    picture.putalpha(to_picture(ink))
    return picture


def thin(ink):
    return ndimage.distance_transform_edt(ink > 0.5) > 3


SHADOW = 0.4 * (COLUMNS + 0.3 * ROWS > 230)
RULED_LINES = 0.6 * (ROWS % 240 == 239)
DRAWINGS = {
    "pen": lambda ink: to_picture(1 - 0.9 * ink),
    "thin pen": lambda ink: to_picture(1 - 0.9 * thin(ink)),
    "chalk": lambda ink: to_picture(add_noise(0.15 + 0.7 * ink)),
    "pencil": lambda ink: to_picture(add_noise(0.9 - 0.25 * ink)),
    "shadow": lambda ink: to_picture(add_noise((1 - 0.8 * ink) * (1 - SHADOW))),
    "fading light": lambda ink: to_picture((1 - 0.8 * ink) * np.linspace(1, 0.35, 360)),
    "ruled paper": lambda ink: to_picture(1 - np.maximum(0.8 * ink, RULED_LINES)),
    "black on transparency": lambda ink: on_transparency(ink, "black"),
    "white on transparency": lambda ink: on_transparency(ink, "white"),
    "16 bits": lambda ink: Image.fromarray(np.uint16(60_000 * (1 - 0.9 * ink))),
}


def assert_framed(picture, image, path):
    """Check that a picture is framed as in MNIST; return its correlation with the image."""
    picture.save(path)
    framed = vae_helpers.frame_digit(vae_helpers.read_picture(path))
    assert (framed.shape, framed.dtype) == ((784,), np.float32)
    assert 0 <= framed.min() <= framed.max() <= 1
    ink = framed.reshape(28, 28)
    np.testing.assert_allclose(ndimage.center_of_mass(ink), [14, 14], atol=0.75)
    assert 19 <= np.ptp(np.argwhere(ink > 0.2), axis=0).max() + 1 <= 21
    return np.corrcoef(framed, image)[0, 1]


@pytest.mark.parametrize("name", DRAWINGS)
def test_a_drawn_digit_is_framed_as_in_mnist(name, digit_images, tmp_path):
    correlations = []
    for image in digit_images:
        picture = DRAWINGS[name](write_ink(image))
        correlations.append(assert_framed(picture, image, tmp_path / "drawing.png"))
    assert np.sum(np.greater(correlations, 0.7)) >= 18


def test_a_photo_of_a_digit_is_framed_as_in_mnist(digit_images, tmp_path):
    for image in digit_images:
        photo = vae_helpers.make_photo(image)
        assert assert_framed(photo, image, tmp_path / "photo.jpg") > 0.8
    assert photo == vae_helpers.make_photo(image, seed=0)
    assert photo != vae_helpers.make_photo(image, seed=1)


@pytest.mark.parametrize(
    "picture",
    [
        Image.new("L", (300, 300), 255),
        Image.new("L", (300, 300), 0),
        Image.new("RGBA", (300, 300), (0, 0, 0, 0)),
        to_picture(add_noise(np.full([300, 300], 0.6))),
        to_picture(np.linspace(0.9, 0.4, 300) * np.ones([300, 1])),
    ],
    ids=["white", "black", "transparent", "noise", "fading light"],
)
def test_a_picture_without_ink_is_refused(picture):
    with pytest.raises(ValueError, match="^there is no ink in the picture$"):
        vae_helpers.frame_digit(picture)


@pytest.mark.parametrize("factor", [1, 200, 60_000])
def test_floats_and_integers_of_any_range_become_bytes(factor, digit_images, tmp_path):
    gray = np.float32(factor * (1 - write_ink(digit_images[0])))
    path = tmp_path / "scan.tif"
    Image.fromarray(gray).save(path)
    picture = vae_helpers.read_picture(path)
    assert (picture.mode, picture.getextrema()) == ("L", (0, 255))


def test_a_narrow_strip_is_refused():
    with pytest.raises(ValueError, match="^a picture of 1×300 pixels holds no digit$"):
        vae_helpers.frame_digit(Image.new("L", (1, 300), 255))


@pytest.mark.parametrize(
    ("orientation", "turn"),
    [
        (3, Image.Transpose.ROTATE_180),
        (6, Image.Transpose.ROTATE_90),
        (8, Image.Transpose.ROTATE_270),
    ],
)
def test_a_photo_from_a_turned_camera_is_upright(orientation, turn, digit_images, tmp_path):
    upright = DRAWINGS["pen"](write_ink(digit_images[4]))
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "photo.jpg"
    upright.transpose(turn).save(path, exif=exif)
    picture = vae_helpers.read_picture(str(path))
    assert picture.size == upright.size
    np.testing.assert_allclose(np.int32(picture), np.int32(upright), atol=20)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "No such file or directory"),
        (b"This is a text.", "it is not a picture that Pillow can read"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "save HEIC files as JPEG"),
        (vae_helpers.digits_png(np.linspace(0, 1, 784)[None, None])[:100], "truncated"),
    ],
    ids=["missing", "text", "HEIC", "cut off"],
)
def test_a_file_that_is_no_picture_is_named(content, reason, tmp_path):
    path = tmp_path / "digit.png"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=f"^{path}: .*{reason}.*$"):
        vae_helpers.read_picture(path)
    with pytest.raises(ValueError, match=f"^{tmp_path}: Is a directory$"):
        vae_helpers.read_picture(tmp_path)
    with pytest.raises(ValueError, match="^~nobody-here/digit.png: No such file or directory$"):
        vae_helpers.read_picture("~nobody-here/digit.png")
