"""What the sections of a recipe have in common: how strict they are, and the limits of numbers."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

__all__ = ["Count", "Section", "Share", "Strength", "Width"]

# The limits are far beyond any use. They keep a typing error from filling the memory.
Count = Annotated[int, Field(ge=1, le=100_000)]
Width = Annotated[int, Field(ge=1, le=4096)]
Share = Annotated[float, Field(gt=0, le=1)]
Strength = Annotated[float, Field(ge=0, le=100)]


class Section(BaseModel):
    # Strict: a recipe's 1 is not True, and its "3" is not 3. JSON's few types suffice for every value.
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)
