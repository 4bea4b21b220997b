"""Numbers that fields take. Their limits are generous, and a hostile file is refused before anything is computed."""

from typing import Annotated

from pydantic import Field

Size = Annotated[int, Field(strict=True, ge=1, le=1 << 24)]
Count = Annotated[int, Field(strict=True, ge=0, le=1 << 20)]
Layers = Annotated[int, Field(strict=True, ge=1, le=4096)]
Rate = Annotated[float, Field(ge=0.0, le=1e6)]
Rotations = Annotated[float, Field(ge=1e-6, le=1e6)]
Multiplier = Annotated[float, Field(gt=0.0, le=1e6)]
Multipliers = Annotated[tuple[Multiplier, ...], Field(max_length=4096)]
