"""A console that prints control sequences in foreign text as plain text."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

from memfit.types.sanitize import replace_controls


class SafeConsole(Console):
    """A console that prints U+FFFD in place of each control character in text, such as names from records of
    others, so that the terminal does not execute them. rich renders every cell and line through ``render``
    and adds its own styles afterwards, which are therefore not affected."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        if isinstance(renderable, str):
            renderable = replace_controls(renderable)
        elif (
            isinstance(renderable, Text) and (plain := replace_controls(renderable.plain)) != renderable.plain
        ):
            renderable = renderable.copy()
            renderable.plain = plain  # has the same length, so the positions of styles stay valid
        yield from super().render(renderable, options)
