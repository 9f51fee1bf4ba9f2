"""Readers of other images: FreeSurfer's .mgz, MINC by nibabel, MetaImage and NRRD by SimpleITK, pictures by Pillow."""

from __future__ import annotations

import bz2
import io
import re
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel
import numpy as np

from companion.data.intake import kinds, streams
from companion.data.intake.images import _frame, _voxel_mm, check_affine, finite
from companion.data.intake.records import Description, Unreadable, Volume
from companion.extras import extra

MGH, MINC, ITK = (".mgz", ".mgh"), (".mnc", ".mnc.gz"), (".mha", ".mhd", ".nrrd", ".nhdr")
PICTURES = (".png", ".tif", ".tiff", ".bmp", ".jpg", ".jpeg")
BRAINWEB = (".rawb", ".raws", ".rawb.gz", ".raws.gz")
BRAINWEB_SHAPE, BRAINWEB_MM = (362, 434, 362), 0.5  # (z, y, x) of the 20 normal models, right, anterior, superior
MGH_TYPES = {0: ">u1", 1: ">i4", 3: ">f4", 4: ">i2", 10: ">u2"}
LPS = np.diag([-1.0, -1.0, 1.0, 1.0])
MOST_PIXELS = 8256  # of a picture for each of its bytes: 1 bit a pixel, and deflate makes 1,032 bytes of one at most
GREY = ("L", "I", "I;16", "I;16B", "I;16L", "F")


def sniff_mgh(path: Path) -> Description | None:
    """What a FreeSurfer volume is."""
    shape, dtype, affine, _ = _mgh(path)
    return _described(path, "FreeSurfer MGH", shape, dtype, affine)


def read_mgh(files: Sequence[Path], frame: int | None = None) -> Volume:
    """The volume of a FreeSurfer file; the compressed ones are read to the end and their CRC is checked."""
    path = Path(files[0])
    shape, dtype, affine, offset = _mgh(path)
    frame = _frame(path, frame, shape[3])
    size = int(np.prod(shape[:3])) * dtype.itemsize
    content = streams.part(path, offset + frame * size, size, offset + shape[3] * size)
    stored = np.frombuffer(content, dtype).astype(dtype.newbyteorder("="), copy=False)
    return Volume(finite(stored, path).reshape(shape[:3], order="F").transpose(2, 1, 0), affine)


def _mgh(path: Path) -> tuple[tuple[int, ...], np.dtype, np.ndarray, int]:
    """Shape (x, y, z, t), type, affine and where the values begin."""
    if reason := streams.instead(path):
        raise Unreadable(path, reason)
    raw = streams.head(path, 284)
    if len(raw) < 284 or struct.unpack(">i", raw[:4])[0] != 1:
        raise Unreadable(path, "not a FreeSurfer volume; copy it again")
    *shape, code, _ = struct.unpack(">6i", raw[4:28])
    good = struct.unpack(">h", raw[28:30])[0]
    numbers = np.array(struct.unpack(">15f", raw[30:90]), float)
    if min(shape) < 1 or np.prod(shape, dtype=object) > 2**38 or code not in MGH_TYPES:
        raise Unreadable(path, f"shape {tuple(shape)}, type {code}: the header is damaged")
    if not good:
        raise Unreadable(path, "does not say what is left and right (goodRASFlag is 0); convert it with mri_convert")
    steps, axes, centre = numbers[:3], numbers[3:12].reshape(3, 3).T, numbers[12:]
    affine = np.eye(4)
    affine[:3, :3] = axes * steps
    affine[:3, 3] = centre - affine[:3, :3] @ (np.array(shape[:3]) / 2)
    return tuple(shape), np.dtype(MGH_TYPES[code]), check_affine(affine, path), 284


def sniff_minc(path: Path) -> Description | None:
    """What a MINC volume is."""
    image = _minc(path)
    return _described(path, "MINC", image.shape, image.get_data_dtype(), image.affine)


def read_minc(files: Sequence[Path], frame: int | None = None) -> Volume:
    """The volume of a MINC file, turned to right, anterior, superior."""
    path = Path(files[0])
    image = _minc(path)
    streams.check(path)
    try:
        _frame(path, frame, image.shape[3] if len(image.shape) > 3 else 1)
        canonical: Any = nibabel.as_closest_canonical(image)
        array = np.asarray(canonical.dataobj, np.float32)
    except Unreadable:
        raise
    except Exception as error:  # nibabel, h5py and scipy raise many kinds for damaged files
        raise Unreadable(path, f"damaged MINC file ({error}); download it again") from error
    return Volume(finite(array, path).transpose(2, 1, 0), check_affine(canonical.affine, path))


def _minc(path: Path) -> Any:
    if reason := streams.instead(path):
        raise Unreadable(path, reason)
    try:
        image: Any = nibabel.load(path)
        shape, _ = image.shape, image.get_data_dtype()
    except Exception as error:
        raise Unreadable(path, f"not a readable MINC volume ({error}); download it again") from error
    if len(shape) != 3 or min(shape) < 1:
        raise Unreadable(path, f"shape {tuple(shape)}; expected a volume of three axes")
    check_affine(image.affine, path)
    return image


def sniff_brainweb(path: Path) -> Description | None:
    """What a raw BrainWeb model is: bytes or shorts without a header, so its size must be that of a normal model."""
    if reason := streams.instead(path, zeros=True):
        raise Unreadable(path, reason)
    _brainweb_type(path)
    return Description(
        "labels", "BrainWeb raw", ("z", "y", "x"), BRAINWEB_SHAPE, (BRAINWEB_MM, BRAINWEB_MM, BRAINWEB_MM), "uint8"
    )


def read_brainweb(files: Sequence[Path], frame: int | None = None) -> Volume:
    """The values of a raw BrainWeb model, as stored; the middle of the volume is the origin."""
    path = Path(files[0])
    _frame(path, frame, 1)
    dtype = _brainweb_type(path)
    voxels = int(np.prod(BRAINWEB_SHAPE))
    stored = np.frombuffer(streams.part(path, 0, voxels * dtype.itemsize), dtype).reshape(BRAINWEB_SHAPE)
    affine = np.diag([BRAINWEB_MM] * 3 + [1.0])
    affine[:3, 3] = -BRAINWEB_MM * (np.array(BRAINWEB_SHAPE[::-1]) - 1) / 2
    return Volume(stored, affine)


def _brainweb_type(path: Path) -> np.dtype:
    """Bytes or little-endian shorts: by the size, or, compressed, by the name."""
    voxels, size = int(np.prod(BRAINWEB_SHAPE)), path.stat().st_size
    packed = streams.head(path, 1) != path.open("rb").read(1)
    shorts = ".raws" in path.name.lower() if packed else size == 2 * voxels
    if not packed and size not in (voxels, 2 * voxels):
        raise Unreadable(path, f"{size} bytes; expected {voxels} bytes or shorts, {BRAINWEB_SHAPE} (z, y, x)")
    return np.dtype("<u2" if shorts else "u1")


def sniff_itk(path: Path) -> Description | None:
    """What a MetaImage or NRRD file is."""
    reader = _itk(path)
    shape = tuple(int(n) for n in reader.GetSize())
    return _described(
        path,
        "NRRD" if path.suffix.lower() in (".nrrd", ".nhdr") else "MetaImage",
        shape,
        _itk_type(path, reader),
        _itk_affine(path, reader),
        _itk_parts(path),
    )


def read_itk(files: Sequence[Path], frame: int | None = None) -> Volume:
    """The volume of a MetaImage or NRRD file, its LPS geometry turned to RAS+."""
    with extra("formats"):
        import SimpleITK as sitk

    path = Path(files[0])
    reader = _itk(path)
    size = [int(n) for n in reader.GetSize()]
    frame = _frame(path, frame, size[3] if len(size) > 3 else 1)
    _check_stream(path, int(np.prod(size, dtype=object)) * _itk_type(path, reader).itemsize)
    try:
        if len(size) > 3:
            reader.SetExtractIndex([0, 0, 0, frame])
            reader.SetExtractSize([*size[:3], 0])
        array = sitk.GetArrayFromImage(reader.Execute())
    except RuntimeError as error:
        raise Unreadable(path, f"damaged ({_short(error)}); copy or export it again") from error
    array = array[None] if array.ndim == 2 else array
    return Volume(finite(array, path), _itk_affine(path, reader))


def _itk(path: Path):
    with extra("formats"):
        import SimpleITK as sitk

    if reason := streams.instead(path):
        raise Unreadable(path, reason)
    _itk_parts(path)
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    try:
        reader.ReadImageInformation()
    except RuntimeError as error:
        raise Unreadable(path, f"its header cannot be read ({_short(error)}); export it again") from error
    size = reader.GetSize()
    if not 2 <= len(size) <= 4 or min(size) < 1 or np.prod(size, dtype=object) > 2**38:
        raise Unreadable(path, f"size {tuple(size)}; expected a volume or a series of volumes")
    return reader


def _check_stream(path: Path, total: int) -> None:
    """Raise Unreadable unless the compressed values of a MetaImage or NRRD file are whole: ITK checks no checksum."""
    start = streams.head(path, 1 << 14)
    if path.suffix.lower() in (".nrrd", ".nhdr"):
        text, gap, _ = start.partition(b"\n\n") if b"\n\n" in start else start.partition(b"\r\n\r\n")
        packed = re.search(rb"(?im)^encoding:\s*(gz|gzip|bz2|bzip2)\s*$", text)
        begin = len(text) + len(gap)
    else:
        local = re.search(rb"ElementDataFile\s*=\s*[^\n]*\n?", start)
        begin = local.end() if local else 0
        packed = re.search(rb"(?im)^CompressedData\s*=\s*(True)", start[:begin])
    if not packed:
        return
    parts = _itk_parts(path)
    bzip = packed[1].lower().startswith(b"bz")
    unpack: Any = bz2.BZ2Decompressor() if bzip else zlib.decompressobj(47)  # 47: zlib's or gzip's header, as it comes
    length = 0
    with streams.guarded(path, "compressed values"), open(parts[0] if parts else path, "rb") as file:
        file.seek(0 if parts else begin)
        left = file.read(streams.CHUNK)
        while left and not unpack.eof and length <= total:
            length += len(unpack.decompress(left, streams.CHUNK))
            left = b"" if bzip else unpack.unconsumed_tail
            left = left or (b"" if bzip and not unpack.needs_input else file.read(streams.CHUNK))
            while bzip and not unpack.eof and not unpack.needs_input:
                length += len(unpack.decompress(b"", streams.CHUNK))
    if not unpack.eof or length != total:
        raise Unreadable(path, f"its values unpack to {length} of {total} bytes: damaged or truncated; copy it again")


def _itk_type(path: Path, reader) -> np.dtype:
    with extra("formats"):
        import SimpleITK as sitk

    if reader.GetNumberOfComponents() != 1:
        kind = "RGB colour or vectors"
        raise Unreadable(path, f"holds {kind}, {reader.GetNumberOfComponents()} numbers a voxel; give the scan itself")
    kind_of = sitk.extra._get_numpy_dtype  # pyright: ignore[reportAttributeAccessIssue] (not in SimpleITK's stubs)
    return np.dtype(kind_of(sitk.Image([1, 1], reader.GetPixelID())))


def _itk_affine(path: Path, reader) -> np.ndarray:
    dims = len(reader.GetSize())
    direction = np.array(reader.GetDirection(), float).reshape(dims, dims)
    matrix = np.eye(4)
    n = min(dims, 3)
    matrix[:n, :n] = direction[:n, :n] * np.array(reader.GetSpacing()[:n], float)
    matrix[:n, 3] = reader.GetOrigin()[:n]
    return check_affine(LPS @ matrix, path)


def _itk_parts(path: Path) -> tuple[Path, ...]:
    """The files with the values of a header; refused where they lie in other folders, or orientation is missing."""
    text = (
        streams.head(path, 1 << 14).split(b"\n\n", 1)[0]
        if path.suffix.lower() in (".nrrd", ".nhdr")
        else (streams.head(path, 1 << 14))
    )
    if path.suffix.lower() in (".nrrd", ".nhdr"):
        if not text.startswith(b"NRRD"):
            raise Unreadable(path, "not an NRRD file; export it again")
        if b"space directions" not in text:
            raise Unreadable(path, "does not say how it lies in space (no 'space directions'); export it with geometry")
        fields = dict(line.split(b":", 1) for line in text.splitlines() if b":" in line)
        named = fields.get(b"data file", fields.get(b"datafile", b"")).strip()
    else:
        fields = {}
        for line in text.splitlines():
            key, mark, value = line.partition(b"=")
            if not mark:
                break
            fields[key.strip()] = value.strip()
            if key.strip() == b"ElementDataFile":
                break
        named = fields.get(b"ElementDataFile", b"")
        if not named:
            raise Unreadable(path, "not a MetaImage header (no ElementDataFile); export it again")
        named = b"" if named == b"LOCAL" else named
    if not named:
        return ()
    name = named.decode("utf-8", "replace")
    part = path.parent / name
    if "/" in name or "\\" in name or not part.is_file():
        raise Unreadable(path, f"its values are in {name!r}, which is not beside it; put them together")
    return (part,)


def _described(path: Path, form: str, shape, dtype, affine, parts=()) -> Description:
    """The description of an image stored as (x, y, z) or (x, y, z, t)."""
    shape = tuple(int(n) for n in shape)
    shape = shape + (1,) * (3 - len(shape))
    shape = shape[::-1] if len(shape) > 3 and shape[3] > 1 else shape[2::-1]
    return Description(
        kinds.kind_of(path.name) or "image",
        form,
        ("t", "z", "y", "x")[-len(shape) :],
        shape,
        _voxel_mm(check_affine(affine, path)),
        np.dtype(dtype).newbyteorder("=").name,
        contrast=kinds.contrast_of(path.name),
        parts=parts,
    )


def sniff_picture(path: Path) -> Description | None:
    """What a picture is (PNG, TIFF, BMP, JPEG): grey ones can be slices of a scan, colour is kept apart by its axes."""
    from PIL import Image, UnidentifiedImageError

    if reason := streams.instead(path):
        raise Unreadable(path, reason)
    try:
        with Image.open(path) as image:
            mode, (width, height), frames = image.mode, image.size, getattr(image, "n_frames", 1)
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise Unreadable(path, f"not a readable picture ({_short(error)}); export it again") from error
    if width * height > MOST_PIXELS * max(path.stat().st_size, 1):
        raise Unreadable(path, f"{width} x {height} pixels in {path.stat().st_size} bytes: its header is damaged")
    if frames > 1:
        raise Unreadable(path, f"{frames} images in one file; save each slice by itself")
    if mode not in (*GREY, "RGB"):
        raise Unreadable(path, f"mode {mode}; save it as 8-bit or 16-bit grey (or RGB)")
    axes, shape = (("y", "x"), (height, width)) if mode in GREY else (("y", "x", "colour"), (height, width, 3))
    return Description("picture", "picture", axes, shape, dtype=mode, contrast=kinds.contrast_of(path.name))


def read_picture(files: Sequence[Path]) -> np.ndarray:
    """The values (y, x) or (y, x, colour) of a picture, as stored."""
    from PIL import Image

    path = Path(files[0])
    sniff_picture(path)
    try:
        # From memory, where Pillow cannot make room for more bytes than there are.
        with Image.open(io.BytesIO(path.read_bytes())) as image:
            return finite(np.array(image), path)
    except (OSError, ValueError, SyntaxError) as error:
        raise Unreadable(path, f"damaged ({_short(error)}); export it again") from error


def _short(error: Exception) -> str:
    return str(error).strip().splitlines()[-1][:200] if str(error).strip() else type(error).__name__
