"""Many runs in search of the best: which to try next, how far each gets, and what has come of them."""
