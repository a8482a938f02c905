"""Linear attention: a state of fixed size instead of all keys."""
