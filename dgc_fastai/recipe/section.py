"""What the sections of a recipe have in common: how strict they are, and the limits of numbers."""

from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

__all__ = ["Count", "Granularity", "Section", "Share", "Strength", "Width"]


def _power_of_two(granularity: int) -> int:
    if granularity & (granularity - 1):
        raise ValueError(f"use 1, 2, 4, 8, 16, 32 or 64, not {granularity}")
    return granularity


# The limits are far beyond any use. They keep a typing error from filling the memory.
Count = Annotated[int, Field(ge=1, le=100_000)]
Width = Annotated[int, Field(ge=1, le=4096)]
Share = Annotated[float, Field(gt=0, le=1)]
Strength = Annotated[float, Field(ge=0, le=100)]
Granularity = Annotated[int, Field(ge=1, le=64), AfterValidator(_power_of_two)]


class Section(BaseModel):
    # Strict: a recipe's 1 is not True, and its "3" is not 3. JSON's few types suffice for every value.
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)
