"""Round the pipeline: what to make, with which model, and one image's way from noise."""
