"""`python -m sae` is the `sae` command."""

from sae.cli import main

if __name__ == "__main__":
    main()
