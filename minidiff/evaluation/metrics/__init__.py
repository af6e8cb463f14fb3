"""Distances between sets of features, how varied a set is and what it covers: features in, numbers
out.
"""
