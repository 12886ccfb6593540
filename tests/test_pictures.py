"""Pictures that mislead: inverted TIFF, several frames, outliers, false sizes, odd files."""

import os
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fedvlm.after.inputs import from_images, rows_to_ask
from fedvlm.data.depth import CROWDED, eight_bits
from fedvlm.data.images import check_pictures, open_image
from fedvlm.data.metadata import without_metadata
from fedvlm.data.pictures import INVERTED, Pictures, Refused
from fedvlm.errors import DataError, FedVLMError
from fedvlm.settings.sections import DataConfig
from test_images import chunk, encode, header, noise, rows_of

RAMP = np.linspace(0, 4095, 64 * 48).reshape(48, 64).astype(np.uint16)


def notes(content, **limits):
    return Pictures(**limits).look(content).notes


def tiff(pixels, photometric, form=1):
    """A TIFF whose smallest value is white (photometric 0) or black (1)."""
    height, width = pixels.shape
    tags = {256: width, 257: height, 258: pixels.itemsize * 8, 259: 1, 262: photometric}
    tags |= {273: 8 + 2 + 11 * 12 + 4, 277: 1, 278: height, 279: pixels.nbytes, 284: 1, 339: form}
    table = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return b"II*\0\x08\0\0\0" + struct.pack("<H", 11) + table + bytes(4) + pixels.tobytes()


@pytest.mark.parametrize(("kind", "form"), [("u1", 1), ("<u2", 1), ("<f4", 3)])
def test_a_tiff_whose_smallest_value_is_white_is_inverted_at_every_depth(kind, form):
    pixels = RAMP.astype(kind) / 4095 if form == 3 else RAMP.astype(kind)
    pixels = pixels.astype(kind)
    white, black = (tiff(pixels, photometric, form) for photometric in (0, 1))
    assert np.array_equal(255 - np.asarray(open_image(white)), open_image(black))
    assert (INVERTED in notes(white)) == (kind != "u1")
    assert INVERTED not in notes(black)
    if kind == "<u2":
        inverted = np.asarray(Pictures(window=(0.0, 8190.0)).open(white))
        assert (inverted.min(), inverted.max()) == (255 - 128, 255)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF", "AVIF", "MPO"])
def test_files_of_several_frames_are_counted(kind):
    first, *more = (noise((40, 30)).rotate(90 * n) for n in range(3))
    several = encode(first, kind, save_all=True, append_images=more)
    found = check_pictures(rows_of(several, encode(first, kind)), keep=False)
    assert found.notes == {"first of several frames": 1}


def test_a_gif_that_is_broken_behind_its_first_frame_is_read():
    first, second = noise((40, 30)), noise((40, 30)).rotate(90)
    alone, several = (
        encode(first, "GIF"),
        encode(first, "GIF", save_all=True, append_images=[second]),
    )
    content = several[: len(alone) + 5] + b"\x2c\xff"
    assert np.array_equal(open_image(content), open_image(alone))


def test_outliers_that_leave_little_grey_are_counted_with_the_remedy(caplog):
    hot = RAMP.copy()
    hot[0, 0] = 65535
    padded = RAMP.astype(np.int32) - 1000
    padded[:9] = -32768
    wide = RAMP.astype(np.float32)
    wide[0, :2] = np.nan, 1e30
    bright = np.full((48, 64, 3), 999, ">u2")
    bright[0, 0] = 65535
    lines = b"".join(b"\0" + row.tobytes() for row in bright)
    colour = header(64, 48, 16, 2) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")
    for content in (*(encode(Image.fromarray(p), "TIFF") for p in (hot, padded, wide)), colour):
        assert CROWDED in notes(content)
    assert notes(encode(Image.fromarray(padded), "TIFF"), window=(-1000.0, 3095.0)) == [
        "data.window"
    ]
    content = encode(Image.fromarray(hot), "PNG")
    check_pictures(rows_of(content), keep=False).report("the rows")
    warning = next(r for r in caplog.records if "nearly one shade" in r.getMessage())
    assert "1 pictures" in warning.getMessage()
    assert "data.window" in warning.getMessage()


@settings(max_examples=30, deadline=None)
@given(
    low=st.integers(-2000, 0),
    width=st.integers(300, 60_000),
    padding=st.floats(0, 0.4),
    odd=st.booleans(),
)
def test_ordinary_pictures_are_not_called_crowded(low, width, padding, odd):
    pixels = np.linspace(low, low + width, 48 * 64).astype(np.int32 if odd else np.float32)
    pixels[: int(padding * pixels.size)] = pixels[0]
    assert CROWDED not in eight_bits(pixels.reshape(48, 64))[1]
    mask = np.zeros((48, 64), np.uint16)
    mask[: 1 + int(padding * 40)] = 65535
    assert CROWDED not in eight_bits(mask)[1]


LARGE = 1500
BOMB = header(LARGE, LARGE, colour=6) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def liars():
    """Files that claim 16 or 128 pixels a side and hold a picture of 1500."""
    entry = struct.pack("<BBBBHHII", 16, 16, 0, 0, 1, 32, len(BOMB), 22)
    yield "ICO with PNG", b"\0\0\1\0\1\0" + entry + BOMB
    dib = struct.pack("<IiiHHIIiiII", 40, LARGE, 2 * LARGE, 1, 32, 0, 0, 0, 0, 0, 0)
    yield "ICO with DIB", b"\0\0\1\0\1\0" + entry + dib + bytes(99)
    jpeg2000 = encode(Image.new("RGB", (LARGE, LARGE)), "JPEG2000")
    for name, inner in (("PNG", BOMB), ("JPEG 2000", jpeg2000)):
        block = b"ic07" + struct.pack(">I", 8 + len(inner)) + inner
        yield f"ICNS with {name}", b"icns" + struct.pack(">I", 8 + len(block)) + block
    jpeg = encode(Image.new("RGB", (LARGE, LARGE)), "JPEG")
    places = struct.pack("<16I16II", 160, *[0] * 15, len(jpeg), *[0] * 15, 0)
    yield "BLP", b"BLP1" + struct.pack("<iIiiII", 0, 0, 16, 16, 5, 0) + places + jpeg


@pytest.mark.parametrize(("name", "content"), liars(), ids=lambda value: str(value)[:20])
def test_a_picture_inside_a_picture_is_refused_before_it_is_decoded(name, content, monkeypatch):
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail(f"{name} was decoded"))
    with pytest.raises(Refused, match="1500 x 1500 pixels"):
        Pictures(max_decoded=4).look(content)


def test_an_icon_within_the_limit_opens():
    for kind in ("ICO", "ICNS"):
        assert open_image(encode(noise((64, 64)), kind)).size[0] >= 64
    assert open_image(encode(noise((32, 32)), "ICO", bitmap_format="bmp")).size == (32, 32)


def test_an_empty_picture_is_called_empty(tmp_path):
    (tmp_path / "a.png").write_bytes(b"")
    for value in (b"", tmp_path / "a.png", {"bytes": b"", "path": None}):
        with pytest.raises(DataError, match="the picture is empty"):
            open_image(value)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_the_orientation_can_be_kept_without_other_metadata(kind):
    exif = Image.Exif()
    exif[0x0112] = 6
    content = encode(noise(), kind, exif=exif, icc_profile=b"profile")
    bare = without_metadata(content, exif=True)
    assert b"profile" not in bare
    assert open_image(bare).size == (18, 24)
    assert open_image(without_metadata(content)).size == (24, 18)


def test_a_picture_with_other_broken_metadata_is_the_right_way_up():
    exif = Image.Exif()
    exif[0x0112] = 6
    content = encode(noise(), exif=exif)
    bomb = chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(70_000_000)))
    turned = open_image(content[:33] + bomb + content[33:])
    assert np.array_equal(turned, open_image(content))
    assert turned.size == (18, 24)


# Folders and the Python interface


def test_a_folder_follows_links_and_names_what_is_no_file(tmp_path, caplog):
    folder, other = tmp_path / "a", tmp_path / "b"
    folder.mkdir()
    other.mkdir()
    noise().save(folder / "x.png")
    noise().save(other / "y.png")
    (folder / "linked").symlink_to(other)
    (folder / "circle").symlink_to(folder)
    (folder / "gone.jpg").symlink_to("nowhere")
    os.mkfifo(folder / "pipe.jpg")
    names = rows_to_ask(DataConfig(), folder, "What?")["name"][:]
    assert names == [str(folder / "linked" / "y.png"), str(folder / "x.png")]
    (warning,) = caplog.messages
    assert warning.startswith("left out 2 links that lead nowhere, special files")
    assert warning.endswith(": gone.jpg, pipe.jpg")


def test_a_name_that_is_no_utf8_is_named_and_skipped_on_request(tmp_path, caplog):
    noise().save(tmp_path / "ok.png")
    with open(os.fsencode(tmp_path) + b"/caf\xe9.png", "wb") as file:
        file.write(encode(noise()))
    with pytest.raises(DataError, match=r"1 of 2 .*caf\\xe9\.png': its name is not UTF-8"):
        rows_to_ask(DataConfig(), tmp_path, "What?")
    rows = rows_to_ask(DataConfig(on_error="skip"), tmp_path, "What?")
    assert rows["name"][:] == [str(tmp_path / "ok.png")]
    assert r"caf\xe9.png" in caplog.text


def test_paths_and_questions_that_cannot_be_used_are_plain_errors(tmp_path):
    for source in ("x" * 300, "x" * 300 + ".png"):
        with pytest.raises(FedVLMError):
            rows_to_ask(DataConfig(), source, "What?")
    with pytest.raises(DataError, match="its file cannot be read: File name too long"):
        from_images(["x" * 300 + ".png"], "What?")
    for question, why in ((None, "is a text"), (b"Q", "is a text"), ("\ud800", "half a surrogate")):
        with pytest.raises(DataError, match=why):
            from_images([noise()], question)
    with pytest.raises(DataError, match="half a surrogate"):
        rows_to_ask(DataConfig(), tmp_path, "a \udfff")


def test_what_is_done_to_a_picture_in_memory_is_reported(caplog):
    caplog.set_level("INFO", "fedvlm")
    from_images([Image.fromarray(RAMP)], "What?")
    assert "12 bits: 1" in caplog.text
