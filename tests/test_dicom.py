"""DICOM files become pictures; nothing about a patient is in a message."""

import importlib.util
import io

import numpy as np
import pytest

from fedvlm.data.images import check_pictures, open_image
from fedvlm.data.pictures import Pictures
from fedvlm.errors import FedVLMError
from test_images import noise, reason, rows_of

pytest.importorskip("pydicom", reason="needs pydicom: pip install 'fedvlm[dicom]'")


def dicom(pixels, photometric="MONOCHROME2", **elements):
    """A DICOM file; the pixels are ``[rows, columns]``, with frames or channels if there are."""
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, SecondaryCaptureImageStorage

    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.file_meta.MediaStorageSOPClassUID = SecondaryCaptureImageStorage
    ds.file_meta.MediaStorageSOPInstanceUID = "1.2.3"
    ds.PatientName, ds.PatientID = "Secret^Name", "7734"
    colour = photometric in ("RGB", "YBR_FULL")
    ds.SamplesPerPixel = 3 if colour else 1
    if colour:
        ds.PlanarConfiguration = 0
    ds.Rows, ds.Columns = pixels.shape[:2] if colour else pixels.shape[-2:]
    if pixels.ndim == 3 and not colour:
        ds.NumberOfFrames = len(pixels)
    ds.PhotometricInterpretation = photometric
    ds.BitsAllocated = ds.BitsStored = pixels.dtype.itemsize * 8
    ds.HighBit = ds.BitsStored - 1
    ds.PixelRepresentation = int(pixels.dtype.kind == "i")
    ds.PixelData = pixels.tobytes()
    for name, value in elements.items():
        setattr(ds, name, value)
    out = io.BytesIO()
    ds.save_as(out, enforce_file_format=True)
    return out.getvalue()


CT = np.array([[0, 864, 1068, 1264, 3000, 0]], np.int16)


def grey(content, **limits):
    return np.asarray(Pictures(**limits).open(content))[..., 0].tolist()


def test_a_dicom_file_is_rescaled_and_windowed_by_the_setting_or_by_itself():
    rescaled = {"RescaleSlope": 1, "RescaleIntercept": -1024}
    window = {"WindowCenter": [40.5, 0], "WindowWidth": [401, 9]}
    assert grey(dicom(CT, **rescaled, **window)) == [[0, 0, 130, 255, 255, 0]]
    assert grey(dicom(CT, **rescaled), window=(-160.0, 240.0)) == [[0, 0, 130, 255, 255, 0]]
    assert grey(dicom(CT, **rescaled)) == [[0, 73, 91, 107, 255, 0]]
    assert grey(dicom((CT // 1).astype(np.uint16)))[0][4] == round(3000 / 4095 * 255)


def test_dicom_is_inverted_for_monochrome1_and_becomes_rgb_for_colour():
    pixels = np.array([[0, 100, 255, 7]], np.uint8)
    assert grey(dicom(pixels)) == [[0, 100, 255, 7]]
    assert grey(dicom(pixels, "MONOCHROME1")) == [[255, 155, 0, 248]]
    colours = np.asarray(noise((8, 6)))
    assert np.array_equal(open_image(dicom(colours, "RGB")), colours)
    assert open_image(dicom(colours, "YBR_FULL")).mode == "RGB"


def test_the_first_frame_is_used_and_reported_and_a_name_ending_in_dcm_is_enough(tmp_path):
    frames = np.stack([np.full((4, 4), n, np.uint8) for n in (9, 90)])
    look = Pictures().look(dicom(frames))
    assert look.notes == ["first of several frames"]
    assert look.image.getpixel((0, 0)) == (9, 9, 9)
    (tmp_path / "a.dcm").write_bytes(dicom(frames)[132:])  # without the preamble
    assert open_image(tmp_path / "a.dcm").getpixel((0, 0)) == (9, 9, 9)


def test_limits_hold_for_dicom_and_no_element_of_a_file_is_in_a_message(caplog):
    huge = dicom(np.zeros((4, 4), np.uint8), Rows=60_000, Columns=60_000)
    assert "data.max_decoded" in reason(huge)
    odd = dicom(np.zeros((4, 4), np.uint8))
    for broken in (odd[:-9], odd.replace(b"MONOCHROME2 ", b"Secret^Name "), b"\0" * 128 + b"DICM"):
        assert "Secret" not in reason(broken)
    deflated = odd.replace(b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.1.2.5\0")
    assert "corrupt image" in reason(deflated)
    assert "Secret" not in caplog.text
    assert "7734" not in caplog.text
    assert "DICOM is not one of data.formats" in reason(odd, formats=("PNG",))


def test_a_compressed_file_is_read_or_named():
    odd = dicom(np.zeros((4, 4), np.uint8))
    for syntax in (
        b"1.2.840.10008.1.2.4.80\0\0",
        b"1.2.840.10008.1.2.1.99\0\0",
    ):  # JPEG-LS, deflated
        named = odd.replace(b"1.2.840.10008.1.2.1\0", syntax)
        length = odd.index(b"1.2.840.10008.1.2.1\0") - 2
        named = named[:length] + bytes([len(syntax) - 2, 0]) + named[length + 2 :]
        assert "transfer syntax" in reason(named.replace(syntax, syntax[:-2]))


def test_without_pydicom_the_message_has_the_command(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FedVLMError, match=r"pip install 'fedvlm\[dicom\]'"):
        check_pictures(rows_of(dicom(np.zeros((4, 4), np.uint8))), keep=False)
