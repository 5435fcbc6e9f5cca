"""Stage 0: set-ups written for other libraries, read as data, carried over to a Plan, and checked.

``read`` -> Setup; ``carry.over`` -> Carried (a Plan, and what it could not take); ``lint.check`` -> Findings.
Pure text to data: no engine is imported, none needs to be installed.
"""
