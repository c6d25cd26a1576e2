"""The look of the page: the reader's own fonts, their light or dark, and no width of its own."""

STYLE = """
:root { color-scheme: light dark; --text: #1b1e23; --soft: #59616b; --back: #ffffff; --box: #f4f5f7; --line: #d4d8de;
  --accent: #1f6fb2; }
@media (prefers-color-scheme: dark) { :root { --text: #e4e7eb; --soft: #a2abb5; --back: #14171b; --box: #1e2328;
  --line: #3a4149; --accent: #6fb1e8; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--text); line-height: 1.5;
  font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "DejaVu Sans", sans-serif; }
main { max-width: 72rem; margin: 0 auto; padding: 1rem 1rem 3rem; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: .6rem 0 .2rem; }
h2 { font-size: 1.2rem; margin: 2.2rem 0 .6rem; padding-top: .7rem; border-top: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.2rem 0 .3rem; }
p { max-width: 46rem; margin: .4rem 0; }
.under, .note, figcaption, .others, .percent { color: var(--soft); }
.under, .note, figcaption { font-size: .9rem; }
.result { font-size: 1.08rem; border-left: 4px solid var(--accent); padding: .3rem 0 .3rem .9rem; margin: 1rem 0; }
blockquote { margin: .3rem 0; padding: .6rem .8rem; background: var(--box); border-radius: 6px; white-space: pre-wrap; }
ol { margin: .3rem 0; padding-left: 1.6rem; white-space: pre-wrap; }
figure { margin: 1rem 0; }
figcaption { max-width: 46rem; margin-top: .3rem; }
.scroll { overflow-x: auto; }
.scroll:focus-visible, summary:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
svg { display: block; width: 100%; max-width: var(--natural); min-width: calc(.8 * var(--natural)); height: auto; }
svg * { stroke-linejoin: round; stroke-linecap: butt; }
table { border-collapse: collapse; font-size: .88rem; margin: .4rem 0; overflow-wrap: normal; }
th, td { padding: .22rem .6rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
th { font-weight: 600; }
thead th { color: var(--soft); vertical-align: bottom; min-width: 4.2rem; }
.numbers thead th:not(:first-child) { text-align: right; }
tbody th { white-space: pre; }
.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.choices { white-space: nowrap; }
td[style] { white-space: nowrap; }
.percent { font-size: .85em; font-variant-numeric: tabular-nums; }
.others { font-size: .85em; white-space: nowrap; }
td[style] .percent, td[style] .others { color: inherit; opacity: .8; }
code { font-family: ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; font-size: .94em;
  white-space: pre-wrap; }
@media (max-width: 40rem) { th, td { padding: .22rem .4rem; } }
summary { cursor: pointer; padding: .3rem 0; color: var(--accent); }
@media print { details > * { display: block; } .scroll { overflow: visible; } }
"""
