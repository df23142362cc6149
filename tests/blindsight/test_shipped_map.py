"""The head map that ships belongs to the weights that ship."""

from capsight.blindsight import Category, HeadMap
from capsight.model_fingerprint import model_fingerprint
from capsight.reference import load_reference_vlm


def test_the_shipped_map_fits_the_shipped_weights():
    head_map = HeadMap.from_pretrained("reference")
    model, _ = load_reference_vlm()
    text = model.config.get_text_config()
    head_map.check(text.num_hidden_layers, text.num_attention_heads, model_fingerprint(model))
    assert head_map.model
    assert head_map.counts()[Category.DENSE] < 32
    assert head_map.calibration.measured_drop <= head_map.calibration.tolerance
