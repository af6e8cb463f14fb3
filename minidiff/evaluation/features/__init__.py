"""Images to feature vectors, and their cache: pixels, our classifier, Inception, other networks."""
