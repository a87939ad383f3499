"""The section `model.convert` of a recipe."""

from typing import Annotated, Any

from pydantic import BeforeValidator, Field, model_validator

from .section import Granularity, Section, Width

__all__ = ["Convert"]


def _shares(gate_factor: Any) -> Any:
    """Checked here, since pydantic would report each alternative of a union."""
    if isinstance(gate_factor, dict) and not gate_factor:
        raise ValueError("give a gate factor to each name, such as {'layer1.*': 0.5, '*': 0.25}")
    for factor in gate_factor.values() if isinstance(gate_factor, dict) else [gate_factor]:
        if isinstance(factor, bool) or not isinstance(factor, (int, float)) or not 0 < factor <= 1:
            raise ValueError(f"use a share in (0, 1], or one for each name of a convolution, not {factor!r}")
    return gate_factor


class Convert(Section):
    """DGC layers in the place of a network's convolutions: the arguments of `dgc_fastai.convert`.

    `target`, a share of the dense network's MACs, or `target_ms`, of an image in the deployed network, chooses a gate
    factor for each convolution when training starts. A run keeps its recipe with those that were chosen.
    """

    heads: Width = 4
    gate_factor: Annotated[float | dict[str, float], BeforeValidator(_shares)] = 0.25
    target: Annotated[float, Field(gt=0, lt=1)] | None = None
    target_ms: Annotated[float, Field(gt=0, le=1e6)] | None = None
    squeeze_rate: Annotated[int, Field(ge=2, le=4096)] = 16
    skip: list[Annotated[str, Field(min_length=1)]] = []
    granularity: Granularity = 1

    @model_validator(mode="after")
    def _one_target(self) -> "Convert":
        if self.target and self.target_ms:
            raise ValueError("target and target_ms exclude each other: remove one of them")
        return self

    @property
    def has_to_choose(self) -> bool:
        """Whether the gate factors for the target are still to be chosen."""
        return bool(self.target or self.target_ms) and not isinstance(self.gate_factor, dict)

    def keywords(self) -> dict[str, Any]:
        """Keyword arguments of `dgc_fastai.convert`."""
        return self.model_dump(exclude={"target", "target_ms"})
