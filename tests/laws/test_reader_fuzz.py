"""Whatever a file contains, its reader answers or refuses it in one short line (`fuzzed_readers`). More
examples, drawn at random: benchmarks/fuzz_readers.py."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

_spec = importlib.util.spec_from_file_location(
    "fuzzed_readers", Path(__file__).with_name("fuzzed_readers.py")
)
assert _spec is not None
assert _spec.loader is not None
fuzzed: Any = importlib.util.module_from_spec(_spec)
sys.modules["fuzzed_readers"] = fuzzed
_spec.loader.exec_module(fuzzed)


@pytest.mark.parametrize("name", fuzzed.READERS)
@settings(max_examples=30, suppress_health_check=list(HealthCheck), deadline=None)
@given(data=st.data())
def test_a_reader_answers_in_one_line(
    name: str, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    reader = fuzzed.READERS[name]
    content = data.draw(fuzzed.contents(reader))
    assert fuzzed.fault(reader, content, tmp_path_factory.getbasetemp()) == "", content[:2000]
