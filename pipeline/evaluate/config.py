"""On how much dictionaries are judged."""

from pydantic import Field

from sae.cache.loader.dataset import Dataset
from sae.cache.tokens import TokenStore
from sae.configs.base import Amount, Settings


class EvalConfig(Settings):
    """Amounts to judge on."""

    rows: Amount = Field("all", description="held-out rows to judge reconstruction and sparsity on")
    tokens: Amount = Field(65_536, description="held-out tokens to judge cross-entropy on")
    dead_rows: int = Field(262_144, ge=0, description="training rows that are searched, too, for latents that fire")
    mean_rows: int = Field(65_536, ge=1, description="training rows whose mean is the mean ablation")
    batch_tokens: int = Field(4096, ge=1, description="tokens in one forward pass, rows in one batch")

    def rows_of(self, dataset: Dataset) -> int:
        """Rows of a held-out dataset that are judged."""
        return dataset.n_rows if self.rows == "all" else min(self.rows, dataset.n_rows)

    def contexts_of(self, tokens: TokenStore) -> int:
        """Contexts of held-out tokens that are judged: whole ones, as many as the tokens begin."""
        whole = tokens.n_contexts
        return whole if self.tokens == "all" else min(whole, -(-self.tokens // tokens.context_length))
