"""Runs `python -m gpt_lightning` and `gpt-lightning`."""

from gpt_lightning.cli.main import main

if __name__ == "__main__":
    main()
