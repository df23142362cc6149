"""The page's style sheet: light and dark from the reader's settings, plain black on white on paper."""

_LIGHT = """
  --paper: #ffffff; --card: #f6f8fa; --ink: #1b1f24; --muted: #59636e; --grid: #d8dee4;
  --good: #1a7f37; --bad: #cf222e;
  --s0: #0550ae; --s1: #bc4c00; --s2: #1a7f37; --s3: #8250df; --s4: #bf3989; --s5: #9a6700; --s6: #0e7c86;
  --s7: #6e7781;
"""
_DARK = """
  --paper: #0d1117; --card: #161b22; --ink: #e6edf3; --muted: #9198a1; --grid: #30363d;
  --good: #3fb950; --bad: #f85149;
  --s0: #58a6ff; --s1: #f0883e; --s2: #3fb950; --s3: #bc8cff; --s4: #f778ba; --s5: #d29922; --s6: #39c5cf;
  --s7: #8b949e;
"""

CSS = f"""
:root {{ color-scheme: light dark; {_LIGHT} }}
@media screen and (prefers-color-scheme: dark) {{ :root {{ {_DARK} }} }}
* {{ box-sizing: border-box; }}
body {{ margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }}
main {{ max-width: 960px; margin: 0 auto; padding: 40px 24px 64px; }}
.kicker {{ color: var(--muted); font-size: 14px; margin: 0 0 6px; }}
h1 {{ font-size: 25px; line-height: 1.35; font-weight: 650; margin: 0 0 22px; text-wrap: pretty; }}
h2 {{ font-size: 19px; margin: 46px 0 4px; }}
p {{ margin: 4px 0 14px; max-width: 76ch; }}
.lead {{ color: var(--muted); }}
.tiles {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(190px, 1fr)); gap: 12px;
  margin: 0 0 20px; }}
.tile {{ background: var(--card); border: 1px solid var(--grid); border-radius: 10px; padding: 14px 16px; }}
.tile b {{ display: block; font-size: 31px; line-height: 1.15; font-weight: 680;
  font-variant-numeric: tabular-nums; }}
.tile span {{ display: block; font-weight: 600; }}
.tile small {{ color: var(--muted); font-size: 13px; }}
figure {{ margin: 12px 0; }}
figure img {{ max-width: 100%; height: auto; display: block; background: #fff; border-radius: 6px; }}
figcaption {{ color: var(--muted); font-size: 14px; margin-top: 4px; }}
.phone {{ display: none; }}
@media screen and (max-width: 640px) {{
  main {{ padding: 24px 20px 48px; }}
  .desk {{ display: none; }}
  .phone {{ display: block; }}
}}
svg {{ width: 100%; height: auto; display: block; }}
svg text {{ font-family: inherit !important; }}
.wide {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-size: 14px; font-variant-numeric: tabular-nums;
  margin: 8px 0 14px; }}
th, td {{ padding: 5px 12px 5px 0; text-align: right; border-bottom: 1px solid var(--grid);
  white-space: nowrap; }}
th {{ color: var(--muted); font-weight: 600; vertical-align: bottom; }}
th:first-child, td:first-child, td.left, th.left {{ text-align: left; }}
td.left {{ white-space: normal; min-width: 8em; }}
tr.ours td {{ font-weight: 650; }}
td.good, .good {{ color: var(--good); }}
td.bad, .bad {{ color: var(--bad); }}
details {{ margin: 0 0 14px; }}
summary {{ cursor: pointer; color: var(--muted); font-size: 14px; }}
.key {{ display: inline-flex; align-items: center; gap: 6px; margin-right: 18px; font-size: 14px; }}
.key i {{ width: 12px; height: 12px; border-radius: 2px; display: inline-block; }}
footer {{ margin-top: 48px; border-top: 1px solid var(--grid); padding-top: 12px; color: var(--muted);
  font-size: 14px; }}
@media print {{
  main {{ max-width: none; padding: 0; }}
  h2 {{ break-after: avoid; }}
  figure, .tile, tr {{ break-inside: avoid; }}
  body {{ font-size: 11pt; }}
  details::details-content {{ content-visibility: visible; block-size: auto; }}
  summary {{ list-style: none; }}
}}
"""
