"""The settings of `sae match`."""

from pydantic import Field

from sae.configs.base import Amount, Settings


class MatchConfig(Settings):
    """How dictionaries are compared."""

    correlate: bool = Field(
        False, description="compare also when latents fire: their correlation over held-out rows of the cache"
    )
    living: bool = Field(False, description="leave out latents that fire in none of these rows")
    rows: Amount = Field(16_384, description="held-out rows, where those are read")
    hungarian: int = Field(
        8192, ge=0, description="latents up to which dictionaries are matched one to one, which is cubic in them"
    )

    @property
    def reads_rows(self) -> bool:
        """Whether held-out rows are needed."""
        return self.correlate or self.living
