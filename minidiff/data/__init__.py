"""Pixels and rows: image files, tables, data sets, and the procedural phantom."""
