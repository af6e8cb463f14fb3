"""Grad-CAM: where in a picture is what speaks for an answer?

Selvaraju et al. 2017 (arXiv 1610.02391), eq. 1 and 2: the channels of one layer, each weighted by
the mean over places of the gradient of the answer's score, summed, and what is below 0 left out. A
warm place in the frame or in a corner is a hint at a shortcut; one in the lungs is no proof that
there is none.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from minidiff.classification.predictor import Predictor, prepare
from minidiff.pixels import to_grey

FINEST = 7     # places a side, at least: the map of a resnet18 at 224 px
OPACITY = 0.6  # of the warmest place


def layer_of(predictor: Predictor) -> str:
    """The deepest layer whose map has 7 × 7 places or more.

    layer2 at 64 px (8 × 8), layer3 at 128 (8 × 8), layer4 at 224. The paper takes the last one,
    which at 64 px has 2 × 2 places and at 128 px 4 × 4: too coarse to tell lungs from corners. On
    66 phantoms of 64 px its maps told opacities from the rest with AUROC .47, those of layer3 .71,
    of layer2 .82, of layer1 .70 (one classifier). At 128 px layer4 had .67 and layer3 .62, but
    layer4's warmest place was never in an opacity.
    """
    # conv1 and the pooling halve the side, and so does each layer after the first
    fine = [name for k, name in enumerate(predictor.net.layers)
            if k == 0 or math.ceil(predictor.size / 2 ** (k + 2)) >= FINEST]
    return fine[-1]


def gradcam(predictor: Predictor, images: Tensor, target: int | Sequence[int], *,
            variable: str = "", layer: str = "", batch: int = 64) -> np.ndarray:
    """uint8 (N,C,S,S) → float32 (N,S,S) in 0…1: 1 where most speaks for value `target`.

    `target` is one value, or one for each image. `variable` is the predictor's first unless named;
    the score is its logit. Each map is scaled by its own maximum, so that two maps tell places, not
    strengths; it is 0 throughout where nothing speaks for the answer. Where the predictor makes
    pictures alike, places are those of `predictor.standard(images)`.
    """
    variable, layer = variable or predictor.variables[0].name, layer or layer_of(predictor)
    targets = torch.as_tensor(target).expand(len(images))
    mode = predictor.training
    # the statistics of batch norm stay as they are, and no image depends on another
    predictor.eval()
    maps = [_maps(predictor, prepare(predictor.standard(part), predictor.size), wanted, variable,
                  layer)
            for part, wanted in zip(images.split(batch), targets.split(batch))]
    predictor.train(mode)
    heat = F.interpolate(torch.cat(maps)[:, None], tuple(images.shape[2:]), mode="bilinear")[:, 0]
    most = heat.amax((1, 2), keepdim=True)
    return torch.where(most > 0, heat / most.clamp(min=1e-30), 0.0).numpy()


def overlay(images: Tensor, heat: np.ndarray) -> np.ndarray:
    """uint8 (N,C,S,S), maps (N,S,S) → uint8 (N,S,S,3): grey, coloured where the map is warm."""
    picture = to_grey(images)[:, 0].numpy().astype(np.float64)[..., None]
    warm = np.asarray(heat, np.float64)
    import matplotlib  # only now: it takes long to import
    # neither its black nor its white end
    colour = 255 * matplotlib.colormaps["inferno"](0.25 + 0.65 * warm)[..., :3]
    share = OPACITY * warm[..., None]
    return np.rint((1 - share) * picture + share * colour).astype(np.uint8)


def _maps(predictor: Predictor, x: Tensor, targets: Tensor, variable: str, layer: str) -> Tensor:
    """Grey images (n,1,S,S) in [-1,1] → the paper's maps (n,h,w), not scaled; float32, CPU."""
    net, device = predictor.net, next(predictor.parameters()).device
    kept: list[Tensor] = []
    hook = getattr(net, layer).register_forward_hook(
        lambda module, inputs, output: kept.append(output))
    try:
        with torch.enable_grad():
            scores = predictor(x.to(device))[variable].gather(1, targets[:, None].to(device))
            slope, = torch.autograd.grad(scores.sum(), kept[0])
    finally:
        hook.remove()
    weights = slope.mean((2, 3), keepdim=True)                                     # eq. 1
    return F.relu((weights * kept[0].detach()).sum(1)).float().cpu()               # eq. 2
