"""Photographs of handwriting: read in MNIST's framing whatever the file, refused by name if bad."""

import contextlib
import io

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageOps
from scipy import ndimage

import vae_helpers


@pytest.fixture(scope="module")
def digit_images(small_arrays):
    """Return twenty real digits, two of each: float32 [20, 784]."""
    of_each = [np.flatnonzero(small_arrays["y_test"] == digit)[:2] for digit in range(10)]
    return small_arrays["x_test"][np.ravel(of_each)].reshape(-1, 784) / np.float32(255)


def saved(*pictures, **options):
    """Return Pillow pictures as the bytes of one file."""
    file = io.BytesIO()
    pictures[0].save(file, **{"format": "PNG", **options}, append_images=pictures[1:])
    return file.getvalue()


def read(picture, **options):
    """Save a Pillow picture, or grey values in [0, 1], as a file and read it as handwriting."""
    if isinstance(picture, np.ndarray):
        picture = Image.fromarray(np.uint8(255 * picture.clip(0, 1)))
    return vae_helpers.read_handwriting(io.BytesIO(saved(picture, **options)))[1]


def assert_alike(image, expected):
    """Check that an image shows the digit, in MNIST's framing, with strokes as wide."""
    assert (image.shape, image.dtype) == ((784,), np.float32)
    assert 0 <= image.min() <= image.max() <= 1
    assert np.corrcoef(image, expected)[0, 1] > 0.9
    ink = image.reshape(28, 28)
    np.testing.assert_allclose(ndimage.center_of_mass(ink), [14, 14], atol=0.1)
    assert 19 <= max(np.ptp(np.nonzero(ink > 0.5), axis=1)) + 1 <= 21  # its box


def test_an_image_of_28_pixels_comes_back(digit_images):
    for image in digit_images:
        photograph, again = vae_helpers.read_handwriting(vae_helpers.digits_png(image[None, None]))
        assert photograph.shape == (300, 300)
        assert_alike(again, image)


ROWS, COLUMNS = np.indices([300, 360])  # of a page
BOX = abs(np.maximum(abs(ROWS - 140) - 99, abs(COLUMNS - 175) - 114)) <= 1  # around a digit
SHADOW = COLUMNS + 0.3 * ROWS > 290  # across a part
SPECKS = np.zeros([300, 360], bool)  # of two by two pixels
for row, column in np.random.default_rng(1).integers(5, 290, [30, 2]):
    SPECKS[row : row + 2, column : column + 2] = True


def page(image, digit=160, at=(60, 90)):
    """Write an image [784] on white paper: grey values [300, 360] in [0, 1]."""
    ink = Image.fromarray(image.reshape(28, 28)).resize((digit, digit))
    paper = np.zeros([300, 360])
    paper[at[0] : at[0] + digit, at[1] : at[1] + digit] = np.clip(ink, 0, 1)
    return 1 - 0.8 * paper


def noisy(grey):
    """Add the noise of a camera and of paper."""
    random = np.random.default_rng(0)
    fibres = ndimage.gaussian_filter(random.standard_normal(grey.shape), 3)
    return grey + 0.04 * random.standard_normal(grey.shape) + 0.1 * fibres


PAGES = {
    "plain": page,
    "small, at the edge": lambda image: page(image, 90, (5, 8)),
    "in a corner": lambda image: page(image, 160, (100, 150)),
    "large": lambda image: page(image, 280, (10, 40)),
    "light that falls off to a third": lambda image: page(image) * np.linspace(1, 0.35, 360),
    "a shadow with an edge": lambda image: page(image) * (1 - 0.4 * SHADOW),
    "noise": lambda image: noisy(page(image)),
    "light ink on dark": lambda image: noisy(1 - page(image)),
    "specks": lambda image: np.where(SPECKS, 0.3, page(image)),
    "a margin line": lambda image: np.where(abs(COLUMNS - 21) <= 1, 0.3, page(image)),
}


@pytest.mark.parametrize("draw", PAGES.values(), ids=PAGES)
def test_a_page_is_read_alike_whatever_its_framing_and_light(draw, digit_images):
    for image in digit_images:
        assert_alike(read(draw(image)), image)


def cropped(image):
    """Cut an image [28, 28] close to its ink and enlarge it ten times."""
    cut = image[ndimage.find_objects(np.int8(image > 0.5))[0]]
    return np.asarray(Image.fromarray(cut).resize([10 * n for n in cut.shape[::-1]]))


def transparent(ink, colour, size=(280, 280)):
    """Draw ink, from 0 to 1 [height, width], in a colour on a transparent ground of this size."""
    picture = Image.new("RGBA", size, colour)
    picture.putalpha(Image.fromarray(np.uint8(255 * ink)).resize(size))
    return picture


CLEAR = {
    "light on dark, cut close": cropped,
    "dark on light, cut close": lambda image: 1 - cropped(image),
    "transparent, white ink": lambda image: transparent(image, "white"),
    "transparent, black ink": lambda image: transparent(image, "black"),
}
NO_SINGLE_DIGIT = {
    "in a printed box": lambda image: np.where(BOX, 0.16, page(image)),
    "on a ruled line": lambda image: np.where(abs(ROWS - 190) <= 1, 0.16, page(image)),
    "on a dark table, a little askew": lambda image: ImageOps.expand(
        Image.fromarray(np.uint8(240 * page(image))).rotate(7, expand=True, fillcolor=50),
        border=(60, 60, 66, 78),
        fill=50,
    ),
    "beside another": lambda image: np.hstack([page(image)[:, :255], page(image)[:, 80:]]),
    "a blot": lambda _: 1.0 * (np.hypot(*(np.indices([300, 300]) - 150)) >= 60),
}


@pytest.mark.parametrize("name", [*CLEAR, *NO_SINGLE_DIGIT])
def test_one_clear_digit_is_read_and_what_is_no_single_digit_refused(name, small_arrays):
    right = []
    for image in small_arrays["x_test"][:80] / np.float32(255):
        with contextlib.suppress(ValueError):
            found = read((CLEAR | NO_SINGLE_DIGIT)[name](image))
            right.append(bool(np.corrcoef(found, image.ravel())[0, 1] > 0.8))
    if name in CLEAR:
        assert right.count(True) >= 0.97 * 80
        assert right.count(False) <= 0.02 * 80
    else:
        assert all(right)
        assert len(right) <= 0.1 * 80  # those that end above the line


def test_a_thin_pen_is_thickened():
    picture = Image.new("L", (300, 300), 255)
    ImageDraw.Draw(picture).line([(80, 60), (220, 60), (120, 250)], 0, width=5)  # a 7
    framed = read(picture).reshape(28, 28)
    assert framed[:12, 10].sum() > 1.2  # the bar, of which a third would be left
    assert framed.mean() > 0.05  # 0.024 as it is drawn


def test_files_of_many_kinds(digit_images):
    grey = page(digit_images[4])
    picture = Image.fromarray(np.uint8(255 * grey))
    upside_down = Image.Exif()
    upside_down[0x0112] = 3  # turned by half a turn
    files = {
        "16 bits": (Image.fromarray(np.uint16(3000 * grey)), {}),
        "32 bits": (Image.fromarray(np.int32(70_000 * grey)), {"format": "TIFF"}),
        "floating point": (Image.fromarray(np.float32(grey)), {"format": "TIFF"}),
        "transparent": (transparent(1 - grey, "black", picture.size), {}),
        "palette": (picture.convert("P", palette=Image.Palette.ADAPTIVE), {}),
        "two colours": (picture.convert("1"), {}),
        "CMYK": (picture.convert("CMYK"), {"format": "JPEG"}),
        "turned": (picture.rotate(180), {"format": "JPEG", "exif": upside_down}),
    } | {name: (picture, {"format": name}) for name in ("WEBP", "BMP", "GIF")}
    for name, (file, options) in files.items():
        print(name)
        assert_alike(read(file, **options), digit_images[4])


GREY, WHITE = Image.new("L", (60, 60), 120), Image.new("L", (60, 60), 255)
NO_NUMBERS = Image.fromarray(np.full([9, 9], np.nan, np.float32))
PHOTOGRAPH = vae_helpers.digits_png(np.linspace(0, 1, 784)[None, None]).getvalue()
BAD_FILES = {
    "missing": (None, "No such file"),
    "text": (b"not a picture", "none of AVIF, BMP, GIF, JPEG, PNG"),
    "empty": (b"", "none of AVIF, BMP, GIF, JPEG, PNG"),
    "telephone": (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "save HEIC, of a telephone, as JPEG"),
    "cut off": (PHOTOGRAPH[: len(PHOTOGRAPH) // 2], "truncated"),
    "one grey": (saved(GREY), "nothing is written on it"),
    "one 16-bit grey": (saved(Image.new("I;16", (60, 60), 120)), "nothing is written on it"),
    "one pixel": (saved(Image.new("L", (1, 1))), "nothing is written on it"),
    "far too large": (b"P5 20000 20000 255\n", "decompression bomb"),
    "too large": (b"P5 10000 10000 255\n", "decompression bomb"),
    "animated GIF": (saved(GREY, WHITE, format="GIF", save_all=True), "2 pictures, not one"),
    "animated WebP": (saved(GREY, WHITE, format="WEBP", save_all=True), "2 pictures, not one"),
    "not a number": (saved(NO_NUMBERS, format="TIFF"), "nothing is written on it"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files_are_named(name, tmp_path):
    content, word = BAD_FILES[name]
    path = tmp_path / f"{name}.png"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=f"{name}.png: not a readable photograph.*{word}"):
        vae_helpers.read_handwriting(str(path))
    with pytest.raises(ValueError, match=f"{tmp_path}: not a readable.*directory"):
        vae_helpers.read_handwriting(tmp_path)


def test_handwriting_is_drawn_beside_what_was_made_of_it(digit_images):
    photograph, grid = np.eye(9, 7), digit_images[None, :11]
    left, right = vae_helpers.plot_handwriting(photograph, grid, title="Read as 0").axes
    np.testing.assert_array_equal(left.images[0].get_array(), photograph)
    np.testing.assert_array_equal(right.images[0].get_array()[:, 28:56], grid[0, 1].reshape(28, 28))
