"""One self-contained HTML page from the JSONs that `eval`, `demo` and `bench` write.

inputs, picture_file (read and check) -> headline -> svg, charts (draw) -> sections, layers
-> page.
"""

from capsight.report.inputs import BenchFile, DemoFile, EvalFile, LayerErrors, read
from capsight.report.page import Material, build_report
from capsight.report.picture_file import Picture, read_picture

__all__ = [
    "BenchFile",
    "DemoFile",
    "EvalFile",
    "LayerErrors",
    "Material",
    "Picture",
    "build_report",
    "read",
    "read_picture",
]
