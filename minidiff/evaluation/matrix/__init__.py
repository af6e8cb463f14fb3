"""The reference matrix: real sets × synthetic sets × controls that must be caught."""
