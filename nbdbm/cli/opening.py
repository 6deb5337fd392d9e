"""From the configuration to what the registry offers: sources that open images, and what is said of them."""

from __future__ import annotations

import logging
import os
import time
from dataclasses import replace
from typing import TYPE_CHECKING

from nbdbm.access import EVERYBODY
from nbdbm.cli import printable, remedy
from nbdbm.config import ExportConfig, ServeConfig
from nbdbm.errors import BitmapError, ImageError
from nbdbm.registry import Source

if TYPE_CHECKING:
    from nbdbm.exports import Export
    from nbdbm.image.image import Image

log = logging.getLogger(__name__)

SCAN_AFTER = 1.0
"""Seconds for which the content of a directory is remembered: clients may ask as often as they like."""


def sources(config: ServeConfig) -> list[Source]:
    """One source for each configured export, in order."""
    return [source(export) for export in config.exports]


def source(config: ExportConfig) -> Source:
    """What the registry needs to know of an export, and how it is opened."""

    async def opened() -> Export:
        return await open_export(config)

    return Source(
        name=config.name,
        description=config.description,
        open=opened,
        access=config.access,
        file=os.path.realpath(config.image),
        grace=config.grace if config.on_demand else None,
        # Who may use it and how it is described can change while it is open.
        key=replace(config, description="", access=EVERYBODY),
    )


async def open_export(config: ExportConfig) -> Export:
    """Open the image, say what there is to say about it, and export it. Raises NbdbmError or OSError."""
    from nbdbm.exports import Export

    image = await open_image(config)
    try:
        export = Export.of(
            image,
            name=config.name,
            description=config.description,
            bitmaps=config.bitmaps,
            allocation_depth=config.allocation_depth,
        )
    except BaseException as error:
        refused = {bitmap.name for bitmap in image.tracker.refused()}
        await image.close()
        if not isinstance(error, BitmapError):
            raise
        way_out = f"; to remove it: {remedy(config.image, error.name)}" if error.name in refused else ""
        raise ImageError(config.image, f"{error}{way_out}", errno=error.errno) from error
    report(config.image, image)
    return export


async def open_image(config: ExportConfig) -> Image:
    """Open the image as configured; a failure says whether --read-only would help."""
    from nbdbm.image.image import DetectZeroes, Image, OpenOptions

    options = OpenOptions(
        format=config.format,
        read_only=config.read_only,
        snapshot=config.snapshot,
        no_backing=config.no_backing,
        backing_root=config.backing_root,
        force_share=config.force_share,
        discard=config.discard == "unmap",
        detect_zeroes=DetectZeroes(config.detect_zeroes),
    )
    try:
        return await Image.open(config.image, options)
    except ImageError as error:
        if config.read_only or "cannot be opened for writing" not in error.reason:
            raise
        raise ImageError(
            error.path, f"{error.reason}; --read-only serves it as it is", errno=error.errno
        ) from error


def report(path: str, image: Image) -> None:
    """Say what of the image at ``path`` is not served, why, and what to do about it."""
    for notice in image.notices:
        # Those about another file of the chain begin with its name.
        log.warning("%s", printable(notice if notice.startswith(f"{path}: ") else f"{path}: {notice}"))
    for bitmap in image.tracker.refused():
        log.warning("%s", printable(f"{path}: bitmap {bitmap.name!r} is not served: {bitmap.refusal}"))
        log.warning("%s", printable(f"{path}: to remove it: {remedy(path, bitmap.name)}"))


class Directory:
    """The images of a directory as sources, looked up again when a client asks and a second has passed."""

    def __init__(self, config: ExportConfig) -> None:
        """``config.image`` is the directory; raises OSError if it cannot be read."""
        self._config = config
        self._sources: dict[str, Source] = {}
        self._looked = 0.0
        self._told: set[str] = set()
        self._seen: dict[str, int] = {}
        self._look()

    def __call__(self) -> dict[str, Source]:
        """Sources by name; those of the last time if the directory cannot be read."""
        if time.monotonic() - self._looked >= SCAN_AFTER:
            try:
                self._look()
            except OSError as error:
                self._tell(f"{self._config.image}: {error.strerror}")
                self._looked = time.monotonic()
        return self._sources

    def _look(self) -> None:
        from nbdbm.image.directory import images

        names = images(
            self._config.image,
            any_format=self._config.format == "raw",
            skipped=self._tell,
            seen=self._seen,
        )
        known = self._sources
        if names != list(known):  # else it stays the same for all who are going through it
            self._sources = {name: known.get(name) or self._source(name) for name in names}
        self._looked = time.monotonic()

    def _source(self, name: str) -> Source:
        path = os.path.join(self._config.image, name)
        return source(replace(self._config, image=path, name=name, on_demand=True))

    def _tell(self, text: str) -> None:
        """Once, not each time that a client asks."""
        if text not in self._told:
            self._told.add(text)
            log.warning("%s", printable(text))
