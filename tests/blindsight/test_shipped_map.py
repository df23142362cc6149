"""The head map that ships for the reference VLM, where there is one, belongs to the weights that ship."""

import pytest

from capsight.blindsight import HeadMap
from capsight.errors import CapsuleFileError
from capsight.kvcapsule.fingerprint import model_fingerprint
from capsight.reference import load_reference_vlm


def test_the_shipped_map_fits_the_shipped_weights():
    try:
        head_map = HeadMap.from_pretrained("reference")
    except CapsuleFileError:
        pytest.skip("no head map ships")
    model, _ = load_reference_vlm()
    text = model.config.get_text_config()
    head_map.check(text.num_hidden_layers, text.num_attention_heads, model_fingerprint(model))
    assert head_map.model
    assert head_map.calibration.measured_drop <= head_map.calibration.tolerance
