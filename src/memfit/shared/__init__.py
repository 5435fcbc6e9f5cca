"""A PoC in the format that is shared with others, and what two such records may be compared in."""

from memfit.shared.compare import Compared, compare
from memfit.shared.made import of_poc
from memfit.shared.record import Shared, Side, parsed, read, schema, text

__all__ = ["Compared", "Shared", "Side", "compare", "of_poc", "parsed", "read", "schema", "text"]
