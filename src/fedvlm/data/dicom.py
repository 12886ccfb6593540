"""DICOM files as 8-bit pictures, through ``pydicom``: ``pip install 'fedvlm[dicom]'``.

Only the elements that the pixels need are read. No other element, such as a patient's name, reaches
a message: pydicom's own messages may quote them, so they are not passed on.
"""

from __future__ import annotations

import importlib.util
import logging
import warnings
from collections.abc import Callable
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from fedvlm.data.depth import Window, eight_bits, scaled
from fedvlm.errors import DataError, FedVLMError

SEVERAL = "first of several frames"
_MAGIC = slice(128, 132)
HEAD = 132  # bytes that hold the magic
_META = 2048  # bytes that hold the transfer syntax
_DEFLATED = b"1.2.840.10008.1.2.1.99"
_ELEMENTS = (
    *("Rows", "Columns", "SamplesPerPixel", "BitsAllocated", "NumberOfFrames"),
    *("PhotometricInterpretation", "RescaleSlope", "RescaleIntercept", "ModalityLUTSequence"),
    *("WindowCenter", "WindowWidth", "VOILUTFunction", "VOILUTSequence", "PixelRepresentation"),
    *("RedPaletteColorLookupTableDescriptor", "RedPaletteColorLookupTableData"),
    *("GreenPaletteColorLookupTableDescriptor", "GreenPaletteColorLookupTableData"),
    *("BluePaletteColorLookupTableDescriptor", "BluePaletteColorLookupTableData"),
    *("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"),
)
# Sequences of a multi-frame file that hold a frame's rescaling and window.
_GROUPS = ("PixelValueTransformationSequence", "FrameVOILUTSequence")
_MOVED = ("RescaleSlope", "RescaleIntercept", "WindowCenter", "WindowWidth", "VOILUTFunction")

Fits = Callable[[tuple[int, int], int], None]


def is_dicom(head: bytes, name: str = "") -> bool:
    """Whether a file is DICOM, from its first :data:`HEAD` bytes and its name."""
    return head[_MAGIC] == b"DICM" or name.lower().endswith((".dcm", ".dicom"))


def open_dicom(
    stream: BinaryIO, window: Window | None, fits: Fits
) -> tuple[Image.Image, list[str]]:
    """Decodes the first frame: grey (L) or RGB.

    Stored values are rescaled (slope and intercept, or the modality LUT). Then they are mapped to 8
    bits by ``window``, by the file's own LUT or window, or by content, in this order. MONOCHROME1
    is inverted. YBR and palettes become RGB.

    Args:
        stream: the file, at its beginning.
        window: ``data.window``, in rescaled values such as Hounsfield units.
        fits: called with (width, height) and the bytes a pixel before anything is decoded.

    Returns:
        The picture, and what was done to it.

    Raises:
        DataError: the file cannot be used. The message holds no element of the file.
        FedVLMError: pydicom is not installed.
    """
    if importlib.util.find_spec("pydicom") is None:
        raise FedVLMError(
            "the data have DICOM files, which need pydicom: pip install 'fedvlm[dicom]', or leave "
            "DICOM out of data.formats"
        )
    warnings.filterwarnings("ignore", module="pydicom")  # its messages quote elements
    logging.getLogger("pydicom").propagate = False
    try:
        return _opened(stream, window, fits)
    except DataError:
        raise
    except Exception as error:
        raise DataError(f"pydicom cannot decode it ({type(error).__name__})") from None


def _opened(stream: BinaryIO, window: Window | None, fits: Fits) -> tuple[Image.Image, list[str]]:
    import pydicom
    from pydicom.pixels import pixel_array

    if _DEFLATED in stream.read(_META):  # pydicom inflates it without a limit
        raise DataError(
            "its transfer syntax (deflated) is not supported; convert it, as by dcmconv"
        )
    stream.seek(0)
    header = pydicom.dcmread(
        stream, force=True, stop_before_pixels=True, specific_tags=list(_ELEMENTS)
    )
    if "Rows" not in header or "Columns" not in header:
        raise DataError("not a DICOM file with a picture")
    width, height = int(header.Columns), int(header.Rows)
    samples = int(header.get("SamplesPerPixel") or 1)
    fits((width, height), max(3, samples * int(header.BitsAllocated) // 8))
    syntax = header.file_meta.get("TransferSyntaxUID") or _assumed(header)
    stream.seek(0)
    try:
        pixels = pixel_array(stream, index=0, transfer_syntax_uid=syntax)
    except (RuntimeError, NotImplementedError) as error:
        name = getattr(syntax, "name", "unknown")
        raise DataError(
            f"pydicom cannot decode its transfer syntax ('{name:.60}'); install pylibjpeg with "
            "its plugins, or convert the file"
        ) from error
    notes = [SEVERAL] if int(header.get("NumberOfFrames") or 1) > 1 else []
    _move_frame(header)
    kind = str(header.get("PhotometricInterpretation"))
    if kind == "PALETTE COLOR":
        from pydicom.pixels import apply_color_lut

        pixels = apply_color_lut(pixels, header)
    if pixels.ndim == 3:  # RGB; pixel_array converts YBR
        if pixels.dtype != np.uint8:
            pixels, done = eight_bits(pixels)
            notes += done
        return Image.fromarray(pixels), notes
    grey, done = _grey(pixels, header, window)
    return Image.fromarray(255 - grey if kind == "MONOCHROME1" else grey), [*notes, *done]


def _assumed(header: Any) -> Any:
    """The transfer syntax of a file without a meta header, as pydicom found it in the elements."""
    from pydicom import uid

    implicit, little = header.original_encoding
    if implicit:
        return uid.ImplicitVRLittleEndian
    return uid.ExplicitVRLittleEndian if little else uid.ExplicitVRBigEndian


def _move_frame(header: Any) -> None:
    """Moves the first frame's rescaling and window to where single-frame files have them."""
    for groups in ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"):
        for frame in (header.get(groups) or [])[:1]:
            for group in _GROUPS:
                for item in (frame.get(group) or [])[:1]:
                    for name in _MOVED:
                        if name in item:
                            setattr(header, name, item[name].value)


def _grey(pixels: np.ndarray, header: Any, window: Window | None) -> tuple[np.ndarray, list[str]]:
    """Grey values in 8 bits, and what was done to them."""
    from pydicom.pixels import apply_modality_lut, apply_voi

    values = apply_modality_lut(pixels, header)
    if window:
        return eight_bits(values, window)
    if header.get("VOILUTSequence"):
        descriptor = header.VOILUTSequence[0].LUTDescriptor
        high = (1 << int(descriptor[2])) - 1
        return scaled(apply_voi(values, header), 0, high), ["the file's LUT"]
    centre, width = (_first(header.get(name)) for name in ("WindowCenter", "WindowWidth"))
    if centre is not None and width is not None and width > 0:
        function = str(header.get("VOILUTFunction") or "LINEAR")
        return _windowed(values, centre, width, function), ["the file's window"]
    if values.dtype == np.uint8:
        return values, []
    return eight_bits(values)


def _windowed(values: np.ndarray, centre: float, width: float, function: str) -> np.ndarray:
    """The window of DICOM PS3.3, C.11.2.1.2 and C.11.2.1.3."""
    if function == "SIGMOID":
        steps = np.clip(-4 * (values.astype(np.float64) - centre) / width, -700, 700)
        return scaled(1 / (1 + np.exp(steps)), 0.0, 1.0)
    if function == "LINEAR" and width > 1:
        centre, width = centre - 0.5, width - 1
    return scaled(values, centre - width / 2, centre + width / 2)


def _first(value: Any) -> float | None:
    """The first of several alternatives."""
    if value is None or value == "":
        return None
    if isinstance(value, str) or not hasattr(value, "__getitem__"):
        return float(value)
    return float(value[0]) if len(value) else None
