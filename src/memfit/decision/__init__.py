"""The decision: money, carbon, risk and stages, from a PoC's record and the user's own figures."""
