"""What people look at: curves, tables, coloured tokens."""
