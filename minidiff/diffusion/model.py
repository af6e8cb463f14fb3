"""Model = UNet + Conditioner, the one trained module; and its description as plain values."""

from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from minidiff import variables as var
from minidiff.diffusion import unet as unets
from minidiff.diffusion import vae as vaes
from minidiff.diffusion.conditioning import Conditioner
from minidiff.diffusion.schedule import Schedule
from minidiff.variables import Labels

UNETS = {"TINY": unets.TINY, "SMALL": unets.SMALL, "SD15": unets.SD15, "SD21": unets.SD21}
VAES = {"TINY": vaes.TINY, "SMALL": vaes.SMALL, "SD": vaes.SD}
CONTEXT_TOKENS = 8  # of a model trained from scratch; the public ones have 77


class Model(nn.Module):
    """F(x_in, t, labels): the UNet with the conditioner's context, and `keep` for its dropout."""

    def __init__(self, unet: unets.UNet, conditioner: Conditioner):
        super().__init__()
        self.unet, self.conditioner = unet, conditioner

    def forward(self, x: Tensor, t: Tensor, labels: Labels, keep: Tensor | None = None) -> Tensor:
        return self.unet(x, t, self.conditioner(labels), keep)


@dataclass(frozen=True)
class ModelSpec:
    """Everything that is needed to build a Model again, as plain values."""

    unet: dict
    variables: list[dict]
    context: list[int]            # K, d
    prediction: str
    alphas_cumprod: list[float]

    def build(self) -> tuple[Model, Schedule]:
        """The model with uninitialised weights, and its schedule."""
        model = Model(
            unets.UNet(config_from(unets.UNetConfig, self.unet)),
            Conditioner(var.from_json(self.variables), torch.zeros(*self.context),
                        torch.Generator()),
        )
        return model, Schedule(torch.tensor(self.alphas_cumprod, dtype=torch.float64))


def spec(model: Model, schedule: Schedule, prediction: str) -> ModelSpec:
    c = model.conditioner
    return ModelSpec(
        asdict(model.unet.config), var.to_json(c.variables), list(c.null_context.shape), prediction,
        schedule.alphas_cumprod.tolist(),
    )


def config_from(config_type: type, values: dict):
    """A frozen architecture config from its JSON."""
    return config_type(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


def from_scratch(unet: unets.UNetConfig, variables: list[var.Variable], seed: int) -> Model:
    """A freshly initialised model; with no text tower, its null context is random."""
    generator = torch.Generator().manual_seed(seed)
    null_context = torch.randn(CONTEXT_TOKENS, unet.context_dim, generator=generator)
    # torch's constructors draw from the global generator: lend them a seeded one
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Model(unets.UNet(unet), Conditioner(variables, null_context, generator))
    nn.init.zeros_(model.unet.conv_out.weight)
    nn.init.zeros_(model.unet.conv_out.bias)
    return model


def from_public(unet: unets.UNet, null_context: Tensor, variables: list[var.Variable],
                seed: int) -> Model:
    """A public UNet and a conditioner that adds nothing: step 0 is that model bit for bit."""
    with torch.random.fork_rng(devices=[]):  # as above
        return Model(unet.train(),
                     Conditioner(variables, null_context, torch.Generator().manual_seed(seed)))


def from_model(old: Model, variables: list[var.Variable], seed: int) -> Model:
    """A trained model's UNet, shared, and a conditioner for the variables of `variables.merge`.

    At step 0 its output is the old model's bit for bit, with null for what the old one does not
    know. For that the old variables keep their order and new ones follow: the context is a sum,
    whose last bits depend on the order.
    """
    order = {v.name: i for i, v in enumerate(old.conditioner.variables)}
    variables = sorted(variables, key=lambda v: order.get(v.name, len(order)))
    model = from_public(old.unet.requires_grad_(True), old.conditioner.null_context.cpu(),
                        variables, seed)
    model.conditioner.to(old.conditioner.null_context.device).adopt(old.conditioner)
    return model


def vae_from_scratch(config: vaes.VAEConfig, seed: int) -> vaes.VAE:
    """A freshly initialised autoencoder whose latents are not scaled yet."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return vaes.VAE(config, scale=1.0)
