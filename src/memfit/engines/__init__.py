"""The libraries that can train a plan: what each supports, its configuration as text, and its step.

An engine is a module of that name, or a package of that name that contains ``step.py``. Its ``ENGINE``, an
`Engine` (engines/base.py), says what it supports and writes its configuration, without importing the library.
``step.py`` has the class ``Step`` that the worker imports by the engine's name. registry.py lists all
engines.

memfit.export writes files for launchers, clusters and other trainers. memfit.integrations has callbacks for
training loops of other libraries.
"""
