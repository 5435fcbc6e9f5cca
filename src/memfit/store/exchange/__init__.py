"""A PoC in the format that is shared with others, and what two such records may be compared in."""

from memfit.store.exchange.compare import Compared, compare
from memfit.store.exchange.from_poc import of_poc
from memfit.store.exchange.record import Shared, Side, parsed, read, schema, text

__all__ = ["Compared", "Shared", "Side", "compare", "of_poc", "parsed", "read", "schema", "text"]
