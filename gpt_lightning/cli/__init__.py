"""Words to objects, errors to one line."""
