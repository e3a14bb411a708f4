"""``python -m ublk_trio``."""

from ublk_trio.cli import main

if __name__ == "__main__":
    main()
