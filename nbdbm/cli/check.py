"""``nbdbm check``: whether an image is sound, and its repair."""

from __future__ import annotations

import asyncio
import json
import sys
from typing import TYPE_CHECKING

import click

from nbdbm.cli import printable
from nbdbm.cli.options import FILE
from nbdbm.errors import UsageError

if TYPE_CHECKING:
    from nbdbm.image.check import Progress
    from nbdbm.image.checkreport import CheckReport

EXIT_HELP = """\b
Exit status, as with qemu-img check:
  0  sound (now)
  1  the check could not be completed
  2  corrupt: data may be at risk
  3  leaked clusters only: space is wasted, nothing else
"""


@click.command("check", epilog=EXIT_HELP)
@click.argument("image", type=FILE, metavar="IMAGE")
@click.option(
    "-r",
    "--repair",
    type=click.Choice(("leaks", "all")),
    help="Repair leaked clusters only, or everything that can be repaired without losing data.",
)
@click.option("--json", "as_json", is_flag=True, help="The findings as JSON, with qemu-img's keys.")
@click.option(
    "-U", "--force-share", is_flag=True, help="Check even while somebody writes: findings may then be false."
)
@click.option("-q", "--quiet", is_flag=True, help="Nothing but the exit status, and errors.")
def check(image: str, repair: str | None, as_json: bool, force_share: bool, quiet: bool) -> None:
    """Check the metadata of a qcow2 image: refcounts, COPIED flags, overlaps, bitmaps.

    The image is only read, unless --repair is given. Backing and data files are not looked at.
    """
    if repair and force_share:
        raise UsageError("--repair excludes --force-share: nobody else may use what is being repaired")
    show_progress = not quiet and not as_json and sys.stderr.isatty()
    report = asyncio.run(_run(image, repair, force_share, show_progress))
    if as_json:
        found = report.to_json() | {"problems": report.problems}
        if not quiet:
            click.echo(json.dumps(found, indent=4))
    elif not quiet:
        show(report)
    sys.exit(report.exit_status)


async def _run(image: str, repair: str | None, force_share: bool, show_progress: bool) -> CheckReport:
    from nbdbm.image.check import check as look
    from nbdbm.image.check import open_locked

    file, header, notice = await open_locked(image, writable=repair is not None, force_share=force_share)
    try:
        if notice:
            click.echo(f"nbdbm: {printable(notice)}", err=True)
        with _Bar(show_progress) as progress:
            if repair is None:
                return await look(file, header, progress=progress)
            from nbdbm.image.repair import repair as mend

            _, report = await mend(file, header, errors=repair == "all", progress=progress)
            return report
    finally:
        file.close()


class _Bar:
    """A progress bar on stderr, or nothing at all."""

    def __init__(self, wanted: bool) -> None:
        self._wanted = wanted

    def __enter__(self) -> Progress:
        if not self._wanted:
            return lambda done, total: None
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

        self._bar = bar = Progress(
            TextColumn("checking"),
            BarColumn(),
            TaskProgressColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            transient=True,
        )
        bar.start()
        task = bar.add_task("check", total=None)
        return lambda done, total: bar.update(task, completed=done, total=total)

    def __exit__(self, *exc: object) -> None:
        if self._wanted:
            self._bar.stop()


def show(report: CheckReport) -> None:
    """Print the findings for a person."""
    for problem in report.problems:
        click.echo(printable(problem))
    if report.more_problems:
        click.echo(f"... and {report.more_problems} more")
    if report.problems:
        click.echo()
    if report.corruptions_fixed or report.leaks_fixed:
        click.echo(f"repaired: {_count(report.corruptions_fixed, 'corruption')}, ", nl=False)
        click.echo(_count(report.leaks_fixed, "leaked cluster"))
    if report.check_errors:
        click.echo(f"not completed: {_count(report.check_errors, 'place')} could not be checked")
    if report.corruptions:
        click.echo(f"corrupt: {_count(report.corruptions, 'error')}; writing to this image may destroy data")
    if report.leaks:
        click.echo(f"leaked: {_count(report.leaks, 'cluster')}; space is wasted, nothing else")
    if not report.exit_status:
        click.echo("no errors")
    allocated, total = report.allocated_clusters, report.total_clusters
    share = 100 * allocated / total if total else 0
    click.echo(f"{allocated} of {total} clusters allocated ({share:.2f} %)", nl=False)
    if allocated:
        fragmented, compressed = report.fragmented_clusters, report.compressed_clusters
        click.echo(f", {100 * fragmented / allocated:.2f} % fragmented", nl=False)
        click.echo(f", {100 * compressed / allocated:.2f} % compressed", nl=False)
    click.echo()
    click.echo(f"the image ends at byte {report.image_end_offset} of the file")


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"
