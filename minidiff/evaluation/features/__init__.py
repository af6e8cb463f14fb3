"""Images to feature vectors: pixels, our classifier, Inception and other networks; what they gave
is kept.
"""
