"""`python -m flexpipe` is the command `flexpipe`."""

from flexpipe.cli.main import main

if __name__ == "__main__":
    main()
