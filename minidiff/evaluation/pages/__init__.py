"""Pages: a result in JSON and pictures in, one HTML file out."""
