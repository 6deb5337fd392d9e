"""``nbdbm completion``: what makes a shell complete commands, options and file names."""

from __future__ import annotations

import click

from nbdbm.cli import PROGRAM

SHELLS = ("bash", "zsh", "fish")

VARIABLE = f"_{PROGRAM}_COMPLETE".upper()
"""By which the script asks the program for completions; click derives it from the program's name."""


@click.command("completion")
@click.argument("shell", type=click.Choice(SHELLS))
def completion(shell: str) -> None:
    """Print a script that makes SHELL complete commands, options, choices and file names.

    To have it in the running shell:

    \b
    bash: eval "$(nbdbm completion bash)"
    zsh:  eval "$(nbdbm completion zsh)"      (after compinit)
    fish: nbdbm completion fish | source

    To have it in every one, put the line into ~/.bashrc or ~/.zshrc, or the script into
    ~/.config/fish/completions/nbdbm.fish.
    """
    from click.shell_completion import get_completion_class

    from nbdbm.cli import main

    kind = get_completion_class(shell)
    assert kind is not None
    click.echo(kind(main, {}, PROGRAM, VARIABLE).source(), nl=False)
