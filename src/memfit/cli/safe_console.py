"""A console that shows what others wrote and obeys none of it."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

from memfit.types.sanitize import shown


class SafeConsole(Console):
    """Names, notes and paths come from records and files: an escape sequence in them stays text. rich renders
    every cell and line through here; its own styles are added afterwards."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        if isinstance(renderable, str):
            renderable = shown(renderable)
        elif isinstance(renderable, Text) and (plain := shown(renderable.plain)) != renderable.plain:
            renderable = renderable.copy()
            renderable.plain = plain  # of the same length, so that styles stay where they are
        yield from super().render(renderable, options)
