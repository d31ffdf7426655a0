"""Questions in, shares of right answers out."""
