"""`python -m gpt_lightning`."""

from gpt_lightning.cli import main

if __name__ == "__main__":
    main()
