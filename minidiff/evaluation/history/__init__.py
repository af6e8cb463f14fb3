"""A run over time and its chain: checkpoints compared, uncertainty of each image, everything
verified by hashes.
"""
