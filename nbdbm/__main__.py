"""``python -m nbdbm``."""

from nbdbm.cli import program

if __name__ == "__main__":
    program()
