"""``python -m nbdbm``."""

from nbdbm.cli import main

if __name__ == "__main__":
    main()
