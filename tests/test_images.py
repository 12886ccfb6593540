"""Pictures are opened within limits, and those that pass the check of a data set open in use."""

import hashlib
import io
import os
import struct
import subprocess
import sys
import zlib

import datasets
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from fedvlm import config as configs
from fedvlm.data.images import check_pictures, open_image
from fedvlm.data.metadata import without_metadata
from fedvlm.data.pictures import Pictures
from fedvlm.data.sources import load_rows
from fedvlm.errors import ConfigError, DataError
from fedvlm.settings.sections import DataConfig

pytestmark = pytest.mark.filterwarnings("ignore:.*EXIF|Tag data|Truncated|.*malformed MPO")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache"


def encode(image, kind="PNG", **options):
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def noise(size=(24, 18), mode="RGB"):
    pixels = np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def chunk(kind, body):
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def rows_of(*contents):
    feature = datasets.Features({"image": datasets.Image(decode=False)})
    table = {"image": [{"bytes": c, "path": None} for c in contents]}
    return datasets.Dataset.from_dict(table, features=feature)


def reason(content, **limits):
    """The reason why a picture fails, from the check and from use; both fail, or neither."""
    pictures = Pictures(**limits)
    broken = check_pictures(rows_of(content), pictures, keep=False).broken
    if not broken:
        assert pictures.open(content).mode == "RGB"
        return ""
    with pytest.raises(DataError) as caught:
        pictures.open(content)
    assert str(caught.value).removeprefix("the image does not decode: ") in broken[0]
    return broken[0]


# One path for checking and for use

MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I", "I;16", "F", "PA", "YCbCr", "LAB", "HSV")


def made(mode, kind, **options):
    """A small picture; None where Pillow does not write this mode in this format."""
    image = Image.new(mode, (9, 7)) if mode in ("PA", "LAB", "I;16") else noise((9, 7), mode)
    try:
        return encode(image, kind, **options)
    except Exception:
        return None


Image.init()
WRITABLE = sorted(Image.SAVE)


@pytest.mark.parametrize("kind", WRITABLE)
def test_every_picture_that_pillow_writes_is_read_or_named(kind):
    modes = MODES if kind != "ICNS" else ("RGB",)  # slow: many sizes
    made_of_it = [content for mode in modes if (content := made(mode, kind)) is not None]
    for content in made_of_it:
        reason(content)
    if kind in ("PNG", "JPEG", "TIFF", "WEBP", "BMP", "GIF", "PPM", "TGA", "ICO"):
        assert any(reason(content) == "" for content in made_of_it)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    kind=st.sampled_from(["PNG", "JPEG", "TIFF", "WEBP", "GIF", "AVIF", "JPEG2000"]),
    exif=st.binary(max_size=60),
    tiff=st.booleans(),
)
def test_random_exif_never_costs_the_picture(kind, exif, tiff):
    head = b"Exif\0\0" + (b"MM\0*\0\0\0\x08" if tiff else b"")
    content = made("RGB", kind, exif=head + exif)
    if content is not None:
        assert reason(content) == ""


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    kind=st.sampled_from(["PNG", "JPEG", "TIFF", "WEBP", "GIF", "BMP", "PPM", "JPEG2000"]),
    at=st.floats(0, 1),
    value=st.integers(0, 255),
    cut=st.booleans(),
)
def test_a_damaged_picture_is_read_or_named_by_check_and_use_alike(kind, at, value, cut):
    content = bytearray(made("RGB", kind))
    place = min(int(at * len(content)), len(content) - 1)
    content[place] = value
    reason(bytes(content[: place + 1] if cut else content), max_decoded=4)


# Metadata


def png_with(*chunks, after=b"IHDR"):
    content = encode(noise())
    place = content.index(after) - 4 + 12 + 13
    return content[:place] + b"".join(chunks) + content[place:]


def test_broken_png_metadata_never_cost_the_picture():
    bomb = zlib.compress(bytes(70_000_000))
    for extra in (
        chunk(b"zTXt", b"Comment\0\0" + bomb),
        chunk(b"iCCP", b"profile\0\0" + bomb),
        chunk(b"iCCP", b"profile\0\x07nothing"),
        chunk(b"eXIf", b"MM\0*\0\0\0\x08\xff\xff\0\1"),
        chunk(b"tEXt", b"a\0b")[:-1] + b"!",  # a wrong checksum
        chunk(b"gAMA", b""),
    ):
        content = png_with(extra)
        assert reason(content) == ""
        assert np.array_equal(open_image(content), noise())


def test_broken_metadata_of_jpeg_and_webp_and_tiff_never_cost_the_picture():
    jpeg = encode(noise(), "JPEG")
    segment = b"Exif\0\0MM\0*\0\0\0\x08\0\1\1\x12\0\3\xff\xff\xff\xff\0\6\0\0"
    app = b"\xff\xe1" + struct.pack(">H", len(segment) + 2) + segment
    mpf = b"\xff\xe2" + struct.pack(">H", 20) + b"MPF\0MM\0*\0\0\0\x08\xff\xff\0\0\0\0"
    assert np.array_equal(open_image(jpeg[:2] + app + mpf + jpeg[2:]), open_image(jpeg))
    tiff = encode(noise(), "TIFF", tiffinfo={34665: 99_999_999, 700: b"x", 34377: b"y"})
    assert reason(tiff) == ""
    webp = encode(noise(), "WEBP", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff")
    assert reason(webp) == ""


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_a_picture_without_metadata_has_the_same_pixels(kind):
    content = encode(noise(), kind, exif=Image.Exif().tobytes(), icc_profile=b"profile")
    bare = without_metadata(content)
    assert len(bare) < len(content) or kind == "TIFF"
    assert b"profile" not in bare or kind == "TIFF"
    assert np.array_equal(Image.open(io.BytesIO(bare)), Image.open(io.BytesIO(content)))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "JPEG2000", "PPM"])
def test_a_truncated_picture_is_corrupt(kind):
    content = encode(noise((200, 150)), kind)
    assert "corrupt image" in reason(content[: len(content) // 2])


# Limits


def header(width, height, depth=8, colour=2):
    body = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", body)


def test_a_bomb_is_refused_before_it_is_decoded():
    code = (
        "import resource, sys\nfrom fedvlm.data.images import open_image\n"
        "from fedvlm.errors import DataError\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "try: open_image(sys.stdin.buffer.read())\nexcept DataError as error: print(error)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    bomb = header(13300, 13300, colour=4) + chunk(b"IDAT", zlib.compress(bytes(20_000_000)))
    done = subprocess.run([sys.executable, "-c", code], input=bomb, capture_output=True)
    said, peak = done.stdout.decode().splitlines()
    assert "13300 x 13300 pixels" in said
    assert "data.max_decoded=256" in said
    assert int(peak) < 30_000  # KiB
    assert done.stderr == b""


def test_absurd_sizes_are_refused():
    idat = chunk(b"IDAT", b"")
    for content in (
        header(2**31 - 1, 2**31 - 1) + idat,
        encode(Image.new("1", (60_000, 3_000)), "TIFF", compression="group4"),
        encode(Image.new("1", (60_000, 3_000)), "GIF"),
        b"P6 99999 99999 255\n",
    ):
        assert "data.max_decoded" in reason(content)


@pytest.mark.parametrize("kind", ["AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "TIFF", "WEBP"])
def test_the_limit_holds_in_every_format(kind):
    content = encode(Image.new("RGB", (700, 700)), kind)
    assert "700 x 700 pixels, 2 MiB when decoded" in reason(content, max_decoded=1)


def test_a_picture_up_to_the_limit_opens_without_a_warning(recwarn):
    content = encode(Image.new("L", (10_000, 10_000)), compress_level=1)
    assert Pictures(max_decoded=400).open(content).size == (10_000, 10_000)
    assert "data.max_decoded=256" in reason(content)
    assert not recwarn.list


def test_the_limits_are_settings_and_a_refused_row_names_its_setting(tmp_path):
    table = {"image": [encode(noise()), encode(noise((900, 900)))], "question": ["What?"] * 2}
    datasets.Dataset.from_dict(table | {"chosen": ["It."] * 2}).to_parquet(tmp_path / "a.parquet")
    path = str(tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"row 1: the image has 900 x 900 .* data.max_decoded=1\b"):
        load_rows(DataConfig(path=path, max_decoded=1), 0)
    assert load_rows(DataConfig(path=path, max_decoded=1, on_error="skip"), 0)["row"][:] == [0]


def test_larger_pictures_are_shrunk_with_their_aspect_and_counted():
    pictures = Pictures(max_pixels=1000)
    for kind in ("PNG", "JPEG"):
        wide = pictures.open(encode(noise((400, 100)), kind))
        assert wide.size == (63, 15)
    assert pictures.open(encode(noise((1, 5000)))).size == (1, 1000)
    assert pictures.open(encode(noise((20, 50)))).size == (20, 50)
    found = check_pictures(rows_of(encode(noise((400, 100))), encode(noise((9, 9)))), pictures)
    assert found.notes == {"shrunk to data.max_pixels": 1}


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_an_animation_gives_its_first_frame(kind):
    first, second = Image.new("RGB", (8, 8), (250, 0, 0)), Image.new("RGB", (8, 8), (0, 0, 250))
    options = {} if kind in ("GIF", "TIFF", "PNG") else {"lossless": True}
    content = encode(first, kind, save_all=True, append_images=[second], **options)
    assert open_image(content).getpixel((3, 3)) == (250, 0, 0)


def test_no_program_is_started_for_postscript(tmp_path, monkeypatch):
    ghost = tmp_path / "gs"
    ghost.write_text(f"#!/bin/sh\ntouch {tmp_path}/started\necho 10.0\n")
    ghost.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n"
    (tmp_path / "x.png").write_bytes(eps)
    with pytest.raises(DataError, match="not an image in a known format"):
        open_image(tmp_path / "x.png")
    assert not (tmp_path / "started").exists()


def test_only_the_formats_of_the_settings_are_opened():
    assert reason(encode(noise(), "JPEG"), formats=("PNG",)).endswith("a format of data.formats")
    assert reason(encode(noise()), formats=("PNG",)) == ""
    assert configs.load({"data": {"formats": "png, jpeg"}}).data.formats == ["PNG", "JPEG"]
    with pytest.raises(ConfigError, match=r"formats is a list of AVIF, .* 'EPS' is not one"):
        configs.load({"data": {"formats": ["PNG", "EPS"]}})


def test_what_is_no_file_is_named_and_does_not_block(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    for path in ("pipe.png", "."):
        with pytest.raises(DataError, match="is not a file"):
            open_image(tmp_path / path)
    with pytest.raises(DataError):
        open_image("a\0b")


# Hashes and what is kept of a check


def test_rows_have_the_hash_of_their_pictures_bytes_in_every_form(tmp_path):
    content = encode(noise())
    (tmp_path / "a.png").write_bytes(content)
    lines = '{"image": "a.png", "question": "What?", "chosen": "It.", "image_hash": "mine"}\n'
    (tmp_path / "rows.jsonl").write_text(lines)
    table = {"image": [content], "question": ["What?"], "chosen": ["It."]}
    datasets.Dataset.from_dict(table).to_parquet(tmp_path / "rows.parquet")
    for name in ("rows.jsonl", "rows.parquet"):
        rows = load_rows(DataConfig(path=str(tmp_path / name)), 0)
        assert rows["image_hash"][:] == [hashlib.blake2b(content, digest_size=16).hexdigest()]
        assert str(rows.features["image_hash"].dtype) == "string"
    (tmp_path / "rows.jsonl").write_text(lines)
    rows = load_rows(DataConfig(path=str(tmp_path / "rows.jsonl")), 0)
    assert "mine" in [rows[0][n] for n in rows.column_names if n.startswith("source_")]


def test_paths_are_relative_to_the_file_beside_embedded_pictures_too(tmp_path):
    (tmp_path / "a.png").write_bytes(encode(noise()))
    pictures = [{"bytes": encode(noise((5, 5))), "path": "b.png"}, {"bytes": None, "path": "a.png"}]
    table = {"image": pictures, "question": ["What?"] * 2, "chosen": ["It."] * 2}
    datasets.Dataset.from_dict(table).to_parquet(tmp_path / "a.parquet")
    rows = load_rows(DataConfig(path=str(tmp_path / "a.parquet")), 0)
    assert [open_image(row["image"]).size for row in rows] == [(5, 5), (24, 18)]
    assert rows[0]["image"]["path"] == "b.png"


def test_a_sample_keeps_its_rows_hashes_and_does_not_copy_pictures(tmp_path):
    contents = [encode(Image.new("RGB", (9, 9), (i, 0, 0))) for i in range(30)]
    table = {"image": contents, "question": ["What?"] * 30, "chosen": ["It."] * 30}
    datasets.Dataset.from_dict(table).to_parquet(tmp_path / "a.parquet")
    path = str(tmp_path / "a.parquet")
    whole = load_rows(DataConfig(path=path), 0)
    some = load_rows(DataConfig(path=path, max_rows=7), 0)
    assert len(some._data) == 30
    assert [whole["image_hash"][row] for row in some["row"]] == some["image_hash"][:]
    assert some._fingerprint == load_rows(DataConfig(path=path, max_rows=7), 0)._fingerprint


def test_other_settings_and_a_damaged_file_check_again(cache, monkeypatch):
    rows = rows_of(encode(noise()), b"broken")
    looks = []
    real = Pictures.look
    monkeypatch.setattr(Pictures, "look", lambda *a, **k: looks.append(1) or real(*a, **k))
    found = check_pictures(rows)
    assert list(found.broken) == [1]
    assert len(looks) == 2
    assert check_pictures(rows) == found
    assert len(looks) == 2
    check_pictures(rows, Pictures(max_decoded=9))
    assert len(looks) == 4
    (kept, *_) = sorted((cache / "fedvlm").glob("*.json"))
    whole = kept.read_bytes()
    for damaged in (b"", b"{}", whole[:-3], whole.replace(b"corr", b"COrr")):
        for path in (cache / "fedvlm").glob("*.json"):
            path.write_bytes(damaged)
        assert check_pictures(rows) == found


def test_skipped_rows_are_counted_and_numbered_and_the_message_stays_short(tmp_path, caplog):
    table = {"image": [encode(noise())] + [b"\xff" * 9] * 60, "question": ["What?"] * 61}
    datasets.Dataset.from_dict(table | {"chosen": ["It."] * 61}).to_parquet(tmp_path / "a.parquet")
    load_rows(DataConfig(path=str(tmp_path / "a.parquet"), on_error="skip"), 0)
    (message,) = [r.message for r in caplog.records if "left out" in r.message]
    assert "left out 60 of 61 rows" in message
    assert "1, 2, 3" in message
    assert "20 and 40 more" in message
    assert len(message) <= 2000
