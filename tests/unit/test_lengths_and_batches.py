"""Lengths and batches: what every answer says it is about, and what of a configuration it uses."""

from __future__ import annotations

import pytest

from memfit import catalog
from memfit.types.errors import UserError


@pytest.mark.parametrize(
    ("name", "variants"),
    [
        ("H100", "H100-SXM, H100-PCIe, H100-NVL or H100-96GB-HBM2e"),
        ("8xA100", "A100-40GB-SXM, A100-80GB-SXM, A100-40GB-PCIe or A100-80GB-PCIe"),
    ],
)
def test_an_ambiguous_device_names_its_variants_and_nothing_before_them(name: str, variants: str) -> None:
    with pytest.raises(UserError) as error:
        catalog.machine(name)
    assert f"unknown device: '{name.removeprefix('8x')}'; did you mean {variants}?" in str(error.value)


def test_a_device_is_known_in_lower_case_without_dashes() -> None:
    assert catalog.machine("rtx4090").device.name == "RTX-4090"
