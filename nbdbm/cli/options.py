"""Options that several subcommands share: how an image file is to be opened for looking at it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from nbdbm.config import FORMATS
from nbdbm.errors import UsageError

if TYPE_CHECKING:
    from nbdbm.image.image import OpenOptions

FILE = click.Path(readable=False)
DIRECTORY = click.Path(readable=False, file_okay=False)
"""Names that a shell completes. What may be done with the files is found out by those who do it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LookOptions:
    """What the command line says about opening an image; a field for each option of ``image_options``."""

    format: str | None = None
    force_share: bool = False
    load_snapshot: str | None = None
    no_backing: bool = False
    backing_root: str | None = None

    def __post_init__(self) -> None:
        if self.no_backing and self.backing_root is not None:
            raise UsageError("--no-backing excludes --backing-root: there would be nothing to confine")

    def for_engine(self, *, chain: bool = True) -> OpenOptions:
        """The engine's options for a read-only look; without ``chain`` at nothing but the file itself."""
        from nbdbm.image.image import OpenOptions

        return OpenOptions(
            format=self.format,
            read_only=True,
            snapshot=self.load_snapshot,
            no_backing=self.no_backing,
            backing_root=self.backing_root,
            force_share=self.force_share,
            chain=chain,
        )

    def refuse_for(self, uri: str) -> None:
        """Raise UsageError if any of them was given although the disk is a server's."""
        for name in self.__slots__:
            if getattr(self, name):
                option = name.replace("_", "-")
                raise UsageError(f"{uri}: --{option} is for image files, not for NBD servers")


_FORMAT = click.option(
    "-f", "--format", type=click.Choice(FORMATS), help="Format of IMAGE (default: see what it is)."
)
_FORCE_SHARE = click.option(
    "-U", "--force-share", is_flag=True, help="Look even while somebody writes to IMAGE."
)
_SNAPSHOT = click.option(
    "-l", "--load-snapshot", metavar="NAME", help="Look at an internal snapshot of IMAGE."
)
_NO_BACKING = click.option("--no-backing", is_flag=True, help="Refuse an IMAGE that refers to another file.")
_BACKING_ROOT = click.option(
    "--backing-root", type=DIRECTORY, metavar="DIR", help="Refuse backing and data files outside DIR."
)


def image_options(*, snapshot: bool) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the options of LookOptions, handed to it as ``look``; the snapshot's if ``snapshot``."""
    options = [_FORMAT, _FORCE_SHARE, *([_SNAPSHOT] if snapshot else ()), _NO_BACKING, _BACKING_ROOT]

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(command)
        def with_look(**arguments: Any) -> None:
            fields = {name: arguments.pop(name) for name in LookOptions.__slots__ if name in arguments}
            command(look=LookOptions(**fields), **arguments)

        wrapped: Callable[..., None] = with_look
        for option in reversed(options):
            wrapped = option(wrapped)
        return wrapped

    return decorate
