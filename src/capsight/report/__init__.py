"""One self-contained HTML page from the JSONs that `eval`, `demo` and `bench` write.

fields, eval_file, demo_file, bench_file, layer_files, picture_file (read and check) -> headline -> svg,
charts_* (draw) -> sections, sections_layers -> page.
"""

from capsight.report.bench_file import BenchFile, BenchRow, read_bench
from capsight.report.demo_file import DemoFile, read_demo
from capsight.report.eval_file import EvalFile, read_eval
from capsight.report.layer_files import LayerErrors, read_errors
from capsight.report.page import Material, build_report
from capsight.report.picture_file import Picture, read_picture

__all__ = [
    "BenchFile",
    "BenchRow",
    "DemoFile",
    "EvalFile",
    "LayerErrors",
    "Material",
    "Picture",
    "build_report",
    "read_bench",
    "read_demo",
    "read_errors",
    "read_eval",
    "read_picture",
]
