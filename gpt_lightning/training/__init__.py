"""Answers what Lightning asks of a step; private names of Lightning's live in `trainer.py` alone."""
