"""`python -m minillama` is the command `minillama`."""

from minillama.cli import main

if __name__ == "__main__":
    main()
