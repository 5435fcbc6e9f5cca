"""The short form of benchmarks/two_nodes.py: two network namespaces, of which the second dies."""

from __future__ import annotations

from pathlib import Path

import pytest
import two_nodes


@pytest.mark.long
def test_a_node_that_dies_and_comes_back_changes_no_loss(tmp_path: Path) -> None:
    if reason := two_nodes.why_not():
        pytest.skip(reason)
    undisturbed = two_nodes.train("DDP", "", tmp_path / "whole")
    assert (undisturbed["nodes"], undisturbed["per_node"]) == (2, 1)
    row = two_nodes.judged(
        two_nodes.train("DDP", "second node dies", tmp_path / "died"), undisturbed["losses"]
    )
    assert row["recovered"], row
