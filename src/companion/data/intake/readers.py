"""The formats that the intake knows, in the order in which they are tried. A new format is one line here."""

from __future__ import annotations

from companion.data.intake import images, others
from companion.data.intake.records import Reader

READERS: tuple[Reader, ...] = (
    Reader("NIfTI", images.NIFTI, images.sniff_nifti, images.read_nifti),
    Reader("FreeSurfer", others.MGH, others.sniff_mgh, others.read_mgh),
    Reader("MINC", others.MINC, others.sniff_minc, others.read_minc),
    Reader("ITK", others.ITK, others.sniff_itk, others.read_itk),
    Reader("picture", others.PICTURES, others.sniff_picture, others.read_picture),
)


def readers_for(name: str) -> list[Reader]:
    """Return the readers whose endings a file's name has, the longest ending first; case does not matter."""
    lower = name.lower()
    fits = [(max(map(len, ends)), r) for r in READERS if (ends := [s for s in r.suffixes if lower.endswith(s)])]
    longest = max((length for length, _ in fits), default=0)
    return [r for length, r in sorted(fits, key=lambda fit: -fit[0]) if length or not longest]
