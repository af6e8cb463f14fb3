"""minidiff: text-free diffusion on small sets of chest X-rays, and whether it helped.

    minidiff.load("runs/x").sample(label="covid", sex="F", age=70, n=4)     → uint8 images
    minidiff.fid("real", "synthetic"), minidiff.kid("real", "synthetic")    two folders or arrays
"""

__version__ = "0.2.0"
__all__ = ["load", "fid", "kid"]


def __getattr__(name: str):
    """load, fid and kid of minidiff.api, imported on first use: most modules need none of it."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from minidiff import api
    return getattr(api, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
