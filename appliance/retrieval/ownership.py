"""Files and vector stores that another process has; see `store.ownership`."""

from __future__ import annotations

from typing import cast

from appliance.core.errors import UnavailableError
from appliance.core.retrieval import Files, VectorStores
from appliance.store.ownership import Elsewhere


class DocumentsElsewhere:
    """Stands where `Documents` stands in their owner: whatever is asked of files and stores is refused.

    Attributes:
        files: Refuses.
        stores: Refuses.
    """

    def __init__(self, error: UnavailableError) -> None:
        """Refuse with what `own` raised."""
        refusal = Elsewhere(error)
        self.files = cast("Files", refusal)
        self.stores = cast("VectorStores", refusal)

    async def run(self) -> None:
        """Do nothing: the owner does it."""
