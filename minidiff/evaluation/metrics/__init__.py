"""Features in, numbers out: distances, variety, coverage, copies, membership, agreement."""
