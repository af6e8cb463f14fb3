"""minidiff: text-free diffusion on small sets of chest X-rays, and an honest account of whether it helped.

    minidiff.load("runs/x").sample(label="covid", sex="F", age=70, n=4)     → uint8 images
    minidiff.fid("real", "synthetic"), minidiff.kid("real", "synthetic")    two folders or arrays
"""

__version__ = "0.1.0"
__all__ = ["load", "fid", "kid"]


def __getattr__(name: str):
    if name not in __all__:
        raise AttributeError(f"module 'minidiff' has no attribute {name!r}")
    from minidiff import api  # only now: every module begins with `import minidiff`, and few want all of it
    return getattr(api, name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
