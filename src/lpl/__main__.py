"""`python -m lpl` and `accelerate launch -m lpl`."""

from lpl.cli import main

if __name__ == "__main__":
    main()
