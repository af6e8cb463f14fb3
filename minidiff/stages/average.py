"""`train.py average`: the model of a finished run with its weights averaged over another width."""

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open

from minidiff.diffusion import store
from minidiff.errors import InputError
from minidiff.root import Rooted
from minidiff.training.post_hoc import FARTHEST, NARROWEST, WIDEST, WIDTHS, gamma, mixture


@dataclass(frozen=True)
class AverageConfig(Rooted):
    run: str = "ROOT/diffusion"   # finished diffusion run, trained with --post-hoc
    std: float = 0.1              # standard deviation of the average, as a share of the run
    step: int = 0                 # step that it ends at; 0: the last one


def average(cfg: AverageConfig) -> None:
    """Write RUN/averaged/std_…, the model averaged over this width of the run up to this step; it
    is used as a snapshot is."""
    run = Path(cfg.run)
    if not NARROWEST <= cfg.std <= WIDEST:
        raise InputError(f"--std {cfg.std:g}: a share of the run, {NARROWEST} to {WIDEST}")
    pipeline, facts = store.load_pipeline(run)
    with ExitStack() as stack:
        files = [stack.enter_context(safe_open(path, "pt"))
                 for path in sorted(run.glob("**/averages.safetensors"))]
        if not files:
            raise InputError(f"{run} kept no averages: train it with --post-hoc")
        steps = [int(file.metadata()["step"]) for file in files]
        step = cfg.step or max(steps)
        if not min(steps) <= step <= max(steps):
            raise InputError(f"--step {step}: averages were kept from step {min(steps)} to "
                             f"{max(steps)}")
        kept = [(end, k) for end in steps for k in range(len(WIDTHS))]
        weights, error = mixture([(end, gamma(WIDTHS[k])) for end, k in kept],
                                 (step, gamma(cfg.std)))
        if error > FARTHEST:
            raise InputError(f"--std {cfg.std:g}: the {len(kept)} averages that {run} kept give it "
                             f"to within {error:.0%} only; take one nearer to "
                             f"{' or '.join(map(str, WIDTHS))}, or train with more --snapshots")
        new = pipeline.denoiser.net.state_dict()
        for name in {key.partition("/")[2] for key in files[0].keys()}:  # noqa: SIM118 (no dict)
            parts = (file.get_tensor(f"{k}/{name}") for file in files for k in range(len(WIDTHS)))
            new[name].copy_(sum(float(w) * part.double() for w, part in zip(weights, parts)))
    out = run / "averaged" / (f"std_{cfg.std:g}" + (f"_step_{step:08d}" if cfg.step else ""))
    store.save_model(out, pipeline.denoiser.net, pipeline.denoiser.schedule,
                     pipeline.denoiser.prediction, **{**facts, "step": step, "std": cfg.std,
                                                     "profile_error": error})
    print(f"{out}: averaged with a standard deviation of {cfg.std:g} of the run up to step {step}; "
          f"the {len(kept)} kept averages give that profile to within {error:.1%}")
