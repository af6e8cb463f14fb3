"""minidiff: text-free diffusion on small sets of chest X-rays, and an honest account of whether it helped."""

__version__ = "0.1.0"
