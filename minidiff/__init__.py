"""minidiff: text-free diffusion on small sets of chest X-rays, and an honest account of whether it
helped.

    minidiff.load("runs/x").sample(label="covid", sex="F", age=70, n=4)     → uint8 images
    minidiff.fid("real", "synthetic"), minidiff.kid("real", "synthetic")    two folders or arrays
"""

__version__ = "0.1.0"
__all__ = ["load", "fid", "kid"]

# Each imports minidiff.api only when it is called: every module begins with `import minidiff`, and
# few want all of it.


def load(root, device: str = "auto"):
    """The finished diffusion model of an experiment, whose `sample` makes images; see
    minidiff.api.load.
    """
    from minidiff import api
    return api.load(root, device)


def fid(real, synthetic, **how):
    """FID of two folders or uint8 arrays, with its floor; see minidiff.api.fid for `how`."""
    from minidiff import api
    return api.fid(real, synthetic, **how)


def kid(real, synthetic, **how):
    """KID of two folders or uint8 arrays, with its floor; see minidiff.api.kid for `how`."""
    from minidiff import api
    return api.kid(real, synthetic, **how)
