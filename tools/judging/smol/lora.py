"""Low-rank additions to the language model's linear maps, trained in float32 beside bfloat16 weights."""

from typing import Any

import torch
from torch import Tensor, nn

#: The first layers stay as they are: keys and values of images there are SmolLM2's own.
FIRST_LAYER, RANK = 6, 16
_MAPS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)


class Adapted(nn.Module):
    """A linear map plus `up @ down`; `up` starts at zero."""

    def __init__(self, base: nn.Linear) -> None:
        """Wrap a map that stays frozen."""
        super().__init__()
        self.base = base
        self.down = nn.Parameter(torch.randn(RANK, base.in_features) / base.in_features**0.5)
        self.up = nn.Parameter(torch.zeros(base.out_features, RANK))

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        low = nn.functional.linear(x, self.down.to(x.dtype))
        out: Tensor = self.base(x) + nn.functional.linear(low, self.up.to(x.dtype))
        return out


def adapt(language_model: Any) -> dict[str, nn.Parameter]:
    """Wrap the maps of the layers from `FIRST_LAYER` on; the new parameters by name."""
    found = {}
    for index, layer in enumerate(language_model.layers):
        for name in _MAPS if index >= FIRST_LAYER else ():
            owner, attribute = layer.get_submodule(name.split(".")[0]), name.split(".")[1]
            adapted = Adapted(getattr(owner, attribute))
            setattr(owner, attribute, adapted)
            found |= {f"{index}.{name}.down": adapted.down, f"{index}.{name}.up": adapted.up}
    return found


@torch.no_grad()
def merge(language_model: Any, weights: dict[str, Tensor]) -> None:
    """Add trained low-rank parts to the plain weights for good."""
    for name, up in weights.items():
        if name.endswith(".up"):
            index, _, rest = name.removesuffix(".up").partition(".")
            weight = language_model.layers[int(index)].get_submodule(rest).weight
            weight += (up.float() @ weights[name.removesuffix("up") + "down"].float()).to(weight.dtype)
