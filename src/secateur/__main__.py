"""``python -m secateur`` is the command ``secateur``."""

from secateur.cli import main

if __name__ == "__main__":
    main()
