"""Photographs of handwriting: read in MNIST's framing whatever the file, refused by name if bad."""

import io
import zlib

import numpy as np
import pytest
from PIL import Image, ImageDraw
from scipy import ndimage

import vae_helpers


@pytest.fixture(scope="module")
def digit_images(small_arrays):
    """Return twenty real digits, two of each: float32 [20, 784]."""
    digits = small_arrays["y_test"]
    first = np.concatenate([np.flatnonzero(digits == digit)[:2] for digit in range(10)])
    return small_arrays["x_test"][first].reshape(-1, 784) / np.float32(255)


@pytest.fixture(scope="module")
def few_digits(small_arrays):
    """Return eighty real digits: float32 [80, 784]."""
    return small_arrays["x_test"][:80].reshape(-1, 784) / np.float32(255)


def page(image, digit=160, at=(60, 90), size=(300, 360)):
    """Write an image [784] on white paper: grey values [height, width] in [0, 1]."""
    ink = Image.fromarray(image.reshape(28, 28)).resize((digit, digit))
    paper = np.zeros(size)
    paper[at[0] : at[0] + digit, at[1] : at[1] + digit] = np.clip(ink, 0, 1)
    return 1 - 0.8 * paper


def read(picture, **options):
    """Save a Pillow picture, or grey values in [0, 1], as a file and read it as handwriting."""
    if isinstance(picture, np.ndarray):
        picture = Image.fromarray(np.uint8(255 * picture.clip(0, 1)))
    file = io.BytesIO()
    picture.save(file, **{"format": "PNG", **options})
    return vae_helpers.read_handwriting(file)[1]


def assert_alike(image, expected):
    """Check that an image shows the digit, in the same place, with strokes as wide."""
    assert image.shape == (784,)
    assert image.dtype == np.float32
    assert image.min() >= 0
    assert image.max() <= 1
    assert np.corrcoef(image, expected)[0, 1] > 0.9


def test_an_image_of_28_pixels_comes_back(digit_images):
    for image in digit_images:
        photograph, again = vae_helpers.read_handwriting(vae_helpers.digits_png(image[None, None]))
        assert photograph.shape == (300, 300)
        assert_alike(again, image)


def test_framing_is_that_of_mnist(digit_images):
    for image in digit_images:
        ink = read(page(image)).reshape(28, 28)
        np.testing.assert_allclose(ndimage.center_of_mass(ink), [14, 14], atol=0.1)
        box = max(np.ptp(np.nonzero(ink > 0.5), axis=1)) + 1
        assert 19 <= box <= 21


def test_framing_does_not_depend_on_place_and_size(digit_images):
    for image in digit_images:
        for digit, at in ((90, (5, 8)), (160, (100, 150)), (280, (10, 40))):
            assert_alike(read(page(image, digit, at)), image)


def shaded(grey):
    """Let the light fall off to a third of itself across the picture."""
    return grey * np.linspace(1, 0.35, grey.shape[1])


def in_shadow(grey):
    """Lay a shadow with an edge across a part of the picture."""
    rows, columns = np.indices(grey.shape)
    return grey * np.where(columns + 0.3 * rows > 290, 0.6, 1)


def noisy(grey):
    """Add the noise of a camera and of paper."""
    random = np.random.default_rng(0)
    fibres = ndimage.gaussian_filter(random.standard_normal(grey.shape), 3)
    return grey + 0.04 * random.standard_normal(grey.shape) + 0.1 * fibres


def specked(grey):
    """Scatter dark specks of two pixels."""
    grey = grey.copy()
    for row, column in np.random.default_rng(1).integers(5, 290, [30, 2]):
        grey[row : row + 2, column : column + 2] = 0.3
    return grey


def with_margin_line(grey):
    """Draw a line along the left edge from top to bottom."""
    grey = grey.copy()
    grey[:, 20:23] = 0.3
    return grey


@pytest.mark.parametrize("spoil", [shaded, in_shadow, noisy, specked, with_margin_line])
def test_ink_is_told_from_paper(spoil, digit_images):
    for image in digit_images:
        assert_alike(read(spoil(page(image))), image)


def test_light_ink_on_dark(digit_images):
    for image in digit_images:
        assert_alike(read(noisy(1 - page(image))), image)


def share_read_right(digits, draw):
    """Return how many of MNIST-like digits, drawn as pictures, are read right, and how many not."""
    right = wrong = 0
    for image in digits:
        try:
            found = read(draw(image.reshape(28, 28)))
        except ValueError:
            continue
        alike = np.corrcoef(found, image)[0, 1] > 0.8
        right, wrong = right + alike, wrong + (not alike)
    return right / len(digits), wrong / len(digits)


def cropped(image):
    """Cut an image [28, 28] close to its ink and enlarge it ten times."""
    rows, columns = np.nonzero(image > 0.5)
    cut = image[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
    return np.asarray(Image.fromarray(cut).resize([10 * n for n in cut.shape[::-1]]))


def transparent(image, colour):
    """Draw an image [28, 28] in a colour on a transparent ground."""
    picture = Image.new("RGBA", (280, 280), colour)
    picture.putalpha(Image.fromarray(np.uint8(255 * image)).resize(picture.size))
    return picture


@pytest.mark.parametrize(
    "draw",
    [
        cropped,
        lambda image: 1 - cropped(image),
        lambda image: transparent(image, "white"),
        lambda image: transparent(image, "black"),
    ],
)
def test_either_polarity_cut_close_or_transparent(draw, few_digits):
    right, wrong = share_read_right(few_digits, draw)
    assert right >= 0.97
    assert wrong <= 0.02


def test_a_thin_pen_is_thickened():
    picture = Image.new("L", (300, 300), 255)
    ImageDraw.Draw(picture).line([(80, 60), (220, 60), (120, 250)], 0, width=5)  # a 7
    framed = read(picture).reshape(28, 28)
    assert framed[:12, 10].sum() > 1.2  # the bar, of which a third would be left
    assert framed.mean() > 0.05  # 0.024 as it is drawn


def in_a_box(image):
    """Draw a printed box around a digit, away from the picture's edge."""
    picture = Image.fromarray(np.uint8(255 * page(image)))
    ImageDraw.Draw(picture).rectangle([60, 40, 290, 240], outline=40, width=3)
    return picture


def on_a_line(image):
    """Let a ruled line run through a digit's foot from edge to edge."""
    picture = Image.fromarray(np.uint8(255 * page(image)))
    ImageDraw.Draw(picture).line([0, 190, 360, 190], fill=40, width=3)
    return picture


def on_a_table(image):
    """Lay the sheet on a dark table, a little askew."""
    sheet = Image.fromarray(np.uint8(240 * page(image))).convert("LA")
    sheet = sheet.rotate(7, expand=True)
    table = Image.new("L", (520, 480), 50)
    table.paste(sheet.getchannel(0), (60, 60), sheet.getchannel(1))
    return table


def beside_another(image):
    """Write a digit twice."""
    return np.hstack([page(image, at=(60, 90))[:, :255], page(image, at=(60, 90))[:, 80:]])


def a_blot(image):
    """Fill a disc, whatever the digit."""
    rows, columns = np.indices([300, 300]) - 150
    return 1.0 - (np.hypot(rows, columns) < 60)


@pytest.mark.parametrize("draw", [in_a_box, on_a_line, on_a_table, beside_another, a_blot])
def test_what_is_no_single_digit_on_plain_ground_is_refused(draw, few_digits):
    right, wrong = share_read_right(few_digits, draw)
    assert wrong == 0
    assert right <= 0.1  # those that end above the line


def test_files_of_many_kinds(digit_images):
    grey = page(digit_images[4])
    bytes_ = np.uint8(255 * grey)
    picture = Image.fromarray(bytes_)
    ink = Image.new("RGBA", picture.size, "black")
    ink.putalpha(Image.fromarray(255 - bytes_))
    upside_down = Image.Exif()
    upside_down[0x0112] = 3  # turned by half a turn
    files = {
        "16 bits": (Image.fromarray(np.uint16(3000 * grey)), {}),
        "32 bits": (Image.fromarray(np.int32(70_000 * grey)), {"format": "TIFF"}),
        "floating point": (Image.fromarray(np.float32(grey)), {"format": "TIFF"}),
        "transparent": (ink, {}),
        "palette": (picture.convert("P", palette=Image.Palette.ADAPTIVE), {}),
        "two colours": (picture.convert("1"), {}),
        "CMYK": (picture.convert("CMYK"), {"format": "JPEG"}),
        "WebP": (picture, {"format": "WEBP"}),
        "BMP": (picture, {"format": "BMP"}),
        "GIF": (picture, {"format": "GIF"}),
        "turned": (picture.rotate(180), {"format": "JPEG", "exif": upside_down}),
    }
    for name, (file, options) in files.items():
        print(name)
        assert_alike(read(file, **options), digit_images[4])


def png_of_size(width, height):
    """Return a PNG file whose header promises so many pixels and holds none."""
    header = b"IHDR" + width.to_bytes(4, "big") + height.to_bytes(4, "big") + b"\x08\0\0\0\0"
    chunk = (13).to_bytes(4, "big") + header + zlib.crc32(header).to_bytes(4, "big")
    return b"\x89PNG\r\n\x1a\n" + chunk + b"\0\0\0\0IDAT" + zlib.crc32(b"IDAT").to_bytes(4, "big")


def saved(*pictures, **options):
    """Return pictures as the bytes of one file."""
    file = io.BytesIO()
    pictures[0].save(file, **{"format": "PNG", **options}, append_images=pictures[1:])
    return file.getvalue()


GREY, WHITE = Image.new("L", (60, 60), 120), Image.new("L", (60, 60), 255)
PHOTOGRAPH = vae_helpers.digits_png(np.linspace(0, 1, 784)[None, None]).getvalue()
BAD_FILES = {
    "text": (b"not a picture", "none of AVIF, BMP, GIF, JPEG, PNG"),
    "empty": (b"", "none of AVIF, BMP, GIF, JPEG, PNG"),
    "telephone": (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "save HEIC, of a telephone, as JPEG"),
    "cut off": (PHOTOGRAPH[: len(PHOTOGRAPH) // 2], "truncated"),
    "one grey": (saved(GREY), "nothing is written on it"),
    "one 16-bit grey": (saved(Image.new("I;16", (60, 60), 120)), "nothing is written on it"),
    "one pixel": (saved(Image.new("L", (1, 1))), "nothing is written on it"),
    "far too large": (png_of_size(20_000, 20_000), "decompression bomb"),
    "too large": (png_of_size(10_000, 10_000), "decompression bomb"),
    "animated GIF": (saved(GREY, WHITE, format="GIF", save_all=True), "2 pictures, not one"),
    "animated WebP": (saved(GREY, WHITE, format="WEBP", save_all=True), "2 pictures, not one"),
    "not a number": (
        saved(Image.fromarray(np.full([9, 9], np.nan, np.float32)), format="TIFF"),
        "nothing is written on it",
    ),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files_are_named(name, tmp_path):
    content, word = BAD_FILES[name]
    path = tmp_path / f"{name}.png"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"{name}.png: not a readable photograph.*{word}"):
        vae_helpers.read_handwriting(str(path))


def test_missing_files_and_folders_are_named(tmp_path):
    for path in (tmp_path, tmp_path / "nowhere.png"):
        with pytest.raises(ValueError, match=path.name):
            vae_helpers.read_handwriting(path)


def test_handwriting_is_drawn_beside_what_was_made_of_it(digit_images):
    photograph, grid = np.eye(9, 7), digit_images[None, :11]
    left, right = vae_helpers.plot_handwriting(photograph, grid, title="Read as 0").axes
    np.testing.assert_array_equal(left.images[0].get_array(), photograph)
    np.testing.assert_array_equal(right.images[0].get_array()[:, 28:56], grid[0, 1].reshape(28, 28))
