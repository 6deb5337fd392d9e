"""``nbdbm nbdkit-plugin``: where the script is that nbdkit loads."""

from __future__ import annotations

import os

import click

import nbdbm


@click.command("nbdkit-plugin")
def nbdkit_plugin() -> None:
    """Print the path of the plugin with which nbdkit serves images.

    \b
    nbdkit python "$(nbdbm nbdkit-plugin)" image=disk.qcow2
    """
    click.echo(os.path.join(os.path.dirname(os.path.abspath(nbdbm.__file__)), "nbdkit", "nbdbm_plugin.py"))
