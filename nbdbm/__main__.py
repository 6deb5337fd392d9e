"""``nbdbm``, and ``python -m nbdbm``."""

import signal


def main() -> None:
    """The program. Ctrl-C while its modules are imported ends it as it ends other programs: silently."""
    handler = signal.getsignal(signal.SIGINT)
    if handler is signal.default_int_handler:  # and not ignored, as in a background job of a script
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from nbdbm.cli import program

    signal.signal(signal.SIGINT, handler)
    program()


if __name__ == "__main__":
    main()
