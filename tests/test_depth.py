"""Pictures of more than 8 bits become 8 bits, by their content or by a window."""

import zlib

import datasets
import numpy as np
import pytest
import yaml
from PIL import Image

from fedvlm import config as configs
from fedvlm.data.images import open_image
from fedvlm.data.pictures import Pictures
from fedvlm.data.sources import load_rows
from fedvlm.errors import ConfigError
from fedvlm.settings.sections import DataConfig
from test_images import chunk, encode, header, noise


def levels(pixels, kind="TIFF", **limits):
    content = encode(Image.fromarray(pixels), kind)
    return np.asarray(Pictures(**limits).open(content))[..., 0]


RAMP = np.linspace(0, 1, 48 * 48).reshape(48, 48)


@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
def test_unsigned_pictures_fill_the_smallest_range_that_holds_them(bits):
    pixels = (RAMP * (2**bits - 1)).astype(np.uint16)
    expected = np.rint(pixels * (255.0 / (2**bits - 1)))
    assert np.array_equal(levels(pixels, "PNG"), expected)
    assert levels(pixels // 2 + 1, "PNG").max() >= 32


def test_signed_and_float_pictures_go_from_their_minimum_to_their_maximum():
    for pixels in ((RAMP * 3000 - 1000).astype(np.int32), (RAMP * 3000 - 1000).astype(np.float32)):
        grey = levels(pixels)
        assert (grey.min(), grey.max(), len(np.unique(grey))) == (0, 255, 256)
    assert levels((RAMP * 0.01).astype(np.float32)).max() == 255
    assert levels((RAMP * 3).astype(np.float32)).max() == 255


def test_eight_bits_and_the_conventional_ranges_of_floats_are_kept():
    half = (RAMP * 0.5).astype(np.float32)
    assert np.array_equal(levels(half), np.rint(half.astype(float) * 255))
    grey = noise(mode="L")
    assert np.array_equal(np.asarray(open_image(encode(grey)))[..., 0], grey)
    odd = np.array([[np.nan, -np.inf], [np.inf, 0.5]], np.float32)
    assert levels(odd).shape == (2, 2)
    assert levels(np.array([[-3e38, 3e38]], np.float32)).tolist() == [[0, 255]]


def test_a_window_maps_its_range_and_leaves_eight_bits_alone():
    pixels = np.array([[-1000, -160, 44, 240, 2000]], np.int32)
    assert levels(pixels, window=(-160.0, 240.0)).tolist() == [[0, 0, 130, 255, 255]]
    grey = noise(mode="L")
    assert np.array_equal(np.asarray(Pictures(window=(0.0, 9.0)).open(encode(grey)))[..., 0], grey)
    for given in ("[-160,240]", "-160,240"):
        assert configs.load({}, f"data.window={given}").data.window == (-160, 240)
    kept = configs.dump(configs.load({}, "data.window=[-160,240]"))
    assert configs.load(yaml.safe_load(kept)).data.window == (-160, 240)
    for wrong in (5, [1], "a"):
        with pytest.raises(ConfigError, match=r"window is \[low, high\]"):
            configs.load({"data": {"window": wrong}})
    with pytest.raises(ConfigError, match="low below high"):
        configs.load({"data": {"window": [5, 5]}})


def png16(values, colour):
    """A PNG of 16 bits a channel, which Pillow does not write."""
    lines = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    body = header(*values.shape[1::-1], 16, colour) + chunk(b"IDAT", zlib.compress(lines))
    return body + chunk(b"IEND", b"")


def test_colour_of_twelve_bits_in_sixteen_is_scaled_and_full_colour_stays():
    twelve = (RAMP[..., None] * [4095, 2000, 100]).astype(np.uint16)
    expected = np.rint(twelve * (255.0 / 4095))
    assert np.array_equal(open_image(png16(twelve, 2)), expected)
    assert Pictures().look(png16(twelve, 2)).notes == ["12 bits of 16 in colour"]
    full = (RAMP[..., None] * [65535, 2000, 100]).astype(np.uint16)
    assert np.array_equal(open_image(png16(full, 2)), full >> 8)
    opaque = np.full((48, 48, 1), 65535)
    assert np.array_equal(open_image(png16(np.dstack((twelve, opaque)), 6)), expected)
    grey = open_image(png16(np.dstack((twelve[..., :1], opaque)), 4))
    assert np.array_equal(np.asarray(grey)[..., 1], expected[..., 0])


def test_the_number_of_scaled_pictures_is_reported_once(tmp_path, caplog):
    twelve = encode(Image.fromarray((RAMP * 4095).astype(np.uint16)))
    full = encode(Image.fromarray((RAMP * 65535).astype(np.uint16)))
    table = {"image": [twelve, twelve, full], "question": ["What?"] * 3, "chosen": ["It."] * 3}
    datasets.Dataset.from_dict(table).to_parquet(tmp_path / "a.parquet")
    for _ in range(2):  # the second time from the cache
        caplog.clear()
        load_rows(DataConfig(path=str(tmp_path / "a.parquet")), 0)
        assert [r.message for r in caplog.records if "12 bits: 2, 16 bits: 1" in r.message]
