"""``python -m channelfold``."""

from channelfold.cli import main

if __name__ == "__main__":
    main()
