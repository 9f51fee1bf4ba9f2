"""The formats that the intake knows, in the order in which they are tried. A new format is one line here."""

from __future__ import annotations

from companion.data.intake.records import Reader

READERS: tuple[Reader, ...] = ()
