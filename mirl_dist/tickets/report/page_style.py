"""The page's dress: colours for light and dark, narrow screens and paper; and the script that sorts tables."""

from __future__ import annotations

CSS = """
:root { color-scheme: light dark; --page: #ffffff; --ink: #1c2733; --soft: #5b6876; --line: #d9dfe6; --tint: #f4f6f9;
  --theirs: #fbf3e4; --theirs-line: #e2c58b; --link: #0a5fb4; --yes: #0b7a4b; --no: #b3361b; --unsure: #8a6400; }
@media (prefers-color-scheme: dark) {
  :root { --page: #12171d; --ink: #dde4eb; --soft: #98a5b3; --line: #303a45; --tint: #1a2129; --theirs: #2a2418;
    --theirs-line: #6b5627; --link: #6cb2f5; --yes: #4cc38a; --no: #f2836b; --unsure: #e0b34a; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); line-height: 1.5;
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "Noto Sans", sans-serif; }
main, header, nav, footer { max-width: 1560px; margin: 0 auto; padding: 0 24px; }
header { padding-top: 36px; }
h1 { font-size: 28px; line-height: 1.2; margin: 0 0 6px; letter-spacing: -.01em; overflow-wrap: anywhere; }
h2 { font-size: 20px; margin: 0 0 12px; letter-spacing: -.005em; }
h3 { font-size: 15px; margin: 20px 0 6px; display: flex; gap: 8px; align-items: center; }
p { margin: 0 0 10px; max-width: 84ch; }
a { color: var(--link); }
.soft, figcaption, dd { color: var(--soft); }
nav { position: sticky; top: 0; z-index: 3; background: var(--page); border-bottom: 1px solid var(--line);
  padding-top: 10px; padding-bottom: 10px; display: flex; flex-wrap: wrap; gap: 4px 18px; font-size: 14px; }
nav a { text-decoration: none; }
section { padding: 30px 0 6px; scroll-margin-top: 44px; }
section + section { border-top: 1px solid var(--line); margin-top: 26px; }
.scroll { overflow-x: auto; margin: 0 0 10px; background: linear-gradient(to right, var(--page) 30%, transparent) 0 0,
  linear-gradient(to left, var(--page) 30%, transparent) 100% 0,
  linear-gradient(to right, var(--line), transparent) 0 0,
  linear-gradient(to left, var(--line), transparent) 100% 0; background-repeat: no-repeat;
  background-size: 36px 100%, 36px 100%, 8px 100%, 8px 100%; background-attachment: local, local, scroll, scroll; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; }
th, td { padding: 5px 8px; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line); }
thead th { font-weight: 600; border-bottom: 2px solid var(--soft); vertical-align: bottom; white-space: nowrap; }
thead tr + tr th { font-weight: 500; }
tbody tr:hover > * { background: var(--tint); }
td.number, th.number { text-align: right; white-space: nowrap; }
td.number small { color: var(--soft); font-size: .92em; }
td.best b, td .best { font-weight: 750; }
td.method { padding-left: 58px; text-indent: -50px; }
td.method, td.run { min-width: 14em; overflow-wrap: break-word; max-width: 24em; }
td.overall { min-width: 11em; }
td.method svg { vertical-align: -2px; margin-right: 6px; }
tbody tr.first > * { border-top: 2px solid var(--soft); }
tbody tr.first > td.gap { border: 0; }
.theirs { background: var(--theirs); border-left: 1px solid var(--theirs-line); }
.theirs.head { border-bottom-color: var(--theirs-line); font-style: italic; }
td.gap, th.gap { border: 0; padding: 0 7px; background: none !important; }
th[data-sorts] { cursor: pointer; }
th[data-sorts]:hover { color: var(--link); }
th[aria-sort="ascending"]::after { content: " ↑"; } th[aria-sort="descending"]::after { content: " ↓"; }
label.only { display: inline-flex; gap: 6px; align-items: center; font-size: 14px; margin: 0 0 8px; }
section:has(input.only:checked) tr.early { display: none; }
dl { margin: 0; display: grid; grid-template-columns: max-content 1fr; gap: 4px 16px; font-size: 14px; }
dt { font-weight: 600; } dd { margin: 0; overflow-wrap: anywhere; }
code { font: 12.5px/1.4 ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; }
ul.notes { margin: 0; padding: 12px 16px 12px 34px; background: var(--tint); border-left: 3px solid var(--unsure);
  font-size: 14px; overflow-wrap: anywhere; }
figure { margin: 0 0 22px; }
figcaption { font-size: 13.5px; max-width: 92ch; margin-top: 8px; }
.charts { display: flex; flex-wrap: wrap; gap: 14px 10px; align-items: flex-start; }
.charts > * { max-width: 100%; overflow-x: auto; }
.charts > div > p { font-size: 13.5px; font-weight: 600; margin: 0; display: flex; gap: 7px; align-items: center; }
figure svg text { font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif !important; }
.legend { display: flex; flex-wrap: wrap; gap: 4px 20px; font-size: 13.5px; margin: 0 0 10px; }
.legend span { display: inline-flex; align-items: center; gap: 7px; overflow-wrap: anywhere; }
table.pictures { table-layout: fixed; width: 100%; }
.pictures td { padding: 3px; border: 0; font-size: 12.5px; text-align: center; }
.pictures th { padding: 3px; border: 0; font-size: 12.5px; text-align: center; white-space: normal; }
.pictures td.row { text-align: left; padding-top: 12px; font-weight: 600; }
.pictures img { width: 100%; height: auto; max-width: 220px; margin: 0 auto; display: block; border-radius: 2px; }
.pictures tbody tr:hover > * { background: none; }
.yes { color: var(--yes); font-weight: 650; } .no { color: var(--no); font-weight: 650; }
.unsure { color: var(--unsure); font-weight: 650; }
.downloads { display: flex; flex-wrap: wrap; gap: 10px; }
.downloads a { border: 1px solid var(--line); border-radius: 6px; padding: 6px 14px; text-decoration: none; }
.downloads a:hover { background: var(--tint); }
footer { padding-top: 26px; padding-bottom: 40px; font-size: 13px; color: var(--soft); }
details > summary { cursor: pointer; margin: 6px 0 10px; font-size: 14px; color: var(--link); }
@media (max-width: 640px) { main, header, nav, footer { padding-left: 14px; padding-right: 14px; }
  h1 { font-size: 23px; } nav { position: static; } dl { grid-template-columns: 1fr; } dd { margin-bottom: 6px; } }
@page { size: A4 landscape; margin: 12mm; }
@media print { :root { --page: #fff; --ink: #000; --soft: #444; --line: #bbb; --tint: #fff; --theirs: #f6f0e2;
    --theirs-line: #b99; color-scheme: light; }
  body { font-size: 11px; } nav, .downloads, label.only, summary { display: none; }
  table { font-size: 9.5px; } th, td { padding: 2px 5px; } .scroll { overflow: visible; background: none; }
  td.method, td.run { min-width: 9em; }
  main, header, footer { max-width: none; padding-left: 0; padding-right: 0; }
  figure, tr { break-inside: avoid; } .charts { break-inside: auto; } .charts > * { break-inside: avoid; }
  h2, h3 { break-after: avoid; } }
"""

SCRIPT = """
for (const head of document.querySelectorAll('th[data-sorts]')) head.addEventListener('click', () => {
  const column = Number(head.dataset.sorts), body = head.closest('table').tBodies[0];
  const up = head.getAttribute('aria-sort') === 'descending';
  for (const other of head.closest('thead').querySelectorAll('th')) other.removeAttribute('aria-sort');
  head.setAttribute('aria-sort', up ? 'ascending' : 'descending');
  const value = row => row.cells[column].dataset.value ?? '';
  const rank = (a, b) => (a === '') - (b === '') || (up ? 1 : -1) *
    (isNaN(a) || isNaN(b) ? a.localeCompare(b) : a - b);
  [...body.rows].sort((a, b) => rank(value(a), value(b))).forEach(row => body.append(row));
});
"""
