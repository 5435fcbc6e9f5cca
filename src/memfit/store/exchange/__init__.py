"""The record: the format in which PoCs are shared with others, and the comparison of two records."""

from memfit.store.exchange.compare import Compared, compare
from memfit.store.exchange.from_poc import of_poc
from memfit.store.exchange.record import Shared, Side, parse_record, read, schema, text

__all__ = ["Compared", "Shared", "Side", "compare", "of_poc", "parse_record", "read", "schema", "text"]
