"""YAML's safe loader with limits that hold while it parses."""

from __future__ import annotations

from typing import Any, Final

import yaml

_DEEPEST: Final = 64
_MOST_NODES: Final = 100_000


class BoundedLoader(yaml.SafeLoader):
    """yaml.SafeLoader that also raises yaml.YAMLError for more than 64 levels, for an alias inside what it
    stands for, and for more than 100,000 values and keys, of which each alias counts as many as what it
    stands for. Tags with a wrong value, such as ``!!int ''``, raise ValueError and other errors."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = 0
        self._sizes: dict[int, int] = {}  # by id of a node, which lives as long as the document

    def compose_node(self, parent: Any, index: Any) -> Any:
        is_alias = self.check_event(yaml.AliasEvent)
        self._depth += 1
        if self._depth > _DEEPEST:
            raise yaml.YAMLError(f"it is nested more than {_DEEPEST} levels deep")
        node: Any = super().compose_node(parent, index)
        self._depth -= 1
        if is_alias:
            if id(node) not in self._sizes:
                raise yaml.YAMLError("an alias is inside of what it stands for")
        else:
            self._sizes[id(node)] = self._size(node)
            if self._sizes[id(node)] > _MOST_NODES:
                raise yaml.YAMLError(f"with its aliases, it has more than {_MOST_NODES} values")
        return node

    def _size(self, node: Any) -> int:
        if isinstance(node, yaml.MappingNode):
            return 1 + sum(self._sizes[id(k)] + self._sizes[id(v)] for k, v in node.value)
        if isinstance(node, yaml.SequenceNode):
            return 1 + sum(self._sizes[id(item)] for item in node.value)
        return 1
