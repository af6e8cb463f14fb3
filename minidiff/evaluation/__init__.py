"""Features, distances, memorisation and the report."""
