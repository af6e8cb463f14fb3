"""The report on one synthetic set: comparisons, verdicts, pictures, one page."""
